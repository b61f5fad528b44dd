"""Where a run starts from: its own latest checkpoint, another run's, or scratch; and which checkpoints it cannot go on from."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nanollama_jax import checkpoint
from nanollama_jax.data import pipeline
from nanollama_jax.errors import BadInput
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import stack_layers
from nanollama_jax.tokenizer import Tokenizer


def find_origin(config: ConfigDict, workdir: pathlib.Path, model: ModelConfig, about_data: dict[str, str]) -> tuple[pathlib.Path | None, int]:
    """The workdir and step to start from: the run's own latest checkpoint, else that of `config.init_from`, else (None, 0)."""
    if found := checkpoint.find(workdir):
        if checkpoint.read_metadata(*found).get("weights_only"):
            raise BadInput(f"{workdir} holds imported weights: choose another --workdir, and start from them with --config.init_from={workdir}")
        check_same(*found, model, about_data)
        check_same_batches(*found, config)
        return found
    if config.init_from:
        found = checkpoint.find(config.init_from)
        if found is None:
            raise BadInput(f"init_from={config.init_from}: there is no checkpoint; name a workdir that has one")
        if config.task != "pretrain":
            check_start_of_tuning(*found, config, model, about_data["tokenizer_sha256"])
            return found
        if found[1] != config.start_step:
            raise BadInput(
                f"init_from={config.init_from} stands at step {found[1]} and {config.name} starts at {config.start_step}: train it to there"
            )
        check_same(*found, model, {"tokenizer_sha256": about_data["tokenizer_sha256"]})
        return found
    if config.task != "pretrain":
        raise BadInput(f"{config.name} starts from a trained model: say from which run, as --config.init_from=WORKDIR")
    if config.start_step:
        raise BadInput(f"{config.name} starts at step {config.start_step}: say from which run, as --config.init_from=WORKDIR")
    return None, 0


def check_start_of_tuning(workdir: pathlib.Path, step: int, config: ConfigDict, model: ModelConfig, tokenizer_sha256: str) -> None:
    """Refuses to fine-tune a model of other shape, vocabulary or RoPE theta than `config` says: SFT starts from a base model, DPO from SFT's."""
    metadata = checkpoint.read_metadata(workdir, step)
    extended = metadata["tokenizer_sha256"] == tokenizer_sha256
    if config.task == "sft":
        if extended:
            raise BadInput(f"init_from={workdir}: its vocabulary is already extended for chat: SFT starts from a base model's checkpoint")
        base = Tokenizer(config.tokenizer.base)
        if hashlib.sha256(base.extended()).hexdigest() != tokenizer_sha256:
            raise BadInput(f"{config.tokenizer.path} is not {config.tokenizer.base} with the chat tokens: prepare the data with this config first")
        model = dataclasses.replace(model, vocab_size=base.vocab_size)
        tokenizer_sha256 = base.sha256
    elif metadata["model"]["vocab_size"] != model.vocab_size:
        was = f"init_from={workdir}: its vocabulary has {metadata['model']['vocab_size']} tokens"
        raise BadInput(f"{was}, not {model.vocab_size} with those of chats: name an SFT run of this scale (configs/sft.py)")
    check_same(workdir, step, model, {"tokenizer_sha256": tokenizer_sha256}, weights_only=True)
    if metadata["rope_theta"] != config.rope.end_theta or config.rope.start_theta != config.rope.end_theta:
        theta = repr(metadata["rope_theta"])
        raise BadInput(f"init_from={workdir} was trained up to rope theta {theta}: set rope.start_theta={theta} and rope.end_theta={theta}")


def weights_to_start_from(config: ConfigDict, workdir: pathlib.Path, step: int, model: ModelConfig) -> Any:
    """The parameters of a checkpoint without its optimizer's state, laid out as training has them; for SFT with rows for the chat tokens."""
    params = checkpoint.load(workdir / checkpoint.FOLDER / f"step_{step}").params
    if config.task == "sft":
        params = extend_vocabulary(params, model.vocab_size)
    return stack_layers(params, model.num_layers) if model.scan_layers else params


def weights_of_start(config: ConfigDict, model: ModelConfig) -> Any:
    """The parameters that a fine-tuning run began with, of `config.init_from`. Raises BadInput if they are not there any more."""
    if not (found := config.init_from and checkpoint.find(config.init_from)):
        raise BadInput(f"init_from={config.init_from!r}: the model that this run began with is wanted once more, and there is no checkpoint: name it")
    return weights_to_start_from(config, *found, model)


def extend_vocabulary(params: Any, vocab_size: int) -> Any:
    """Embedding and head with new rows, each the mean of the old ones: as likely as any token, and no more (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models")."""
    embedding_VD, head_DV = params["embedding"]["kernel"], params["head"]["kernel"]
    new = vocab_size - len(embedding_VD)
    embedding_VD = np.concatenate([embedding_VD, np.repeat(embedding_VD.mean(0, keepdims=True), new, 0)])
    head_DV = np.concatenate([head_DV, np.repeat(head_DV.mean(1, keepdims=True), new, 1)], 1)
    return params | {"embedding": {"kernel": embedding_VD}, "head": {"kernel": head_DV}}


def check_same(workdir: pathlib.Path, step: int, model: ModelConfig, about_data: dict[str, str], weights_only: bool = False) -> None:
    """Refuses to go on with a checkpoint of another model, tokenizer or data set."""
    metadata, ours = checkpoint.read_metadata(workdir, step), dataclasses.asdict(model)
    shape = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "norm_eps")
    shape += () if weights_only or metadata.get("weights_only") else ("scan_layers",)  # of an optimizer's state the layout cannot be changed
    differing = [f"{k}={metadata['model'][k]} (config: {ours[k]})" for k in shape if metadata["model"][k] != ours[k]]
    if differing:
        raise BadInput(f"the checkpoint in {workdir} has another model, {', '.join(differing)}: choose another --workdir, or that model")
    for key, value in about_data.items():
        if metadata[key] != value:
            what = {"tokenizer_sha256": "tokenizer", "data_sha256": "data"}[key]
            raise BadInput(f"the checkpoint in {workdir} was made with another {what}: choose another --workdir, or the {what} of before")


def check_same_batches(workdir: pathlib.Path, step: int, config: ConfigDict) -> None:
    """Refuses to go on with an iterator's position in another stream of batches: rows would be skipped or doubled."""
    before, now = checkpoint.read_metadata(workdir, step)["config"], json.loads(config.to_json_best_effort())
    keys = [("seed",), ("start_step",), ("seq_len",), ("batch_size",), ("data", "max_segments"), ("data", "sources")]
    keys += [("rope",)] if config.task != "pretrain" else []
    for key in keys:
        old, new = (functools.reduce(lambda tree, name: tree[name], key, tree) for tree in (before, now))
        if old != new:
            name = ".".join(key)
            raise BadInput(f"the run in {workdir} was trained with {name}={old}, and config says {new}: set it back, or start another with init_from")
    if config.task == "pretrain" and (old := shuffle_windows(before)) != (new := shuffle_windows(now)):
        raise BadInput(f"the run in {workdir} shuffles among {old} rows, and with end_step={config.end_step} it would among {new}: set end_step back")


def shuffle_windows(config: dict[str, Any]) -> dict[str, int]:
    """source -> rows that are shuffled among each other."""
    shares, rows = config["data"]["sources"], (config["end_step"] - config["start_step"]) * config["batch_size"]
    return {name: pipeline.shuffle_window(config["seq_len"], int(rows * share / sum(shares.values()))) for name, share in shares.items()}
