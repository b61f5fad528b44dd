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
from nanollama_jax.files import whole_file
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import stack_layers
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train import optimizer


def find_origin(
    config: ConfigDict, workdir: pathlib.Path, model: ModelConfig, about_data: dict[str, str]
) -> tuple[pathlib.Path | None, int]:
    """The workdir and step to start from: the run's own latest checkpoint, else that of `config.init_from`, else (None, 0)."""
    if found := checkpoint.find(workdir):
        if checkpoint.read_metadata(*found).get("weights_only"):
            raise BadInput(
                f"{workdir} holds imported weights: choose another --workdir, and start from them with --config.init_from={workdir}"
            )
        check_same(*found, model, about_data)
        check_same_batches(*found, config)
        return found
    if saved := checkpoint.reported_saved(workdir):
        raise BadInput(
            f"{workdir} had a checkpoint of step {saved} and has none now: put {checkpoint.FOLDER}/step_{saved} back, or choose another --workdir; "
            f"to start again from the beginning, and lose metrics.jsonl, remove {workdir / checkpoint.SAVED}"
        )
    if config.init_from:
        found = checkpoint.find(config.init_from)
        if found is None:
            raise BadInput(
                f"init_from={config.init_from}: there is no checkpoint; name a workdir that has one"
            )
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
        raise BadInput(
            f"{config.name} starts from a trained model: say from which run, as --config.init_from=WORKDIR"
        )
    if config.start_step:
        raise BadInput(
            f"{config.name} starts at step {config.start_step}: say from which run, as --config.init_from=WORKDIR"
        )
    return None, 0


def check_start_of_tuning(
    workdir: pathlib.Path, step: int, config: ConfigDict, model: ModelConfig, tokenizer_sha256: str
) -> None:
    """Refuses to fine-tune a model of other shape, vocabulary or RoPE theta than `config` says: SFT starts from a base model, DPO from SFT's."""
    metadata = checkpoint.read_metadata(workdir, step)
    extended = metadata["tokenizer_sha256"] == tokenizer_sha256
    if config.task == "sft":
        if extended:
            raise BadInput(
                f"init_from={workdir}: its vocabulary is already extended for chat: SFT starts from a base model's checkpoint"
            )
        base = Tokenizer(config.tokenizer.base)
        if hashlib.sha256(base.extended()).hexdigest() != tokenizer_sha256:
            raise BadInput(
                f"{config.tokenizer.path} is not {config.tokenizer.base} with the chat tokens: prepare the data with this config first"
            )
        model = dataclasses.replace(model, vocab_size=base.vocab_size)
        tokenizer_sha256 = base.sha256
    elif metadata["model"]["vocab_size"] != model.vocab_size:
        was = f"init_from={workdir}: its vocabulary has {metadata['model']['vocab_size']} tokens"
        raise BadInput(
            f"{was}, not {model.vocab_size} with those of chats: name an SFT run of this scale (configs/sft.py)"
        )
    check_same(workdir, step, model, {"tokenizer_sha256": tokenizer_sha256}, weights_only=True)
    if (
        metadata["rope_theta"] != config.rope.end_theta
        or config.rope.start_theta != config.rope.end_theta
    ):
        theta = repr(metadata["rope_theta"])
        raise BadInput(
            f"init_from={workdir} was trained up to rope theta {theta}: set rope.start_theta={theta} and rope.end_theta={theta}"
        )


def weights_to_start_from(
    config: ConfigDict, workdir: pathlib.Path, step: int, model: ModelConfig
) -> Any:
    """The parameters of a checkpoint without its optimizer's state, laid out as training has them; for SFT with rows for the chat tokens."""
    params = checkpoint.load(workdir / checkpoint.FOLDER / f"step_{step}").params
    if config.task == "sft":
        params = extend_vocabulary(params, model.vocab_size)
    return stack_layers(params, model.num_layers) if model.scan_layers else params


def weights_of_start(config: ConfigDict, model: ModelConfig) -> Any:
    """The parameters that a fine-tuning run began with, of `config.init_from`. Raises BadInput if they are not there any more."""
    if not (found := config.init_from and checkpoint.find(config.init_from)):
        raise BadInput(
            f"init_from={config.init_from!r}: the model that this run began with is wanted once more, and there is no checkpoint: name it"
        )
    return weights_to_start_from(config, *found, model)


def extend_vocabulary(params: Any, vocab_size: int) -> Any:
    """Embedding and head with new rows, each the mean of the old ones: as likely as any token, and no more (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models")."""
    embedding_VD, head_DV = params["embedding"]["kernel"], params["head"]["kernel"]
    new = vocab_size - len(embedding_VD)
    embedding_VD = np.concatenate(
        [embedding_VD, np.repeat(embedding_VD.mean(0, keepdims=True), new, 0)]
    )
    head_DV = np.concatenate([head_DV, np.repeat(head_DV.mean(1, keepdims=True), new, 1)], 1)
    return params | {"embedding": {"kernel": embedding_VD}, "head": {"kernel": head_DV}}


def check_same(
    workdir: pathlib.Path,
    step: int,
    model: ModelConfig,
    about_data: dict[str, str],
    weights_only: bool = False,
) -> None:
    """Refuses to go on with a checkpoint of another model, tokenizer or data set."""
    metadata, ours = checkpoint.read_metadata(workdir, step), dataclasses.asdict(model)
    shape = (
        "vocab_size",
        "num_layers",
        "d_model",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "ffn_dim",
        "norm_eps",
    )
    shape += (
        () if weights_only or metadata.get("weights_only") else ("scan_layers",)
    )  # of an optimizer's state the layout cannot be changed
    differing = [
        f"{k}={metadata['model'][k]} (config: {ours[k]})"
        for k in shape
        if metadata["model"][k] != ours[k]
    ]
    if differing:
        raise BadInput(
            f"the checkpoint in {workdir} has another model, {', '.join(differing)}: choose another --workdir, or that model"
        )
    for key, value in about_data.items():
        if metadata[key] != value:
            what = {"tokenizer_sha256": "tokenizer", "data_sha256": "data"}[key]
            raise BadInput(
                f"the checkpoint in {workdir} was made with another {what}: choose another --workdir, or the {what} of before"
            )


def check_same_batches(workdir: pathlib.Path, step: int, config: ConfigDict) -> None:
    """Refuses to go on with an iterator's position in another stream of batches: rows would be skipped or doubled."""
    before, now = (
        checkpoint.read_metadata(workdir, step)["config"],
        json.loads(config.to_json_best_effort()),
    )
    keys = [
        ("seed",),
        ("start_step",),
        ("seq_len",),
        ("batch_size",),
        ("data", "max_segments"),
        ("data", "sources"),
    ]
    keys += [("rope",)] if config.task != "pretrain" else []
    for key in keys:
        old, new = (
            functools.reduce(lambda tree, name: tree[name], key, tree) for tree in (before, now)
        )
        if old != new:
            name = ".".join(key)
            raise BadInput(
                f"the run in {workdir} was trained with {name}={old}, and config says {new}: set it back, or start another with init_from"
            )


def kept_windows(workdir: pathlib.Path) -> dict[str, int] | None:
    """source -> shuffle window, of the run to resume in `workdir`: its data position holds for no other. None for a new one."""
    found = checkpoint.find(workdir)
    metadata = checkpoint.read_metadata(*found) if found else {}
    config = metadata.get("config")
    if not config or config.get("task", "pretrain") != "pretrain":
        return None
    rows = (config["end_step"] - config["start_step"]) * config["batch_size"]
    # Earlier versions recorded no windows: theirs are those of the length in their config.
    return metadata.get("shuffle_windows") or pipeline.shuffle_windows(
        config["data"]["sources"], config["seq_len"], rows
    )


def changes(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old, new) of every value of a config (as JSON) that differs; a name on one side only has None on the other."""
    found = {}
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = (old, new)
    return found


def schedules(config: dict[str, Any], step: int) -> tuple[float, float]:
    """Learning rate and RoPE theta of the update after `step` updates."""
    rate = optimizer.wsd_schedule(step, config["optimizer"]["peak_lr"], **config["schedule"])
    rope = config["rope"]
    theta = optimizer.rope_theta_schedule(
        step,
        rope["start_theta"],
        rope["end_theta"],
        config["start_step"],
        config["end_step"],
        rope["schedule"],
    )
    return float(rate), float(theta)


def write_config(workdir: pathlib.Path, content: bytes, resumed_at: int | None) -> None:
    """Writes `config.json`. Where a run is resumed with another config, that of the steps before stays, as `config_until_step_N.json`."""
    path = workdir / "config.json"
    before = path.read_bytes() if path.exists() else content
    kept = workdir / f"config_until_step_{resumed_at}.json"
    if (
        resumed_at and before != content and not kept.exists()
    ):  # a second config that never got beyond this step leaves nothing
        with whole_file(kept) as file:
            file.write(before)
    with whole_file(path) as file:
        file.write(content)


def check_changes(before: dict[str, Any], now: dict[str, Any], step: int) -> str:
    """What differs between the config of a run so far and the one it is resumed with at `step`, as one line; "" if nothing does.

    Raises BadInput for a learning rate or a RoPE theta that would jump at `step` (by more than 1 %) although none of the values
    that say how high it is was changed: a stage's length alone never moves them.
    """
    changed = changes(before, now)
    if not changed:
        return ""
    goes_on = step < now["end_step"]
    (old_rate, old_theta), (rate, theta) = schedules(before, step), schedules(now, step)
    length = ", ".join(
        f"{name} {old} -> {new}"
        for name, (old, new) in changed.items()
        if name in ("end_step", "schedule.total_steps")
    )
    asked = changed.keys() & {"optimizer.peak_lr", "schedule.warmup_steps", "schedule.decay_start"}
    if goes_on and abs(rate - old_rate) > 0.01 * old_rate and not asked:
        smooth = now["optimizer"]["peak_lr"] * old_rate / rate if rate else 0.0
        keep = f", or optimizer.peak_lr={smooth:.3g} to stay at the old rate" if smooth else ""
        raise BadInput(
            f"with {length} the learning rate would jump at step {step} from {old_rate:.3g} to {rate:.3g}: say where it is to be, "
            f"schedule.decay_start={step} for optimizer.peak_lr and then down to 0{keep}"
        )
    if (
        goes_on
        and abs(theta - old_theta) > 0.01 * old_theta
        and not any(name.startswith("rope.") for name in changed)
    ):
        done = (step - now["start_step"]) / (now["end_step"] - now["start_step"])
        end = now["rope"]["end_theta"]
        start = end if done >= 1 else end * (old_theta / end) ** (1 / (1 - done))
        raise BadInput(
            f"with {length} RoPE theta would jump at step {step} from {old_theta:,.0f} to {theta:,.0f}: set rope.start_theta={start:.6g} "
            f"to go from {old_theta:,.0f} to rope.end_theta={end!r} in the steps that are left, or set end_step back"
        )
    differs = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
    rates = f"{rate:.3g}" if rate == old_rate else f"{old_rate:.3g} -> {rate:.3g}"
    thetas = f"{theta:,.0f}" if theta == old_theta else f"{old_theta:,.0f} -> {theta:,.0f}"
    return f"config changed at step {step}: {differs} (learning rate {rates}, RoPE theta {thetas} at this step)"
