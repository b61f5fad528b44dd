"""Flash attention without a GPU.

A plain implementation of their contract stands in for cuDNN's two calls; the rest is real.

What cuDNN leaves undefined (tokens in no document, statistics beyond a document's end) is NaN here.
tests/gpu runs the real calls.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollama_jax import sharding
from nanollama_jax.errors import BadInput
from nanollama_jax.model import Llama, ModelConfig, flash_attention
from nanollama_jax.model.attention import attend, check_attention, documents_of, merged_documents
from nanollama_jax.model.flash_attention import Packing, pack
from tests.model.oracle import random_params

MODEL = ModelConfig(
    vocab_size=64,
    num_layers=3,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=96,
    dtype="bfloat16",
    attention="cudnn_packed",
    packed_documents=4,
)


def stand_in(q_BTNH, k_BTKH, v_BTKH, packing: Packing):
    """The document of each flattened token, from cuDNN's own arguments; scores of all tokens."""
    B, T, N, H = q_BTNH.shape
    G, Z = N // k_BTKH.shape[2], packing.lengths_BM.size
    lengths_Z, starts_Z = packing.lengths_BM.reshape(-1), packing.starts_BM1.reshape(-1)[:Z]
    token_X = jnp.arange(B * T)
    inside_ZX = (token_X >= starts_Z[:, None]) & (token_X < (starts_Z + lengths_Z)[:, None])
    same_XY = (inside_ZX[:, :, None] & inside_ZX[:, None]).any(axis=0) & (
        token_X[:, None] >= token_X
    )
    q, k, v = (x.astype(jnp.float32).reshape(B * T, -1, H) for x in (q_BTNH, k_BTKH, v_BTKH))
    k, v = jnp.repeat(k, G, axis=1), jnp.repeat(v, G, axis=1)
    scores_NXY = jnp.where(same_XY, jnp.einsum("XNH,YNH->NXY", q, k) * H**-0.5, -jnp.inf)
    return q, k, v, scores_NXY, inside_ZX, lengths_Z, starts_Z


def forward_stand_in(q_BTNH, k_BTKH, v_BTKH, packing):
    B, T, N, H = q_BTNH.shape
    _, _, v, scores_NXY, inside_ZX, lengths_Z, starts_Z = stand_in(q_BTNH, k_BTKH, v_BTKH, packing)
    lse_NX = jax.nn.logsumexp(scores_NXY, axis=-1)
    out = jnp.einsum("NXY,YNH->XNH", jnp.exp(scores_NXY - lse_NX[..., None]), v)
    out = jnp.where(inside_ZX.any(axis=0)[:, None, None], out, jnp.nan)
    inside_ZT = jnp.arange(T) < lengths_Z[:, None]
    token_ZT = jnp.minimum(starts_Z[:, None] + jnp.arange(T), B * T - 1)
    stats_ZNT = jnp.where(inside_ZT[:, None], lse_NX[:, token_ZT].swapaxes(0, 1), jnp.nan)
    return out.astype(q_BTNH.dtype).reshape(B, T, N, H), stats_ZNT


def backward_stand_in(q_BTNH, k_BTKH, v_BTKH, packing, stats_ZNT, out_BTNH, d_out_BTNH):
    """From the statistics that it is passed, like cuDNN: they must be back in its layout."""
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    q, k, v, scores_NXY, inside_ZX, _, starts_Z = stand_in(q_BTNH, k_BTKH, v_BTKH, packing)
    document_X, token_X = jnp.argmax(inside_ZX, axis=0), jnp.arange(B * T)
    lse_NX = stats_ZNT[document_X, :, token_X - starts_Z[document_X]].T
    p_NXY = jnp.exp(scores_NXY - lse_NX[..., None])
    d_out, out = (x.astype(jnp.float32).reshape(B * T, N, H) for x in (d_out_BTNH, out_BTNH))
    d_p_NXY = jnp.einsum("XNH,YNH->NXY", d_out, v) - jnp.sum(d_out * out, axis=-1).T[..., None]
    d_s_NXY = p_NXY * d_p_NXY * H**-0.5
    grads = (
        jnp.einsum("NXY,YNH->XNH", d_s_NXY, k),
        jnp.einsum("NXY,XNH->YNH", d_s_NXY, q),
        jnp.einsum("NXY,XNH->YNH", p_NXY, d_out),
    )
    d_q, d_k, d_v = (
        x.reshape(B, T, heads, -1, H).sum(axis=3) for x, heads in zip(grads, (N, K, K), strict=True)
    )
    return tuple(x.astype(q_BTNH.dtype) for x in (d_q, d_k, d_v))


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(flash_attention, "cudnn_forward", forward_stand_in)
    monkeypatch.setattr(flash_attention, "cudnn_backward", backward_stand_in)


def segments_of(rows):
    return np.array([np.repeat(np.arange(1, len(row) + 1), row) for row in rows], np.int32)


ROWS = {
    "ragged": [[5, 1, 10, 32], [48], [1, 1, 1, 45], [20, 28]],
    "one document": [[48]] * 4,
    "as many as there is room for": [[12] * 4] * 4,
    "more in one row than in another": [[6] * 6 + [12], [48], [48], [4] * 6 + [24]],
    "padding at the end": [[30, 18], [40, 8], [47, 1], [10, 10, 28]],
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("devices", [1, 2])
def test_output_and_gradients_agree_with_xla(devices):
    keys = jax.random.split(jax.random.key(1), 4)
    arrays = [
        jax.random.normal(key, (4, 48, heads, 16), jnp.bfloat16)
        for key, heads in zip(keys, (4, 2, 2, 4), strict=True)
    ]

    def run(config, segment_ids):
        q, k, v, d_out = (x.astype(config.dtype) for x in arrays)
        out, gradients_of = jax.vjp(
            lambda *qkv: attend(*qkv, documents_of(segment_ids, config), config), q, k, v
        )
        return out, *gradients_of(d_out)

    @jax.jit
    def both(segment_ids):
        expected = run(dataclasses.replace(MODEL, attention="xla", dtype="float32"), segment_ids)
        return run(MODEL, segment_ids), expected, merged_documents(segment_ids, MODEL)

    with sharding.use_mesh(sharding.make_mesh(1, devices, devices=jax.devices()[:devices])):
        for what, rows in ROWS.items():
            ours, expected, merged = jax.device_get(both(segments_of(rows)))
            assert merged == 0
            for name, a, b in zip(("output", "dq", "dk", "dv"), ours, expected, strict=True):
                error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
                assert error < 1e-2, (what, name, error)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.integers(1, 24), min_size=1, max_size=12), min_size=4, max_size=4),
    st.integers(1, 6),
)
def test_packing_of_any_rows(lengths, room):
    """Every token is in one document, and documents never cross rows.

    Rows within the room keep theirs, and what cuDNN reads is in its order.
    """
    T = 24
    rows = []
    for row in lengths:
        kept, left = [], T
        for length in row:
            if left:
                kept.append(min(length, left))
                left -= kept[-1]
        rows.append([*kept, left] if left else kept)
    segment_ids, M = segments_of(rows), max(2, room)
    with sharding.use_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
        packing, merged = jax.device_get(jax.jit(pack, static_argnums=1)(segment_ids, room))
    lengths_Z, starts = packing.lengths_BM.reshape(-1), packing.starts_BM1.reshape(-1)
    found = np.array([len(row) for row in rows])
    count = int((found - merged).sum())
    assert count <= 4 * M and (found.sum() > 4 * M or not merged.any())
    assert all(merged[i] == 0 for i in range(4) if found[i] <= M)
    assert (
        (lengths_Z[:count] > 0).all()
        and (lengths_Z[count:] == 0).all()
        and lengths_Z.sum() == 4 * T
    )
    np.testing.assert_array_equal(starts[:count], np.cumsum(lengths_Z[:count]) - lengths_Z[:count])
    assert (starts[count:] == 4 * T).all()
    document, position = packing.document_BT.reshape(-1), packing.position_BT.reshape(-1)
    np.testing.assert_array_equal(starts[document] + position, np.arange(4 * T))
    for i, row in enumerate(rows):
        expected = np.repeat(np.minimum(np.arange(len(row)), len(row) - merged[i] - 1), row)
        np.testing.assert_array_equal(packing.document_BT[i] - packing.document_BT[i, 0], expected)
        assert i == 0 or packing.document_BT[i, 0] == packing.document_BT[i - 1, -1] + 1


@pytest.mark.usefixtures("kernels")
def test_too_many_documents_are_counted_and_merged_where_there_are_most():
    segment_ids = segments_of(
        [[3] * 16, [12] * 4, [48], [24, 24]]
    )  # 16 + 4 + 1 + 2, and room for 16
    with sharding.use_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
        packing, merged = pack(segment_ids, 4)
    np.testing.assert_array_equal(merged, [7, 0, 0, 0])
    np.testing.assert_array_equal(
        packing.lengths_BM.reshape(-1), [3] * 8 + [24] + [12] * 4 + [48, 24, 24]
    )


@pytest.mark.usefixtures("kernels")
def test_the_check_at_start_passes_what_is_right_and_refuses_what_is_not(monkeypatch):
    with sharding.use_mesh(sharding.make_mesh(1, 2, devices=jax.devices()[:2])):
        check_attention(MODEL, rows=2)

        def wrong_offsets(q, k, v, packing):  # as jax before 0.11.2 had them for grouped heads
            return forward_stand_in(q, k, v, packing._replace(starts_BM1=packing.starts_BM1 * 2))

        monkeypatch.setattr(flash_attention, "cudnn_forward", wrong_offsets)
        with pytest.raises(
            BadInput,
            match=r"'cudnn_packed' is wrong on this machine \(relative errors against xla: output "
            r".*set model.attention=xla",
        ):
            check_attention(MODEL, rows=2)
        monkeypatch.setattr(flash_attention, "cudnn_forward", forward_stand_in)
        monkeypatch.setattr(
            flash_attention,
            "cudnn_backward",
            lambda *args: tuple(2 * x for x in backward_stand_in(*args)),
        )
        with pytest.raises(BadInput, match=r"output \d.\de-03, d query 1.0e\+00"):
            check_attention(MODEL, rows=2)


def lowered_for_cuda(function, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_what_cudnn_is_told():
    """The call as compiled for a GPU: all documents of the batch in one list.

    Offsets are in elements, of queries and of grouped keys.
    """
    q, kv = (
        jax.ShapeDtypeStruct((3, 256, 8, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((3, 256, 2, 64), jnp.bfloat16),
    )
    with sharding.use_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):

        def loss(q, k, v, segment_ids):
            return (
                flash_attention.flash_attention(q, k, v, pack(segment_ids, 4)[0])
                .astype(jnp.float32)
                .sum()
            )

        text = lowered_for_cuda(
            jax.grad(loss, argnums=(0, 1, 2)), q, kv, kv, jax.ShapeDtypeStruct((3, 256), jnp.int32)
        )
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == 2 and "fmhaSoftmax(" in calls[0] and "fmhaSoftmaxBackward(" in calls[1]
    for call in calls:
        assert (
            r"\22mask_type\22: \22PADDING_CAUSAL\22" in call
            and r"\22max_seg_per_batch\22: 4" in call
            and r"\22fmha_scale\22: 0.125" in call
        )
        assert (
            call.count("tensor<3x4xi32>") == 2
            and call.count("tensor<3x5xi32>") == 2
            and "tensor<12x8x256xf32>" in call
        )
    assert "dense<512>" in text and "dense<128>" in text  # elements a token, of queries and of keys


@pytest.mark.parametrize("attention", ["cudnn", "cudnn_packed"])
@pytest.mark.parametrize(
    ("remat", "forwards"), [("full", 2), ("attention", 1), ("gate_up", 1), ("none", 1)]
)
def test_attention_runs_once_a_layer_unless_nothing_is_kept(remat, forwards, attention):
    model = dataclasses.replace(
        MODEL,
        remat=remat,
        head_dim=64,
        attention=attention,
        document_mask=attention == "cudnn_packed",
    )
    params = jax.eval_shape(lambda: random_params(dataclasses.replace(model, attention="xla")))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    with sharding.use_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):

        def loss(params, tokens):
            return (
                Llama(model)
                .apply({"params": params}, tokens, tokens, tokens, jnp.float32(1e4))
                .astype(jnp.float32)
                .sum()
            )

        text = lowered_for_cuda(jax.grad(loss), params, tokens)
    assert (
        text.count("__cudnn$fmhaSoftmax(") == forwards
        and text.count("__cudnn$fmhaSoftmaxBackward(") == 1
    )
