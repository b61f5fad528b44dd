"""Runs exports of a checkpoint in the programs they are for, and shows how near they come: a greedy sample of each, and logits on the same tokens.

python tools/compare_exports.py --checkpoint runs/1b/phase3 --hf exports/1b --gguf exports/1b-f16.gguf --gguf exports/1b-q4_k_m.gguf
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np

from nanollama_jax.console import console
from nanollama_jax.errors import ArgumentParser, BadInput, one_line_errors
from nanollama_jax.export.compare import (
    Difference,
    LlamaCpp,
    Transformers,
    transformers_is_installed,
)
from nanollama_jax.infer.engine import Engine


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a workdir (its latest checkpoint), or WORKDIR/checkpoints/step_N",
    )
    parser.add_argument("--hf", metavar="DIR", help="what tools/export_hf.py wrote")
    parser.add_argument(
        "--gguf",
        action="append",
        default=[],
        metavar="FILE",
        help="what tools/export_gguf.py wrote; can be given several times",
    )
    parser.add_argument("--prompt", default="The", help="default: %(default)s")
    parser.add_argument("--max_new_tokens", type=int, default=60, help="default: %(default)s")
    arguments = parser.parse_args()
    if not (arguments.hf or arguments.gguf):
        parser.error("there is nothing to compare with: give --hf or --gguf")
    with one_line_errors():
        if arguments.hf and not arguments.gguf and not transformers_is_installed():
            raise BadInput(
                "--hf needs transformers and torch, which are not installed: pip install -r requirements-dev.txt"
            )
        engine = Engine.from_checkpoint(arguments.checkpoint)
        prompt = engine.tokenizer.encode(arguments.prompt, bos=True)
        ours = engine.generate([prompt], max_new_tokens=arguments.max_new_tokens, stop_ids=())[
            0
        ].tokens
        row = (prompt + ours)[: engine.context_length]
        logits = engine.logits(row)
        console.print(f"\nours: {arguments.prompt}{show(engine, ours)}")
        if arguments.hf and transformers_is_installed():
            compare(
                engine, "transformers", Transformers(arguments.hf), arguments.prompt, ours, logits
            )
        elif arguments.hf:
            console.print(
                "\ntransformers and torch are not installed: the Hugging Face folder is not run"
            )
        for path in arguments.gguf:
            compare(
                engine,
                pathlib.Path(path).name,
                LlamaCpp(path, len(row)),
                arguments.prompt,
                ours,
                logits,
            )
    console.print()


def compare(
    engine: Engine,
    name: str,
    other: Transformers | LlamaCpp,
    text: str,
    ours: list[int],
    logits: np.ndarray,
) -> None:
    """Prints what `other` goes on with after `text`, and how far its logits are from ours."""
    if other.vocab_size != engine.model.vocab_size:
        raise BadInput(
            f"{name} has a vocabulary of {other.vocab_size} and the checkpoint of {engine.model.vocab_size}: it is another model's export"
        )
    prompt = engine.tokenizer.encode(text, bos=True)
    row = (prompt + ours)[: len(logits)]
    theirs = other.greedy([prompt], len(ours))[0]
    shared = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours)
    )
    difference = Difference.of(logits, other.logits(row))
    ids = "the same" if other.tokenize(text) == prompt[1:] else "DIFFERENT"
    console.print(f"\n{name}: {text}{show(engine, theirs)}")
    console.print(
        f"[prompt's ids {ids}; first {shared} of {len(ours)} sampled tokens the same; over {len(row)} tokens: largest difference of a logit "
        f"{difference.largest:.2g}, mean KL {difference.mean_kl:.1e} nats, likeliest token the same at {difference.agreement:.0%}]"
    )


def show(engine: Engine, tokens: list[int]) -> str:
    return engine.tokenizer.decode(tokens).replace("\n", "\n    ")


if __name__ == "__main__":
    main()
