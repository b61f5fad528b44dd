"""The flags are known to the installed XLA, which aborts at others; the user's come last."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from nanollama_jax import settings
from tests.conftest import ROOT

START = (
    "from nanollama_jax import settings; settings.apply({}); "
    "import jax; print(jax.jit(lambda x: 2 * x)(21))"
)


def run(program: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_installed_xla_takes_every_flag(deterministic):
    done = run(START.format(deterministic))
    assert done.returncode == 0 and done.stdout == "42\n", done.stderr


def test_an_unknown_flag_would_have_been_noticed():
    assert run(START.format(False), XLA_FLAGS="--xla_gpu_no_such_flag=true").returncode != 0


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    settings.apply(deterministic=True)
    assert os.environ["XLA_FLAGS"].endswith(
        "--xla_gpu_exclude_nondeterministic_ops=true "
        "--xla_gpu_enable_latency_hiding_scheduler=false"
    )
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"


def test_flags_by_version():
    hiding = "--xla_gpu_enable_latency_hiding_scheduler=true"
    always = ["--xla_gpu_memory_limit_slop_factor=115"]
    assert settings.xla_flags("0.10.2", False) == [*always, hiding]
    assert settings.xla_flags("0.11.2", False) == settings.xla_flags("1.0.0", False) == always
    assert (importlib.metadata.version("jax") < "0.11") == (
        hiding in settings.xla_flags(importlib.metadata.version("jax"), True)
    )
