"""Generation and scoring with a trained model.

    engine = Engine.from_checkpoint("runs/curriculum_nano")
    for completion in engine.generate(["def area(", "The history of"], Sampling(temperature=0.8), max_new_tokens=100):
        print(completion.text)

Shapes are rounded up to buckets, so that few programs are compiled. The whole model lies on each device, in the dtype of its products (bfloat16 on
a GPU, where 1B takes 2.2 GB; float32 on a CPU), and rows are split over the devices: no step waits for weights from elsewhere.
"""

import dataclasses
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
from nanollama_jax.infer.constraint import Grammars
from nanollama_jax.infer.decode import (
    NOT_FINITE,
    DecodeState,
    decode,
    logits,
    prefill,
    token_logprobs,
)
from nanollama_jax.infer.grammar import Grammar
from nanollama_jax.infer.sampling import Sampling
from nanollama_jax.infer.text_stream import TextStream
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.llama import unstack_layers
from nanollama_jax.tokenizer import Tokenizer

SMALLEST_LENGTH = 32
NEW_TOKENS = 128  # unless one says how many
STEPS_A_CALL = 32  # of decode, between two looks of the host (stop strings, Ctrl-C)
SCORED_TOKENS_A_BATCH = 8192


@dataclasses.dataclass(frozen=True)
class Completion:
    text: str  # without the stop string that ended it
    tokens: list[int]  # the stop token that ended it included
    finish_reason: str  # "stop": a stop token, a stop string or the grammar's end; "length": the budget or the context was used up


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
        """`params` as training has them: on the host or on devices, scanned or not. `mesh` is that of training, or any; default: one device."""
        self.mesh = mesh or sharding.make_mesh(1, 1, devices=jax.devices()[:1])
        self.tokenizer, self.rope_theta, self.context_length, self.max_batch = (
            tokenizer,
            jnp.float32(rope_theta),
            context_length,
            max_batch,
        )
        on_gpu = self.mesh.devices.flat[0].platform == "gpu"
        # Rows are padded on the right, so plain causal attention is right for them: flash attention on a GPU
        dtype, attention = ("bfloat16", "cudnn") if on_gpu else ("float32", "xla")
        self.model = dataclasses.replace(
            model,
            dtype=dtype,
            attention=attention,
            document_mask=False,
            remat="none",
            scan_layers=False,
        )
        if tokenizer.vocab_size > model.vocab_size:
            raise BadInput(
                f"the tokenizer has {tokenizer.vocab_size} pieces and the model's vocabulary is {model.vocab_size}: they do not belong together"
            )

        # Copies: training goes on to donate its own
        def place(x):
            return jax.device_put(jnp.array(x, dtype, copy=True), sharding.replicated(self.mesh))

        self.params = jax.tree.map(place, unstack_layers(params))

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, **options: Any) -> "Engine":
        """The model of a checkpoint, or of the latest in a workdir: see `checkpoint.load`."""
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
        """A completion for each prompt, in order; options as for `completions`."""
        return [
            completion
            for _, completion in sorted(
                self.completions(prompts, sampling, **options), key=lambda found: found[0]
            )
        ]

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
        """Yields `(index of the prompt, completion)`, batch by batch, prompts of like length together.

        A prompt is text (BOS is put before it) or token ids (taken as they are). `stop` are strings, cut off; `stop_ids` default to EOS (and
        `<|im_end|>`, where there is one). `grammar` is one for all, or one for each. A completion ends at the model's context at the latest.
        Raises BadInput, before anything is generated, for a prompt that is empty or fills the context, and for a grammar that is invalid.
        """
        if isinstance(prompts, str):
            raise BadInput("prompts is one string: give a list of them")
        encoded = [self._encode(prompt, i) for i, prompt in enumerate(prompts)]
        grammars = (
            [grammar] * len(encoded)
            if grammar is None or isinstance(grammar, Grammar)
            else list(grammar)
        )
        if len(grammars) != len(encoded):
            raise BadInput(
                f"there are {len(encoded)} prompts and {len(grammars)} grammars: give one for all, or one for each"
            )
        for one in dict.fromkeys(one for one in grammars if one is not None):
            self.grammars.compile(one)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        for start in range(0, len(order), self.max_batch):
            indices = order[start : start + self.max_batch]
            chosen = [encoded[i] for i in indices], indices, [grammars[i] for i in indices]
            batch = _Batch(self, *chosen, sampling, max_new_tokens, stop, stop_ids)
            for _ in batch.run(STEPS_A_CALL):
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
        """Yields the text of one completion as it is settled, token by token, and returns the `Completion`; options as for `completions`."""
        batch = _Batch(
            self,
            [self._encode(prompt, 0)],
            [0],
            [grammar],
            sampling,
            max_new_tokens,
            stop,
            stop_ids,
        )
        for (piece,) in batch.run(steps=1):
            if piece:
                yield piece
        return batch.completions()[0]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each sequence of n token ids, the n - 1 natural-log probabilities (float32) of its tokens from the second on, given those before.

        Raises BadInput for a sequence that is empty, or longer than the context, and for one that stands alone instead of in a list.
        """
        if isinstance(sequences, str) or any(np.ndim(sequence) != 1 for sequence in sequences):
            raise BadInput(
                "score takes a list of sequences of token ids: for one, write score([ids])"
            )
        for i, sequence in enumerate(sequences):
            self._check(sequence, f"sequence {i}", longest=self.context_length)
        of_length: dict[int, list[int]] = {}
        for i, sequence in enumerate(sequences):
            of_length.setdefault(bucket(len(sequence), SMALLEST_LENGTH), []).append(i)
        found: dict[int, np.ndarray] = {}
        for length, indices in of_length.items():
            rows = bucket(
                min(len(indices), max(1, SCORED_TOKENS_A_BATCH // length)), self.mesh.size
            )
            for start in range(0, len(indices), rows):
                chosen = indices[start : start + rows]
                tokens_BT = self.place(pad([sequences[i] for i in chosen], rows, length))
                with sharding.use_mesh(self.mesh):
                    logprobs_BT = np.asarray(
                        token_logprobs(self.params, tokens_BT, self.rope_theta, model=self.model)
                    )
                found |= {
                    i: logprobs_BT[row, 1 : len(sequences[i])] for row, i in enumerate(chosen)
                }
        return [found[i] for i in range(len(sequences))]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits (T, V) float32 after each token of one sequence: for comparisons. Raises BadInput as `score` does."""
        self._check(tokens, "the sequence", longest=self.context_length)
        tokens_BT = self.place(pad([tokens], self.mesh.size, bucket(len(tokens), SMALLEST_LENGTH)))
        with sharding.use_mesh(self.mesh):
            return np.asarray(logits(self.params, tokens_BT, self.rope_theta, model=self.model))[
                0, : len(tokens)
            ]

    def place(self, rows: np.ndarray) -> jax.Array:
        return jax.device_put(rows, sharding.batch_sharding(self.mesh))

    def _encode(self, prompt: str | Sequence[int], index: int) -> list[int]:
        try:
            tokens = (
                self.tokenizer.encode(prompt, bos=True)
                if isinstance(prompt, str)
                else [int(token) for token in prompt]
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise BadInput(
                f"prompt {index} is neither text that can be written as UTF-8 nor a list of token ids: {prompt!r:.80}"
            ) from error
        self._check(tokens, f"prompt {index}", longest=self.context_length - 1)
        return tokens

    def _check(self, tokens: Sequence[int], what: str, longest: int) -> None:
        if len(tokens) == 0:
            raise BadInput(f"{what} is empty: give at least one token, such as BOS")
        if len(tokens) > longest:
            raise BadInput(
                f"{what} has {len(tokens):,} tokens and the model's context is {self.context_length:,}: shorten it to {longest:,} or fewer"
            )
        if not 0 <= min(tokens) <= max(tokens) < self.model.vocab_size:
            raise BadInput(
                f"{what} has a token id outside 0 to {self.model.vocab_size - 1}: it was encoded with another tokenizer"
            )


class _Batch:
    """Prompts that are decoded together, and what has come of each."""

    def __init__(
        self,
        engine: Engine,
        prompts: list[list[int]],
        streams: Sequence[int],
        grammars: Sequence[Grammar | None],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str],
        stop_ids: Sequence[int] | None,
    ):
        if max_new_tokens < 1:
            raise BadInput(f"max_new_tokens={max_new_tokens} must be at least 1")
        padding = bucket(len(prompts), engine.mesh.size) - len(prompts)
        length_B = np.array([len(prompt) for prompt in prompts] + [1] * padding, np.int32)
        last_B = np.minimum(
            length_B - 1 + min(max_new_tokens, engine.context_length), engine.context_length - 1
        )
        self._engine, self._sampling = engine, sampling
        self._budgets = (last_B - length_B + 1)[: len(prompts)].tolist()
        stop_ids = engine.tokenizer.end_ids if stop_ids is None else tuple(stop_ids)
        self._texts = [TextStream(engine.tokenizer, prompt, stop, stop_ids) for prompt in prompts]
        self._constraints = [
            None if grammar is None else engine.grammars.start(grammar, budget)
            for grammar, budget in zip(grammars, self._budgets, strict=True)
        ]
        self._constrained = any(self._constraints)
        self._stop_ids = jnp.array(
            [] if self._constrained else stop_ids, jnp.int32
        )  # under a grammar the host decides what ends

        tokens_BT = pad(prompts, len(length_B), bucket(int(length_B.max()), SMALLEST_LENGTH))
        slots = max(
            tokens_BT.shape[1], bucket(int(last_B.max()), SMALLEST_LENGTH)
        )  # the token at last_B is never attended to
        seen_BV = None
        if "repetition_penalty" in sampling.switches:
            seen_BV = np.zeros((len(length_B), engine.model.vocab_size), bool)
            for row, prompt in enumerate(prompts):
                seen_BV[row, prompt] = True
        with sharding.use_mesh(engine.mesh):
            self._state = DecodeState(
                caches=prefill(
                    engine.params,
                    engine.place(tokens_BT),
                    engine.rope_theta,
                    model=engine.model,
                    slots=slots,
                ),
                token_B=engine.place(tokens_BT[np.arange(len(length_B)), length_B - 1]),
                position_B=engine.place(length_B - 1),
                last_B=engine.place(last_B),
                stream_B=engine.place(np.array([*streams, *[0] * padding], np.int32)),
                done_B=engine.place(np.arange(len(length_B)) >= len(prompts)),
                seen_BV=seen_BV if seen_BV is None else engine.place(seen_BV),
            )

    def run(self, steps: int) -> Iterator[list[str]]:
        """Decodes to the end, `steps` at a time (one under a grammar); yields the text that each call settled for each prompt."""
        if self._constrained:
            yield from self._run_constrained()
            return
        # When streaming, the next step is dispatched before the host looks at this one's token: the device does not wait for it.
        calls = [self._decode(steps)] if steps == 1 else []
        while self._unfinished():
            calls.append(self._decode(steps))
            tokens_BC = fetch(calls.pop(0))
            yield [
                self._push(row, tokens_BC[row][tokens_BC[row] >= 0].tolist())
                for row in range(len(self._texts))
            ]

    def _run_constrained(self) -> Iterator[list[str]]:
        """One step at a time: what the grammar allows next is known when the host has seen the last token."""
        allowed_BW = np.full(
            (self._state.token_B.shape[0], -(-self._engine.model.vocab_size // 32)), -1, np.int32
        )
        while running := self._unfinished():
            for row in running:
                if constraint := self._constraints[row]:
                    constraint.fill_mask(allowed_BW[row])
            token_B = fetch(self._decode(1, self._engine.place(allowed_BW)))[:, 0].copy()
            pieces = [""] * len(self._texts)
            for row in running:
                constraint = self._constraints[row]
                token_B[row] = constraint.accept(int(token_B[row])) if constraint else token_B[row]
                pieces[row] = self._push(
                    row,
                    [int(token_B[row])],
                    at_end="stop" if constraint and constraint.finished else None,
                )
            self._state = self._state._replace(token_B=self._engine.place(token_B))
            yield pieces

    def completions(self) -> list[Completion]:
        return [Completion(text.text, text.tokens, text.finish_reason) for text in self._texts]

    def _unfinished(self) -> list[int]:
        return [row for row, text in enumerate(self._texts) if text.finish_reason is None]

    def _push(self, row: int, tokens: list[int], at_end: str | None = None) -> str:
        text = self._texts[row]
        piece = text.push(tokens)
        at_end = at_end or ("length" if len(text.tokens) == self._budgets[row] else None)
        return piece + text.finish(at_end) if at_end else piece

    def _decode(self, steps: int, allowed_BW: jax.Array | None = None) -> jax.Array:
        engine, values, switches = self._engine, self._sampling.values, self._sampling.switches
        with sharding.use_mesh(engine.mesh):
            args = (
                engine.params,
                self._state,
                allowed_BW,
                self._stop_ids,
                engine.rope_theta,
                values,
            )
            pieces = engine.tokenizer.vocab_size
            out_BC, self._state = decode(
                *args, model=engine.model, steps=steps, switches=switches, pieces=pieces
            )
        return out_BC


def fetch(out_BC: jax.Array) -> np.ndarray:
    """What `decode` gave, on the host. Raises BadInput where logits were not finite."""
    tokens_BC = np.asarray(out_BC)
    if (tokens_BC == NOT_FINITE).any():
        raise BadInput(
            "the model's logits are not finite: the checkpoint is of a run that diverged, or damaged; use an earlier one"
        )
    return tokens_BC


def bucket(size: int, smallest: int) -> int:
    """`smallest` times the least power of two that makes it at least `size`."""
    return smallest << max(0, -(-size // smallest) - 1).bit_length()


def pad(sequences: Sequence[Sequence[int]], rows: int, length: int) -> np.ndarray:
    """(rows, length) int32, each sequence from the left, zeros elsewhere."""
    tokens_BT = np.zeros((rows, length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence)] = sequence
    return tokens_BT
