"""Constrained decoding: token masks of a grammar, by llguidance over our vocabulary.

A constrained generation ends with a valid text within its token budget, whatever the model. At
every step we know a way to finish the text (a path of tokens to a point where it may end). If the
rest of the budget has no way to finish after a sampled token, the next token of the known path
replaces it.

Validity is judged by the bytes of the pieces, in any segmentation; where the grammar leaves no
choice, text is segmented as the tokenizer does. `Tokenizer.decode` returns those bytes, except that
a model with a dummy prefix (Mistral's) drops one leading space of the whole text, so a grammar that
starts with a space loses it.
"""

import collections
import copy
from collections.abc import Iterator, Sequence

import llguidance
import numpy as np
import sentencepiece

from nanollama_jax.errors import BadInput
from nanollama_jax.infer.grammar import Grammar, gist
from nanollama_jax.tokenizer import Tokenizer

_CACHED_GRAMMARS = 64
# Limits of the search for a path to the end
_MAX_PATH = 2000  # tokens
_MAX_TRIED = 3000  # states per path
_BEAM = 32  # states kept per path length
_MAX_WORDS = 64
_MAX_DROPPED = 16  # leading tokens of a known path that may be skipped


class _Vocabulary:
    """A tokenizer as llguidance needs it: bytes of each piece, special pieces, segmentation."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
        self.encode = tokenizer.encode
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special: dict[str, int] = {}
        # No bytes means never allowed: UNK, and the rows beyond the tokenizer
        self.tokens = [b""] * vocab_size
        for token, piece in enumerate(processor.id_to_piece(list(range(tokenizer.vocab_size)))):
            if processor.is_control(token):
                self.special[piece] = token
            if processor.is_byte(token):
                self.tokens[token] = bytes([int(piece[1:-1], 16)])
            elif not processor.is_unknown(token) and not processor.is_unused(token):
                self.tokens[token] = piece.replace("\u2581", " ").encode()
        self.special_token_ids = list(self.special.values())
        # A character's own piece has a larger id than its byte, and wins
        self.one_byte = {piece: token for token, piece in enumerate(self.tokens) if len(piece) == 1}
        self.llguidance: llguidance.LLTokenizer | None = None  # set once it is built from this

    def __call__(self, text: str) -> list[int]:
        """Ids whose bytes are exactly `text`, a continuation of other text.

        With a dummy prefix, `text` is encoded after a newline, which is then cut off.
        """
        wanted = text.encode()
        for prefix in ("", "\n"):
            ids = self.encode(prefix + text)
            while self._bytes(ids) != wanted and self._bytes(ids[:1]) in (b" ", b"\n", b" \n"):
                ids = ids[1:]
            if self._bytes(ids) == wanted:
                return ids
        return self.llguidance.greedy_tokenize(text)  # the model's normalizer changes this text

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[token] for token in ids)


# Tokens, and how many of them, from the first, a matcher must allow exactly
Goal = tuple[list[int], int]


class _EndSearch:
    """Finds tokens that take a matcher to where its text may end: few, though not the fewest.

    In JSON: close what can be closed, else take the nearest way to where something can be closed.
    In other texts: the nearest way to the end, by single bytes and the grammar's own words. If one
    strategy fails the other is tried; the one that worked is tried first the next time.
    """

    def __init__(self, vocabulary: _Vocabulary, grammar: Grammar):
        one_byte = vocabulary.one_byte
        preferred = dict.fromkeys([*b"0123456789abcdefghijklmnopqrstuvwxyz", *range(256)])
        order = [byte for value in preferred if (byte := bytes([value])) in one_byte]
        words = list(dict.fromkeys(grammar.words))[:_MAX_WORDS]
        self.pieces, self.eos = vocabulary.tokens, vocabulary.eos_token_id
        self.words = [vocabulary.llguidance.greedy_tokenize(word) for word in words]
        ascii_steps = [one_byte[byte] for byte in order if byte < b"\x80"]
        self.steps = np.array(ascii_steps + vocabulary.special_token_ids)
        self.rest_of_utf8 = np.array([one_byte[byte] for byte in order if byte >= b"\x80"])
        self.in_text = [one_byte[b"~"]] if b"~" in one_byte else []
        self.end_text: list[Goal] = []
        if b'"' in one_byte:  # a quote that no text may follow
            self.end_text = [([one_byte[b'"'], *self.in_text], 1)]
        closing = [byte for byte in (b"}", b"]", b")", b",", b'"') if byte in one_byte]
        end_value: list[Goal] = [([one_byte[byte]], 1) for byte in closing]
        self.ways = [end_value] if grammar.json else [[], end_value]
        self.error = ""

    def path(
        self, matcher: llguidance.LLMatcher, limit: int, max_tried: int, known: Sequence[int] = ()
    ) -> list[int] | None:
        """At most `limit` tokens from `matcher`, which does not move, to where the text may end.

        None if none were found. `known` is a path from a nearby state: it, or what is left after
        skipping its first tokens, usually leads to the end from here too, or a few steps later.
        """
        for way in self.ways:
            probe, path, work = matcher.deep_copy(), [], iter(range(max_tried))
            while not probe.is_accepting() and len(path) <= limit:
                least = max(0, len(path) + len(known) - limit)
                dropped = range(least, min(len(known), _MAX_DROPPED))
                goals = [([*known[start:], self.eos], len(known) - start + 1) for start in dropped]
                in_text = bool(way) and bool(probe.validate_tokens(self.in_text))
                goals += self.end_text if in_text else way
                step = probe.compute_ff_tokens() or self._reached(probe, goals)
                if not step and in_text:
                    step = self._fill(probe, goals, limit - len(path))
                step = step or self._nearest(probe, goals, work)
                whole = step and all(self.pieces[token] for token in step)
                if not whole or not probe.consume_tokens(step):
                    self.error = self.error or probe.get_error()  # llguidance's limits
                    break
                path += step
            if probe.is_accepting() and len(path) <= limit:
                self.ways = sorted(self.ways, key=lambda each: each is not way)
                return path
            if len(path) > limit and known:
                return None  # the end comes too late
        return None

    def _reached(self, probe: llguidance.LLMatcher, goals: list[Goal]) -> list[int]:
        for tokens, allowed in goals:
            if probe.validate_tokens(tokens) == allowed:
                return [token for token in tokens[:allowed] if token != self.eos]
        return []

    def _fill(self, matcher: llguidance.LLMatcher, goals: list[Goal], limit: int) -> list[int]:
        """More text, up to where it may end: for a minimum length."""
        probe, step = matcher.deep_copy(), []
        while len(step) < limit and probe.validate_tokens(self.in_text):
            if not probe.consume_tokens(self.in_text):
                break
            step += self.in_text
            if self._reached(probe, goals):
                return step
        return []

    def _nearest(
        self, matcher: llguidance.LLMatcher, goals: list[Goal], work: Iterator[int]
    ) -> list[int]:
        """Tokens to the end or to a goal, breadth first.

        Single-byte successors of a state that have the same mask count as one.
        """
        layer, steps_of = [(matcher, [])], {}
        while layer:
            following, times_seen = [], collections.Counter()
            for probe, path in layer:
                forced, mask = probe.compute_ff_tokens(), probe.compute_bitmask()
                if not forced and mask not in steps_of:
                    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
                    steps = self.steps[bits[self.steps] == 1]
                    if not steps.size:
                        steps = self.rest_of_utf8[bits[self.rest_of_utf8] == 1]
                    steps_of[mask] = [[token] for token in steps.tolist()]
                single, successors = [] if forced else steps_of[mask], {}
                for number, step in enumerate([*single, *([forced] if forced else self.words)]):
                    if next(work, None) is None:
                        return []
                    after = probe.deep_copy()
                    if after.try_consume_tokens(step) < len(step):
                        self.error = self.error or after.get_error()
                        continue
                    if after.is_accepting() or self._reached(after, goals):
                        return path + step
                    seen = after.compute_bitmask()
                    if after.is_error() or (number < len(single) and seen in successors):
                        continue
                    following.append((times_seen[seen], after, path + step))
                    times_seen[seen] += 1
                    if number < len(single):
                        successors[seen] = step
                if single:
                    # Later states with this mask need not try all
                    steps_of[mask] = list(successors.values())
            following.sort(key=lambda state: state[0])  # states with a new mask first
            layer = [(after, path) for _, after, path in following[:_BEAM]]
        return []


class Grammars:
    """Compiles grammars for one tokenizer and starts constraints. Building it takes 0.1-0.2 s."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int] = ()):
        """`vocab_size` is the logits' width; ids beyond the tokenizer's are never allowed.

        `end_ids` end a text like EOS (a chat model's <|im_end|>): allowed where EOS is.
        """
        self._vocabulary = _Vocabulary(tokenizer, vocab_size)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(self._vocabulary), eos_token=[tokenizer.eos_id, *end_ids]
        )
        self._vocabulary.llguidance = self._tokenizer
        self.end_ids = (tokenizer.eos_id, *end_ids)
        allowed = np.pad([bool(piece) for piece in self._vocabulary.tokens], (0, -vocab_size % 32))
        self.pieces_mask = np.packbits(allowed, bitorder="little").view(np.int32)
        self._compiled: dict[Grammar, tuple[llguidance.LLMatcher, _EndSearch, list[int]]] = {}

    def compile(self, grammar: Grammar) -> tuple[llguidance.LLMatcher, _EndSearch, list[int]]:
        """A matcher at the start of `grammar`, its search, and a path to an end. Cached.

        Raises BadInput for a grammar that llguidance refuses, that no text satisfies, or whose
        texts have no end that could be found.
        """
        if grammar not in self._compiled:
            source = grammar.source
            if grammar.opening not in self._vocabulary.special:
                source = source.replace(grammar.opening, "", 1)
            matcher = llguidance.LLMatcher(
                self._tokenizer,
                source,
                log_level=0,
                limits=llguidance.LLParserLimits(verbose_errors=False),
            )
            matcher.compute_bitmask()  # finds what compiling does not: a grammar without a text
            _raise_error(matcher)
            search = _EndSearch(self._vocabulary, grammar)
            path = search.path(matcher, _MAX_PATH, _MAX_TRIED)
            if path is None:
                why = f" ({gist(search.error)})" if search.error else ""
                raise BadInput(
                    f"grammar: no end of its texts was found within {_MAX_PATH} tokens{why}: bound "
                    "its repetitions, or simplify it"
                )
            while len(self._compiled) >= _CACHED_GRAMMARS:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[grammar] = matcher, search, path
        return self._compiled[grammar]

    def start(self, grammar: Grammar, max_new_tokens: int) -> "Constraint":
        """One generation of at most `max_new_tokens` tokens.

        Raises BadInput like `compile`, and if no text that short was found.
        """
        matcher, search, path = self.compile(grammar)
        if len(path) > max_new_tokens:
            raise BadInput(
                f"grammar: the shortest text found has {len(path)} tokens, max_new_tokens is "
                f"{max_new_tokens}: raise it"
            )
        return Constraint(matcher.deep_copy(), copy.copy(search), path, max_new_tokens, self)


class Constraint:
    """A running generation: `fill_mask`, sample, `accept`, until `finished`."""

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        search: _EndSearch,
        path: list[int],
        budget: int,
        grammars: Grammars,
    ):
        self._matcher, self._search = matcher, search
        self._path = path  # from here to where the text may end, never longer than the budget
        self._budget = budget  # tokens that may still come
        self._end_ids, self._pieces_mask = grammars.end_ids, grammars.pieces_mask

    @property
    def finished(self) -> bool:
        """The text is complete: the grammar ended, an end token came, or the budget is spent."""
        return self._budget == 0 or self._matcher.is_stopped()

    def fill_mask(self, mask_row: np.ndarray) -> None:
        """Fills `mask_row`, (ceil(vocab_size / 32),) int32: bit t allows token t.

        When finished, only EOS. Raises ValueError for another shape, dtype or layout.
        """
        shape = self._pieces_mask.shape
        contiguous = mask_row.flags.c_contiguous
        if mask_row.dtype != np.int32 or mask_row.shape != shape or not contiguous:
            raise ValueError(
                f"a mask must be contiguous int32 of shape {shape}, not {mask_row.dtype} "
                f"{mask_row.shape}"
            )
        if self.finished or len(self._path) == self._budget:
            only = self._end_ids[0] if self.finished else self._path[0]
            mask_row[:] = 0
            mask_row.view(np.uint32)[only // 32] = 1 << only % 32
        else:
            self._matcher.unsafe_compute_mask_ptr(mask_row.ctypes.data, mask_row.nbytes)
            mask_row &= self._pieces_mask
        _raise_error(self._matcher)  # its mask would be EOS

    def accept(self, token: int) -> int:
        """Takes the sampled token and returns the token to use.

        It is another one if the text might not end in time after `token`. Raises ValueError for a
        token that is not allowed here, or after the end; BadInput beyond llguidance's limits.
        """
        if self.finished or not self._matcher.validate_tokens([token]):
            where = "after the end" if self.finished else "here"
            raise ValueError(f"token {token} is not allowed {where}: sample under the mask")
        self._budget -= 1
        if token in self._end_ids:
            path = []
        else:
            path = self._path[self._path[:1] == [token] :]
            ending = [token, *path, self._end_ids[0]]
            if len(path) > self._budget or self._matcher.validate_tokens(ending) < len(ending):
                after = self._matcher.deep_copy()
                after.consume_token(token)
                path = self._search.path(after, self._budget, _MAX_TRIED // 4, path)
        if path is None:
            token, path = (self._path or self._end_ids)[0], self._path[1:]
        self._matcher.consume_token(token)
        _raise_error(self._matcher)
        self._path = path
        return token


def _raise_error(matcher: llguidance.LLMatcher) -> None:
    if matcher.is_error():
        raise BadInput(f"grammar: {gist(matcher.get_error())}")
