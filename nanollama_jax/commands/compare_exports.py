"""Compare exports with their checkpoint, in the programs that they are for.

    nanollama compare-exports --checkpoint runs/1b/phase3 --hf exports/1b \
--gguf exports/1b-f16.gguf --gguf exports/1b-q4_k_m.gguf

Prints a greedy sample of each, and how far its logits are from ours on the same tokens.
"""

import pathlib

import numpy as np

from nanollama_jax.command_line import ArgumentParser
from nanollama_jax.console import console
from nanollama_jax.errors import BadInput, one_line_errors
from nanollama_jax.export.compare import (
    Difference,
    LlamaCpp,
    Transformers,
    transformers_is_installed,
)
from nanollama_jax.infer.engine import Engine


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_checkpoint()
    parser.add_argument("--hf", metavar="DIR", help="a folder that export-hf wrote")
    parser.add_argument(
        "--gguf",
        action="append",
        default=[],
        metavar="FILE",
        help="a file that export-gguf wrote; may be given several times",
    )
    parser.add_argument("--prompt", default="The", help="default: %(default)s")
    parser.add_argument("--max_new_tokens", type=int, default=60, help="default: %(default)s")
    arguments = parser.parse_args()
    if not (arguments.hf or arguments.gguf):
        parser.error("there is nothing to compare with: give --hf or --gguf")
    with one_line_errors():
        if arguments.hf and not arguments.gguf and not transformers_is_installed():
            raise BadInput(
                "--hf needs transformers and torch, which are not installed: "
                "pip install -r requirements-dev.txt"
            )
        engine = Engine.from_checkpoint(arguments.checkpoint)
        text = arguments.prompt
        prompt = engine.tokenizer.encode(text, bos=True)
        (completion,) = engine.generate(
            [prompt], max_new_tokens=arguments.max_new_tokens, stop_ids=()
        )
        ours = completion.tokens
        row = (prompt + ours)[: engine.context_length]
        logits_TV = engine.logits(row)
        console.print(f"\nours: {text}{show(engine, ours)}")
        if arguments.hf and transformers_is_installed():
            compare(engine, "transformers", Transformers(arguments.hf), text, ours, logits_TV)
        elif arguments.hf:
            console.print(
                "\ntransformers and torch are not installed: skipping the Hugging Face folder"
            )
        for path in map(pathlib.Path, arguments.gguf):
            compare(engine, path.name, LlamaCpp(path, len(row)), text, ours, logits_TV)
    console.print()


def compare(
    engine: Engine,
    name: str,
    other: Transformers | LlamaCpp,
    text: str,
    ours: list[int],
    logits_TV: np.ndarray,
) -> None:
    """Prints how `other` continues `text`, and how far its logits are from ours."""
    if other.vocab_size != engine.model.vocab_size:
        raise BadInput(
            f"{name} has a vocabulary of {other.vocab_size} and the checkpoint of "
            f"{engine.model.vocab_size}: it is another model's export"
        )
    prompt = engine.tokenizer.encode(text, bos=True)
    row = (prompt + ours)[: len(logits_TV)]
    theirs = other.greedy([prompt], len(ours))[0]
    shared = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours)
    )
    difference = Difference.of(logits_TV, other.logits(row))
    ids = "the same" if other.tokenize(text) == prompt[1:] else "DIFFERENT"
    console.print(f"\n{name}: {text}{show(engine, theirs)}")
    console.print(
        f"[prompt's ids {ids}; first {shared} of {len(ours)} sampled tokens the same; over "
        f"{len(row)} tokens: largest difference of a logit {difference.largest:.2g}, mean KL "
        f"{difference.mean_kl:.1e} nats, likeliest token the same at {difference.agreement:.0%}]"
    )


def show(engine: Engine, tokens: list[int]) -> str:
    return engine.tokenizer.decode(tokens).replace("\n", "\n    ")
