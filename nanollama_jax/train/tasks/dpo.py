"""Direct preference optimization (arXiv:2305.18290), on pairs of answers, against a reference whose
log-probabilities are computed once, before the first step.
"""

import functools

import jax
import numpy as np

from nanollama_jax.checkpoint.origin import reload_initial_params
from nanollama_jax.train import objectives
from nanollama_jax.train.reference import open_reference
from nanollama_jax.train.tasks.base import Prepared
from nanollama_jax.train.tasks.tuning import Tuning


class Dpo(Tuning):
    """It starts from an SFT model, which is also its reference."""

    holds = "preferences"
    divergence_measure = "kl"  # the loss is one of pairs, with another chance level

    def batch_spec(self, batch_size, seq_len, max_segments):
        reference = jax.ShapeDtypeStruct((batch_size, max_segments), np.float32)
        return super().batch_spec(batch_size, seq_len, max_segments) | {
            "reference_logprobs": reference
        }

    def objective(self, config, model):
        return functools.partial(
            objectives.preference,
            model=model,
            chunk_tokens=config.loss.chunk_tokens,
            **config.preference,
        )

    def prepare(self, config, run, feed, shardings, resumed_from):
        def initial_params():
            if resumed_from is None:
                return run.state.params
            return jax.device_put(reload_initial_params(config.init_from, run.model), shardings)

        reference = open_reference(
            config,
            run.workdir,
            feed,
            resumed_from.reference_weights if resumed_from else None,
            initial_params,
            run.model,
            float(run.rope_theta(run.step)),
            run.mesh,
        )
        return Prepared(reference.attach, {"reference_weights": reference.weights})

    def step_text(self, means):
        return (
            f"accuracy {means['accuracy']:.3f}  margin {means['margin']:.3f}  kl {means['kl']:.4f}"
        )

    def validation_record(self, found):
        return {"validation": found}

    def validation_text(self, found):
        return "  ".join(
            f"{name}: loss {v['loss']:.4f}  accuracy {v['accuracy']:.3f}  margin {v['margin']:.3f}"
            for name, v in found.items()
        )

    def summary(self, validation):
        found = validation["validation"]
        text = "  ".join(
            f"{name}: accuracy {value['accuracy']:.3f}"
            for name, value in found.items()
            if name != "all"
        )
        return {"validation": found}, text
