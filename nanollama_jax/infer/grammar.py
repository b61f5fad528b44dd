"""Constrained decoding: token masks from a JSON schema, a regex, a Lark grammar or a set of tools, by llguidance over our vocabulary.

A constrained generation ends valid inside its budget of tokens, whatever the model: at every step we know a way to close the text (a path of
tokens to a point where it may end), and a sampled token after which no way would fit what is left of the budget gives place to the next of that path.
What is valid is the bytes of the pieces, in any segmentation; a stretch that the grammar leaves no choice in is spelled as the tokenizer spells it.
`Tokenizer.decode` gives those bytes, but that a model with a dummy prefix (Mistral's) drops one leading space of the whole text, so a
grammar that begins with a space loses it there. JSON is written as `json.dumps` writes it: ", " and ": ", no other whitespace.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
import sentencepiece

from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer

TOOL_CALL = "<|tool_call|>"
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_PATH = 2000  # tokens a way to close may have
_MAX_TRIED = 4000
_BEAM = 8
_MAX_SPLICE = 16
_KEEP_COMPILED = 64
# Berkeley Function Calling Leaderboard's names of types: those of Python and of JSON Schema mixed.
_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array", "int": "integer", "str": "string", "bool": "boolean"}


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What llguidance reads: its JSON list of grammars, or Lark. Made by the four functions below; checked by `Grammars.compile`."""

    source: str
    opening: str = ""  # a special token in `source` that is left out where the vocabulary has no such piece
    words: tuple[str, ...] = ()  # stretches of literal text, which may be what ends a text


def json_schema(schema: dict[str, Any] | str) -> Grammar:
    """Values of a JSON schema (its properties in the schema's order). A keyword that cannot be enforced is an error, never ignored."""
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(parsed, dict):
            raise ValueError(f"it is {type(parsed).__name__}, not an object")
        # A string: a dict is walked without a limit of depth, a string with one. Overrides win over the schema's own "x-guidance".
        return Grammar(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(parsed), overrides=_JSON_STYLE))
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"JSON schema: {_first_line(str(error))}: give one JSON object") from error


def regex(pattern: str) -> Grammar:
    """Texts that match the whole `pattern`, in the syntax of Rust's regex crate: no look-around, no back-references."""
    return Grammar(llguidance.LLMatcher.grammar_from_regex(pattern), words=_literals(pattern))


def lark(text: str) -> Grammar:
    """Texts of a context-free grammar in llguidance's kind of Lark. <|name|> in a rule is that special token."""
    return Grammar(llguidance.LLMatcher.grammar_from_lark(text), words=_literals(text))


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
        raise BadInput(f"tools: {_first_line(str(error))}: their parameters must be JSON") from error
    return Grammar(f"start: {TOOL_CALL} call\ncall: %json {schema}\n", opening=TOOL_CALL)


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


def _literals(text: str) -> tuple[str, ...]:
    plain = re.sub(r"\\.", " ", text)
    return tuple(dict.fromkeys(re.findall(r"[A-Za-z]{2,}|[^A-Za-z\s\"'|*+?()\[\]]{2,}", plain)))[:64]


def _first_line(message: str) -> str:
    found = re.search(r"error: (.+)", message)  # the regex crate quotes the whole pattern before it says what is wrong
    return (found[1] if found else message.strip().split("\n")[0])[:300]


class _Vocabulary:
    """What llguidance wants to know of a tokenizer: the bytes of each piece, which are special, and how text is segmented."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
        self.encode = tokenizer.encode
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [b""] * vocab_size  # no bytes: never allowed, as UNK and the rows beyond the tokenizer
        self.special: dict[str, int] = {}
        for token, piece in enumerate(processor.id_to_piece(list(range(tokenizer.vocab_size)))):
            if processor.is_control(token):
                self.special[piece] = token
            if processor.is_byte(token):
                self.tokens[token] = bytes([int(piece[1:-1], 16)])
            elif not processor.is_unknown(token) and not processor.is_unused(token):
                self.tokens[token] = piece.replace("\u2581", " ").encode()
        self.special_token_ids = list(self.special.values())

    def __call__(self, text: str) -> list[int]:
        """Ids whose bytes are exactly `text`, which continues another. With a dummy prefix, it is encoded behind a newline, which is cut off."""
        for before in ("", "\n"):
            ids = self.encode(before + text)
            while self._bytes(ids) != text.encode() and self._bytes(ids[:1]) in (b" ", b"\n", b" \n"):
                ids = ids[1:]
            if self._bytes(ids) == text.encode():
                return ids
        return self.greedy(text)  # the model's normaliser changes this text

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[token] for token in ids)


@dataclasses.dataclass(frozen=True)
class _Compiled:
    matcher: llguidance.LLMatcher
    path: list[int]
    attempts: list[list[int]]
    words: list[list[int]]


class Grammars:
    """Compiles grammars for one tokenizer and starts constraints of them. Building it costs ~0.1 s: once a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int] = ()):
        """`vocab_size`: the width of the logits; ids from `tokenizer.vocab_size` on are never allowed. `end_ids`: tokens besides EOS that end a text
        (a chat model's <|im_end|>), allowed where EOS is."""
        vocabulary = _Vocabulary(tokenizer, vocab_size)
        self._llguidance = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), eos_token=[tokenizer.eos_id, *end_ids])
        vocabulary.greedy = self._llguidance.greedy_tokenize
        self._special = vocabulary.special
        self.end_ids = tuple(self._llguidance.eos_tokens)
        self.legal = np.packbits(np.pad([bool(piece) for piece in vocabulary.tokens], (0, -vocab_size % 32)), bitorder="little").view(np.int32)
        one_byte = {piece: token for token, piece in reversed(list(enumerate(vocabulary.tokens))) if len(piece) == 1}
        plain = [bytes([byte]) for byte in b"0123456789" + bytes(range(97, 123)) + bytes(range(256))]  # digits and letters first
        self._steps = np.array([one_byte[piece] for piece in dict.fromkeys(plain) if piece in one_byte] + vocabulary.special_token_ids)
        self._steps = self._steps[~np.isin(self._steps, self.end_ids)]
        # Goals of a search: of each, the first token must be allowed, and the second not after it. A quote ends a text only if no text may follow.
        self._text = [one_byte.get(b"~", -1)]
        self._end_text = [[one_byte.get(b'"', -1), *self._text]]
        self._end_value = [[one_byte.get(piece, -1)] for piece in (b"}", b"]", b")", b",", b'"')]
        self._compiled: dict[Grammar, _Compiled] = {}

    def compile(self, grammar: Grammar) -> "_Compiled":
        """The matcher at the start of `grammar`, to be copied, and tokens that lead from there to an end. Kept for the next time.

        Raises `BadInput` for a grammar that llguidance refuses, that no text satisfies, or whose texts find no end.
        """
        if grammar not in self._compiled:
            source = grammar.source if grammar.opening in self._special else grammar.source.replace(grammar.opening, "", 1)
            limits = llguidance.LLParserLimits(verbose_errors=False)
            matcher = llguidance.LLMatcher(self._llguidance, source, log_level=0, limits=limits)
            matcher.compute_bitmask()  # finds what the compiler does not: a grammar of no text at all
            if matcher.is_error():
                raise BadInput(f"grammar: {_first_line(matcher.get_error())}: change it")
            words = [self._llguidance.greedy_tokenize(word) for word in grammar.words]
            attempts = [self._end_value, []]
            path = self.closing_path(matcher, attempts, words, _MAX_PATH)
            if path is None:
                raise BadInput(f"grammar: no way to end its texts was found within {_MAX_PATH} tokens: make them finite")
            while len(self._compiled) >= _KEEP_COMPILED:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[grammar] = _Compiled(matcher, path, attempts, words)
        return self._compiled[grammar]

    def start(self, grammar: Grammar, max_new_tokens: int) -> "Constraint":
        """A generation of at most `max_new_tokens` tokens. Raises `BadInput` as `compile` does, and where no text would fit."""
        compiled = self.compile(grammar)
        if len(compiled.path) > max_new_tokens:
            raise BadInput(f"grammar: its shortest text known takes {len(compiled.path)} tokens, max_new_tokens is {max_new_tokens}: raise it")
        return Constraint(self, compiled, max_new_tokens)

    def closing_path(self, matcher: llguidance.LLMatcher, attempts: list[list[int]], words: list[list[int]], limit: int) -> list[int] | None:
        """At most `limit` tokens that take `matcher`, which stays where it is, to a point where the text may end; None if none was found."""
        for goals in list(attempts):
            probe, path = matcher.deep_copy(), []
            while not probe.is_accepting() and len(path) <= limit:
                near = self._end_text if goals and probe.validate_tokens(self._text) else goals
                step = probe.compute_ff_tokens() or self._reached(probe, near) or self._search(probe, near, words, limit)
                if not step or not probe.consume_tokens(step):
                    break
                path += step
            if probe.is_accepting() and len(path) <= limit:
                attempts.sort(key=lambda each: each is not goals)  # the next time it is tried first
                return path
        return None

    def _reached(self, probe: llguidance.LLMatcher, goals: list[list[int]]) -> list[int]:
        return next((goal[:1] for goal in goals if probe.validate_tokens(goal) == 1), [])

    def _search(self, matcher: llguidance.LLMatcher, goals: list[int], words: list[list[int]], limit: int) -> list[int]:
        """Breadth first: tokens to where the text may end, or a goal is allowed. Of states of one length and one mask one is followed."""
        layer, tried, steps_of = [(matcher.deep_copy(), [])], 0, {}
        while layer and tried < _MAX_TRIED and len(layer[0][1]) <= limit:
            following, times_seen = [], collections.Counter()
            for probe, path in layer:
                mask, forced = probe.compute_bitmask(), probe.compute_ff_tokens()
                if mask not in steps_of:
                    bits = np.frombuffer(mask, np.uint8)
                    allowed = self._steps[bits[self._steps >> 3] >> (self._steps & 7) & 1 == 1]
                    steps_of[mask] = [[token] for token in allowed.tolist()] + words
                fresh = {}
                for step in [forced] if forced else steps_of[mask]:
                    after = probe.deep_copy()
                    tried += 1
                    if after.try_consume_tokens(step) < len(step):
                        continue
                    if after.is_accepting() or self._reached(after, goals):
                        return path + step
                    seen = after.compute_bitmask()
                    if seen not in fresh:
                        fresh[seen] = step
                        following.append((times_seen[seen], after, path + step))
                        times_seen[seen] += 1
                if not forced:
                    steps_of[mask] = list(fresh.values())
            following.sort(key=lambda state: state[0])
            layer = [(after, path) for _, after, path in following[:_BEAM]]
        return []


class Constraint:
    """One running generation. `fill_mask`, sample, `accept`; until `finished`."""

    def __init__(self, grammars: Grammars, compiled: _Compiled, budget: int):
        self._grammars, self._matcher, self._words = grammars, compiled.matcher.deep_copy(), (list(compiled.attempts), compiled.words)
        self._path = compiled.path  # leads from here to where the text may end; never longer than the budget
        self._budget = budget  # tokens that may still come

    @property
    def finished(self) -> bool:
        """The text is valid and nothing may follow: the grammar is at its end, an end token came, or the budget is spent."""
        return self._budget == 0 or self._matcher.is_stopped()

    def fill_mask(self, mask_row: np.ndarray) -> None:
        """Sets bit t of `mask_row`, (ceil(vocab_size / 32),) int32, where token t may come next. Of a finished one only EOS's."""
        if mask_row.dtype != np.int32 or mask_row.shape != self._grammars.legal.shape or not mask_row.flags.c_contiguous:
            raise ValueError(f"the mask must be contiguous int32 of shape {self._grammars.legal.shape}, not {mask_row.dtype} {mask_row.shape}")
        if self.finished or len(self._path) == self._budget:
            mask_row[:] = 0
            token = self._grammars.end_ids[0] if self.finished else self._path[0]
            mask_row.view(np.uint32)[token >> 5] = 1 << (token & 31)
            return
        self._matcher.unsafe_compute_mask_ptr(mask_row.ctypes.data, mask_row.nbytes)
        self._check()  # of a matcher in error the mask would allow EOS
        np.bitwise_and(mask_row, self._grammars.legal, out=mask_row)

    def accept(self, token: int) -> int:
        """Takes the sampled token; returns the one that the text goes on with: another if after `token` it could not end inside the budget.

        Raises ValueError for a token that the grammar does not allow here, or after the end.
        """
        if self.finished:
            raise ValueError("the constrained text is finished: nothing may follow")
        if not self._matcher.validate_tokens([token]):
            raise ValueError(f"token {token} is not allowed here: sample under the mask")
        self._budget -= 1
        path = [] if token in self._grammars.end_ids else self._path_after(token)
        if path is None:
            token, path = (self._path or self._grammars.end_ids)[0], self._path[1:]
        self._matcher.consume_token(token)
        self._path = path
        self._check()
        return token

    def _path_after(self, token: int) -> list[int] | None:
        """A path from where `token` leads to, within the budget: most often the present one (more text), or a part of it (what it was to do)."""
        own = int(self._path[:1] == [token])
        end = self._grammars.end_ids[0]
        for start in dict.fromkeys([own, *range(min(len(self._path), _MAX_SPLICE) + 1)]):
            known = self._path[start:]
            if len(known) <= self._budget and self._matcher.validate_tokens([token, *known, end]) == len(known) + 2:
                return known
        probe = self._matcher.deep_copy()
        probe.consume_token(token)
        return self._grammars.closing_path(probe, *self._words, self._budget)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadInput(f"grammar: {_first_line(self._matcher.get_error())}: make it simpler")
