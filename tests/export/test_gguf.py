"""GGUF files in llama.cpp: the same tokens, logits and text as ours."""

import dataclasses

import gguf as gguf_library
import numpy as np
import pytest

from nanollama_jax import checkpoint
from nanollama_jax.errors import BadInput
from nanollama_jax.evals import perplexity
from nanollama_jax.export import gguf, llama2c
from nanollama_jax.export.compare import Difference, LlamaCpp
from nanollama_jax.infer.engine import Engine
from nanollama_jax.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.export.awkward import awkward_strings
from tests.export.test_hf import our_logits, with_vocabulary

LIMITS = {  # of the mean KL divergence, nats a token
    "f32": 1e-9,
    "f16": 1e-5,
    "bf16": 1e-4,
    "q8_0": 5e-3,
    "q4_k_m": 5e-2,
}


@pytest.fixture(scope="module")
def loaded(trained) -> checkpoint.Loaded:
    return checkpoint.load(trained)


@pytest.fixture(scope="module")
def files(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    for kind in gguf.TYPES:
        gguf.export(loaded, folder / f"{kind}.gguf", kind)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{kind}.gguf" for kind in gguf.TYPES
    ), "nothing is left behind"
    return folder


@pytest.mark.parametrize("kind", gguf.TYPES)
def test_llama_cpp_gives_our_logits(loaded, files, kind):
    text = (ROOT / "nanollama_jax/tokenizer.py").read_text()
    rows = [[1, *loaded.tokenizer.encode(text)[i : i + 127]] for i in (0, 300, 600)]
    theirs = LlamaCpp(files / f"{kind}.gguf", 128)
    differences = [Difference.of(our_logits(loaded, row), theirs.logits(row)) for row in rows]
    assert max(d.mean_kl for d in differences) < LIMITS[kind]
    if kind == "f32":
        assert max(d.largest for d in differences) < 1e-4
    if kind in gguf.QUANTIZED:
        assert min(d.mean_kl for d in differences) > 1e-7, "it is not quantized"


def test_llama_cpp_generates_our_text(trained, loaded, files):
    ours = Engine.from_checkpoint(trained)
    prompts = [
        loaded.tokenizer.encode(text, bos=True)
        for text in ("def __init__(self", "class Path:", "import")
    ]
    theirs = LlamaCpp(files / "f32.gguf", 128, sequences=3).greedy(prompts, 60)
    assert theirs == [
        completion.tokens for completion in ours.generate(prompts, max_new_tokens=60, stop_ids=())
    ]


@pytest.mark.parametrize("which", ["ours", "mistral"])
def test_llama_cpp_gives_sentencepiece_ids(which, loaded, files, tmp_path, request):
    path, tokenizer = files / "f16.gguf", loaded.tokenizer
    if which == "mistral":
        tokenizer = Tokenizer(
            request.getfixturevalue("shared_data") / "tokenizer/mistral_v1_32000.model"
        )
        path = tmp_path / "mistral.gguf"
        gguf.export(with_vocabulary(loaded, tokenizer), path, "f16")
    theirs = LlamaCpp(path, 128)
    texts = [text for text in awkward_strings() if "\0" not in text]  # llama.cpp takes a C string
    assert len(texts) >= 3000
    wrong = [text for text in texts if theirs.tokenize(text) != tokenizer.encode(text)]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:5]!r}"


def test_stories260k(shared_data, tmp_path):
    """Widths that are not multiples of 32, a dummy prefix, real weights."""
    folder = shared_data / "weights/stories260K"
    loaded = llama2c.read(folder / "stories260K.bin", folder / "tok512.bin")
    gguf.export(loaded, tmp_path / "f32.gguf", "f32")
    tokens = loaded.tokenizer.encode("Once upon a time, there was a dog. One day", bos=True)
    theirs = LlamaCpp(tmp_path / "f32.gguf", 512)
    assert Difference.of(our_logits(loaded, tokens), theirs.logits(tokens)).largest < 1e-4
    engine = Engine(
        loaded.model, loaded.params, loaded.tokenizer, rope_theta=1e4, context_length=512
    )
    assert theirs.greedy([tokens], 200) == [
        engine.generate([tokens], max_new_tokens=200, stop_ids=())[0].tokens
    ]
    with pytest.raises(BadInput, match="ffn_dim=172 is not a multiple"):
        gguf.export(loaded, tmp_path / "q8.gguf", "q8_0")


def test_a_chat_vocabulary(loaded, tmp_path):
    tokenizer = Tokenizer("chat", loaded.tokenizer.extended())
    gguf.export(with_vocabulary(loaded, tokenizer), tmp_path / "chat.gguf", "f16")
    fields = gguf_library.GGUFReader(tmp_path / "chat.gguf").fields
    assert "<|im_start|>" in fields["tokenizer.chat_template"].contents()
    assert fields["tokenizer.ggml.eot_token_id"].contents() == tokenizer.control_id("<|im_end|>")
    text = "<|im_start|>system\n<s>"
    assert LlamaCpp(tmp_path / "chat.gguf", 64).tokenize(text) == tokenizer.encode(text), (
        "what a user writes is text"
    )


def test_refusals(loaded, files, tmp_path):
    narrow = checkpoint.Loaded(
        dataclasses.replace(loaded.model, d_model=192),
        loaded.params,
        loaded.tokenizer,
        loaded.metadata,
        loaded.path,
    )
    with pytest.raises(
        BadInput, match="q4_k_m packs 256 weights together and d_model=192 is not a multiple"
    ):
        gguf.export(narrow, tmp_path / "x.gguf", "q4_k_m")
    before = (files / "f16.gguf").read_bytes()
    with pytest.raises(BadInput, match="exists"):
        gguf.export(loaded, files / "f16.gguf", "f16")
    gguf.export(loaded, files / "f16.gguf", "f16", overwrite=True)
    assert (files / "f16.gguf").read_bytes() == before, "the same file again"
    assert not list(tmp_path.iterdir())


def test_perplexity_by_llama_cpps_rule(trained, loaded, files):
    """llama-perplexity's rule, written out over llama.cpp's logits, gives our perplexity."""
    context, text = 64, (ROOT / "nanollama_jax/checkpoint/store.py").read_text().removesuffix("\n")
    theirs = LlamaCpp(files / "f32.gguf", context)
    ids = [1, *theirs.tokenize(text)]
    nats = []
    for start in range(0, len(ids) // context * context, context):
        chunk = [1, *ids[start + 1 : start + context]]
        logits_TV = theirs.logits(chunk).astype(np.float64)
        for position in range(context // 2, context - 1):
            nats.append(
                np.logaddexp.reduce(logits_TV[position]) - logits_TV[position, chunk[position + 1]]
            )
    engine = Engine.from_checkpoint(trained)
    ours = perplexity.measure(
        engine.score,
        loaded.tokenizer,
        [text],
        rule="llama.cpp",
        context=context,
        stride=None,
        max_tokens=10**6,
    )
    assert ours.tokens == len(nats) and ours.perplexity == pytest.approx(
        np.exp(np.mean(nats)), rel=1e-4
    )
