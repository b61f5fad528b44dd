"""What a constrained generation may contain, in llguidance's terms.

A JSON schema, a regex, a Lark grammar, or a call of one of a set of tools. JSON is formatted like
`json.dumps`: ", " and ": ", no other whitespace. `constraint.py` enforces it.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from nanollama_jax.chat.conversations import naming, parse_tools
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import TOOL_CALL

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_COMBINED = ("allOf", "anyOf", "oneOf")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
# Type names of the Berkeley Function Calling Leaderboard mix Python's and JSON Schema's
_JSON_TYPES = {
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "list": "array",
    "int": "integer",
    "str": "string",
    "bool": "boolean",
}
# llguidance's error, which does not name the keyword -> ours, which does
_UNENFORCEABLE = {
    "oneOf constraints": "`oneOf` has overlapping branches: use `anyOf`, which can be enforced",
    "Failed to generate regex for": "`minimum` or `maximum` is too large to enforce (2^63)",
    "(?s:.{": "`minLength` or `maxLength` is too large to enforce",
    "regex parse error": "`pattern` is not a regex that can be enforced",
}


@dataclasses.dataclass(frozen=True)
class Grammar:
    """llguidance's source: a JSON list of grammars, or Lark.

    Made by the four functions below, checked by `Grammars.compile`.
    """

    source: str
    json: bool  # at least in part
    words: Sequence[str] = dataclasses.field(default=(), compare=False)  # literals that may end it
    opening: str = ""  # a special token in `source`, removed if the vocabulary does not have it


def json_schema(schema: dict[str, Any] | str) -> Grammar:
    """Values of a JSON schema, properties in its order.

    Raises BadInput for a keyword that cannot be enforced; none is ignored.
    """
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(parsed, dict):
            raise ValueError(f"it is of type {type(parsed).__name__}")
        text = json.dumps(parsed)
        source = _enforceable(text)
    except BadInput as error:
        raise BadInput(f"JSON schema: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"JSON schema: {gist(str(error))}: give a JSON object") from error
    return Grammar(source, json=True, words=_pattern_literals(text))


def regex(pattern: str) -> Grammar:
    """Texts that `pattern` matches in full, in the syntax of Rust's regex crate.

    It has no look-around and no back-references.
    """
    source = LLMatcher.grammar_from_regex(_utf8(pattern))
    return Grammar(source, json=False, words=_literals(pattern))


def lark(text: str) -> Grammar:
    """Texts of a context-free grammar in llguidance's Lark dialect.

    In a rule, <|name|> is that special token and %json {...} a JSON schema.
    """
    if re.search(r'stop\s*=\s*""', text):
        raise BadInput(
            'grammar: stop="" would take the end token in the middle of a text: use suffix= or lazy'
        )
    quoted = re.findall(r'"((?:[^"\\\n]|\\.)+)"', text)
    regexes = re.findall(r"/((?:[^/\\\n]|\\.)+)/", text)
    words = [word.replace("\\n", "\n").replace('\\"', '"') for word in quoted]
    words += [word for pattern in regexes for word in _literals(pattern)]
    return Grammar(LLMatcher.grammar_from_lark(_utf8(text)), json="%json" in text, words=words)


def tool_call(tools: Sequence[dict[str, Any]]) -> Grammar:
    """One call, `<|tool_call|>{"name": "...", "arguments": {...}}`, of one of `tools`.

    The arguments fit the tool's parameters and include no others. Tools are OpenAI's or BFCL's:
    {"name", "description", "parameters": schema}, bare or as {"type": "function", "function":
    {...}}. With a vocabulary without the control piece `<|tool_call|>` (a base model's) the text
    starts with the JSON. Raises BadInput for a tool without a name, two of one name, or parameters
    that are not a schema.
    """
    calls = []
    for number, tool in enumerate(parse_tools(list(tools))):
        parameters = {"type": "object", "properties": {}} | tool.get("parameters", {})
        if isinstance(parameters["type"], list) and "object" in parameters["type"]:
            parameters["type"] = "object"  # arguments are never null
        with naming(f"tool {tool['name']!r}"):
            try:
                _enforceable(json.dumps(_json_types(parameters, "#")))
                arguments = _json_types(parameters, f"#/anyOf/{number}/properties/arguments")
            except BadInput:
                raise
            except (ValueError, RecursionError) as error:  # llguidance limits the depth too
                why = f"its parameters are nested too deeply ({gist(str(error))})"
                raise BadInput(f"{why}: flatten them") from error
        properties = {"name": {"const": tool["name"]}, "arguments": arguments}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    if not calls:
        raise BadInput("there is no tool to call: give at least one")
    schema = json.dumps({"x-guidance": _JSON_STYLE, "anyOf": calls})
    return Grammar(
        f"start: {TOOL_CALL} call\ncall: %json {schema}\n",
        json=True,
        words=_pattern_literals(schema),
        opening=TOOL_CALL,
    )


def _enforceable(schema: str) -> str:
    """The grammar of a JSON schema's text. Raises BadInput that names what cannot be enforced."""
    # As a string: llguidance limits its depth, unlike a dict's. Overrides win over "x-guidance"
    source = LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_STYLE)
    if problem := LLMatcher.validate_grammar(source):
        named = next((words for found, words in _UNENFORCEABLE.items() if found in problem), "")
        if unknown := re.fullmatch("Unknown format: (.*)", problem):
            named = f"`format` {unknown[1]!r} cannot be enforced"
        raise BadInput(f"{named or gist(problem)}: change or remove it")
    return source


def _json_types(schema: Any, root: str, closed: bool = True) -> Any:
    """`schema` with BFCL's types mapped to JSON Schema's and "#" references moved to `root`.

    Objects that list their properties are closed (`additionalProperties` false) unless they say
    otherwise. An object that shares its properties with its allOf, anyOf or oneOf is closed to the
    names that any of them lists.
    """
    if isinstance(schema, list):
        return [_json_types(each, root, closed) for each in schema]
    if not isinstance(schema, dict):
        return schema
    all_of = schema.get("allOf")
    shared = bool(schema.get("properties")) or (isinstance(all_of, list) and len(all_of) > 1)
    mapped = {}
    for key, value in schema.items():
        if key in _NAMED_SCHEMAS and isinstance(value, dict):
            mapped[key] = {name: _json_types(each, root) for name, each in value.items()}
        elif key in _COMBINED:
            mapped[key] = _json_types(value, root, closed and not shared)
        elif key in ("enum", "const", "default", "examples"):  # values, not schemas
            mapped[key] = value
        else:
            mapped[key] = _json_types(value, root)
    types = mapped.get("type")
    if types == "any":
        del mapped["type"]
    elif isinstance(types, str):
        mapped["type"] = _JSON_TYPES.get(types, types)
    elif isinstance(types, list):
        mapped["type"] = [
            _JSON_TYPES.get(each, each) if isinstance(each, str) else each for each in types
        ]
    if isinstance(mapped.get("$ref"), str) and mapped["$ref"].startswith("#"):
        mapped["$ref"] = root + mapped["$ref"][1:]
    listed = "properties" in mapped and mapped.keys().isdisjoint(_COMBINED)
    if closed and (listed or shared) and (names := _property_names(mapped)) is not None:
        mapped["properties"] = {name: {} for name in names} | mapped.get("properties", {})
        mapped.setdefault("additionalProperties", False)
    return mapped


def _property_names(schema: Any) -> list[str] | None:
    """The properties that a schema and its allOf, anyOf and oneOf list; None if others are open."""
    if not isinstance(schema, dict) or "$ref" in schema:
        return None
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        return None
    names = list(properties)
    for parts in (schema[key] for key in _COMBINED if key in schema):
        for part in parts if isinstance(parts, list) else [None]:
            inner = _property_names(part)
            if inner is None or {"patternProperties", "additionalProperties"} & part.keys():
                return None
            names += inner
    return names


def _literals(pattern: str) -> list[str]:
    """The parts of a regex that stand for themselves."""
    found = re.findall(
        r"(?<=\\)\W|(?<=\[)\W(?=\])|[^\s\\|*+?()\[\]{}^$.]+", re.sub(r"\\[A-Za-z]", " ", pattern)
    )
    return [word for word in found if len(word) > 1 or not word.isalnum()]


def _pattern_literals(schema: str) -> list[str]:
    patterns = re.findall(r'"pattern": ("(?:[^"\\]|\\.)*")', schema)
    return [word for pattern in patterns for word in _literals(json.loads(pattern))]


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"grammar: this is not Unicode text: {error.reason}") from error
    return text


def gist(message: str) -> str:
    if message.startswith("NoExtension"):
        return "no text satisfies it"
    found = re.search(r"error: (.+)", message)  # the regex crate quotes the whole pattern first
    return (found[1] if found else message.strip().split("\n")[0])[:300]
