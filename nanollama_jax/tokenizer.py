"""Text to token ids and back: any SentencePiece model, and the training of our own.

Ours is byte-pair encoding with byte fallback, identity normalisation and no dummy prefix, so that every text has exactly one
encoding and comes back from it unchanged. A model from elsewhere (Llama 2's, Mistral's) is used as it is: the ids are always
SentencePiece's own. The one text that does not round-trip is one that holds U+2581 (▁): SentencePiece writes spaces with it,
and decodes both to a space.
"""

import codecs
import functools
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from nanollama_jax.errors import BadInput
from nanollama_jax.files import whole_file

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
MOST_PIECES = 2**24  # a hundred times the largest vocabulary there is
# What fine-tuning adds to a vocabulary, in this order, and unused pieces up to a multiple of 8 (32,000 -> 32,008).
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # ChatML's
THOUGHT_START, THOUGHT_END = "<|start_thought|>", "<|end_thought|>"
TOOL_CALL, TOOL_RESPONSE = "<|tool_call|>", "<|tool_response|>"
CHAT_TOKENS = (TURN_START, TURN_END, THOUGHT_START, THOUGHT_END, TOOL_CALL, TOOL_RESPONSE)

# The trainer drops sentences over max_sentence_length bytes and trims newlines at their end, so documents are cut into
# stretches that end before a space or a newline. Newlines inside and in front of a stretch are learnt: on Python code the
# pieces ":\n", ")\n\n" ... give 3.11 bytes a token where training on single lines gives 2.93 (4,096 pieces).
# But no piece goes on after a newline with visible text ("\n#"; 0.1 % fewer bytes a token without): chat's "<|im_start|>assistant\n" has the same
# ids whatever the answer begins with (chat/chatml.py).
_SPACE = "\u2581"  # as SentencePiece writes a space
# Encoded at a time. Books: 1,000, 4,000, 16,000, 64,000 characters and whole ones: 3.2, 3.5, 3.2, 2.2, 0.9 MB/s; library documentation: 3.2 to 2.0
_PART_CHARACTERS = 4000
_CUT = re.compile(f"(?<=[^ {_SPACE}]) (?=.)", re.DOTALL)
_STRETCH_CHARACTERS = 4000
_RESERVED = "\u2585"  # ▅: the trainer skips a whole sentence that has it; encoding takes it as any character
_LINE_START, _NOT_JOINED = re.compile(r"\n(?=\S)"), "\ue000"
_STRETCH = re.compile(rf"(?s).{{1,{_STRETCH_CHARACTERS}}}(?=[ \n]|\Z)|.{{1,{_STRETCH_CHARACTERS}}}")


def train(texts: Iterable[str], path: str | os.PathLike, vocab_size: int, max_bytes: int) -> None:
    """Trains a tokenizer on the first `max_bytes` (UTF-8) of `texts` and writes it to `path`, whole or not at all.

    The same texts give the same file on any machine. Raises `BadInput` when the text cannot fill `vocab_size` pieces, and what `texts` raises.
    """
    if not 1 <= vocab_size <= MOST_PIECES:
        raise BadInput(f"vocab_size={vocab_size} must be from 1 to {MOST_PIECES:,}")
    if max_bytes < 1:
        raise BadInput(f"max_bytes={max_bytes} must be at least 1: it is how much text to train on")
    read_bytes = 0
    failure = None

    def stretches() -> Iterator[str]:
        nonlocal read_bytes, failure
        try:
            for text in texts:
                for match in _STRETCH.finditer(text):
                    read_bytes += len(match.group().encode())
                    if read_bytes > max_bytes:
                        return
                    yield _LINE_START.sub("\n" + _NOT_JOINED, match.group()).replace(
                        _RESERVED, _NOT_JOINED
                    )
        except (
            Exception,
            KeyboardInterrupt,
        ) as error:  # SentencePiece would make a RuntimeError of its own of it
            failure = error

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=stretches(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=0.9999,  # byte fallback takes the rest
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            pretokenization_delimiter=_NOT_JOINED,
            max_sentence_length=8 * _STRETCH_CHARACTERS,
            num_threads=8,  # a constant: it is stored in the model file, whose hash must not depend on the machine
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:  # ValueError: a vocab_size beyond 31 bits
        if failure is None:
            raise BadInput(
                _why_training_failed(str(error), vocab_size, min(read_bytes, max_bytes))
            ) from error
    if failure is not None:
        raise failure
    with whole_file(path) as file:
        file.write(model.getvalue())


def _why_training_failed(message: str, vocab_size: int, text_bytes: int) -> str:
    if "smaller than required_chars" in message or "insert_id" in message:
        return f"a vocabulary of {vocab_size} pieces has no room for the 256 bytes and the text's characters: raise vocab_size"
    if found := re.search(r"value <= (\d+)", message):
        return f"{text_bytes:,} bytes of text give at most {found[1]} pieces, not {vocab_size}: lower vocab_size or train on more text"
    if "sentences_.empty()" in message:
        return "there is no text to train the tokenizer on: check its sources and max_bytes"
    return f"SentencePiece could not train {vocab_size} pieces on {text_bytes:,} bytes of text: {message}"


class Tokenizer:
    """A SentencePiece model. Control ids (BOS, EOS) never come from text: "<s>" is encoded as the characters it is."""

    def __init__(self, path: str | os.PathLike, model_bytes: bytes | None = None):
        """Reads `path`; with `model_bytes`, the contents, `path` only names them. Raises `BadInput` if there is no such file, or it is no
        SentencePiece model, or has no BOS or EOS."""
        try:
            self._load(Path(path).read_bytes() if model_bytes is None else model_bytes)
        except OSError as error:
            raise BadInput(
                f"tokenizer {path}: {error.strerror}: give the path of a SentencePiece .model file"
            ) from error
        except RuntimeError as error:
            raise BadInput(
                f"tokenizer {path} is not a SentencePiece model, or is damaged"
            ) from error
        if self.bos_id < 0 or self.eos_id < 0:
            raise BadInput(
                f"tokenizer {path} has no {'BOS' if self.bos_id < 0 else 'EOS'} piece: documents could not be delimited"
            )

    def _load(self, model_bytes: bytes) -> None:
        self.model_bytes = model_bytes
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(
            model_bytes
        )  # the constructor takes an empty model for none
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()

    def control_id(self, piece: str) -> int | None:
        """The id of a control piece, such as "<|im_end|>"; None if the vocabulary has none of that name."""
        token = self._processor.piece_to_id(piece)
        return token if self._processor.is_control(token) else None

    @property
    def pad_id(self) -> int:
        """What fills batches in an export: the padding piece, or UNK, which byte fallback leaves unused.

        Not EOS: trainers take the loss off padding, and a model tuned with EOS as padding never learns to stop.
        """
        pad = self._processor.pad_id()
        return pad if pad >= 0 else self._processor.unk_id()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What ends a text: EOS, and a chat vocabulary's `<|im_end|>`."""
        turn_end = self.control_id(TURN_END)
        return (self.eos_id,) if turn_end is None else (self.eos_id, turn_end)

    @property
    def is_chat(self) -> bool:
        """Whether the vocabulary has all chat tokens."""
        return all(self.control_id(piece) is not None for piece in CHAT_TOKENS)

    def extended(self) -> bytes:
        """The model of this tokenizer with `CHAT_TOKENS` as control pieces after its own, which no text becomes, and unused pieces up to a multiple
        of 8. Raises `BadInput` for one that has any of them already."""
        proto = sentencepiece_model_pb2.ModelProto.FromString(self.model_bytes)
        names = {piece.piece for piece in proto.pieces}
        if present := [piece for piece in CHAT_TOKENS if piece in names]:
            raise BadInput(
                f"the vocabulary is already extended for chat, it has {present[0]}: give a base model's"
            )
        unused = [f"<|unused_{i}|>" for i in range(-(self.vocab_size + len(CHAT_TOKENS)) % 8)]
        for pieces, kind in (
            (CHAT_TOKENS, proto.SentencePiece.CONTROL),
            (unused, proto.SentencePiece.UNUSED),
        ):
            for piece in pieces:
                proto.pieces.add(piece=piece, score=0.0, type=kind)
        return proto.SerializeToString()

    @functools.cached_property
    def not_exportable(self) -> dict[str, str]:
        """Why an export would give other ids than SentencePiece: a reason for "tokenizer.json" (transformers) and for "GGUF" (llama.cpp).

        A format without an entry gives the same ids.
        """
        proto = sentencepiece_model_pb2.ModelProto.FromString(self.model_bytes)
        normalizer, trainer, kinds = proto.normalizer_spec, proto.trainer_spec, proto.SentencePiece
        scores = {piece.piece: piece.score for piece in proto.pieces}
        symbols = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
        merged = {
            piece.piece: piece.type
            for piece in proto.pieces
            if len(piece.piece) == 1
            or any(
                piece.piece[:i] in scores and piece.piece[i:] in scores
                for i in range(1, len(piece.piece))
            )
        }
        unused = [name for name, kind in merged.items() if kind == kinds.UNUSED]
        special = [
            name
            for name, kind in merged.items()
            if kind in (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE)
        ]
        named = lambda names: ", ".join(map(repr, names[:3]))  # noqa: E731
        for wrong, what in (
            (trainer.model_type != trainer.BPE, "is not byte-pair encoding"),
            (not trainer.byte_fallback, "has no byte fallback"),
            (
                normalizer.precompiled_charsmap,
                f"normalizes text ({normalizer.name or 'its own rules'})",
            ),
            (proto.denormalizer_spec.precompiled_charsmap, "denormalizes text"),
            (normalizer.remove_extra_whitespaces, "removes extra whitespace"),
            (not normalizer.escape_whitespaces, "does not escape whitespace"),
            (trainer.treat_whitespace_as_suffix, "treats whitespace as a suffix"),
            (
                symbols and normalizer.add_dummy_prefix,
                f"has user-defined symbols ({named(symbols)}) and a dummy prefix",
            ),
            (
                any(" " in symbol for symbol in symbols),
                "has a user-defined symbol with a space in it",
            ),
            (unused, f"has unused pieces that text can become ({named(unused)})"),
        ):
            if wrong:
                return dict.fromkeys(("tokenizer.json", "GGUF"), what)
        found = {}
        if special:  # llama.cpp merges into any piece
            found["GGUF"] = (
                f"has special pieces that llama.cpp would make of plain text ({named(special)})"
            )
        elif clash := _overlap(
            symbols
        ):  # llama.cpp looks for the longest first, SentencePiece from left to right
            found["GGUF"] = f"has user-defined symbols that overlap ({clash})"
        # Of equal scores SentencePiece merges the leftmost. transformers cannot, except for runs of one character (export/tokenizer_json.py: merges)
        of_score: dict[float, list[str]] = {}
        for name, kind in merged.items():
            if kind == kinds.NORMAL and len(name) > 1:
                of_score.setdefault(scores[name], []).append(name)
        letters = {name for name, kind in merged.items() if kind == kinds.NORMAL and len(name) == 1}
        normal = [piece.piece for piece in proto.pieces if piece.type == kinds.NORMAL]
        if without := [name for name in normal if len(name) > 1 and not letters.issuperset(name)]:
            found["tokenizer.json"] = (
                f"has pieces of characters that are no pieces ({named(without)})"
            )
        elif tied := next(
            (
                names
                for names in of_score.values()
                if len(names) > 1 and any(len(set(name)) > 1 for name in names)
            ),
            None,
        ):
            found["tokenizer.json"] = f"has {len(tied)} pieces of the same score ({named(tied)})"
        return found

    def unfinished_bytes(self, ids: Sequence[int]) -> int:
        """How many byte pieces at the end of `ids` begin a character without completing it: 0 to 3. `decode` gives a U+FFFD for each."""
        last = []
        for token in reversed(ids[-4:]):
            if not self._processor.is_byte(int(token)):
                break
            last.append(int(self._processor.id_to_piece(int(token))[1:-1], 16))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(reversed(last)))
        return len(decoder.getstate()[0])

    def __getstate__(self) -> bytes:
        return self.model_bytes  # not the path: a copy in another process must be this very model

    def __setstate__(self, model_bytes: bytes) -> None:
        self._load(model_bytes)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, with BOS before and EOS after it where asked."""
        return [self.bos_id] * bos + self.encode_batch([text])[0] + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on one thread: preparation runs a process per core."""
        parts = [self._parts(text) for text in texts]
        encoded = iter(
            self._processor.encode(list(itertools.chain.from_iterable(parts)), num_threads=1)
        )
        return [
            list(itertools.chain.from_iterable(itertools.islice(encoded, len(some))))
            if len(some) > 1
            else next(encoded)
            for some in parts
        ]

    def _parts(self, text: str) -> list[str]:
        """`text` in parts that have the same ids one by one as together: SentencePiece takes four times as long over a book as over its pages."""
        parts, start = [], 0
        while (
            len(text) - start > _PART_CHARACTERS
            and self._cuts_at_spaces
            and (cut := _CUT.search(text, start + _PART_CHARACTERS))
        ):
            parts.append(text[start : cut.start()])
            start = cut.start() + self._adds_space  # which the next part is given again
        return [*parts, text[start:]]

    @functools.cached_property
    def _cuts_at_spaces(self) -> bool:
        """Whether no piece reaches over the beginning of a run of spaces, and nothing else is done to the text: true of Llama's and of ours."""
        proto = sentencepiece_model_pb2.ModelProto.FromString(self.model_bytes)
        plain = (
            not proto.normalizer_spec.precompiled_charsmap
            and not proto.normalizer_spec.remove_extra_whitespaces
        )
        plain &= (
            proto.normalizer_spec.escape_whitespaces
            and not proto.trainer_spec.treat_whitespace_as_suffix
            and proto.trainer_spec.byte_fallback
        )
        plain &= (
            proto.trainer_spec.model_type == proto.trainer_spec.BPE
        )  # a unigram model's scores are summed over the whole text, and round
        return plain and not any(_SPACE in piece.piece.lstrip(_SPACE) for piece in proto.pieces)

    @functools.cached_property
    def _adds_space(self) -> bool:
        return sentencepiece_model_pb2.ModelProto.FromString(
            self.model_bytes
        ).normalizer_spec.add_dummy_prefix

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Control ids give nothing; bytes that are no UTF-8 give U+FFFD."""
        return self._processor.decode([int(token) for token in ids])

    def show(self, ids: Sequence[int]) -> str:
        """`decode` for eyes: control ids give their names, such as "<|im_end|>", as a text that spells one out would."""
        groups = itertools.groupby(map(int, ids), self._processor.is_control)
        return "".join(
            "".join(map(self._processor.id_to_piece, some)) if control else self.decode(list(some))
            for control, some in groups
        )


def _overlap(symbols: Sequence[str]) -> str:
    """Two of `symbols` of which the first one's end begins the second, which is not shorter: "ab" and "bcd". Empty if there are none."""
    for first, second in itertools.permutations(symbols, 2):
        if (
            len(second) < len(first) or len(set(first + second)) == 1
        ):  # shorter runs of the same character are no matter
            continue
        if any(second.startswith(first[i:]) for i in range(1, len(first))):
            return f"{first!r}, {second!r}"
    return ""
