"""Accuracy of a fine-tuned model on questions whose answers can be checked.

Questions of reasoning-gym, and tool calls, from splits that it was not trained on
(synthetic/reasoning.py, synthetic/tool_conversations.py). Decoding is greedy. Verdicts come batch
by batch, the shortest prompts first.
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
    """`valid` is about calls: JSON, of an offered tool, with arguments that fit its schema.

    It is None for other answers.
    """

    kind: str  # a task of reasoning.TASKS, or a kind of tool conversation
    right: bool
    valid: bool | None
    question: str
    reply: Message


def reasoning_questions(engine: Engine, count: int) -> Iterator[Verdict]:
    """The first `count` questions of the test split, judged by each task's own scoring."""
    rows = [reasoning.conversations("test", index) for index in range(count)]
    prompts = [
        chat.encode_prompt((Message("user", row["question"]),), engine.tokenizer) for row in rows
    ]
    for index, completion in engine.completions(prompts, max_new_tokens=MAX_NEW_TOKENS):
        reply = chat.parse_reply(completion.tokens, engine.tokenizer)
        right = completion.finish_reason == "stop" and reasoning.check("test", index, reply.content)
        kind = reasoning.TASKS[index % len(reasoning.TASKS)]
        yield Verdict(kind, right, None, rows[index]["question"], reply)


def tool_calls(engine: Engine, count: int) -> Iterator[Verdict]:
    """The first call in `count` conversations of the test split that have one.

    The model gets the conversation up to the call, and the call is generated under the grammar of
    the offered tools (`infer/grammar.tool_call`). Right if name and arguments are as expected.
    """
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
        prefix = conversation.messages[:calling]
        prompts.append(chat.encode_prompt(prefix, engine.tokenizer, conversation.tools))
        grammars.append(tool_call(conversation.tools))
    completions = engine.completions(prompts, max_new_tokens=MAX_NEW_TOKENS, grammar=grammars)
    for at, completion in completions:
        row, (*_, asked, expected) = found[at]
        reply = chat.parse_reply(completion.tokens, engine.tokenizer)
        valid = len(reply.tool_calls) == 1 and _fits(reply.tool_calls[0], row["tools"])
        right = valid and reply.tool_calls[0] == expected.tool_calls[0]
        yield Verdict(row["kind"], right, valid, asked.content, reply)


def tool_turns(engine: Engine, count: int) -> Iterator[Verdict]:
    """The assistant's first message in each of `count` conversations of the test split.

    Without a grammar. Right if it makes exactly the expected calls; where no tool fits or something
    is missing, that is none.
    """
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
        tags = list(completion.tokens).count(engine.tokenizer.control_id(TOOL_CALL))
        parsed = completion.finish_reason == "stop" and tags == len(reply.tool_calls)
        right = parsed and reply.tool_calls == expected.tool_calls
        yield Verdict(rows[at]["kind"], right, None, asked.content, reply)


def shares(verdicts: list[Verdict]) -> dict[str, dict[str, float]]:
    """By kind, and for "all": count, share right with its standard error, share of valid calls."""
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
    if call.name not in schemas:
        return False
    return jsonschema.Draft202012Validator(schemas[call.name]).is_valid(call.arguments)
