"""Draw where each attention head of a checkpoint looks on a text.

    nanollama visualize-attention --checkpoint runs/curriculum_nano --text_file long.txt
    nanollama visualize-attention --checkpoint runs/1b --text_file book.txt --max_tokens 16384 \
--layers 0,10,21 --out book.png

Also prints how far back each layer looks on average.
"""

import pathlib

from nanollama_jax import checkpoint
from nanollama_jax.command_line import ArgumentParser
from nanollama_jax.console import console
from nanollama_jax.errors import one_line_errors
from nanollama_jax.files import output_file
from nanollama_jax.infer.attention_maps import attention_maps, choose_layers, plot, read_tokens


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_checkpoint()
    parser.add_argument(
        "--text_file",
        required=True,
        metavar="FILE",
        help="a UTF-8 text; cut to the checkpoint's context length",
    )
    parser.add_argument(
        "--out",
        default="attention_visualizations.png",
        metavar="PNG",
        help="where to draw (default: %(default)s)",
    )
    parser.add_argument(
        "--max_tokens",
        type=int,
        help="tokens of the text to use (default: the checkpoint's context length)",
    )
    parser.add_argument(
        "--bins",
        type=int,
        default=128,
        help="squares along a side of a heat map (default: %(default)s)",
    )
    parser.add_argument(
        "--layers", metavar="0,5,21", help="layers to draw heat maps of (default: 8, evenly spaced)"
    )
    arguments = parser.parse_args()
    with one_line_errors():
        output_file(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        loaded = checkpoint.load(arguments.checkpoint)
        layers = choose_layers(loaded.model.num_layers, arguments.layers)
        ids, found = read_tokens(
            arguments.text_file, loaded.tokenizer, loaded.context_length, arguments.max_tokens
        )
        if len(ids) < found:
            console.print(
                f"{arguments.text_file} has {found:,} tokens including BOS: cut to the first "
                f"{len(ids):,} (context: {loaded.context_length:,})"
            )
        maps = attention_maps(loaded.model, loaded.params, ids, loaded.rope_theta, arguments.bins)
        title = (
            f"{arguments.checkpoint}, step {loaded.metadata.step:,}: {len(ids):,} tokens of "
            f"{pathlib.Path(arguments.text_file).name}, rope theta {loaded.rope_theta:,.0f}"
        )
        plot(maps, layers, title, arguments.out)
    console.print("layer  mean distance (tokens)  attention on BOS")
    for layer, (distance_N, first_share_N) in enumerate(
        zip(maps.distance_LN, maps.first_share_LN, strict=True)
    ):
        console.print(
            f"{layer:5}  {distance_N.mean():22,.1f}  {100 * first_share_N.mean():14.1f} %"
        )
    console.print(f"heat maps of layers {', '.join(map(str, layers))}: {arguments.out}")
