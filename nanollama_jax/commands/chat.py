"""Chat with a fine-tuned checkpoint in the terminal.

    nanollama chat --checkpoint runs/curriculum_nano
    nanollama chat --checkpoint runs/curriculum_nano --ask 'What is 12 + 7?' --ask 'And 12 - 7?'
    nanollama chat --checkpoint runs/curriculum_nano --tools calculate,get_weather \
--ask 'What is 12 times 7?'

Thoughts and tool calls are shown apart from the answer. The tools are those of the built-in
training data (nanollama_jax/synthetic/tools.py); calls are run, and the model sees the results.
"""

import contextlib
import json
from collections.abc import Iterator

from nanollama_jax.chat import chatml
from nanollama_jax.chat.conversations import Message, Tools, parse_tools
from nanollama_jax.command_line import ArgumentParser, sampling
from nanollama_jax.console import Console, console, error_console
from nanollama_jax.errors import BadInput, one_line_errors
from nanollama_jax.infer.engine import Engine
from nanollama_jax.infer.samples import parts
from nanollama_jax.infer.sampling import Sampling
from nanollama_jax.synthetic import tools

MAX_CALLS = 4  # consecutive messages with calls
COLOURS = {"thinks": "dim italic", "calls": "yellow", "result": "cyan"}


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_checkpoint()
    parser.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="TEXT",
        help="a user message; several make one conversation (default: interactive)",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--tools",
        default="",
        metavar="NAME,NAME",
        help=f"what the model may call: {', '.join(tools.TOOLS)}",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=300, help="per message (default: %(default)s)"
    )
    parser.add_sampling()
    arguments = parser.parse_args()
    with one_line_errors():
        chosen = sampling(arguments)
        names = [name for name in arguments.tools.split(",") if name]
        if unknown := [name for name in names if name not in tools.TOOLS]:
            raise BadInput(f"there is no tool {unknown[0]!r}: there are {', '.join(tools.TOOLS)}")
        if not all(text.strip() for text in arguments.ask):
            raise BadInput("--ask is empty: give it a text")
        offered = parse_tools([tools.schema(name) for name in names])
        engine = Engine.from_checkpoint(arguments.checkpoint)
        chatml.check_tokenizer(engine.tokenizer)
        start = [Message("system", arguments.system)] if arguments.system else []
        if not arguments.ask:
            error_console.print("An empty line or Ctrl-D ends; /new starts a new conversation.")
        messages = list(start)
        for text in arguments.ask or typed():
            if text == "/new":
                messages = list(start)
                continue
            if arguments.ask:
                console.print(f"   you: {text}")
            try:
                messages = reply(
                    engine,
                    [*messages, Message("user", text)],
                    offered,
                    chosen,
                    arguments.max_new_tokens,
                    console,
                )
            except BadInput as error:
                if arguments.ask:
                    raise
                # A conversation that is too long does not end the session
                error_console.print(f"error: {error}: /new starts a new conversation")


def reply(
    engine: Engine,
    messages: list[Message],
    offered: Tools,
    sampling: Sampling,
    max_new_tokens: int,
    console: Console,
) -> list[Message]:
    """Shows the model's answer, with the calls and results before it.

    Returns `messages` with these appended.
    """

    def show(what: str, text: str) -> None:
        console.print(f"{what:>6}: {text}", style=COLOURS.get(what, "bold"))

    for _ in range(MAX_CALLS):
        prompt = chatml.encode_prompt(messages, engine.tokenizer, offered)
        (completion,) = engine.generate([prompt], sampling, max_new_tokens=max_new_tokens)
        message = chatml.parse_reply(completion.tokens, engine.tokenizer)
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
            except BadInput as error:  # the model's mistake, reported to the model
                result = json.dumps({"error": str(error)})
            show("result", result)
            messages.append(Message("tool", result))
        if not message.tool_calls:
            return messages
    console.print(f"        (no answer after {MAX_CALLS} messages with calls)")
    return messages


def typed() -> Iterator[str]:
    """The lines that the user types, until an empty one or the end of the input."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (text := input("you: ")).strip():
            yield text
