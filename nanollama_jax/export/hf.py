"""Checkpoints as Hugging Face folders, for transformers, vLLM and the like.

A folder has safetensors (several above 5 GB), config.json, generation_config.json, the tokenizer's
files and a model card. Tensors are converted one file at a time. Exporting, importing
(hf_import.py) and exporting again gives the same bytes.
"""

import json
import os
import pathlib
import re
import shutil
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from nanollama_jax.checkpoint import Loaded, provenance
from nanollama_jax.errors import BadInput
from nanollama_jax.export.layout import check_consistent, finite, hf_names, to_hf
from nanollama_jax.export.model_card import model_card
from nanollama_jax.export.tokenizer_json import chat_templates, tokenizer_files
from nanollama_jax.files import output_path
from nanollama_jax.tokenizer import Tokenizer

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SHARD_BYTES = 5_000_000_000
_WRITTEN = re.compile(
    r"(generation_|tokenizer_)?config\.json|tokenizer\.(json|model)|README\.md"
    r"|chat_template\.jinja|model.*\.safetensors(\.index\.json)?"
)


def export(
    loaded: Loaded,
    folder: str | os.PathLike,
    dtype: str = "bfloat16",
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `folder`, complete or not at all. Only an earlier export is overwritten, and it stays
    until the new one is complete.

    Raises BadInput if the folder exists and is not to be overwritten, the tokenizer cannot be
    expressed, a weight is not finite, or the disk is full.
    """
    folder = output_path(folder)
    if not folder.name:
        raise BadInput(f"{folder} cannot be written as an export: choose another folder")
    check_consistent(loaded)
    temporary = folder.with_name(f".{folder.name}.tmp")
    replaced = folder.with_name(f".{folder.name}.replaced")
    if replaced.exists() and not os.path.lexists(folder):
        os.replace(replaced, folder)  # an export was killed while it replaced an earlier one
    if os.path.lexists(folder):
        _check_overwritable(folder, overwrite)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
        _write(loaded, temporary, dtype, shard_bytes)
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
    except safetensors.SafetensorError as error:  # wraps the operating system's errors
        raise BadInput(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_overwritable(folder: pathlib.Path, overwrite: bool) -> None:
    if not overwrite:
        raise BadInput(f"{folder} exists: remove it, choose another folder, or overwrite it")
    if folder.is_symlink() or not folder.is_dir() or not _is_export(folder):
        raise BadInput(
            f"{folder} is not an earlier export, and is not overwritten: choose another folder"
        )
    names = sorted(path.name for path in folder.iterdir())
    if strange := [name for name in names if not _WRITTEN.fullmatch(name)]:
        raise BadInput(
            f"{folder} holds {strange[0]}, which no export writes and overwriting would remove: "
            "move it, or choose another folder"
        )


def _is_export(folder: pathlib.Path) -> bool:
    """Whether an export, or nothing, lies there. Raises BadInput for a config.json that is not
    JSON."""
    return not any(folder.iterdir()) or "nanollama" in read_json(folder / "config.json")


def _write(loaded: Loaded, folder: pathlib.Path, dtype: str, shard_bytes: int) -> None:
    configs = {
        "config.json": config_json(loaded, dtype),
        "generation_config.json": generation_config(loaded.tokenizer),
    }
    templates = chat_templates(loaded.tokenizer, loaded.metadata.chat_template)
    files = {
        **{name: _json_bytes(value) for name, value in configs.items()},
        **tokenizer_files(loaded.tokenizer, loaded.context_length, templates),
        "README.md": model_card(loaded.model, loaded.metadata, dtype).encode(),
    }
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    _write_safetensors(loaded, folder, DTYPES[dtype], shard_bytes)


def _write_safetensors(loaded: Loaded, folder: pathlib.Path, dtype: Any, shard_bytes: int) -> None:
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
    files = {"model.safetensors": shards[0]}
    if len(shards) > 1:
        files = {
            f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard
            for i, shard in enumerate(shards, 1)
        }
    for file, shard in files.items():
        tensors = {
            name: finite(
                np.ascontiguousarray(to_hf(loaded.params, names[name]).astype(dtype)), name
            )
            for name in shard
        }
        # save_file makes a file that only its owner may read: give it the mode of a new file here.
        (folder / file).touch()
        mode = (folder / file).stat().st_mode
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(mode)
        del tensors
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, shard in files.items() for name in shard},
        }
        (folder / "model.safetensors.index.json").write_bytes(_json_bytes(index))


def config_json(loaded: Loaded, dtype: str) -> dict[str, Any]:
    """LlamaConfig's fields with the RoPE theta in force, and where the weights come from."""
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
    """The tokens that begin, end and pad a text. config.json repeats them."""
    ends = tokenizer.end_ids
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_id,
    }


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises BadInput for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}: give a Hugging Face model folder") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds a {type(found).__name__}, not an object")
    return found
