"""transformers' Llama as an oracle.

Our parameters under its names, and stories260K, read from llama2.c's format.
"""

import pathlib
import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from nanollama_jax.model import Llama, ModelConfig


def random_params(model: ModelConfig):
    """Scanned parameters, large enough that attention is not flat.

    The initializers are not compiled: that takes longer than the tests.
    """
    dummy, rng = jnp.zeros((1, 8), jnp.int32), np.random.default_rng(0)
    shapes = nn.meta.unbox(
        jax.eval_shape(Llama(model).init, jax.random.key(0), dummy, dummy, dummy, jnp.float32(1e4))[
            "params"
        ]
    )

    def draw(path, leaf):
        return jnp.asarray(
            rng.normal(1.0 if path[-1].key == "scale" else 0.0, 0.15, leaf.shape), jnp.float32
        )

    return jax.tree_util.tree_map_with_path(draw, shapes)


def hf_names(model: ModelConfig, params) -> dict[str, np.ndarray]:
    """Our unboxed, scanned parameters (or gradients) as transformers' state dict."""
    D = model.d_model
    layers = params["layers"]
    names = {
        "model.embed_tokens.weight": params["embedding"]["kernel"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["head"]["kernel"].T,
    }
    for i in range(model.num_layers):
        at, layer = f"model.layers.{i}.", {}
        q, k, v = np.split(
            layers["attention"]["qkv"]["kernel"][i],
            [model.num_heads, model.num_heads + model.num_kv_heads],
            axis=1,
        )
        for value, theirs in ((q, "q_proj"), (k, "k_proj"), (v, "v_proj")):
            layer[f"self_attn.{theirs}.weight"] = value.reshape(D, -1).T
        layer["self_attn.o_proj.weight"] = layers["attention"]["o"]["kernel"][i].reshape(-1, D).T
        gate, up = layers["ffn"]["gate_up"]["kernel"][i].transpose(1, 0, 2)
        for value, theirs in (
            (gate, "gate_proj"),
            (up, "up_proj"),
            (layers["ffn"]["down"]["kernel"][i], "down_proj"),
        ):
            layer[f"mlp.{theirs}.weight"] = value.T
        layer["input_layernorm.weight"] = layers["attention_norm"]["scale"][i]
        layer["post_attention_layernorm.weight"] = layers["ffn_norm"]["scale"][i]
        names |= {at + name: value for name, value in layer.items()}
    return {name: np.asarray(value) for name, value in names.items()}


def hf_model(model: ModelConfig, params, rope_theta: float) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=model.norm_eps,
        rope_theta=rope_theta,
        tie_word_embeddings=False,
        attn_implementation="eager",
        max_position_embeddings=4096,
    )
    hf = transformers.LlamaForCausalLM(config).float()
    hf.load_state_dict(
        {name: torch.from_numpy(value.copy()) for name, value in hf_names(model, params).items()}
    )
    return hf


def read_stories260k(path: pathlib.Path) -> tuple[ModelConfig, dict]:
    """llama2.c's v0 format: seven int32, then float32 tensors.

    RoPE rotates neighboring pairs there, so q and k rows are permuted to rotate-half.
    """
    blob = path.read_bytes()
    D, F, L, N, K, V, _seq_len = struct.unpack("7i", blob[:28])
    assert V > 0, "negative means an untied head"
    H = D // N
    weights, offset = np.frombuffer(blob, np.float32, offset=28), 0

    def take(*shape):
        nonlocal offset
        size = int(np.prod(shape))
        offset += size
        return weights[offset - size : offset].reshape(shape)

    def rotate_half(w_LOD, heads):  # (L, heads * H, D), pairs (2i, 2i + 1) -> (i, i + H / 2)
        return w_LOD.reshape(L, heads, H // 2, 2, D).swapaxes(2, 3).reshape(L, heads, H, D)

    embedding, attention_norm = take(V, D), take(L, D)
    q, k, v, o = take(L, N * H, D), take(L, K * H, D), take(L, K * H, D), take(L, D, N * H)
    ffn_norm, gate, down, up, final_norm = (
        take(L, D),
        take(L, F, D),
        take(L, D, F),
        take(L, F, D),
        take(D),
    )
    params = {
        "embedding": {"kernel": embedding},
        "head": {"kernel": embedding.T},
        "final_norm": {"scale": final_norm},
        "layers": {
            "attention_norm": {"scale": attention_norm},
            "ffn_norm": {"scale": ffn_norm},
            "attention": {
                "qkv": {
                    "kernel": np.concatenate(
                        [rotate_half(q, N), rotate_half(k, K), v.reshape(L, K, H, D)], axis=1
                    ).transpose(0, 3, 1, 2)
                },
                "o": {"kernel": o.reshape(L, D, N, H).transpose(0, 2, 3, 1)},
            },
            "ffn": {
                "gate_up": {"kernel": np.stack([gate, up], axis=2).transpose(0, 3, 2, 1)},
                "down": {"kernel": down.swapaxes(1, 2)},
            },
        },
    }
    model = ModelConfig(
        vocab_size=V,
        num_layers=L,
        d_model=D,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        ffn_dim=F,
        norm_eps=1e-5,
    )
    return model, params
