"""Draws where each head of a checkpoint looks on a text, and how far back each layer looks on average.

python tools/visualize_attention.py --checkpoint runs/curriculum_nano --text_file long.txt --out attention_visualizations.png
python tools/visualize_attention.py --checkpoint runs/1b --text_file book.txt --max_tokens 16384 --layers 0,10,21
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from nanollama_jax import checkpoint
from nanollama_jax.console import console
from nanollama_jax.errors import ArgumentParser, one_line_errors
from nanollama_jax.files import output_file
from nanollama_jax.infer.attention_maps import attention_maps, choose_layers, plot, read_tokens


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a workdir that main.py trained in, or one of its checkpoints/step_N",
    )
    parser.add_argument(
        "--text_file",
        required=True,
        metavar="FILE",
        help="a UTF-8 text; what is longer than the context is cut off",
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
        help="how much of the text to use (default: the checkpoint's context length)",
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
                f"{arguments.text_file} has {found:,} tokens with BOS: cut to the first {len(ids):,} (context: {loaded.context_length:,})"
            )
        maps = attention_maps(loaded.model, loaded.params, ids, loaded.rope_theta, arguments.bins)
        text, step, theta = (
            pathlib.Path(arguments.text_file).name,
            loaded.metadata.step,
            loaded.rope_theta,
        )
        title = f"{arguments.checkpoint}, step {step:,}: {len(ids):,} tokens of {text}, rope theta {theta:,.0f}"
        plot(maps, layers, title, arguments.out)
    console.print("layer  mean distance (tokens)  attention on BOS")
    for layer, (distance_N, first_share_N) in enumerate(
        zip(maps.distance_LN, maps.first_share_LN, strict=True)
    ):
        console.print(
            f"{layer:5}  {distance_N.mean():22,.1f}  {100 * first_share_N.mean():14.1f} %"
        )
    console.print(f"heat maps of layers {', '.join(map(str, layers))}: {arguments.out}")


if __name__ == "__main__":
    main()
