"""Scripted replies are judged correctly: the right ones, and every way of being wrong."""

import dataclasses
import json

import pytest

from nanollama_jax.chat.conversations import Message, ToolCall
from nanollama_jax.evals import verifiable
from nanollama_jax.infer.batch import Completion
from nanollama_jax.synthetic import reasoning, tool_conversations
from nanollama_jax.tokenizer import TOOL_CALL, TURN_END
from tests.infer.scripted import CUT, Scripted
from tests.synthetic.test_tool_conversations import expected_calls

COUNT = 24


def test_reasoning(chat_tokenizer):
    answers = [reasoning.conversations("test", index)["answer"] for index in range(COUNT)]
    ways = {
        "right": lambda answer: Message("assistant", answer, "Well."),
        "only thought": lambda answer: Message("assistant", "", answer),
        "in words": lambda answer: Message("assistant", f"It is {answer}."),
        "cut off": lambda answer: answer + CUT,
    }
    engine = Scripted(
        chat_tokenizer,
        [list(ways.values())[index // 6](answer) for index, answer in enumerate(answers)],
    )
    verdicts = list(verifiable.reasoning_questions(engine, COUNT))
    assert [verdict.right for verdict in verdicts] == [True] * 6 + [False] * 18
    assert [verdict.kind for verdict in verdicts[:6]] == list(reasoning.TASKS)
    assert all(
        verdict.question in prompt and prompt.endswith("assistant\n")
        for verdict, prompt in zip(verdicts, engine.prompts, strict=True)
    )
    found = verifiable.shares(verdicts)
    assert found["all"] == {
        "count": COUNT,
        "right": 0.25,
        "standard_error": pytest.approx((0.25 * 0.75 / COUNT) ** 0.5),
    }
    assert (
        found["chain_sum"]["count"] == 8
        and found["gcd"]["count"] == 4
        and found["gcd"]["right"] == 0.25
    )


@pytest.fixture(scope="module")
def due() -> list[dict]:
    """The rows of the test split in which a call is due."""
    rows = (tool_conversations.conversations("test", index) for index in range(10 * COUNT))
    return [row for row in rows if row["kind"] != "none"][:COUNT]


def test_tool_calls(chat_tokenizer, due):
    def replies(row):
        name, arguments = expected_calls(row)[0]
        right = ToolCall(name, arguments)
        yield (True, True), Message("assistant", "", tool_calls=(right,))
        yield (
            (False, True),
            Message(
                "assistant",
                "",
                tool_calls=(dataclasses.replace(right, arguments=changed(arguments)),),
            ),
        )
        yield (
            (False, False),
            Message("assistant", "", tool_calls=(dataclasses.replace(right, arguments={}),)),
        )
        yield (
            (False, True),
            Message(
                "assistant",
                "",
                tool_calls=(dataclasses.replace(right, arguments=arguments | {"more": 1}),),
            ),
        )
        yield (False, False), Message("assistant", "", tool_calls=(ToolCall("fly", arguments),))
        yield (False, False), Message("assistant", "", tool_calls=(right, right))
        yield (False, False), json.dumps({"name": name, "arguments": arguments})

    def changed(arguments):
        key, value = next(
            (key, value)
            for key, value in arguments.items()
            if key not in ("operation", "from_unit", "to_unit")
        )
        return arguments | {key: "Atlantis" if isinstance(value, str) else value + 1}

    made = [list(replies(row)) for row in due]
    for way in range(7):
        expected = [row[way][0] for row in made]
        engine = Scripted(chat_tokenizer, [row[way][1] for row in made])
        verdicts = list(verifiable.tool_calls(engine, COUNT))
        assert [(verdict.right, verdict.valid) for verdict in verdicts] == expected
        assert [verdict.kind for verdict in verdicts] == [row["kind"] for row in due]
    assert {verdict.kind for verdict in verdicts} == {
        "call",
        "parallel",
        "chain",
        "missing",
    } and len(engine.grammars) == COUNT
    for row, prompt in zip(due, engine.prompts, strict=True):
        asked = [message["content"] for message in row["messages"] if message["role"] == "user"]
        assert all(text in prompt for text in asked) and prompt.endswith("assistant\n")
        assert json.dumps(expected_calls(row)[0][1]) not in prompt


def test_tool_turns(chat_tokenizer):
    rows = [tool_conversations.conversations("test", index) for index in range(COUNT)]
    expected = [
        [ToolCall(name, arguments) for name, arguments in expected_calls(row)] for row in rows
    ]
    due = [row["kind"] in ("call", "parallel", "chain") for row in rows]  # at once
    assert any(due) and not all(due) and any(len(calls) > 1 for calls in expected)
    ways = [
        (
            lambda calls: Message("assistant", "" if calls else "Which?", tool_calls=tuple(calls)),
            lambda calls: True,
        ),
        (lambda calls: Message("assistant", "Which?"), lambda calls: not calls),
        (
            lambda calls: Message("assistant", "", tool_calls=(ToolCall("fly", {}), *calls)),
            lambda calls: False,
        ),
        (
            lambda calls: Message(
                "assistant", "" if len(calls) > 1 else "Which?", tool_calls=tuple(calls[1:])
            ),
            lambda calls: not calls,
        ),
        (
            lambda calls: Message(
                "assistant", "" if calls else "Which?", tool_calls=tuple(calls[::-1])
            ),
            lambda calls: len(calls) < 2,
        ),
        (lambda calls: "Which?" + CUT, lambda calls: False),
    ]
    for reply, right in ways:
        wanted = [calls if at_once else [] for calls, at_once in zip(expected, due)]
        engine = Scripted(chat_tokenizer, [reply(calls) for calls in wanted])
        verdicts = list(verifiable.tool_turns(engine, COUNT))
        assert [verdict.right for verdict in verdicts] == [
            right(calls) for calls in wanted
        ] and engine.grammars is None
    assert "valid" not in verifiable.shares(verdicts)["all"]
    for row, prompt in zip(rows, engine.prompts, strict=True):
        assert (
            row["messages"][0]["content"] in prompt
            and prompt.endswith("assistant\n")
            and prompt.count("assistant\n") == 1
        )
    broken = Broken(chat_tokenizer, [""] * COUNT)
    assert not any(verdict.right for verdict in verifiable.tool_turns(broken, COUNT))


class Broken(Scripted):
    """Begins calls that are no JSON."""

    def _completion(self, reply):
        control = self.tokenizer.control_id
        return Completion(
            "", [control(TOOL_CALL), *self.tokenizer.encode('{"name"'), control(TURN_END)], "stop"
        )
