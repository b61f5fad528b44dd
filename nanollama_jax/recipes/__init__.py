"""What the recipes in `configs/` share: model sizes, corpora, and functions that build a config.

A recipe states the values of one stage; `base` and `recipe` add everything else. Nano's own values
stand together in `nano.py`. Importing this package does not import jax.
"""

from nanollama_jax.recipes.base import base, own, phase, recipe, tuning
from nanollama_jax.recipes.corpora import BENCHMARKS, CORPORA, TUNING
from nanollama_jax.recipes.sizes import MODELS, PHASE_ENDS, TOKENS_PER_STEP

__all__ = [
    "BENCHMARKS",
    "CORPORA",
    "MODELS",
    "PHASE_ENDS",
    "TOKENS_PER_STEP",
    "TUNING",
    "base",
    "own",
    "phase",
    "recipe",
    "tuning",
]
