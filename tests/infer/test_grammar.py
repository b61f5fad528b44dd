"""An untrained model is a random generator over the allowed tokens.

Its output is judged by json, jsonschema, re and ast.
"""

import ast
import json
import pathlib
import re

import jsonschema
import numpy as np
import pytest
import sentencepiece

from nanollama_jax import tokenizer
from nanollama_jax.errors import BadInput
from nanollama_jax.infer.constraint import Constraint, Grammars
from nanollama_jax.infer.grammar import TOOL_CALL, Grammar, json_schema, lark, regex, tool_call
from nanollama_jax.tokenizer import Tokenizer

PYTHON = "".join(
    path.read_text() for path in sorted(pathlib.Path(tokenizer.__file__).parent.rglob("*.py"))
)
UNK, EOS = 0, 2


class Case:
    """A tokenizer, its grammars, and the bytes of its pieces by our own reckoning."""

    def __init__(self, model: Tokenizer, extra_rows: int):
        self.tokenizer, self.vocab_size = model, model.vocab_size + extra_rows
        self.grammars = Grammars(model, self.vocab_size)
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model.model_bytes)

    def raw(self, ids: list[int]) -> bytes:
        pieces = [
            (token, self.processor.id_to_piece(token))
            for token in ids
            if not self.processor.is_control(token)
        ]
        return b"".join(
            bytes([int(piece[3:5], 16)])
            if self.processor.is_byte(token)
            else piece.replace("▁", " ").encode()
            for token, piece in pieces
        )

    def allowed(self, constraint: Constraint) -> np.ndarray:
        row = np.full(
            -(-self.vocab_size // 32), -1, np.int32
        )  # what was there before must not shine through
        constraint.fill_mask(row)
        ids = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        assert len(ids) and UNK not in ids and ids[-1] < self.tokenizer.vocab_size, ids
        return ids

    def generate(
        self, grammar: Grammar, budget: int, rng: np.random.Generator
    ) -> tuple[list[int], int]:
        """Ids, and how many of them were not the sampled ones."""
        constraint, ids, replaced = self.grammars.start(grammar, budget), [], 0
        while not constraint.finished:
            sampled = int(rng.choice(self.allowed(constraint)))
            ids.append(constraint.accept(sampled))
            replaced += ids[-1] != sampled
        assert len(ids) <= budget
        return ids, replaced

    def text(self, grammar: Grammar, budget: int, rng: np.random.Generator) -> str:
        ids, _ = self.generate(grammar, budget, rng)
        assert EOS not in ids[:-1]
        text = self.raw(ids).decode()
        assert self.tokenizer.decode(ids) in (
            text,
            text.removeprefix(" "),
        )  # a dummy prefix model's
        return text

    def least_budget(self, grammar: Grammar) -> int:
        with pytest.raises(BadInput, match="tokens, max_new_tokens is 0: raise it") as raised:
            self.grammars.start(grammar, 0)
        return int(re.search(r"(\d+) tokens", str(raised.value))[1])


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Case:
    path = tmp_path_factory.mktemp("grammar") / "base.model"
    tokenizer.train([PYTHON], path, vocab_size=1000, max_bytes=10**9)
    return Case(Tokenizer(path), extra_rows=5)


@pytest.fixture(scope="session")
def chat(base) -> Case:
    return Case(Tokenizer("chat", base.tokenizer.extended()), extra_rows=0)


@pytest.fixture(scope="session")
def mistral(shared_data) -> Case:
    return Case(Tokenizer(shared_data / "tokenizer/mistral_v1_32000.model"), extra_rows=8)


CASES = ["base", "chat", "mistral"]


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return request.getfixturevalue(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(("name", "number"), [(name, number) for number, name in enumerate(CASES)])
def test_every_call_of_a_real_tool_is_valid_whatever_the_budget(
    request, shared_data, rng, name, number
):
    case, replaced, spent = request.getfixturevalue(name), 0, 0
    lines = [
        line
        for file in ("simple_python", "multiple")
        for line in (shared_data / f"eval/bfcl/{file}.jsonl").read_text().splitlines()
    ]
    for line in lines[number::13]:
        tools = json.loads(line)["function"]
        grammar = tool_call(
            [{"type": "function", "function": tool} for tool in tools] if rng.integers(2) else tools
        )
        least = case.least_budget(grammar)
        for budget in (least, least + 10, 200):
            ids, others = case.generate(grammar, max(budget, least), rng)
            replaced, spent = replaced + others, spent + (len(ids) >= budget)
            assert (case.processor.id_to_piece(ids[0]) == TOOL_CALL) == (name == "chat")
            call = json.loads(case.raw(ids))
            assert list(call) == ["name", "arguments"]
            parameters = json.dumps(
                {tool["name"]: tool for tool in tools}[call["name"]]["parameters"]
            )
            for bfcl, real in {
                '"dict"': '"object"',
                '"float"': '"number"',
                '"tuple"': '"array"',
            }.items():
                parameters = parameters.replace(f'"type": {bfcl}', f'"type": {real}')
            schema = json.loads(parameters.replace('"type": "any"', '"title": "any"'))
            jsonschema.validate(call["arguments"], schema | {"additionalProperties": False})
    assert replaced and spent > 30, "the budget never pressed: the test shows nothing"


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["red", "green", None, 3]},
        "sizes": {
            "type": "array",
            "items": {"type": "number", "minimum": -2, "exclusiveMaximum": 7.5},
            "minItems": 2,
            "maxItems": 4,
        },
        "count": {"type": "integer", "minimum": 15, "maximum": 1234},
        "step": {"type": "integer", "minimum": 1, "multipleOf": 7},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        "title": {"type": "string", "minLength": 12, "maxLength": 30},
        "mail": {"type": "string", "pattern": "^[^@]+@[^@]+[.]com$"},
        "children": {"type": "array", "items": {"$ref": "#"}},
    },
    "required": ["kind", "sizes", "count", "code", "title"],
    "additionalProperties": False,
}


def test_json_of_a_schema_is_valid(case, rng):
    for source in (SCHEMA, json.dumps(SCHEMA)):
        least = case.least_budget(json_schema(source))
        for budget in [*range(least, least + 40, 6), 200]:
            jsonschema.validate(json.loads(case.text(json_schema(source), budget, rng)), SCHEMA)


def test_json_is_written_as_json_dumps_writes_it(case, rng):
    properties = {
        "a": {"type": "array", "items": {"enum": ["x", 1, None]}},
        "b": {"const": {"c": [True]}},
    }
    schema = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "x-guidance": {"item_separator": ","},
    }
    texts = [case.text(json_schema(schema), 40, rng) for _ in range(30)]
    assert all(json.dumps(json.loads(text)) == text for text in texts)
    assert any(", " in text for text in texts)


@pytest.mark.parametrize(
    "pattern",
    [
        "a+",
        "(ab)*c",
        r"[0-9]{3}-[0-9]{4}",
        "[^<]*</b>",
        "(.|\n)*END",
        "(a|b)*a(a|b){9}",
        "[}]*x",
        r"x?é{2,}y",
        "[a-z]+ is (not )?(good|bad)\\.",
    ],
)
def test_regex(case, rng, pattern):
    grammar = regex(pattern)
    least = case.least_budget(grammar)
    for budget in [*range(least, least + 20), 60, 60]:
        text = case.text(grammar, budget, rng)
        assert re.fullmatch(pattern, text), text


def test_lark(case, rng):
    grammar = lark(
        'start: term (OP term)*\nterm: NUMBER | "(" start ")"\n'
        'OP: " + " | " * " | "//"\nNUMBER: /0|[1-9][0-9]*/'
    )
    lengths = {
        len(ast.dump(ast.parse(case.text(grammar, budget, rng), mode="eval")))
        for budget in [*range(1, 40), 200, 200]
    }
    assert len(lengths) > 10, "it writes always the same"


def test_a_string_that_would_go_on_for_ever_is_closed_at_the_last_token(base, rng):
    lengths = [len(base.generate(json_schema({"type": "string"}), 30, rng)[0]) for _ in range(20)]
    assert max(lengths) == 30 and sum(length >= 29 for length in lengths) > 10, lengths


def test_an_end_is_allowed_just_where_the_text_may_end(case, rng):
    pattern = "[ab]{2,4}(c|de)?(é[ab])*"
    ended = 0
    for _ in range(30):
        constraint, ids = case.grammars.start(regex(pattern), 30), []
        while not constraint.finished and len(ids) < 20:
            allowed = case.allowed(constraint)
            whole = re.fullmatch(pattern, case.raw(ids).decode(errors="replace")) is not None
            assert (EOS in allowed) == whole, case.raw(ids)
            ids.append(constraint.accept(int(rng.choice(allowed))))
        ended += EOS in ids and constraint.finished
    assert ended > 3


def test_a_finished_text_allows_only_eos_and_takes_nothing(base):
    a = base.tokenizer.encode("a")[0]
    for pattern, tokens in (("ab?", [a, EOS]), ("a", [a])):
        constraint = base.grammars.start(regex(pattern), 9)
        with pytest.raises(ValueError, match="not allowed here"):
            constraint.accept(EOS)
        assert [constraint.accept(token) for token in tokens] == tokens
        assert constraint.finished and base.allowed(constraint).tolist() == [EOS]
        with pytest.raises(ValueError, match="after the end"):
            constraint.accept(a)


def test_other_end_tokens_end_a_text_as_eos_does(chat):
    im_end = chat.processor.piece_to_id("<|im_end|>")
    constraint = Grammars(chat.tokenizer, chat.vocab_size, end_ids=[im_end]).start(regex("a+"), 9)
    assert im_end not in chat.allowed(constraint)
    constraint.accept(chat.tokenizer.encode("a")[0])
    assert {im_end, EOS} <= set(chat.allowed(constraint).tolist())
    assert constraint.accept(im_end) == im_end and constraint.finished


def test_when_only_the_way_out_fits_it_alone_is_allowed_and_taken(base):
    a, b = (base.processor.piece_to_id(letter) for letter in "ab")
    constraint = base.grammars.start(regex("a*b"), 2)
    assert constraint.accept(a) == a
    assert base.allowed(constraint).tolist() == [b]
    assert constraint.accept(a) == b and constraint.finished


def test_a_mask_of_another_shape_is_refused(base):
    constraint = base.grammars.start(regex("a+"), 9)
    for row in (np.zeros(32, np.int64), np.zeros(31, np.int32), np.zeros((32, 2), np.int32)[:, 0]):
        with pytest.raises(ValueError, match="contiguous int32"):
            constraint.fill_mask(row)


def test_a_grammar_of_any_token_gives_no_unknown_and_no_row_beyond_the_tokenizer(case, rng):
    assert len(case.generate(lark("start: <[*]>{9}"), 20, rng)[0]) == 9


def test_a_matcher_in_error_never_goes_on_unmasked(base):
    constraint = base.grammars.start(regex("a+"), 9)
    constraint._matcher.consume_token(base.tokenizer.encode("b")[0])
    with pytest.raises(BadInput):
        base.allowed(constraint)


def test_forced_text_is_spelled_as_the_tokenizer_spells_it(base, mistral, rng):
    text = "def encode(self, text: str)"
    assert base.generate(regex(re.escape(text)), 99, rng)[0] == base.tokenizer.encode(text)
    ids, _ = mistral.generate(regex(re.escape("\n" + text)), 99, rng)
    assert [mistral.processor.piece_to_id("▁"), *ids] == mistral.tokenizer.encode("\n" + text)
    for case, decoded in (
        (base, " a b"),
        (mistral, "a b"),
    ):  # a model with a dummy prefix loses a leading space
        ids, _ = case.generate(regex(" a b"), 9, rng)
        assert (case.raw(ids), case.tokenizer.decode(ids)) == (b" a b", decoded)


ENDLESS = {
    "type": "object",
    "properties": {"next": {"$ref": "#"}},
    "required": ["next"],
    "additionalProperties": False,
}
DEEP: dict = {}
for _ in range(3000):
    DEEP = {"items": DEEP}
NESTED: dict = {}
for _ in range(150):
    NESTED = {"items": NESTED}
OVERLAPPING = [{"type": "integer"}, {"type": "number"}]
TOOL = {"name": "f", "parameters": {"type": "dict", "properties": {"a": {"type": "float"}}}}


def with_parameters(parameters) -> Grammar:
    return tool_call([TOOL | {"parameters": parameters}])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: json_schema({"type": "dict"}), "Invalid type: dict"),
        (lambda: json_schema("{"), "JSON schema"),
        (lambda: json_schema({"enum": {1}}), "JSON schema"),
        (lambda: json_schema({"not": {}}), "not"),
        (lambda: json_schema({"$ref": "#"}), "grammar: no text satisfies it"),
        (lambda: json_schema(ENDLESS), "no end"),
        (lambda: json_schema({"type": "string", "minLength": 10**6}), "no end"),
        (lambda: json_schema(DEEP), "recursion"),
        (lambda: regex("(a"), "unclosed group"),
        (lambda: regex("(?=a)"), "look-around"),
        (lambda: regex("\ud800"), "Unicode"),
        (lambda: lark("start: <|nope|>"), "unknown special token"),
        (lambda: lark("start: ("), "Expected token"),
        (lambda: lark('start: "a" start'), "no end"),
        (lambda: lark('start: a "x"\na[stop=""]: /[a-z]*/'), "end token in the middle"),
        (lambda: lark("start: " + "(" * 10**5), "nested"),
        (lambda: tool_call([]), "no tool"),
        (lambda: tool_call([TOOL, {"function": TOOL}]), "tool 2: another is named 'f': rename one"),
        (lambda: tool_call([{"parameters": {}}]), "tool 1: `name` is missing"),
        (lambda: with_parameters("x"), "tool 1: `parameters` is of type str, not an object"),
        (
            lambda: with_parameters({"a": {"type": "float"}}),
            "`parameters` is not the JSON schema of an",
        ),
        (
            lambda: tool_call([{"name": "f", "args": {"a": {}}}]),
            "it has `args` but no `parameters`",
        ),
        (lambda: with_parameters({"type": "HashMap"}), "tool 'f': Invalid type: HashMap"),
        (lambda: with_parameters({"type": "object"} | DEEP), "`tools` is not JSON"),
        (
            lambda: with_parameters({"type": "object"} | NESTED),
            "tool 'f': its parameters are nested",
        ),
        (
            lambda: json_schema({"oneOf": OVERLAPPING}),
            "JSON schema: `oneOf` has overlapping branches",
        ),
    ],
)
def test_a_bad_grammar_is_one_line(base, make, message):
    with pytest.raises(BadInput, match=re.escape(message)) as raised:
        base.grammars.compile(make())
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("property_schema", "says"),
    [
        (
            {"oneOf": OVERLAPPING},
            "`oneOf` has overlapping branches: use `anyOf`, which can be enforced",
        ),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "`oneOf` has"),
        ({"type": "string", "format": "phone"}, "`format` 'phone' cannot be enforced"),
        ({"type": "string", "format": 7}, "Expected string for 'format', got 7"),
        ({"type": "integer", "minimum": -(2**63)}, "`minimum` or `maximum` is too large to enf"),
        (
            {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
            "`minimum` or `maximum` is",
        ),
        ({"type": "integer", "exclusiveMinimum": 2**63}, "`minimum` or `maximum` is too large"),
        (
            {"type": "number", "minimum": -(2**63), "maximum": 2**63},
            "`minimum` or `maximum` is too",
        ),
        ({"type": "number", "minimum": 1e308}, "`minimum` or `maximum` is too large"),
        ({"type": "string", "maxLength": 2**63}, "`minLength` or `maxLength` is too large"),
        ({"type": "string", "pattern": "(?=a)b"}, "`pattern` is not a regex that can be enforced"),
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"not": {}}, 'Unimplemented keys: ["not"]'),
        ({"$ref": "#/$defs/nope"}, "Pointer '/$defs/nope' does not exist"),
    ],
)
def test_what_cannot_be_enforced_names_the_tool_and_the_keyword(base, property_schema, says):
    def tool(schema):
        return {"name": "bad", "inputSchema": {"type": "object", "properties": {"a": schema}}}

    bad = tool(property_schema)
    for tools in ([TOOL, bad], [bad, TOOL]):
        with pytest.raises(BadInput, match=re.escape(f"tool 'bad': {says}")) as raised:
            tool_call(tools)
        assert str(raised.value).endswith(": change or remove it") and "\n" not in str(raised.value)
    base.grammars.compile(tool_call([TOOL, tool({"type": "integer", "minimum": -(2**62)})]))


A, B = {"a": {"type": "integer"}}, {"b": {"type": "boolean"}}
CLOSED = [
    {"type": ["object", "null"], "properties": A | B},
    {"type": ["dict", "string"], "properties": A},
    {"properties": A | B, "required": ["b"]},
    {"type": "object", "properties": A | B, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"type": "object", "properties": A, "allOf": [{"properties": B, "required": ["b"]}]},
    {"allOf": [{"type": "object", "properties": A, "required": ["a"]}, {"properties": B}]},
    {"anyOf": [{"type": "object", "properties": A}, {"type": "null"}]},
    {"type": "array", "items": {"type": ["null", "object"], "properties": B}, "minItems": 1},
    {"anyOf": [{"$ref": "#/$defs/x"}, {"type": "null"}]},
]


@pytest.mark.parametrize("schema", CLOSED, ids=range(len(CLOSED)))
def test_objects_with_listed_properties_invent_no_keys(base, rng, schema):
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    parameters["$defs"] = {"x": {"type": ["object"], "properties": A}}
    real = json.loads(json.dumps(parameters).replace('"dict"', '"object"'))
    grammar, keys = tool_call([{"name": "f", "parameters": parameters}]), set()
    for _ in range(40):
        arguments = json.loads(base.text(grammar, 60, rng))["arguments"]
        jsonschema.validate(arguments, real)
        # a schema without a type allows any list; only the items of an array are the schema's
        found = arguments["x"] if schema.get("type") == "array" else [arguments["x"]]
        keys |= {key for each in found if isinstance(each, dict) for key in each}
    assert keys and keys <= {"a", "b"}


def test_arguments_are_an_object_also_where_the_schema_allows_null(base, rng):
    parameters = {"type": ["null", "object"], "properties": A | B}
    grammar = tool_call([{"name": "f", "parameters": parameters}])
    found = [json.loads(base.text(grammar, 60, rng))["arguments"] for _ in range(30)]
    assert {key for each in found for key in each} == {"a", "b"}


def test_an_object_that_lists_nothing_or_says_so_is_open(base, rng):
    says_so = {"type": ["object", "null"], "properties": A, "additionalProperties": A["a"]}
    for schema in ({"type": "object"}, says_so):
        parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
        grammar = tool_call([{"name": "f", "parameters": parameters}])
        found = [json.loads(base.text(grammar, 60, rng))["arguments"]["x"] for _ in range(20)]
        assert {key for each in found for key in each or ()} - {"a"}


def test_names_that_look_like_keywords_and_references_are_kept(base, rng):
    parameters = {
        "type": "dict",
        "properties": {
            "type": {"type": "tuple", "items": {"$ref": "#/$defs/x"}},
            "default": {"type": "float"},
            "any": {"type": "any"},
        },
        "required": ["type", "default"],
        "$defs": {
            "x": {"type": "dict", "properties": {"enum": {"type": "boolean"}}, "required": ["enum"]}
        },
    }
    seen = [
        json.loads(base.text(tool_call([{"name": 'a"} b', "parameters": parameters}]), 90, rng))
        for _ in range(20)
    ]
    assert {call["name"] for call in seen} == {'a"} b'}
    assert all(isinstance(call["arguments"]["default"], int | float) for call in seen)
    entries = [entry for call in seen for entry in call["arguments"]["type"]]
    assert entries and all(
        list(entry) == ["enum"] and isinstance(entry["enum"], bool) for entry in entries
    )
