"""Speed of data preparation and loading.

Preparation against bare SentencePiece, the pipeline's rate, the search for benchmark items, and
opening and resuming a large corpus.
"""

import json
import os
import pathlib
import tempfile
import time

from benchmarks.decode import random_model


def benchmark_data(
    source: str | None, tokenizer_path: str | None, benchmarks: dict[str, str]
) -> None:
    from nanollama_jax.corpus import prepare
    from nanollama_jax.corpus.sources import read_documents
    from nanollama_jax.data import pipeline
    from nanollama_jax.tokenizer import Tokenizer

    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        if source is None:
            source = f"file://{root}/text-*.jsonl"
            texts = [
                document.text
                for name in ("docs", "code")
                for document in read_documents(f"builtin://{name}", 0, 1)
            ]
            for i in range(8):
                (root / f"text-{i}.jsonl").write_text(
                    "".join(json.dumps({"text": text}) + "\n" for text in texts[i::8])
                )
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
        manifest = prepare.prepare_source(
            "text",
            source,
            "",
            root / "text",
            path,
            validation_fraction=0.02,
            tasks=8,
            benchmarks=benchmarks,
        )
        ours = megabytes / (time.perf_counter() - started)
        tokens = sum(split["tokens"] for split in manifest["splits"].values())
        assert benchmarks or tokens == sum(map(len, ids)), (
            "preparation and SentencePiece disagree on the number of tokens"
        )
        print(
            f"\npreparation of {megabytes:.1f} MB on {cores} cores: {ours:.1f} MB/s, bare "
            f"SentencePiece {bare:.1f} MB/s: {ours / bare:.0%}"
        )

        sources = {"text": pipeline.open_source(root, "text", tokenizer)}
        for seq_len, batch_size in ((4096, 32), (16_384, 8)):
            data = pipeline.train_batches(
                sources,
                {"text": 1.0},
                tokenizer,
                batch_size=batch_size,
                seq_len=seq_len,
                max_segments=64,
                seed=0,
            )
            batches = iter(data)
            next(batches)
            started, count = time.perf_counter(), 64
            for _ in range(count):
                next(batches)
            rate = count * batch_size * seq_len / (time.perf_counter() - started)
            batches.close()
            print(
                f"packed batches of {batch_size} x {seq_len}: {rate / 1e6:.2f}M tokens/s "
                f"({tokens / len(texts):,.0f} tokens/document)"
            )


def benchmark_decontaminate(source: str, benchmarks: dict[str, str], documents: int = 4000) -> None:
    """One core, from text: our search for benchmark items, against MinHash signatures alone.

    (rensa's, as tools/near_duplicates.py computes them.)
    """
    import itertools

    from nanollama_jax.corpus.decontaminate import Index, read_benchmarks
    from nanollama_jax.corpus.near_duplicates import signature
    from nanollama_jax.corpus.sources import read_documents

    started = time.process_time()
    index = Index(read_benchmarks(benchmarks))
    seconds = time.process_time() - started
    print(
        f"\n{len(index.items):,} items of {len(benchmarks)} benchmarks, read and indexed in "
        f"{seconds:.1f} s"
    )
    documents = itertools.islice(read_documents(source, 0, 1), documents)
    texts = [document.text for document in documents]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for name, run in (
        ("13-grams", lambda: index.find(texts)),
        ("MinHash", lambda: [signature(text) for text in texts]),
    ):
        run()
        started = time.process_time()
        run()
        seconds = time.process_time() - started
        rates = f"{len(texts) / seconds:8,.0f} documents/s  {megabytes / seconds:6.1f} MB/s"
        print(f"{name:9s} {rates} per core")
    print(f"({len(texts):,} documents, {megabytes:.1f} MB)")


def benchmark_corpus(shards: int = 1000, documents: int = 30_000, length: int = 1000) -> None:
    """One real shard under 1,000 names: 30 million documents.

    Opened and resumed as in training, each time in a new process.
    """
    import multiprocessing

    import grain
    import numpy as np

    from nanollama_jax.data.shards import ShardWriter, verify_shards
    from nanollama_jax.files import write_json

    tokenizer = random_model("nano").tokenizer
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory) / "corpus"
        root.mkdir()
        writer = ShardWriter(root, "train-00000", documents * length)
        for number in range(documents):
            writer.write(
                np.full(length, 3 + number % 4000, np.uint16).tobytes(),
                tokens=length,
                text_bytes=4 * length,
            )
        (first,) = writer.close()
        names = [f"train-{number:05d}-000.array_record" for number in range(shards)]
        for name in names[1:]:
            os.link(root / names[0], root / name)
        split = {
            "documents": documents * shards,
            "tokens": documents * shards * length,
            "shards": [first | {"file": name} for name in names],
        }
        empty = {"documents": 0, "tokens": 0, "shards": []}
        manifest = {
            "tokenizer_sha256": tokenizer.sha256,
            "dtype": "uint16",
            "splits": {"train": split, "validation": empty},
        }
        verify_shards(root, manifest, just_written=True)
        write_json(root / "manifest.json", manifest)
        print(f"\n{shards:,} shards, {split['documents']:,} documents, {split['tokens']:,} tokens")
        context, state = multiprocessing.get_context("spawn"), None
        for what in ("opened", "resumed in the middle of a window, at a random document"):
            with context.Pool(1) as pool:
                seconds, gigabytes, state = pool.apply(
                    open_corpus, (directory, tokenizer.model_bytes, state)
                )
            print(f"{what}: first batch after {seconds:.1f} s, {gigabytes:.2f} GB of host memory")
            state["parents"]["corpus"]["parent_window_start_state"]["parent"]["next_index"] = int(
                np.random.default_rng(0).integers(split["documents"])
            )
        order = grain.MapDataset.range(split["documents"]).seed(0).shuffle()
        touched = {order[i] // documents for i in range(1000)}
        print(f"Grain's shuffle takes the first 1,000 documents from {len(touched)} shards")


def open_corpus(
    directory: str, tokenizer_model: bytes, state: dict | None
) -> tuple[float, float, dict]:
    """Seconds to the first batch, the process's peak memory (GB), and the state 5 batches later."""
    import resource

    from nanollama_jax.data import pipeline
    from nanollama_jax.tokenizer import Tokenizer

    started = time.perf_counter()
    tokenizer = Tokenizer("made-up", tokenizer_model)
    sources = {"corpus": pipeline.open_source(directory, "corpus", tokenizer)}
    batches = iter(
        pipeline.train_batches(
            sources,
            {"corpus": 1.0},
            tokenizer,
            batch_size=32,
            seq_len=4096,
            max_segments=64,
            seed=0,
        )
    )
    if state:
        batches.set_state(state)
    next(batches)
    seconds = time.perf_counter() - started
    for _ in range(5):
        next(batches)
    state = batches.get_state()
    batches.close()
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, state
