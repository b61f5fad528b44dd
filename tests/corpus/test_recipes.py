"""What a recipe may say of a corpus: how much of it, which part, what is kept out; and what preparing it will take."""

import json
import random

import pytest

from configs import phase1, phase2_16k, phase3
from nanollama_jax import tokenizer
from nanollama_jax.corpus import (
    decontaminate,
    estimate,
    filters,
    near_duplicates,
    prepare,
    sources,
    words,
)
from nanollama_jax.data import shards
from nanollama_jax.errors import BadInput
from nanollama_jax.recipes import CORPORA, MODELS
from nanollama_jax.tokenizer import Tokenizer

QUESTION = "Which of the two ships that left the harbour in the morning arrived first at the island, and by how many hours?"
STEM = "In mathematics, a vector space is a set whose elements, called vectors, may be added together and multiplied by scalars. "
OTHER = "The village lies on the left bank of the river, where the road to the old market crosses it, and is known for its church. "


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = random.Random(0)
    return [f"{i} {generator.choice([STEM, OTHER]) * generator.randint(2, 20)}" for i in range(300)]


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("source") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"file://{path}"


@pytest.fixture(scope="module")
def model(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    tokenizer.train(texts, path, vocab_size=300, max_bytes=10**9)
    return path


def run(source, model, out_dir, **settings) -> dict:
    return prepare.prepare_source(
        "corpus",
        source,
        "CC0",
        out_dir,
        model,
        **(dict(validation_fraction=0.1, tasks=3) | settings),
    )


def texts_of(directory, model) -> list[str]:
    return sorted(document.text for document in sources.read_prepared(directory, Tokenizer(model)))


def counts(manifest) -> tuple[int, int]:
    return tuple(
        sum(manifest["splits"][split][key] for split in shards.SPLITS)
        for key in ("documents", "tokens")
    )


def test_a_budget_of_tokens_is_kept_and_shared_by_the_ranks(model, texts, tmp_path):
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts * 20)
    )
    source, budget = f"file://{tmp_path}/texts.jsonl", 2_000_000
    manifest = run(source, model, tmp_path / "out", max_tokens=budget, tasks=2)
    characters = 20 * sum(map(len, texts))
    assert characters > 7_000_000
    assert (
        budget <= counts(manifest)[1] <= budget + 2 * max(map(len, texts))
    )  # each rank ends with the document that fills its share
    split = [
        len(json.loads(path.read_text())["train"])
        for path in (tmp_path / "out/logs/ranks").glob("*.json")
    ]
    assert split == [1, 1]
    with pytest.raises(BadInput, match="was prepared with max_tokens=2000000, not 0"):
        run(source, model, tmp_path / "out", tasks=2)


def test_a_budget_that_ranks_could_not_fill_is_told(model, texts, tmp_path, capsys):
    for name, some in (("a", texts[:10]), ("b", texts[10:])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in some)
        )
    manifest = run(
        f"file://{tmp_path}/*.jsonl", model, tmp_path / "out", max_tokens=100_000, tasks=2
    )
    assert counts(manifest)[1] < 100_000
    assert (
        f"corpus: {counts(manifest)[1]:,} of 100,000 tokens: some ranks had less than their share"
        in capsys.readouterr().out
    )


def test_a_filter_keeps_what_it_names(source, model, texts, tmp_path):
    manifest = run(source, model, tmp_path / "out", keep="stem")
    assert manifest["left_out"] == {
        "filtered": sum(STEM not in text for text in texts),
        "near_duplicates": 0,
    }
    assert texts_of(tmp_path / "out", model) == sorted(text for text in texts if STEM in text)
    with pytest.raises(BadInput, match="keep='sports' is not a filter: choose one of '', 'stem'"):
        run(source, model, tmp_path / "no", keep="sports")


def test_the_stem_filter_on_beginnings_of_articles():
    stem = [
        "Photosynthesis is a system of biological processes by which photopigment-bearing autotrophic organisms convert light energy into the "
        "chemical energy necessary to fuel their metabolism.",
        "In computer science, quicksort is an efficient, general-purpose sorting algorithm, published in 1961; its data structure is the array.",
        "The Navier-Stokes equations are partial differential equations which describe the motion of viscous fluid substances in physics. "
        "They are named after the engineer Claude-Louis Navier and the mathematician George Gabriel Stokes.",
    ]
    other = [
        "Pride and Prejudice is an 1813 novel of manners by Jane Austen. It follows the character development of Elizabeth Bennet, who learns "
        "about the repercussions of hasty judgments.",
        "The 1923 season was the club's ninth in the second division; they ended it in fourth place, and the manager left in the general election.",
        "Vienna is the capital, most populous city, and one of the nine federal states of Austria, and its primate city of two million inhabitants.",
    ]
    assert all(map(filters.is_stem, stem)) and not any(map(filters.is_stem, other))


def test_documents_are_cut_or_dropped_and_their_counts_stand_in_the_manifest(
    model, texts, tmp_path
):
    (tmp_path / "benchmark.jsonl").write_text(
        json.dumps({"question": QUESTION, "answer": "1"})
        + '\n{"question": "Too short?", "answer": "2"}\n'
    )
    planted = [f"{texts[0]}{texts[1]} {QUESTION} {texts[2]}{texts[3]}", *texts[4:40]]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in planted)
    )
    settings = dict(
        benchmarks={"gsm8k": f"file://{tmp_path}/benchmark.jsonl"}, validation_fraction=0.2
    )
    source = f"file://{tmp_path}/texts.jsonl"
    dropped = run(source, model, tmp_path / "drop", **settings)
    cut = run(source, model, tmp_path / "cut", contaminated="cut", **settings)
    found = {"gsm8k": {"items": 2, "items_found": 1, "documents": 1, "too_short": 1}}
    about = {
        "policy": "drop",
        "benchmarks": found,
        "documents_dropped": 1,
        "documents_cut": 0,
        "characters_removed": len(planted[0]),
    }
    assert len(dropped["decontamination"].pop("benchmarks_sha256")) == 64
    assert dropped["decontamination"] == about
    assert texts_of(tmp_path / "drop", model) == sorted(planted[1:])
    at = planted[0].index(QUESTION)
    parts = [planted[0][: at - 200], planted[0][at + len(QUESTION) + 200 :]]
    assert texts_of(tmp_path / "cut", model) == sorted(planted[1:] + parts)
    assert cut["decontamination"]["documents_cut"] == 1
    assert cut["decontamination"]["characters_removed"] == len(planted[0]) - sum(map(len, parts))
    for folder in ("drop", "cut"):
        (hit,) = json.loads((tmp_path / folder / prepare.CONTAMINATED).read_text())["contaminated"]
        assert hit == {
            "document": f"{tmp_path}/texts.jsonl:1",
            "benchmark": "gsm8k",
            "item": f"{tmp_path}/benchmark.jsonl:1",
            "start": at,
            "end": at + len(QUESTION),
            "text": QUESTION,
        }
    (tmp_path / "benchmark.jsonl").unlink()  # what is prepared does not need it any more
    assert run(source, model, tmp_path / "drop", **settings)["splits"] == dropped["splits"]
    with pytest.raises(BadInput, match="was prepared with benchmarks="):
        run(source, model, tmp_path / "drop", validation_fraction=0.2)
    index = decontaminate.Index(
        [decontaminate.Item("b", "b:1", (words.normalise(QUESTION).decode(),))]
    )
    heard = []
    report = decontaminate.search(
        sources.read_prepared(tmp_path / "drop", Tokenizer(model)),
        index,
        lambda *counts: heard.append(counts),
    )
    assert report["contaminated"] == [] and report["documents"] == 36 and heard[-1][0] == 36


def test_benchmarks_may_be_corrected_until_a_rank_is_done(source, model, texts, tmp_path):
    for name, question in (
        ("wrong", "nobody asks this question of thirteen words or more in any of the texts"),
        ("right", texts[0]),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": question}) + "\n")
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    with pytest.raises(BadInput, match="malformed JSON"):
        run(
            f"file://{tmp_path}/bad.jsonl",
            model,
            tmp_path / "out",
            benchmarks={"text": f"file://{tmp_path}/wrong.jsonl"},
            tasks=1,
        )
    manifest = run(
        source, model, tmp_path / "out", benchmarks={"text": f"file://{tmp_path}/right.jsonl"}
    )
    assert manifest["decontamination"]["benchmarks"]["text"]["items_found"] == 1


def test_near_duplicates_of_a_report_are_left_out(model, tmp_path):
    generator = random.Random(1)
    single = [
        " ".join(str(generator.randrange(10**6)) for _ in range(generator.randint(50, 200)))
        for _ in range(50)
    ]
    doubled = [*single, *(text + " and a few words more" for text in single[:10])]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in doubled)
    )
    source = f"file://{tmp_path}/texts.jsonl"
    report = near_duplicates.find_near_duplicates([source], tmp_path / "report.json", threshold=0.8)
    assert [int(entry["id"].rpartition(":")[2]) - 1 for entry in report["leave_out"]] == list(
        range(50, 60)
    )
    manifest = run(source, model, tmp_path / "out", leave_out=str(tmp_path / "report.json"))
    assert manifest["left_out"] == {"filtered": 0, "near_duplicates": 10}
    assert texts_of(tmp_path / "out", model) == sorted(single)
    with pytest.raises(BadInput, match="gone.json is missing"):
        run(source, model, tmp_path / "no", leave_out=str(tmp_path / "gone.json"))


def test_a_corpus_prepared_before_there_were_these_settings_is_still_good(source, model, tmp_path):
    manifest = run(source, model, tmp_path / "out")
    old = {
        key: value
        for key, value in manifest.items()
        if key not in ("max_tokens", "keep", "leave_out_sha256", "benchmarks", "decontamination")
    }
    (tmp_path / "out/manifest.json").write_text(json.dumps(old))
    assert run(source, model, tmp_path / "out") == old
    with pytest.raises(BadInput, match="was prepared with keep=None, not 'stem'"):
        run(source, model, tmp_path / "out", keep="stem")


@pytest.mark.parametrize("scale", ["60m", "300m", "1b"])
def test_budgets_are_what_the_whole_curriculum_reads_and_little_more(scale):
    read = dict.fromkeys(CORPORA, 0.0)
    for stage in (recipe.stage(scale) for recipe in (phase1, phase2_16k, phase3)):
        tokens = (
            stage.end_step - (0 if stage.name == "phase1" else stage.start_step)
        ) * stage.tokens_per_step
        for name, share in stage.data.sources.items():
            read[name] += share * tokens / sum(stage.data.sources.values())
    first_half = phase1.get_config(scale), phase2_16k.get_config(scale), phase3.get_config(scale)
    budgets = {
        name: corpus.max_tokens for config in first_half for name, corpus in config.corpora.items()
    }
    for name in ("pg19", "stack_python"):  # phase2_8k reads the same
        read[name] *= (207_000 - 184_000) / (207_000 - 194_000)
    assert set(budgets) == {name for name, tokens in read.items() if tokens}
    for name, budget in budgets.items():
        assert 1.02 * read[name] < budget < 1.2 * read[name], name


def test_estimates_of_files_come_near_what_is_there(source, texts, model, tmp_path, monkeypatch):
    import gzip
    import lzma

    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts * 3).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines))
    with pyarrow.output_stream(tmp_path / "a.jsonl.zst", compression="zstd") as file:
        file.write(lines)
    table = pyarrow.table({"text": [f"{i} {text}" for i, text in enumerate(texts * 3)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    total = sum(len(text.encode()) for text in texts * 3)
    tokens = sum(map(len, Tokenizer(model).encode_batch(texts * 3)))
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", total // 5)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"):
        found = estimate.estimate(f"file://{tmp_path}/{name}", Tokenizer(model))
        assert found.text_bytes == pytest.approx(total, rel=0.05), name
        assert found.documents == pytest.approx(900, rel=0.2) and found.tokens == pytest.approx(
            tokens, rel=0.15
        ), name
    part = estimate.estimate(
        f"file://{tmp_path}/a.jsonl", Tokenizer(model), max_tokens=tokens // 2, keep="stem"
    )
    assert part.tokens == tokens // 2 and "% kept by filter 'stem'" in part.note
    monkeypatch.setattr(estimate, "_LOOK_BYTES", 2_000)
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"text": "a long line " * 10_000})
        + "\n"
        + json.dumps({"text": "a long line " * 20_000})
        + "\n"
    )
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", 100_000)
    assert estimate.estimate(f"file://{tmp_path}/long.jsonl", None).text_bytes == pytest.approx(
        360_000, rel=0.01
    )
    (tmp_path / "small.jsonl").write_text(json.dumps({"text": texts[0]}) + "\n")
    assert estimate.estimate(f"file://{tmp_path}/small.jsonl", None).documents == 1
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "train-00000.jsonl").write_bytes(lines)
    assert estimate.estimate(f"hf://{hub}", Tokenizer(model)).text_bytes == pytest.approx(
        total, rel=0.05
    )


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": null}', "the text is of type NoneType"),
        ('{"text": ["a"]}', "the text is of type list"),
        ('{"body": "a"}', "no field 'text': choose one of body"),
        ('["text"]', "a line must hold a JSON object"),
        ('{"text": "a', "malformed JSON"),
    ],
)
def test_an_estimate_names_a_bad_line_past_its_sample(tmp_path, monkeypatch, line, complaint):
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "x" * 500}) + "\n") * 10 + line + "\n")
    with pytest.raises(BadInput, match=rf"a\.jsonl:11: {complaint}"):
        estimate.estimate(f"file://{tmp_path}/a.jsonl", None)


def test_every_recipe_names_corpora_with_a_licence_and_benchmarks_that_can_be_read():
    for scale in MODELS:
        config = phase3.get_config(scale)
        assert all(
            sources.licence_of(corpus.url) != sources.NOT_STATED
            for corpus in config.corpora.values()
        )
        assert (
            all(bool(url) == (scale != "nano") for url in config.data.benchmarks.values())
            and len(config.data.benchmarks) == 9
        )
        assert all(
            any(name.startswith(schema) for schema in decontaminate._PASSAGES)
            for name in config.data.benchmarks
        )
