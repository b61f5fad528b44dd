"""Runs the stages of a curriculum in order, each in its own folder of the workdir and from where the one before ended; skips what is finished.

The tokenizer and the corpora come first, so that one command goes from raw text to the last checkpoint. A gate that says stop ends the run.
"""

import itertools
import pathlib

import jax
from ml_collections import ConfigDict

from nanollama_jax import checkpoint
from nanollama_jax.checkpoint import TASKS
from nanollama_jax.config import check, check_workdir
from nanollama_jax.console import Table
from nanollama_jax.corpus import finetuning
from nanollama_jax.corpus.prepare import prepare_all
from nanollama_jax.data import mix
from nanollama_jax.data.shards import MANIFEST
from nanollama_jax.errors import BadInput
from nanollama_jax.files import write_json
from nanollama_jax.tokenizer import CHAT_TOKENS, Tokenizer
from nanollama_jax.train import gates, metrics
from nanollama_jax.train.loop import train
from nanollama_jax.train.settle import settle


def stage_config(config: ConfigDict, name: str, init_from: str) -> ConfigDict:
    """One stage as a whole config: what all share, then what is its own."""
    merged = ConfigDict({key: value for key, value in config.to_dict().items() if key != "stages"})
    merged.update(config.stages[name])
    merged.init_from = init_from
    return merged


def stages_of(config: ConfigDict) -> dict[str, ConfigDict]:
    """name -> a whole config of each stage, in order; of a single stage's config, that one."""
    return (
        {name: stage_config(config, name, "") for name in stage_names(config)}
        if "stages" in config
        else {config.name: config}
    )


def stage_names(config: ConfigDict) -> list[str]:
    return sorted(
        config.stages,
        key=lambda name: (
            TASKS.index(config.stages[name].get("task", "pretrain")),
            config.stages[name].start_step,
        ),
    )


def check_vocabulary(stage: ConfigDict, config: ConfigDict) -> None:
    """Raises BadInput for a fine-tuning stage whose tokenizer does not extend the one that pre-training uses."""
    extended = -(-(config.model.vocab_size + len(CHAT_TOKENS)) // 8) * 8
    if stage.task != "pretrain" and (stage.tokenizer.base, stage.model.vocab_size) != (
        config.tokenizer.path,
        extended,
    ):
        raise BadInput(
            f"stages.{stage.name}: tokenizer.base={stage.tokenizer.base} and model.vocab_size={stage.model.vocab_size} do not extend "
            f"{config.tokenizer.path} of {config.model.vocab_size} pieces: set them to that path and to {extended}"
        )


def check_succession(stages: dict[str, ConfigDict], config: ConfigDict) -> None:
    """Raises BadInput where a phase does not start where the one before it ends, as after one was extended: with the flags that move
    all that comes later by as many steps."""
    phases = [(name, stage) for name, stage in stages.items() if stage.task == "pretrain"]
    for (before, earlier), (after, later) in itertools.pairwise(phases):
        moved = earlier.end_step - later.start_step
        if moved and earlier.end_step > earlier.start_step:
            flags = [
                f"--config.stages.{name}.{key}={stage[key] + moved}"
                for name, stage in phases[[name for name, _ in phases].index(after) :]
                for key in ("start_step", "end_step")
            ]
            flags += [
                f"--config.schedule.{key}={config.schedule[key] + moved}"
                for key in ("decay_start", "total_steps")
            ]
            if gates_moved := tuple(
                (at + moved if at >= later.start_step else at, *rest)
                for at, *rest in config.gates.perplexity
            ):
                flags.append(f"--config.gates.perplexity='{gates_moved}'".replace(" ", ""))
            raise BadInput(
                f"{before} ends at step {earlier.end_step} and {after} starts at {later.start_step}: to move what comes later, add {' '.join(flags)}"
            )


def check_nothing_outdated(stages: dict[str, ConfigDict], workdir: pathlib.Path) -> None:
    """Raises BadInput for stages that were trained from an earlier end of a stage that is to go on now: their weights lack what it will learn."""
    names = list(stages)
    for i, name in enumerate(names):
        found = checkpoint.find(workdir / name)
        stands = found[1] if found else None
        begun = [
            str(workdir / later) for later in names[i + 1 :] if checkpoint.find(workdir / later)
        ]
        if begun and (stands is None or stands < stages[name].end_step):
            is_at = (
                "has no checkpoint"
                if stands is None
                else f"is to go on from step {stands} to {stages[name].end_step}"
            )
            raise BadInput(
                f"{workdir / name} {is_at}, and later stages were trained from what it was: move {', '.join(begun)} to another place to train "
                "them anew, or put things back as they were"
            )


def every_source(config: ConfigDict) -> list[str]:
    """What must be prepared before the stages run."""
    return list(
        dict.fromkeys(
            [
                *config.corpora,
                *(name for stage in config.stages.values() for name in stage.data.sources),
            ]
        )
    )


def is_finished(stage: ConfigDict, workdir: pathlib.Path) -> bool:
    """At its last step, validated, and not held there by a gate."""
    found = checkpoint.find(workdir)
    if found is None or found[1] < stage.end_step:
        return False
    if found[1] == stage.end_step and not metrics.validated_at(
        workdir / "metrics.jsonl", stage.end_step
    ):
        return False
    return not gates.thresholds(stage.gates.perplexity, stage.end_step) or gates.passed(
        workdir, stage.end_step
    )


def run(config: ConfigDict, workdir: str | pathlib.Path) -> bool:
    """True when every stage is finished, False when a signal stopped one. Raises BadInput or RunStopped as the stages do."""
    check(config)
    check_workdir(workdir)
    workdir = pathlib.Path(workdir)
    names = stage_names(config)
    stages = {}
    for before, name in zip([None, *names], names, strict=False):
        stages[name] = stage_config(
            config, name, config.init_from if before is None else str(workdir / before)
        )
    check_succession(stages, config)
    for stage in stages.values():
        settle(stage)  # a mistake in the last stage is better known before the first
        check_vocabulary(stage, config)
    if (workdir / "summary.json").exists() and all(
        is_finished(stage, workdir / name) for name, stage in stages.items()
    ):
        metrics.console.print(
            f"Nothing left to do: {', '.join(names)} are finished in {workdir}.", soft_wrap=True
        )
        return True

    check_nothing_outdated(stages, workdir)
    if jax.process_count() == 1:
        prepare_all(config)
        for stage in stages.values():
            if stage.task != "pretrain":
                finetuning.prepare_stage(stage)
    elif missing := [
        name
        for name in every_source(config)
        if not (pathlib.Path(config.data.dir) / name / MANIFEST).exists()
    ]:
        raise BadInput(
            f"{missing[0]} is not prepared in {config.data.dir}: with several processes run tools/prepare_data.py with the same config first"
        )
    if len(stages) > 1:
        tokenizer = Tokenizer(config.tokenizer.path)
        times = mix.epochs_of_all(
            mix.open_mix(stage, tokenizer) for stage in stages.values() if stage.task == "pretrain"
        )
        for line in mix.repetition_warnings(times, "the whole curriculum"):
            metrics.console.print(f"warning: {line}", soft_wrap=True)
    for name, stage in stages.items():
        if is_finished(stage, workdir / name):
            metrics.console.print(
                f"{name} is finished in {workdir / name}: skipped", soft_wrap=True
            )
            continue
        if not train(stage, workdir / name).finished:
            return False
    if jax.process_index() == 0:
        summarise(stages, workdir)
    return True


def summarise(stages: dict[str, ConfigDict], workdir: pathlib.Path) -> None:
    """Prints what each stage did and writes `WORKDIR/curves.png` and `summary.json`."""
    names, pretraining = (
        list(stages),
        [name for name, stage in stages.items() if stage.task == "pretrain"],
    )
    rows = {name: metrics.read_rows(workdir / name / "metrics.jsonl") for name in names}
    table = Table(
        "stage",
        "steps",
        "minutes",
        "final loss",
        "validation perplexity (dpo: accuracy)",
        title="Curriculum",
    )
    summary = {}
    for name in names:
        steps = [row for row in rows[name] if "loss" in row]
        final = [
            row for row in rows[name] if "validation_perplexity" in row or "validation" in row
        ][-1]
        minutes = sum(row["seconds"] for row in steps) / 60
        summary[name] = {
            "last_step": steps[-1]["step"],
            "final_loss": steps[-1]["loss"],
            "minutes": round(minutes, 2),
        }
        if perplexity := final.get("validation_perplexity"):
            summary[name]["perplexity"] = perplexity
            shown = "  ".join(
                f"{source} {value:,.2f}" for source, value in perplexity.items() if source != "all"
            )
        else:
            summary[name]["validation"] = final["validation"]
            shown = "  ".join(
                f"{source}: accuracy {value['accuracy']:.3f}"
                for source, value in final["validation"].items()
                if source != "all"
            )
        table.add_row(
            name,
            f"{steps[0]['step'] - 1} -> {steps[-1]['step']}",
            f"{minutes:.1f}",
            f"{steps[-1]['loss']:.3f}",
            shown,
        )
    metrics.console.print(table)
    first = next(
        (row["validation_perplexity"] for row in rows[names[0]] if "validation_perplexity" in row),
        {},
    )
    last = next(
        (
            summary[name]["perplexity"]
            for name in reversed(pretraining)
            if "perplexity" in summary[name]
        ),
        {},
    )
    for source in sorted(set(first) & set(last) - {"all"}):
        fold = first[source] / last[source]
        shown = f"{first[source]:,.1f} at step 0, {last[source]:,.2f} after pre-training: {fold:.0f}-fold lower"
        metrics.console.print(f"validation perplexity of {source}: {shown}", soft_wrap=True)
    write_json(workdir / "summary.json", {"first_validation": first, "stages": summary})
    metrics.plot_curves(
        [workdir / name / "metrics.jsonl" for name in pretraining], workdir / "curves.png"
    )
    metrics.console.print(
        f"Curves: {workdir / 'curves.png'}   Checkpoints: {workdir / names[-1] / checkpoint.FOLDER}",
        soft_wrap=True,
    )
