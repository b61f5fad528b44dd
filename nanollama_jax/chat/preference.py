"""Preference pairs for DPO: an answer that was chosen and one that was rejected.

A row has one of these forms:

    {"prompt": "...", "chosen": "...", "rejected": "..."}
        Each can also be a list of messages (chat/conversations.py).
    {"messages": [...], "chosen": "...", "rejected": "..."}
        The same with another name for the prompt.
    {"chosen": [...], "rejected": [...]}
        Whole conversations; a `prompt` beside them is their beginning or last question.
    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", ...}
        Anthropic/hh-rlhf's transcripts; `prompt` can hold their beginning.

Scores beside the answers (`score_chosen` and `score_rejected`, `chosen-rating` and
`rejected-rating`; ranks, of which the least is the best; `margin`) must say that the chosen one is
better: in a bad row they tie, contradict that or are not numbers.
"""

import dataclasses
import math
import re
import reprlib
from typing import Any

from nanollama_jax.chat.conversations import (
    Conversation,
    Message,
    naming,
    open_row,
    parse_conversation,
    parse_messages,
    present,
    role_of,
)
from nanollama_jax.errors import BadInput

# score_chosen, chosen-rating, chosen_avg_rating, rejectedReward, rank_chosen and the like
_SCORE = re.compile(
    r"(?=.*(?:chosen|rejected))"
    r".*(?:^|[-_. ]|chosen|rejected)(?:score|rating|reward|rank|ranking|grade|quality)(?:$|[-_. ])",
    re.IGNORECASE,
)
_MARGIN = re.compile(r"(?:(?:score|rating|reward|preference)_)?(?:margin|difference|diff|gap)")
_HUMAN = re.compile(r"\s*Human:")  # what a transcript begins with


@dataclasses.dataclass(frozen=True)
class Preference:
    """`prompt` + `chosen` and `prompt` + `rejected` are conversations, as in `Conversation`;
    `prompt` is their longest common beginning.

    Each answer is one message of the assistant, or several messages that end with one, if the
    conversations diverge earlier or tools are called.
    """

    where: str  # file:line
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """All that there are: not a conversation."""
        return self.prompt + self.chosen + self.rejected


def parse_preference(record: Any, where: str) -> Preference:
    """The pair in a row of any of the formats above.

    Raises `BadInput`, whatever `record` is, if it holds none.
    """
    with naming(where):
        record, system, tools = open_row(record)
        if "chosen" not in record and "rejected" not in record:
            raise BadInput(
                f"no preference, with keys {reprlib.repr(list(record))}: known are `prompt` or "
                "`messages` with `chosen` and `rejected`"
            )
        with naming("`chosen`"):
            chosen, chosen_tools = parse_messages(_turns(record, "chosen"), system, tools)
        with naming("`rejected`"):
            rejected, rejected_tools = parse_messages(_turns(record, "rejected"), system, tools)
        if chosen == rejected:
            raise BadInput("`chosen` equals `rejected`: there is nothing to prefer, remove the row")
        shared = next(
            (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b),
            min(len(chosen), len(rejected)),
        )
        if shared in (len(chosen), len(rejected)):
            raise BadInput(
                "one of `chosen` and `rejected` is the beginning of the other: there are no two "
                "answers to one prompt"
            )
        if {chosen[shared].role, rejected[shared].role} != {
            "assistant"
        } or chosen_tools != rejected_tools:
            raise BadInput(
                f"the prompts of `chosen` and `rejected` differ, at message {shared + 1} or in "
                "their tools: give both the same prompt"
            )
        for side, answer in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
            if not any(message.learned for message in answer if message.role == "assistant"):
                raise BadInput(f"`{side}`: its answer is not to be trained on: remove the row")
        _check_scores(record)
        return Preference(where, chosen[:shared], chosen[shared:], rejected[shared:], chosen_tools)


def parse_row(record: Any, where: str) -> Conversation | Preference:
    """A row of either kind: one with `chosen` or `rejected` is a preference."""
    is_preference = isinstance(record, dict) and {"chosen", "rejected"} & {
        key for key, value in record.items() if value is not None
    }
    return parse_preference(record, where) if is_preference else parse_conversation(record, where)


def _check_scores(record: dict[str, Any]) -> None:
    """Raises `BadInput` if scores of the answers tie, contradict the labels or are not numbers."""
    keys = [key for key in record if _SCORE.search(key) or _MARGIN.fullmatch(key)]
    scores = {key: record[key] for key in keys}
    for key, value in scores.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            value = reprlib.repr(value)
            raise BadInput(f"`{key}` is {value}, not a finite number: correct or remove it")
    for key, value in scores.items():
        other = key.replace("chosen", "rejected")
        if _MARGIN.fullmatch(key):
            better, said = value, f"`{key}` is {value}"
        elif other != key and other in scores:
            better = value - scores[other]
            said = f"`{key}` is {value} and `{other}` is {scores[other]}"
            better = -better if "rank" in key.lower() else better
        else:
            continue
        if better <= 0:
            problem = "contradicts the labels" if better else "is a tie"
            raise BadInput(f"{said}, which {problem}: correct or remove the row")


def _turns(record: dict[str, Any], key: str) -> list[Any]:
    """The whole conversation that ends in the answer of `key`, written as a list of messages."""
    prompt, answer = record.get("prompt", record.get("messages")), record.get(key)
    beginning = _beginning(prompt)
    if isinstance(answer, str) and answer.strip():
        goes_on = isinstance(prompt, str) and _HUMAN.match(prompt) and not _HUMAN.match(answer)
        answer = (
            _written(f"Human:\n\nAssistant:{answer}", "assistant")[1:]
            if goes_on
            else _written(answer, "assistant")
        )
    if not isinstance(answer, list) or not answer:
        raise BadInput(
            "it is missing, empty, or neither a string nor a list of messages: fill it in, or "
            "remove the row"
        )
    said = _said(answer)
    if said[0][0] == "assistant":
        if prompt is None:
            raise BadInput("there is no prompt to this answer: add `prompt` or `messages`")
        return beginning + answer
    given, asked = _said(beginning), [each for each in said if each[0] == "user"]
    if prompt and given not in (said[: len(given)], asked[-1:]):
        raise BadInput(
            "the prompt is neither the beginning of the conversation nor its last user message: "
            "make it so, or remove it"
        )
    return answer


def _beginning(prompt: Any) -> list[Any]:
    """A prompt as a list of messages; a transcript's without the "Assistant:" at its end."""
    if not isinstance(prompt, str):
        return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if not _HUMAN.match(prompt) and re.search(r"\n\r?\n(Human|Assistant):", prompt):
        raise BadInput(
            "the prompt holds a transcript's turns but does not begin with `Human:`: cut what is "
            "before, or write it as messages"
        )
    return _written(re.sub(r"\n\r?\nAssistant:\s*$", "", prompt), "user")


def _written(text: str, role: str) -> list[dict[str, str]]:
    """A transcript's messages, or the one message of `role` that any other text is."""
    if not _HUMAN.match(text):
        return [{"role": role, "content": text}]
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.replace("\r\n", "\n").lstrip())[1:]
    return [
        {"role": speaker.lower(), "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2])
    ]


def _said(turns: list[Any]) -> list[tuple[str | None, list[str]]]:
    """The role and the words of each message, in either form."""
    turns = [present(turn, f"message {number}") for number, turn in enumerate(turns, 1)]
    return [
        (
            role_of(turn),
            text.split() if isinstance(text := turn.get("content", turn.get("value")), str) else [],
        )
        for turn in turns
    ]
