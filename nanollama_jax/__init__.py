"""nanollama-jax: Llama-architecture language models in JAX, from raw text to a trained checkpoint.

    from nanollama_jax import Sampling, load

    engine = load("runs/curriculum_nano")  # a workdir (its latest checkpoint), or one checkpoint
    (completion,) = engine.generate(["def area("], Sampling(temperature=0.8), max_new_tokens=100)

The public names are loaded on first use: importing the package imports neither jax nor absl.
Everything else is imported from its module, such as `nanollama_jax.export.hf`.
"""

import importlib
import operator
import pathlib
import types
from typing import TYPE_CHECKING, Any

from nanollama_jax import train

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from nanollama_jax.infer.engine import Engine
    from nanollama_jax.infer.sampling import Sampling
    from nanollama_jax.model.config import ModelConfig
    from nanollama_jax.tokenizer import Tokenizer

    load = Engine.from_checkpoint

__all__ = ["Engine", "ModelConfig", "Sampling", "Tokenizer", "load", "train"]

_LAZY = {
    "Engine": ("nanollama_jax.infer.engine", "Engine"),
    "ModelConfig": ("nanollama_jax.model.config", "ModelConfig"),
    "Sampling": ("nanollama_jax.infer.sampling", "Sampling"),
    "Tokenizer": ("nanollama_jax.tokenizer", "Tokenizer"),
    "load": ("nanollama_jax.infer.engine", "Engine.from_checkpoint"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, path = _LAZY[name]
    return operator.attrgetter(path)(importlib.import_module(module))


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


class _Train(types.ModuleType):
    """`nanollama_jax.train` is a package; called, it trains. A function would shadow the package,
    or be shadowed by it, depending on what was imported first."""

    def __call__(self, config: "ConfigDict", workdir: str | pathlib.Path) -> bool:
        """Trains all stages of a recipe, or on your own text, and resumes.

        Args:
          config: what a recipe's `get_config` returns.
          workdir: where checkpoints, logs and curves go.

        Returns:
          True when every stage is finished, False when a signal stopped one.

        Raises:
          BadInput: something is wrong with the recipe or the data, before anything is allocated.
          RunStopped: a gate failed, or the run diverged.
        """
        if "text" in config:
            from nanollama_jax import own

            return own.run(config, workdir).finished
        if "stages" in config:
            from nanollama_jax import curriculum

            return curriculum.run(config, workdir)
        from nanollama_jax.train import loop

        return loop.train(config, workdir).finished


train.__class__ = _Train
