"""Checkpoints as Hugging Face folders, and any Llama-architecture folder as a checkpoint that can be trained on.

A folder has safetensors (several above 5 GB), config.json, generation_config.json, the tokenizer in three files, and a model card. Tensors are
converted a shard at a time. Exporting, importing and exporting again gives the same bytes.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from nanollama_jax import checkpoint
from nanollama_jax.errors import BadInput
from nanollama_jax.export.model_card import model_card, provenance
from nanollama_jax.export.tokenizer_json import tokenizer_files
from nanollama_jax.model import Llama, ModelConfig
from nanollama_jax.tokenizer import Tokenizer

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SHARD_BYTES = 5_000_000_000

# Their name -> (our path, how many leading axes are inputs). Theirs are (out, in); 0: the same layout.
_MODEL = {
    "model.embed_tokens.weight": ("embedding/kernel", 0),
    "model.norm.weight": ("final_norm/scale", 0),
    "lm_head.weight": ("head/kernel", 1),
}
_LAYER = {
    "input_layernorm.weight": ("attention_norm/scale", 0),
    "self_attn.q_proj.weight": ("attention/q/kernel", 1),
    "self_attn.k_proj.weight": ("attention/k/kernel", 1),
    "self_attn.v_proj.weight": ("attention/v/kernel", 1),
    "self_attn.o_proj.weight": ("attention/o/kernel", 2),
    "post_attention_layernorm.weight": ("ffn_norm/scale", 0),
    "mlp.gate_proj.weight": ("ffn/gate/kernel", 1),
    "mlp.up_proj.weight": ("ffn/up/kernel", 1),
    "mlp.down_proj.weight": ("ffn/down/kernel", 1),
}


def hf_names(num_layers: int) -> dict[str, tuple[str, int]]:
    """Their name -> (our path in unrolled parameters, leading input axes), in the order of the model."""
    layers = {f"model.layers.{i}.{name}": (f"layers_{i}/{path}", axes) for i in range(num_layers) for name, (path, axes) in _LAYER.items()}
    first, *last = _MODEL.items()
    return dict([first, *layers.items(), *last])


def to_hf(params: dict[str, Any], path: str, input_axes: int) -> np.ndarray:
    """One of our parameters in their layout, float32, a view where it can be."""
    value = params
    for part in path.split("/"):
        value = value[part]
    return value if not input_axes else value.reshape(int(np.prod(value.shape[:input_axes])), -1).T


def export(
    loaded: checkpoint.Loaded, folder: str | os.PathLike, dtype: str = "bfloat16", *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes `folder`, whole or not at all. Raises BadInput if it exists (and is not to be overwritten), or the tokenizer cannot be expressed."""
    folder = pathlib.Path(folder)
    if folder.exists() and not overwrite:
        raise BadInput(f"{folder} exists: remove it, choose another --out, or give --overwrite")
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        configs = {"config.json": config_json(loaded, dtype), "generation_config.json": generation_config(loaded.tokenizer)}
        files = {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in configs.items()}
        files |= tokenizer_files(loaded.tokenizer, loaded.context_length)
        files["README.md"] = model_card(loaded.model, loaded.metadata, dtype).encode()
        for name, contents in files.items():
            (temporary / name).write_bytes(contents)
        write_safetensors(loaded, temporary, DTYPES[dtype], shard_bytes)
        replaced = folder.with_name(f"{temporary.name}.replaced")
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(temporary, folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_safetensors(loaded: checkpoint.Loaded, folder: pathlib.Path, dtype: Any, shard_bytes: int) -> None:
    names = hf_names(loaded.model.num_layers)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, (path, axes) in names.items():
        needed = to_hf(loaded.params, path, axes).size * np.dtype(dtype).itemsize
        if shards[-1] and size + needed > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + needed, total + needed
    one = len(shards) == 1
    files = ["model.safetensors" if one else f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        tensors = {name: np.ascontiguousarray(to_hf(loaded.params, *names[name]).astype(dtype)) for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
    if not one:
        index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def config_json(loaded: checkpoint.Loaded, dtype: str) -> dict[str, Any]:
    """LlamaConfig's fields, with the RoPE theta in force, and where the weights come from."""
    m = loaded.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "intermediate_size": m.ffn_dim,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": m.norm_eps,
        "rope_theta": loaded.rope_theta,
        "max_position_embeddings": loaded.context_length,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": loaded.tokenizer.bos_id,
        "eos_token_id": loaded.tokenizer.eos_id,
        "torch_dtype": dtype,
        "nanollama": provenance(loaded.metadata),
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = tokenizer.end_ids
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(ends) if len(ends) > 1 else ends[0]}


# ---- The other way


def read(folder: str | os.PathLike) -> checkpoint.Loaded:
    """A Hugging Face folder of a Llama, in memory. Raises BadInput for what is not one, is incomplete, or would not be the same model here."""
    folder = pathlib.Path(folder)
    config = _read_config(folder)
    model = _model_of(config, folder)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    if tokenizer.vocab_size != model.vocab_size:
        raise BadInput(
            f"{folder}: tokenizer.model has {tokenizer.vocab_size} pieces and config.json says vocab_size={model.vocab_size}: they must agree"
        )
    rope_theta = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10_000.0
    metadata = {
        "weights_only": True,
        "phase": "imported",
        "step": 0,
        "tokens_seen": 0,
        "model": dataclasses.asdict(model),
        "rope_theta": float(rope_theta),
        "context_length": int(config.get("max_position_embeddings", 2048)),
        "tokenizer_sha256": tokenizer.sha256,
        "provenance": config.get("nanollama") or {"imported_from": folder.resolve().name},
    }
    return checkpoint.Loaded(model, _read_params(folder, model, bool(config.get("tie_word_embeddings"))), tokenizer, metadata, folder)


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise BadInput(f"{folder}/config.json: {error.strerror}: give a Hugging Face model folder") from error
    except ValueError as error:
        raise BadInput(f"{folder}/config.json is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise BadInput(f"{folder} is of architecture {found!r}; only 'llama' can be imported")
    return config


def _model_of(config: dict[str, Any], folder: pathlib.Path) -> ModelConfig:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    for wrong, what in (
        (config.get("hidden_act", "silu") != "silu", f"hidden_act={config.get('hidden_act')!r}"),
        (config.get("attention_bias"), "attention_bias"),
        (config.get("mlp_bias"), "mlp_bias"),
        (scaling.get("rope_type", scaling.get("type", "default")) != "default", "a scaled RoPE (rope_scaling)"),
        (config.get("quantization_config"), "quantised weights"),
    ):
        if wrong:
            raise BadInput(f"{folder}: the model has {what}, which this Llama does not have: it cannot be imported")
    try:
        heads, d_model = config["num_attention_heads"], config["hidden_size"]
        return ModelConfig(
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            d_model=d_model,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or d_model // heads,
            ffn_dim=config["intermediate_size"],
            norm_eps=config.get("rms_norm_eps", 1e-6),
            scan_layers=False,
        )
    except KeyError as error:
        raise BadInput(f"{folder}/config.json lacks {error}") from None


def _read_params(folder: pathlib.Path, model: ModelConfig, tied: bool) -> dict[str, Any]:
    """Float32 parameters, layers unrolled. `tied`: the head is the embedding's transpose, and from here on a weight of its own."""
    names = hf_names(model.num_layers)
    dummy = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = nn.meta.unbox(jax.eval_shape(Llama(model).init, jax.random.key(0), dummy, dummy, dummy, jax.ShapeDtypeStruct((), jnp.float32)))["params"]
    params: dict[str, Any] = {}
    with contextlib.ExitStack() as files:
        opened = [files.enter_context(_open(path)) for path in _weight_files(folder)]
        holder = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  not a dict
        if strange := sorted(name for name in holder.keys() - names.keys() if not name.endswith("rotary_emb.inv_freq")):
            raise BadInput(f"{folder} has {strange[0]}, which a Llama of its config.json has not ({len(strange)} such tensors)")
        for name, (path, input_axes) in names.items():
            source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
            if source not in holder:
                raise BadInput(f"{folder} has no tensor {name}: is a file missing?")
            value = holder[source].get_tensor(source).astype(np.float32)
            *parents, leaf = path.split("/")
            shape = functools.reduce(lambda tree, part: tree[part], [*parents, leaf], shapes).shape
            theirs = (math.prod(shape[input_axes:]), math.prod(shape[:input_axes])) if input_axes else shape
            if value.shape != theirs:
                raise BadInput(f"{folder}: {name} has shape {list(value.shape)}, and config.json asks for {list(theirs)}")
            into = functools.reduce(lambda tree, part: tree.setdefault(part, {}), parents, params)
            into[leaf] = np.ascontiguousarray(value.T).reshape(shape) if input_axes else value
    return params


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = " (weights in pickle files are not opened: convert them)" if any(folder.glob("*.bin")) or any(folder.glob("*.pth")) else ""
        raise BadInput(f"{folder} has no .safetensors file{other}")
    return files


def _open(path: pathlib.Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise BadInput(f"{path} is damaged, or no safetensors file: {error}") from error
