"""A run that diverges, or resumes from a damaged checkpoint, stops each time it is started, and its good checkpoints stay."""

import os
import signal

import jax
import pytest

from nanollama_jax import curriculum
from nanollama_jax.checkpoint import Checkpoints
from nanollama_jax.errors import RunStopped
from nanollama_jax.train import divergence, metrics
from nanollama_jax.train.loop import train

SAVED = [6, 12, 18]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(lab):
    """Each run would compile the same programs."""
    settings = {"jax_compilation_cache_dir": str(lab.root / "jax_cache_in_process"), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in settings}
    jax.tree.map(jax.config.update, list(settings), list(settings.values()))
    yield
    jax.tree.map(jax.config.update, list(before), list(before.values()))


@pytest.fixture
def good(lab, tmp_path):
    """The workdir of a phase1 that stands at step 18 of 40, and a function that goes on with it."""

    def resume(**overrides):
        flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in overrides.items()]
        return train(lab.config("phase1", *flags), tmp_path)

    def interrupt(reporter, step, *_, **__):
        if step == 18:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.Reporter, "step", interrupt)
        assert not resume(checkpoint__keep_last=9).finished
    assert divergence.saved_steps(tmp_path / "checkpoints")[:3] == SAVED
    return tmp_path, resume


def poison(monkeypatch, which, value):
    """What a checkpoint gives is damaged, whatever it keeps itself from."""
    restore = Checkpoints.restore

    def restored(self, *arguments):
        state, data = restore(self, *arguments)
        spoil = lambda path, x: x.at[0, 0].set(value) if which in jax.tree_util.keystr(path) and x.ndim > 1 else x  # noqa: E731
        return jax.tree.map_with_path(spoil, state), data

    monkeypatch.setattr(Checkpoints, "restore", restored)
