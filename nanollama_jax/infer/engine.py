"""Generation and scoring with a trained model.

    engine = Engine.from_checkpoint("runs/curriculum_nano")
    prompts = ["def area(", "The history of"]
    for completion in engine.generate(prompts, Sampling(temperature=0.8), max_new_tokens=100):
        print(completion.text)

Shapes are rounded up to buckets, so that few programs are compiled. Each device holds the whole
model, in the dtype of its matrix products (bfloat16 on a GPU, where 1B takes 2.2 GB; float32 on a
CPU), and rows are split over the devices: no step waits for weights from another device.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanollama_jax import checkpoint, sharding
from nanollama_jax.errors import BadInput
from nanollama_jax.infer.batch import SMALLEST_LENGTH, Batch, Completion, bucket, pad
from nanollama_jax.infer.constraint import Grammars
from nanollama_jax.infer.decode import for_inference, logits, token_logprobs
from nanollama_jax.infer.grammar import Grammar
from nanollama_jax.infer.sampling import Sampling
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import unstack_layers
from nanollama_jax.tokenizer import Tokenizer

NEW_TOKENS = 128  # the default of max_new_tokens
STEPS_PER_CALL = 32  # of decode; between calls the host looks for stop strings and Ctrl-C
SCORED_TOKENS_PER_BATCH = 8192


class Engine:
    """A model ready to generate and to score."""

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        tokenizer: Tokenizer,
        *,
        rope_theta: float,
        context_length: int,
        mesh: Mesh | None = None,
        max_batch: int = 32,
    ):
        """`params` are training's: on the host or on devices, scanned or unrolled.

        `mesh` is any mesh; the default is one device. Raises BadInput if the tokenizer has more
        pieces than the model's vocabulary.
        """
        self.mesh = mesh or sharding.make_mesh(1, 1, devices=jax.devices()[:1])
        self.tokenizer, self.context_length, self.max_batch = tokenizer, context_length, max_batch
        self.rope_theta = jnp.float32(rope_theta)
        self.model = for_inference(model, self.mesh.devices.flat[0].platform)
        if tokenizer.vocab_size > model.vocab_size:
            raise BadInput(
                f"the tokenizer has {tokenizer.vocab_size} pieces and the model's vocabulary is "
                f"{model.vocab_size}: use the model's own tokenizer"
            )

        # Copies, because training donates its own
        def place(x):
            copied = jnp.array(x, self.model.dtype, copy=True)
            return jax.device_put(copied, sharding.replicated(self.mesh))

        self.params = jax.tree.map(place, unstack_layers(params))

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, **options: Any) -> "Engine":
        """Loads a checkpoint, or the latest one in a workdir: see `checkpoint.load`."""
        loaded = checkpoint.load(path)
        return cls(
            loaded.model,
            loaded.params,
            loaded.tokenizer,
            rope_theta=loaded.rope_theta,
            context_length=loaded.context_length,
            **options,
        )

    @functools.cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.model.vocab_size, self.tokenizer.end_ids[1:])

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling = Sampling(),
        **options: Any,
    ) -> list[Completion]:
        """A completion for each prompt, in order; options are those of `completions`."""
        found = dict(self.completions(prompts, sampling, **options))
        return [found[i] for i in range(len(found))]

    def completions(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling = Sampling(),
        *,
        max_new_tokens: int = NEW_TOKENS,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        grammar: Grammar | Sequence[Grammar] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Yields `(index of the prompt, completion)` batch by batch, the shortest prompts first.

        A prompt is text (encoded with BOS) or token ids (used as they are). `stop` are strings that
        end a completion and are cut off; `stop_ids` default to EOS (and `<|im_end|>` if there is
        one). `grammar` is one for all prompts, or one for each. A completion ends at the model's
        context at the latest. Raises BadInput, before anything is generated, for a prompt that is
        empty or fills the context, and for an invalid grammar.
        """
        if isinstance(prompts, str):
            raise BadInput("prompts is one string: give a list of them")
        encoded = [self._encode(prompt, i) for i, prompt in enumerate(prompts)]
        if grammar is None or isinstance(grammar, Grammar):
            grammar = [grammar] * len(encoded)
        grammars = list(grammar)
        if len(grammars) != len(encoded):
            raise BadInput(
                f"there are {len(encoded)} prompts and {len(grammars)} grammars: give one for all, "
                "or one for each"
            )
        for one in dict.fromkeys(one for one in grammars if one is not None):
            self.grammars.compile(one)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        for start in range(0, len(order), self.max_batch):
            indices = order[start : start + self.max_batch]
            chosen = [encoded[i] for i in indices], indices, [grammars[i] for i in indices]
            batch = Batch(self, *chosen, sampling, max_new_tokens, stop, stop_ids)
            for _ in batch.run(STEPS_PER_CALL):
                pass
            yield from zip(indices, batch.completions(), strict=True)

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling = Sampling(),
        *,
        max_new_tokens: int = NEW_TOKENS,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        grammar: Grammar | None = None,
    ) -> Iterator[str]:
        """Yields the text of one completion as it is settled, token by token.

        Returns the `Completion`; options are those of `completions`.
        """
        prompts = [self._encode(prompt, 0)]
        batch = Batch(self, prompts, [0], [grammar], sampling, max_new_tokens, stop, stop_ids)
        for (piece,) in batch.run(steps=1):
            if piece:
                yield piece
        return batch.completions()[0]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each sequence of n token ids, n - 1 natural-log probabilities, float32.

        They are those of the second to the last token, given the tokens before. Raises BadInput for
        a sequence that is empty or longer than the context, and for a bare sequence.
        """
        if isinstance(sequences, str) or any(np.ndim(sequence) != 1 for sequence in sequences):
            raise BadInput(
                "score takes a list of sequences of token ids: for one, write score([ids])"
            )
        of_length: dict[int, list[int]] = {}
        for i, sequence in enumerate(sequences):
            self._check(sequence, f"sequence {i}", longest=self.context_length)
            of_length.setdefault(bucket(len(sequence), SMALLEST_LENGTH), []).append(i)
        found: dict[int, np.ndarray] = {}
        for length, indices in of_length.items():
            rows = min(len(indices), max(1, SCORED_TOKENS_PER_BATCH // length))
            rows = bucket(rows, self.mesh.size)
            for start in range(0, len(indices), rows):
                chosen = indices[start : start + rows]
                tokens_BT = self.place(pad([sequences[i] for i in chosen], rows, length))
                with sharding.use_mesh(self.mesh):
                    logprobs_BT = np.asarray(
                        token_logprobs(self.params, tokens_BT, self.rope_theta, model=self.model)
                    )
                for row, i in enumerate(chosen):
                    found[i] = logprobs_BT[row, 1 : len(sequences[i])]
        return [found[i] for i in range(len(sequences))]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits (T, V) float32 after each token of one sequence, for comparisons.

        Raises BadInput like `score`.
        """
        self._check(tokens, "the sequence", longest=self.context_length)
        length = bucket(len(tokens), SMALLEST_LENGTH)
        tokens_BT = self.place(pad([tokens], self.mesh.size, length))
        with sharding.use_mesh(self.mesh):
            logits_BTV = logits(self.params, tokens_BT, self.rope_theta, model=self.model)
        return np.asarray(logits_BTV)[0, : len(tokens)]

    def place(self, rows: np.ndarray) -> jax.Array:
        return jax.device_put(rows, sharding.batch_sharding(self.mesh))

    def _encode(self, prompt: str | Sequence[int], index: int) -> list[int]:
        try:
            if isinstance(prompt, str):
                tokens = self.tokenizer.encode(prompt, bos=True)
            else:
                tokens = [int(token) for token in prompt]
        except (RuntimeError, TypeError, ValueError) as error:
            raise BadInput(
                f"prompt {index} is neither text that UTF-8 can encode nor a list of token ids: "
                f"{prompt!r:.80}"
            ) from error
        self._check(tokens, f"prompt {index}", longest=self.context_length - 1)
        return tokens

    def _check(self, tokens: Sequence[int], what: str, longest: int) -> None:
        if len(tokens) == 0:
            raise BadInput(f"{what} is empty: give at least one token, such as BOS")
        if len(tokens) > longest:
            raise BadInput(
                f"{what} has {len(tokens):,} tokens and the model's context is "
                f"{self.context_length:,}: shorten it to {longest:,} or fewer"
            )
        if not 0 <= min(tokens) <= max(tokens) < self.model.vocab_size:
            raise BadInput(
                f"{what} has a token id outside 0 to {self.model.vocab_size - 1}: it was encoded "
                "with another tokenizer"
            )
