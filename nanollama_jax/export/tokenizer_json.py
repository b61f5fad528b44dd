"""A SentencePiece model as Hugging Face's `tokenizer.json`, so that `AutoTokenizer` gives SentencePiece's own ids.

Written by hand, because transformers' conversion is not exact: in 5.23 it drops the dummy prefix of texts that begin with a space (902 of 3,319
awkward strings had other ids). A base vocabulary is exported with `split_special_tokens`, so that "<s>" in a text is the characters it is, as in
SentencePiece. One with chat tokens cannot be: there the template's `<|im_start|>` must be found in the text, and so is a user's.
"""

import json
import pathlib
import re
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as spm

from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import TURN_END, Tokenizer

# data/chat.py in Jinja. What the assistant says stands between {% generation %} tags, which trainers want and not every Jinja knows.
CHAT_TEMPLATE = (pathlib.Path(__file__).parent / "chat_template.jinja").read_text()
PLAIN_CHAT_TEMPLATE = re.sub(r"\{%- (end)?generation -%\}", "", CHAT_TEMPLATE)
_Piece = spm.ModelProto.SentencePiece


def read_model(tokenizer: Tokenizer) -> spm.ModelProto:
    """The SentencePiece model's own description. Raises BadInput for one that the formats we export to cannot express."""
    proto = spm.ModelProto.FromString(tokenizer.model_bytes)
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    for wrong, what in (
        (trainer.model_type != spm.TrainerSpec.BPE, "is not byte-pair encoding"),
        (not trainer.byte_fallback, "has no byte fallback"),
        (normalizer.precompiled_charsmap, f"normalises text ({normalizer.name})"),
        (normalizer.remove_extra_whitespaces, "removes extra whitespace"),
        (not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix, "treats whitespace in an unusual way"),
    ):
        if wrong:
            raise BadInput(
                f"the tokenizer {what}, which the export would not reproduce: use a SentencePiece BPE model with byte fallback, as ours is"
            )
    return proto


def tokenizer_files(tokenizer: Tokenizer, context_length: int) -> dict[str, bytes]:
    """Name -> contents of `tokenizer.model`, `tokenizer.json`, `tokenizer_config.json` and, for a chat vocabulary, `chat_template.jinja`."""
    proto = read_model(tokenizer)
    names = [piece.piece for piece in proto.pieces]
    chat = tokenizer.is_chat
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": TURN_END if chat else names[tokenizer.eos_id],
        "unk_token": names[proto.trainer_spec.unk_id],
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": proto.normalizer_spec.add_dummy_prefix,  # llama.cpp's converter takes it from here, and assumes true without
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "split_special_tokens": not chat,
    }
    files = {"tokenizer.json": tokenizer_json(proto, tokenizer.bos_id), "tokenizer_config.json": config}
    contents = {name: (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode() for name, value in files.items()}
    return contents | {"tokenizer.model": tokenizer.model_bytes} | ({"chat_template.jinja": CHAT_TEMPLATE.encode()} if chat else {})


def tokenizer_json(proto: spm.ModelProto, bos_id: int) -> dict[str, Any]:
    """The contents of `tokenizer.json`."""
    names, prefix = [piece.piece for piece in proto.pieces], proto.normalizer_spec.add_dummy_prefix
    added = (_Piece.UNKNOWN, _Piece.CONTROL, _Piece.USER_DEFINED)
    prepend = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    bos = {"id": names[bos_id], "ids": [bos_id], "tokens": [names[bos_id]]}
    first, second = ([{"SpecialToken": {"id": bos["id"], "type_id": i}}, {"Sequence": {"id": "AB"[i], "type_id": i}}] for i in (0, 1))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            dict(
                id=i, content=piece.piece, single_word=False, lstrip=False, rstrip=False, normalized=False, special=piece.type != _Piece.USER_DEFINED
            )
            for i, piece in enumerate(proto.pieces)
            if piece.type in added
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": {bos["id"]: bos}},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[proto.trainer_spec.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges(proto),
        },
    }


def merges(proto: spm.ModelProto) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, in the order in which SentencePiece merges: best score first. Control, byte and unknown pieces are
    made of nothing: text never becomes one."""
    score = {piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL}
    rank = {name: i for i, name in enumerate(score)}
    splits = [(name[:i], name[i:]) for name in score for i in range(1, len(name)) if name[:i] in score and name[i:] in score]
    return sorted(splits, key=lambda pair: (-score[pair[0] + pair[1]], rank[pair[0]], rank[pair[1]]))
