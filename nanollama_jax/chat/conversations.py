"""Conversations to fine-tune on: the formats of chat data, parsed into one form and checked.

The keys of a row tell its format:

    {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
        OpenAI's, with "tool_calls"; beside them "thought" or "reasoning_content".
    {"conversations": [{"from": "human", "value": "..."}, ...], "tools": [...]}
        ShareGPT's, with function_call and observation, or with Hermes's <tools>, <tool_call> and
        <tool_response>.
    {"question": "...", "thought": "...", "answer": "..."}
        The thought is optional.
    {"query": "...", "response": "..."}
        MetaMathQA's.

A row's `system` becomes its first message. Whatever is wrong with a row raises `BadInput` with its
place and what to change, and so does a field that is not read but would change what is learned.
Text that looks like a special token is data.

- Nulls in objects count as absent, at any depth, as Parquet cannot tell one from the other. A
  string of JSON is read as it is.
- Thoughts stand beside the answer as `thought`, `reasoning_content`, `reasoning` or `thinking`, or
  at its beginning as <think>...</think>; the opening tag may be missing (DeepSeek-R1's template
  writes it). Such tags anywhere else, or unclosed, repeated or nested, are refused.
- `train`, `training`, `trainable`, `weight`, `loss`, `loss_weight` or `loss_mask` of a message say
  whether it is learned (true, 1) or only context (false, 0). Other values and other keys of that
  kind are refused, as are such keys of the whole row unless they are 1, and rows of which nothing
  would be learned.
- A tool's parameters stand under `parameters`, `input_schema` or `inputSchema`; results with a
  `tool_call_id` are put in the order of their calls.
- A ShareGPT system message that lists <tools> loses the list and Hermes's own prompt, from "You are
  a function calling AI model" to the last </tool_call>: the chat template has its own way of
  calling.
"""

import ast
import contextlib
import dataclasses
import json
import re
import reprlib
import warnings
from collections.abc import Iterator
from typing import Any

from nanollama_jax.errors import BadInput

FORMATS = (
    "`messages`, `conversations`, `question` and `answer`, `query` and `response`; for DPO "
    "`chosen` and `rejected`"
)
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_NEXT = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool call": ("tool",),
    "tool": ("tool", "assistant"),
}
_WORDS = {dict: "an object", list: "a list", str: "a string"}
# Not the "within <tools></tools> XML tags" before it
_TOOLS = re.compile(r"<tools>\s*([\[{].*?)</tools>", re.DOTALL)
_HERMES_PROMPT = re.compile(r"You are a function calling AI model.*</tool_call>", re.DOTALL)
_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_THINK = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*(.*)", re.DOTALL)
_THINK_TAG = re.compile(r"</?think\s*>|<\|(?:begin|end)_of_thought\|>", re.IGNORECASE)
# What other models write before a thought: no thought of ours, and not text to learn either.
_THOUGHT_BEGUN = re.compile(
    r"\s*(?:<(?:thinking|thoughts?|reasoning|reflection|scratchpad)>"
    r"|\[THINK\]|◁think▷|<\|channel\|>)",
    re.IGNORECASE,
)
_THOUGHTS = ("thought", "reasoning_content", "reasoning", "thinking")
# What is not read, and what is read in its place
_UNREAD_OF_ROW = {"functions": "`tools`", "thoughts": "`thought`", "rationale": "`thought`"}
_UNREAD_OF_ANSWER = {
    "function_call": "`tool_calls`",
    "refusal": "`content`",
    "reasoning_details": "`thought`",
}
_UNREAD_OF_OTHERS = dict.fromkeys(("tool_calls", *_THOUGHTS), "the assistant's")
_TRAINED = ("train", "training", "trainable", "weight", "loss", "loss_weight", "loss_mask")
_CONTROLS_MESSAGE = re.compile(r"train|loss|mask|weight", re.IGNORECASE)
_CONTROLS_ROW = re.compile(
    r"(?:train|training|trainable|loss|mask|masked|(?:sample_)?weights?|(?:train|loss|mask)_.*)",
    re.IGNORECASE,
)
_PARAMETERS = ("parameters", "input_schema", "inputSchema")
_SCHEMA_KEYS = {  # of an object's JSON schema
    *("properties", "additionalProperties", "patternProperties"),
    *("$ref", "allOf", "anyOf", "oneOf"),
}
# Each {"name", "description", "parameters": JSON schema}, with different names
Tools = tuple[dict[str, Any], ...]


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
    # An assistant's: trained on, or only context. Not compared: it changes nothing of what is said.
    learned: bool = dataclasses.field(default=True, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant in turn, an assistant last.

    The results of tool calls stand between the message that calls the tools and the next one.
    """

    where: str  # file:line
    messages: tuple[Message, ...]
    tools: Tools = ()


def parse_conversation(record: Any, where: str) -> Conversation:
    """The conversation in a row of any of the formats above.

    Raises `BadInput`, whatever `record` is, if it holds none.
    """
    with naming(where):
        record, system, tools = open_row(record)
        if "messages" in record or "conversations" in record:
            messages, tools = parse_messages(
                record.get("messages", record.get("conversations")), system, tools
            )
        elif "question" in record and "answer" in record:
            messages = *system, _asked(record, "question"), _assistant(record, "answer")
        elif "query" in record and "response" in record:
            messages = *system, _asked(record, "query"), _assistant(record, "response")
        else:
            raise BadInput(
                f"unknown format, with keys {reprlib.repr(list(record))}: known are {FORMATS}"
            )
        return Conversation(where, messages, tools)


def open_row(record: Any) -> tuple[dict[str, Any], tuple[Message, ...], Tools]:
    """A row without its nulls, its `system` as no message or one, and its tools.

    Raises `BadInput` for fields that must not be ignored.
    """
    try:
        record = _without_nulls(_typed(record, dict, "the row"))
    except RecursionError as error:
        raise BadInput("it is nested too deeply: flatten it") from error
    _refuse(record, _UNREAD_OF_ROW)
    for key in filter(_CONTROLS_ROW.fullmatch, record):
        if key not in (*_TRAINED, "sample_weight") or record[key] != 1:
            problem = f"`{key}` is {reprlib.repr(record[key])} for the whole row"
            raise BadInput(f"{problem}, where every row counts 1: remove the row, or `{key}`")
    system = _text(record, "system", required=False)
    messages = (_without_tags(Message("system", system)),) if system else ()
    return record, messages, parse_tools(record.get("tools"))


def parse_messages(
    turns: Any, system: tuple[Message, ...], tools: Tools
) -> tuple[tuple[Message, ...], Tools]:
    """Parses a list in OpenAI's or ShareGPT's form, checking each message and their order.

    Returns the messages, after `system`, and `tools`, or those that the system message lists.
    """
    messages = list(system)
    due: list[Any] = []  # ids of the calls whose results come next, in order
    results: list[tuple[Any, list[Message]]] = []  # those that came, each with the id of its call
    role = previous = "start"
    for number, turn in enumerate(_typed(turns, list, "the field with the messages"), 1):
        with naming(f"message {number}"):
            turn = present(turn, "it")
            role = role_of(turn)
            if role is None:
                spelling = reprlib.repr(turn.get("role", turn.get("from")))
                raise BadInput(f"unknown role {spelling}: known are {', '.join(_ROLES)}")
            if role not in _NEXT[previous]:
                raise BadInput(
                    f"{role} after {previous}, where {' or '.join(_NEXT[previous])} is expected: "
                    "reorder, join or remove messages"
                )
            if role != "tool":
                messages += _in_order(results, due)
                results = []
            elif due:
                _check_id(turn.get("tool_call_id"), due, results)
            if role != "assistant":
                _refuse(turn, _UNREAD_OF_OTHERS)
            learned = _learned(turn, role)
            if "value" not in turn and role == "assistant":
                said = [_assistant(turn, "content", tools)]
            elif "value" not in turn:
                said = [Message(role, _text(turn, "content"))]
            elif role == "system" and (listed := _TOOLS.search(_text(turn, "value"))):
                tools = tools or parse_tools(listed[1])
                text = _HERMES_PROMPT.sub("", _TOOLS.sub("", turn["value"])).strip()
                said = [Message(role, text)] if text else []
            else:
                said = _read_sharegpt(turn, role, tools)
            said = [dataclasses.replace(_without_tags(each), learned=learned) for each in said]
            if role == "tool":
                results.append((turn.get("tool_call_id"), said))
            else:
                messages += said
            previous = "tool call" if said and said[-1].tool_calls else role
            if previous == "tool call":
                ids = [call.get("id") for call in turn.get("tool_calls", ())]
                due = [] if None in ids else ids
    if all(message.role != "assistant" for message in messages):
        raise BadInput("no message is the assistant's: there is nothing to learn, remove the row")
    if not any(message.learned for message in messages if message.role == "assistant"):
        nothing = "no message of the assistant is to be trained on"
        raise BadInput(f"{nothing}: there is nothing to learn, remove the row")
    if role != "assistant":
        raise BadInput(
            f"the last message is of role {role}: end with the assistant's, or remove what follows "
            "it"
        )
    if system and messages[1].role == "system":
        raise BadInput("`system` stands beside a first message of role system: keep one of them")
    return tuple(messages), tools


def parse_tools(value: Any) -> Tools:
    """Tools as OpenAI, Anthropic, MCP, BFCL or Hermes list them, also in a string of JSON.

    Returns the functions, with `parameters`. Raises `BadInput` for one without a name, two of one
    name, or parameters that are not a JSON schema under one of the names in `_PARAMETERS`.
    """
    functions: dict[str, dict[str, Any]] = {}
    for number, tool in enumerate(
        _typed(_json([] if value in (None, "") else value, "`tools`"), list, "`tools`"), 1
    ):
        with naming(f"tool {number}"):
            tool = present(tool, "it")
            function = present(tool.get("function", tool), "`function`")
            name = _text(function, "name")
            if name in functions:
                raise BadInput(f"another is named {reprlib.repr(name)}: rename one")
            given = [key for key in _PARAMETERS if key in function]
            for key in given:
                if function[key] != function[given[0]]:
                    raise BadInput(f"`{given[0]}` and `{key}` differ: keep one")
                _check_parameters(function[key], f"`{key}`")
            if not given and (unread := _unread_json(tool | function)):
                advice = "write its JSON schema as `parameters`, {} if it takes none"
                raise BadInput(f"it has `{unread}` but no `parameters`: {advice}")
            functions[name] = {
                "parameters" if key in _PARAMETERS else key: each for key, each in function.items()
            }
    return tuple(functions.values())


def _check_parameters(schema: Any, what: str) -> None:
    _typed(schema, dict, what)
    _typed(schema.get("properties", {}), dict, f"`properties` of {what}")
    for each in _typed(schema.get("required", []), list, f"`required` of {what}"):
        _typed(each, str, f"what is in `required` of {what}")
    typed = isinstance(schema.get("type"), str | list)
    if schema and not typed and schema.keys().isdisjoint(_SCHEMA_KEYS):
        shape = "{'type': 'object', 'properties': {...}}"
        raise BadInput(f"{what} is not the JSON schema of an object: write it as {shape}")


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


def _without_nulls(value: Any) -> Any:
    """`value` with no nulls in its objects: Parquet fills each with the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def role_of(turn: dict[str, Any]) -> str | None:
    """A message's role in either form, as `Message` spells it; None for one that is not known."""
    return (
        _ROLES.get(spelling)
        if isinstance(spelling := turn.get("role", turn.get("from")), str)
        else None
    )


def _read_sharegpt(turn: dict[str, Any], role: str, tools: Tools) -> list[Message]:
    value = _text(turn, "value", required=role != "assistant" or not turn.get("tool_calls"))
    if role == "tool":
        results = [
            result.strip() for result in re.split(r"</?tool_response>", value) if result.strip()
        ]
        return [Message(role, _text({"value": result}, "value")) for result in results or [""]]
    if role != "assistant":
        return [Message(role, value)]
    if value and turn.get("from") == "function_call":
        value = f"<tool_call>{value}</tool_call>"
    if "</think>" in value[value.find("<tool_call>") :] and "<tool_call>" in value:
        raise BadInput("a <tool_call> in a thought would be learned as a call: remove the row")
    calls, said = _TOOL_CALL.findall(value), _TOOL_CALL.sub("", value)
    if "<tool_call>" in said or "</tool_call>" in said:
        raise BadInput("a <tool_call> without its </tool_call>, or the other way round: close it")
    decoded = [_json(call, "a tool call") for call in calls]
    listed = [call for each in decoded for call in (each if isinstance(each, list) else [each])]
    if calls and turn.get("tool_calls"):
        raise BadInput("tool calls stand both in `value` and in `tool_calls`: keep one of them")
    return [
        _assistant(
            turn
            | ({"content": said.strip(), "tool_calls": listed} if calls else {"content": said}),
            "content",
            tools,
        )
    ]


def _check_id(given: Any, due: list[Any], results: list[tuple[Any, list[Message]]]) -> None:
    waiting = [each for each in due if each not in [done for done, _ in results]]
    if given is not None and given not in waiting:
        given, waiting = reprlib.repr(given), reprlib.repr(waiting)
        raise BadInput(f"`tool_call_id` is {given}, where one of {waiting} is due: correct the ids")


def _in_order(results: list[tuple[Any, list[Message]]], due: list[Any]) -> list[Message]:
    """The messages of `results` in the order of `due`, the ids of the calls.

    If calls or results have no ids, as they come.
    """
    if due and any(given is not None for given, _ in results):
        if len(results) < len(due) or any(given is None for given, _ in results):
            calls = reprlib.repr(due)
            problem = f"not each of the calls {calls} has a result before it"
            raise BadInput(f"{problem}: add it, with `tool_call_id`")
        results = sorted(results, key=lambda result: due.index(result[0]))
    return [message for _, messages in results for message in messages]


def _learned(turn: dict[str, Any], role: str) -> bool:
    """Whether a message is to be trained on. Raises `BadInput` if what it says is unclear."""
    said = {key: turn[key] for key in filter(_CONTROLS_MESSAGE.search, turn)}
    for key, value in said.items():
        if key not in _TRAINED or value not in (0, 1):
            advice = "write `train` with true or false, or remove it"
            raise BadInput(f"`{key}` is {reprlib.repr(value)}, which is not understood: {advice}")
        if value and role != "assistant":
            problem = f"`{key}` is {value} in a message of role {role}"
            raise BadInput(f"{problem}: only the assistant's are learned, remove it")
        if value != next(iter(said.values())):
            raise BadInput(f"`{'` and `'.join(said)}` contradict each other: keep one")
    return role != "assistant" or all(said.values())


def _without_tags(message: Message) -> Message:
    """`message`, if no tag of a thought is left in it."""
    if tag := _THINK_TAG.search(message.content) or _THINK_TAG.search(message.thought):
        place = "between one <think> and one </think> at the beginning of an answer"
        problem = f"{tag[0]} in what the {message.role} says: a thought is read {place}"
        raise BadInput(f"{problem}, write it so or as `thought`, or remove the row")
    return message


def _asked(record: dict[str, Any], key: str) -> Message:
    return _without_tags(Message("user", _text(record, key)))


def _assistant(turn: dict[str, Any], key: str, tools: Tools = ()) -> Message:
    _refuse(turn, _UNREAD_OF_ANSWER)
    calls = tuple(
        _tool_call(call, tools) for call in _typed(turn.get("tool_calls", []), list, "`tool_calls`")
    )
    content = _text(turn, key, required=not calls)
    if _TOOL_CALL.fullmatch(content.strip()):
        raise BadInput(
            f"`{key}` is a <tool_call>, which would be learned as text: write it as `tool_calls`, "
            "or the row in ShareGPT's form"
        )
    if begun := _THOUGHT_BEGUN.match(content):
        problem = f"`{key}` begins with {begun[0].strip()}, which would be learned as text"
        raise BadInput(f"{problem}: write the thought as `thought`")
    thoughts = {name: text for name in _THOUGHTS if (text := _text(turn, name, required=False))}
    if len(set(thoughts.values())) > 1:
        raise BadInput(f"`{'` and `'.join(thoughts)}` are different thoughts: keep one")
    thought = next(iter(thoughts.values()), "")
    if not thought and (match := _THINK.fullmatch(content)):
        thought, content = match[1].strip(), _text({key: match[2]}, key, required=not calls)
    return _without_tags(Message("assistant", content, thought, calls))


def _tool_call(call: Any, tools: Tools) -> ToolCall:
    call = present(call, "a tool call")
    function = present(call.get("function", call), "`function`")
    name, known = function.get("name"), {tool["name"]: tool.get("parameters", {}) for tool in tools}
    called = f"call of {reprlib.repr(name)}"
    if not isinstance(name, str) or name not in known:
        listed = reprlib.repr(list(known))
        problem = f"a tool {called}, which is not among the tools {listed}"
        raise BadInput(f"{problem}: list it in `tools`")
    what = f"`arguments` of a {called}"
    given = function.get("arguments", "")
    arguments = _json("null" if isinstance(given, str) and not given.strip() else given, what)
    parameters = known[name]
    required = parameters.get("required", [])
    if arguments is None:
        if "arguments" in call and "arguments" not in function:
            raise BadInput(f"a {called} has `arguments` outside `function`: move it there")
        if unread := _unread_json(call | function):
            raise BadInput(f"a {called} has `{unread}`, not `arguments`: rename it")
        if required:
            required = reprlib.repr(required)
            raise BadInput(f"{what} is missing, and {required} is required: give them")
        arguments = {}
    arguments = _typed(arguments, dict, what)
    if not isinstance(given, str):  # the null of a required parameter was left out with the others
        properties = parameters.get("properties", {})
        missing = [key for key in required if key not in arguments]
        arguments |= {key: None for key in missing if _takes_null(properties.get(key))}
    return ToolCall(name, arguments)


def _takes_null(schema: Any) -> bool:
    """Whether a property's JSON schema says outright that it may be null."""
    if not isinstance(schema, dict):
        return False
    types, either = schema.get("type"), schema.get("anyOf")
    listed = types if isinstance(types, list) else [types]
    within = isinstance(either, list) and any(map(_takes_null, either))
    return "null" in listed or schema.get("nullable") is True or within


def _unread_json(record: dict[str, Any]) -> str | None:
    """The first key but `function` of an object, of a list, or of text that could be JSON's."""
    for key, value in record.items():
        text = isinstance(value, str) and value.lstrip().startswith("{")
        if key != "function" and (text or (isinstance(value, dict | list) and value)):
            return key
    return None


def _refuse(record: dict[str, Any], unread: dict[str, str]) -> None:
    for key, instead in unread.items():
        if record.get(key):
            advice = f"write it as {instead}, or remove it"
            raise BadInput(f"`{key}` is not read, and would change what is learned: {advice}")


def _text(record: dict[str, Any], key: str, required: bool = True) -> str:
    text = _typed(record.get(key, None if required else ""), str, f"`{key}`")
    if required and not text.strip():
        raise BadInput(f"`{key}` is empty: fill it in, or remove the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell what UTF-8 cannot: "\ud800"
        raise BadInput(
            f"`{key}` holds half a surrogate pair: it cannot be written as UTF-8"
        ) from error
    return text if text.strip() else ""


def _json(value: Any, what: str) -> Any:
    """`value` after a round trip through JSON.

    A string is parsed as JSON or, as in many of Hermes's conversations, as a Python literal.
    """
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
        found = "missing" if value is None else f"of type {type(value).__name__}"
        raise BadInput(f"{what} is {found}, not {_WORDS[kind]}")
    return value
