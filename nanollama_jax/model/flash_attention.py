"""Causal attention by cuDNN's flash kernels (16 bits): over whole rows (Ampere and later), or within documents, by its packed layout (Hopper and
later), which jax has only behind its public function.

Packed, cuDNN takes, for the documents of all rows one after the other, where each begins and how long it is, and never looks across. It is called
through the primitives under `jax.nn.dot_product_attention`, for these reasons. What remat is to keep, output and statistics, can be named. The
layout is made once a step instead of in each layer; made here, it is right for grouped key/value heads in every jax (before 0.11.2 jax's own is
silently wrong for them). And the softmax statistics, which cuDNN gives as (documents, N, T), nearly all empty, are kept as (B, T, N).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import checkpoint_name

from nanollama_jax.sharding import on_each_batch_shard


class Packing(NamedTuple):
    """The documents of a device's rows, numbered on from row to row; there is room for Z = B * M of them, and the last may be empty."""

    lengths_BM: jax.Array  # int32 (B, M): Z lengths, tokens; 0 where there is no document
    starts_BM1: jax.Array  # int32 (B, M + 1): Z starts, tokens from the device's first; B * T where there is no document
    document_BT: jax.Array  # int32: which of the Z documents a token belongs to
    position_BT: jax.Array  # int32: its position in that document


def pack(segment_ids_BT: jax.Array, documents_per_row: int) -> tuple[Packing, jax.Array]:
    """The packing of rows whose segments are contiguous, made by each device for its own rows, and how many documents found no room (B, int32).

    Each device has room for B * `documents_per_row` documents of its B rows (M in the shapes; at least 2: with one, cuDNN's layout is another).
    Where they are more, the rows with the most documents have their last ones taken for one, so that a row of M or fewer always keeps its own.
    The room is not made large to be safe: cuDNN's backward pass takes room * T * N * H float32 for its work (0.54 GB * M for 65,536 tokens of the
    1B model). Every token is in a document, padding too: what cuDNN leaves out is undefined. Must be traced inside `sharding.use_mesh`.
    """

    def local(segment_ids_BT):
        B, T = segment_ids_BT.shape
        M = max(2, documents_per_row)
        begins_BT = jnp.pad(
            segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True
        )
        in_row_BT = jnp.cumsum(begins_BT, axis=1, dtype=jnp.int32) - 1
        found_B = in_row_BT[:, -1] + 1
        limit_Z = jnp.arange(1, B * M + 1)
        fits_Z = jnp.minimum(found_B[:, None], limit_Z).sum(axis=0) <= B * M
        limit = jnp.max(jnp.where(fits_Z, limit_Z, 1))
        kept_B = jnp.minimum(found_B, limit)
        document_BT = jnp.minimum(in_row_BT, limit - 1) + (jnp.cumsum(kept_B) - kept_B)[
            :, None
        ].astype(jnp.int32)
        lengths_Z = jnp.zeros(B * M, jnp.int32).at[document_BT.reshape(-1)].add(1)
        starts_Z = jnp.cumsum(lengths_Z) - lengths_Z  # after the last: B * T
        starts_BM1 = (
            jnp.pad(starts_Z, (0, B), constant_values=B * T).reshape(B, M + 1).astype(jnp.int32)
        )
        position_BT = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) - starts_Z[document_BT]
        return lengths_Z.reshape(B, M), starts_BM1, document_BT, position_BT, found_B - kept_B

    *packing, merged_B = on_each_batch_shard(local, split_args=(True,), outputs=("rows",) * 5)(
        segment_ids_BT
    )
    return Packing(*packing), merged_B


@jax.custom_vjp
def flash_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, packing: Packing | None
) -> jax.Array:
    """Attention output (B, T, N, H), bfloat16 like its inputs; without a packing each row is one document. Output and statistics carry the name
    "attention" for remat policies. Must be traced inside `sharding.use_mesh`."""
    return _forward(q_BTNH, k_BTKH, v_BTKH, packing)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, packing):
    def local(q_BTNH, k_BTKH, v_BTKH, packing):
        out_BTNH, stats = cudnn_forward(q_BTNH, k_BTKH, v_BTKH, packing)
        return out_BTNH, stats if packing is None else stats[
            packing.document_BT, :, packing.position_BT
        ]

    out_BTNH, stats = on_each_batch_shard(local, split_args=(True,) * 4, outputs=("rows",) * 2)(
        q_BTNH, k_BTKH, v_BTKH, packing
    )
    # Named here, in the rule: a name put on the result outside does not keep the kernel from running again
    out_BTNH, stats = checkpoint_name(out_BTNH, "attention"), checkpoint_name(stats, "attention")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, packing, out_BTNH, stats)


def _backward(residuals, d_out_BTNH):
    def local(q_BTNH, k_BTKH, v_BTKH, packing, out_BTNH, stats, d_out_BTNH):
        if packing is not None:
            B, T, N = stats.shape
            lengths_Z, starts_Z = (
                packing.lengths_BM.reshape(-1),
                packing.starts_BM1.reshape(-1)[: packing.lengths_BM.size],
            )
            position_T = jnp.arange(T)
            token_ZT = jnp.minimum(starts_Z[:, None] + position_T, B * T - 1)
            stats_ZTN = jnp.where(
                (position_T < lengths_Z[:, None])[..., None], stats.reshape(B * T, N)[token_ZT], 0.0
            )
            stats = stats_ZTN.swapaxes(1, 2)
        return cudnn_backward(q_BTNH, k_BTKH, v_BTKH, packing, stats, out_BTNH, d_out_BTNH)

    run = on_each_batch_shard(local, split_args=(True,) * 7, outputs=("rows",) * 3)
    return *run(*residuals, d_out_BTNH), None


flash_attention.defvjp(_forward, _backward)


def cudnn_forward(q_BTNH, k_BTKH, v_BTKH, packing: Packing | None) -> tuple[jax.Array, jax.Array]:
    """Output (B, T, N, H), and float32 statistics, log-sum-exp of the scaled scores: (B, N, T), or by document and position in it, (Z, N, T),
    undefined beyond a document's end. Of one device."""
    operands, options = _operands(q_BTNH, k_BTKH, v_BTKH, packing), _options(q_BTNH, packing)
    return tuple(cudnn._dot_product_attention_fwd_p.bind(*operands, **options, is_training=True))


def cudnn_backward(
    q_BTNH, k_BTKH, v_BTKH, packing: Packing | None, stats, out_BTNH, d_out_BTNH
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values. Of one device."""
    operands = (*_operands(q_BTNH, k_BTKH, v_BTKH, packing), stats, out_BTNH, d_out_BTNH)
    return tuple(cudnn._dot_product_attention_bwd_p.bind(*operands, **_options(q_BTNH, packing)))


def _operands(q_BTNH, k_BTKH, v_BTKH, packing: Packing | None) -> tuple[jax.Array, ...]:
    def elements(x_BTNH):
        """Offsets count elements. At most 2^31: a million tokens of 2,048 a device."""
        return packing.starts_BM1 * (x_BTNH.shape[2] * x_BTNH.shape[3])

    absent = jnp.zeros(0, q_BTNH.dtype)  # no bias, no page tables
    if packing is None:
        return q_BTNH, k_BTKH, v_BTKH, *[absent] * 7
    return (
        q_BTNH,
        k_BTKH,
        v_BTKH,
        absent,
        packing.lengths_BM,
        packing.lengths_BM,
        elements(q_BTNH),
        elements(k_BTKH),
        absent,
        absent,
    )


def _options(q_BTNH, packing: Packing | None) -> dict:
    mask = cudnn.MaskType.CAUSAL if packing is None else cudnn.MaskType.PADDING_CAUSAL
    return dict(
        scale=q_BTNH.shape[-1] ** -0.5,
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=mask,
        layout=cudnn.AttentionLayout.BTNH.value,
        sliding_window_length=None,
    )
