"""What a run reports: `metrics.jsonl` with every step, a log line every few steps, a live line on a
terminal, optionally W&B, and `curves.png`.
"""

import json
import logging
import operator
import pathlib
import secrets
import time
from typing import Any

import jax
import rich.progress
from ml_collections import ConfigDict

from nanollama_jax.console import console
from nanollama_jax.errors import BadInput
from nanollama_jax.files import whole_file
from nanollama_jax.train import curves

log = logging.getLogger("nanollama")

# Dense bf16 FLOP/s, NVIDIA data sheets. MFU is given for these, elsewhere FLOP/s alone.
PEAK_FLOPS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12}


def set_up_logging(workdir: pathlib.Path, is_main_process: bool) -> None:
    """Sends the main process's log lines to the terminal and appends them to `WORKDIR/log.txt`."""
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO if is_main_process else logging.ERROR)
    log.propagate = False
    log.addHandler(_Terminal())
    if is_main_process:
        file = logging.FileHandler(workdir / "log.txt", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
        )
        log.addHandler(file)


class _Terminal(logging.Handler):
    """Prints through rich's console, above the live line, without reading markup."""

    def emit(self, record: logging.LogRecord) -> None:
        style = None
        if record.levelno >= logging.WARNING:
            style = "yellow" if record.levelno == logging.WARNING else "red"
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        console.print(f"{stamp} {record.getMessage()}", style=style, markup=False, soft_wrap=True)


class Reporter:
    """Reports one stage's steps and validations. Only the main process writes."""

    def __init__(
        self,
        stage: str,
        task: Any,
        workdir: pathlib.Path,
        *,
        step: int,
        end_step: int,
        log_every: int,
        tokens_per_step: int,
        flops_per_token: float,
        device_kind: str,
        devices: int,
        is_main: bool,
        wandb: Any = None,
    ):
        """`task` is one of train/tasks, `wandb` a run of W&B. Rows of metrics.jsonl after `step`
        are removed: a resumed run writes them again."""
        self._stage, self._task, self._workdir, self._is_main = stage, task, workdir, is_main
        self._end_step, self._log_every, self._wandb = end_step, log_every, wandb
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak = next(
            (peak * devices for name, peak in PEAK_FLOPS.items() if name in device_kind), None
        )
        self._seconds = self._data_seconds = 0.0  # of the steps since the last log line
        self._steps = 0
        self._live = None
        if not is_main:
            return
        self._file = open_trimmed(workdir / "metrics.jsonl", step)
        if console.is_terminal:
            columns = (
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.TextColumn(
                    "{task.completed:,.0f}/{task.total:,.0f} {task.fields[line]}", markup=False
                ),
            )
            self._live = rich.progress.Progress(*columns, console=console, transient=True)
            self._bar = self._live.add_task(stage, total=end_step, completed=max(0, step), line="")
            self._live.start()

    def step(
        self, step: int, metrics: dict[str, float], *, seconds: float, data_seconds: float
    ) -> None:
        """Records a step. It took `seconds`, of which `data_seconds` were spent waiting for its
        batch."""
        if not self._is_main:
            return
        self._seconds += seconds
        self._data_seconds += data_seconds
        self._steps += 1
        row = {
            "step": step,
            **metrics,
            "seconds": round(seconds, 4),
            "data_seconds": round(data_seconds, 4),
        }
        self._write(row)
        rate = self._steps * self._tokens_per_step / max(self._seconds, 1e-9)
        line = self._line(step, metrics, rate)
        if self._live:
            self._live.update(self._bar, completed=step, line=line)
        if step % self._log_every == 0 or step == self._end_step:
            log.info("%s step %d/%d  %s", self._stage, step, self._end_step, line)
            if self._data_seconds > 0.1 * self._seconds:
                log.warning(
                    "training waited for data %.0f %% of the time",
                    100 * self._data_seconds / self._seconds,
                )
            self._seconds = self._data_seconds = 0.0
            self._steps = 0

    def validation(self, step: int, found: dict[str, dict[str, float]]) -> None:
        """Records and logs an objective's means by source ("all": the stage's own mix of rows), and
        redraws the curves."""
        if not self._is_main:
            return
        self._write({"step": step, **self._task.validation_record(found)})
        text = self._task.validation_text(found)
        log.info("%s step %d  validation %s", self._stage, step, text)
        rows = read_rows(self._workdir / "metrics.jsonl")
        curves.plot({self._workdir.name: rows}, self._workdir / "curves.png")

    def close(self) -> None:
        if not self._is_main:
            return
        if self._live:
            self._live.stop()
        self._file.close()
        if self._wandb:
            self._wandb.finish()

    def _line(self, step: int, metrics: dict[str, float], rate: float) -> str:
        flops = rate * self._flops_per_token
        speed = (
            f"MFU {100 * flops / self._peak:.1f} %" if self._peak else f"{flops / 1e12:.3g} TFLOP/s"
        )
        eta = (self._end_step - step) * self._tokens_per_step / rate
        return (
            f"loss {metrics['loss']:.4f}  {self._task.step_text(metrics)}  "
            f"lr {metrics['lr']:.2e}  grad {metrics['grad_norm']:.2f}  "
            f"{rate:,.0f} tokens/s  {speed}  eta {duration(eta)}"
        )

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._wandb:
            flat = {
                f"validation_perplexity/{k}": v
                for k, v in row.get("validation_perplexity", {}).items()
            }
            flat |= {
                f"validation/{name}/{k}": v
                for name, found in row.get("validation", {}).items()
                for k, v in found.items()
            }
            self._wandb.log(
                {k: v for k, v in row.items() if not isinstance(v, dict) and k != "step"} | flat,
                step=row["step"],
            )


def open_reporter(
    config: ConfigDict, task: Any, workdir: pathlib.Path, model: Any, devices: Any, step: int
) -> Reporter:
    """The reporter of a stage on an array of devices; `step` is the one that it resumes from, or
    -1."""
    is_main = jax.process_index() == 0
    return Reporter(
        config.name,
        task,
        workdir,
        step=step,
        end_step=config.end_step,
        log_every=config.log_every,
        tokens_per_step=config.tokens_per_step,
        flops_per_token=model.flops_per_token(config.seq_len),
        device_kind=devices.flat[0].device_kind,
        devices=devices.size,
        is_main=is_main,
        wandb=start_wandb(config, workdir) if is_main else None,
    )


def duration(seconds: float) -> str:
    """'3d 04:05', '4:05:06' or '5:06'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`. Leaves out a last line that was cut short and, with a
    warning, damaged lines."""
    rows, bad = parse_rows(path)
    if bad:
        log.warning("%s: damaged line(s) %s left out", path, ", ".join(map(str, bad)))
    return rows


def parse_rows(path: pathlib.Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """The rows of a `metrics.jsonl`, and line number -> content of the damaged lines: after a
    crash of the machine there may be NULs or half a line."""
    rows, bad = [], {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], 1):
        try:
            row = json.loads(line)
            operator.index(row["step"])
        except (ValueError, TypeError, KeyError):
            bad[number] = line
        else:
            rows.append(row)
    return rows, bad


def validated_at(path: pathlib.Path, step: int) -> bool:
    """Whether the validation at a step is on record in a `metrics.jsonl`."""
    return any(row["step"] == step and is_validation(row) for row in read_rows(path))


def is_validation(row: dict[str, Any]) -> bool:
    """Whether a row of `metrics.jsonl` is a validation, of any task."""
    return "validation_perplexity" in row or "validation" in row


def open_trimmed(path: pathlib.Path, step: int):
    """Removes the rows after `step` and opens `path` for appending. Damaged lines are moved to
    `PATH.bad`."""
    rows, bad = parse_rows(path)
    if bad:
        aside = path.with_name(f"{path.name}.bad")
        with aside.open("ab") as file:
            file.write(b"".join(line + b"\n" for line in bad.values()))
        log.warning(
            "%s: damaged line(s) %s moved to %s", path, ", ".join(map(str, bad)), aside.name
        )
    with whole_file(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step).encode())
    return path.open("a")


def start_wandb(config: ConfigDict, workdir: pathlib.Path):
    """The W&B run, or None if disabled. A resumed stage continues its own run, whose id is kept in
    the workdir."""
    if config.wandb.mode == "disabled":
        return None
    import wandb  # optional, and slow to import

    id_file = workdir / "wandb_run_id.txt"
    run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
    with whole_file(id_file) as file:
        file.write(f"{run_id}\n".encode())
    about = dict(
        project=config.wandb.project, name=config.name, config=config.to_dict(), dir=str(workdir)
    )
    try:
        run = wandb.init(id=run_id, resume="allow", mode=config.wandb.mode, **about)
    except wandb.errors.Error as error:
        raise BadInput(
            f"W&B does not start ({error}): log in with `wandb login`, or set wandb.mode=offline"
        ) from error
    log.info("W&B run: %s", run.url or f"offline, in {run.dir}")
    return run
