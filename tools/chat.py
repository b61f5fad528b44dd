"""Talks with a fine-tuned checkpoint in the terminal; thoughts and calls are shown apart from what is said.

python tools/chat.py --checkpoint runs/curriculum_nano
python tools/chat.py --checkpoint runs/curriculum_nano --ask 'What is 12 + 7?' --ask 'And 12 - 7?'
python tools/chat.py --checkpoint runs/curriculum_nano --tools calculate,get_weather --ask 'What is 12 times 7?'

The tools are those of the built-in training data (nanollama_jax/synthetic/tools.py); a call is run and its result given to the model.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from nanollama_jax.chat import chatml as chat
from nanollama_jax.chat.conversations import Message, Tools, parse_tools
from nanollama_jax.console import Console, console, error_console
from nanollama_jax.errors import ArgumentParser, BadInput, one_line_errors
from nanollama_jax.infer.engine import Engine
from nanollama_jax.infer.samples import parts
from nanollama_jax.infer.sampling import Sampling
from nanollama_jax.synthetic import tools

MAX_CALLS = 4  # messages that call, one after another
COLOURS = {"thinks": "dim italic", "calls": "yellow", "result": "cyan"}


def reply(
    engine: Engine,
    messages: list[Message],
    offered: Tools,
    sampling: Sampling,
    max_new_tokens: int,
    console: Console,
) -> list[Message]:
    """`messages` with the model's answer, and the calls and results before it; each is shown."""

    def show(what: str, text: str) -> None:
        console.print(f"{what:>6}: {text}", style=COLOURS.get(what, "bold"))

    for _ in range(MAX_CALLS):
        prompt = chat.encode_prompt(messages, engine.tokenizer, offered)
        (completion,) = engine.generate([prompt], sampling, max_new_tokens=max_new_tokens)
        message = chat.parse_reply(completion.tokens, engine.tokenizer)
        messages.append(message)
        for what, text in parts(message):
            show(what, text)
        if completion.finish_reason != "stop":
            console.print("        (cut off)")
        for call in message.tool_calls:
            try:
                if call.name not in {tool["name"] for tool in offered}:
                    raise BadInput(f"there is no tool {call.name!r}")
                result = json.dumps(tools.execute(call.name, call.arguments), ensure_ascii=False)
            except BadInput as error:  # the model's mistake, for the model to see
                result = json.dumps({"error": str(error)})
            show("result", result)
            messages.append(Message("tool", result))
        if not message.tool_calls:
            return messages
    console.print(f"        (no answer after {MAX_CALLS} messages that call)")
    return messages


def typed() -> Iterator[str]:
    """What the user types, to an empty line or the end."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (said := input("you: ")).strip():
            yield said


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a workdir (its latest checkpoint), or WORKDIR/checkpoints/step_N",
    )
    parser.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="TEXT",
        help="a user's message; several make one conversation",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system's message")
    parser.add_argument(
        "--tools",
        default="",
        metavar="NAME,NAME",
        help=f"what the model may call: {', '.join(tools.TOOLS)}",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=300, help="of a message (default: %(default)s)"
    )
    for field in dataclasses.fields(Sampling):
        parser.add_argument(
            f"--{field.name}", type=field.type, default=field.default, help="default: %(default)s"
        )
    arguments = parser.parse_args()
    with one_line_errors():
        sampling = Sampling(
            **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sampling)}
        )
        names = [name for name in arguments.tools.split(",") if name]
        if unknown := [name for name in names if name not in tools.TOOLS]:
            raise BadInput(f"there is no tool {unknown[0]!r}: there are {', '.join(tools.TOOLS)}")
        if not all(text.strip() for text in arguments.ask):
            raise BadInput("--ask is empty: give it a text")
        offered = parse_tools([tools.schema(name) for name in names])
        engine = Engine.from_checkpoint(arguments.checkpoint)
        chat.check_tokenizer(engine.tokenizer)
        begun = [Message("system", arguments.system)] if arguments.system else []
        if not arguments.ask:
            error_console.print("An empty line or Ctrl-D ends; /new begins a new conversation.")
        messages = list(begun)
        for said in arguments.ask or typed():
            if said == "/new":
                messages = list(begun)
                continue
            if arguments.ask:
                console.print(f"   you: {said}")
            try:
                messages = reply(
                    engine,
                    [*messages, Message("user", said)],
                    offered,
                    sampling,
                    arguments.max_new_tokens,
                    console,
                )
            except (
                BadInput
            ) as error:  # a conversation too long for the context does not end the session
                if arguments.ask:
                    raise
                error_console.print(f"error: {error}: /new begins a new conversation")


if __name__ == "__main__":
    main()
