"""Hugging Face's names and layout of a Llama's tensors, and the checks that every export makes."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from nanollama_jax.checkpoint.loading import Loaded, difference
from nanollama_jax.errors import BadInput
from nanollama_jax.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor lies in our unrolled parameters.

    Their matrices are (out, in). With `input_axes` 0 a tensor has our layout.
    """

    path: str
    input_axes: int = 0  # how many leading axes of ours are inputs
    part: tuple[slice | int, ...] = ()  # of a fused projection


def hf_names(model: ModelConfig) -> dict[str, Place]:
    """Hugging Face name -> place, in the order of the model."""
    N, K, every = model.num_heads, model.num_kv_heads, slice(None)
    qkv = {"q": slice(0, N), "k": slice(N, N + K), "v": slice(N + K, N + 2 * K)}
    layer = {
        "input_layernorm.weight": Place("attention_norm/scale"),
        **{
            f"self_attn.{name}_proj.weight": Place("attention/qkv/kernel", 1, (every, heads))
            for name, heads in qkv.items()
        },
        "self_attn.o_proj.weight": Place("attention/o/kernel", 2),
        "post_attention_layernorm.weight": Place("ffn_norm/scale"),
        "mlp.gate_proj.weight": Place("ffn/gate_up/kernel", 1, (every, 0)),
        "mlp.up_proj.weight": Place("ffn/gate_up/kernel", 1, (every, 1)),
        "mlp.down_proj.weight": Place("ffn/down/kernel", 1),
    }
    names = {"model.embed_tokens.weight": Place("embedding/kernel")}
    for i in range(model.num_layers):
        names |= {
            f"model.layers.{i}.{name}": dataclasses.replace(place, path=f"layers_{i}/{place.path}")
            for name, place in layer.items()
        }
    return names | {
        "model.norm.weight": Place("final_norm/scale"),
        "lm_head.weight": Place("head/kernel", 1),
    }


def to_hf(params: dict[str, Any], place: Place) -> np.ndarray:
    """One Hugging Face tensor, float32; a view where possible."""
    value = _leaf(params, place)[place.part]
    if not place.input_axes:
        return value
    return value.reshape(math.prod(value.shape[: place.input_axes]), -1).T


def from_hf(params: dict[str, Any], place: Place, value: np.ndarray) -> None:
    """Writes one Hugging Face tensor into our parameters."""
    leaf = _leaf(params, place)
    ours = value.T if place.input_axes else value
    leaf[place.part] = ours.reshape(leaf[place.part].shape)


def _leaf(params: dict[str, Any], place: Place) -> np.ndarray:
    return functools.reduce(lambda tree, part: tree[part], place.path.split("/"), params)


def check_consistent(loaded: Loaded) -> None:
    """Raises BadInput if weights, model and tokenizer contradict each other: the export would be
    another model, or none."""
    if found := difference(loaded.model, loaded.params):
        name, expected, stored = found
        raise BadInput(
            f"{loaded.path}: its metadata asks for {name} of shape {expected}, and its weights "
            f"have {stored}"
        )
    if loaded.tokenizer.vocab_size != loaded.model.vocab_size:
        raise BadInput(
            f"{loaded.path}: the tokenizer has {loaded.tokenizer.vocab_size} pieces and the model "
            f"{loaded.model.vocab_size}"
        )


def finite(tensor: np.ndarray, name: str) -> np.ndarray:
    """`tensor` itself. Raises BadInput if it has NaN or infinities."""
    if not np.isfinite(tensor).all():
        raise BadInput(
            f"{name} has values that are not finite in {tensor.dtype}: the run diverged, or the "
            "type is too narrow; use another"
        )
    return tensor
