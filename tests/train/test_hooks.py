"""A recipe adds a hook by naming its module and settings; nothing else knows of it."""

import sys
import types

import pytest

from configs import phase1
from nanollama_jax.config import check
from nanollama_jax.errors import BadInput
from nanollama_jax.train import hooks


def recipe(**added):
    config = phase1.get_config("nano")
    with config.unlocked():
        config.hooks = added
    return config


def test_a_recipe_names_a_hook_and_its_settings(monkeypatch):
    class Heartbeat(hooks.Hook):
        def __init__(self, run, every):
            self.run, self.every = run, every

    module = types.ModuleType("nanollama_jax.train.hooks.heartbeat")
    module.make, module.__spec__ = Heartbeat, object()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = recipe(heartbeat={"every": 5})
    check(config)
    made = hooks.make("heartbeat", "the run", config.hooks.heartbeat)
    assert (made.run, made.every) == ("the run", 5)


def test_a_hook_that_does_not_exist_is_named():
    check(recipe(heartbeat={"every": 5}))
    with pytest.raises(BadInput, match="hooks.hartbeat: there is no nanollama_jax/train/hooks/har"):
        hooks.make("hartbeat", None, {})
    with pytest.raises(BadInput, match="must be a plain name"):
        check(recipe(**{"-x": {"every": 5}}))
