"""Text to token ids and back: any SentencePiece model, and the training of our own.

Ours is byte-pair encoding with byte fallback, identity normalization and no dummy prefix, so every
text has exactly one encoding and is restored by decoding. Other models (Llama 2's, Mistral's) are
used as they are: the ids are always SentencePiece's own. The only text that does not round-trip is
one that contains U+2581 (▁): SentencePiece represents spaces by it, and decodes both to a space.
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
MAX_VOCAB_SIZE = 2**24  # a hundred times the largest vocabulary in use
# Fine-tuning adds these pieces to a vocabulary, in this order, and then unused pieces up to a
# multiple of 8 (32,000 -> 32,008)
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # ChatML's
THOUGHT_START, THOUGHT_END = "<|start_thought|>", "<|end_thought|>"
TOOL_CALL, TOOL_RESPONSE = "<|tool_call|>", "<|tool_response|>"
CHAT_TOKENS = (TURN_START, TURN_END, THOUGHT_START, THOUGHT_END, TOOL_CALL, TOOL_RESPONSE)

# The trainer drops sentences over max_sentence_length bytes and trims their final newlines, so
# documents are split into chunks that end before a space or a newline. Newlines inside and at the
# start of a chunk are learned: on Python code, pieces such as ":\n" and ")\n\n" give 3.11 bytes per
# token, where training on single lines gives 2.93 (4,096 pieces). But no piece continues after a
# newline with visible text (such as "\n#", which would save 0.1 % of the tokens): the chat format's
# "<|im_start|>assistant\n" has the same ids whatever follows it (chat/chatml.py).
_CHUNK_CHARACTERS = 4000
_CHUNK = re.compile(rf"(?s).{{1,{_CHUNK_CHARACTERS}}}(?=[ \n]|\Z)|.{{1,{_CHUNK_CHARACTERS}}}")
_RESERVED = "\u2585"  # ▅: the trainer skips a sentence with it; to encoding it is any character
_LINE_START, _NOT_JOINED = re.compile(r"\n(?=\S)"), "\ue000"

_SPACE = "\u2581"  # SentencePiece's space
# Characters encoded at a time. Parts of 1,000, 4,000, 16,000 and 64,000 characters and whole books:
# 3.2, 3.5, 3.2, 2.2 and 0.9 MB/s; library documentation: 3.2 to 2.0 MB/s
_PART_CHARACTERS = 4000
_CUT = re.compile(f"(?<=[^ {_SPACE}]) (?=.)", re.DOTALL)


def train(texts: Iterable[str], path: str | os.PathLike, vocab_size: int, max_bytes: int) -> None:
    """Trains a tokenizer on the first `max_bytes` (UTF-8) of `texts` and writes it to `path`.

    The file is complete or absent, and the same texts give the same file on any machine. Raises
    BadInput if the text cannot fill `vocab_size` pieces, and whatever `texts` raises.
    """
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise BadInput(f"vocab_size={vocab_size} must be from 1 to {MAX_VOCAB_SIZE:,}")
    if max_bytes < 1:
        raise BadInput(f"max_bytes={max_bytes} must be at least 1: the amount of text to train on")
    read_bytes = 0
    failure = None

    def chunks() -> Iterator[str]:
        nonlocal read_bytes, failure
        try:
            for text in texts:
                for match in _CHUNK.finditer(text):
                    chunk = match.group()
                    read_bytes += len(chunk.encode())
                    if read_bytes > max_bytes:
                        return
                    chunk = _LINE_START.sub("\n" + _NOT_JOINED, chunk)
                    yield chunk.replace(_RESERVED, _NOT_JOINED)
        except (Exception, KeyboardInterrupt) as error:
            failure = error  # SentencePiece would replace it by a RuntimeError

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chunks(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=0.9999,  # the rest is encoded by bytes
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            pretokenization_delimiter=_NOT_JOINED,
            max_sentence_length=8 * _CHUNK_CHARACTERS,
            num_threads=8,  # stored in the model file, whose hash must not depend on the machine
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:  # ValueError: a vocab_size beyond 31 bits
        if failure is None:
            reason = _why_training_failed(str(error), vocab_size, min(read_bytes, max_bytes))
            raise BadInput(reason) from error
    if failure is not None:
        raise failure
    with whole_file(path) as file:
        file.write(model.getvalue())


def _why_training_failed(message: str, vocab_size: int, text_bytes: int) -> str:
    text = f"{text_bytes:,} bytes of text"
    if "smaller than required_chars" in message or "insert_id" in message:
        return (
            f"a vocabulary of {vocab_size} pieces has no room for the 256 bytes and the text's "
            "characters: raise vocab_size"
        )
    if found := re.search(r"value <= (\d+)", message):
        return (
            f"{text} give at most {found[1]} pieces, not {vocab_size}: lower vocab_size or train "
            "on more text"
        )
    if "sentences_.empty()" in message:
        return "there is no text to train the tokenizer on: check its sources and max_bytes"
    return f"SentencePiece could not train {vocab_size} pieces on {text}: {message}"


class Tokenizer:
    """A SentencePiece model. Text never gives control ids (BOS, EOS): "<s>" is encoded as text."""

    def __init__(self, path: str | os.PathLike, model_bytes: bytes | None = None):
        """Reads `path`, or takes `model_bytes`, and `path` only names them in errors.

        Raises BadInput if there is no such file, or it is not a SentencePiece model, or has no BOS
        or EOS.
        """
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
            missing = "BOS" if self.bos_id < 0 else "EOS"
            raise BadInput(
                f"tokenizer {path} has no {missing} piece: documents could not be delimited"
            )

    def _load(self, model_bytes: bytes) -> None:
        self.model_bytes = model_bytes
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        # The constructor would take an empty model for no model
        self._processor.LoadFromSerializedProto(model_bytes)
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()

    @functools.cached_property
    def _proto(self) -> sentencepiece_model_pb2.ModelProto:
        return sentencepiece_model_pb2.ModelProto.FromString(self.model_bytes)

    def control_id(self, piece: str) -> int | None:
        """The id of a control piece, such as "<|im_end|>", or None."""
        token = self._processor.piece_to_id(piece)
        return token if self._processor.is_control(token) else None

    @property
    def pad_id(self) -> int:
        """The padding id of an export: the padding piece, or UNK, which byte fallback never uses.

        Not EOS: trainers exclude padding from the loss, and a model tuned with EOS as padding never
        learns to stop.
        """
        pad = self._processor.pad_id()
        return pad if pad >= 0 else self._processor.unk_id()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text: EOS, and a chat vocabulary's `<|im_end|>`."""
        turn_end = self.control_id(TURN_END)
        return (self.eos_id,) if turn_end is None else (self.eos_id, turn_end)

    @property
    def is_chat(self) -> bool:
        """Whether the vocabulary has all chat tokens."""
        return all(self.control_id(piece) is not None for piece in CHAT_TOKENS)

    def extended(self) -> bytes:
        """This model with `CHAT_TOKENS` added as control pieces, which no text gives.

        Unused pieces fill it up to a multiple of 8. Raises BadInput if it has any of them already.
        """
        proto = sentencepiece_model_pb2.ModelProto.FromString(self.model_bytes)
        names = {piece.piece for piece in proto.pieces}
        if present := [piece for piece in CHAT_TOKENS if piece in names]:
            raise BadInput(
                f"the vocabulary is already extended for chat, it has {present[0]}: give a base "
                "model's"
            )
        for piece in CHAT_TOKENS:
            proto.pieces.add(piece=piece, score=0.0, type=proto.SentencePiece.CONTROL)
        for i in range(-len(proto.pieces) % 8):
            proto.pieces.add(piece=f"<|unused_{i}|>", score=0.0, type=proto.SentencePiece.UNUSED)
        return proto.SerializeToString()

    @functools.cached_property
    def not_exportable(self) -> dict[str, str]:
        """Why an export would give other ids than SentencePiece, by format.

        The formats are "tokenizer.json" (transformers) and "GGUF" (llama.cpp); one without an entry
        gives the same ids.
        """
        proto = self._proto
        normalizer, trainer, kinds = proto.normalizer_spec, proto.trainer_spec, proto.SentencePiece
        scores = {piece.piece: piece.score for piece in proto.pieces}
        symbols = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
        kind_of = {}  # pieces that merges can produce from text
        for piece in proto.pieces:
            name = piece.piece
            splits = ((name[:i], name[i:]) for i in range(1, len(name)))
            if len(name) == 1 or any(left in scores and right in scores for left, right in splits):
                kind_of[name] = piece.type
        unused = [name for name, kind in kind_of.items() if kind == kinds.UNUSED]
        specials = (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE)
        special = [name for name, kind in kind_of.items() if kind in specials]

        def named(names):
            return ", ".join(map(repr, names[:3]))

        rules = normalizer.name or "its own rules"
        for wrong, what in (
            (trainer.model_type != trainer.BPE, "is not byte-pair encoding"),
            (not trainer.byte_fallback, "has no byte fallback"),
            (normalizer.precompiled_charsmap, f"normalizes text ({rules})"),
            (proto.denormalizer_spec.precompiled_charsmap, "denormalizes text"),
            (normalizer.remove_extra_whitespaces, "removes extra whitespace"),
            (not normalizer.escape_whitespaces, "does not escape whitespace"),
            (trainer.treat_whitespace_as_suffix, "treats whitespace as a suffix"),
            (
                symbols and normalizer.add_dummy_prefix,
                f"has user-defined symbols ({named(symbols)}) and a dummy prefix",
            ),
            (any(" " in symbol for symbol in symbols), "has a user-defined symbol with a space"),
            (unused, f"has unused pieces that text can become ({named(unused)})"),
        ):
            if wrong:
                return dict.fromkeys(("tokenizer.json", "GGUF"), what)
        found = {}
        if special:  # llama.cpp merges into any piece
            reason = "has special pieces that llama.cpp would make of plain text"
            found["GGUF"] = f"{reason} ({named(special)})"
        elif clash := _overlap(symbols):
            # llama.cpp searches the longest first, SentencePiece from left to right
            found["GGUF"] = f"has user-defined symbols that overlap ({clash})"
        normal = [piece.piece for piece in proto.pieces if piece.type == kinds.NORMAL]
        letters = {name for name in normal if len(name) == 1}
        if without := [name for name in normal if len(name) > 1 and not letters.issuperset(name)]:
            reason = f"has pieces of characters that are not pieces themselves ({named(without)})"
            found["tokenizer.json"] = reason
            return found
        # Of equal scores SentencePiece merges the leftmost. transformers cannot, except for runs of
        # one character (export/tokenizer_json.py: merges)
        of_score: dict[float, list[str]] = {}
        for name, kind in kind_of.items():
            if kind == kinds.NORMAL and len(name) > 1:
                of_score.setdefault(scores[name], []).append(name)
        for tied in of_score.values():
            if len(tied) > 1 and any(len(set(name)) > 1 for name in tied):
                reason = f"has {len(tied)} pieces of the same score ({named(tied)})"
                found["tokenizer.json"] = reason
                break
        return found

    def unfinished_bytes(self, ids: Sequence[int]) -> int:
        """How many byte pieces at the end of `ids` start a character without completing it.

        0 to 3; `decode` gives a U+FFFD for each.
        """
        last = []
        for token in reversed(ids[-4:]):
            if not self._processor.is_byte(int(token)):
                break
            last.append(int(self._processor.id_to_piece(int(token))[1:-1], 16))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(reversed(last)))
        return len(decoder.getstate()[0])

    def __getstate__(self) -> bytes:
        return self.model_bytes  # not the path: another process must get exactly this model

    def __setstate__(self, model_bytes: bytes) -> None:
        self._load(model_bytes)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, with BOS before and EOS after it if asked for."""
        return [self.bos_id] * bos + self.encode_batch([text])[0] + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on one thread: preparation runs one process per core."""
        parts = [self._parts(text) for text in texts]
        flat = list(itertools.chain.from_iterable(parts))
        encoded = iter(self._processor.encode(flat, num_threads=1))
        return [
            list(itertools.chain.from_iterable(itertools.islice(encoded, len(some))))
            for some in parts
        ]

    def _parts(self, text: str) -> list[str]:
        """`text` in parts whose ids, joined, are the ids of the whole.

        SentencePiece takes four times as long for a whole book as for its parts.
        """
        parts, start = [], 0
        while len(text) - start > _PART_CHARACTERS and self._cuts_at_spaces:
            cut = _CUT.search(text, start + _PART_CHARACTERS)
            if cut is None:
                break
            parts.append(text[start : cut.start()])
            # Skips the space if the next part gets one as its dummy prefix
            start = cut.start() + self._proto.normalizer_spec.add_dummy_prefix
        return [*parts, text[start:]]

    @functools.cached_property
    def _cuts_at_spaces(self) -> bool:
        """Whether text can be encoded in parts that start at the first space of a run.

        True of Llama's tokenizer and of ours: no piece has a space after another character, and the
        text is not changed otherwise.
        """
        normalizer, trainer = self._proto.normalizer_spec, self._proto.trainer_spec
        return (
            not normalizer.precompiled_charsmap
            and not normalizer.remove_extra_whitespaces
            and normalizer.escape_whitespaces
            and not trainer.treat_whitespace_as_suffix
            and trainer.byte_fallback
            # A unigram model's scores are summed over the whole text, with rounding
            and trainer.model_type == trainer.BPE
            and not any(_SPACE in piece.piece.lstrip(_SPACE) for piece in self._proto.pieces)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Control ids give nothing; bytes that are not UTF-8 give U+FFFD."""
        return self._processor.decode([int(token) for token in ids])

    def show(self, ids: Sequence[int]) -> str:
        """`decode` for people: control ids appear by name, such as "<|im_end|>"."""
        groups = itertools.groupby(map(int, ids), self._processor.is_control)
        return "".join(
            "".join(map(self._processor.id_to_piece, some)) if control else self.decode(list(some))
            for control, some in groups
        )


def _overlap(symbols: Sequence[str]) -> str:
    """Two of `symbols` where the end of one is the start of another that is not shorter.

    Such as "ab" and "bcd"; empty if there are none. Runs of one character do not matter.
    """
    for first, second in itertools.permutations(symbols, 2):
        if len(second) < len(first) or len(set(first + second)) == 1:
            continue
        if any(second.startswith(first[i:]) for i in range(1, len(first))):
            return f"{first!r}, {second!r}"
    return ""
