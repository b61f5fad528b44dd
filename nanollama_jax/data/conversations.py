"""Conversations to fine-tune on: the formats that chat data comes in, read into one form and checked. A row's keys tell its format:

    {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}       OpenAI's, with "tool_calls"; beside them "thought" or
                                                                                  "reasoning_content"
    {"conversations": [{"from": "human", "value": "..."}, ...], "tools": [...]}   ShareGPT's, with function_call and observation, or with
                                                                                  Hermes's <tools>, <tool_call> and <tool_response>
    {"question": "...", "thought": "...", "answer": "..."}                        the thought can be left out
    {"query": "...", "response": "..."}                                           MetaMathQA's

A row's `system` is its first message. Whatever is wrong with a row raises `BadInput` with its place and what to change, and so does a field
that would change what is learnt and is not read. A null counts as absent; text that looks like a special token is data, and no mistake. An
answer that begins with <think>...</think> has that as its thought. A ShareGPT system message that lists <tools> loses the list and Hermes's
own prompt, from "You are a function calling AI model" to the last </tool_call>: the chat template has its own way of calling.
"""

import ast
import contextlib
import dataclasses
import json
import re
import reprlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from nanollama_jax.data.sources import read_records
from nanollama_jax.errors import BadInput

FORMATS = "`messages`, `conversations`, `question` and `answer`, `query` and `response`; for DPO `chosen` and `rejected`"
_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
          "gpt": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool"}  # fmt: skip
_NEXT = {"start": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",), "tool call": ("tool",),
         "tool": ("tool", "assistant")}  # fmt: skip
_WORDS = {dict: "an object", list: "a list", str: "a string"}
_TOOLS = re.compile(r"<tools>\s*([\[{].*?)</tools>", re.DOTALL)  # not the "within <tools></tools> XML tags" before it
_HERMES_PROMPT = re.compile(r"You are a function calling AI model.*</tool_call>", re.DOTALL)
_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)
_UNREAD_OF_ROW = {"functions": "tools", "thoughts": "thought", "rationale": "thought"}  # and what is read in its place
_UNREAD_OF_ANSWER = {"function_call": "tool_calls", "refusal": "content", "thinking": "thought", "reasoning": "thought"}
_Row = TypeVar("_Row")
Tools = tuple[dict[str, Any], ...]  # {"name", "description", "parameters": JSON schema}, no two of one name


@dataclasses.dataclass(frozen=True)
class ToolCall:
    name: str  # of one of the tools
    arguments: dict[str, Any]  # JSON


@dataclasses.dataclass(frozen=True)
class Message:
    role: str  # system, user, assistant or tool
    content: str  # never blank, but for an assistant's that calls tools; a tool's is one result
    thought: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Perhaps a system message, then user and assistant in turn, an assistant last; between a message that calls tools and the next, results."""

    where: str  # file:line
    messages: tuple[Message, ...]
    tools: Tools = ()


def read_rows(url: str, parse: Callable[[Any, str], _Row], on_bad: Callable[[str, BadInput], None]) -> Iterator[_Row]:
    """Yields what `parse(record, where)` makes of each row of a source URL (data/sources.py).

    A bad row goes to `on_bad(where, mistake)`, which can raise it to stop. Raises `BadInput` for a source that cannot be read, or not to its end.
    """
    for where, record in read_records(url, strict=False):
        try:
            if isinstance(record, BadInput):
                raise record
            row = parse(record, where)
        except BadInput as mistake:
            on_bad(where, mistake)
        else:
            yield row


def parse_conversation(record: Any, where: str) -> Conversation:
    """The conversation in a row of any of the formats above. Raises `BadInput`, whatever `record` is, where it holds none."""
    with naming(where):
        record, system, tools = open_row(record)
        if "messages" in record or "conversations" in record:
            messages, tools = parse_messages(record.get("messages", record.get("conversations")), system, tools)
        elif "question" in record and "answer" in record:
            messages = *system, Message("user", _text(record, "question")), _assistant(record, "answer")
        elif "query" in record and "response" in record:
            messages = *system, Message("user", _text(record, "query")), _assistant(record, "response")
        else:
            raise BadInput(f"unknown format, with keys {reprlib.repr(list(record))}: known are {FORMATS}")
        return Conversation(where, messages, tools)


def open_row(record: Any) -> tuple[dict[str, Any], tuple[Message, ...], Tools]:
    """A row without its nulls, its `system` as no message or one, and its tools. Raises `BadInput` for fields that must not be passed over."""
    record = present(record, "the row")
    _refuse(record, _UNREAD_OF_ROW)
    system = _text(record, "system", required=False)
    return record, (Message("system", system),) if system else (), parse_tools(record.get("tools"))


def parse_messages(turns: Any, system: tuple[Message, ...], tools: Tools) -> tuple[tuple[Message, ...], Tools]:
    """A list in OpenAI's or ShareGPT's form as messages after `system`, each found good and in its place; `tools`, or those in its system message."""
    messages, due = list(system), []  # ids of the calls whose results come next
    role = previous = "start"
    for number, turn in enumerate(_typed(turns, list, "the field with the messages"), 1):
        with naming(f"message {number}"):
            turn = present(turn, "it")
            role = role_of(turn)
            if role is None:
                raise BadInput(f"unknown role {reprlib.repr(turn.get('role', turn.get('from')))}: known are {', '.join(_ROLES)}")
            if role not in _NEXT[previous]:
                raise BadInput(f"{role} after {previous}, where {' or '.join(_NEXT[previous])} is expected: reorder, join or remove messages")
            if role == "tool" and due and (wanted := due.pop(0)) != (given := turn.get("tool_call_id", wanted)):
                given, wanted = reprlib.repr(given), reprlib.repr(wanted)
                raise BadInput(f"`tool_call_id` is {given}, where the result of {wanted} is due: order results as their calls")
            if "value" not in turn:
                messages.append(_assistant(turn, "content", tools) if role == "assistant" else Message(role, _text(turn, "content")))
            elif role == "system" and (listed := _TOOLS.search(_text(turn, "value"))):
                tools = tools or parse_tools(listed[1])
                said = _HERMES_PROMPT.sub("", _TOOLS.sub("", turn["value"])).strip()
                messages += [Message(role, said)] if said else []
            else:
                messages += _read_sharegpt(turn, role, tools)
            previous = "tool call" if messages and messages[-1].tool_calls else role
            if previous == "tool call":
                due = [call["id"] for call in turn.get("tool_calls", ()) if call.get("id") is not None]
    if all(message.role != "assistant" for message in messages):
        raise BadInput("no message is the assistant's: there is nothing to learn, remove the row")
    if role != "assistant":
        raise BadInput(f"the last message is of role {role}: end with the assistant's, or remove what follows it")
    if system and messages[1].role == "system":
        raise BadInput("`system` stands beside a first message of role system: keep one of them")
    return tuple(messages), tools


def parse_tools(value: Any) -> Tools:
    """Tools as OpenAI, BFCL or Hermes list them, also in a string of JSON, each without the {"type": "function", "function": ...} around it."""
    functions: dict[str, dict[str, Any]] = {}
    for number, tool in enumerate(_typed(_json([] if value in (None, "") else value, "`tools`"), list, "`tools`"), 1):
        with naming(f"tool {number}"):
            function = present(present(tool, "it").get("function", tool), "`function`")
            name = _text(function, "name")
            _typed(function.get("parameters", {}), dict, "`parameters`")
            if name in functions:
                raise BadInput(f"another is named {reprlib.repr(name)}: rename one")
            functions[name] = function
    return tuple(functions.values())


@contextlib.contextmanager
def naming(place: str) -> Iterator[None]:
    """Puts the place before the words of a `BadInput` from inside."""
    try:
        yield
    except BadInput as mistake:
        raise BadInput(f"{place}: {mistake}") from mistake


def present(value: Any, what: str) -> dict[str, Any]:
    """A JSON object without its nulls, which stand for what is not there."""
    return {key: each for key, each in _typed(value, dict, what).items() if each is not None}


def role_of(turn: dict[str, Any]) -> str | None:
    """A message's role in either form, as `Message` spells it; None for one that is not known."""
    return _ROLES.get(spelling) if isinstance(spelling := turn.get("role", turn.get("from")), str) else None


def _read_sharegpt(turn: dict[str, Any], role: str, tools: Tools) -> list[Message]:
    value = _text(turn, "value", required=role != "assistant" or not turn.get("tool_calls"))
    if role == "tool":
        results = [result.strip() for result in re.split(r"</?tool_response>", value) if result.strip()]
        return [Message(role, _text({"value": result}, "value")) for result in results or [""]]
    if role != "assistant":
        return [Message(role, value)]
    if value and turn.get("from") == "function_call":
        value = f"<tool_call>{value}</tool_call>"
    calls, said = _TOOL_CALL.findall(value), _TOOL_CALL.sub("", value)
    if "<tool_call>" in said or "</tool_call>" in said:
        raise BadInput("a <tool_call> without its </tool_call>, or the other way round: close it")
    decoded = [_json(call, "a tool call") for call in calls]
    listed = [call for each in decoded for call in (each if isinstance(each, list) else [each])]
    if calls and turn.get("tool_calls"):
        raise BadInput("tool calls stand both in `value` and in `tool_calls`: keep one of them")
    return [_assistant(turn | ({"content": said.strip(), "tool_calls": listed} if calls else {"content": said}), "content", tools)]


def _assistant(turn: dict[str, Any], key: str, tools: Tools = ()) -> Message:
    _refuse(turn, _UNREAD_OF_ANSWER)
    if turn.get("weight", 1) != 1:
        raise BadInput(f"`weight` is {reprlib.repr(turn['weight'])}, where every answer counts 1: end the conversation before it, or remove `weight`")
    calls = tuple(_tool_call(call, tools) for call in _typed(turn.get("tool_calls", []), list, "`tool_calls`"))
    content = _text(turn, key, required=not calls)
    if _TOOL_CALL.fullmatch(content.strip()):
        raise BadInput(f"`{key}` is a <tool_call>, which would be learnt as text: write it as `tool_calls`, or the row in ShareGPT's form")
    thought = _text(turn, "thought", required=False) or _text(turn, "reasoning_content", required=False)
    if not thought and (match := _THINK.fullmatch(content)):
        thought, content = match[1].strip(), _text({key: match[2]}, key, required=not calls)
    return Message("assistant", content, thought, calls)


def _tool_call(call: Any, tools: Tools) -> ToolCall:
    call = present(present(call, "a tool call").get("function", call), "`function`")
    name, known = call.get("name"), [tool["name"] for tool in tools]
    if name not in known:
        raise BadInput(f"a tool call of {reprlib.repr(name)}, which is not among the tools {reprlib.repr(known)}: list it in `tools`")
    what = f"`arguments` of a call of {reprlib.repr(name)}"
    return ToolCall(name, _typed(_json(call.get("arguments"), what), dict, what))


def _refuse(record: dict[str, Any], unread: dict[str, str]) -> None:
    for key, instead in unread.items():
        if record.get(key):
            raise BadInput(f"`{key}` is not read, and would change what is learnt: write it as `{instead}`, or remove it")


def _text(record: dict[str, Any], key: str, required: bool = True) -> str:
    text = _typed(record.get(key, None if required else ""), str, f"`{key}`")
    if required and not text.strip():
        raise BadInput(f"`{key}` is empty: fill it in, or remove the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell what UTF-8 cannot: "\ud800"
        raise BadInput(f"`{key}` holds half a surrogate pair: it cannot be written as UTF-8") from error
    return text if text.strip() else ""


def _json(value: Any, what: str) -> Any:
    """`value` as JSON gives it back; of a string, what it spells in JSON or, as in many of Hermes's conversations, as a Python literal."""
    try:
        if isinstance(value, str):
            text = value.strip()
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(text)
        if isinstance(value, str):
            with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
                value = ast.literal_eval(text)
        return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise BadInput(f"{what} is not JSON: {reprlib.repr(value)}") from error


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise BadInput(f"{what} is {'missing' if value is None else f'of type {type(value).__name__}'}, not {_WORDS[kind]}")
    return value
