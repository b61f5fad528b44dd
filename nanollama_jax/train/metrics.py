"""What a run tells: `metrics.jsonl` (every step, always), a line every few steps, a live line on a terminal, W&B when asked, and `curves.png`."""

import json
import logging
import math
import operator
import pathlib
import secrets
import time
from collections.abc import Iterable
from typing import Any

import rich.progress
from ml_collections import ConfigDict

from nanollama_jax.console import console
from nanollama_jax.errors import BadInput
from nanollama_jax.files import whole_file

log = logging.getLogger("nanollama")

# Dense bf16 FLOP/s, NVIDIA data sheets. MFU is given for these, elsewhere FLOP/s alone.
PEAK_FLOPS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12}


def set_up_logging(workdir: pathlib.Path, is_main_process: bool) -> None:
    """Log lines go to the terminal and, appended, to `WORKDIR/log.txt`; both from the main process only."""
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
    """Through rich's console, so that lines go above the live line; text is never read as markup."""

    def emit(self, record: logging.LogRecord) -> None:
        style = (
            "yellow"
            if record.levelno == logging.WARNING
            else "red"
            if record.levelno > logging.WARNING
            else None
        )
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        console.print(f"{stamp} {record.getMessage()}", style=style, markup=False, soft_wrap=True)


class Reporter:
    """Takes each step's metrics as they arrive. Made once per stage and process; only the main process writes."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        *,
        step: int,
        flops_per_token: float,
        device_kind: str,
        devices: int,
        is_main: bool,
    ):
        self._config, self._workdir, self._is_main = config, workdir, is_main
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
        self._wandb = start_wandb(config, workdir)
        if console.is_terminal:
            columns = (
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.TextColumn(
                    "{task.completed:,.0f}/{task.total:,.0f} {task.fields[line]}", markup=False
                ),
            )
            self._live = rich.progress.Progress(*columns, console=console, transient=True)
            self._task = self._live.add_task(
                config.name, total=config.end_step, completed=max(0, step), line=""
            )
            self._live.start()

    def step(
        self, step: int, metrics: dict[str, float], *, seconds: float, data_seconds: float
    ) -> None:
        """`seconds` this step took from the last one's end to its own, of which `data_seconds` went into waiting for the batch."""
        if not self._is_main:
            return
        self._seconds, self._data_seconds, self._steps = (
            self._seconds + seconds,
            self._data_seconds + data_seconds,
            self._steps + 1,
        )
        row = {
            "step": step,
            **metrics,
            "seconds": round(seconds, 4),
            "data_seconds": round(data_seconds, 4),
        }
        self._write(row)
        rate = self._steps * self._config.tokens_per_step / max(self._seconds, 1e-9)
        line = self._line(step, metrics, rate)
        if self._live:
            self._live.update(self._task, completed=step, line=line)
        if step % self._config.log_every == 0 or step == self._config.end_step:
            log.info("%s step %d/%d  %s", self._config.name, step, self._config.end_step, line)
            if self._data_seconds > 0.1 * self._seconds:
                log.warning(
                    "training waited for data %.0f %% of the time",
                    100 * self._data_seconds / self._seconds,
                )
            self._seconds = self._data_seconds = 0.0
            self._steps = 0

    def validation(self, step: int, found: dict[str, dict[str, float]]) -> None:
        """Logs an objective's means by source ("all" is that of the stage's own mix of rows) and draws the curves anew."""
        if not self._is_main:
            return
        if self._config.task == "dpo":
            self._write({"step": step, "validation": found})
            text = "  ".join(
                f"{name}: loss {v['loss']:.4f}  accuracy {v['accuracy']:.3f}  margin {v['margin']:.3f}"
                for name, v in found.items()
            )
        else:
            perplexity = {name: math.exp(min(v["loss"], 50)) for name, v in found.items()}
            self._write({"step": step, "validation_perplexity": perplexity})
            loss = "loss: " + "  ".join(f"{name} {v['loss']:.4f}" for name, v in found.items())
            text = (
                loss
                if self._config.task == "sft"
                else "perplexity: "
                + "  ".join(f"{name} {v:,.2f}" for name, v in perplexity.items())
            )
        log.info("%s step %d  validation %s", self._config.name, step, text)
        plot_curves([self._workdir / "metrics.jsonl"], self._workdir / "curves.png")

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
        eta = (self._config.end_step - step) * self._config.tokens_per_step / rate
        if self._config.task == "dpo":
            of_task = f"accuracy {metrics['accuracy']:.3f}  margin {metrics['margin']:.3f}  kl {metrics['kl']:.4f}"
        else:
            of_task = f"ppl {math.exp(min(metrics['loss'], 50)):,.1f}"
        return (
            f"loss {metrics['loss']:.4f}  {of_task}  lr {metrics['lr']:.2e}  grad {metrics['grad_norm']:.2f}  "
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


def duration(seconds: float) -> str:
    """'3d 04:05', '4:05:06' or '5:06'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut short by a kill is left out, and so are damaged ones, with a warning."""
    rows, bad = parse_rows(path)
    if bad:
        log.warning("%s: damaged line(s) %s left out", path, ", ".join(map(str, bad)))
    return rows


def parse_rows(path: pathlib.Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """The rows of a `metrics.jsonl`, and by number, from 1, the lines that are none (a machine's crash leaves NULs or half a line)."""
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
    return any(
        row["step"] == step and ("validation_perplexity" in row or "validation" in row)
        for row in read_rows(path)
    )


def open_trimmed(path: pathlib.Path, step: int):
    """`path` opened for appending, without the rows after `step`: a resumed run writes those again. Damaged lines go to `PATH.bad`."""
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
    """The W&B run, or None when disabled. A resumed stage goes on in its own run, whose id is kept in the workdir."""
    if config.wandb.mode == "disabled":
        return None
    import wandb  # slow to import, and most runs at nano scale do without

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


def plot_curves(metrics_files: Iterable[pathlib.Path], path: pathlib.Path) -> None:
    """Loss, validation perplexity and learning rate against the global step, from one or more stages in order, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss_axis, ppl_axis, lr_axis) = plt.subplots(
        3, 1, figsize=(9, 9), sharex=True, height_ratios=(3, 3, 1.5), layout="constrained"
    )
    curves: dict[str, list[tuple[int, float]]] = {}
    of_pairs = False
    for i, file in enumerate(metrics_files):
        rows = read_rows(file)
        steps = [row for row in rows if "loss" in row]
        x = [row["step"] for row in steps]
        loss_axis.plot(
            x, [row["loss"] for row in steps], lw=0.8, color=f"C{i}", label=file.parent.name
        )
        lr_axis.plot(x, [row["lr"] for row in steps], lw=1.2, color=f"C{i}")
        for row in rows:
            measured = row.get("validation_perplexity") or {
                name: found["accuracy"] for name, found in row.get("validation", {}).items()
            }
            for name, value in measured.items():
                curves.setdefault(name, []).append((row["step"], value))
            of_pairs |= "validation" in row
    for i, (name, points) in enumerate(curves.items()):
        style = dict(color="black", ls="--") if name == "all" else dict(color=f"C{i}")
        ppl_axis.plot(
            *zip(*points, strict=True),
            marker=".",
            lw=1,
            label="this stage's mix" if name == "all" else name,
            **style,
        )
    loss_axis.set(ylabel="training loss (nats/pair)" if of_pairs else "training loss (nats/token)")
    ppl_axis.set(
        **(
            dict(ylabel="validation: share of pairs", ylim=(0, 1.02))
            if of_pairs
            else dict(ylabel="validation perplexity", yscale="log")
        )
    )
    lr_axis.set(ylabel="learning rate", xlabel="step")
    for axis in (loss_axis, ppl_axis, lr_axis):
        axis.grid(alpha=0.3)
    for axis in (loss_axis, ppl_axis):
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    with whole_file(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
