"""Preference pairs to fine-tune on with DPO: an answer that was chosen and one that was rejected. A row is in one of these forms:

    {"prompt": "...", "chosen": "...", "rejected": "..."}      each can also be a list of messages (data/conversations.py), and the prompt be
    {"messages": [...], "chosen": "...", "rejected": "..."}    named `messages`
    {"chosen": [...], "rejected": [...]}                       whole conversations, as in UltraFeedback-binarized: they count, not a `prompt`
                                                               or `messages` beside them
    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", ...}      Anthropic/hh-rlhf's transcripts; `prompt` can hold their beginning

Also the check of a file of either kind of data, which tools/check_finetuning_data.py shows.
"""

import collections
import dataclasses
import json
import re
import reprlib
from collections.abc import Callable, Iterator
from typing import Any

from nanollama_jax.data.conversations import Conversation, Message, naming, parse_conversation, parse_messages, parse_tools, present, read_rows
from nanollama_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Preference:
    """`prompt` + `chosen` and `prompt` + `rejected` are conversations, as in `Conversation`; `prompt` is all that they begin with alike.

    Both answers are one message, an assistant's, but where conversations part earlier, or tools are called: then they go on to an assistant's.
    """

    where: str  # file:line
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


def read_preferences(url: str, *, on_bad: Callable[[str, BadInput], None]) -> Iterator[Preference]:
    """Yields the preference pairs of a source URL (data/sources.py); `on_bad` as in `read_rows`."""
    return read_rows(url, parse_preference, on_bad)


def parse_preference(record: Any, where: str) -> Preference:
    """The pair in a row of any of the formats above. Raises `BadInput`, whatever `record` is, where it holds none."""
    with naming(where):
        record = present(record, "the row")
        if "chosen" not in record and "rejected" not in record:
            raise BadInput(f"no preference, with keys {reprlib.repr(list(record))}: known are `prompt` or `messages` with `chosen` and `rejected`")
        tools = parse_tools(record.get("tools"))
        with naming("`chosen`"):
            chosen, chosen_tools = parse_messages(_turns(record, "chosen"), tools)
        with naming("`rejected`"):
            rejected, rejected_tools = parse_messages(_turns(record, "rejected"), tools)
        if chosen == rejected:
            raise BadInput("`chosen` equals `rejected`: there is nothing to prefer, remove the row")
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
        if shared in (len(chosen), len(rejected)):
            raise BadInput("one of `chosen` and `rejected` is the beginning of the other: there are no two answers to one prompt")
        if {chosen[shared].role, rejected[shared].role} != {"assistant"} or chosen_tools != rejected_tools:
            raise BadInput(f"the prompts of `chosen` and `rejected` differ, at message {shared + 1} or in their tools: give both the same prompt")
        return Preference(where, chosen[:shared], chosen[shared:], rejected[shared:], chosen_tools)


def parse_row(record: Any, where: str) -> Conversation | Preference:
    """A row of either kind: one with `chosen` or `rejected` is a preference."""
    is_preference = isinstance(record, dict) and {"chosen", "rejected"} & {key for key, value in record.items() if value is not None}
    return parse_preference(record, where) if is_preference else parse_conversation(record, where)


def check(url: str, on_bad: Callable[[str, BadInput], None]) -> dict[str, collections.Counter[str]]:
    """Counts what each file of `url` holds: rows, those good and bad, and what is in the good ones. Bad rows go to `on_bad` too."""
    files: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def file_of(where: str) -> collections.Counter[str]:
        return files[re.sub(r":\d+$", "", where)]

    def count_bad(where: str, mistake: BadInput) -> None:
        file_of(where).update(rows=1, bad=1)
        on_bad(where, mistake)

    for row in read_rows(url, parse_row, count_bad):
        pair = isinstance(row, Preference)
        messages = row.prompt + row.chosen + row.rejected if pair else row.messages
        calls = [call.arguments for message in messages for call in message.tool_calls]
        characters = sum(len(message.content) + len(message.thought) for message in messages) + sum(len(json.dumps(call)) for call in calls)
        counts = {"rows": 1, "good": 1, "pairs": pair, "turns": len(messages), "characters": characters}
        counts |= {"with thoughts": any(message.thought for message in messages), "with tools": bool(row.tools), "with calls": bool(calls)}
        file_of(row.where).update({name: int(count) for name, count in counts.items()})
    if not files:
        raise BadInput(f"{url} has no rows: is it the right file?")
    return files


def kind_of_mistake(where: str, mistake: str) -> str:
    """The words of a mistake without what differs from row to row: place, numbers and what is quoted from the data."""
    return re.sub(r"\[.*?\]|(?<!\w)'[^']*'|\"[^\"]*\"|(?<![\w-])\d+", "...", mistake.removeprefix(f"{where}: "))


def _turns(record: dict[str, Any], key: str) -> Any:
    """The whole conversation that ends in the answer of `key`, written as a list of messages."""
    prompt, answer = record.get("prompt", record.get("messages")), record.get(key)
    if isinstance(answer, str) and answer.strip():
        if answer.startswith("\n\nHuman:"):
            return _transcript(answer)
        if isinstance(prompt, str) and prompt.startswith("\n\nHuman:"):
            return _transcript(prompt + answer)
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list) or not answer:
        raise BadInput("it is missing, empty, or neither a string nor a list of messages: fill it in, or remove the row")
    first = present(answer[0], "message 1")
    if first.get("role", first.get("from")) not in ("assistant", "gpt", "function_call"):
        return answer
    if prompt is None:
        raise BadInput("there is no prompt to this answer: add `prompt` or `messages`")
    return ([{"role": "user", "content": prompt}] if not isinstance(prompt, list) else prompt) + answer


def _transcript(text: str) -> list[dict[str, str]]:
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    return [{"role": speaker.lower(), "content": said.strip()} for speaker, said in zip(parts[::2], parts[1::2])]
