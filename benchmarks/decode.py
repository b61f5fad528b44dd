"""Speed of generation.

Against transformers and llama.cpp on a CPU, against the memory bandwidth on a GPU; and the cost of
a grammar per token.
"""

import functools
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np

from benchmarks.cases import Case, Row
from benchmarks.timing import median_and_spread

PROMPT_TOKENS, NEW_TOKENS = 16, 128

# Bytes per second of a device's memory (vendor's figures)
MEMORY_BANDWIDTH = {"NVIDIA A100": 2.0e12, "NVIDIA H100": 3.35e12, "NVIDIA H200": 4.8e12}

COLUMNS = {
    "tokens_per_second": ("tokens/s", ",.0f"),
    "spread": ("+-", ".1%"),
    "step_ms": ("ms/step", ".2f"),
    "bandwidth": ("bandwidth", ".0%"),
    "peak_gb": ("peak GB", ".1f"),
}
NOTES = ["bandwidth: share of the vendor's figure; each weight of a product counts once per step."]


def gpu_cases(scale: str, rounds: int) -> list[Case]:
    return [
        Case(f"batch {batch}", measure_decode, (dict(scale=scale, batch=batch, rounds=rounds),))
        for batch in (1, 8, 64)
    ]


def measure_decode(*, scale: str, batch: int, rounds: int) -> Row:
    """Greedy, 128 new tokens after a prompt of 16, the whole call, random weights."""
    import jax

    from nanollama_jax.infer.engine import Engine

    loaded = random_model(scale)
    engine = Engine(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        rope_theta=loaded.rope_theta,
        context_length=loaded.context_length,
        max_batch=batch,
    )
    prompts = (
        np.random.default_rng(0)
        .integers(3, loaded.model.vocab_size, (batch, PROMPT_TOKENS))
        .tolist()
    )
    rates = []
    for timed in range(-1, rounds):
        started = time.perf_counter()
        engine.generate(prompts, max_new_tokens=NEW_TOKENS, stop_ids=())
        if timed >= 0:
            rates.append(batch * NEW_TOKENS / (time.perf_counter() - started))
    rate, spread = median_and_spread(rates)
    device = jax.devices()[0]
    row = {
        "tokens_per_second": rate,
        "spread": spread,
        "step_ms": 1e3 * batch / rate,
        "dtype": engine.model.dtype,
        "device": device.device_kind,
    }
    if memory := device.memory_stats():
        row["peak_gb"] = memory["peak_bytes_in_use"] / 1e9
    if bandwidth := next(
        (value for kind, value in MEMORY_BANDWIDTH.items() if kind in device.device_kind), None
    ):
        bytes_per_step = 2 * loaded.model.matmul_params  # keys and values would add 1 % here
        row["bandwidth"] = bytes_per_step * rate / batch / bandwidth
    return row


def benchmark_on_cpu(scale: str, rounds: int) -> None:
    """The same, against transformers and llama.cpp; medians over rounds of each in turn."""
    import jax

    from nanollama_jax.export import gguf, hf
    from nanollama_jax.export.compare import LlamaCpp, Transformers
    from nanollama_jax.infer.engine import Engine

    loaded = random_model(scale)
    engine = Engine(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        rope_theta=loaded.rope_theta,
        context_length=loaded.context_length,
    )
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        hf.export(loaded, f"{folder}/hf", "float32")
        gguf.export(loaded, f"{folder}/f16.gguf", "f16")
        torch = Transformers(f"{folder}/hf")
        kind = jax.devices()[0].device_kind
        print(
            f"\n{scale}: {loaded.model.num_params:,} parameters, {kind}; {PROMPT_TOKENS} prompt "
            f"tokens, {NEW_TOKENS} new ones"
        )
        for batch in (1, 8):
            prompts = rng.integers(3, loaded.model.vocab_size, (batch, PROMPT_TOKENS)).tolist()
            engine.max_batch = batch
            ours = f"ours, {engine.model.dtype}"
            generate = functools.partial(engine.generate, max_new_tokens=NEW_TOKENS, stop_ids=())
            llama_cpp = LlamaCpp(f"{folder}/f16.gguf", 256, sequences=batch)
            theirs = f"transformers + torch, float32, {os.cpu_count()} cores"
            runs = {
                ours: functools.partial(generate, prompts),
                theirs: functools.partial(torch.greedy, prompts, NEW_TOKENS),
                "llama.cpp, f16": functools.partial(llama_cpp.greedy, prompts, NEW_TOKENS),
            }
            rates = {name: [] for name in runs}
            for timed in range(-1, rounds):
                for name, run in runs.items():
                    started = time.perf_counter()
                    run()
                    if timed >= 0:
                        rates[name].append(batch * NEW_TOKENS / (time.perf_counter() - started))
            first = statistics.median(rates[ours])
            for name, values in rates.items():
                rate = statistics.median(values)
                note = "" if name == ours else f"  ours is {first / rate:.2f}x as fast"
                print(f"batch {batch:2d}  {name:42s} {rate:9,.1f} tokens/s{note}")


def benchmark_grammar(tokenizer_path: str, generations: int = 100) -> None:
    """The host's work per token of a constrained generation: the mask, and accepting a token.

    Tokens are drawn uniformly, as from an untrained model.
    """
    from nanollama_jax.infer.constraint import Grammars
    from nanollama_jax.infer.grammar import tool_call
    from nanollama_jax.tokenizer import Tokenizer

    text, number = {"type": "string"}, {"type": "number"}
    schemas = {
        "add_event": {
            "title": text,
            "start": text,
            "minutes": {"type": "integer"},
            "guests": {"type": "array", "items": text},
        },
        "convert": {
            "value": number,
            "unit": {"enum": ["m", "ft", "km", "mi"]},
            "to": {"enum": ["m", "ft", "km", "mi"]},
        },
        "search": {
            "query": text,
            "options": {
                "type": "object",
                "properties": {"limit": {"type": "integer"}, "exact": {"type": "boolean"}},
            },
        },
    }
    parameters = {
        name: {"type": "object", "properties": fields, "required": list(fields)}
        for name, fields in schemas.items()
    }
    grammar = tool_call([{"name": name, "parameters": value} for name, value in parameters.items()])
    tokenizer = Tokenizer(tokenizer_path)
    vocab_size = -(-tokenizer.vocab_size // 8) * 8
    grammars, rng = Grammars(tokenizer, vocab_size), np.random.default_rng(0)
    mask_W, spent = np.zeros(-(-vocab_size // 32), np.int32), []
    for _ in range(generations):
        constraint = grammars.start(grammar, 200)
        while not constraint.finished:
            started = time.perf_counter()
            constraint.fill_mask(mask_W)
            masked = time.perf_counter() - started
            bits = np.unpackbits(mask_W.view(np.uint8), bitorder="little")
            token = int(rng.choice(np.flatnonzero(bits)))
            started = time.perf_counter()
            constraint.accept(token)
            spent.append(1e6 * (masked + time.perf_counter() - started))
    print(
        f"\n{len(spent):,} tokens of {generations} tool calls, vocabulary {vocab_size:,}: mask and "
        f"accept take {np.mean(spent):.0f} us/token"
    )
    print(
        f"median {np.median(spent):.0f} us, 99th percentile {np.percentile(spent, 99):.0f} us, "
        f"maximum {max(spent) / 1000:.1f} ms"
    )


def random_model(scale: str):
    """A model with the shape of `scale` and a vocabulary of made-up pieces."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from sentencepiece import sentencepiece_model_pb2 as spm

    from nanollama_jax.checkpoint import Loaded, weights_metadata
    from nanollama_jax.model import Llama, ModelConfig
    from nanollama_jax.recipes import MODELS
    from nanollama_jax.tokenizer import Tokenizer

    model = ModelConfig(**MODELS[scale], scan_layers=False)
    proto, piece = spm.ModelProto(), spm.ModelProto.SentencePiece
    special = [
        ("<unk>", piece.UNKNOWN),
        ("<s>", piece.CONTROL),
        ("</s>", piece.CONTROL),
        *((f"<0x{i:02X}>", piece.BYTE) for i in range(256)),
    ]
    for i in range(model.vocab_size):
        name, kind = special[i] if i < len(special) else (f"piece{i}", piece.NORMAL)
        proto.pieces.add(piece=name, type=kind, score=-i)
    proto.trainer_spec.model_type = spm.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.add_dummy_prefix = False
    dummy = jnp.zeros((1, 2), jnp.int32)

    @jax.jit
    def make():
        key, theta = jax.random.key(0), jnp.float32(1e4)
        return nn.meta.unbox(Llama(model).init(key, dummy, dummy, dummy, theta)["params"])

    about = {
        "corpora": {},
        "phase": "random",
        "step": 0,
        "tokens_seen": 0,
        "data_sha256": "",
        "git_commit": "",
        "tokenizer_sha256": "",
    }
    params = jax.tree.map(np.asarray, make())
    tokenizer = Tokenizer("made-up", proto.SerializeToString())
    metadata = weights_metadata(model, tokenizer, 1e4, 4096, about)
    return Loaded(model, params, tokenizer, metadata, pathlib.Path("random"))
