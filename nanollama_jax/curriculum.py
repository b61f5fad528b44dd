"""Runs the stages of a curriculum in order, each in its own folder of the workdir, from the end of
the one before; finished stages are skipped.

The tokenizer and the corpora are made first, so that one command leads from raw text to the last
checkpoint. A gate that stops a stage ends the run.
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
from nanollama_jax.train import curves, metrics
from nanollama_jax.train.hooks import gates
from nanollama_jax.train.loop import train
from nanollama_jax.train.settle import settle
from nanollama_jax.train.tasks import task_of


def stage_config(config: ConfigDict, name: str, init_from: str) -> ConfigDict:
    """The complete config of one stage: what all stages share, then its own values."""
    merged = ConfigDict({key: value for key, value in config.to_dict().items() if key != "stages"})
    merged.update(config.stages[name])
    merged.init_from = init_from
    return merged


def stages_of(config: ConfigDict) -> dict[str, ConfigDict]:
    """name -> complete config of each stage, in order. The config of a single stage is its own."""
    if "stages" not in config:
        return {config.name: config}
    return {name: stage_config(config, name, "") for name in stage_names(config)}


def stage_names(config: ConfigDict) -> list[str]:
    """The stages in the order in which they run."""

    def order(name: str) -> tuple[int, int]:
        stage = config.stages[name]
        return TASKS.index(stage.get("task", TASKS[0])), stage.start_step

    return sorted(config.stages, key=order)


def check_vocabulary(stage: ConfigDict, config: ConfigDict) -> None:
    """Raises BadInput for a fine-tuning stage whose tokenizer does not extend the base model's."""
    base = config.tokenizer.path
    extended = -(-(config.model.vocab_size + len(CHAT_TOKENS)) // 8) * 8
    found = (stage.tokenizer.base, stage.model.vocab_size)
    if task_of(stage).fine_tunes and found != (base, extended):
        raise BadInput(
            f"stages.{stage.name}: tokenizer.base={stage.tokenizer.base} and "
            f"model.vocab_size={stage.model.vocab_size} do not extend {base} of "
            f"{config.model.vocab_size} pieces: set them to that path and to {extended}"
        )


def check_succession(stages: dict[str, ConfigDict], config: ConfigDict) -> None:
    """Raises BadInput if a stage of pre-training does not start where the one before it ends, for
    example after that one was extended. The message has the flags that move all later steps."""
    phases = [(name, stage) for name, stage in stages.items() if not task_of(stage).fine_tunes]
    for i, ((before, earlier), (after, later)) in enumerate(itertools.pairwise(phases), 1):
        moved = earlier.end_step - later.start_step
        if moved and earlier.end_step > earlier.start_step:
            flags = " ".join(_flags_to_move(phases[i:], config, later.start_step, moved))
            raise BadInput(
                f"{before} ends at step {earlier.end_step} and {after} starts at "
                f"{later.start_step}: to move what comes later, add {flags}"
            )


def _flags_to_move(
    phases: list[tuple[str, ConfigDict]], config: ConfigDict, start_step: int, moved: int
) -> list[str]:
    flags = [
        f"--config.stages.{name}.{key}={stage[key] + moved}"
        for name, stage in phases
        for key in ("start_step", "end_step")
    ]
    for key in ("decay_start", "total_steps"):
        flags.append(f"--config.schedule.{key}={config.schedule[key] + moved}")
    gates_moved = tuple(
        (at + moved if at >= start_step else at, *rest) for at, *rest in config.gates.perplexity
    )
    if gates_moved:
        flags.append(f"--config.gates.perplexity='{gates_moved}'".replace(" ", ""))
    return flags


def check_nothing_outdated(stages: dict[str, ConfigDict], workdir: pathlib.Path) -> None:
    """Raises BadInput if a stage is about to continue although later ones were already trained from
    an earlier end of it: their weights lack what it will learn."""
    names = list(stages)
    for i, name in enumerate(names):
        found = checkpoint.find(workdir / name)
        later = [workdir / each for each in names[i + 1 :] if checkpoint.find(workdir / each)]
        if not later or (found and found[1] >= stages[name].end_step):
            continue
        state = "has no checkpoint"
        if found:
            state = f"would continue from step {found[1]} to {stages[name].end_step}"
        raise BadInput(
            f"{workdir / name} {state}, and later stages were trained from its earlier state: move "
            f"{', '.join(map(str, later))} elsewhere to retrain them, or restore the old config "
            "and files"
        )


def is_finished(stage: ConfigDict, workdir: pathlib.Path) -> bool:
    """Whether a stage is at its last step, validated, and not stopped there by a gate."""
    found, end = checkpoint.find(workdir), stage.end_step
    if found is None or found[1] < end:
        return False
    if found[1] == end and not metrics.validated_at(workdir / "metrics.jsonl", end):
        return False
    return not gates.thresholds(stage.gates.perplexity, end) or gates.passed(workdir, end)


def run(config: ConfigDict, workdir: str | pathlib.Path) -> bool:
    """Returns True when every stage is finished, False when a signal stopped one. Raises BadInput
    or RunStopped as the stages do."""
    check(config)
    check_workdir(workdir)
    workdir = pathlib.Path(workdir)
    stages, init_from = {}, config.init_from
    for name in stage_names(config):
        stages[name] = stage_config(config, name, init_from)
        init_from = str(workdir / name)
    check_succession(stages, config)
    for stage in stages.values():
        settle(stage)  # reports a mistake in the last stage before the first one runs
        check_vocabulary(stage, config)
    finished = [name for name, stage in stages.items() if is_finished(stage, workdir / name)]
    if (workdir / "summary.json").exists() and len(finished) == len(stages):
        say(f"Nothing left to do: {', '.join(stages)} are finished in {workdir}.")
        return True

    check_nothing_outdated(stages, workdir)
    prepare(config, stages)
    for name, stage in stages.items():
        if is_finished(stage, workdir / name):
            say(f"{name} is finished in {workdir / name}: skipped")
        elif not train(stage, workdir / name).finished:
            return False
    if jax.process_index() == 0:
        summarise(stages, workdir)
    return True


def prepare(config: ConfigDict, stages: dict[str, ConfigDict]) -> None:
    """Makes the tokenizer and the data of all stages, and warns of sources that are read often.
    With several processes all must exist already: raises BadInput for what is missing."""
    if jax.process_count() == 1:
        prepare_all(config)
        for stage in stages.values():
            if task_of(stage).fine_tunes:
                finetuning.prepare_stage(stage)
    else:
        names = [*config.corpora, *(name for s in stages.values() for name in s.data.sources)]
        for name in names:
            if not (pathlib.Path(config.data.dir) / name / MANIFEST).exists():
                raise BadInput(
                    f"{name} is not prepared in {config.data.dir}: with several processes run "
                    "tools/prepare_data.py with the same config first"
                )
    if len(stages) > 1:
        tokenizer = Tokenizer(config.tokenizer.path)
        pretraining = [stage for stage in stages.values() if not task_of(stage).fine_tunes]
        times = mix.epochs_of_all(mix.open_mix(stage, tokenizer) for stage in pretraining)
        for line in mix.repetition_warnings(times, "the whole curriculum"):
            say(f"warning: {line}")


def say(line: str) -> None:
    """Prints a line, unwrapped."""
    metrics.console.print(line, soft_wrap=True)


def summarise(stages: dict[str, ConfigDict], workdir: pathlib.Path) -> None:
    """Prints what each stage did, and writes `WORKDIR/curves.png` and `summary.json`."""
    pretraining = [name for name, stage in stages.items() if not task_of(stage).fine_tunes]
    rows = {name: metrics.read_rows(workdir / name / "metrics.jsonl") for name in stages}
    columns = ("stage", "steps", "minutes", "final loss", "validation perplexity (dpo: accuracy)")
    table = Table(*columns, title="Curriculum")
    summary = {}
    for name, stage in stages.items():
        steps = [row for row in rows[name] if "loss" in row]
        first, last = steps[0], steps[-1]
        validated = [row for row in rows[name] if metrics.is_validation(row)]
        validation, shown = task_of(stage).summary(validated[-1])
        minutes = sum(row["seconds"] for row in steps) / 60
        summary[name] = {
            "last_step": last["step"],
            "final_loss": last["loss"],
            "minutes": round(minutes, 2),
            **validation,
        }
        spanned = f"{first['step'] - 1} -> {last['step']}"
        table.add_row(name, spanned, f"{minutes:.1f}", f"{last['loss']:.3f}", shown)
    metrics.console.print(table)
    validated = [row for row in next(iter(rows.values())) if "validation_perplexity" in row]
    before = validated[0]["validation_perplexity"] if validated else {}
    after = summary[pretraining[-1]]["perplexity"] if pretraining else {}
    for source in sorted(set(before) & set(after) - {"all"}):
        fold = before[source] / after[source]
        say(
            f"validation perplexity of {source}: {before[source]:,.1f} at step 0, "
            f"{after[source]:,.2f} after pre-training: {fold:.0f}-fold lower"
        )
    write_json(workdir / "summary.json", {"first_validation": before, "stages": summary})
    curves.plot({name: rows[name] for name in pretraining}, workdir / "curves.png")
    last_stage = workdir / list(stages)[-1]
    say(f"Curves: {workdir / 'curves.png'}   Checkpoints: {last_stage / checkpoint.FOLDER}")
