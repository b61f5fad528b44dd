"""The ceilings of this GPU at the model's shapes.

Matrix products with each weight, forward and for both gradients, and attention by backend.
"""

import functools
import traceback
from typing import Any

import numpy as np

from benchmarks.cases import Case, Row, one_line
from benchmarks.documents import draw_batches, squared_lengths
from benchmarks.timing import seconds_per_call
from benchmarks.train import TOKENS
from nanollama_jax.recipes import MODELS

LOSS_CHUNK = 8192  # tokens, the default of loss.chunk_tokens
ROOM = (4, 8, 16, 32)  # documents a row: model.packed_documents
PRODUCT_COLUMNS = {
    f"{name}_tflops": (f"{heading} TFLOP/s", ".0f")
    for name, heading in (("forward", "forward"), ("dx", "d input"), ("dw", "d weight"))
}
ATTENTION_COLUMNS = {
    "forward_ms": ("fwd ms", ".3f"),
    "backward_ms": ("bwd ms", ".3f"),
    "forward_tflops": ("fwd TFLOP/s", ".0f"),
    "backward_tflops": ("bwd TFLOP/s", ".0f"),
    "spread": ("+-", ".1%"),
    "extra_gb": ("extra GB", ".2f"),
    "merged": ("merged", ".0f"),
    "error_forward": ("err out", ".1e"),
    "error_dq": ("err dq", ".1e"),
    "error_dk": ("err dk", ".1e"),
    "error_dv": ("err dv", ".1e"),
}
COLUMNS = PRODUCT_COLUMNS | ATTENTION_COLUMNS
NOTES = (
    "Attention's TFLOP/s count causal attention within documents: 4 H per pair forward, 10 H",
    "backward. extra GB: the peak of forward and backward above inputs, outputs and gradients.",
    "err: norm of the difference / norm, bfloat16 against float32 xla, two rows of 2,048.",
)


def gpu_cases(scale: str, rounds: int) -> list[Case]:
    shape = MODELS[scale]
    products = Case("products", measure_products, (dict(scale=scale, rounds=rounds),))

    def attention(seq_len: int, backend: str, room: int, ragged: bool) -> Case:
        rows = TOKENS // seq_len
        heads = tuple(shape[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
        about = dict(
            backend=backend,
            rows=rows,
            seq_len=seq_len,
            heads=heads,
            room=room,
            ragged=ragged,
            rounds=rounds,
        )
        name = f"{backend}, {rows} x {seq_len}"
        if backend == "cudnn_packed":
            name += f", room {room}, {'documents' if ragged else 'whole rows'}"
        return Case(name, measure_attention, (about,))

    packed = [
        (seq_len, "cudnn_packed", room, ragged)
        for room in (8, 16, 4, 32)  # model.packed_documents
        for ragged in (True, False)
        for seq_len in (4096, 16_384)
    ]
    plain = [(seq_len, "cudnn", 8, False) for seq_len in (4096, 16_384)]
    return [products, *(attention(*about) for about in (*plain, *packed))]


def product_shapes(shape: dict, tokens: int, chunk: int) -> dict[str, tuple[int, int, int, str]]:
    """name -> (tokens, width in, width out, dtype out) of the products with weights.

    Logits come out in float32, as in the loss.
    """
    D, F, H = shape["d_model"], shape["ffn_dim"], shape["head_dim"]
    N, K = shape["num_heads"], shape["num_kv_heads"]
    return {
        "qkv": (tokens, D, (N + 2 * K) * H, "bfloat16"),
        "o": (tokens, N * H, D, "bfloat16"),
        "gate_up": (tokens, D, 2 * F, "bfloat16"),
        "down": (tokens, F, D, "bfloat16"),
        "head": (tokens, D, shape["vocab_size"], "bfloat16"),
        "head, a chunk": (chunk, D, shape["vocab_size"], "float32"),
    }


def measure_products(
    *, scale: str, rounds: int, tokens: int = TOKENS, chunk: int = LOSS_CHUNK
) -> Row:
    """A case whose row holds the rows of all products, under `table`."""
    found = []
    for name, shape in product_shapes(MODELS[scale], tokens, chunk).items():
        row = {"case": f"{name}, {shape[0]} x {shape[1]} x {shape[2]}"}
        try:
            seconds = time_products(*shape, rounds=rounds)
        except Exception as error:  # a failed product is a row like any other
            traceback.print_exc()
            row["error"] = one_line(error)
        else:
            flops = 2.0 * shape[0] * shape[1] * shape[2]
            row |= {f"{kind}_ms": 1e3 * value for kind, value in seconds.items()}
            row |= {f"{kind}_tflops": flops / value / 1e12 for kind, value in seconds.items()}
        found.append(row)
    return {"table": found}


def time_products(
    tokens: int, width_in: int, width_out: int, dtype_out: str, rounds: int
) -> dict[str, float]:
    """Seconds of x @ w, and of the gradients of x and of w, on normal random bfloat16."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def draw():
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = ((tokens, width_in), (width_in, width_out), (tokens, width_out))
        return tuple(
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(keys, shapes, strict=True)
        )

    x_TD, w_DF, dy_TF = draw()
    products = {
        "forward": ("TD,DF->TF", x_TD, w_DF, dtype_out),
        "dx": ("TF,DF->TD", dy_TF, w_DF, "bfloat16"),
        "dw": ("TD,TF->DF", x_TD, dy_TF, "bfloat16"),
    }
    seconds = {}
    for name, (spec, a, b, dtype) in products.items():
        run = jax.jit(functools.partial(jnp.einsum, spec, preferred_element_type=dtype))
        seconds[name], _ = seconds_per_call(
            functools.partial(run, a, b), jax.block_until_ready, rounds
        )
    return seconds


def measure_attention(
    *,
    backend: str,
    rows: int,
    seq_len: int,
    heads: tuple[int, int, int],
    room: int,
    ragged: bool,
    rounds: int,
    dtype: str = "bfloat16",
    check: tuple[int, int] = (2, 2048),
) -> Row:
    """A case: time and memory of forward and backward at (rows, seq_len).

    Then the errors at the rows and length of `check`.
    """
    import jax

    from nanollama_jax import sharding

    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    with sharding.use_mesh(mesh):
        attention = Attention(backend, heads, room, dtype)
        segment_ids = segments(rows, seq_len, ragged)
        arrays = attention.draw(rows, seq_len)
        documents, merged = attention.documents(segment_ids)
        jax.block_until_ready(arrays)
        forward, spread = seconds_per_call(
            lambda: attention.forward(*arrays[:3], documents), jax.block_until_ready, rounds
        )
        both, _ = seconds_per_call(
            lambda: attention.both(*arrays, documents), jax.block_until_ready, rounds
        )
        # Half the square, 4 H per pair
        flops = 2.0 * heads[0] * heads[2] * squared_lengths(segment_ids)
        row = {
            "forward_ms": 1e3 * forward,
            "backward_ms": 1e3 * (both - forward),
            "spread": spread,
            "merged": float(merged),
        }
        row |= {
            "forward_tflops": flops / forward / 1e12,
            "backward_tflops": 2.5 * flops / (both - forward) / 1e12,
        }
        if memory := jax.devices()[0].memory_stats():
            needed = 2 * sum(x.nbytes for x in arrays)
            row["extra_gb"] = (memory["peak_bytes_in_use"] - needed) / 1e9
        try:
            row |= attention.errors(*check, ragged)
        except Exception:  # the times are still valid
            traceback.print_exc()
        return row


def segments(rows: int, seq_len: int, ragged: bool) -> np.ndarray:
    """Whole rows, or documents with the lengths of documents.py: the same for all cases."""
    if not ragged:
        return np.ones((rows, seq_len), np.int32)
    (batch,) = draw_batches(1, rows, seq_len, vocab_size=1000)
    return batch["segment_ids"]


class Attention:
    """`model/attention.py` for one backend and shape of heads, jitted.

    Use it inside `sharding.use_mesh`.
    """

    def __init__(self, backend: str, heads: tuple[int, int, int], room: int, dtype: str):
        import jax

        from nanollama_jax.model import ModelConfig
        from nanollama_jax.model.attention import attend

        N, K, H = self.heads = heads
        shape = dict(
            vocab_size=8,
            num_layers=1,
            d_model=N * H,
            num_heads=N,
            num_kv_heads=K,
            head_dim=H,
            ffn_dim=8,
        )
        self.config = ModelConfig(
            **shape,
            dtype=dtype,
            attention=backend,
            document_mask=backend != "cudnn",
            packed_documents=room,
        )

        def run(q, k, v, documents):
            return attend(q, k, v, documents, self.config)

        def both(q, k, v, d_out, documents):
            out, backward = jax.vjp(lambda q, k, v: run(q, k, v, documents), q, k, v)
            return out, *backward(d_out)

        self.forward, self.both = jax.jit(run), jax.jit(both)

    def draw(self, rows: int, seq_len: int) -> tuple[Any, ...]:
        """Normal random queries, keys, values and gradients of the output."""
        import jax

        N, K, H = self.heads

        @jax.jit
        def draw():
            keys = jax.random.split(jax.random.key(0), 4)
            return tuple(
                jax.random.normal(key, (rows, seq_len, n, H), self.config.dtype)
                for key, n in zip(keys, (N, K, K, N), strict=True)
            )

        return draw()

    def documents(self, segment_ids_BT: np.ndarray) -> tuple[Any, Any]:
        """The layout that `attend` takes, and how many documents were merged."""
        import jax

        from nanollama_jax.model.attention import documents_of, merged_documents

        @jax.jit
        def layout(ids):
            return documents_of(ids, self.config), merged_documents(ids, self.config)

        return layout(segment_ids_BT)

    def errors(self, rows: int, seq_len: int, ragged: bool) -> Row:
        """Relative errors of the output and gradients against xla in float32.

        Empty if documents were merged, since then they must differ.
        """
        import jax
        import jax.numpy as jnp

        from nanollama_jax.model.attention import xla_attention

        segment_ids, arrays = segments(rows, seq_len, ragged), self.draw(rows, seq_len)
        documents, merged = self.documents(segment_ids)
        if merged:
            return {}

        @jax.jit
        def expected(q, k, v, d_out):
            q, k, v, d_out = (x.astype(jnp.float32) for x in (q, k, v, d_out))
            out, backward = jax.vjp(
                lambda q, k, v: xla_attention(q, k, v, jnp.asarray(segment_ids)), q, k, v
            )
            return out, *backward(d_out)

        # By default a GPU's float32 products have 19 bits
        with jax.default_matmul_precision("highest"):
            right = expected(*arrays)
        found = self.both(*arrays, documents)
        errors = {}
        for name, ours, xla in zip(("forward", "dq", "dk", "dv"), found, right, strict=True):
            difference = (ours.astype(jnp.float32) - xla).reshape(-1)
            error = jnp.linalg.norm(difference) / jnp.linalg.norm(xla.reshape(-1))
            errors[f"error_{name}"] = float(error)
        return errors
