"""Constrained decoding: token masks of a grammar, by llguidance over our vocabulary.

A constrained generation ends valid inside its budget of tokens, whatever the model: at every step we know a way to close the text (a path of
tokens to a point where it may end), and a sampled token after which no way would fit what is left of the budget gives place to the next of that path.
What is valid is the bytes of the pieces, in any segmentation; a stretch that the grammar leaves no choice in is spelled as the tokenizer spells it.
`Tokenizer.decode` gives those bytes, but that a model with a dummy prefix (Mistral's) drops one leading space of the whole text, so a
grammar that begins with a space loses it there.
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

_KEPT_GRAMMARS = 64
# Of the search for an end.
_MAX_PATH = 2000  # tokens
_MAX_TRIED = 3000  # states, for one path
_BEAM = 32  # states of one length that are followed
_MAX_WORDS = 64
_MAX_DROPPED = 16  # tokens of a path left out in looking for its rest


class _Vocabulary:
    """What llguidance wants to know of a tokenizer: the bytes of each piece, which are special, and how text is segmented."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
        self.encode, self.eos_token_id, self.bos_token_id = (
            tokenizer.encode,
            tokenizer.eos_id,
            tokenizer.bos_id,
        )
        self.special: dict[str, int] = {}
        self.tokens = [
            b""
        ] * vocab_size  # no bytes, never allowed: UNK, and the rows beyond the tokenizer
        for token, piece in enumerate(processor.id_to_piece(list(range(tokenizer.vocab_size)))):
            if processor.is_control(token):
                self.special[piece] = token
            if processor.is_byte(token):
                self.tokens[token] = bytes([int(piece[1:-1], 16)])
            elif not processor.is_unknown(token) and not processor.is_unused(token):
                self.tokens[token] = piece.replace("\u2581", " ").encode()
        self.special_token_ids = list(self.special.values())
        self.one_byte = {
            piece: token for token, piece in enumerate(self.tokens) if len(piece) == 1
        }  # a character's own piece comes after its byte's
        self.llguidance: llguidance.LLTokenizer | None = None  # built of this

    def __call__(self, text: str) -> list[int]:
        """Ids whose bytes are just `text`, which goes on from other text: with a dummy prefix it is encoded behind a newline, which is cut off."""
        for before in ("", "\n"):
            ids = self.encode(before + text)
            while self._bytes(ids) != text.encode() and self._bytes(ids[:1]) in (
                b" ",
                b"\n",
                b" \n",
            ):
                ids = ids[1:]
            if self._bytes(ids) == text.encode():
                return ids
        return self.llguidance.greedy_tokenize(text)  # the model's normaliser changes this text

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[token] for token in ids)


Goal = tuple[list[int], int]  # reached by a matcher that allows just so many of the first tokens


class _EndSearch:
    """Finds tokens that take a matcher to where its text may end: few, not the fewest.

    In JSON: close what can be closed, else take the nearest way to where something can be. In other texts: the nearest way to the end, by single
    bytes and the grammar's own words. Where that fails the other is tried; the one that worked is tried first the next time.
    """

    def __init__(self, vocabulary: _Vocabulary, grammar: Grammar):
        one_byte = vocabulary.one_byte
        order = [
            bytes([byte])
            for byte in dict.fromkeys([*b"0123456789abcdefghijklmnopqrstuvwxyz", *range(256)])
        ]
        self.pieces, self.eos = vocabulary.tokens, vocabulary.eos_token_id
        self.words = [
            vocabulary.llguidance.greedy_tokenize(word)
            for word in list(dict.fromkeys(grammar.words))[:_MAX_WORDS]
        ]
        self.steps = np.array(
            [one_byte[byte] for byte in order if byte in one_byte and byte < b"\x80"]
            + vocabulary.special_token_ids
        )
        self.rest_of_utf8 = np.array(
            [one_byte[byte] for byte in order if byte in one_byte and byte >= b"\x80"]
        )
        self.in_text = [one_byte[byte] for byte in (b"~",) if byte in one_byte]
        self.end_text: list[Goal] = [
            ([one_byte[byte], *self.in_text], 1) for byte in (b'"',) if byte in one_byte
        ]  # and no text may follow it
        end_value: list[Goal] = [
            ([one_byte[byte]], 1) for byte in (b"}", b"]", b")", b",", b'"') if byte in one_byte
        ]
        self.ways = [end_value] if grammar.json else [[], end_value]
        self.error = ""

    def path(
        self, matcher: llguidance.LLMatcher, limit: int, max_tried: int, known: Sequence[int] = ()
    ) -> list[int] | None:
        """At most `limit` tokens from where `matcher` is, and stays, to where the text may end; None if none were found. `known`: a path from
        nearby; it, or what is left of it behind its first tokens, most often leads to the end from here too, or from a few steps on."""
        for way in self.ways:
            probe, path, work = matcher.deep_copy(), [], iter(range(max_tried))
            while not probe.is_accepting() and len(path) <= limit:
                dropped = range(
                    max(0, len(path) + len(known) - limit), min(len(known), _MAX_DROPPED)
                )
                goals = [([*known[start:], self.eos], len(known) - start + 1) for start in dropped]
                in_text = bool(way) and bool(probe.validate_tokens(self.in_text))
                goals += self.end_text if in_text else way
                step = probe.compute_ff_tokens() or self._reached(probe, goals)
                if not step and in_text:
                    step = self._fill(probe, goals, limit - len(path))
                step = step or self._nearest(probe, goals, work)
                if (
                    not step
                    or not all(self.pieces[token] for token in step)
                    or not probe.consume_tokens(step)
                ):
                    self.error = self.error or probe.get_error()  # llguidance's limits
                    break
                path += step
            if probe.is_accepting() and len(path) <= limit:
                self.ways = sorted(self.ways, key=lambda each: each is not way)
                return path
            if len(path) > limit and known:
                return None  # it leads to the end, too late
        return None

    def _reached(self, probe: llguidance.LLMatcher, goals: list[Goal]) -> list[int]:
        for tokens, allowed in goals:
            if probe.validate_tokens(tokens) == allowed:
                return [token for token in tokens[:allowed] if token != self.eos]
        return []

    def _fill(self, matcher: llguidance.LLMatcher, goals: list[Goal], limit: int) -> list[int]:
        """More text up to where it may end: a least length."""
        probe, step = matcher.deep_copy(), []
        while (
            len(step) < limit
            and probe.validate_tokens(self.in_text)
            and probe.consume_tokens(self.in_text)
        ):
            step += self.in_text
            if self._reached(probe, goals):
                return step
        return []

    def _nearest(
        self, matcher: llguidance.LLMatcher, goals: list[Goal], work: Iterator[int]
    ) -> list[int]:
        """Tokens to the end or to where a goal is reached, breadth first. Of a state's successors by single bytes, those of one mask count as one."""
        layer, steps_of = [(matcher, [])], {}
        while layer:
            following, times_seen = [], collections.Counter()
            for probe, path in layer:
                forced, mask = probe.compute_ff_tokens(), probe.compute_bitmask()
                if not forced and mask not in steps_of:
                    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
                    steps = self.steps[bits[self.steps] == 1]
                    steps_of[mask] = [
                        [token]
                        for token in (
                            steps if steps.size else self.rest_of_utf8[bits[self.rest_of_utf8] == 1]
                        ).tolist()
                    ]
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
                    steps_of[mask] = list(
                        successors.values()
                    )  # the next state of this mask need not try all
            following.sort(key=lambda state: state[0])  # states of a mask not yet seen first
            layer = [(after, path) for _, after, path in following[:_BEAM]]
        return []


class Grammars:
    """Compiles grammars for one tokenizer and starts constraints of them. Building it costs 0.1-0.2 s: once a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int] = ()):
        """`vocab_size`: the logits' width; ids from `tokenizer.vocab_size` on are never allowed. `end_ids`: what ends a text besides EOS (a chat
        model's <|im_end|>), allowed where EOS is."""
        self._vocabulary = _Vocabulary(tokenizer, vocab_size)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(self._vocabulary), eos_token=[tokenizer.eos_id, *end_ids]
        )
        self._vocabulary.llguidance = self._tokenizer
        self.end_ids = (tokenizer.eos_id, *end_ids)
        allowed = np.pad([bool(piece) for piece in self._vocabulary.tokens], (0, -vocab_size % 32))
        self.never_beyond = np.packbits(allowed, bitorder="little").view(np.int32)
        self._compiled: dict[Grammar, tuple[llguidance.LLMatcher, _EndSearch, list[int]]] = {}

    def compile(self, grammar: Grammar) -> tuple[llguidance.LLMatcher, _EndSearch, list[int]]:
        """A matcher at the start of `grammar`, and a path from there to an end; kept for the next time.

        Raises `BadInput` for a grammar that llguidance refuses, that no text satisfies, or whose texts have no end that could be found.
        """
        if grammar not in self._compiled:
            source = (
                grammar.source
                if grammar.opening in self._vocabulary.special
                else grammar.source.replace(grammar.opening, "", 1)
            )
            matcher = llguidance.LLMatcher(
                self._tokenizer,
                source,
                log_level=0,
                limits=llguidance.LLParserLimits(verbose_errors=False),
            )
            matcher.compute_bitmask()  # finds what the compiler lets pass: a grammar without a text
            _raise_error(matcher)
            search = _EndSearch(self._vocabulary, grammar)
            path = search.path(matcher, _MAX_PATH, _MAX_TRIED)
            if path is None:
                why = f" ({gist(search.error)})" if search.error else ""
                raise BadInput(
                    f"grammar: no end of its texts was found within {_MAX_PATH} tokens{why}: bound its repetitions, or make it simpler"
                )
            while len(self._compiled) >= _KEPT_GRAMMARS:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[grammar] = matcher, search, path
        return self._compiled[grammar]

    def start(self, grammar: Grammar, max_new_tokens: int) -> "Constraint":
        """One generation of at most `max_new_tokens` tokens. Raises `BadInput` as `compile` does, and where the text could not end in so few."""
        matcher, search, path = self.compile(grammar)
        if len(path) > max_new_tokens:
            raise BadInput(
                f"grammar: the shortest text known has {len(path)} tokens, max_new_tokens is {max_new_tokens}: raise it"
            )
        return Constraint(matcher.deep_copy(), copy.copy(search), path, max_new_tokens, self)


class Constraint:
    """One running generation: `fill_mask`, sample, `accept`, until `finished`."""

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
        self._end_ids, self._never_beyond = grammars.end_ids, grammars.never_beyond

    @property
    def finished(self) -> bool:
        """The text is whole and nothing may follow: the grammar ends here, an end token came, or the budget is spent."""
        return self._budget == 0 or self._matcher.is_stopped()

    def fill_mask(self, mask_row: np.ndarray) -> None:
        """Fills `mask_row`, (ceil(vocab_size / 32),) int32: bit t says whether token t may come next. When finished, only EOS."""
        if (
            mask_row.dtype != np.int32
            or mask_row.shape != self._never_beyond.shape
            or not mask_row.flags.c_contiguous
        ):
            raise ValueError(
                f"a mask is contiguous int32 of shape {self._never_beyond.shape}, not {mask_row.dtype} {mask_row.shape}"
            )
        if self.finished or len(self._path) == self._budget:
            only = self._end_ids[0] if self.finished else self._path[0]
            mask_row[:] = 0
            mask_row.view(np.uint32)[only // 32] = 1 << only % 32
        else:
            self._matcher.unsafe_compute_mask_ptr(mask_row.ctypes.data, mask_row.nbytes)
            mask_row &= self._never_beyond
        _raise_error(self._matcher)  # whose mask would be EOS

    def accept(self, token: int) -> int:
        """Takes the sampled token and returns the one that the text goes on with: another if after `token` it might not end in time.

        Raises ValueError for a token that is not allowed here, or after the end; `BadInput` if the grammar exceeds llguidance's limits.
        """
        if self.finished or not self._matcher.validate_tokens([token]):
            raise ValueError(
                f"token {token} is not allowed {'after the end' if self.finished else 'here'}: sample under the mask"
            )
        self._budget -= 1
        if token in self._end_ids:
            path = []
        else:
            path = self._path[self._path[:1] == [token] :]
            if (
                len(path) > self._budget
                or self._matcher.validate_tokens([token, *path, self._end_ids[0]]) < len(path) + 2
            ):
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
