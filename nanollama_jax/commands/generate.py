"""Generate text with a checkpoint, streamed to the terminal.

    nanollama generate --checkpoint runs/curriculum_nano
    nanollama generate --checkpoint runs/curriculum_nano --prompt 'def area(' --temperature 0.8
    nanollama generate --checkpoint runs/curriculum_nano --prompts prompts.txt --out out.jsonl
    nanollama generate --checkpoint runs/curriculum_nano --prompt 'An answer: ' \
--json_schema schema.json

Without a prompt it is interactive: each line is a prompt of its own.
"""

import dataclasses
import itertools
import json
import pathlib
import time
from typing import Any

from nanollama_jax.command_line import ArgumentParser, sampling
from nanollama_jax.console import console, error_console, track
from nanollama_jax.errors import BadInput, one_line_errors
from nanollama_jax.files import output_file, whole_file
from nanollama_jax.infer.engine import Engine
from nanollama_jax.infer.grammar import json_schema
from nanollama_jax.infer.sampling import Sampling


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_checkpoint()
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="one prompt")
    what.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt per line; of a .jsonl file, the `prompt` of the object on each line",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="with --prompts: where to write the completions, one JSON object per line "
        "(default: stdout)",
    )
    parser.add_argument("--max_new_tokens", type=int, default=200, help="default: %(default)s")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end where this text appears; may be given several times",
    )
    parser.add_argument(
        "--json_schema", metavar="FILE", help="generate only JSON that fits this schema"
    )
    parser.add_sampling()
    arguments = parser.parse_args()
    if arguments.out is not None and not arguments.prompts:
        parser.error("--out goes with --prompts")
    with one_line_errors():
        chosen = sampling(arguments)
        options: dict[str, Any] = dict(max_new_tokens=arguments.max_new_tokens, stop=arguments.stop)
        if arguments.json_schema:
            options["grammar"] = json_schema(read_text(pathlib.Path(arguments.json_schema)))
        prompts = read_prompts(pathlib.Path(arguments.prompts)) if arguments.prompts else []
        out = output_file(arguments.out) if arguments.out is not None else None
        if out and not out.parent.is_dir():
            raise BadInput(
                f"{out.parent}: there is no such folder; create it, or choose another --out"
            )
        engine = Engine.from_checkpoint(arguments.checkpoint)
        if arguments.prompts:
            write_all(engine, prompts, chosen, options, out)
        elif arguments.prompt is not None:
            show(engine, arguments.prompt, chosen, options)
        else:
            converse(engine, chosen, options)


def show(engine: Engine, prompt: str, sampling: Sampling, options: dict[str, Any]) -> None:
    """Prints the prompt and streams its completion, then prints the speed on stderr."""
    started = time.monotonic()
    pieces = engine.stream(prompt, sampling, **options)
    shown, first = prompt, None  # the prompt is printed once the engine has accepted it
    while True:
        try:
            shown += next(pieces)
        except StopIteration as end:
            completion = end.value
            break
        console.print(shown, end="")
        shown, first = "", first or time.monotonic()
    console.print(shown)
    now, count = time.monotonic(), len(completion.tokens)
    rate = f", then {(count - 1) / (now - first):,.1f} tokens/s" if first and count > 1 else ""
    error_console.print(
        f"[{count} tokens, {completion.finish_reason}; "
        f"{(first or now) - started:.2f} s to the first{rate}]"
    )


def write_all(
    engine: Engine,
    prompts: list[str],
    sampling: Sampling,
    options: dict[str, Any],
    out: pathlib.Path | None,
) -> None:
    """Writes a JSON object per prompt, in order, to stdout or to `out` (atomically)."""
    started = time.monotonic()
    found = track(engine.completions(prompts, sampling, **options), "generating", len(prompts))
    completions = [completion for _, completion in sorted(found, key=lambda pair: pair[0])]
    seconds = time.monotonic() - started
    # A stream of another encoding would escape characters in a way that is not JSON
    ascii_only = out is None and not console.encoding.startswith("utf")
    rows = (
        {
            "prompt": prompt,
            "completion": c.text,
            "tokens": len(c.tokens),
            "finish_reason": c.finish_reason,
        }
        for prompt, c in zip(prompts, completions, strict=True)
    )
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    if out is None:
        console.print(lines, end="")
    else:
        with whole_file(out) as file:
            file.write(lines.encode())
    tokens = sum(len(c.tokens) for c in completions)
    error_console.print(
        f"[{len(prompts)} prompts, {tokens:,} tokens in {seconds:.1f} s including compilation: "
        f"{tokens / seconds:,.1f} tokens/s]"
    )


def converse(engine: Engine, sampling: Sampling, options: dict[str, Any]) -> None:
    error_console.print(
        "One prompt per line, which the model continues; an empty line or Ctrl-D ends. "
        f"Context: {engine.context_length:,} tokens."
    )
    for turn in itertools.count():
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if not prompt:
            return
        seed = (sampling.seed + turn) % 2**32
        try:
            show(engine, prompt, dataclasses.replace(sampling, seed=seed), options)
        except BadInput as error:  # a prompt that is too long does not end the session
            error_console.print(f"error: {error}")
        except KeyboardInterrupt:  # nor does interrupting an answer
            console.print()


def read_prompts(path: pathlib.Path) -> list[str]:
    """Raises `BadInput` for a file without prompts, or a .jsonl line that has none."""
    prompts = []
    # Not splitlines: it also splits at characters that JSON does not escape
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompts.append(json.loads(line)["prompt"] if path.suffix == ".jsonl" else line)
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f'{path}:{number}: a line is an object {{"prompt": "..."}}: {error!r}'
            ) from error
        if not isinstance(prompts[-1], str):
            raise BadInput(
                f"{path}:{number}: the prompt is of type {type(prompts[-1]).__name__}, not a string"
            )
    if not prompts:
        raise BadInput(f"{path} has no prompt")
    return prompts


def read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some Windows programs write a byte order mark
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}: convert it"
        ) from error
