"""Supervised fine-tuning: next-token prediction on the assistant's turns of conversations."""

from nanollama_jax.train.tasks.tuning import Tuning


class Sft(Tuning):
    """It starts from a base model, whose vocabulary is extended with the chat tokens."""

    holds = "conversations"

    def validation_text(self, found):
        return "loss: " + "  ".join(f"{name} {v['loss']:.4f}" for name, v in found.items())
