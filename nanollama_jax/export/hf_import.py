"""Any Llama-architecture Hugging Face folder as a checkpoint that can be trained on. Nothing in the
folder is trusted.
"""

import contextlib
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors

from nanollama_jax.checkpoint import Loaded, weights_metadata
from nanollama_jax.checkpoint.metadata import parse_provenance
from nanollama_jax.errors import BadInput
from nanollama_jax.export.hf import read_json
from nanollama_jax.export.layout import finite, from_hf, hf_names, to_hf
from nanollama_jax.export.tokenizer_json import import_chat_templates
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import param_shapes
from nanollama_jax.tokenizer import MAX_VOCAB_SIZE, Tokenizer


def read(folder: str | os.PathLike) -> Loaded:
    """A Hugging Face folder of a Llama, in memory.

    Raises BadInput for a folder that is not one, is incomplete, or would be another model here.
    """
    folder = pathlib.Path(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "llama":
        raise BadInput(
            f"{folder} is of architecture {config.get('model_type')!r}; only 'llama' can be "
            "imported"
        )
    model, rope_theta = _model_of(config, folder), _rope_theta(config, folder)
    context_length = _number(config, "max_position_embeddings", folder, 2, 2**30, default=2048)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    if tokenizer.vocab_size != model.vocab_size:
        raise BadInput(
            f"{folder}: tokenizer.model has {tokenizer.vocab_size} pieces and config.json says "
            f"vocab_size={model.vocab_size}: they must agree"
        )
    params = _read_params(folder, model, config.get("tie_word_embeddings") is True)
    origin = parse_provenance(config.get("nanollama"))
    about_tokenizer = folder / "tokenizer_config.json"
    metadata = weights_metadata(
        model,
        tokenizer,
        rope_theta,
        context_length,
        origin or {"imported_from": folder.resolve().name},
        import_chat_templates(
            folder, read_json(about_tokenizer) if about_tokenizer.exists() else {}
        ),
    )
    return Loaded(model, params, tokenizer, metadata, folder)


def _number(
    config: dict[str, Any],
    key: str,
    folder: pathlib.Path,
    low: float,
    high: float,
    default: float | None = None,
) -> Any:
    """A number of config.json, an int where `low` is one."""
    value = config.get(key)
    value = default if value is None else value
    kind = int if isinstance(low, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        raise BadInput(
            f"{folder}/config.json: {key}={value!r:.80} must be a number from {low:g} to {high:g}"
        )
    return value


def _rope_theta(config: dict[str, Any], folder: pathlib.Path) -> float:
    """From `rope_theta` or `rope_parameters`, whichever the folder has. A RoPE that is scaled in
    any way is refused."""
    for key in ("rope_scaling", "rope_parameters"):
        about = config.get(key) or {}
        plain = isinstance(about, dict) and about.keys() <= {"rope_type", "type", "rope_theta"}
        if not plain or {about.get(name, "default") for name in ("rope_type", "type")} != {
            "default"
        }:
            raise BadInput(
                f"{folder}: the model has a scaled RoPE ({key}), which this Llama does not have: "
                "it cannot be imported"
            )
    nested = config.get("rope_parameters") or {}
    about = nested if "rope_theta" in nested else config
    return float(_number(about, "rope_theta", folder, 1.0, 1e12, default=10_000.0))


def _model_of(config: dict[str, Any], folder: pathlib.Path) -> ModelConfig:
    activation = config.get("hidden_act", "silu")
    for present, what in (
        (activation != "silu", f"hidden_act={activation!r:.80}"),
        (config.get("attention_bias"), "attention_bias"),
        (config.get("mlp_bias"), "mlp_bias"),
        (config.get("quantization_config"), "quantized weights"),
    ):
        if present:
            raise BadInput(
                f"{folder}: the model has {what}, which this Llama does not have: it cannot be "
                "imported"
            )
    d_model = _number(config, "hidden_size", folder, 1, 2**20)
    heads = _number(config, "num_attention_heads", folder, 1, 2**12)
    return ModelConfig(
        vocab_size=_number(config, "vocab_size", folder, 1, MAX_VOCAB_SIZE),
        num_layers=_number(config, "num_hidden_layers", folder, 1, 1000),
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=_number(config, "num_key_value_heads", folder, 1, 2**12, default=heads),
        head_dim=_number(config, "head_dim", folder, 2, 2**16, default=d_model // heads),
        ffn_dim=_number(config, "intermediate_size", folder, 1, 2**24),
        norm_eps=_number(config, "rms_norm_eps", folder, 0.0, 1.0, default=1e-6),
        scan_layers=False,
    )


def _read_params(folder: pathlib.Path, model: ModelConfig, tied: bool) -> dict[str, Any]:
    """Float32 parameters, layers unrolled. `tied`: the head is the embedding's transpose; here it
    becomes a separate weight."""
    names = hf_names(model)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), param_shapes(model))
    with contextlib.ExitStack() as files:
        opened = [files.enter_context(_open(path)) for path in _weight_files(folder)]
        holder = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  not a dict
        if strange := sorted(
            name
            for name in holder.keys() - names.keys()
            if not name.endswith("rotary_emb.inv_freq")
        ):
            raise BadInput(
                f"{folder} has {strange[0]}, which a Llama with its config.json does not have "
                f"({len(strange)} such tensors)"
            )
        for name, place in names.items():
            source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
            if source not in holder:
                raise BadInput(f"{folder} has no tensor {name}: is a file missing?")
            stored = holder[source].get_slice(source).get_dtype()
            if stored not in ("F16", "BF16", "F32", "F64"):
                raise BadInput(
                    f"{folder}: {source} is of type {stored}, not a float: quantized weights "
                    "cannot be imported"
                )
            value = finite(holder[source].get_tensor(source).astype(np.float32), source)
            expected = to_hf(params, place).shape
            if value.shape != expected:
                raise BadInput(
                    f"{folder}: {name} has shape {list(value.shape)}, and config.json asks for "
                    f"{list(expected)}"
                )
            from_hf(params, place, value)
    return params


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that transformers would read: `model.safetensors`, else those that the index
    names."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(
            isinstance(name, str) and name == os.path.basename(name) for name in names.values()
        ):
            raise BadInput(f"{index} has no weight_map of file names")
        return [folder / name for name in sorted(set(names.values()))]
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
    other = " (weights in pickle files are not opened: convert them)" if pickled else ""
    raise BadInput(f"{folder} has neither model.safetensors nor {index.name}{other}")


def _open(path: pathlib.Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise BadInput(f"{path} is damaged, or not a safetensors file: {error}") from error
