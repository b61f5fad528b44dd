"""Runs exports in the programs they are for, to compare transformers and llama.cpp with ours.

transformers (with torch) need not be installed.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence

import numpy as np
from cyllama.llama import llama_cpp

from nanollama_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between two arrays of logits, (T, V) each."""

    largest: float  # absolute difference of any logit
    mean_kl: float  # KL(reference || other), nats a token
    agreement: float  # share of positions with the same likeliest token

    @classmethod
    def of(cls, reference_TV: np.ndarray, other_TV: np.ndarray) -> "Difference":
        p, q = (
            x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
            for x in (reference_TV.astype(np.float64), other_TV.astype(np.float64))
        )
        kl = (np.exp(p) * (p - q)).sum(axis=-1).mean()
        return cls(
            float(np.abs(reference_TV - other_TV).max()),
            float(kl),
            float((p.argmax(-1) == q.argmax(-1)).mean()),
        )


def transformers_is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


class Transformers:
    """A Hugging Face folder, in float32 on the CPU."""

    def __init__(self, folder: str | os.PathLike):
        import torch
        import transformers

        # Without these files transformers would ask the hub.
        needed = ("config.json", "tokenizer.json")
        if not all(os.path.isfile(os.path.join(folder, name)) for name in needed):
            raise BadInput(f"{folder} is not a Hugging Face export: it lacks {' or '.join(needed)}")
        transformers.utils.logging.disable_progress_bar()
        self._torch = torch
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True
            )
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
        # OSError, ValueError, KeyError, SafetensorError and tokenizers' bare Exception all occur.
        except Exception as error:
            raise BadInput(
                f"transformers cannot read {folder}: {' '.join(str(error).split())[:300]}"
            ) from error
        self.vocab_size: int = self.model.config.vocab_size

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """(T, V) float32."""
        with self._torch.no_grad():
            return self.model(self._torch.tensor([list(tokens)])).logits[0].numpy()

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """The continuation of each prompt."""
        longest = max(map(len, prompts))
        padding = [[0] * (longest - len(prompt)) for prompt in prompts]  # generate() needs it left
        ids = self._torch.tensor(
            [[*zeros, *prompt] for zeros, prompt in zip(padding, prompts, strict=True)]
        )
        mask = self._torch.tensor(
            [zeros + [1] * len(prompt) for zeros, prompt in zip(padding, prompts, strict=True)]
        )
        options = dict(
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        return self.model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()


class _Model(llama_cpp.LlamaModel):
    n_vocab = 0  # cyllama 0.2.18 reads it in get_logits_ith, but does not define it


class LlamaCpp:
    """A GGUF file, on the CPU."""

    def __init__(self, path: str | os.PathLike, context_length: int, sequences: int = 1):
        """Makes room for `sequences` prompts of up to `context_length` tokens at a time."""
        llama_cpp.set_log_callback(lambda level, text: None)
        try:
            self._model = _Model(str(path))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} is not a GGUF file that llama.cpp can read: {error}") from error
        self._vocab = self._model.get_vocab()
        self._model.n_vocab = self.vocab_size = self._vocab.n_vocab
        params = llama_cpp.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = context_length * sequences
        params.n_seq_max = sequences
        # A float32 cache and no flash attention: the defaults round to float16. On stories260K the
        # logits are 0.01 off with them, 2e-5 without.
        params.type_k = params.type_v = 0
        params.flash_attn_type = 0
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        self._context = llama_cpp.LlamaContext(self._model, params)
        self._batch = llama_cpp.LlamaBatch(n_tokens=context_length * sequences, embd=0, n_seq_max=1)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """With `special`, the names of special tokens in the text become those tokens."""
        return self._vocab.tokenize(text, add_special=False, parse_special=special)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """(T, V) float32."""
        self._decode([(token, i, 0, True) for i, token in enumerate(tokens)], fresh=True)
        return np.array([self._context.get_logits_ith(i) for i in range(len(tokens))], np.float32)

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """The continuation of each prompt."""
        sampler = llama_cpp.LlamaSampler()
        sampler.add_greedy()
        feed = [
            (token, i, row, i == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for i, token in enumerate(prompt)
        ]
        new: list[list[int]] = [[] for _ in prompts]
        for step in range(max_new_tokens):
            self._decode(feed, fresh=step == 0)
            last = [i for i, (_, _, _, wanted) in enumerate(feed) if wanted]
            for row, i in enumerate(last):
                new[row].append(sampler.sample(self._context, i))
            feed = [
                (tokens[-1], len(prompt) + step, row, True)
                for row, (prompt, tokens) in enumerate(zip(prompts, new, strict=True))
            ]
        return new

    def _decode(self, feed: Sequence[tuple[int, int, int, bool]], fresh: bool) -> None:
        """`feed` has each token's id, position, sequence, and whether its logits are wanted."""
        if fresh:
            self._context.kv_cache_clear(True)
        self._batch.clear()
        for token, position, row, wanted in feed:
            self._batch.add(int(token), position, [row], wanted)
        self._context.decode(self._batch)
