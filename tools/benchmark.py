"""Speed, compared with the usual alternative measured in the same run.

On a CPU, or anywhere:

    python tools/benchmark.py train           training step against transformers + torch, nano shape
    python tools/benchmark.py data            preparation against bare SentencePiece; the pipeline
    python tools/benchmark.py data --source 'file://texts/*.jsonl' --tokenizer FILE
    python tools/benchmark.py decontaminate --source URL --benchmark gsm8k=URL
                                              documents/s on one core, against MinHash
    python tools/benchmark.py corpus          open, shuffle, resume: 1,000 shards of 30B tokens
    python tools/benchmark.py decode          generation against transformers and llama.cpp
    python tools/benchmark.py grammar         the cost of a constraint per token

On an NVIDIA GPU, each case in its own process, with none started after --minutes:

    python tools/benchmark.py train --scale 1b --seq_len 4096 --json train_4k.json
                                              training step by attention and remat policy
    python tools/benchmark.py train --scale 1b --profile traces
                                              a trace of the first case, for xprof or Perfetto
    python tools/benchmark.py torch --scale 1b --seq_len 4096
                                              training step against transformers + torch
    python tools/benchmark.py breakdown --scale 1b
                                              where the time of a step goes
    python tools/benchmark.py kernels --scale 1b
                                              matrix products and attention alone
    python tools/benchmark.py decode --scale 1b
                                              generation against memory bandwidth
"""

import argparse
import os

import checkout  # noqa: F401  puts the repository on sys.path

from benchmarks import breakdown, data, decode, kernels, torch_peer, train
from benchmarks.cases import run_cases
from benchmarks.report import collect, has_gpu
from nanollama_jax import settings
from nanollama_jax.command_line import ArgumentParser, named_urls
from nanollama_jax.errors import BadInput, one_line_errors
from nanollama_jax.recipes import BENCHMARKS, MODELS

WHAT = (
    "train",
    "torch",
    "breakdown",
    "kernels",
    "data",
    "decontaminate",
    "corpus",
    "decode",
    "grammar",
)
ON_GPU = ("train", "torch", "breakdown", "kernels", "decode")
ONLY_ON_GPU = ("torch", "breakdown", "kernels")


def on_gpu(arguments: argparse.Namespace) -> None:
    """The subject's cases, its table, and what follows from it."""
    a = arguments
    rounds, where = (
        a.rounds or 3,
        f"{a.scale}, rows of {a.seq_len:,} tokens, {train.TOKENS:,} tokens a step",
    )
    cases, columns, title, notes = {
        "train": lambda: (
            train.gpu_cases(a.scale, a.seq_len, rounds, a.steps, a.profile),
            train.GPU_COLUMNS,
            f"Our training step: {where}",
            lambda rows: train.GPU_NOTES,
        ),
        "torch": lambda: (
            torch_peer.gpu_cases(a.scale, a.seq_len, rounds, a.steps),
            torch_peer.COLUMNS,
            f"Our training step against transformers + torch: {where}",
            torch_peer.ratios,
        ),
        "breakdown": lambda: (
            breakdown.gpu_cases(a.scale, a.seq_len, rounds, a.steps),
            breakdown.COLUMNS,
            f"Where a training step's time goes: {where}",
            breakdown.rest,
        ),
        "kernels": lambda: (
            kernels.gpu_cases(a.scale, rounds),
            kernels.COLUMNS,
            f"Kernels at the shapes of {a.scale}",
            lambda rows: kernels.NOTES,
        ),
        "decode": lambda: (
            decode.gpu_cases(a.scale, rounds),
            decode.COLUMNS,
            f"Decoding, {a.scale}: {decode.PROMPT_TOKENS} prompt tokens, "
            f"{decode.NEW_TOKENS} new tokens",
            lambda rows: decode.NOTES,
        ),
    }[a.what]()
    collect(run_cases(cases, a.minutes), columns, title, a.json, notes)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument(
        "--source", help="data, decontaminate: a source URL (default: the built-in corpus)"
    )
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="decontaminate, data: what to search for",
    )
    parser.add_argument(
        "--rounds", type=int, help="measurements of each case (default: 5; on a GPU 3)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        help="train, torch, breakdown: steps per measurement (default: %(default)s)",
    )
    parser.add_argument(
        "--scale", choices=tuple(MODELS), help="size of the model (default: nano; on a GPU 1b)"
    )
    parser.add_argument(
        "--tokenizer",
        help="data, grammar: a SentencePiece model (default: for data, one trained on the source; "
        "for grammar, data/nano/tokenizer.model)",
    )
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument(
        "--seq_len",
        type=int,
        default=4096,
        help="train, torch, breakdown: tokens per row (default: %(default)s)",
    )
    gpu.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="start no case after this time (default: %(default)s)",
    )
    gpu.add_argument("--json", metavar="FILE", help="the table as JSON, rewritten after each case")
    gpu.add_argument(
        "--profile",
        metavar="DIR",
        help="train: a jax.profiler trace of a few steps of the first case, and no other case",
    )
    arguments = parser.parse_args()
    for name in ("rounds", "steps", "seq_len"):
        if (count := getattr(arguments, name)) is not None and count < 1:
            raise BadInput(f"--{name}={count} must be at least 1")
    if arguments.what in ONLY_ON_GPU and not has_gpu():
        parser.error(
            f"{arguments.what} measures an NVIDIA GPU, and none was found "
            "(nvidia-smi, JAX_PLATFORMS)"
        )
    return arguments


def main() -> None:
    arguments = parse_arguments()
    benchmarks = named_urls(arguments.benchmark)
    settings.apply()  # before jax; the processes of the cases inherit it
    gpu_here = arguments.what in ON_GPU and has_gpu()
    arguments.scale = arguments.scale or ("1b" if gpu_here else "nano")
    if gpu_here:
        on_gpu(arguments)
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if arguments.what == "train":
        train.benchmark_on_cpu(arguments.rounds or 5, arguments.steps)
    elif arguments.what == "decode":
        decode.benchmark_on_cpu(arguments.scale, arguments.rounds or 5)
    elif arguments.what == "grammar":
        decode.benchmark_grammar(arguments.tokenizer or "data/nano/tokenizer.model")
    elif arguments.what == "corpus":
        data.benchmark_corpus()
    elif arguments.what == "decontaminate":
        data.benchmark_decontaminate(arguments.source or "builtin://docs", benchmarks or BENCHMARKS)
    else:
        data.benchmark_data(arguments.source, arguments.tokenizer, benchmarks)


if __name__ == "__main__":
    with one_line_errors():
        main()
