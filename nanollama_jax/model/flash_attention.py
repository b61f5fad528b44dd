"""Causal attention by cuDNN's flash kernels (16 bits).

Over whole rows (Ampere and later), or within documents through cuDNN's packed layout (Hopper and
later): cuDNN takes the start and length of every document of all rows, laid end to end, and never
looks across documents. It is called through the primitives under `jax.nn.dot_product_attention`,
because only these

- let remat policies name what is kept (output and statistics);
- let the layout be made once per step instead of in each layer. Made here, it is also right for
  grouped key/value heads in every jax version; before 0.11.2 jax's own is silently wrong for them;
- return the softmax statistics. cuDNN gives them as (documents, N, T), nearly all empty; they are
  kept as (B, T, N).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import checkpoint_name

from nanollama_jax.sharding import on_each_batch_shard


class Packing(NamedTuple):
    """The documents of one device's rows, numbered consecutively across rows.

    There is room for Z = B * M documents; the last ones may be empty.
    """

    lengths_BM: jax.Array  # int32 (B, M): Z lengths in tokens; 0 where there is no document
    starts_BM1: jax.Array  # int32 (B, M + 1): Z starts, from the first token; B * T if unused
    document_BT: jax.Array  # int32: which of the Z documents a token belongs to
    position_BT: jax.Array  # int32: the token's position in that document


def pack(segment_ids_BT: jax.Array, documents_per_row: int) -> tuple[Packing, jax.Array]:
    """The packing of rows with contiguous segments, and the documents merged per row (B, int32).

    Each device packs its own B rows and has room for B * M documents, where M is
    `documents_per_row`, but at least 2 (with 1, cuDNN uses another layout). If there are more, the
    last documents of the rows with the most are merged into one, so a row with at most M documents
    always keeps its own. More room than needed is costly: cuDNN's backward pass takes a workspace
    of room * T * N * H float32 (0.54 GB * M for 65,536 tokens of the 1B model). Every token belongs
    to a document, padding too: cuDNN leaves what it skips undefined. Trace inside
    `sharding.use_mesh`.
    """

    def local(segment_ids_BT):
        B, T = segment_ids_BT.shape
        M = max(2, documents_per_row)
        starts_document_BT = jnp.pad(
            segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True
        )
        in_row_BT = jnp.cumsum(starts_document_BT, axis=1, dtype=jnp.int32) - 1
        found_B = in_row_BT[:, -1] + 1
        limit_Z = jnp.arange(1, B * M + 1)
        fits_Z = jnp.minimum(found_B[:, None], limit_Z).sum(axis=0) <= B * M
        limit = jnp.max(jnp.where(fits_Z, limit_Z, 1))
        kept_B = jnp.minimum(found_B, limit)
        first_B = (jnp.cumsum(kept_B) - kept_B).astype(jnp.int32)
        document_BT = jnp.minimum(in_row_BT, limit - 1) + first_B[:, None]
        lengths_Z = jnp.zeros(B * M, jnp.int32).at[document_BT.reshape(-1)].add(1)
        starts_Z = jnp.cumsum(lengths_Z) - lengths_Z  # after the last: B * T
        starts_Z1 = jnp.pad(starts_Z, (0, B), constant_values=B * T)
        starts_BM1 = starts_Z1.reshape(B, M + 1).astype(jnp.int32)
        position_BT = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) - starts_Z[document_BT]
        return lengths_Z.reshape(B, M), starts_BM1, document_BT, position_BT, found_B - kept_B

    run = on_each_batch_shard(local, split_args=(True,), outputs=("rows",) * 5)
    *packing, merged_B = run(segment_ids_BT)
    return Packing(*packing), merged_B


@jax.custom_vjp
def flash_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, packing: Packing | None
) -> jax.Array:
    """Attention output (B, T, N, H), in the inputs' dtype; without a packing a row is one document.

    Output and statistics are named "attention" for remat. Trace inside `sharding.use_mesh`.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, packing)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, packing):
    def local(q_BTNH, k_BTKH, v_BTKH, packing):
        out_BTNH, stats = cudnn_forward(q_BTNH, k_BTKH, v_BTKH, packing)
        if packing is not None:
            stats = stats[packing.document_BT, :, packing.position_BT]
        return out_BTNH, stats

    run = on_each_batch_shard(local, split_args=(True,) * 4, outputs=("rows",) * 2)
    out_BTNH, stats = run(q_BTNH, k_BTKH, v_BTKH, packing)
    # Named inside the rule: a name on the result outside would not keep the kernel from rerunning
    out_BTNH, stats = checkpoint_name(out_BTNH, "attention"), checkpoint_name(stats, "attention")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, packing, out_BTNH, stats)


def _backward(residuals, d_out_BTNH):
    def local(q_BTNH, k_BTKH, v_BTKH, packing, out_BTNH, stats, d_out_BTNH):
        if packing is not None:
            B, T, N = stats.shape
            lengths_Z = packing.lengths_BM.reshape(-1)
            starts_Z = packing.starts_BM1.reshape(-1)[: lengths_Z.size]
            position_T = jnp.arange(T)
            token_ZT = jnp.minimum(starts_Z[:, None] + position_T, B * T - 1)
            inside_ZT = position_T < lengths_Z[:, None]
            stats_ZTN = jnp.where(inside_ZT[..., None], stats.reshape(B * T, N)[token_ZT], 0.0)
            stats = stats_ZTN.swapaxes(1, 2)
        return cudnn_backward(q_BTNH, k_BTKH, v_BTKH, packing, stats, out_BTNH, d_out_BTNH)

    run = on_each_batch_shard(local, split_args=(True,) * 7, outputs=("rows",) * 3)
    return *run(*residuals, d_out_BTNH), None


flash_attention.defvjp(_forward, _backward)


def cudnn_forward(q_BTNH, k_BTKH, v_BTKH, packing: Packing | None) -> tuple[jax.Array, jax.Array]:
    """On one device: the output (B, T, N, H) and float32 statistics.

    The statistics are the log-sum-exp of the scaled scores: (B, N, T), or with a packing (Z, N, T)
    by document and position in it, undefined beyond a document's end.
    """
    operands, options = _operands(q_BTNH, k_BTKH, v_BTKH, packing), _options(q_BTNH, packing)
    return tuple(cudnn._dot_product_attention_fwd_p.bind(*operands, **options, is_training=True))


def cudnn_backward(
    q_BTNH, k_BTKH, v_BTKH, packing: Packing | None, stats, out_BTNH, d_out_BTNH
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """On one device: the gradients of queries, keys and values."""
    operands = (*_operands(q_BTNH, k_BTKH, v_BTKH, packing), stats, out_BTNH, d_out_BTNH)
    return tuple(cudnn._dot_product_attention_bwd_p.bind(*operands, **_options(q_BTNH, packing)))


def _operands(q_BTNH, k_BTKH, v_BTKH, packing: Packing | None) -> tuple[jax.Array, ...]:
    def element_offsets(x_BTNH):
        """At most 2^31: a million tokens of 2,048 elements per device."""
        return packing.starts_BM1 * (x_BTNH.shape[2] * x_BTNH.shape[3])

    absent = jnp.zeros(0, q_BTNH.dtype)  # no bias, no page tables
    if packing is None:
        return q_BTNH, k_BTKH, v_BTKH, *[absent] * 7
    lengths = [packing.lengths_BM] * 2
    offsets = element_offsets(q_BTNH), element_offsets(k_BTKH)
    return q_BTNH, k_BTKH, v_BTKH, absent, *lengths, *offsets, absent, absent


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
