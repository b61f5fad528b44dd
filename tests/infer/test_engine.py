"""The engine against transformers: greedy tokens, cached logits, log-probabilities."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nanollama_jax import checkpoint, sharding
from nanollama_jax.errors import BadInput
from nanollama_jax.export import llama2c
from nanollama_jax.infer import decode
from nanollama_jax.infer.batch import bucket
from nanollama_jax.infer.engine import Engine
from nanollama_jax.infer.grammar import regex
from nanollama_jax.infer.sampling import Sampling
from nanollama_jax.model import ModelConfig, llama
from nanollama_jax.model.llama import stack_layers
from nanollama_jax.tokenizer import Tokenizer
from tests.model.oracle import hf_model, random_params, read_stories260k

GREEDY_TOKENS = 200


@pytest.fixture(scope="module")
def engine(trained) -> Engine:
    return Engine.from_checkpoint(trained)


@pytest.fixture(scope="module")
def hf(trained):
    loaded = checkpoint.load(trained)
    return hf_model(
        loaded.model, stack_layers(loaded.params, loaded.model.num_layers), loaded.rope_theta
    )


@pytest.fixture
def stories(shared_data):
    """An engine of stories260K, and transformers' model."""
    folder = shared_data / "weights/stories260K"
    model, params = read_stories260k(folder / "stories260K.bin")
    engine = Engine(
        model,
        params,
        llama2c.read_tokenizer(folder / "tok512.bin", 512),
        rope_theta=10_000.0,
        context_length=512,
    )
    return engine, hf_model(model, params, 10_000.0)


def prompts_of(vocab_size: int) -> list[list[int]]:
    """Eight of unequal length, over two buckets."""
    rng = np.random.default_rng(1)
    return [
        [1, *rng.integers(3, vocab_size, n - 1).tolist()] for n in (1, 2, 5, 17, 31, 33, 40, 64)
    ]


def hf_greedy(hf, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor(
        [[0] * (longest - len(p)) + p for p in prompts]
    )  # generate() wants padding on the left
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = hf.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, longest:].tolist()


def check_greedy(engine: Engine, hf) -> None:
    engine.context_length = (
        512  # beyond what the little model was trained on: this is about arithmetic
    )
    prompts = prompts_of(engine.model.vocab_size)
    ours = engine.generate(prompts, max_new_tokens=GREEDY_TOKENS, stop_ids=())
    assert [c.tokens for c in ours] == hf_greedy(hf, prompts, GREEDY_TOKENS)
    assert {c.finish_reason for c in ours} == {"length"}


def test_greedy_equals_transformers(trained, hf):
    check_greedy(Engine.from_checkpoint(trained), hf)


def test_greedy_equals_transformers_on_stories260k(stories):
    check_greedy(*stories)


def test_the_second_batch_and_the_order_of_prompts(engine, hf):
    prompts = prompts_of(engine.model.vocab_size)[::-1]
    small = Engine(
        engine.model,
        engine.params,
        engine.tokenizer,
        rope_theta=1e4,
        context_length=128,
        max_batch=3,
    )
    assert [c.tokens for c in small.generate(prompts, max_new_tokens=20, stop_ids=())] == hf_greedy(
        hf, prompts, 20
    )


@pytest.mark.parametrize("total", [40, 2048])
def test_cached_logits_equal_full_logits_at_every_position(total):
    """Documents packed in one row, masked, against each decoded alone with a cache."""
    model = ModelConfig(
        vocab_size=64,
        num_layers=2,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=64,
        scan_layers=False,
    )
    params = random_params(model)
    lengths = (1200, 5, total - 1205) if total > 1500 else (21, 3, 16)
    tokens_BT = np.random.default_rng(0).integers(0, 64, (1, total)).astype(np.int32)
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    full_BTV = np.asarray(
        jax.jit(functools.partial(llama.logits, model))(params, tokens_BT, positions, segments, 1e4)
    )

    @jax.jit
    def decode_rest(caches, start, tokens_BT):
        def step(i, carry):
            caches, out_BTV = carry
            hidden_B1D, caches = decode.forward(
                params, tokens_BT[:, i, None], jnp.float32(1e4), model, caches, jnp.full((1, 1), i)
            )
            return caches, out_BTV.at[:, i].set(decode.head(params, hidden_B1D[:, 0]))

        out_BTV = jnp.zeros((*tokens_BT.shape, 64))
        return jax.lax.fori_loop(start, tokens_BT.shape[1], step, (caches, out_BTV))[1]

    start = 0
    for n in lengths:
        alone_BT = tokens_BT[:, start : start + n]
        prefilled = 1 if n < 1000 else n // 3
        padded_BT = np.pad(
            alone_BT[:, :prefilled], ((0, 0), (0, 5)), constant_values=7
        )  # what padding leaves in the cache must not matter
        caches = decode.prefill(params, padded_BT, jnp.float32(1e4), model=model, slots=total + 8)
        got_BTV = np.asarray(decode_rest(caches, prefilled, alone_BT))
        np.testing.assert_allclose(
            got_BTV[:, prefilled:], full_BTV[:, start + prefilled : start + n], atol=1e-4
        )
        start += n


def test_a_mesh_of_two_devices_changes_nothing(engine, trained):
    mesh = sharding.make_mesh(1, 2, devices=jax.devices()[:2])
    on_two = Engine.from_checkpoint(trained, mesh=mesh)
    prompts = prompts_of(1024)[:5]
    options = dict(max_new_tokens=16, stop_ids=())
    assert [c.tokens for c in on_two.generate(prompts, **options)] == [
        c.tokens for c in engine.generate(prompts, **options)
    ]
    for a, b in zip(on_two.score(prompts), engine.score(prompts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_scores_equal_transformers(engine, hf):
    sequences = prompts_of(1024)
    for sequence, logprobs in zip(sequences, engine.score(sequences), strict=True):
        ids = torch.tensor([sequence])
        with torch.no_grad():
            expected = torch.log_softmax(hf(ids).logits[0, :-1], -1)[
                range(len(sequence) - 1), sequence[1:]
            ]
        np.testing.assert_allclose(logprobs, expected.numpy(), atol=1e-4)
        assert logprobs.dtype == np.float32 and logprobs.shape == (len(sequence) - 1,)


def test_draws_do_not_depend_on_the_batch(engine):
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=3)
    prompts = ["def f(", "import", "class A:", "def f("]
    together = engine.generate(prompts, sampling, max_new_tokens=24)
    assert together[0].tokens == engine.generate(prompts[:1], sampling, max_new_tokens=24)[0].tokens
    assert together[0].tokens != together[3].tokens, "the same prompt twice is drawn twice"
    assert (
        together[0].tokens
        != engine.generate(
            prompts[:1], Sampling(temperature=1.0, top_p=0.95, seed=4), max_new_tokens=24
        )[0].tokens
    )


def test_repetition_penalty_equals_transformers(engine, hf):
    prompt = engine.tokenizer.encode("def f(self, self, self", bos=True)
    expected = hf.generate(
        torch.tensor([prompt]),
        max_new_tokens=50,
        do_sample=False,
        repetition_penalty=1.3,
        eos_token_id=None,
        pad_token_id=0,
    )
    ours = engine.generate(
        [prompt], Sampling(repetition_penalty=1.3), max_new_tokens=50, stop_ids=()
    )
    assert ours[0].tokens == expected[0, len(prompt) :].tolist()
    assert ours[0].tokens != engine.generate([prompt], max_new_tokens=50, stop_ids=())[0].tokens


def test_streaming_gives_the_same_text(engine):
    sampling = Sampling(temperature=1.0, seed=5)
    whole = engine.generate(["def f("], sampling, max_new_tokens=40)[0]
    pieces, stream = [], engine.stream("def f(", sampling, max_new_tokens=40)
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            completion = end.value
            break
    assert "".join(pieces) == completion.text == whole.text and completion == whole
    assert len(pieces) > 10


def test_stops(engine):
    plain = engine.generate(["def f("], max_new_tokens=40, stop_ids=())[0]
    assert plain.finish_reason == "length" and len(plain.tokens) == 40
    string = plain.text[10:14]
    cut = engine.generate(["def f("], max_new_tokens=40, stop=[string], stop_ids=())[0]
    assert cut.text == plain.text[: plain.text.index(string)] and cut.finish_reason == "stop"
    token = plain.tokens[7]
    ended = engine.generate(["def f("], max_new_tokens=40, stop_ids=[token])[0]
    assert (
        ended.tokens == plain.tokens[: plain.tokens.index(token) + 1]
        and ended.finish_reason == "stop"
    )
    assert ended.text == engine.tokenizer.decode(ended.tokens[:-1])


def test_rows_that_end_at_different_times(engine):
    """By stop strings and tokens, at the context and the budget; batched, alone and streamed."""
    prompts = [*prompts_of(1024), [1] + [7] * 100]
    options = dict(stop=["self", "\n\n"], stop_ids=list(range(40, 80)), max_new_tokens=70)
    sampling = Sampling(temperature=1.0, seed=9)
    together = engine.generate(prompts, sampling, **options)
    for prompt, completion in zip(prompts[:1], together[:1], strict=True):
        assert list(engine.stream(prompt, sampling, **options)) and engine.generate(
            [prompt], sampling, **options
        ) == [completion]
    greedy = engine.generate(prompts, **options)
    for prompt, completion in zip(prompts, greedy, strict=True):
        assert "".join(engine.stream(prompt, **options)) == completion.text
        assert not any(string in completion.text for string in options["stop"])
    assert len({len(completion.tokens) for completion in together}) > 4
    assert {completion.finish_reason for completion in together + greedy} == {"stop", "length"}


def test_ids_that_the_tokenizer_has_not_are_never_chosen(engine):
    """A vocabulary that was padded with rows whose logits would win."""
    more = 40
    embedding = jnp.pad(engine.params["embedding"]["kernel"], ((0, more), (0, 0)))
    head = jnp.pad(engine.params["head"]["kernel"], ((0, 0), (0, more))) + jnp.pad(
        jnp.zeros((256, 1024)), ((0, 0), (0, more)), constant_values=9.0
    )
    model = dataclasses.replace(engine.model, vocab_size=1024 + more)
    params = engine.params | {"embedding": {"kernel": embedding}, "head": {"kernel": head}}
    padded = Engine(model, params, engine.tokenizer, rope_theta=1e4, context_length=128)
    assert (
        padded.generate(["def f("], max_new_tokens=10)[0].tokens
        == engine.generate(["def f("], max_new_tokens=10)[0].tokens
    )
    with pytest.raises(
        BadInput, match="the tokenizer has 1024 pieces and the model's vocabulary is 512"
    ):
        Engine(
            dataclasses.replace(engine.model, vocab_size=512),
            engine.params,
            engine.tokenizer,
            rope_theta=1e4,
            context_length=128,
        )


def test_logits_that_are_not_finite(engine):
    params = engine.params | {
        "head": {"kernel": engine.params["head"]["kernel"].at[0, 5].set(jnp.nan)}
    }
    diverged = Engine(engine.model, params, engine.tokenizer, rope_theta=1e4, context_length=128)
    for options in ({}, {"grammar": regex("[a-z]+")}):
        with pytest.raises(BadInput, match="logits are not finite"):
            diverged.generate(["def f("], max_new_tokens=10, **options)


def test_training_may_donate_its_parameters(engine):
    params = jax.tree.map(jnp.array, engine.params)
    own = Engine(engine.model, params, engine.tokenizer, rope_theta=1e4, context_length=128)
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params)
    assert own.generate(["def f("], max_new_tokens=5) == engine.generate(
        ["def f("], max_new_tokens=5
    )


def test_the_context_is_the_end(engine):
    prompt = [1] + [5] * 120
    completion = engine.generate([prompt], max_new_tokens=1000, stop_ids=())[0]
    assert (
        len(prompt) + len(completion.tokens) == engine.context_length == 128
        and completion.finish_reason == "length"
    )
    assert engine.generate([prompt], max_new_tokens=2**40, stop_ids=())[0] == completion
    assert engine.generate([]) == [] and engine.score([]) == []


def test_bad_input(engine):
    with pytest.raises(BadInput, match="prompt 1 has 128 tokens and the model's context is 128"):
        engine.generate(["fine", [1] * 128])
    with pytest.raises(BadInput, match="prompt 0 is empty"):
        engine.generate([[]])
    with pytest.raises(BadInput, match="token id outside 0 to 1023"):
        engine.generate([[1, 1024]])
    with pytest.raises(BadInput, match="sequence 0 has 129 tokens"):
        engine.score([[1] * 129])
    for alone in ([1, 5, 7], np.array([1, 5, 7]), "text", ["text"], [[[1, 5]]], [[1, 5], 7]):
        with pytest.raises(BadInput, match=r"write score\(\[ids\]\)"):
            engine.score(alone)
    assert [len(logprobs) for logprobs in engine.score([np.array([1, 5, 7]), (1, 5)])] == [2, 1]
    with pytest.raises(BadInput, match="max_new_tokens=0"):
        engine.generate(["a"], max_new_tokens=0)
    with pytest.raises(BadInput, match="prompts is one string"):
        engine.generate("a")
    with pytest.raises(BadInput, match="stop string is empty"):
        engine.generate(["a"], stop=[""])
    with pytest.raises(BadInput, match="prompt 0 is neither text"):
        engine.generate(["\ud800"])
    for grammars in ([], [regex("a"), regex("b")]):
        with pytest.raises(BadInput, match=f"1 prompts and {len(grammars)} grammars"):
            engine.generate(["a"], grammar=grammars)


def test_buckets():
    assert [bucket(n, 32) for n in (1, 32, 33, 64, 65, 1000)] == [32, 32, 64, 64, 128, 1024]
    assert [bucket(n, 3) for n in (1, 3, 4, 7)] == [3, 3, 6, 12]


def test_the_tokenizer_in_a_checkpoint_is_the_one_it_was_trained_with(trained):
    assert (
        checkpoint.load(trained).tokenizer.sha256
        == Tokenizer(trained.parent / "tokenizer.model").sha256
    )


def test_what_is_no_checkpoint(trained, tmp_path):
    with pytest.raises(BadInput, match="there is no such folder"):
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(BadInput, match="holds no checkpoint"):
        checkpoint.load(tmp_path)
    (tmp_path / "checkpoints/step_5.orbax-checkpoint-tmp-1").mkdir(parents=True)
    with pytest.raises(BadInput, match="still being written"):
        checkpoint.load(tmp_path)
    (tmp_path / "checkpoints/step_5").mkdir()
    with pytest.raises(BadInput, match="damaged"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    ["state", "state/_METADATA", "state/manifest.ocdbt", "metadata/metadata", "tokenizer/metadata"],
)
def test_a_damaged_checkpoint(trained, tmp_path, damage):
    step = tmp_path / "checkpoints/step_60"
    shutil.copytree(trained / "checkpoints/step_60", step)
    if (step / damage).is_dir():
        shutil.rmtree(step / damage)
    else:
        (step / damage).write_bytes(
            (step / damage).read_bytes()[: (step / damage).stat().st_size // 2]
        )
    with pytest.raises(BadInput, match="step_60 is damaged"):
        checkpoint.load(tmp_path)


def test_which_checkpoint_is_meant(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "curriculum/phase1")
    monkeypatch.chdir(tmp_path / "curriculum/phase1/checkpoints/step_60")
    assert {
        checkpoint.load(path).path.name for path in (".", "../..", tmp_path / "curriculum")
    } == {"step_60"}
    other = tmp_path / "curriculum/other/checkpoints/step_60"
    shutil.copytree(trained / "checkpoints/step_60", other)
    metadata = json.loads((other / "metadata/metadata").read_text())
    metadata["model"]["norm_eps"] = 1e-6
    (other / "metadata/metadata").write_text(json.dumps(metadata))
    with pytest.raises(
        BadInput, match="step_60 is damaged .metadata/metadata is not what was written"
    ):
        checkpoint.load(tmp_path / "curriculum")
    del metadata["checksums"]  # as earlier versions wrote
    (other / "checksums.json").unlink()
    (other / "metadata/metadata").write_text(json.dumps(metadata))
    with pytest.raises(BadInput, match=r"several models \(other, phase1\)"):
        checkpoint.load(tmp_path / "curriculum")
    assert checkpoint.load(other).context_length == 128
    del metadata["model"]["packed_documents"]  # as before projections were fused
    (other / "metadata/metadata").write_text(json.dumps(metadata))
    with pytest.raises(
        BadInput,
        match="is of an earlier version, which kept queries, keys and values apart: "
        "export it with that version",
    ):
        checkpoint.load(other)
