"""A SentencePiece model as Hugging Face's `tokenizer.json`, so that `AutoTokenizer` gives
SentencePiece's own ids.

It is written by hand because transformers' conversion is not exact: in 5.23 it drops the dummy
prefix of texts that begin with a space (902 of 3,319 awkward strings had other ids). A base
vocabulary is exported with `split_special_tokens`, so that "<s>" in a text stays the characters it
is, as in SentencePiece. One with chat tokens cannot be: the template's `<|im_start|>` must be found
in the text, and then a user's is found too.
"""

import importlib.resources
import json
import pathlib
import re
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as spm

from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import TURN_END, Tokenizer

# chat/chatml.py in Jinja. The assistant's words are between {% generation %} tags, which trainers
# need and not every Jinja knows.
CHAT_TEMPLATE = (
    importlib.resources.files("nanollama_jax.chat") / "chat_template.jinja"
).read_text()
PLAIN_CHAT_TEMPLATE = re.sub(r"\{%- (end)?generation -%\}", "", CHAT_TEMPLATE)
_Piece = spm.ModelProto.SentencePiece


def read_model(tokenizer: Tokenizer, file_format: str) -> spm.ModelProto:
    """The SentencePiece model's protocol buffer.

    Raises BadInput if `file_format` ("tokenizer.json" or "GGUF") would give other ids.
    """
    if reason := tokenizer.not_exportable.get(file_format):
        raise BadInput(
            f"the tokenizer {reason}, which {file_format} cannot express: use a SentencePiece BPE "
            "model with byte fallback, as ours is"
        )
    return spm.ModelProto.FromString(tokenizer.model_bytes)


def chat_templates(tokenizer: Tokenizer, imported: dict[str, str]) -> dict[str, str]:
    """Name -> template, "default" first: those of the folder that a model was imported from, else
    ours for a chat vocabulary, else none."""
    return imported or ({"default": CHAT_TEMPLATE} if tokenizer.is_chat else {})


def tokenizer_files(
    tokenizer: Tokenizer, context_length: int, templates: dict[str, str]
) -> dict[str, bytes]:
    """Name -> contents of `tokenizer.model`, `tokenizer.json`, `tokenizer_config.json` and, with
    one chat template, `chat_template.jinja`. Several templates go into `tokenizer_config.json`.

    BOS is written once: by the template if it writes one, as ours and Llama 3's do, else by the
    tokenizer. So `apply_chat_template`, and its text encoded with or without
    `add_special_tokens`, all have one (Llama 3 and Mistral have two in the second case; Qwen has
    none in any). The price: with a chat export, `tokenizer(text)` has no BOS, and text that is not
    a chat needs `tokenizer.bos_token` in front.
    """
    proto = read_model(tokenizer, "tokenizer.json")
    names = [piece.piece for piece in proto.pieces]
    adds_bos = not any(
        "bos_token" in template or names[tokenizer.bos_id] in template
        for template in templates.values()
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": TURN_END if tokenizer.is_chat else names[tokenizer.eos_id],
        "unk_token": names[proto.trainer_spec.unk_id],
        "pad_token": names[tokenizer.pad_id],
        "padding_side": "left",  # generate() continues at the right end
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        # llama.cpp's converter reads this, and assumes true without it.
        "add_prefix_space": proto.normalizer_spec.add_dummy_prefix,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "split_special_tokens": not (tokenizer.is_chat or templates),
    }
    if templates.keys() - {"default"}:
        config["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
    files = {
        "tokenizer.json": tokenizer_json(proto, tokenizer.bos_id if adds_bos else None),
        "tokenizer_config.json": config,
    }
    contents = {
        name: (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
        for name, value in files.items()
    }
    contents["tokenizer.model"] = tokenizer.model_bytes
    if templates.keys() == {"default"}:
        contents["chat_template.jinja"] = templates["default"].encode()
    return contents


def import_chat_templates(folder: pathlib.Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> template of a Hugging Face folder. Looks where transformers does: in its .jinja
    files, else at `chat_template` in its tokenizer_config.json (`config`). Templates are text
    here, never run.

    Raises BadInput for anything but a template or a list of named ones.
    """
    files = [
        folder / "chat_template.jinja",
        *sorted(folder.glob("additional_chat_templates/*.jinja")),
    ]
    try:
        found = {
            ("default" if path is files[0] else path.stem): path.read_bytes().decode()
            for path in files
            if path.exists()
        }
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{folder}: a chat template (.jinja) cannot be read: {error}") from error
    if not found and (given := config.get("chat_template")) is not None:
        try:
            found = (
                {"default": given}
                if isinstance(given, str)
                else {one["name"]: one["template"] for one in given}
            )
            "".join([*found, *found.values()]).encode()
        except (TypeError, KeyError, UnicodeEncodeError) as error:
            raise BadInput(
                f"{folder}/tokenizer_config.json: chat_template is neither text nor a list of "
                f"named texts: {error}"
            ) from error
    return {name: found[name] for name in sorted(found, key=lambda name: (name != "default", name))}


def tokenizer_json(proto: spm.ModelProto, bos_id: int | None) -> dict[str, Any]:
    """The contents of `tokenizer.json`. `bos_id` is written before each text, unless it is
    None."""
    names, prefix = [piece.piece for piece in proto.pieces], proto.normalizer_spec.add_dummy_prefix
    added = (_Piece.UNKNOWN, _Piece.CONTROL, _Piece.USER_DEFINED)
    prepend = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    bos = (
        {}
        if bos_id is None
        else {names[bos_id]: {"id": names[bos_id], "ids": [bos_id], "tokens": [names[bos_id]]}}
    )
    first, second = (
        [
            *({"SpecialToken": {"id": name, "type_id": i}} for name in bos),
            {"Sequence": {"id": "AB"[i], "type_id": i}},
        ]
        for i in (0, 1)
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            dict(
                id=i,
                content=piece.piece,
                single_word=False,
                lstrip=False,
                rstrip=False,
                # As in SentencePiece, these are found after spaces have become ▁.
                normalized=piece.type == _Piece.USER_DEFINED,
                special=piece.type != _Piece.USER_DEFINED,
            )
            for i, piece in enumerate(proto.pieces)
            if piece.type in added
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *prepend,
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": bos,
        },
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
    """Every way to make a piece of two others, in the order in which SentencePiece merges: best
    score first.

    Control, byte and unknown pieces have none: text never becomes one. Llama 2's and Mistral's
    runs of spaces all have the same score. There SentencePiece merges the leftmost pair, and the
    longer left half first gives the same result.
    """
    score = {piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL}
    rank = {name: i for i, name in enumerate(score)}
    splits = [
        (name[:i], name[i:])
        for name in score
        for i in range(1, len(name))
        if name[:i] in score and name[i:] in score
    ]
    return sorted(
        splits,
        key=lambda pair: (-score[pair[0] + pair[1]], -len(pair[0]), rank[pair[0]], rank[pair[1]]),
    )
