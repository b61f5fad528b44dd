"""Where each head looks.

Attention probabilities of one text, pooled to a small square per head, and how far back each head
looks on average. The model runs layer by layer, and each layer's probabilities are made and pooled
in blocks of queries: the whole (N, T, S) array, 34 GB per layer for 32 heads and 16,384 tokens,
never exists. All layers share two compiled programs.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanollama_jax import sharding
from nanollama_jax.errors import BadInput
from nanollama_jax.files import whole_file
from nanollama_jax.infer.decode import for_inference
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import Block, unstack_layers
from nanollama_jax.model.rope import rope_table
from nanollama_jax.tokenizer import Tokenizer

QUERIES_PER_BLOCK = 64  # 134 MB of probabilities at 32 heads and 16,384 tokens
LOWEST_SHARE = 1e-4  # lower end of the color scale


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Averages over the T queries of a text, float32. Bins are `bin_width` tokens wide.

    The last bin may be narrower.
    """

    num_tokens: int
    bin_width: int
    pooled_LNQS: np.ndarray  # a query bin's share of attention on each key bin; rows sum to 1
    distance_LN: np.ndarray  # tokens: mean over queries q of the sum over keys s of p(s|q) (q - s)
    first_share_LN: np.ndarray  # share of attention on the first token, which is BOS


def read_tokens(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    context_length: int,
    max_tokens: int | None = None,
) -> tuple[list[int], int]:
    """The ids of a UTF-8 text file, with BOS, cut to `max_tokens`; and their number before the cut.

    `max_tokens` defaults to the context length.
    """
    if max_tokens is not None and not 2 <= max_tokens <= context_length:
        raise BadInput(
            f"max_tokens={max_tokens} must be from 2 to the checkpoint's context of "
            f"{context_length:,} tokens"
        )
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}:{line}: invalid UTF-8: convert the file to UTF-8") from error
    if not text.strip():
        raise BadInput(f"{path} is empty: give a file with some text")
    ids = tokenizer.encode(text, bos=True)
    return ids[: max_tokens or context_length], len(ids)


def attention_maps(
    model: ModelConfig, params: Any, ids: Sequence[int], rope_theta: float, bins: int = 128
) -> AttentionMaps:
    """The maps of every layer and head for one text, with at most `bins` bins per side.

    `params` are training's, on the host or on devices.
    """
    if not 1 <= bins <= 1024:
        raise BadInput(f"bins={bins} must be from 1 to 1024")
    model = for_inference(model, jax.default_backend())
    dtype = model.dtype
    params = unstack_layers(params)
    T = len(ids)
    width = -(-T // bins)
    rope = rope_table(jnp.arange(T)[None], model.head_dim, jnp.float32(rope_theta))
    hidden_BTD = jnp.asarray(params["embedding"]["kernel"][np.asarray(ids)][None], dtype)
    layers = []
    for i in range(model.num_layers):
        with sharding.use_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
            hidden_BTD, q_BTNH, k_BTKH = _run_block(model, params[f"layers_{i}"], hidden_BTD, rope)
        layers.append(jax.device_get(_pool(q_BTNH[0], k_BTKH[0], width)))
    return AttentionMaps(T, width, *(np.stack(each) for each in zip(*layers, strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def _run_block(
    model: ModelConfig, params: Any, hidden_BTD: jax.Array, rope: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer: its output, and its queries and keys after RoPE."""
    ones_BT = jnp.ones(hidden_BTD.shape[:2], jnp.int32)  # positions matter only with a cache
    (hidden_BTD, _), kept = Block(model).apply(
        {"params": params}, hidden_BTD, ones_BT, None, rope, mutable=["intermediates"]
    )
    return hidden_BTD, *kept["intermediates"]["attention"]["q_and_k"][0]


@functools.partial(jax.jit, static_argnums=2)
def _pool(q_TNH: jax.Array, k_TKH: jax.Array, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pooled probabilities (N, bins, bins), mean distance (N,), mean share of the first token (N,).

    All float32.
    """
    T, N, H = q_TNH.shape
    K, num_bins = k_TKH.shape[1], -(-T // width)
    padding = (0, num_bins * width - T), (0, 0), (0, 0)
    k_KSH = jnp.pad(k_TKH, padding).swapaxes(0, 1)  # padding follows every query: causally masked
    key_S = jnp.arange(num_bins * width)

    def one_query(q_and_position):
        q_NH, position = q_and_position
        q_KGH = (q_NH * jnp.asarray(H**-0.5, q_NH.dtype)).reshape(K, N // K, H)
        scores_KGS = jnp.einsum("KGH,KSH->KGS", q_KGH, k_KSH, preferred_element_type=jnp.float32)
        back_S = position - key_S
        p_KGS = jax.nn.softmax(jnp.where(back_S >= 0, scores_KGS, -jnp.inf), axis=-1)
        p_NS = p_KGS.reshape(N, num_bins * width)
        pooled_NS = p_NS.reshape(N, num_bins, width).sum(axis=-1)
        return pooled_NS, (p_NS * back_S).sum(axis=-1), p_NS[:, 0]

    pooled_TNS, distance_TN, first_TN = jax.lax.map(
        one_query, (q_TNH, jnp.arange(T)), batch_size=QUERIES_PER_BLOCK
    )
    pooled_TNS = jnp.pad(pooled_TNS, padding)
    queries_Q = jnp.minimum(width, T - width * jnp.arange(num_bins))  # the last bin may be narrower
    pooled_QNS = pooled_TNS.reshape(num_bins, width, N, num_bins).sum(axis=1)
    pooled_NQS = pooled_QNS.swapaxes(0, 1) / queries_Q[:, None]
    return pooled_NQS, distance_TN.mean(axis=0), first_TN.mean(axis=0)


def choose_layers(num_layers: int, wanted: str | None) -> list[int]:
    """The layers to draw: a comma-separated list, or by default up to 8, evenly spaced."""
    if wanted is None:
        return sorted({round(i) for i in np.linspace(0, num_layers - 1, min(8, num_layers))})
    try:
        layers = [int(number) for number in wanted.split(",")]
    except ValueError:
        layers = [-1]
    if not all(0 <= layer < num_layers for layer in layers):
        raise BadInput(
            f"layers={wanted!r}: give numbers from 0 to {num_layers - 1}, separated by commas"
        )
    return layers


def plot(maps: AttentionMaps, layers: Sequence[int], title: str, path: str | os.PathLike) -> None:
    """A PNG of heat maps, a row per layer of `layers` and a column per head.

    Below, the mean attention distance of every layer.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num_layers, num_heads = maps.distance_LN.shape
    side = 1.2 if num_heads > 12 else 1.6  # inches; at 110 dpi about one dot per bin
    width, map_height = max(10, num_heads * side + 1.5), len(layers) * side + 1
    font = max(9, 0.4 * width)  # a wide picture is viewed from further away
    with plt.rc_context(
        {
            "font.size": font,
            "figure.titlesize": font,
            "figure.constrained_layout.h_pad": 0.03,
            "figure.constrained_layout.w_pad": 0.03,
        }
    ):
        figure = plt.figure(figsize=(width, map_height + 4), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(map_height, 4))
        _draw_maps(top, maps, layers)
        axis = bottom.subplots()
        axis.plot(
            maps.distance_LN,
            ".",
            color="C0",
            alpha=0.5,
            label=["each head"] + [None] * (num_heads - 1),
        )
        axis.plot(
            maps.distance_LN.mean(axis=1), color="black", marker="o", label="mean of the heads"
        )
        axis.set(
            xlabel="layer",
            ylabel="mean attention distance (tokens)",
            xticks=range(num_layers),
            ylim=(0, None),
        )
        axis.grid(alpha=0.3)
        axis.legend()
        figure.suptitle(title, parse_math=False)  # contains file names
        with whole_file(path) as file:
            figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def _draw_maps(figure: Any, maps: AttentionMaps, layers: Sequence[int]) -> None:
    from matplotlib.colors import LogNorm

    num_heads, bins = maps.pooled_LNQS.shape[1:3]
    axes = figure.subplots(len(layers), num_heads, sharex=True, sharey=True, squeeze=False)
    future, end = np.triu(np.ones((bins, bins), bool), k=1), bins * maps.bin_width
    for (row, head), axis in np.ndenumerate(axes):
        pooled = np.ma.array(
            np.maximum(maps.pooled_LNQS[layers[row], head], LOWEST_SHARE), mask=future
        )
        image = axis.imshow(
            pooled,
            norm=LogNorm(LOWEST_SHARE, 1),
            extent=(0, end, end, 0),
            cmap="magma",
            interpolation="nearest",
        )
        axis.set(
            xlim=(0, maps.num_tokens),
            ylim=(maps.num_tokens, 0),
            xticks=(0, maps.num_tokens),
            yticks=(0, maps.num_tokens),
        )
        axis.tick_params(labelbottom=False, labelleft=False, length=0)
        if row == 0:
            axis.set_title(f"head {head}", fontsize="medium")
        if head == 0:
            axis.set_ylabel(f"layer {layers[row]}")
    figure.supxlabel(f"key (tokens, 0 to {maps.num_tokens:,})", fontsize="medium")
    figure.supylabel(f"query (tokens, 0 to {maps.num_tokens:,})", fontsize="medium")
    figure.colorbar(
        image,
        ax=axes,
        label=f"share of attention on {maps.bin_width} token(s)",
        aspect=40,
        fraction=0.02,
        pad=0.005,
    )
