"""What a fine-tuned model gets right of questions whose answers can be checked: reasoning-gym's, and tool calls, of the splits that it was not
trained on (synthetic/reasoning.py, synthetic/tool_conversations.py). Greedy. Verdicts come batch by batch, the shortest prompts first.
"""

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

import jsonschema

from nanollama_jax.chat import chatml as chat
from nanollama_jax.chat.conversations import Message, ToolCall, parse_conversation
from nanollama_jax.infer.engine import Engine
from nanollama_jax.infer.grammar import tool_call
from nanollama_jax.synthetic import reasoning, tool_conversations
from nanollama_jax.tokenizer import TOOL_CALL

MAX_NEW_TOKENS = 200


class Verdict(NamedTuple):
    kind: str  # a task of reasoning.TASKS, or a kind of tool conversation
    right: bool
    valid: (
        bool | None
    )  # of a call: JSON, of an offered tool, with arguments of its schema; None of other answers
    question: str
    reply: Message


def reasoning_questions(engine: Engine, count: int) -> Iterator[Verdict]:
    """The first `count` questions of the test split; right as the task's own scoring says."""
    rows = [reasoning.conversations("test", index) for index in range(count)]
    prompts = [
        chat.encode_prompt((Message("user", row["question"]),), engine.tokenizer) for row in rows
    ]
    for index, completion in engine.completions(prompts, max_new_tokens=MAX_NEW_TOKENS):
        reply = chat.parse_reply(completion.tokens, engine.tokenizer)
        right = completion.finish_reason == "stop" and reasoning.check("test", index, reply.content)
        yield Verdict(
            reasoning.TASKS[index % len(reasoning.TASKS)],
            right,
            None,
            rows[index]["question"],
            reply,
        )


def tool_calls(engine: Engine, count: int) -> Iterator[Verdict]:
    """The first call of `count` conversations of the test split in which one is due, up to which the conversation is given, made under the grammar
    of the offered tools (`infer/grammar.tool_call`): right if name and arguments are the expected ones."""
    found, prompts, grammars = [], [], []
    index = 0
    while len(found) < count:
        row = tool_conversations.conversations("test", index)
        index += 1
        if row["kind"] == "none":
            continue
        conversation = parse_conversation(row, f"tools/test:{index}")
        calling = next(i for i, message in enumerate(conversation.messages) if message.tool_calls)
        found.append((row, conversation.messages[: calling + 1]))
        prompts.append(
            chat.encode_prompt(
                conversation.messages[:calling], engine.tokenizer, conversation.tools
            )
        )
        grammars.append(tool_call(conversation.tools))
    for at, completion in engine.completions(
        prompts, max_new_tokens=MAX_NEW_TOKENS, grammar=grammars
    ):
        row, (*_, asked, expected) = found[at]
        reply = chat.parse_reply(completion.tokens, engine.tokenizer)
        valid = len(reply.tool_calls) == 1 and _fits(reply.tool_calls[0], row["tools"])
        yield Verdict(
            row["kind"],
            valid and reply.tool_calls[0] == expected.tool_calls[0],
            valid,
            asked.content,
            reply,
        )


def tool_turns(engine: Engine, count: int) -> Iterator[Verdict]:
    """The assistant's first message in each of `count` conversations of the test split, without a grammar: right if its calls are the expected ones,
    all of them, and if it makes none where none is due, as no tool fits or something is missing."""
    rows = [tool_conversations.conversations("test", index) for index in range(count)]
    conversations = [
        parse_conversation(row, f"tools/test:{index + 1}") for index, row in enumerate(rows)
    ]
    prompts = [
        chat.encode_prompt(conversation.messages[:1], engine.tokenizer, conversation.tools)
        for conversation in conversations
    ]
    for at, completion in engine.completions(prompts, max_new_tokens=MAX_NEW_TOKENS):
        asked, expected, *_ = conversations[at].messages
        reply = chat.parse_reply(completion.tokens, engine.tokenizer)
        whole = completion.finish_reason == "stop" and list(completion.tokens).count(
            engine.tokenizer.control_id(TOOL_CALL)
        ) == len(reply.tool_calls)
        yield Verdict(
            rows[at]["kind"],
            whole and reply.tool_calls == expected.tool_calls,
            None,
            asked.content,
            reply,
        )


def shares(verdicts: list[Verdict]) -> dict[str, dict[str, float]]:
    """By kind, and over "all": how many, the share that is right with its standard error, and of calls the share that is valid."""
    groups = collections.defaultdict(list)
    for verdict in verdicts:
        groups[verdict.kind].append(verdict)
    found = {}
    for kind, group in (*sorted(groups.items()), ("all", verdicts)):
        right = sum(verdict.right for verdict in group) / len(group)
        found[kind] = {
            "count": len(group),
            "right": right,
            "standard_error": (right * (1 - right) / len(group)) ** 0.5,
        }
        if group[0].valid is not None:
            found[kind]["valid"] = sum(verdict.valid for verdict in group) / len(group)
    return found


def _fits(call: ToolCall, tools: list[dict[str, Any]]) -> bool:
    schemas = {tool["name"]: tool["parameters"] for tool in tools}
    return call.name in schemas and jsonschema.Draft202012Validator(schemas[call.name]).is_valid(
        call.arguments
    )
