"""Logs a fine-tuned model's greedy replies to the recipe's prompts."""

from collections.abc import Sequence

import jax

from nanollama_jax.infer import samples
from nanollama_jax.infer.engine import Engine
from nanollama_jax.train.hooks.run import Hook, Run
from nanollama_jax.train.metrics import log


class Samples(Hook):
    """Samples every `every` steps, and after the last one."""

    def __init__(self, every: int, prompts: dict[str, list[int]], max_new_tokens: int):
        self.every, self._prompts, self._max_new_tokens = every, prompts, max_new_tokens

    def due(self, run: Run) -> bool:
        at_its_step = run.step % self.every == 0 or run.step == run.end_step
        return bool(self._prompts) and not run.stop and at_its_step

    def __call__(self, run: Run) -> None:
        engine = Engine(
            run.model,
            run.state.params,
            run.tokenizer,
            rope_theta=float(run.rope_theta(run.step)),
            context_length=run.context_length,
            mesh=run.mesh,
        )
        for line in samples.lines(engine, self._prompts, self._max_new_tokens):
            log.info("%s step %d  %s", run.name, run.step, line)


def make(run: Run, *, every: int, prompts: Sequence[str], max_new_tokens: int) -> Samples:
    """Raises BadInput for a prompt that does not fit into the context."""
    encoded = {}
    if jax.process_count() > 1:
        log.info("%s: no samples: they need a run of one process", run.name)
    else:
        encoded = samples.encode(prompts, run.tokenizer, run.context_length)
    return Samples(every, encoded, max_new_tokens)
