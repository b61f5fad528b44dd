"""The checkpoint that a run starts from: its own latest one, another run's, or none. Refuses those
that it cannot start from, and config changes that would make the schedules jump.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nanollama_jax.checkpoint.folders import FOLDER, SAVED, find, reported_saved
from nanollama_jax.checkpoint.loading import load, read_metadata
from nanollama_jax.checkpoint.metadata import Metadata
from nanollama_jax.data import pipeline
from nanollama_jax.errors import BadInput
from nanollama_jax.files import whole_file
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import stack_layers
from nanollama_jax.tokenizer import Tokenizer

Found = tuple[pathlib.Path, int]  # workdir and step of a checkpoint
SHAPE = (
    "vocab_size",
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_dim",
    "norm_eps",
)


def find_origin(
    config: ConfigDict, workdir: pathlib.Path, model: ModelConfig, about_data: dict[str, str]
) -> Found | tuple[None, int]:
    """The workdir and step to start from: the run's own latest checkpoint, else that of
    `config.init_from`, else (None, 0).

    `about_data` has `tokenizer_sha256` and `data_sha256`. Raises BadInput for a checkpoint that
    does not fit.
    """
    if found := find(workdir):
        metadata = read_metadata(*found)
        if metadata.weights_only:
            raise BadInput(
                f"{workdir} holds imported weights: choose another workdir, and set "
                f"init_from={workdir} to start from them"
            )
        _check_same(workdir, metadata, model, about_data)
        _check_same_batches(workdir, metadata, config)
        return found
    if saved := reported_saved(workdir):
        raise BadInput(
            f"{workdir} had a checkpoint of step {saved} and has none now: put "
            f"{FOLDER}/step_{saved} back, or choose another workdir; to start from scratch and "
            f"lose metrics.jsonl, remove {workdir / SAVED}"
        )
    return INITIAL[config.task](config, model, about_data["tokenizer_sha256"]) or (None, 0)


def previous_stage(config: ConfigDict, model: ModelConfig, tokenizer_sha256: str) -> Found | None:
    """Where a stage of pre-training starts: the last step of the stage before, or imported
    weights; None for the first stage, from scratch."""
    if not config.init_from:
        if config.start_step:
            raise BadInput(
                f"{config.name} starts at step {config.start_step}: set init_from to the workdir "
                "of the run that it continues"
            )
        return None
    workdir, step = _init_from(config.init_from)
    if step != config.start_step:
        raise BadInput(
            f"init_from={config.init_from} is at step {step} and {config.name} starts at "
            f"{config.start_step}: train it up to there"
        )
    about = {"tokenizer_sha256": tokenizer_sha256}
    _check_same(workdir, read_metadata(workdir, step), model, about)
    return workdir, step


def base_model(config: ConfigDict, model: ModelConfig, tokenizer_sha256: str) -> Found:
    """Where SFT starts: a base model, whose vocabulary is extended with the chat tokens."""
    workdir, step, metadata = _trained_model(config)
    if metadata.tokenizer_sha256 == tokenizer_sha256:
        raise BadInput(
            f"init_from={workdir}: its vocabulary is already extended for chat: SFT starts from a "
            "base model's checkpoint"
        )
    base = Tokenizer(config.tokenizer.base)
    if hashlib.sha256(base.extended()).hexdigest() != tokenizer_sha256:
        raise BadInput(
            f"{config.tokenizer.path} is not {config.tokenizer.base} with the chat tokens: prepare "
            "the data with this config first"
        )
    before = dataclasses.replace(model, vocab_size=base.vocab_size)
    about = {"tokenizer_sha256": base.sha256}
    _check_same(workdir, metadata, before, about, with_optimizer=False)
    _check_same_theta(workdir, metadata, config)
    return workdir, step


def chat_model(config: ConfigDict, model: ModelConfig, tokenizer_sha256: str) -> Found:
    """Where DPO starts: a model that has been through SFT."""
    workdir, step, metadata = _trained_model(config)
    if metadata.model.vocab_size != model.vocab_size:
        raise BadInput(
            f"init_from={workdir}: its vocabulary has {metadata.model.vocab_size} tokens, not the "
            f"{model.vocab_size} of a chat model: name an SFT run of this scale (configs/sft.py)"
        )
    about = {"tokenizer_sha256": tokenizer_sha256}
    _check_same(workdir, metadata, model, about, with_optimizer=False)
    _check_same_theta(workdir, metadata, config)
    return workdir, step


INITIAL = {"pretrain": previous_stage, "sft": base_model, "dpo": chat_model}


def _trained_model(config: ConfigDict) -> tuple[pathlib.Path, int, Metadata]:
    if not config.init_from:
        raise BadInput(f"{config.name} starts from a trained model: set init_from to its workdir")
    found = _init_from(config.init_from)
    return *found, read_metadata(*found)


def _init_from(workdir: str) -> Found:
    if (found := find(workdir)) is None:
        raise BadInput(f"init_from={workdir}: there is no checkpoint; name a workdir that has one")
    return found


def initial_params(workdir: pathlib.Path, step: int, model: ModelConfig) -> Any:
    """The float32 parameters of a checkpoint, without the optimizer's state: laid out as `model`
    has them, and extended to its vocabulary."""
    params = load(workdir / FOLDER / f"step_{step}").params
    if len(params["embedding"]["kernel"]) < model.vocab_size:
        params = extend_vocabulary(params, model.vocab_size)
    return stack_layers(params, model.num_layers) if model.scan_layers else params


def reload_initial_params(init_from: str, model: ModelConfig) -> Any:
    """The parameters that a resumed fine-tuning run started from.

    Raises BadInput if that checkpoint no longer exists.
    """
    if not (found := init_from and find(init_from)):
        raise BadInput(
            f"init_from={init_from!r}: resuming needs the initial model, and there is no "
            "checkpoint; set init_from to where it is"
        )
    return initial_params(*found, model)


def extend_vocabulary(params: Any, vocab_size: int) -> Any:
    """Adds rows to embedding and head. Each is the mean of the old ones, and so no likelier than
    any other token (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
    Models")."""
    embedding_VD, head_DV = params["embedding"]["kernel"], params["head"]["kernel"]
    new = vocab_size - len(embedding_VD)
    embedding_VD = np.concatenate(
        [embedding_VD, np.repeat(embedding_VD.mean(0, keepdims=True), new, 0)]
    )
    head_DV = np.concatenate([head_DV, np.repeat(head_DV.mean(1, keepdims=True), new, 1)], 1)
    return params | {"embedding": {"kernel": embedding_VD}, "head": {"kernel": head_DV}}


def _check_same(
    workdir: pathlib.Path,
    metadata: Metadata,
    model: ModelConfig,
    about_data: dict[str, str],
    with_optimizer: bool = True,
) -> None:
    """Refuses a checkpoint of another model, tokenizer or data set."""
    with_optimizer = with_optimizer and not metadata.weights_only
    # The layout of an optimizer's state cannot be changed.
    differing = [
        f"{name}={getattr(metadata.model, name)} (config: {getattr(model, name)})"
        for name in SHAPE + (("scan_layers",) if with_optimizer else ())
        if getattr(metadata.model, name) != getattr(model, name)
    ]
    if differing:
        raise BadInput(
            f"the checkpoint in {workdir} has another model, {', '.join(differing)}: choose "
            "another workdir, or that model"
        )
    for key, value in about_data.items():
        if getattr(metadata, key) != value:
            what = {"tokenizer_sha256": "tokenizer", "data_sha256": "data"}[key]
            raise BadInput(
                f"the checkpoint in {workdir} was made with another {what}: choose another "
                f"workdir, or restore the {what}"
            )


def _check_same_theta(workdir: pathlib.Path, metadata: Metadata, config: ConfigDict) -> None:
    if not metadata.rope_theta == config.rope.end_theta == config.rope.start_theta:
        theta = repr(metadata.rope_theta)
        raise BadInput(
            f"init_from={workdir} was trained up to rope theta {theta}: set "
            f"rope.start_theta={theta} and rope.end_theta={theta}"
        )


def _check_same_batches(workdir: pathlib.Path, metadata: Metadata, config: ConfigDict) -> None:
    """Refuses an iterator position of another stream of batches: rows would be skipped or read
    twice."""
    before, now = metadata.config, json.loads(json.dumps(config.to_dict()))
    names = ["seed", "start_step", "seq_len", "batch_size", "data.max_segments", "data.sources"]
    if metadata.task != "pretrain":
        names.append("rope")
    for name in names:
        old, new = (
            functools.reduce(lambda tree, key: tree[key], name.split("."), tree)
            for tree in (before, now)
        )
        if old != new:
            raise BadInput(
                f"the run in {workdir} was trained with {name}={old}, and the config has {new}: "
                "restore the old value, or start another run with init_from"
            )


def kept_windows(workdir: pathlib.Path) -> dict[str, int] | None:
    """source -> shuffle window of the run to resume in `workdir`, whose data position is valid for
    no other; None for a new run, and for fine-tuning."""
    found = find(workdir)
    metadata = read_metadata(*found) if found else None
    if metadata is None or metadata.weights_only or metadata.task != "pretrain":
        return None
    config = metadata.config
    rows = (config["end_step"] - config["start_step"]) * config["batch_size"]
    # Earlier versions did not record the windows. Theirs follow from their config.
    return metadata.shuffle_windows or pipeline.shuffle_windows(
        config["data"]["sources"], config["seq_len"], rows
    )


def write_config(workdir: pathlib.Path, content: bytes, resumed_at: int | None) -> None:
    """Writes `config.json`. If a run is resumed with another config, the earlier one is kept as
    `config_until_step_N.json`."""
    path = workdir / "config.json"
    before = path.read_bytes() if path.exists() else content
    kept = workdir / f"config_until_step_{resumed_at}.json"
    # A second config that never got beyond this step leaves nothing.
    if resumed_at and before != content and not kept.exists():
        with whole_file(kept) as file:
            file.write(before)
    with whole_file(path) as file:
        file.write(content)


def changes(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old, new) of every value that differs between two configs as JSON. A name
    that only one of them has is None in the other."""
    found = {}
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = (old, new)
    return found


def check_changes(
    before: dict[str, Any],
    now: dict[str, Any],
    step: int,
    schedules: Callable[[dict[str, Any], int], tuple[float, float]],
) -> str:
    """One line with the differences between a run's config so far and the one it is resumed with
    at `step`, both as JSON; "" if there are none.

    `schedules(config, step)` gives the learning rate and RoPE theta of the update after `step`
    updates. Raises BadInput if one of them would jump at `step` (by more than 1 %) although no
    value that sets its height was changed: a stage's length alone never moves them.
    """
    changed = changes(before, now)
    if not changed:
        return ""
    (old_rate, old_theta), (rate, theta) = schedules(before, step), schedules(now, step)
    if step < now["end_step"]:
        _check_rate(changed, now, step, old_rate, rate)
        _check_theta(changed, now, step, old_theta, theta)
    differs = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
    rates = f"{rate:.3g}" if rate == old_rate else f"{old_rate:.3g} -> {rate:.3g}"
    thetas = f"{theta:,.0f}" if theta == old_theta else f"{old_theta:,.0f} -> {theta:,.0f}"
    return (
        f"config changed at step {step}: {differs} (learning rate {rates}, RoPE theta {thetas} at "
        "this step)"
    )


def _check_rate(
    changed: dict[str, tuple[Any, Any]], now: dict[str, Any], step: int, old: float, new: float
) -> None:
    asked = changed.keys() & {"optimizer.peak_lr", "schedule.warmup_steps", "schedule.decay_start"}
    if asked or abs(new - old) <= 0.01 * old:
        return
    smooth = now["optimizer"]["peak_lr"] * old / new if new else 0.0
    keep = f", or optimizer.peak_lr={smooth:.3g} to stay at the old rate" if smooth else ""
    raise BadInput(
        f"with {_length(changed)} the learning rate would jump at step {step} from {old:.3g} to "
        f"{new:.3g}: set schedule.decay_start={step} to restart at optimizer.peak_lr and then "
        f"decay to 0{keep}"
    )


def _check_theta(
    changed: dict[str, tuple[Any, Any]], now: dict[str, Any], step: int, old: float, new: float
) -> None:
    asked = any(name.startswith("rope.") for name in changed)
    if asked or abs(new - old) <= 0.01 * old:
        return
    done = (step - now["start_step"]) / (now["end_step"] - now["start_step"])
    end = now["rope"]["end_theta"]
    start = end if done >= 1 else end * (old / end) ** (1 / (1 - done))
    raise BadInput(
        f"with {_length(changed)} RoPE theta would jump at step {step} from {old:,.0f} to "
        f"{new:,.0f}: set rope.start_theta={start:.6g} to go from {old:,.0f} to "
        f"rope.end_theta={end!r} in the remaining steps, or restore end_step"
    )


def _length(changed: dict[str, tuple[Any, Any]]) -> str:
    names = changed.keys() & {"end_step", "schedule.total_steps"}
    return ", ".join(f"{name} {changed[name][0]} -> {changed[name][1]}" for name in sorted(names))
