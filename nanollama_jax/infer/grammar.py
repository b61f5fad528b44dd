"""What a constrained generation may say: a JSON schema, a regex, a Lark grammar or a call of one of a set of tools, in llguidance's terms.

JSON is written as `json.dumps` writes it: ", " and ": ", no other whitespace. `constraint.py` enforces it.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import llguidance

from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import TOOL_CALL

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Berkeley Function Calling Leaderboard's names of types are Python's and JSON Schema's mixed.
_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array", "int": "integer", "str": "string", "bool": "boolean"}


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What llguidance reads, its JSON list of grammars or Lark. Made by the four functions below, checked by `Grammars.compile`."""

    source: str
    json: bool  # at least in part
    words: Sequence[str] = dataclasses.field(default=(), compare=False)  # literal text in it, some of which may be what ends a text
    opening: str = ""  # a special token in `source`, left out where the vocabulary has no such piece


def json_schema(schema: dict[str, Any] | str) -> Grammar:
    """Values of a JSON schema, properties in its order. A keyword that cannot be enforced is an error when compiled, never ignored."""
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(parsed, dict):
            raise ValueError(f"it is of type {type(parsed).__name__}")
        text = json.dumps(parsed)  # a string's depth llguidance limits, a dict's not; the overrides win over the schema's own "x-guidance"
        return Grammar(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON_STYLE), json=True, words=_pattern_literals(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"JSON schema: {gist(str(error))}: give an object of JSON") from error


def regex(pattern: str) -> Grammar:
    """Texts that `pattern` matches whole, in the syntax of Rust's regex crate: no look-around, no back-references."""
    return Grammar(llguidance.LLMatcher.grammar_from_regex(_utf8(pattern)), json=False, words=_literals(pattern))


def lark(text: str) -> Grammar:
    """Texts of a context-free grammar in llguidance's kind of Lark; in a rule, <|name|> is that special token and %json {...} a JSON schema."""
    if re.search(r'stop\s*=\s*""', text):
        raise BadInput('grammar: stop="" would take the end token in the midst of a text: use suffix= or lazy')
    quoted = re.findall(r'"((?:[^"\\\n]|\\.)+)"', text)
    regexes = re.findall(r"/((?:[^/\\\n]|\\.)+)/", text)
    words = [word.replace("\\n", "\n").replace('\\"', '"') for word in quoted] + [word for pattern in regexes for word in _literals(pattern)]
    return Grammar(llguidance.LLMatcher.grammar_from_lark(_utf8(text)), json="%json" in text, words=words)


def tool_call(tools: Sequence[dict[str, Any]]) -> Grammar:
    """One call, `<|tool_call|>{"name": "...", "arguments": {...}}`, of one of `tools`, with arguments that fit its parameters and no others.

    Tools are OpenAI's or BFCL's: {"name", "description", "parameters": schema}, bare or as {"type": "function", "function": {...}}.
    A vocabulary without the control piece `<|tool_call|>` (a base model's) begins with the JSON. Raises `BadInput` for a tool without a name,
    two of one name, or parameters that are no schema.
    """
    calls, names = [], set()
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise BadInput(f"tool {number} has no name: give it as {{'name': ..., 'parameters': ...}}")
        if name in names:
            raise BadInput(f"two tools are named {name!r}: rename one")
        names.add(name)
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise BadInput(f"tool {name!r}: its parameters are no JSON schema: give an object")
        try:
            arguments = _json_types({"type": "object", "properties": {}} | parameters, f"#/anyOf/{number}/properties/arguments")
        except RecursionError as error:
            raise BadInput(f"tool {name!r}: its parameters are nested too deeply: flatten them") from error
        properties = {"name": {"const": name}, "arguments": arguments}
        calls.append({"type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False})
    if not calls:
        raise BadInput("there is no tool to call: give at least one")
    try:
        schema = json.dumps({"x-guidance": _JSON_STYLE, "anyOf": calls})
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"tools: {gist(str(error))}: their parameters must be JSON") from error
    return Grammar(f"start: {TOOL_CALL} call\ncall: %json {schema}\n", json=True, words=_pattern_literals(schema), opening=TOOL_CALL)


def _json_types(schema: Any, root: str) -> Any:
    """`schema` with BFCL's types as JSON Schema's, objects that list their properties closed, and "#" references moved to `root`."""
    if isinstance(schema, list):
        return [_json_types(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    mapped = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            mapped[key] = {name: _json_types(each, root) for name, each in value.items()}
        else:
            mapped[key] = value if key in ("enum", "const", "default", "examples") else _json_types(value, root)  # those are no schemas
    types = mapped.get("type")
    if types == "any":
        del mapped["type"]
    elif isinstance(types, str):
        mapped["type"] = _JSON_TYPES.get(types, types)
    elif isinstance(types, list):
        mapped["type"] = [_JSON_TYPES.get(each, each) if isinstance(each, str) else each for each in types]
    if isinstance(mapped.get("$ref"), str) and mapped["$ref"].startswith("#"):
        mapped["$ref"] = root + mapped["$ref"][1:]
    if mapped.get("type") == "object" and "properties" in mapped and not {"allOf", "anyOf", "oneOf", "$ref"} & mapped.keys():
        mapped.setdefault("additionalProperties", False)
    return mapped


def _literals(pattern: str) -> list[str]:
    """Stretches of a regex that stand for themselves."""
    found = re.findall(r"(?<=\\)\W|(?<=\[)\W(?=\])|[^\s\\|*+?()\[\]{}^$.]+", re.sub(r"\\[A-Za-z]", " ", pattern))
    return [word for word in found if len(word) > 1 or not word.isalnum()]


def _pattern_literals(schema: str) -> list[str]:
    patterns = re.findall(r'"pattern": ("(?:[^"\\]|\\.)*")', schema)
    return [word for pattern in patterns for word in _literals(json.loads(pattern))]


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"grammar: it is not Unicode text: {error.reason}") from error
    return text


def gist(message: str) -> str:
    if message.startswith("NoExtension"):
        return "no text satisfies it"
    found = re.search(r"error: (.+)", message)  # the regex crate quotes the whole pattern first
    return (found[1] if found else message.strip().split("\n")[0])[:300]
