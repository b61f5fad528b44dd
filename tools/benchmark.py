"""Speed, beside what one would use instead, measured in the same run.

python tools/benchmark.py train                        our training step against transformers + torch, nano shape, this machine's CPU
python tools/benchmark.py data                         preparation against bare SentencePiece; packed tokens/s of the pipeline
python tools/benchmark.py data --source 'file://texts/*.jsonl'
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def benchmark_train(rounds: int, steps: int) -> None:
    """Rounds of `steps` steps of each in turn, so that a busy spell of the machine hits both; medians over rounds."""
    import numpy as np

    from configs import common

    shape, batch_size, seq_len = common.MODELS["nano"], 16, 256
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape["vocab_size"], (batch_size, seq_len + 1), dtype=np.int32)
    peers = {"transformers + torch": torch_step(shape, tokens)}
    for remat in ("none", "dots"):
        for scan_layers in (False, True):
            name = f"ours, remat {remat}, layers {'scanned' if scan_layers else 'unrolled'}"
            peers[name] = our_step(shape | dict(remat=remat, scan_layers=scan_layers), tokens)
    rates = {name: [] for name in peers}
    for _ in range(rounds):
        for name, run in peers.items():
            started = time.perf_counter()
            run(steps)
            rates[name].append(steps * batch_size * seq_len / (time.perf_counter() - started))
    baseline = statistics.median(rates["transformers + torch"])
    print(f"\nOne step of {batch_size} x {seq_len} tokens: forward, backward, clip, AdamW, in float32 (median of {rounds} rounds of {steps} steps)")
    for name, values in rates.items():
        print(f"{name:36s} {statistics.median(values):8,.0f} tokens/s  {statistics.median(values) / baseline:5.2f}x")


def our_step(model_shape: dict, tokens):
    """Runs n steps, with the document mask on, as training does."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nanollama_jax import sharding
    from nanollama_jax.model import ModelConfig
    from nanollama_jax.train import objectives, optimizer
    from nanollama_jax.train import step as steps

    model = ModelConfig(**model_shape)
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    B, T = tokens[:, 1:].shape
    segments = np.broadcast_to(np.repeat([1, 2], T // 2), (B, T)).astype(np.int32)
    positions = np.broadcast_to(np.tile(np.arange(T // 2), 2), (B, T)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments, "positions": positions}
    batch["loss_weights"] = np.ones((B, T), np.float32)
    adamw = optimizer.make_optimizer(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    with sharding.use_mesh(mesh):
        make, _, shardings = steps.init_state(model, adamw, mesh, seed=0)
        update = functools.partial(
            steps.train_step,
            objective=functools.partial(objectives.next_token, model=model, z_loss=1e-4, chunk_tokens=1024),
            optimizer=adamw,
            learning_rate=lambda _: jnp.float32(1e-3),
            rope_theta=lambda _: jnp.float32(1e4),
            accumulation=1,
        )
        update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
        state = make()
        placed = sharding.put_batch(batch, mesh)

    def run(n: int) -> None:
        nonlocal state
        with sharding.use_mesh(mesh):
            for _ in range(n):
                state, metrics = update(state, placed)
            jax.block_until_ready(metrics)

    run(2)
    return run


def torch_step(shape: dict, tokens):
    """The same shape and update in transformers: its default attention (SDPA), plain causal, which is less work than a document mask."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["ffn_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).float()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    inputs, labels = torch.from_numpy(tokens[:, :-1]).long(), torch.from_numpy(tokens[:, :-1]).long()

    def run(n: int) -> None:
        for _ in range(n):
            adamw.zero_grad(set_to_none=True)
            model(input_ids=inputs, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()

    run(2)
    return run


def benchmark_data(source: str | None) -> None:
    from nanollama_jax.data import pipeline, prepare
    from nanollama_jax.data.sources import read_documents
    from nanollama_jax.tokenizer import Tokenizer

    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        if source is None:
            source = f"file://{root}/text-*.jsonl"
            texts = [document.text for name in ("docs", "code") for document in read_documents(f"builtin://{name}", 0, 1)]
            for i in range(8):
                (root / f"text-{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[i::8]))
        else:
            texts = [document.text for document in read_documents(source, 0, 1)]
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        path = root / "tokenizer.model"
        prepare.train_tokenizer_for([source], path, 4096, 8_000_000)
        tokenizer = Tokenizer(path)

        started = time.perf_counter()
        ids = tokenizer._processor.encode(texts, num_threads=cores)
        bare = megabytes / (time.perf_counter() - started)
        started = time.perf_counter()
        manifest = prepare.prepare_source("text", source, "", root / "text", path, validation_fraction=0.02, tasks=8, workers=cores)
        ours = megabytes / (time.perf_counter() - started)
        tokens = sum(split["tokens"] for split in manifest["splits"].values())
        assert tokens == sum(map(len, ids)), "preparation and SentencePiece disagree on the number of tokens"
        print(f"\npreparation of {megabytes:.1f} MB on {cores} cores: {ours:.1f} MB/s, bare SentencePiece {bare:.1f} MB/s: {ours / bare:.0%}")

        sources = {"text": pipeline.open_source(root, "text", tokenizer)}
        for seq_len, batch_size in ((4096, 32), (16_384, 8)):
            data = pipeline.train_batches(sources, {"text": 1.0}, tokenizer, batch_size=batch_size, seq_len=seq_len, max_segments=64, seed=0)
            batches = iter(data)
            next(batches)
            started, count = time.perf_counter(), 64
            for _ in range(count):
                next(batches)
            rate = count * batch_size * seq_len / (time.perf_counter() - started)
            batches.close()
            print(f"packed batches of {batch_size} x {seq_len}: {rate / 1e6:.2f}M tokens/s ({tokens / len(texts):,.0f} tokens a document)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "data"))
    parser.add_argument("--source", help="data: a source URL (default: the built-in corpus)")
    parser.add_argument("--rounds", type=int, default=5, help="train: how often each is measured")
    parser.add_argument("--steps", type=int, default=3, help="train: steps each time")
    arguments = parser.parse_args()
    if arguments.what == "train":
        benchmark_train(arguments.rounds, arguments.steps)
    else:
        benchmark_data(arguments.source)


if __name__ == "__main__":
    main()
