"""Epochs and row statistics agree with figures computed by hand, and the mix is as asked for.

Long documents stay whole.
"""

import io
import json
import pathlib
import re
import subprocess
import sys
import types

import grain
import numpy as np
import pytest

from configs import phase2_16k
from nanollama_jax.console import Console
from nanollama_jax.corpus import mix_report
from nanollama_jax.corpus.prepare import prepare_source, train_tokenizer_for
from nanollama_jax.data import mix, pipeline
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[2]
BOS, EOS = 1, 2
ALPHABETS = {"docs": "abcd", "code": "klmn", "reasoning": "uvwx"}
FOUND = {
    "mmlu": {"items": 14_042, "items_found": 3, "documents": 5},
    "gsm8k": {"items": 1319, "items_found": 0, "documents": 0},
}
DECONTAMINATION = {
    "policy": "cut",
    "benchmarks": FOUND,
    "documents_dropped": 2,
    "documents_cut": 4,
    "characters_removed": 1234,
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Prepared sources in separate alphabets, without a validation split.

    Their tokenizer, and the ids of each of their texts.
    """
    root, rng = tmp_path_factory.mktemp("mix"), np.random.default_rng(0)
    lengths = {
        "docs": [150] * 60,
        "code": [*rng.integers(30, 300, 300), 120_000, 100_000],
        "reasoning": [40] * 2000,
    }
    texts = {
        name: ["".join(rng.choice(list(ALPHABETS[name]), n)) for n in lengths[name]]
        for name in lengths
    }
    for name in texts:
        (root / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts[name])
        )
    path = root / "tokenizer.model"
    train_tokenizer_for([f"file://{root}/{name}.jsonl" for name in texts], path, 300, 60_000)
    for name in texts:
        prepare_source(
            name,
            f"file://{root}/{name}.jsonl",
            "none",
            root / name,
            path,
            validation_fraction=0,
            tasks=1,
        )
    prepare_source(
        "transcripts",
        f"file://{root}/reasoning.jsonl",
        "none",
        root / "transcripts",
        path,
        validation_fraction=0,
        tasks=1,
    )
    manifest = json.loads((root / "docs/manifest.json").read_text())
    (root / "docs/manifest.json").write_text(
        json.dumps(manifest | {"decontamination": DECONTAMINATION})
    )
    tokenizer = Tokenizer(path)
    return root, tokenizer, {name: tokenizer.encode_batch(texts[name]) for name in texts}


def stage_config(corpora, **overrides):
    config = phase2_16k.get_config("nano")
    config.data.dir = str(corpora[0])
    with config.unlocked():
        config.update(overrides)
    return config


def source_with(tokens, documents):
    return pipeline.Source(
        "any", pathlib.Path(), {"splits": {"train": {"tokens": tokens, "documents": documents}}}
    )


def test_epochs_count_bos_and_eos_and_take_weights_of_any_sum():
    sources = {"a": source_with(100, 10), "b": source_with(980, 10), "unused": source_with(0, 0)}
    assert mix.epochs(sources, {"a": 3, "b": 1}, 4800) == pytest.approx(
        {"a": 3600 / 120, "b": 1200 / 1000}
    )


def test_more_than_four_epochs_are_warned_about():
    (line,) = mix.repetition_warnings({"a": 4.0, "b": 4.2, "c": 0.1}, "phase1")
    assert line.startswith("b is read 4.20 times in phase1") and "Muennighoff et al. 2023" in line


def test_row_statistics_by_hand():
    documents = [
        np.array([BOS, *range(10, 8 + n), EOS], np.int32) for n in (5, 4, 18, 3, 2)
    ]  # 32 tokens: four rows of 8
    packed = list(
        pipeline.PackIterDataset(grain.MapDataset.source(documents).to_iter_dataset(), 8, 2)
    )
    found = mix.describe(packed, types.SimpleNamespace(bos_id=BOS, eos_id=EOS), sample=(1,))
    assert [pieces.tolist() for pieces in found.pieces] == [[5, 3], [1, 7], [8], [3, 3, 2]]
    assert found.continued == [False, True, True, True] and found.documents_N.tolist() == [
        2,
        2,
        1,
        3,
    ]
    assert (found.merged, found.started, found.cut) == (
        1,
        5,
        2,
    )  # the last of 3 documents in 2 segments; those of 4 and of 18 are cut
    assert found.learned == pytest.approx(27 / 32)  # all but five EOS
    assert mix.context_bins(8) == [1, 2, 4, 8] and found.context_histogram(8) == pytest.approx(
        [0, 0, 1 / 4, 3 / 4]
    )
    assert found.long_context(8) == pytest.approx(
        (1 + 3 + 4) / 32
    )  # positions from 4 on: of the pieces of 5, 7 and 8
    assert found.samples == {1: packed[1]}


def test_context_bins():
    assert mix.context_bins(16_384) == [512, 1024, 2048, 4096, 8192, 16_384]
    assert mix.context_bins(6000) == [256, 512, 1024, 2048, 4096, 6000] and mix.context_bins(1) == [
        1
    ]


def test_a_mix_is_what_training_reads(corpora):
    config, tokenizer = stage_config(corpora, seq_len=64, batch_size=32), corpora[1]
    opened = mix.open_mix(config, tokenizer)
    assert opened.shares == {"docs": 0.5, "code": 0.5} and opened.tokens == 28 * 2048
    on_disk = {name: sum(len(ids) + 2 for ids in corpora[2][name]) for name in ("docs", "code")}
    assert opened.epochs == pytest.approx({name: 14 * 2048 / on_disk[name] for name in on_disk})
    shown = [
        mix.read_rows(opened, name, tokenizer, 200, Console(file=io.StringIO())).samples
        for name in ("docs", "code")
    ]
    # The first 512 rows of a source are shuffled among each other
    batches = pipeline.train_batches(
        opened.sources,
        dict(config.data.sources),
        tokenizer,
        batch_size=1024,
        seq_len=64,
        max_segments=64,
        seed=config.seed,
    )
    trained = {bytes(row) for row in next(iter(batches))["tokens"]}
    assert all(bytes(row["tokens"]) in trained for samples in shown for row in samples.values())
    assert list(shown[1]) == [0, 100]


def test_no_more_than_an_epoch_is_read(corpora):
    opened = mix.open_mix(stage_config(corpora), corpora[1])
    on_disk = sum(len(ids) + 2 for ids in corpora[2]["docs"])
    assert (
        len(mix.read_rows(opened, "docs", corpora[1], 10**6, Console(file=io.StringIO())).pieces)
        == on_disk // 1024
    )


@pytest.mark.parametrize(
    "weights",
    [
        {"docs": 0.5, "code": 0.3, "reasoning": 0.2},
        {"docs": 0.9, "reasoning": 0.1},
        {"docs": 1, "code": 2, "reasoning": 4},
    ],
)
def test_mix_is_within_a_hundredth_of_the_weights_over_10000_rows(corpora, weights):
    root, tokenizer, ids = corpora
    sources = {name: pipeline.open_source(root, name, tokenizer) for name in weights}
    batches = iter(
        pipeline.train_batches(
            sources, weights, tokenizer, batch_size=500, seq_len=8, max_segments=8, seed=3
        )
    )
    rows = np.concatenate([next(batches)["tokens"] for _ in range(20)])
    batches.close()
    holds = {name: np.isin(rows, list(set().union(*ids[name]))).any(axis=1) for name in weights}
    assert (sum(holds.values()) == 1).all(), "every row is of one source"
    for name, weight in weights.items():
        assert holds[name].mean() == pytest.approx(weight / sum(weights.values()), rel=0.01, abs=0)


def test_long_documents_fill_consecutive_rows_of_the_whole_context(corpora):
    root, tokenizer, ids = corpora
    config = phase2_16k.get_config("1b")
    T, packing = (
        config.seq_len,
        dict(seq_len=config.seq_len, max_segments=config.data.max_segments, seed=5),
    )
    assert T == 16_384
    source = pipeline.open_source(root, "code", tokenizer)
    assert source.manifest["splits"]["train"]["documents"] == len(ids["code"]), (
        "no document is cut on disk"
    )
    iterator, count = (
        iter(pipeline.packed_rows(source, tokenizer, **packing)),
        pipeline.shuffle_window(T),
    )
    assert count * T > sum(len(text) + 2 for text in ids["code"]), "rows of an epoch and more"
    rows = [next(iterator) for _ in range(count)]
    iterator.close()
    flat = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    for text in ids["code"][-2:]:
        document = np.array([tokenizer.bos_id, *text, tokenizer.eos_id])
        assert len(document) > 2 * T
        starts = np.flatnonzero(flat["tokens"] == tokenizer.bos_id)
        start = next(
            s for s in starts if np.array_equal(flat["tokens"][s : s + 100], document[:100])
        )
        np.testing.assert_array_equal(
            flat["tokens"][start : start + len(document)], document
        )  # over all rows that it fills
        np.testing.assert_array_equal(
            flat["targets"][start : start + len(text) + 1], document[1:]
        )  # across rows' ends too
        whole = range(-(-start // T), (start + len(document)) // T)
        assert len(whole) >= 1
        for number in whole:
            np.testing.assert_array_equal(rows[number]["positions"], np.arange(T))
            assert (rows[number]["segment_ids"] == 1).all()
        assert (flat["loss_weights"][start : start + len(text) + 1] == 1).all()
    batches = iter(
        pipeline.train_batches({"code": source}, {"code": 1.0}, tokenizer, batch_size=8, **packing)
    )
    assert {bytes(row) for row in next(batches)["tokens"]} <= {
        bytes(row["tokens"]) for row in rows
    }, "shuffling moves whole rows"
    batches.close()


def test_sample_rows_show_boundaries_without_colour_and_no_control_characters(corpora):
    tokenizer = corpora[1]
    texts = ["\x1b[31mred\u202e\n", "abcd" * 200, "b", "[bold]c"]
    documents = [np.array(tokenizer.encode(text, bos=True, eos=True), np.int32) for text in texts]
    length = sum(map(len, documents)) - 2
    row = next(
        iter(
            pipeline.PackIterDataset(
                grain.MapDataset.source(documents).to_iter_dataset(), length, 3
            )
        )
    )
    plain, coloured = (
        Console(file=io.StringIO(), width=120, **on) for on in ({}, {"force_terminal": True})
    )
    for console in (plain, coloured):
        console.print(mix_report.row_text(row, tokenizer))
    shown = re.sub(r"\s*\n\s*", "", plain.file.getvalue())
    assert r"<BOS>\x1b[31mred\u202e\n<EOS>" in shown and re.search(r"abcd ?\[\.\.\.\] ?abcd", shown)
    assert "3 (merged)" in shown and "<BOS>[bold]" in shown and shown.rstrip().endswith("<cut>")
    assert (
        not re.search(r"[^\n -~]", plain.file.getvalue())
        and "\x1b[31mred" not in coloured.file.getvalue()
    )
    assert {"35", "33", "32"} <= set(re.findall(r"\x1b\[(\d+)m", coloured.file.getvalue())), (
        "segments have colours of their own"
    )


@pytest.fixture(scope="module")
def runs(corpora, tmp_path_factory):
    """The tool's runs, side by side, since most of their time is imports.

    Name -> finished process, and the folder of pictures.
    """
    out = tmp_path_factory.mktemp("pictures")
    where = [
        f"--config.data.dir={corpora[0]}",
        f"--config.tokenizer.path={corpora[0]}/tokenizer.model",
    ]
    arguments = {
        "curriculum": [
            "--config=configs/curriculum.py:nano",
            *where,
            "--rows=3",
            f"--out={out}/mix.png",
        ],
        "no such folder": [
            "--config=configs/curriculum.py:nano",
            "--config.tokenizer.path=none",
            f"--out={out}/none/mix.png",
        ],
    }
    command = [sys.executable, str(ROOT / "tools/inspect_data.py")]
    started = {
        name: subprocess.Popen(
            [*command, *added], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        for name, added in arguments.items()
    }
    texts = {name: process.communicate(timeout=120) for name, process in started.items()}
    return {
        name: subprocess.CompletedProcess(arguments[name], started[name].returncode, *texts[name])
        for name in started
    }, out


def reported(corpora, width):
    """What is printed of a phase in a terminal of `width` columns."""
    tokenizer, console = corpora[1], Console(file=io.StringIO(), width=width)
    opened = mix.open_mix(stage_config(corpora), tokenizer)
    rows = {
        name: mix.read_rows(opened, name, tokenizer, 20, Console(file=io.StringIO()))
        for name in opened.sources
    }
    mix_report.report(opened, rows, tokenizer, console)
    return console.file.getvalue(), rows


@pytest.mark.parametrize("width", [60, 150])
def test_a_phase_is_reported(corpora, width):
    shown, rows = reported(corpora, width)
    on_disk = {name: sum(len(ids) + 2 for ids in corpora[2][name]) for name in ("docs", "code")}
    for name, tokens in on_disk.items():
        cells = [
            name,
            "50.0%",
            f"{len(corpora[2][name]):,}",
            f"{tokens / 1000:.2f}K",
            "28.67K",
            f"{28_672 / tokens:.2f}",
        ]
        assert re.search(" +".join(map(re.escape, cells)), shown), shown
        cells = [
            name,
            str(len(rows[name].pieces)),
            f"{rows[name].learned:.2%}",
            f"{rows[name].started:,}",
        ]
        assert re.search(" +".join(map(re.escape, cells)), shown), shown
    assert (
        "…" not in shown
        and max(map(len, shown.splitlines())) < 200
        and "fill: 100% of every row" in shown
    )
    assert 28_672 / on_disk["docs"] > 4 > 28_672 / on_disk["code"]
    assert re.findall(r"^warning: (\w+) is read", shown, re.M) == ["docs"]
    removed = "2 documents dropped, 4 cut by 1,234 characters; found: mmlu 3 of 14,042 items"
    assert (
        f"docs: decontaminated of 2 benchmarks: {removed}\n" in shown
        and "code: not decontaminated\n" in shown
    )
    assert (
        "<BOS>" in shown
        and "from the beginning of each source's order" in " ".join(shown.split())
        and "\x1b" not in shown
    )


def test_figures_are_whole_and_names_fold_in_60_columns():
    console = Console(file=io.StringIO(), width=60)
    mix_report._print_table(
        console,
        "t",
        ("documents", "tokens", *"abcd"),
        [("a_long_source_name", "12,345,678", *["99.99M"] * 5)],
    )
    shown = console.file.getvalue()
    assert (
        "…" not in shown
        and "12,345,678" in shown
        and shown.count("99.99M") == 5
        and max(map(len, shown.splitlines())) <= 60
    )
    assert "a_long_source_name" in "".join(
        line.split()[0] for line in shown.splitlines() if line.strip()
    )


@pytest.mark.parametrize("count", [1, 4, 10, 33])
def test_pictures_hold_any_number_of_sources(count, tmp_path):
    names = ["_code", *(f"s{i}" for i in range(1, count))]
    sources, shares = (
        {name: source_with(10**7 * (1 + i), 10) for i, name in enumerate(names)},
        dict.fromkeys(names, 1 / count),
    )
    opened = mix.Mix("phase", sources, shares, 10**8, mix.epochs(sources, shares, 10**8), 8, 2, 0)
    rows = {name: mix.Rows([np.array([8])] * 3, [False] * 3, 1.0, 0, 3, 0, {}) for name in names}
    figure = mix_report.draw(opened, rows)
    figure.canvas.draw()
    upper, lower = figure.subfigs
    disk_axis, documents_axis, _ = upper.axes
    assert [text.get_text().split(":")[0] for text in upper.legends[0].get_texts()] == [
        *names,
        "the mix",
    ]
    assert all(tick.get_text().isdecimal() for tick in documents_axis.get_xticklabels())
    labels = [tick.get_text() for tick in disk_axis.get_xticklabels()]
    assert {"10M", "100M"} <= set(labels) and not any(
        tick.get_text() for tick in disk_axis.get_xticklabels(minor=True)
    )
    assert [axis.get_title() for axis in lower.axes] == names
    assert {tick.get_text() for axis in lower.axes for tick in axis.get_yticklabels()} <= set("012")
    bars, legend = (
        [bar.get_window_extent() for bar in disk_axis.patches],
        disk_axis.get_legend().get_window_extent(),
    )
    assert not any(bar.overlaps(legend) for bar in bars)


def test_epochs_of_all_stages_are_added():
    mixes = [
        types.SimpleNamespace(epochs=epochs)
        for epochs in ({"a": 1.5, "b": 0.25}, {"b": 1.0, "c": 2.0})
    ]
    assert (
        mix.epochs_of_all(mixes) == {"a": 1.5, "b": 1.25, "c": 2.0} and mix.epochs_of_all([]) == {}
    )


def test_the_tool_adds_up_a_curriculum(corpora, runs):
    done = runs[0]["curriculum"]
    assert done.returncode == 0, done.stderr
    # 400, 22, 28 and 50 steps of 2,048 tokens; what share of each is docs
    docs = (
        2048
        * (400 * 0.6 + 22 * 0.5 + 28 * 0.5 + 50 * 0.3)
        / sum(len(ids) + 2 for ids in corpora[2]["docs"])
    )
    assert (
        f"docs {docs:.2f} epochs" in done.stdout
        and f"warning: docs is read {docs:.2f} times in all stages together" in done.stdout
    )
    assert (
        re.findall(r"^(\w+): reading", done.stdout, re.M)
        == ["phase1"] * 3 + ["phase2_8k"] * 2 + ["phase2_16k"] * 2 + ["phase3"] * 4
    )
    pictures = {path.name: path.read_bytes() for path in runs[1].iterdir()}
    assert set(pictures) == {
        f"mix_{stage}.png" for stage in ("phase1", "phase2_8k", "phase2_16k", "phase3")
    }
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())


def test_bad_input_ends_in_one_line(corpora, runs, tmp_path):
    done = runs[0]["no such folder"]
    assert (
        done.returncode == 2
        and done.stdout == ""
        and f"there is no folder {runs[1]}/none; create it" in done.stderr
        and done.stderr.count("\n") == 1
    )
    for overrides, message in (
        ({"data": {"dir": str(tmp_path)}}, "is not prepared"),
        ({"data": {"sources": {"docs": 0.0}}}, "must be above 0"),
        ({"data": {"max_segments": 0}}, "each must be at least 1"),
        ({"end_step": 422}, "has 0 rows"),
    ):
        with pytest.raises(BadInput, match=message):
            mix.open_mix(stage_config(corpora, **overrides), corpora[1])
