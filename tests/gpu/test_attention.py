"""cuDNN's attention within documents, forward and backward, for any documents.

It is correct, reads nothing undefined, and sees nothing of other documents.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanollama_jax.model import ModelConfig
from nanollama_jax.model.attention import attend, documents_of, merged_documents
from tests.gpu import needs_gpu

pytestmark = needs_gpu
T, ROOM, LONG = 512, 8, 16_384

# Lengths of each row's documents. For attention, padding is one more document: the last segment
ROWS = {
    "ragged": [[5, 1, 100, 406], [T], [1, 1, 1, 509], [200, 312]],
    "one document": [[T]] * 4,
    "full": [[64] * ROOM] * 4,
    "full, unequal": [
        [1] * 23 + [T - 23],
        [T // 2, T // 2],
        [T],
        [130, 126, 200, 46, 10],
    ],  # 32 documents in the room for 32
    "padded": [[100, 412], [300, 1, 211], [511, 1], [2, 510]],
}
HEADS = {
    "grouped, 64": (8, 2, 64),
    "grouped, 128": (4, 2, 128),
    "one key head, 64": (8, 1, 64),
    "each its own, 64": (4, 4, 64),
}


def config_of(heads, **options):
    N, K, H = heads
    shape = dict(
        vocab_size=8,
        num_layers=1,
        d_model=N * H,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        ffn_dim=8,
    )
    return ModelConfig(
        **shape, **dict(dtype="bfloat16", attention="cudnn_packed", packed_documents=ROOM) | options
    )


def segments_of(rows):
    return np.array([np.repeat(np.arange(1, len(row) + 1), row) for row in rows], np.int32)


def draw(config, B, T, seed=0):
    """Queries, keys, values, the output's gradient."""
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    return [
        jax.random.normal(key, (B, T, n, config.head_dim), config.dtype)
        for key, n in zip(keys, heads, strict=True)
    ]


@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_gpu_exclude_nondeterministic_ops": True}
)
def run_deterministic(config, segment_ids, q, k, v, d_out):
    return run(config, segment_ids, q, k, v, d_out)


@functools.partial(jax.jit, static_argnums=0)
def run(config, segment_ids, q, k, v, d_out):
    """Output, and gradients of queries, keys and values."""
    out, backward = jax.vjp(
        lambda *qkv: attend(*qkv, documents_of(segment_ids, config), config), q, k, v
    )
    return out, *backward(d_out)


def expected(config, segment_ids, arrays):
    oracle = dataclasses.replace(config, attention="xla", dtype="float32")
    with jax.default_matmul_precision(
        "highest"
    ):  # a GPU's float32 products are otherwise rounded to 10 bits
        return run(oracle, segment_ids, *(x.astype(jnp.float32) for x in arrays))


def relative_errors(found, right):
    found, right = ([np.asarray(x, np.float32) for x in each] for each in (found, right))
    return [
        float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, right, strict=True)
    ]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_output_and_gradients_are_those_of_float32(one_device, rows, heads):
    config, segment_ids = config_of(heads), segments_of(rows)
    assert merged_documents(segment_ids, config) == 0
    arrays = draw(config, *segment_ids.shape)
    errors = relative_errors(
        run(config, segment_ids, *arrays), expected(config, segment_ids, arrays)
    )
    assert max(errors) < 1e-2, (
        f"output, d query, d key, d value: {errors}; rounding to bfloat16 is 3e-3"
    )


def test_plain_causal_is_that_of_float32(one_device):
    config = config_of(HEADS["grouped, 64"], attention="cudnn", document_mask=False)
    segment_ids = np.ones((4, T), np.int32)
    arrays = draw(config, *segment_ids.shape)
    errors = relative_errors(
        run(config, segment_ids, *arrays), expected(config, segment_ids, arrays)
    )
    assert max(errors) < 1e-2, errors


def test_long_rows_of_the_1b_shape(one_device):
    """16,384 tokens, where offsets are large: late in the first row, and at the end of the last."""
    config = config_of((32, 4, 64), packed_documents=4)
    begins, late, last = LONG - LONG // 16, LONG // 32, LONG // 64
    segment_ids = segments_of(
        [[begins, late, LONG // 32], [LONG // 4, LONG // 4, LONG // 2 - last, last]]
    )
    arrays = draw(config, *segment_ids.shape)
    found = run(config, segment_ids, *arrays)
    for row, start, end in (
        (0, begins, begins + late),
        (1, LONG - last, LONG),
    ):  # alone: the oracle's scores of a whole row would be 34 GB
        cut = [x[row : row + 1, start:end] for x in arrays]
        right = expected(config, np.ones((1, end - start), np.int32), cut)
        errors = relative_errors([x[row : row + 1, start:end] for x in found], right)
        assert max(errors) < 1e-2, (row, start, end, errors)


@pytest.mark.parametrize(
    "rows", [ROWS["ragged"], ROWS["one document"]], ids=["ragged", "one document"]
)
def test_memory_full_of_nan_changes_nothing(one_device, rows):
    """cuDNN leaves empty slots and statistics past a document's end unwritten: never read them."""
    config, segment_ids = config_of(HEADS["grouped, 64"]), segments_of(rows)
    arrays = draw(config, *segment_ids.shape)
    poison()
    found = run(config, segment_ids, *arrays)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)
    assert max(relative_errors(found, expected(config, segment_ids, arrays))) < 1e-2


def poison():
    """Half of the free memory, filled with NaN and freed."""
    stats = jax.devices()[0].memory_stats()
    free = stats["bytes_limit"] - stats["bytes_in_use"] if stats else 2**28
    block = 2**26
    blocks = [jnp.full(block // 4, jnp.nan, jnp.float32) for _ in range(max(1, free // 2 // block))]
    for one in jax.block_until_ready(blocks):
        one.delete()


def test_no_bit_of_another_documents_tokens_is_seen(one_device):
    """Changing all inputs of one document leaves the others' outputs and gradients bit-identical.

    Deterministic, since otherwise gradients of queries are summed in the order threads arrive.
    """
    config, segment_ids = config_of(HEADS["grouped, 64"]), segments_of(ROWS["ragged"])
    arrays, others = draw(config, *segment_ids.shape), draw(config, *segment_ids.shape, seed=1)
    before = run_deterministic(config, segment_ids, *arrays)
    for row, document in ((0, 3), (1, 1), (2, 4), (3, 1)):
        inside = np.zeros(segment_ids.shape, bool)
        inside[row] = segment_ids[row] == document
        after = run_deterministic(
            config,
            segment_ids,
            *(
                jnp.where(inside[..., None, None], b, a)
                for a, b in zip(arrays, others, strict=True)
            ),
        )
        for name, a, b in zip(
            ("output", "d query", "d key", "d value"), before, after, strict=True
        ):
            a, b = np.asarray(a), np.asarray(b)
            assert a[~inside].tobytes() == b[~inside].tobytes(), (
                f"{name} outside of document {document} of row {row} changed"
            )
            assert (a[inside] != b[inside]).any()
