import collections
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from nanollama_jax.data.near_duplicates import FORMAT, HASHES, find_near_duplicates, load_left_out, signature
from nanollama_jax.data.sources import read_documents
from nanollama_jax.errors import BadInput

TOOL = [sys.executable, "tools/near_duplicates.py"]
RANDOM = random.Random(0)
VOCABULARY = ["".join(RANDOM.choices("abcdefghijklmnopqrstuvwxyzżółćéλ漢", k=RANDOM.randint(1, 12))) for _ in range(5000)]


@pytest.fixture(autouse=True)
def seeded():
    RANDOM.seed(1)


def make_text(words: int) -> str:
    return " ".join(RANDOM.choice(VOCABULARY) + RANDOM.choice(["", "", "", ",", "."]) for _ in range(words))


def change_words(text: str, *places: int) -> str:
    words = text.split(" ")
    for place in places:
        words[place] = "changed" + RANDOM.choice(VOCABULARY)
    return " ".join(words)


def make_near_copies(documents: int = 100) -> list[str]:
    """Texts, half of them with one to three copies, of which from 1 in 200 to 1 in 6 words are others."""
    texts = [make_text(RANDOM.randint(40, 400)) for _ in range(documents)]
    for text in texts[: documents // 2]:
        for _ in range(RANDOM.randint(1, 3)):
            words = text.count(" ") + 1
            texts.append(change_words(text, *RANDOM.sample(range(words), max(1, words // RANDOM.choice([6, 10, 15, 25, 50, 100, 200])))))
    RANDOM.shuffle(texts)
    return texts


def exact_jaccards(texts: list[str]) -> dict[tuple[int, int], float]:
    """By brute force, of sets of strings."""
    shingles = []
    for text in texts:
        words = text.lower().replace(",", " ").replace(".", " ").replace("漢", " 漢 ").split()
        shingles.append({tuple(words[at : at + 5]) for at in range(len(words) - 4)})
    return {(a, b): len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b]) for a, b in itertools.combinations(range(len(texts)), 2)}


def write_lines(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"file://{path}"


def find(tmp_path, *urls, threshold=0.8, workers=1) -> dict:
    """The report as it stands on disk."""
    out = tmp_path / f"report-{len(list(tmp_path.iterdir()))}.json"
    returned = find_near_duplicates(urls, out, threshold=threshold, workers=workers)
    assert json.loads(out.read_text()) == returned
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "working files are left"
    return returned


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9])
def test_near_copies_are_found_and_other_documents_are_not(tmp_path, threshold):
    margin = 0.1  # four standard deviations of the estimate; above 0.9 it has smaller ones
    surely = min(threshold + margin, 0.95)
    texts = make_near_copies()
    exact = exact_jaccards(texts)
    assert sum(jaccard >= surely for jaccard in exact.values()) >= 10
    assert sum(0.2 < jaccard < threshold - margin for jaccard in exact.values()) >= 10
    url = write_lines(tmp_path / "texts.jsonl", texts)
    report = find(tmp_path, url, threshold=threshold)
    number = {document.id: line for line, document in enumerate(read_documents(url, 0, 1))}
    kept_for = {line: line for line in range(len(texts))}
    for entry in report["leave_out"]:
        kept, left_out = number[entry["duplicate_of"]], number[entry["id"]]
        assert kept < left_out, "the first is kept"
        assert abs(entry["jaccard"] - exact[kept, left_out]) < margin
        kept_for[left_out] = kept
    missed = [pair for pair, jaccard in exact.items() if jaccard >= surely and kept_for[pair[0]] != kept_for[pair[1]]]
    assert not missed
    similar = {line for pair, jaccard in exact.items() if jaccard >= threshold - margin for line in pair}
    assert {line for line, kept in kept_for.items() if line != kept} <= similar, "a document that is like no other is left out"


def test_of_a_chain_exactly_the_first_is_kept(tmp_path):
    chain = [make_text(200)]
    for step in range(9):  # each like the one before, the last unlike the first
        chain.append(change_words(chain[-1], 10 + 20 * step, 20 + 20 * step))
    exact = exact_jaccards(chain)
    assert min(exact[a, a + 1] for a in range(9)) > 0.89 and exact[0, 9] < 0.5
    for number, order in enumerate((range(10), range(9, -1, -1), [4, 0, 8, 2, 9, 6, 1, 3, 5, 7])):
        url = write_lines(tmp_path / f"{number}.jsonl", [chain[step] for step in order] + [make_text(200)])
        report = find(tmp_path, url)
        assert [entry["id"] for entry in report["leave_out"]] == [f"{url.removeprefix('file://')}:{line}" for line in range(2, 11)]
        assert {entry["duplicate_of"] for entry in report["leave_out"]} == {f"{url.removeprefix('file://')}:1"}
        assert report["cluster_sizes"] == {"10": 1}
        assert report["linked_by_others"] == sum(entry["jaccard"] < 0.8 for entry in report["leave_out"]) > 0


def test_the_report_does_not_depend_on_the_number_of_workers(tmp_path):
    texts = make_near_copies()
    urls = [write_lines(tmp_path / "one.jsonl", texts[:60])]
    for part in range(3):
        write_lines(tmp_path / f"many-{part}.jsonl", texts[60 + part :: 3])
    urls.append(f"file://{tmp_path}/many-*.jsonl")
    reports = [find(tmp_path, *urls, workers=workers) for workers in (1, 2, 5)]
    assert reports[0]["documents_to_leave_out"] > 20
    assert reports[0] == reports[1] == reports[2]


def test_signatures_are_the_same_in_every_process():
    program = (
        "import hashlib, sys; from nanollama_jax.data.near_duplicates import signature; "
        "print(hashlib.sha256(b''.join(signature(text).tobytes() for text in sys.stdin.read().split('|'))).hexdigest()); "
        "assert 'jax' not in sys.modules"
    )
    texts = ["short", "", *(make_text(words) for words in (5, 6, 100, 3000))]
    expected = hashlib.sha256(b"".join(signature(text).tobytes() for text in texts)).hexdigest()
    environment = os.environ | {"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1", "PYTHONPATH": "."}
    run = subprocess.run([sys.executable, "-c", program], input="|".join(texts), capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and run.stdout.strip() == expected, run.stderr


def test_case_and_punctuation_do_not_matter_and_the_order_of_words_does():
    text = make_text(100)
    assert (signature(text) == signature(text.upper().replace(".", " -- ").replace(",", "\n"))).all()
    assert (signature(text) == signature(" ".join(reversed(text.split())))).mean() < 0.05


def test_short_documents_are_duplicates_only_if_they_are_equal(tmp_path):
    texts = ["Hi there", "hi there", "Hi there", "…", "…", "!", "four words are short", "four words are short.", "four words are short"]
    url = write_lines(tmp_path / "short.jsonl", [*texts, "now five words are enough", "Now five words are enough!"])
    report = find(tmp_path, url, threshold=0.5)
    lines = {entry["id"].rpartition(":")[2]: entry["duplicate_of"].rpartition(":")[2] for entry in report["leave_out"]}
    assert lines == {"3": "1", "5": "4", "9": "7", "11": "10"}
    assert {entry["jaccard"] for entry in report["leave_out"]} == {1.0}


def test_what_a_report_says(tmp_path):
    long, other = make_text(300), make_text(150)
    first = [make_text(50) for _ in range(12)]
    first[1] = first[9] = long  # lines 2 and 10: numbers are compared as numbers
    second = [change_words(long, 7), other, make_text(80), change_words(other, 3)]
    urls = [write_lines(tmp_path / "first.jsonl", first), write_lines(tmp_path / "a-second.jsonl", second)]
    report = find(tmp_path, *urls, workers=2)
    assert report["format"] == FORMAT and report["sources"] == urls
    assert report["settings"] == {"threshold": 0.8, "shingle_words": 5, "hashes": HASHES, "seed": 1}
    assert (report["documents"], report["bytes"]) == (16, sum(len(text.encode()) for text in first + second))
    pairs = [(entry["id"].removeprefix(f"{tmp_path}/"), entry["duplicate_of"].removeprefix(f"{tmp_path}/")) for entry in report["leave_out"]]
    assert pairs == [
        ("first.jsonl:10", "first.jsonl:2"),
        ("a-second.jsonl:1", "first.jsonl:2"),  # the first source's is kept, whatever their names
        ("a-second.jsonl:4", "a-second.jsonl:2"),
    ]
    assert report["leave_out"][0]["jaccard"] == 1 > report["leave_out"][1]["jaccard"] > 0.9
    assert (report["clusters"], report["cluster_sizes"], report["linked_by_others"]) == (2, {"2": 1, "3": 1}, 0)
    left_out_texts = [long, second[0], second[3]]
    assert (report["documents_to_leave_out"], report["bytes_to_leave_out"]) == (3, sum(len(text.encode()) for text in left_out_texts))
    texts = {document.id: document.text for url in urls for document in read_documents(url, 0, 1)}
    for example in report["examples"]:
        assert example["texts"] == [texts[example["id"]][:300], texts[example["duplicate_of"]][:300]]
    assert len(report["examples"]) == 3


def test_what_is_left_out_is_found_again_by_id(tmp_path):
    url = write_lines(tmp_path / "texts.jsonl", make_near_copies())
    report = find(tmp_path, url)
    (out,) = tmp_path.glob("report-*.json")
    left_out = load_left_out(out, url)
    with pytest.raises(BadInput, match="is about file://.*, and not file://other.jsonl"):
        load_left_out(out, "file://other.jsonl")
    assert len(left_out) == report["documents_to_leave_out"] == len(report["leave_out"]) > 20
    kept = [document.text for rank in range(4) for document in read_documents(url, rank, 4) if document.id not in left_out]
    assert len(kept) == report["documents"] - len(left_out)
    assert not find(tmp_path, write_lines(tmp_path / "kept.jsonl", kept), threshold=0.9)["leave_out"]


def test_many_copies_of_one_document_are_not_compared_each_with_each(tmp_path):
    texts = [change_words(make_text(100), 50)] * 3000
    report = find(tmp_path, write_lines(tmp_path / "copies.jsonl", texts))
    assert report["cluster_sizes"] == {"3000": 1} and len(report["examples"]) <= 6


def test_hashes_are_even(tmp_path):
    """Documents that share nothing agree in almost no hash: the shingles' own hashes are combined linearly, and only then mixed."""
    agreeing = collections.Counter()
    signatures = np.stack([signature(" ".join(f"{number} {word}" for word in range(100))) for number in range(60)])
    for a, b in itertools.combinations(range(60), 2):
        agreeing[int((signatures[a] == signatures[b]).sum())] += 1
    assert max(agreeing) <= 3


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "missing"), ("{", "damaged"), ('{"format": "other", "leave_out": []}', "no report"), ("[]", "no report"), ("3", "no report"),
     (json.dumps({"format": FORMAT}), "damaged"), (json.dumps({"format": FORMAT, "sources": ["file://a"], "leave_out": [1]}), "damaged")],
)  # fmt: skip
def test_a_damaged_report_is_bad_input(tmp_path, content, says):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(BadInput, match=says) as error:
        load_left_out(tmp_path / "report.json", "file://a")
    assert "report.json" in str(error.value) and "tools/near_duplicates.py" in str(error.value)


def test_bad_sources_are_bad_input_and_leave_nothing(tmp_path):
    good = write_lines(tmp_path / "good.jsonl", [make_text(50), make_text(50)])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    for urls, says in [
        ((good, f"file://{tmp_path}/absent.jsonl"), "absent.jsonl"),
        ((good, f"file://{tmp_path}/bad.jsonl"), "bad.jsonl:2: malformed JSON"),
        ((f"file://{tmp_path}/empty.jsonl",), "no document"),
        ((good, good), "two documents have the id .*do not overlap"),
        (("nonsense",), "not understood"),
    ]:
        with pytest.raises(BadInput, match=says):
            find_near_duplicates(urls, tmp_path / "report.json", threshold=0.8, workers=1)
    assert {path.name for path in tmp_path.iterdir()} == {"good.jsonl", "bad.jsonl", "empty.jsonl"}


@pytest.mark.parametrize("threshold", ["0.49", "1.01", "-1", "nan"])
def test_a_threshold_out_of_range_is_bad_input(tmp_path, threshold):
    with pytest.raises(BadInput, match="threshold"):
        find_near_duplicates(["builtin://docs"], tmp_path / "report.json", threshold=float(threshold))


def test_the_tool(tmp_path):
    text = make_text(200)
    url = write_lines(tmp_path / "texts.jsonl", [text, "[bold]no markup[/bold] " + text, make_text(50)])
    out = tmp_path / "report.json"
    run = subprocess.run([*TOOL, url, "--out", str(out), "--threshold", "0.7"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "[bold]no markup[/bold]" in run.stdout and f"{tmp_path}/texts.jsonl:2" in run.stdout and "MB/s" in run.stdout
    assert load_left_out(out, url) == {f"{tmp_path}/texts.jsonl:2"}
    before = out.read_bytes()
    with pytest.raises(BadInput, match="exists: remove it"):
        find_near_duplicates([url], out, threshold=0.7)
    assert out.read_bytes() == before
