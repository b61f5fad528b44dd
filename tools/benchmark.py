"""Speed, beside what one would use instead, measured in the same run.

python tools/benchmark.py train                        our training step against transformers + torch, nano shape, this machine's CPU
python tools/benchmark.py data                         preparation against bare SentencePiece; packed tokens/s of the pipeline
python tools/benchmark.py data --source 'file://texts/*.jsonl' --tokenizer FILE
python tools/benchmark.py decontaminate --source URL --benchmark gsm8k=URL ...     documents/s of one core, beside MinHash's
python tools/benchmark.py corpus                       opening, shuffling and resuming 1,000 shards of 30B tokens
python tools/benchmark.py decode                       generation against transformers and llama.cpp (on a GPU: against its memory bandwidth too)
python tools/benchmark.py decode --scale 1b
python tools/benchmark.py grammar                      what a constraint costs for each token
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

from configs.corpora import BENCHMARKS

# Bytes a second that a device's memory gives (vendor's figures)
MEMORY_BANDWIDTH = {"NVIDIA A100": 2.0e12, "NVIDIA H100": 3.35e12, "NVIDIA H200": 4.8e12}


def benchmark_train(rounds: int, steps: int) -> None:
    """Rounds of `steps` steps of each in turn, so that a busy spell of the machine hits both; medians over rounds."""
    import numpy as np

    from configs import common

    shape, batch_size, seq_len = common.MODELS["nano"], 16, 256
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape["vocab_size"], (batch_size, seq_len + 1), dtype=np.int32)
    peers = {"transformers + torch": torch_step(shape, tokens)}
    for remat in ("none", "products"):
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


def benchmark_data(source: str | None, tokenizer_path: str | None, benchmarks: dict[str, str]) -> None:
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
        path = tokenizer_path or root / "tokenizer.model"
        if not tokenizer_path:
            prepare.train_tokenizer_for([source], path, 4096, 8_000_000)
        tokenizer = Tokenizer(path)

        started = time.perf_counter()
        ids = tokenizer._processor.encode(texts, num_threads=cores)
        bare = megabytes / (time.perf_counter() - started)
        started = time.perf_counter()
        manifest = prepare.prepare_source("text", source, "", root / "text", path, validation_fraction=0.02, tasks=8, benchmarks=benchmarks)
        ours = megabytes / (time.perf_counter() - started)
        tokens = sum(split["tokens"] for split in manifest["splits"].values())
        assert benchmarks or tokens == sum(map(len, ids)), "preparation and SentencePiece disagree on the number of tokens"
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


def benchmark_decontaminate(source: str, benchmarks: dict[str, str], documents: int = 4000) -> None:
    """One core, from text: our search for benchmark items, then signatures alone of MinHash (rensa, as tools/near_duplicates.py makes them)."""
    import itertools

    from nanollama_jax.data.decontaminate import Index, read_benchmarks
    from nanollama_jax.data.near_duplicates import signature
    from nanollama_jax.data.sources import read_documents

    started = time.process_time()
    index = Index(read_benchmarks(benchmarks))
    print(f"\n{len(index.items):,} items of {len(benchmarks)} benchmarks, read and indexed in {time.process_time() - started:.1f} s")
    texts = [document.text for document in itertools.islice(read_documents(source, 0, 1), documents)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for name, run in (("13-grams", lambda: index.find(texts)), ("MinHash", lambda: [signature(text) for text in texts])):
        run()
        started = time.process_time()
        run()
        seconds = time.process_time() - started
        print(f"{name:9s} {len(texts) / seconds:8,.0f} documents/s  {megabytes / seconds:6.1f} MB/s a core")
    print(f"({len(texts):,} documents, {megabytes:.1f} MB)")


def benchmark_corpus(shards: int = 1000, documents: int = 30_000, length: int = 1000) -> None:
    """One real shard under 1,000 names: 30 million documents. Opened and resumed as training does, each in a process of its own."""
    import multiprocessing

    import grain
    import numpy as np

    from nanollama_jax.data.shards import ShardWriter, write_json

    tokenizer = random_model("nano").tokenizer
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory) / "corpus"
        root.mkdir()
        writer = ShardWriter(root, "train-00000", documents * length)
        for number in range(documents):
            writer.write(np.full(length, 3 + number % 4000, np.uint16).tobytes(), tokens=length, text_bytes=4 * length)
        (first,) = writer.close()
        names = [f"train-{number:05d}-000.array_record" for number in range(shards)]
        for name in names[1:]:
            os.link(root / names[0], root / name)
        split = {"documents": documents * shards, "tokens": documents * shards * length, "shards": [first | {"file": name} for name in names]}
        empty = {"documents": 0, "tokens": 0, "shards": []}
        write_json(root / "manifest.json", {"tokenizer_sha256": tokenizer.sha256, "dtype": "uint16", "splits": {"train": split, "validation": empty}})
        print(f"\n{shards:,} shards, {split['documents']:,} documents, {split['tokens']:,} tokens")
        context, state = multiprocessing.get_context("spawn"), None
        for what in ("opened", "resumed in the middle of a window, at a random document"):
            with context.Pool(1) as pool:
                seconds, gigabytes, state = pool.apply(open_corpus, (directory, tokenizer.model_bytes, state))
            print(f"{what}: first batch after {seconds:.1f} s, {gigabytes:.2f} GB of host memory in all")
            state["parents"]["corpus"]["parent_window_start_state"]["parent"]["next_index"] = int(
                np.random.default_rng(0).integers(split["documents"])
            )
        order = grain.MapDataset.range(split["documents"]).seed(0).shuffle()
        print(f"of as many, Grain's shuffle takes the first 1,000 from {len({order[i] // documents for i in range(1000)})} shards")


def open_corpus(directory: str, tokenizer_model: bytes, state: dict | None) -> tuple[float, float, dict]:
    """Seconds from nothing to the first batch, what the process took of memory (GB), and the position after some batches."""
    import resource

    from nanollama_jax.data import pipeline
    from nanollama_jax.tokenizer import Tokenizer

    started = time.perf_counter()
    tokenizer = Tokenizer("made-up", tokenizer_model)
    sources = {"corpus": pipeline.open_source(directory, "corpus", tokenizer)}
    batches = iter(pipeline.train_batches(sources, {"corpus": 1.0}, tokenizer, batch_size=32, seq_len=4096, max_segments=64, seed=0))
    if state:
        batches.set_state(state)
    next(batches)
    seconds = time.perf_counter() - started
    for _ in range(5):
        next(batches)
    state = batches.get_state()
    batches.close()
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, state


def benchmark_decode(scale: str, rounds: int) -> None:
    """Greedy, 128 new tokens after 16, the whole call, random weights; rounds of each in turn, medians."""
    import jax
    import numpy as np

    from nanollama_jax.export import gguf, hf
    from nanollama_jax.export.compare import LlamaCpp, Transformers
    from nanollama_jax.infer.engine import Engine

    loaded = random_model(scale)
    engine = Engine(loaded.model, loaded.params, loaded.tokenizer, rope_theta=loaded.rope_theta, context_length=loaded.context_length)
    device = jax.devices()[0]
    new_tokens, rng = 128, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        hf.export(loaded, f"{folder}/hf", "float32")
        gguf.export(loaded, f"{folder}/f16.gguf", "f16")
        peers = {f"transformers + torch, float32, {os.cpu_count()} cores": Transformers(f"{folder}/hf")} if device.platform == "cpu" else {}
        print(f"\n{scale}: {loaded.model.num_params:,} parameters, {device.device_kind}; 16 tokens of prompt, {new_tokens} new ones")
        for batch in (1, 8) if device.platform == "cpu" else (1, 8, 64):
            prompts = rng.integers(3, loaded.model.vocab_size, (batch, 16)).tolist()
            engine.max_batch = batch
            ours = lambda: engine.generate(prompts, max_new_tokens=new_tokens, stop_ids=())  # noqa: B023, E731
            runs = {f"ours, {engine.model.dtype}": ours} | {name: functools.partial(peer.greedy, prompts, new_tokens) for name, peer in peers.items()}
            if device.platform == "cpu":
                runs["llama.cpp, f16"] = functools.partial(LlamaCpp(f"{folder}/f16.gguf", 256, sequences=batch).greedy, prompts, new_tokens)
            rates = {name: [] for name in runs}
            for timed in range(-1, rounds):
                for name, run in runs.items():
                    started = time.perf_counter()
                    run()
                    if timed >= 0:
                        rates[name].append(batch * new_tokens / (time.perf_counter() - started))
            first = statistics.median(rates[next(iter(runs))])
            for name, values in rates.items():
                rate = statistics.median(values)
                note = "" if name == next(iter(runs)) else f"  ours is {first / rate:.2f}x as fast"
                if bandwidth := next((value for kind, value in MEMORY_BANDWIDTH.items() if kind in device.device_kind), None):
                    bytes_a_step = loaded.model.matmul_params * 2  # each weight once a step; keys and values are 1 % of it here
                    note += f"  {bytes_a_step * rate / batch / bandwidth:.0%} of the memory's bandwidth"
                print(f"batch {batch:2d}  {name:42s} {rate:9,.1f} tokens/s{note}")


def benchmark_grammar(tokenizer_path: str, generations: int = 100) -> None:
    """The host's work for each token of a constrained generation: the mask, and taking what was drawn. Uniform draws, as of an untrained model."""
    import numpy as np

    from nanollama_jax.infer.constraint import Grammars
    from nanollama_jax.infer.grammar import tool_call
    from nanollama_jax.tokenizer import Tokenizer

    text, number = {"type": "string"}, {"type": "number"}
    schemas = {
        "add_event": {"title": text, "start": text, "minutes": {"type": "integer"}, "guests": {"type": "array", "items": text}},
        "convert": {"value": number, "unit": {"enum": ["m", "ft", "km", "mi"]}, "to": {"enum": ["m", "ft", "km", "mi"]}},
        "search": {"query": text, "options": {"type": "object", "properties": {"limit": {"type": "integer"}, "exact": {"type": "boolean"}}}},
    }
    parameters = {name: {"type": "object", "properties": fields, "required": list(fields)} for name, fields in schemas.items()}
    grammar = tool_call([{"name": name, "parameters": value} for name, value in parameters.items()])
    tokenizer = Tokenizer(tokenizer_path)
    vocab_size = -(-tokenizer.vocab_size // 8) * 8
    grammars, mask_W, rng, spent = Grammars(tokenizer, vocab_size), np.zeros(-(-vocab_size // 32), np.int32), np.random.default_rng(0), []
    for _ in range(generations):
        constraint = grammars.start(grammar, 200)
        while not constraint.finished:
            started = time.perf_counter()
            constraint.fill_mask(mask_W)
            masked = time.perf_counter() - started
            token = int(rng.choice(np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))))
            started = time.perf_counter()
            constraint.accept(token)
            spent.append(1e6 * (masked + time.perf_counter() - started))
    print(f"\n{len(spent):,} tokens of {generations} tool calls, vocabulary {vocab_size:,}: mask and accept take {np.mean(spent):.0f} us a token")
    print(f"median {np.median(spent):.0f} us, 99 of 100 below {np.percentile(spent, 99):.0f} us, longest {max(spent) / 1000:.1f} ms")


def random_model(scale: str):
    """A model with the shape of `scale` and a vocabulary of made-up pieces."""
    import dataclasses

    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    from sentencepiece import sentencepiece_model_pb2 as spm

    from configs import common
    from nanollama_jax.checkpoint import Loaded
    from nanollama_jax.model import Llama, ModelConfig
    from nanollama_jax.tokenizer import Tokenizer

    model = ModelConfig(**common.MODELS[scale], scan_layers=False)
    proto, piece = spm.ModelProto(), spm.ModelProto.SentencePiece
    special = [("<unk>", piece.UNKNOWN), ("<s>", piece.CONTROL), ("</s>", piece.CONTROL), *((f"<0x{i:02X}>", piece.BYTE) for i in range(256))]
    for i in range(model.vocab_size):
        name, kind = special[i] if i < len(special) else (f"piece{i}", piece.NORMAL)
        proto.pieces.add(piece=name, type=kind, score=-i)
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback, proto.trainer_spec.pad_id = spm.TrainerSpec.BPE, True, -1
    proto.normalizer_spec.remove_extra_whitespaces, proto.normalizer_spec.add_dummy_prefix = False, False
    dummy = jnp.zeros((1, 2), jnp.int32)
    make = jax.jit(lambda: nn.meta.unbox(Llama(model).init(jax.random.key(0), dummy, dummy, dummy, jnp.float32(1e4))["params"]))
    about = {"corpora": {}, "phase": "random", "step": 0, "tokens_seen": 0, "data_sha256": "", "git_commit": "", "tokenizer_sha256": ""}
    metadata = {"model": dataclasses.asdict(model), "rope_theta": 1e4, "context_length": 4096, "provenance": about}
    params = jax.tree.map(np.asarray, make())
    return Loaded(model, params, Tokenizer("made-up", proto.SerializeToString()), metadata, pathlib.Path("random"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "data", "decontaminate", "corpus", "decode", "grammar"))
    parser.add_argument("--source", help="data, decontaminate: a source URL (default: the built-in corpus)")
    parser.add_argument("--benchmark", action="append", default=[], metavar="NAME=URL", help="decontaminate, data: what to search for")
    parser.add_argument("--rounds", type=int, default=5, help="train: how often each is measured")
    parser.add_argument("--steps", type=int, default=3, help="train: steps each time")
    parser.add_argument("--scale", default="nano", help="decode: the model's size (default: %(default)s)")
    parser.add_argument("--tokenizer", help="data, grammar: a SentencePiece model (default: one trained on the source; data/nano/tokenizer.model)")
    arguments = parser.parse_args()
    if arguments.what == "grammar":
        benchmark_grammar(arguments.tokenizer or "data/nano/tokenizer.model")
        return
    if arguments.what == "decode":
        benchmark_decode(arguments.scale, arguments.rounds)
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if arguments.what == "train":
        benchmark_train(arguments.rounds, arguments.steps)
        return
    benchmarks = dict(one.split("=", 1) for one in arguments.benchmark)
    if arguments.what == "corpus":
        benchmark_corpus()
    elif arguments.what == "decontaminate":
        benchmark_decontaminate(arguments.source or "builtin://docs", benchmarks or BENCHMARKS)
    else:
        benchmark_data(arguments.source, arguments.tokenizer, benchmarks)


if __name__ == "__main__":
    main()
