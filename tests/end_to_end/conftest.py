"""A tiny curriculum of four stages, run as a user runs it: `python main.py ...` in a process."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import absl.flags
import numpy as np
import pytest
from ml_collections import ConfigDict, config_flags

from nanollama_jax.corpus.prepare import prepare_source, train_tokenizer_for
from nanollama_jax.train.metrics import read_rows
from tests.conftest import COMPILE_FAST, ROOT
from tests.trained import once

MODEL = [
    "num_layers=2",
    "d_model=32",
    "num_heads=4",
    "num_kv_heads=2",
    "head_dim=8",
    "ffn_dim=64",
    "vocab_size=320",
]
STAGES = {
    "phase1": (0, 40, 32, 8),
    "phase2_8k": (40, 60, 64, 4),
    "phase2_16k": (60, 70, 128, 2),
    "phase3": (70, 80, 32, 8),
}
TUNING = {"sft": (0, 12, 128, 4), "dpo": (0, 8, 256, 4)}
SOURCES = ("docs", "code", "reasoning", "transcripts")
CHATS = {"tools": "chats", "math": "sums", "right_or_wrong": "pairs"}


@dataclasses.dataclass(frozen=True)
class Lab:
    """Prepared data, and how to run main.py on it."""

    root: pathlib.Path

    def flags(self, recipe: str, workdir: pathlib.Path, *extra: str) -> list[str]:
        """The command line of a tiny run of `curriculum` or of one stage."""
        set_to = [f"model.{setting}" for setting in MODEL]
        set_to += [
            f"data.dir={self.root}",
            f"tokenizer.path={self.root}/tokenizer.model",
            "data.validation_fraction=0.1",
            "data.prepare_tasks=2",
        ]
        set_to += [
            "validation.every=40",
            "validation.tokens=512",
            "checkpoint.every=6",
            "model.scan_layers=True",
            "gates.perplexity=()",
        ]
        set_to += [
            "loss.chunk_tokens=128",
            "data.tuning_validation_fraction=0.2",
            "samples.max_new_tokens=8",
        ]
        if recipe not in TUNING:
            set_to += [f"corpora.{name}.url=file://{self.root}/{name}.jsonl" for name in SOURCES]
            set_to += [
                "schedule.total_steps=80",
                "schedule.decay_start=70",
                "schedule.warmup_steps=5",
            ]
        for name, (start, end, seq_len, batch) in (STAGES | TUNING).items():
            stage = dict(
                start_step=start,
                end_step=end,
                seq_len=seq_len,
                batch_size=batch,
                tokens_per_step=seq_len * batch,
            )
            if name in TUNING:
                stage |= {
                    "model.vocab_size": 328,
                    "tokenizer.vocab_size": 328,
                    "tokenizer.base": f"{self.root}/tokenizer.model",
                }
                stage |= {
                    "tokenizer.path": f"{self.root}/tokenizer_chat.model",
                    "samples.every": end,
                }
                stage |= {
                    "schedule.warmup_steps": 2,
                    "schedule.decay_start": 2,
                    "schedule.total_steps": end,
                }
            at = f"stages.{name}." if recipe == "curriculum" else "" if recipe == name else None
            set_to += (
                [f"{at}{key}={value}" for key, value in stage.items()] if at is not None else []
            )
        tuned = {"curriculum": CHATS, "sft": ("tools", "math"), "dpo": ("right_or_wrong",)}.get(
            recipe, ()
        )
        set_to += [f"tuning.{name}.url=file://{self.root}/{CHATS[name]}.jsonl" for name in tuned]
        set_to = list(
            {setting.split("=")[0]: setting for setting in set_to}.values()
        )  # a stage's own value in place of the general one
        flags = [
            f"--config.{setting}"
            for setting in set_to
            if not any(
                setting.split("=")[0] == e.split("=")[0].removeprefix("--config.") for e in extra
            )
        ]
        return ["--config", f"configs/{recipe}.py:nano", "--workdir", str(workdir), *flags, *extra]

    def config(self, recipe: str, *extra: str) -> ConfigDict:
        """The config of a tiny run, for `train` in this process, where there are four devices."""
        fits = {"batch_size": 4, "tokens_per_step": 512}  # phase2_16k's batch of 2 cannot be split
        at = {"curriculum": "stages.phase2_16k.", "phase2_16k": ""}.get(recipe)
        given = {flag.split("=")[0] for flag in extra}
        if at is not None:
            extra += tuple(
                f"--config.{at}{key}={value}"
                for key, value in fits.items()
                if f"--config.{at}{key}" not in given
            )
        values = absl.flags.FlagValues()
        config = config_flags.DEFINE_config_file("config", None, flag_values=values)
        absl.flags.DEFINE_string("workdir", None, "", flag_values=values)
        command = ["main.py", *self.flags(recipe, pathlib.Path(), *extra)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)  # where ml_collections looks for overrides
            patch.chdir(ROOT)
            values(command)
        return config.value

    def start(
        self, recipe: str, workdir: pathlib.Path, *extra: str, devices: int = 1
    ) -> subprocess.Popen:
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {COMPILE_FAST}",
            "JAX_COMPILATION_CACHE_DIR": str(
                self.root / f"jax_cache_{os.environ.get('PYTEST_XDIST_WORKER', '')}"
            ),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "main.py", *self.flags(recipe, workdir, *extra)]
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def tool(
        self, name: str, recipe: str, workdir: pathlib.Path, *extra: str, expect: int = 0
    ) -> str:
        """What a tool that takes a config printed."""
        flags = self.flags(recipe, workdir, *extra)
        flags = flags[:2] + flags[4:]  # it has no --workdir
        done = subprocess.run(
            [sys.executable, f"tools/{name}.py", *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == expect and (not expect or done.stderr.count("\n") == 1), done
        return done.stdout + done.stderr

    def run(
        self, recipe: str, workdir: pathlib.Path, *extra: str, devices: int = 1, expect: int = 0
    ) -> str:
        """What it printed. Checks the exit status; a failure must be one line on stderr."""
        process = self.start(recipe, workdir, *extra, devices=devices)
        out, err = process.communicate(timeout=300)
        assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err}"
        if expect:
            assert err.startswith("error: ") and err.count("\n") == 1, err
        return out + err


def rows(workdir: pathlib.Path) -> dict[int, dict]:
    """What each step logged, times left out."""
    read = [row for row in read_rows(workdir / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in read] == sorted({row["step"] for row in read}), (
        "a step is logged twice, or out of order"
    )
    return {row["step"]: {k: v for k, v in row.items() if "seconds" not in k} for row in read}


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    return Lab(once(tmp_path_factory, "lab", fill))


def fill(root: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    for name, alphabet in zip(
        SOURCES, ("abcdefgh ", "ijklmnop ", "0123456789 +=", "qrstuvwx "), strict=True
    ):
        texts = [
            "".join(rng.choice(list(alphabet), n, p=None)) * 3 for n in rng.integers(5, 400, 300)
        ]
        (root / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    words = ["".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(2, 12, 400)]
    chats = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": a[::-1]}]}
        for a in words
    ]
    sums = [
        {"question": f"{i}+{j}", "thought": f"{j}+{i}", "answer": str(i + j)}
        for i in range(20)
        for j in range(20)
    ]
    pairs = [
        {"prompt": f"{i}+{j}", "chosen": str(i + j), "rejected": str(i + j + 1 + i % 3)}
        for i in range(20)
        for j in range(20)
    ]
    for name, made in (("chats", chats), ("sums", sums), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    urls = {name: f"file://{root}/{name}.jsonl" for name in SOURCES}
    train_tokenizer_for(list(urls.values()), root / "tokenizer.model", 320, 10**6)
    for name, url in urls.items():
        prepare_source(
            name,
            url,
            "none",
            root / name,
            root / "tokenizer.model",
            validation_fraction=0.1,
            tasks=2,
        )


@pytest.fixture(scope="session")
def undisturbed(lab, tmp_path_factory) -> pathlib.Path:
    """The workdir of a whole curriculum that nothing disturbed."""
    return once(tmp_path_factory, "undisturbed", lambda workdir: lab.run("curriculum", workdir))
