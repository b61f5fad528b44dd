"""The host's half of decoding: prompts that are decoded together, and the text of each."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from nanollama_jax import sharding
from nanollama_jax.errors import BadInput
from nanollama_jax.infer.decode import NOT_FINITE, DecodeState, decode, prefill
from nanollama_jax.infer.grammar import Grammar
from nanollama_jax.infer.sampling import Sampling
from nanollama_jax.infer.text_stream import TextStream

if TYPE_CHECKING:
    from nanollama_jax.infer.engine import Engine

SMALLEST_LENGTH = 32  # of the buckets that lengths are rounded up to


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    `finish_reason` is "stop" after a stop token, a stop string or the grammar's end, and "length"
    when the budget or the context was used up.
    """

    text: str  # without the stop string that ended it
    tokens: list[int]  # with the stop token that ended it
    finish_reason: str


class Batch:
    """Prompts (token ids) that are decoded together. `streams` numbers their random streams."""

    def __init__(
        self,
        engine: "Engine",
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
        context = engine.context_length
        last_B = np.minimum(length_B - 1 + min(max_new_tokens, context), context - 1)
        self._engine, self._sampling = engine, sampling
        self._budgets = (last_B - length_B + 1)[: len(prompts)].tolist()
        stop_ids = engine.tokenizer.end_ids if stop_ids is None else tuple(stop_ids)
        self._texts = [TextStream(engine.tokenizer, prompt, stop, stop_ids) for prompt in prompts]
        self._constraints = [
            None if grammar is None else engine.grammars.start(grammar, budget)
            for grammar, budget in zip(grammars, self._budgets, strict=True)
        ]
        self._constrained = any(self._constraints)
        # Under a grammar the host decides what ends a row
        self._stop_ids = jnp.array([] if self._constrained else stop_ids, jnp.int32)

        tokens_BT = pad(prompts, len(length_B), bucket(int(length_B.max()), SMALLEST_LENGTH))
        # The token at last_B is never attended to
        slots = max(tokens_BT.shape[1], bucket(int(last_B.max()), SMALLEST_LENGTH))
        seen_BV = None
        if "repetition_penalty" in sampling.switches:
            seen_BV = np.zeros((len(length_B), engine.model.vocab_size), bool)
            for row, prompt in enumerate(prompts):
                seen_BV[row, prompt] = True
        with sharding.use_mesh(engine.mesh):
            caches = prefill(
                engine.params,
                engine.place(tokens_BT),
                engine.rope_theta,
                model=engine.model,
                slots=slots,
            )
            self._state = DecodeState(
                caches=caches,
                token_B=engine.place(tokens_BT[np.arange(len(length_B)), length_B - 1]),
                position_B=engine.place(length_B - 1),
                last_B=engine.place(last_B),
                stream_B=engine.place(np.array([*streams, *[0] * padding], np.int32)),
                done_B=engine.place(np.arange(len(length_B)) >= len(prompts)),
                seen_BV=seen_BV if seen_BV is None else engine.place(seen_BV),
            )

    def run(self, steps: int) -> Iterator[list[str]]:
        """Decodes to the end, `steps` tokens per call (one under a grammar).

        After each call, yields the newly settled text of each prompt.
        """
        if self._constrained:
            yield from self._run_constrained()
            return
        # When streaming, the next step is dispatched before the host reads this one's token, so the
        # device does not wait for the host
        calls = [self._decode(steps)] if steps == 1 else []
        while self._unfinished():
            calls.append(self._decode(steps))
            rows = fetch(calls.pop(0))[: len(self._texts)]
            yield [self._push(i, row[row >= 0].tolist()) for i, row in enumerate(rows)]

    def _run_constrained(self) -> Iterator[list[str]]:
        """One step at a time: the next mask depends on the last token."""
        words = -(-self._engine.model.vocab_size // 32)
        allowed_BW = np.full((len(self._state.token_B), words), -1, np.int32)
        while running := self._unfinished():
            for row in running:
                if constraint := self._constraints[row]:
                    constraint.fill_mask(allowed_BW[row])
            token_B = fetch(self._decode(1, self._engine.place(allowed_BW)))[:, 0].copy()
            pieces = [""] * len(self._texts)
            for row in running:
                at_end = None
                if constraint := self._constraints[row]:
                    token_B[row] = constraint.accept(int(token_B[row]))
                    at_end = "stop" if constraint.finished else None
                pieces[row] = self._push(row, [int(token_B[row])], at_end)
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
        engine, sampling = self._engine, self._sampling
        with sharding.use_mesh(engine.mesh):
            out_BC, self._state = decode(
                engine.params,
                self._state,
                allowed_BW,
                self._stop_ids,
                engine.rope_theta,
                sampling.values,
                model=engine.model,
                steps=steps,
                switches=sampling.switches,
                pieces=engine.tokenizer.vocab_size,
            )
        return out_BC


def fetch(out_BC: jax.Array) -> np.ndarray:
    """The tokens of a `decode` call, on the host. Raises BadInput if logits were not finite."""
    tokens_BC = np.asarray(out_BC)
    if (tokens_BC == NOT_FINITE).any():
        raise BadInput(
            "the model's logits are not finite: the checkpoint is damaged, or from a run that "
            "diverged; use an earlier one"
        )
    return tokens_BC


def bucket(size: int, smallest: int) -> int:
    """The least `smallest` * 2^k that is at least `size`."""
    return smallest << max(0, -(-size // smallest) - 1).bit_length()


def pad(sequences: Sequence[Sequence[int]], rows: int, length: int) -> np.ndarray:
    """(rows, length) int32: each sequence from the left, zeros elsewhere."""
    tokens_BT = np.zeros((rows, length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence)] = sequence
    return tokens_BT
