"""A day of faults: files damaged, values planted, signals and kills sent, processes set against each other, each in a real run.

    python -m tests.faults                                    every group; about half an hour on two cores
    python -m tests.faults --groups checkpoint,data           some of them
    python -m tests.faults --write docs/faults.md             the table, as Markdown

Each fault ends in one of these verdicts. The last four are defects, and the exit status counts them:

    identical   the run ended, then or after a rerun, with the bits of one that nothing disturbed
    one line    it was refused, or stopped, in one line and with its own exit status
    traceback   it failed with more than a line
    silent      it reported success, and is not the undisturbed run
    lost        a checkpoint that was reported saved is gone
    hang        it was killed at the time limit
"""

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from unittest import mock

import absl.logging
import jax
import numpy as np

from nanollama_jax import checkpoint
from nanollama_jax.checkpoint import Checkpoints
from nanollama_jax.console import Table, console
from nanollama_jax.errors import BadInput, RunStopped
from nanollama_jax.train.loop import train
from tests.conftest import ROOT
from tests.end_to_end.conftest import Lab, fill, rows

DEFECTS = ("traceback", "silent", "lost", "hang")
LIMIT_S = 240  # for one run
EVERY, KEEP = "--config.checkpoint.every=6", "--config.checkpoint.keep_last=50"


@dataclasses.dataclass(frozen=True)
class Result:
    group: str
    fault: str
    verdict: str
    said: str


@dataclasses.dataclass
class Bench:
    """The lab, and a phase1 that nothing disturbed, with all its checkpoints."""

    lab: Lab
    root: pathlib.Path
    undisturbed: pathlib.Path
    made: int = 0

    def folder(self, name: str = "run") -> pathlib.Path:
        self.made += 1
        return self.root / f"{self.made:03d}" / name

    def copy(self, upto: int = 40) -> pathlib.Path:
        """The undisturbed run as it was at an earlier checkpoint."""
        workdir = self.folder()
        shutil.copytree(self.undisturbed, workdir)
        for path in (workdir / "checkpoints").glob("step_*"):
            if int(path.name.removeprefix("step_")) > upto:
                shutil.rmtree(path)
        (workdir / "latest_checkpoint.json").write_text(json.dumps({"step": upto}))
        return workdir

    def train(self, workdir: pathlib.Path, *extra: str) -> tuple[str, str]:
        """In this process: (verdict, what it said)."""
        try:
            train(
                self.lab.config("phase1", EVERY, KEEP, *extra),
                workdir,
            )
        except (BadInput, RunStopped) as error:
            return "one line", str(error)
        except Exception as error:
            return "traceback", repr(error)
        return self.compared(workdir), "finished"

    def compared(self, workdir: pathlib.Path) -> str:
        return "identical" if self.is_identical(workdir) else "silent"

    def is_identical(self, workdir: pathlib.Path) -> bool:
        if checkpoint.find(workdir) is None or rows(workdir) != rows(self.undisturbed):
            return False
        ours, theirs = (
            jax.tree.leaves(checkpoint.load(path).params) for path in (workdir, self.undisturbed)
        )
        return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def start(self, workdir: pathlib.Path, *extra: str) -> subprocess.Popen:
        devices = jax.device_count()
        return self.lab.start("phase1", workdir, EVERY, KEEP, *extra, devices=devices)

    def ended(self, *processes: subprocess.Popen) -> list[tuple[str, str]]:
        """(verdict, what it said) of each process; a success is not compared with anything."""
        found = []
        for process in processes:
            try:
                out, err = process.communicate(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                found.append(("hang", f"no end within {LIMIT_S} s"))
                continue
            lines = [line for line in err.splitlines() if line.strip()]
            if (
                "Traceback" in err + out
                or len(lines) > 1
                or (process.returncode and len(lines) != 1)
            ):
                found.append(
                    ("traceback", f"exit {process.returncode}: {len(lines)} lines: {err[-200:]}")
                )
            elif process.returncode:
                found.append(("one line", f"exit {process.returncode}: {lines[0]}"))
            else:
                found.append(("success", "exit 0"))
        return found

    def wait_for(self, process: subprocess.Popen, workdir: pathlib.Path, step: int) -> bool:
        """Whether the run came to a step."""
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end and process.poll() is None:
            metrics = workdir / "metrics.jsonl"
            if metrics.exists() and f'"step": {step}, "' in metrics.read_text():
                return True
            time.sleep(0.002)
        return False


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[pathlib.Path], None]] = {
    "flipped": flip,
    "cut": cut,
    "deleted": pathlib.Path.unlink,
}


def damaged_checkpoints(bench: Bench) -> Iterator[tuple[str, str, str]]:
    """Each file of the latest checkpoint; then the way back that the line names."""
    workdir = bench.copy(30)
    folder = workdir / "checkpoints" / "step_30"
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    shutil.copytree(folder, workdir / "whole")
    for name in names:
        for kind, damage in DAMAGE.items():
            damage(folder / name)
            verdict, said = bench.train(workdir)
            if said == "finished":
                shutil.rmtree(workdir)
                workdir = bench.copy(30)
                folder = workdir / "checkpoints" / "step_30"
                shutil.copytree(folder, workdir / "whole")
            else:
                shutil.rmtree(folder)
                shutil.copytree(workdir / "whole", folder)
            yield f"{name.as_posix()} {kind}", verdict, said
    flip(folder / "metadata" / "metadata")
    folder.rename(folder.with_name("damaged_step_30"))
    yield "the damaged one renamed, as the line says", *bench.train(workdir)


def restored_with(self, restore, of: str, value: float, *arguments):
    """What `restore` gives, with a value in the first column of the head, or of its moments."""
    state, data = restore(self, *arguments)

    def plant(path, leaf):
        here = jax.tree_util.keystr(path)
        there = of in here and "head" in here and leaf.ndim == 2
        return leaf.at[:, 0].set(value) if there else leaf

    return jax.tree.map_with_path(plant, state), data


def planted_values(bench: Bench) -> Iterator[tuple[str, str, str]]:
    """A value in a checkpoint's arrays whose checksums agree; then the same command again."""
    restore = Checkpoints.restore
    for of, value in (
        ("params", math.nan),
        ("params", math.inf),
        ("params", 1e38),
        ("mu", math.nan),
        ("nu", math.nan),
        ("nu", math.inf),
    ):
        planted = functools.partialmethod(restored_with, restore, of, value)
        workdir = bench.copy(18)
        before = sorted(path.name for path in (workdir / "checkpoints").iterdir())
        with mock.patch.object(Checkpoints, "restore", planted):
            for again in ("", ", again"):
                verdict, said = bench.train(workdir)
                if before != sorted(path.name for path in (workdir / "checkpoints").iterdir()):
                    verdict = "lost"
                yield f"{value} in {of}{again}", verdict, said
        yield f"{value} in {of}, mended", *bench.train(workdir)


def nonsense_settings(bench: Bench) -> Iterator[tuple[str, str, str]]:
    """The optimizer's and the loss's values that trained in silence once."""
    values = ("-1.0", "0.0", "nan", "inf", "1e38")
    names = (
        "optimizer.peak_lr",
        "optimizer.eps",
        "optimizer.b1",
        "optimizer.b2",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
    )
    names += ("loss.z_loss", "model.norm_eps", "rope.start_theta")
    allowed = {
        ("optimizer.b1", "0.0"),
        ("optimizer.b2", "0.0"),
        ("optimizer.weight_decay", "0.0"),
        ("optimizer.clip_norm", "0.0"),
        ("loss.z_loss", "0.0"),
    }
    for name in names:
        for value in values:
            if (name, value) not in allowed:
                yield f"{name}={value}", *bench.train(bench.folder(), f"--config.{name}={value}")


def places(bench: Bench) -> Iterator[tuple[str, str, str]]:
    """Workdirs that cannot be read again, or must not be written to, and those that must work."""
    for path in ("", "/", str(ROOT), str(ROOT / "docs"), str(bench.folder("lr[3e-4]"))):
        verdict, said = bench.train(path)
        yield f"workdir {path.replace(str(bench.root), '')!r}", verdict, said
    for name in ("checkpoints/run1", "step_5", "a space", "日本", "what*?"):
        workdir = bench.folder(name)
        workdir.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(bench.copy(30), workdir)
        yield f"workdir {name!r}, resumed", *bench.train(workdir)


def damaged_data(bench: Bench) -> Iterator[tuple[str, str, str]]:
    """Shards, manifests and raw text; all is put back after each."""
    corpus = bench.lab.root / "docs"
    whole = bench.folder("whole")
    shutil.copytree(corpus, whole)
    shards = sorted(corpus.glob("train-*.array_record"))

    def swap(_: pathlib.Path) -> None:
        size = max(path.stat().st_size for path in shards)
        for path in shards[:2]:  # of equal size
            path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        contents = [path.read_bytes() for path in shards[:2]]
        shards[0].write_bytes(contents[1])
        shards[1].write_bytes(contents[0])

    manifest = corpus / "manifest.json"
    faults = [(f"a shard {kind}", shards[0], damage) for kind, damage in DAMAGE.items()] + [
        ("two shards swapped", shards[0], swap)
    ]
    for content in (
        "[]",
        "{}",
        "\0\1\2",
        "",
        '{"splits": {}}',
        manifest.read_text().replace("uint16", "float3"),
        "nul",
    ):
        faults.append(
            (
                f"manifest.json is {content[:16]!r}",
                manifest,
                lambda file, content=content: file.write_text(content),
            )
        )
    for fault, path, damage in faults:
        damage(path)
        yield fault, *bench.train(bench.folder())
        shutil.rmtree(corpus)
        shutil.copytree(whole, corpus)
    text = bench.lab.root / "docs.jsonl"
    text.rename(text.with_suffix(".gone"))
    done = subprocess.run(
        [
            sys.executable,
            "tools/prepare_data.py",
            *_without_workdir(bench.lab.flags("phase1", pathlib.Path("unused"))),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    text.with_suffix(".gone").rename(text)
    yield (
        "raw text deleted after preparation",
        "identical" if done.returncode == 0 else "one line",
        (done.stderr or done.stdout).strip()[-200:],
    )


def _without_workdir(flags: list[str]) -> list[str]:
    return flags[:2] + flags[4:]


def damaged_metrics(bench: Bench) -> Iterator[tuple[str, str, str]]:
    bad_lines = {
        "a NUL": b"\0\n",
        "half a row": b'{"step": 7, "lo\n',
        "no step": b'{"loss": 1.0}\n',
        "bad UTF-8": b"\xff\xfe\n",
        "a list": b"[]\n",
    }
    for kind, line in bad_lines.items():
        workdir = bench.copy(30)
        lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (workdir / "metrics.jsonl").write_bytes(b"".join(lines[:10]) + line + b"".join(lines[10:]))
        yield f"metrics.jsonl has {kind}", *bench.train(workdir)


def signals(bench: Bench) -> Iterator[tuple[str, str, str]]:
    """In the midst of a run: it saves and stops; the same command then resumes."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGQUIT"):
        workdir = bench.folder()
        process = bench.start(workdir)
        came = bench.wait_for(process, workdir, 15)
        process.send_signal(getattr(signal, name))
        verdict, said = bench.ended(process)[0]
        found = checkpoint.find(workdir)
        if verdict == "success":
            verdict, said = (
                ("one line", f"saved at step {found[1]}")
                if came and found and found[1] >= 15
                else ("lost", f"{found}")
            )
        yield f"{name} at step 15", verdict, said
        yield f"{name}, resumed", *bench.train(workdir)
    for delay in (0.2, 0.6, 1.5, 3.0):
        process = bench.start(bench.folder())
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        yield f"SIGINT after {delay} s", *bench.ended(process)[0]
    workdir = bench.folder()
    process = bench.start(workdir)
    bench.wait_for(process, workdir, 11)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    yield "SIGINT twice as a save begins", *bench.ended(process)[0]
    yield "SIGINT twice, resumed", *bench.train(workdir)
    workdir = bench.folder()
    process = bench.start(workdir)
    process.stdout.close()
    process.stdout = None
    verdict, said = bench.ended(process)[0]
    yield (
        "the reader of stdout is gone",
        *((bench.compared(workdir), said) if verdict == "success" else (verdict, said)),
    )


def kills(bench: Bench) -> Iterator[tuple[str, str, str]]:
    chance = random.Random(0)
    for number in range(10):
        workdir, at = bench.folder(), chance.uniform(0.5, 12.0)
        process = bench.start(workdir)
        try:
            process.wait(at)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        yield f"kill -9 number {number + 1}, after {at:.1f} s, then resumed", *bench.train(workdir)


def several_processes(bench: Bench) -> Iterator[tuple[str, str, str]]:
    def pair(*of_one: str, port: int | None = None) -> tuple[pathlib.Path, list[subprocess.Popen]]:
        workdir = bench.folder()
        flags = [f"--coordinator=127.0.0.1:{port or free_port()}", "--num_processes=2"]
        extra = [(), of_one]
        return workdir, [
            bench.start(workdir, *flags, f"--process_id={i}", *extra[i]) for i in range(2)
        ]

    def together(found: list[tuple[str, str]]) -> tuple[str, str]:
        verdicts = [verdict for verdict, _ in found]
        worst = next((verdict for verdict in DEFECTS if verdict in verdicts), None)
        return worst or ("silent" if "success" in verdicts else "one line"), found[0][1]

    for change in ("--config.seed=5", "--config.batch_size=16", "--config.optimizer.peak_lr=1e-3"):
        extra = (change, "--config.tokens_per_step=512") if "batch" in change else (change,)
        yield f"{change} on one of two", *together(bench.ended(*pair(*extra)[1]))
    for victim in (1, 0):
        workdir, processes = pair()
        bench.wait_for(processes[0], workdir, 14)
        processes[victim].kill()
        processes[victim].communicate()
        yield (
            f"kill -9 of process {victim} of two at step 14",
            *bench.ended(processes[1 - victim])[0],
        )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = bench.start(
            bench.folder(), f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--process_id=0"
        )
        yield "the port is in use", *bench.ended(process)[0]
    for flags in (
        ("--coordinator=127.0.0.1:1234", "--num_processes=2", "--process_id=5"),
        ("--coordinator=localhost", "--num_processes=2", "--process_id=0"),
        ("--coordinator=127.0.0.1:99999", "--num_processes=2", "--process_id=0"),
        ("--coordinator=no-such-host.invalid:1234", "--num_processes=2", "--process_id=1"),
        ("--coordinator=auto",),
    ):
        yield " ".join(flags), *bench.ended(bench.start(bench.folder(), *flags))[0]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


GROUPS = {
    "checkpoint": damaged_checkpoints,
    "values": planted_values,
    "settings": nonsense_settings,
    "places": places,
    "data": damaged_data,
    "metrics": damaged_metrics,
    "signals": signals,
    "kills": kills,
    "processes": several_processes,
}


def inject(groups: list[str]) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        (root / "lab").mkdir()
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "lab" / "jax_cache_")
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        fill(root / "lab")
        bench = Bench(Lab(root / "lab"), root, root / "undisturbed")
        # Twice: a program from the cache may round otherwise than the one just compiled
        for workdir in (bench.folder(), bench.undisturbed):
            train(bench.lab.config("phase1", EVERY, KEEP), workdir)
        for group in groups:
            for fault, verdict, said in GROUPS[group](bench):
                said = " ".join(said.replace(str(root), "").replace(str(ROOT), "").split())
                yield Result(group, fault.replace(str(ROOT), "REPOSITORY"), verdict, said)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default=",".join(GROUPS), help="default: %(default)s")
    parser.add_argument(
        "--write", metavar="FILE.md", type=pathlib.Path, help="where to write the table"
    )
    arguments = parser.parse_args()
    groups = arguments.groups.split(",")
    absl.logging.set_verbosity(absl.logging.FATAL)  # as the commands do
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"unknown group {min(unknown)}: choose from {', '.join(GROUPS)}")
    found = []
    for result in inject(groups):
        found.append(result)
        print(
            f"{result.verdict:10} {result.group}: {result.fault}: {result.said[:160]}", flush=True
        )
    table = Table("group", "faults", *("identical", "one line"), *DEFECTS)
    counts = {
        group: collections.Counter(r.verdict for r in found if r.group == group) for group in groups
    }
    for group, verdicts in counts.items():
        table.add_row(
            group,
            *(
                str(n)
                for n in (
                    verdicts.total(),
                    *(verdicts[v] for v in ("identical", "one line", *DEFECTS)),
                )
            ),
        )
    console.print(table)
    if arguments.write:
        lines = ["| group | fault | verdict | what it said |", "|---|---|---|---|"]
        lines += [
            f"| {r.group} | {r.fault} | {r.verdict} | {r.said[:200].replace('|', '/')} |"
            for r in found
        ]
        arguments.write.write_text("\n".join(lines) + "\n")
    sys.exit(min(1, sum(r.verdict in DEFECTS for r in found)))


if __name__ == "__main__":
    main()
