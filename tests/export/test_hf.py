"""Hugging Face exports, read by transformers and imported again."""

import dataclasses
import json
import os
import resource
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2 as spm

from nanollama_jax import checkpoint
from nanollama_jax.chat import chatml as chat
from nanollama_jax.chat.conversations import Message
from nanollama_jax.checkpoint.metadata import parse_provenance, provenance
from nanollama_jax.errors import BadInput
from nanollama_jax.export import gguf, hf, hf_import, llama2c
from nanollama_jax.export.compare import Transformers
from nanollama_jax.export.model_card import model_card
from nanollama_jax.files import write_json
from nanollama_jax.infer.engine import Engine
from nanollama_jax.model import llama
from nanollama_jax.model.llama import stack_layers
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train.loop import train
from tests.conftest import ROOT
from tests.export.awkward import awkward_strings
from tests.export.tiny import tiny
from tests.model.oracle import hf_names, read_stories260k
from tests.trained import config_of


@pytest.fixture(scope="module")
def loaded(trained) -> checkpoint.Loaded:
    return checkpoint.load(trained)


@pytest.fixture(scope="module")
def exported(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "float32"
    hf.export(loaded, folder, "float32")
    return folder


def our_logits(loaded: checkpoint.Loaded, tokens: list[int]) -> np.ndarray:
    T = len(tokens)
    return np.asarray(
        llama.logits(
            loaded.model,
            loaded.params,
            jnp.array([tokens]),
            jnp.arange(T)[None],
            jnp.ones((1, T), int),
            loaded.rope_theta,
        )
    )[0]


def with_vocabulary(loaded: checkpoint.Loaded, tokenizer: Tokenizer) -> checkpoint.Loaded:
    """The model with embedding and head of the tokenizer's size; new rows are zeros."""
    more = tokenizer.vocab_size - loaded.model.vocab_size
    embedding = np.pad(loaded.params["embedding"]["kernel"], ((0, more), (0, 0)))
    head = np.pad(loaded.params["head"]["kernel"], ((0, 0), (0, more)))
    model = dataclasses.replace(loaded.model, vocab_size=tokenizer.vocab_size)
    params = loaded.params | {"embedding": {"kernel": embedding}, "head": {"kernel": head}}
    return checkpoint.Loaded(model, params, tokenizer, loaded.metadata, loaded.path)


def test_transformers_gives_our_logits(loaded, exported):
    tokens = loaded.tokenizer.encode((ROOT / "main.py").read_text(), bos=True)[:128]
    np.testing.assert_allclose(
        Transformers(exported).logits(tokens), our_logits(loaded, tokens), atol=1e-4
    )


def test_bfloat16_is_the_default_and_rounds_as_torch_does(loaded, exported, tmp_path):
    hf.export(loaded, tmp_path / "half")
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    whole = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert half.dtype == torch.bfloat16 and whole.dtype == torch.float32
    for name, value in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], value.to(torch.bfloat16)), name


def test_what_the_configuration_says(loaded, exported):
    config = transformers.AutoConfig.from_pretrained(exported)
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (
        loaded.context_length,
        loaded.rope_theta,
    )
    generation = transformers.GenerationConfig.from_pretrained(exported)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    assert str(ROOT) not in "".join(
        (exported / name).read_text() for name in ("config.json", "README.md")
    ), "an export names no paths"
    assert "| code | PSF-2.0 |" in (exported / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_export_import_export_is_byte_identical(loaded, tmp_path, dtype):
    hf.export(loaded, tmp_path / "first", dtype)
    written = checkpoint.save_weights(hf_import.read(tmp_path / "first"), tmp_path / "run")
    hf.export(checkpoint.load(written), tmp_path / "second", dtype)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert (
        names == sorted(path.name for path in (tmp_path / "second").iterdir())
        and "tokenizer.json" in names
    )
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (
            tmp_path / "second" / name
        ).read_bytes(), name


def test_shards(loaded, exported, tmp_path):
    hf.export(loaded, tmp_path / "shards", "float32", shard_bytes=2_000_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    assert all(
        path.stat().st_size < 2_100_000 for path in (tmp_path / "shards").glob("*.safetensors")
    )
    one, many = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (exported, tmp_path / "shards")
    )
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    again = hf_import.read(tmp_path / "shards")
    np.testing.assert_array_equal(
        again.params["layers_1"]["attention"]["o"]["kernel"],
        loaded.params["layers_1"]["attention"]["o"]["kernel"],
    )


@pytest.mark.parametrize("which", ["ours", "mistral"])
def test_autotokenizer_gives_sentencepiece_ids(which, loaded, exported, tmp_path, request):
    folder, tokenizer = exported, loaded.tokenizer
    if which == "mistral":
        tokenizer = Tokenizer(
            request.getfixturevalue("shared_data") / "tokenizer/mistral_v1_32000.model"
        )
        folder = tmp_path / "mistral"
        hf.export(with_vocabulary(loaded, tokenizer), folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = awkward_strings()
    assert len(texts) >= 3000
    wrong = [text for text in texts if theirs(text).input_ids != tokenizer.encode(text, bos=True)]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:5]!r}"
    undecoded = [
        text
        for text in texts
        if theirs.decode(tokenizer.encode(text)) != tokenizer.decode(tokenizer.encode(text))
    ]
    assert not undecoded, f"{len(undecoded)} of {len(texts)}: {undecoded[:5]!r}"


def test_a_chat_vocabulary_brings_its_template(loaded, exported, tmp_path):
    assert not (exported / "chat_template.jinja").exists()
    tokenizer = Tokenizer("chat", loaded.tokenizer.extended())
    hf.export(with_vocabulary(loaded, tokenizer), tmp_path / "chat")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "chat")
    asked = theirs.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 2?"}], add_generation_prompt=True
    )["input_ids"]
    assert asked == chat.encode_prompt(
        [Message("user", "What is 2 + 2?")], tokenizer
    )  # tests/chat/test_chatml.py has the rest
    end = tokenizer.control_id("<|im_end|>")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "chat").eos_token_id == [2, end]


def test_training_starts_from_an_import(exported, trained, tmp_path):
    """The weights are the imported ones, in the layout of the config; the optimizer is new."""
    checkpoint.save_weights(hf_import.read(exported), tmp_path / "imported")
    config = config_of(trained.parent)
    config.update(dict(init_from=str(tmp_path / "imported"), end_step=2))
    config.model.scan_layers = True
    train(config, tmp_path / "run")
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    before = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][
        -1
    ]["validation_perplexity"]["code"]
    assert rows[0]["validation_perplexity"]["code"] == pytest.approx(before, rel=1e-4)
    after = checkpoint.load(tmp_path / "run").metadata
    assert after.step == 2 and after.provenance["phase"] == "phase1"
    with pytest.raises(BadInput, match="holds imported weights"):
        train(config, tmp_path / "imported")


def test_tied_embeddings(loaded, exported, tmp_path):
    """transformers writes no lm_head if the head is the embedding."""
    config = transformers.AutoConfig.from_pretrained(exported)
    config.tie_word_embeddings = True
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    shutil.copy(exported / "tokenizer.model", tmp_path / "tied")
    tokens = [1, 5, 9, 200, 7]
    ours = our_logits(hf_import.read(tmp_path / "tied"), tokens)
    with torch.no_grad():
        np.testing.assert_allclose(ours, model(torch.tensor([tokens])).logits[0].numpy(), atol=1e-4)


def test_stories260k_from_llama2c(shared_data, tmp_path):
    """It has the oracle's weights, tells a story as a checkpoint, and keeps its ids as an export."""
    folder = shared_data / "weights/stories260K"
    loaded = llama2c.read(folder / "stories260K.bin", folder / "tok512.bin")
    model, params = read_stories260k(folder / "stories260K.bin")
    ours, expected = hf_names(model, stack_layers(loaded.params, 5)), hf_names(model, params)
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)
    checkpoint.save_weights(loaded, tmp_path / "run")
    story = (
        Engine.from_checkpoint(tmp_path / "run")
        .generate(["Once upon a time"], max_new_tokens=60)[0]
        .text
    )
    assert story.startswith(", there was a little girl named Lily. She loved to play"), story
    hf.export(checkpoint.load(tmp_path / "run"), tmp_path / "hf", "float32")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert all(
        theirs(text).input_ids == loaded.tokenizer.encode(text, bos=True)
        for text in awkward_strings(1000)
    )


# ---- Bad input


def broken(exported, folder, **changes):
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="qwen2"), "of architecture 'qwen2'; only 'llama'"),
        (
            dict(vocab_size=2000),
            "tokenizer.model has 1024 pieces and config.json says vocab_size=2000",
        ),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "scaled RoPE"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(num_hidden_layers=3), r"no tensor model.layers.2.input_layernorm.weight"),
        (
            dict(num_hidden_layers=1),
            r"model.layers.1.input_layernorm.weight, which a Llama with its config.json does not "
            r"have \(9 such",
        ),
        (
            dict(num_hidden_layers=10**9),
            "num_hidden_layers=1000000000 must be a number from 1 to 1000",
        ),
        (dict(num_attention_heads="8"), "num_attention_heads='8' must be a number"),
        (dict(max_position_embeddings=-5), "max_position_embeddings=-5 must be"),
        (dict(rope_theta=float("nan")), "rope_theta=nan must be"),
        (dict(rms_norm_eps="x"), "rms_norm_eps='x' must be"),
        (
            dict(rope_scaling={"rope_type": "default"}, rope_parameters={"rope_type": "yarn"}),
            "scaled RoPE",
        ),
        (dict(rope_parameters={"full_attention": {"rope_type": "yarn"}}), "scaled RoPE"),
        (dict(rope_scaling="linear"), "scaled RoPE"),
        (
            dict(intermediate_size=512),
            r"mlp.gate_proj.weight has shape \[768, 256\], and config.json asks for \[512, 256\]",
        ),
    ],
)
def test_folders_that_are_refused(exported, tmp_path, changes, message):
    with pytest.raises(BadInput, match=message):
        hf_import.read(broken(exported, tmp_path / "broken", **changes))


def test_damaged_folders(exported, tmp_path):
    with pytest.raises(BadInput, match=r"config.json: No such file"):
        hf_import.read(tmp_path)
    folder = broken(exported, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pickle files are not opened"):
        hf_import.read(folder)
    folder = broken(exported, tmp_path / "truncated")
    blob = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(blob[:-100])
    with pytest.raises(BadInput, match="damaged"):
        hf_import.read(folder)
    folder = broken(exported, tmp_path / "untokenized")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(BadInput, match=r"tokenizer.model: No such file"):
        hf_import.read(folder)


def test_only_an_export_is_overwritten(loaded, trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious").touch()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    shutil.copytree(trained, tmp_path / "run")
    for name in ("mine", "link", "run"):
        with pytest.raises(BadInput, match="exists"):
            hf.export(loaded, tmp_path / name)
        with pytest.raises(BadInput, match=r"config.json|is not an earlier export"):
            hf.export(loaded, tmp_path / name, overwrite=True)
    assert (tmp_path / "mine/precious").exists() and checkpoint.find(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine", "run"], (
        "nothing is left behind"
    )


def test_overwriting_removes_nothing_but_an_export(trained, tmp_path):
    loaded = tiny(checkpoint.load(trained).tokenizer)
    hf.export(loaded, tmp_path / "out")
    run = checkpoint.save_weights(hf_import.read(tmp_path / "out"), tmp_path / "out/run")
    with pytest.raises(
        BadInput, match="out holds run, which no export writes and overwriting would remove"
    ):
        hf.export(checkpoint.load(run), tmp_path / "out", overwrite=True)
    assert checkpoint.load(run)
    for odd in ("/", "."):
        with pytest.raises(
            BadInput, match="cannot be written as an export" if odd == "/" else "exists"
        ):
            hf.export(loaded, odd)
    hf.export(loaded, tmp_path / "shards", shard_bytes=20_000)
    hf.export(loaded, tmp_path / "shards", overwrite=True)
    assert (tmp_path / "shards/model.safetensors").exists(), "an earlier export of several files"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives(trained, tmp_path, umask):
    before = os.umask(umask)
    try:
        loaded = tiny(checkpoint.load(trained).tokenizer)
        hf.export(loaded, tmp_path / "one")
        hf.export(loaded, tmp_path / "shards", shard_bytes=20_000)
        gguf.export(loaded, tmp_path / "f16.gguf", "f16")
        gguf.export(loaded, tmp_path / "q8_0.gguf", "q8_0")
        checkpoint.save_weights(loaded, tmp_path / "run")
        write_json(tmp_path / "scores.json", {})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_what_contradicts_itself_is_not_exported(loaded, tmp_path):
    one_layer = dataclasses.replace(loaded.model, num_layers=1)
    for changes, message in (
        (dict(model=one_layer), r"layers_1/.* of shape None, and its weights have \("),
        (
            dict(model=dataclasses.replace(loaded.model, num_layers=3)),
            r"layers_2/.* and its weights have None",
        ),
        (
            dict(model=dataclasses.replace(loaded.model, num_kv_heads=1)),
            "attention/qkv/kernel of shape",
        ),
        (dict(model=dataclasses.replace(loaded.model, d_model=128)), "embedding/kernel of shape"),
        (
            dict(tokenizer=Tokenizer("chat", loaded.tokenizer.extended())),
            "the tokenizer has 1032 pieces and the model 1024",
        ),
    ):
        with pytest.raises(BadInput, match=message):
            hf.export(dataclasses.replace(loaded, **changes), tmp_path / "out")
        with pytest.raises(BadInput, match=message):
            gguf.export(dataclasses.replace(loaded, **changes), tmp_path / "out.gguf", "f32")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_earlier_export(loaded, tmp_path):
    """A limit on file sizes stands in for a full disk; the real writers run into it."""
    hf.export(loaded, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        with pytest.raises(BadInput, match="could not be written"):
            hf.export(loaded, tmp_path / "out", "float32", overwrite=True)
        with pytest.raises(BadInput, match="is the disk full"):
            gguf.export(loaded, tmp_path / "out.gguf", "f16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (
        tmp_path / "out/model.safetensors"
    ).read_bytes() == before
    hf.export(loaded, tmp_path / "out", "float32", overwrite=True)
    assert (tmp_path / "out/model.safetensors").stat().st_size > len(before)
    (tmp_path / "out").rename(
        tmp_path / ".out.replaced"
    )  # as a kill between the two renames leaves it
    with pytest.raises(BadInput, match="exists"):
        hf.export(loaded, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the earlier export is back"


def test_weights_that_are_not_finite(loaded, exported, tmp_path):
    scale = loaded.params["final_norm"]["scale"].copy()
    scale[3] = np.nan
    diverged = dataclasses.replace(loaded, params=loaded.params | {"final_norm": {"scale": scale}})
    with pytest.raises(BadInput, match="model.norm.weight has values that are not finite"):
        hf.export(diverged, tmp_path / "out")
    head = loaded.params["head"]["kernel"] * 1e6
    with pytest.raises(BadInput, match=r"output.weight has values that are not finite in float16"):
        gguf.export(
            dataclasses.replace(loaded, params=loaded.params | {"head": {"kernel": head}}),
            tmp_path / "out.gguf",
            "f16",
        )
    folder = broken(exported, tmp_path / "nan")
    save_file(
        load_file(folder / "model.safetensors") | {"model.norm.weight": scale},
        folder / "model.safetensors",
    )
    with pytest.raises(BadInput, match="model.norm.weight has values that are not finite"):
        hf_import.read(folder)


def test_the_files_that_transformers_would_read(loaded, exported, tmp_path):
    folder = broken(exported, tmp_path / "more")
    save_file(
        {"tok_embeddings.weight": np.zeros((2, 2), np.float32)}, folder / "consolidated.safetensors"
    )
    save_file({"model.norm.weight": np.zeros(256, np.float32)}, folder / "zz-old.safetensors")
    np.testing.assert_array_equal(
        hf_import.read(folder).params["final_norm"]["scale"], loaded.params["final_norm"]["scale"]
    )
    hf.export(loaded, tmp_path / "shards", shard_bytes=2_000_000)
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(BadInput, match="model-00002-of-"):
        hf_import.read(tmp_path / "shards")


def test_where_the_weights_come_from_is_not_forgotten(loaded, exported, tmp_path):
    origin = {"imported_from": "TinyLlama-1.1B"}
    assert provenance(dataclasses.replace(imported(loaded), provenance=origin)) == origin
    trained_on = dataclasses.replace(loaded.metadata, provenance=origin)
    found = provenance(trained_on)
    assert found["started_from"] == origin and parse_provenance(found) == found
    assert "Started from the weights of TinyLlama-1.1B" in model_card(
        loaded.model, trained_on, "float32"
    )
    for untrusted in (
        "x",
        [1],
        {"foo": 1},
        {"step": 1},
        {"imported_from": "a\n# evil"},
        found | {"step": "x"},
        found | {"corpora": {"a": "b\n"}},
    ):
        assert parse_provenance(untrusted) is None
    folder = broken(exported, tmp_path / "odd", nanollama="x")
    assert hf_import.read(folder).metadata.provenance == {"imported_from": "odd"}


def imported(loaded: checkpoint.Loaded) -> checkpoint.Metadata:
    return checkpoint.weights_metadata(loaded.model, loaded.tokenizer, 1e4, 128, {})


def test_the_card_lists_what_was_trained_on_and_no_licence_of_another_url(loaded):
    metadata = loaded.metadata
    assert metadata.corpora == {"code": "PSF-2.0"}
    never_read = {"never_read": {"url": "builtin://docs", "licence": "secret"}}
    config = metadata.config | {"corpora": metadata.config["corpora"] | never_read}
    # books: of a stage before
    corpora = {"code": "not stated", "books": "CC0"}
    changed = dataclasses.replace(metadata, config=config, corpora=corpora)
    card = model_card(loaded.model, changed, "float32")
    assert (
        "| books | CC0 |\n| code | not stated |\n" in card
        and "never_read" not in card
        and "PSF" not in card
    )
    earlier = {key: value for key, value in changed.to_dict().items() if key != "corpora"}
    assert provenance(checkpoint.Metadata.from_dict(earlier))["corpora"] == {"code": "PSF-2.0"}


def test_a_tokenizer_that_the_formats_cannot_express(loaded, tmp_path):
    proto = spm.ModelProto.FromString(loaded.tokenizer.model_bytes)
    proto.normalizer_spec.remove_extra_whitespaces = True
    with pytest.raises(BadInput, match="removes extra whitespace"):
        hf.export(
            with_vocabulary(loaded, Tokenizer("x", proto.SerializeToString())), tmp_path / "out"
        )
    assert not list(tmp_path.iterdir())


def test_llama2c_files_that_are_refused(shared_data, tmp_path):
    folder = shared_data / "weights/stories260K"
    blob = (folder / "stories260K.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(blob[:-4])
    (tmp_path / "v1.bin").write_bytes(b"24ka" + blob)
    (tmp_path / "noise.bin").write_bytes(bytes(range(200)))
    for name, message in (("short", "truncated"), ("v1", "version 0"), ("noise", "header says")):
        with pytest.raises(BadInput, match=message):
            llama2c.read(tmp_path / f"{name}.bin", folder / "tok512.bin")
    with pytest.raises(BadInput, match="pieces and the model's vocabulary is 512"):
        llama2c.read(folder / "stories260K.bin", shared_data / "tokenizer/mistral_v1_32000.model")
