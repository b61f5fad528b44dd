"""Score a checkpoint: perplexity, and questions that can be checked.

    nanollama evaluate --checkpoint runs/curriculum_nano --tasks perplexity \
--text 'file://texts/*.jsonl' --text builtin://docs
    nanollama evaluate --checkpoint runs/1b --tasks perplexity --text file://wiki.test.txt \
--rule llama.cpp --out scores.json
    nanollama evaluate --checkpoint runs/curriculum_nano --tasks reasoning,tools,tool_turns

Perplexity is measured on running text, by one of two rules (nanollama_jax/evals/perplexity.py). The
other tasks ask a fine-tuned model questions from the test splits of the built-in conversations
(nanollama_jax/evals/verifiable.py). nanollama_jax/corpus/sources.py describes URLs.
"""

import argparse
import dataclasses
from typing import Any

from nanollama_jax import checkpoint
from nanollama_jax.command_line import ArgumentParser
from nanollama_jax.console import console, track
from nanollama_jax.corpus import sources
from nanollama_jax.errors import BadInput, one_line_errors
from nanollama_jax.evals import perplexity, verifiable
from nanollama_jax.files import output_file, write_json
from nanollama_jax.infer.engine import Engine
from nanollama_jax.infer.samples import parts

QUESTIONS = {  # task -> its questions, and how they are asked
    "reasoning": (verifiable.reasoning_questions, "greedy"),
    "tools": (verifiable.tool_calls, "greedy, the first call, under the tools' grammar"),
    "tool_turns": (
        verifiable.tool_turns,
        "greedy, the first message, without a grammar: calls or none",
    ),
}
TASKS = ("perplexity", *QUESTIONS)
MAX_QUESTIONS = 100_000  # all are in memory; the standard error is below 0.2 % by then


def main() -> None:
    arguments = parse_arguments()
    with one_line_errors():
        tasks = arguments.tasks.split(",")
        if unknown := set(tasks) - set(TASKS):
            raise BadInput(f"task {min(unknown)!r} is unknown: there is {', '.join(TASKS)}")
        if not 1 <= arguments.questions <= MAX_QUESTIONS:
            raise BadInput(
                f"--questions={arguments.questions}: give a number from 1 to {MAX_QUESTIONS:,}"
            )
        if arguments.show < 0:
            raise BadInput(f"--show={arguments.show} must be at least 0")
        if "perplexity" in tasks and not arguments.text:
            raise BadInput("perplexity needs a text: give --text, such as --text builtin://docs")
        for url in arguments.text:
            sources.matched_files(url)  # report a missing file before the model is loaded
        if arguments.out is not None:
            output_file(arguments.out)
        loaded = checkpoint.load(arguments.checkpoint)
        engine = Engine(
            loaded.model,
            loaded.params,
            loaded.tokenizer,
            rope_theta=loaded.rope_theta,
            context_length=loaded.context_length,
        )
        console.print(
            f"{loaded.path}: step {loaded.metadata.step:,} of {loaded.metadata.phase}, "
            f"rope theta {loaded.rope_theta:,.0f}"
        )
        results = dict(
            checkpoint=str(loaded.path),
            rope_theta=loaded.rope_theta,
            provenance=checkpoint.provenance(loaded.metadata),
        )
        if "perplexity" in tasks:
            results |= measure_perplexity(arguments, engine)
        if asked := [task for task in tasks if task != "perplexity"]:
            results |= ask(arguments, engine, asked)
        if arguments.out is not None:
            write_json(arguments.out, results)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_checkpoint()
    parser.add_argument(
        "--tasks", required=True, metavar="TASK,TASK", help=f"what to measure: {', '.join(TASKS)}"
    )
    parser.add_argument("--out", metavar="FILE.json", help="where to write the results")
    group = parser.add_argument_group("tasks other than perplexity")
    group.add_argument(
        "--questions",
        type=int,
        default=300,
        help="number of questions of each task (default: %(default)s)",
    )
    group.add_argument(
        "--show", type=int, default=0, metavar="N", help="print the first N replies of each task"
    )
    group = parser.add_argument_group("perplexity")
    group.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="URL",
        help="a text; may be given several times, each has its own row",
    )
    group.add_argument(
        "--rule",
        default="sliding",
        choices=perplexity.RULES,
        help="how windows are placed (default: %(default)s)",
    )
    group.add_argument(
        "--context",
        type=int,
        help="tokens per window (default: the checkpoint's context length; llama.cpp: 512)",
    )
    group.add_argument(
        "--stride",
        type=int,
        help="tokens that a sliding window advances (default: half the context)",
    )
    group.add_argument(
        "--max_tokens",
        type=int,
        default=1_000_000,
        help="tokens to use of each text (default: %(default)s)",
    )
    return parser.parse_args()


def ask(arguments: argparse.Namespace, engine: Engine, tasks: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = dict(questions=arguments.questions)
    for task in tasks:
        ask_all, how = QUESTIONS[task]
        verdicts = list(track(ask_all(engine, arguments.questions), task, arguments.questions))
        for verdict in verdicts[: arguments.show]:
            replied = "".join(f"\n    {what}: {text!r}" for what, text in parts(verdict.reply))
            console.print(
                f"[{verdict.kind}, {'right' if verdict.right else 'wrong'}] "
                f"{verdict.question!r}{replied}"
            )
        results[task] = verifiable.shares(verdicts)
        console.print(f"{task}: test split, {how}")
        for kind, found in results[task].items():
            valid = f"   valid {found['valid']:6.1%}" if "valid" in found else ""
            console.print(
                f"  {kind:18} {found['count']:5,}   right {found['right']:6.1%} ± "
                f"{found['standard_error']:.1%}{valid}"
            )
    return results


def measure_perplexity(arguments: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    context, stride = perplexity.resolve(
        arguments.rule, arguments.context, arguments.stride, engine.context_length
    )
    console.print(f"perplexity, {perplexity.describe(arguments.rule, context, stride)}")
    width = max(map(len, arguments.text))
    console.print(
        f"{'text':{width}} {'documents':>9} {'tokens':>11}  {'nats/token':>10}  "
        f"{'std. error':>10} {'over':9}  {'perplexity':>10}  {'bits/byte':>9}"
    )
    texts = {}
    for url in arguments.text:
        documents = (document.text for document in sources.read_documents(url, 0, 1))
        try:
            found = perplexity.measure(
                engine.score,
                engine.tokenizer,
                documents,
                rule=arguments.rule,
                context=context,
                stride=stride,
                max_tokens=arguments.max_tokens,
            )
        except BadInput as error:
            raise BadInput(f"{url}: {error}") from error
        error = "-" if found.standard_error is None else f"{found.standard_error:.4f}"
        cut = f"  cut at {arguments.max_tokens:,} tokens" if found.cut else ""
        console.print(
            f"{url:{width}} {found.documents:9,} {found.tokens:11,}  {found.nats_per_token:10.4f}  "
            f"{error:>10} {found.over:9}  {found.perplexity:10,.3f}  "
            f"{found.bits_per_byte:9.4f}{cut}"
        )
        texts[url] = dataclasses.asdict(found)
    used = dict(
        rule=arguments.rule, context=context, stride=stride, max_tokens=arguments.max_tokens
    )
    return {"perplexity": used | {"texts": texts}}
