"""The tasks that a stage can have. Only this table knows them by name."""

from ml_collections import ConfigDict

from nanollama_jax.train.tasks.base import Task
from nanollama_jax.train.tasks.dpo import Dpo
from nanollama_jax.train.tasks.pretrain import Pretrain
from nanollama_jax.train.tasks.sft import Sft

TASKS: dict[str, Task] = {"pretrain": Pretrain(), "sft": Sft(), "dpo": Dpo()}


def task_of(config: ConfigDict) -> Task:
    """The task of a stage's config."""
    return TASKS[config.task]
