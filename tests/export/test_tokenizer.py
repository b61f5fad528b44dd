"""Exported tokenizers and chat templates in transformers and llama.cpp: SentencePiece's ids or a
refusal, one BOS, padding.
"""

import functools
import io
import json

import gguf as gguf_library
import pytest
import sentencepiece
import transformers
from sentencepiece import sentencepiece_model_pb2 as spm

from nanollama_jax import checkpoint
from nanollama_jax.chat import chatml as chat
from nanollama_jax.chat.conversations import Message
from nanollama_jax.errors import BadInput
from nanollama_jax.export import gguf, hf, hf_import
from nanollama_jax.export.compare import LlamaCpp
from nanollama_jax.export.tokenizer_json import CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE, tokenizer_files
from nanollama_jax.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.export.awkward import awkward_strings
from tests.export.tiny import tiny

TEXTS = [
    *awkward_strings(900),
    *(
        "<sep>",
        "foo<sep>bar",
        " <sep> ",
        "<sep><sep>x",
        "a b",
        "xa b  y",
        "x\u2581\u2581y",
        "the<sep> the",
        "abcd",
        "xababcdx",
        "aaaa",
        "日日本",
    ),
    *("x" + " " * count + "y" for count in range(40)),
    "\n" * 7,
]
Piece = spm.ModelProto.SentencePiece
WORDS = [
    Message("system", "Be brief."),
    Message("user", "What is 2 + 2?"),
    Message("assistant", "4"),
    Message("user", "And  3 + 3?"),
]
MESSAGES = [{"role": message.role, "content": message.content} for message in WORDS]


@functools.cache
def trained_bytes(**options) -> bytes:
    """A SentencePiece model like ours, except for `options`."""
    text = "".join(
        (ROOT / name).read_text() for name in ("README.md", "nanollama_jax/tokenizer.py")
    )
    ours = dict(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    )
    written = io.BytesIO()
    settings = (
        dict(
            vocab_size=600, allow_whitespace_only_pieces=True, hard_vocab_limit=False, minloglevel=2
        )
        | ours
    )
    settings |= {
        name: list(value) if isinstance(value, tuple) else value for name, value in options.items()
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=written, **settings
    )
    return written.getvalue()


def model(**options) -> Tokenizer:
    return Tokenizer("trained", trained_bytes(**options))


def changed(
    *,
    types: dict[str, int] | None = None,
    scores: dict[str, float] | None = None,
    more=(),
    **normalizer,
) -> Tokenizer:
    """A model like ours with other types and scores of some pieces, and `more`: (name, type)."""
    proto = spm.ModelProto.FromString(trained_bytes())
    for piece in proto.pieces:
        piece.type, piece.score = (
            (types or {}).get(piece.piece, piece.type),
            (scores or {}).get(piece.piece, piece.score),
        )
    for i, (name, kind) in enumerate(more):
        proto.pieces.add(piece=name, type=kind, score=-10_000 - i)
    for name, value in normalizer.items():
        setattr(proto.normalizer_spec, name, value)
    return Tokenizer("changed", proto.SerializeToString())


def theirs(tokenizer: Tokenizer, folder, templates=None):
    folder.mkdir()
    for name, contents in tokenizer_files(tokenizer, 128, templates or {}).items():
        (folder / name).write_bytes(contents)
    return transformers.AutoTokenizer.from_pretrained(folder)


EXACT = {
    "ours": model,
    "dummy prefix": lambda: model(add_dummy_prefix=True),
    "split digits": lambda: model(split_digits=True),
    "user-defined": lambda: model(user_defined_symbols=("<sep>", "the", "日", "ab")),
    "user-defined whitespace": lambda: model(
        user_defined_symbols=("\u2581\u2581", "\n", "\n\n", "\n\n\n")
    ),
    "control": lambda: model(control_symbols=("<|cls|>", "<sep>")),
    "a padding piece": lambda: model(pad_id=3),
    "unused": lambda: changed(more=[("<|unused_0|>", Piece.UNUSED)]),
}


@pytest.mark.parametrize("kind", EXACT)
def test_ids_are_sentencepieces(kind, tmp_path):
    tokenizer = EXACT[kind]()
    assert tokenizer.not_exportable == {}
    in_transformers = theirs(tokenizer, tmp_path / "hf")
    gguf.export(tiny(tokenizer), tmp_path / "f16.gguf", "f16")
    in_llama_cpp = LlamaCpp(tmp_path / "f16.gguf", 64)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert in_transformers(text).input_ids == [tokenizer.bos_id, *ids], text
        assert in_transformers.decode(ids) == tokenizer.decode(ids)
        assert "\0" in text or in_llama_cpp.tokenize(text) == ids, text


def test_runs_of_pieces_with_one_score(tmp_path):
    """As Llama 2's and Mistral's runs of spaces: of equal scores SentencePiece merges the leftmost
    pair."""
    for i, lengths in enumerate(((2, 3, 4, 5, 6, 8, 9, 14, 16), (2, 4, 8, 16), (2, 3, 5, 8, 13))):
        proto = spm.ModelProto.FromString(trained_bytes())
        proto.pieces.extend(Piece(piece="~" * count, score=-1e9) for count in (1, *lengths))
        tokenizer = Tokenizer("runs", proto.SerializeToString())
        in_transformers = theirs(tokenizer, tmp_path / str(i))
        for count in range(1, 70):
            text = "x" + "~" * count + " y" + "~" * (70 - count)
            assert in_transformers(text, add_special_tokens=False).input_ids == tokenizer.encode(
                text
            )


BOTH = ("tokenizer.json", "GGUF")
REFUSED = {
    "unigram": (lambda: model(model_type="unigram"), "is not byte-pair encoding", BOTH),
    "no bytes": (lambda: model(byte_fallback=False), "has no byte fallback", BOTH),
    "nmt_nfkc": (
        lambda: model(normalization_rule_name="nmt_nfkc"),
        r"normalizes text \(nmt_nfkc\)",
        BOTH,
    ),
    "whitespace": (lambda: model(remove_extra_whitespaces=True), "removes extra whitespace", BOTH),
    "suffix": (lambda: model(treat_whitespace_as_suffix=True), "whitespace as a suffix", BOTH),
    "escapes": (lambda: changed(escape_whitespaces=False), "does not escape whitespace", BOTH),
    "prefix": (
        lambda: model(user_defined_symbols=("<sep>",), add_dummy_prefix=True),
        r"user-defined symbols \('<sep>'\) and a dummy prefix",
        BOTH,
    ),
    "a space": (
        lambda: model(user_defined_symbols=("a b",)),
        "user-defined symbol with a space",
        BOTH,
    ),
    "unused": (
        lambda: changed(types={"th": Piece.UNUSED}),
        r"unused pieces that text can become \('th'\)",
        BOTH,
    ),
    "no letters": (
        lambda: changed(more=[("¬¬", Piece.NORMAL)]),
        "pieces of characters that are not pieces",
        ("tokenizer.json",),
    ),
    "one score": (
        lambda: changed(scores={"th": -3.0, "in": -3.0}),
        "pieces of the same score",
        ("tokenizer.json",),
    ),
    "overlap": (
        lambda: model(user_defined_symbols=("ab", "bcd")),
        "user-defined symbols that overlap",
        ("GGUF",),
    ),
    "a word": (
        lambda: model(control_symbols=("the",)),
        r"would make of plain text \('the'\)",
        ("GGUF",),
    ),
    "closing tag": (
        lambda: changed(more=[("</", Piece.NORMAL), ("</s", Piece.NORMAL)]),
        r"plain text \('</s>'\)",
        ("GGUF",),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_expressed_is_refused(kind, tmp_path):
    make, reason, formats = REFUSED[kind]
    loaded = tiny(make())
    for name, export in (
        ("tokenizer.json", hf.export),
        ("GGUF", functools.partial(gguf.export, kind="f16")),
    ):
        if name in formats:
            with pytest.raises(
                BadInput, match=f"the tokenizer .*{reason}.*, which {name} cannot express"
            ):
                export(loaded, tmp_path / name)
        else:
            export(loaded, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*BOTH} - {*formats})


def test_a_user_defined_rule_of_normalization(tmp_path):
    (tmp_path / "rule.tsv").write_text("41\t61\n")
    tokenizer = model(normalization_rule_tsv=str(tmp_path / "rule.tsv"))
    assert tokenizer.not_exportable["GGUF"].startswith("normalizes text (")


# ---- Padding


@pytest.fixture(scope="module")
def base() -> Tokenizer:
    return model()


@pytest.fixture(scope="module")
def chatty(base) -> Tokenizer:
    return Tokenizer("chat", base.extended())


@pytest.mark.parametrize("which", ["base", "chatty"])
def test_padded_batches_generate_what_single_prompts_do(which, request, tmp_path):
    loaded = tiny(request.getfixturevalue(which))
    hf.export(loaded, tmp_path / "hf", "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompts = ["The", "def area(width, height):\n    return", "One two three"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert (
        batch.input_ids[0, 0] == 0
        and batch.attention_mask[0, 0] == 0
        and batch.attention_mask[:, -1].all()
    )
    options = dict(max_new_tokens=20, do_sample=False)
    together = network.generate(**batch, **options)[:, batch.input_ids.shape[1] :]
    for prompt, row in zip(prompts, together.tolist(), strict=True):
        one = tokenizer(prompt, return_tensors="pt")
        alone = network.generate(**one, **options)[0, one.input_ids.shape[1] :].tolist()
        assert row[: len(alone)] == alone and set(row[len(alone) :]) <= {0}
    stops = [2] if which == "base" else [2, loaded.tokenizer.control_id("<|im_end|>")]
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "hf" / name).read_text())
        ends = found["eos_token_id"]
        assert found["pad_token_id"] == 0 and (ends if isinstance(ends, list) else [ends]) == stops
    assert tokenizer.eos_token_id == stops[-1]
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    labels = collate([{"input_ids": [1, 5, 2]}, {"input_ids": [1, 5, 6, 7, stops[-1]]}])["labels"]
    assert labels.tolist() == [[-100, -100, 1, 5, 2], [1, 5, 6, 7, stops[-1]]], (
        "the end of a text is learned, padding is not"
    )


def test_a_padding_piece_is_used(tmp_path):
    assert theirs(model(pad_id=3), tmp_path / "hf").pad_token_id == 3


# ---- Who writes BOS


def test_a_chat_has_one_bos_however_it_is_encoded(chatty, tmp_path):
    tokenizer = theirs(chatty, tmp_path / "hf", {"default": CHAT_TEMPLATE})
    ours = chat.encode_prompt(WORDS, chatty)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"] == ours
    assert tokenizer(text).input_ids == tokenizer(text, add_special_tokens=False).input_ids == ours
    assert tokenizer([text, text], padding=True).input_ids == [ours, ours]
    assert tokenizer(tokenizer.bos_token + "The").input_ids == chatty.encode("The", bos=True)


def test_a_base_model_writes_bos_before_every_text(base, tmp_path):
    tokenizer = theirs(base, tmp_path / "hf")
    assert tokenizer("The").input_ids == base.encode("The", bos=True)
    assert tokenizer("The", add_special_tokens=False).input_ids == base.encode("The")


def test_a_template_that_writes_no_bos_leaves_it_to_the_tokenizer(base, tmp_path):
    """TinyLlama's and Zephyr's."""
    plain = (
        "{% for message in messages %}{{ message.role + ':' + message.content + eos_token }}"
        "{% endfor %}"
    )
    tokenizer = theirs(base, tmp_path / "plain", {"default": plain})
    ids = tokenizer(tokenizer.apply_chat_template(MESSAGES, tokenize=False)).input_ids
    assert (
        ids.count(base.bos_id) == 1
        and ids[0] == base.bos_id
        and ids.count(base.eos_id) == len(MESSAGES)
    )
    for writes in ("{{ bos_token }}" + plain, "<s>" + plain):
        tokenizer = theirs(base, tmp_path / str(len(writes)), {"default": writes})
        assert tokenizer(tokenizer.apply_chat_template(MESSAGES, tokenize=False)).input_ids == ids


def test_llama_cpp_has_one_bos(chatty, tmp_path):
    """It removes the template's and adds its own; its built-in ChatML writes none."""
    gguf.export(tiny(chatty), tmp_path / "chat.gguf", "f16")
    fields = gguf_library.GGUFReader(tmp_path / "chat.gguf").fields
    said = {
        key: fields[f"tokenizer.ggml.{key}"].contents()
        for key in ("add_bos_token", "padding_token_id", "eos_token_id", "eot_token_id")
    }
    assert said == dict(
        add_bos_token=True,
        padding_token_id=0,
        eos_token_id=2,
        eot_token_id=chatty.control_id("<|im_end|>"),
    )
    assert (
        fields["tokenizer.chat_template"].contents() == PLAIN_CHAT_TEMPLATE
        and "bos_token" in PLAIN_CHAT_TEMPLATE
    )
    text = theirs(chatty, tmp_path / "hf", {"default": PLAIN_CHAT_TEMPLATE}).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    llama = LlamaCpp(tmp_path / "chat.gguf", 64)
    assert llama._vocab.tokenize(
        text.removeprefix("<s>"), add_special=True, parse_special=True
    ) == chat.encode_prompt(WORDS, chatty)


# ---- Templates of imported folders


TEMPLATE = (
    "{# ünï\r\n #}{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}]{{ message.content }}{% endfor %}  \n\n"
)
FOLDERS = {
    "a file": (
        lambda folder, config: (folder / "chat_template.jinja").write_bytes(TEMPLATE.encode()),
        {"default": TEMPLATE},
    ),
    "in the configuration": (
        lambda folder, config: config.update(chat_template=TEMPLATE),
        {"default": TEMPLATE},
    ),
    "named": (
        lambda folder, config: config.update(
            chat_template=[
                dict(name="tool_use", template="T"),
                dict(name="default", template=TEMPLATE),
            ]
        ),
        {"default": TEMPLATE, "tool_use": "T"},
    ),
    "files": (
        lambda folder, config: (
            (folder / "chat_template.jinja").write_bytes(TEMPLATE.encode()),
            (folder / "additional_chat_templates").mkdir(),
            (folder / "additional_chat_templates/rag.jinja").write_text("R"),
            config.update(chat_template="not this one"),
        ),
        {"default": TEMPLATE, "rag": "R"},
    ),
    "none": (lambda folder, config: None, {}),
}


def folder_of(make, base, folder):
    hf.export(tiny(base), folder, "float32")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    make(folder, config)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_chat_template_survives_import_and_export(kind, base, tmp_path):
    make, templates = FOLDERS[kind]
    written = checkpoint.save_weights(
        hf_import.read(folder_of(make, base, tmp_path / "theirs")), tmp_path / "run"
    )
    loaded = checkpoint.load(written)
    hf.export(loaded, tmp_path / "again", "float32")
    assert hf_import.read(tmp_path / "again").metadata.chat_template == templates
    if "default" in templates and len(templates) == 1:
        assert (tmp_path / "again/chat_template.jinja").read_bytes() == TEMPLATE.encode()
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "again").chat_template
    text = {
        name: template.replace("\r\n", "\n")
        if kind in ("a file", "in the configuration")
        else template
        for name, template in templates.items()
    }
    assert found == (text if len(text) > 1 else text.get("default")), (
        "transformers reads files with the newlines of its machine"
    )
    gguf.export(loaded, tmp_path / "again.gguf", "f16")
    fields = {
        key: field.contents()
        for key, field in gguf_library.GGUFReader(tmp_path / "again.gguf").fields.items()
        if "chat_template" in key
    }
    expected = {
        "tokenizer.chat_template" + (f".{name}" if name != "default" else ""): template
        for name, template in templates.items()
    }
    names = (
        {"tokenizer.chat_templates": [name for name in templates if name != "default"]}
        if len(templates) > 1
        else {}
    )
    assert fields == expected | names


def test_our_own_chat_export_comes_back_as_it_was(chatty, tmp_path):
    hf.export(tiny(chatty), tmp_path / "first", "float32")
    loaded = hf_import.read(tmp_path / "first")
    hf.export(loaded, tmp_path / "second", "float32")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
    gguf.export(loaded, tmp_path / "second.gguf", "f16")
    assert (
        gguf_library.GGUFReader(tmp_path / "second.gguf")
        .fields["tokenizer.chat_template"]
        .contents()
        == PLAIN_CHAT_TEMPLATE
    )


@pytest.mark.parametrize(
    "template",
    [
        5,
        [5],
        ["default"],
        [{"name": "default"}],
        [{"name": 1, "template": "x"}],
        {"default": "x"},
        "\ud800",
        True,
    ],
)
def test_chat_templates_that_are_refused(template, base, tmp_path):
    folder = folder_of(
        lambda folder, config: config.update(chat_template=template), base, tmp_path / "theirs"
    )
    with pytest.raises(
        BadInput,
        match=r"tokenizer_config.json: chat_template is neither text nor a list of named texts",
    ):
        hf_import.read(folder)


def test_a_chat_template_that_is_not_utf8(base, tmp_path):
    folder = folder_of(
        lambda folder, config: (folder / "chat_template.jinja").write_bytes(b"\xff"),
        base,
        tmp_path / "theirs",
    )
    with pytest.raises(BadInput, match=r"a chat template \(.jinja\) cannot be read"):
        hf_import.read(folder)
