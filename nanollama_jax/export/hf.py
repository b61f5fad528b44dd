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
import re
import shutil
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from nanollama_jax import checkpoint
from nanollama_jax.errors import BadInput
from nanollama_jax.export.model_card import model_card, provenance, restored_provenance
from nanollama_jax.export.tokenizer_json import (
    chat_templates,
    import_chat_templates,
    tokenizer_files,
)
from nanollama_jax.files import output_path
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import param_shapes
from nanollama_jax.tokenizer import MAX_VOCAB_SIZE, Tokenizer

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SHARD_BYTES = 5_000_000_000
_WRITTEN = re.compile(
    r"(generation_|tokenizer_)?config\.json|tokenizer\.(json|model)|README\.md|chat_template\.jinja|model.*\.safetensors(\.index\.json)?"
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one of their tensors lies in our unrolled parameters. Theirs are (out, in), or have the same layout as ours if `input_axes` is 0."""

    path: str
    input_axes: int = 0  # how many leading axes of ours are inputs
    part: tuple[slice | int, ...] = ()  # of a fused projection


def hf_names(model: ModelConfig) -> dict[str, Place]:
    """Their name -> where it is, in the order of the model."""
    N, K, every = model.num_heads, model.num_kv_heads, slice(None)
    layer = {
        "input_layernorm.weight": Place("attention_norm/scale"),
        "self_attn.q_proj.weight": Place("attention/qkv/kernel", 1, (every, slice(0, N))),
        "self_attn.k_proj.weight": Place("attention/qkv/kernel", 1, (every, slice(N, N + K))),
        "self_attn.v_proj.weight": Place(
            "attention/qkv/kernel", 1, (every, slice(N + K, N + 2 * K))
        ),
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
    """One of their tensors, float32, a view where it can be."""
    value = functools.reduce(lambda tree, part: tree[part], place.path.split("/"), params)[
        place.part
    ]
    return (
        value
        if not place.input_axes
        else value.reshape(math.prod(value.shape[: place.input_axes]), -1).T
    )


def export(
    loaded: checkpoint.Loaded,
    folder: str | os.PathLike,
    dtype: str = "bfloat16",
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `folder`, whole or not at all; only an earlier export is overwritten, and it is there until the new one is whole.

    Raises BadInput if the folder exists and is not to be overwritten, the tokenizer cannot be expressed, a weight is not finite, or the disk is full.
    """
    folder = output_path(folder)
    if not folder.name:
        raise BadInput(f"{folder} cannot be written as an export: choose another --out")
    check_whole(loaded)
    temporary, replaced = (
        folder.with_name(f".{folder.name}.tmp"),
        folder.with_name(f".{folder.name}.replaced"),
    )
    if replaced.exists() and not os.path.lexists(folder):
        os.replace(replaced, folder)  # an export was killed as it took the earlier one's place
    if os.path.lexists(folder):
        if not overwrite:
            raise BadInput(f"{folder} exists: remove it, choose another --out, or give --overwrite")
        if (
            folder.is_symlink()
            or not folder.is_dir()
            or (any(folder.iterdir()) and "nanollama" not in _read_json(folder / "config.json"))
        ):
            raise BadInput(
                f"{folder} is no earlier export, and is not overwritten: choose another --out"
            )
        if strange := sorted(
            path.name for path in folder.iterdir() if not _WRITTEN.fullmatch(path.name)
        ):
            raise BadInput(
                f"{folder} holds {strange[0]}, which no export writes and --overwrite would remove: move it, or choose another --out"
            )
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
        configs = {
            "config.json": config_json(loaded, dtype),
            "generation_config.json": generation_config(loaded.tokenizer),
        }
        files = {
            name: (json.dumps(value, indent=2) + "\n").encode() for name, value in configs.items()
        }
        files |= tokenizer_files(
            loaded.tokenizer,
            loaded.context_length,
            chat_templates(loaded.tokenizer, loaded.metadata),
        )
        files["README.md"] = model_card(loaded.model, loaded.metadata, dtype).encode()
        for name, contents in files.items():
            (temporary / name).write_bytes(contents)
        write_safetensors(loaded, temporary, DTYPES[dtype], shard_bytes)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(folder, replaced)
        try:
            os.replace(temporary, folder)
        except BaseException:
            if replaced.exists():
                os.replace(replaced, folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except (
        safetensors.SafetensorError
    ) as error:  # how its writer reports what the operating system says
        raise BadInput(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_safetensors(
    loaded: checkpoint.Loaded, folder: pathlib.Path, dtype: Any, shard_bytes: int
) -> None:
    names = hf_names(loaded.model)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, place in names.items():
        needed = to_hf(loaded.params, place).size * np.dtype(dtype).itemsize
        if shards[-1] and size + needed > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + needed, total + needed
    one = len(shards) == 1
    files = [
        "model.safetensors" if one else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        tensors = {
            name: finite(
                np.ascontiguousarray(to_hf(loaded.params, names[name]).astype(dtype)), name
            )
            for name in shard
        }
        (folder / file).touch()
        mode = (
            (folder / file).stat().st_mode
        )  # that of any file here; save_file makes one that only its owner may read
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(mode)
        del tensors
    if not one:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {
                name: file for file, shard in zip(files, shards, strict=True) for name in shard
            },
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def check_whole(loaded: checkpoint.Loaded) -> None:
    """Raises BadInput where weights, model and tokenizer contradict each other: what is exported would be another model, or none."""
    expected, found = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (
            param_shapes(dataclasses.replace(loaded.model, scan_layers=False)),
            loaded.params,
        )
    )
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise BadInput(
                f"{loaded.path}: its metadata asks for {name} of shape {expected.get(name)}, and its weights have {found.get(name)}"
            )
    if loaded.tokenizer.vocab_size != loaded.model.vocab_size:
        raise BadInput(
            f"{loaded.path}: the tokenizer has {loaded.tokenizer.vocab_size} pieces and the model {loaded.model.vocab_size}"
        )


def finite(tensor: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(tensor).all():
        raise BadInput(
            f"{name} has values that are not finite in {tensor.dtype}: the run diverged, or the type is too narrow; use another"
        )
    return tensor


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
        **generation_config(loaded.tokenizer),
        "torch_dtype": dtype,
        "nanollama": provenance(loaded.metadata),
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Which tokens begin, end and fill rows; config.json says the same."""
    ends = tokenizer.end_ids
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_id,
    }


# ---- The other way


def read(folder: str | os.PathLike) -> checkpoint.Loaded:
    """A Hugging Face folder of a Llama, in memory. Raises BadInput for what is not one, is incomplete, or would not be the same model here."""
    folder = pathlib.Path(folder)
    config = _read_json(folder / "config.json")
    if config.get("model_type") != "llama":
        raise BadInput(
            f"{folder} is of architecture {config.get('model_type')!r}; only 'llama' can be imported"
        )
    model, rope_theta = _model_of(config, folder), _rope_theta(config, folder)
    context_length = _number(config, "max_position_embeddings", folder, 2, 2**30, default=2048)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    if tokenizer.vocab_size != model.vocab_size:
        raise BadInput(
            f"{folder}: tokenizer.model has {tokenizer.vocab_size} pieces and config.json says vocab_size={model.vocab_size}: they must agree"
        )
    params = _read_params(folder, model, config.get("tie_word_embeddings") is True)
    origin = restored_provenance(config.get("nanollama")) or {
        "imported_from": folder.resolve().name
    }
    metadata = checkpoint.weights_metadata(model, tokenizer, rope_theta, context_length, origin)
    about_tokenizer = (
        _read_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer_config.json").exists()
        else {}
    )
    if templates := import_chat_templates(folder, about_tokenizer):
        metadata["chat_template"] = templates
    return checkpoint.Loaded(model, params, tokenizer, metadata, folder)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}: give a Hugging Face model folder") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds a {type(found).__name__}, not an object")
    return found


def _number(
    config: dict[str, Any],
    key: str,
    folder: pathlib.Path,
    low: float,
    high: float,
    default: float | None = None,
) -> Any:
    """A number of config.json, an int where `low` is one. The file is not trusted."""
    value = config.get(key)
    value = default if value is None else value
    kind = int if isinstance(low, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        raise BadInput(
            f"{folder}/config.json: {key}={value!r:.80} must be a number from {low:g} to {high:g}"
        )
    return value


def _rope_theta(config: dict[str, Any], folder: pathlib.Path) -> float:
    """Of whichever of the two spellings is used; a RoPE that is scaled in any way is refused."""
    for key in ("rope_scaling", "rope_parameters"):
        about = config.get(key) or {}
        plain = isinstance(about, dict) and about.keys() <= {"rope_type", "type", "rope_theta"}
        if not plain or {about.get("rope_type", "default"), about.get("type", "default")} != {
            "default"
        }:
            raise BadInput(
                f"{folder}: the model has a scaled RoPE ({key}), which this Llama does not have: it cannot be imported"
            )
    nested = config.get("rope_parameters") or {}
    return float(
        _number(
            nested if "rope_theta" in nested else config,
            "rope_theta",
            folder,
            1.0,
            1e12,
            default=10_000.0,
        )
    )


def _model_of(config: dict[str, Any], folder: pathlib.Path) -> ModelConfig:
    for wrong, what in (
        (
            config.get("hidden_act", "silu") != "silu",
            f"hidden_act={config.get('hidden_act')!r:.80}",
        ),
        (config.get("attention_bias"), "attention_bias"),
        (config.get("mlp_bias"), "mlp_bias"),
        (config.get("quantization_config"), "quantised weights"),
    ):
        if wrong:
            raise BadInput(
                f"{folder}: the model has {what}, which this Llama does not have: it cannot be imported"
            )
    d_model, heads = (
        _number(config, "hidden_size", folder, 1, 2**20),
        _number(config, "num_attention_heads", folder, 1, 2**12),
    )
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
    """Float32 parameters, layers unrolled. `tied`: the head is the embedding's transpose, and from here on a weight of its own."""
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
                f"{folder} has {strange[0]}, which a Llama of its config.json has not ({len(strange)} such tensors)"
            )
        for name, place in names.items():
            source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
            if source not in holder:
                raise BadInput(f"{folder} has no tensor {name}: is a file missing?")
            if (stored := holder[source].get_slice(source).get_dtype()) not in (
                "F16",
                "BF16",
                "F32",
                "F64",
            ):
                raise BadInput(
                    f"{folder}: {source} is of type {stored}, not a float: quantised weights cannot be imported"
                )
            value = finite(holder[source].get_tensor(source).astype(np.float32), source)
            theirs = to_hf(params, place).shape
            if value.shape != theirs:
                raise BadInput(
                    f"{folder}: {name} has shape {list(value.shape)}, and config.json asks for {list(theirs)}"
                )
            ours = functools.reduce(lambda tree, part: tree[part], place.path.split("/"), params)
            ours[place.part] = (value.T if place.input_axes else value).reshape(
                ours[place.part].shape
            )
    return params


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """As transformers: `model.safetensors`, else the files that the index names."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if (folder / "model.safetensors.index.json").exists():
        names = _read_json(folder / "model.safetensors.index.json").get("weight_map")
        if not isinstance(names, dict) or not all(
            isinstance(name, str) and name == os.path.basename(name) for name in names.values()
        ):
            raise BadInput(f"{folder}/model.safetensors.index.json has no weight_map of file names")
        return [folder / name for name in sorted(set(names.values()))]
    other = (
        " (weights in pickle files are not opened: convert them)"
        if any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
        else ""
    )
    raise BadInput(f"{folder} has no model.safetensors, and no index of several{other}")


def _open(path: pathlib.Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise BadInput(f"{path} is damaged, or no safetensors file: {error}") from error
