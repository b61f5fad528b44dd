"""Planted benchmark items are found and clean text is not; a brute-force search over words, written here, is the oracle."""

# ruff: noqa: RUF001  punctuation of other scripts

import json
import lzma
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollama_jax import tokenizer
from nanollama_jax.corpus import decontaminate, prepare
from nanollama_jax.corpus.decontaminate import Index, Item
from nanollama_jax.corpus.sources import Document
from nanollama_jax.corpus.words import normalise
from nanollama_jax.data import shards
from nanollama_jax.errors import BadInput

QUESTION = "A train leaves the station at nine and travels for three hours at a speed of sixty miles each hour; how far does it go?"
SHORT = "Which planet of our system has the most moons?"  # nine words


def item(*passages: str, where: str = "b:1") -> Item:
    words = tuple(" ".join(normalise(passage).decode().split()) for passage in passages)
    return Item("b", where, words[:1], words[1:])


def found(text: str, *items: Item) -> list[tuple[str, str]]:
    return [(hit.item, hit.text) for hit in Index(items).find([text])[0]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, World!", "hello world"),
        ("don't  DON\u2019T", "dont dont"),
        ("a\u2014b \u201cc\u201d \ufb01ne", "a b c fine"),
        ("e\ufb03\u00adcient wo\u200brds \ufeffof PDF", "efficient words of pdf"),
        ("snake_case x=3.14", "snake case x 3 14"),
        (
            "\u00c9t\u00e9 \u6f22\u5b57\u3002\u305d\u3046",
            "\u00e9t\u00e9 \u6f22 \u5b57 \u305d \u3046",
        ),
        (" \n\t", ""),
        ("half a pair: \ud800", "half a pair"),
    ],
)
def test_normalise(text, words):
    assert normalise(text).decode().split() == words.split()


def test_an_item_is_found_whatever_its_case_and_punctuation_and_the_span_is_what_stands_there():
    altered = QUESTION.upper().replace(" ", " - ").replace(";", "")
    text = f"Before. {altered} And after."
    ((where, span),) = found(text, item(QUESTION))
    assert where == "b:1" and span == altered.strip()


def test_thirteen_words_are_enough_and_twelve_are_not():
    words = QUESTION.split()
    assert found("x " + " ".join(words[5:18]) + " y", item(QUESTION)) == [
        ("b:1", " ".join(words[5:18]))
    ]
    assert not found("x " + " ".join(words[5:17]) + " y", item(QUESTION))


def test_a_short_question_is_found_whole_only_and_shorter_ones_or_answers_never():
    assert found(f"They asked: {SHORT} Nobody knew.", item(SHORT)) == [("b:1", SHORT)]
    assert not found("Which planet of our system has the most craters?", item(SHORT))
    assert not found("Which planet has the most moons?", item("Which planet has the most moons?"))
    assert not found(
        SHORT, item("An unrelated question of eight or more words, surely?", SHORT)
    )  # an answer of nine words
    assert found(QUESTION, item("Short?", QUESTION))
    assert (
        Index([item(SHORT), item("Too short."), item("Too short.", QUESTION)]).too_short.total()
        == 2
    )


def test_a_run_of_short_words_is_code_or_arithmetic_and_no_evidence_unless_it_is_the_whole_item():
    code = "for (i = 0; i < n; i++) { for (j = 0; j < n; j++) { a[i][j] = 0"
    assert not found(code, item(f"Improve this program, which is too slow for me: {code}; }} }}"))
    assert found(code, item(code))
    assert found(
        f"What is {code}? Improve this program, which somebody without experience wrote",
        item(
            f"What is {code}? Improve this program, which somebody without experience wrote: now."
        ),
    )
    assert found("what is 3 + 4 * 2 - 1 / 5 + 6", item("What is 3 + 4 * 2 - 1 / 5 + 6?"))


def test_no_match_runs_over_the_end_of_a_document():
    words = QUESTION.split()
    index = Index([item(QUESTION)])
    assert index.find([" ".join(words[:12]), " ".join(words[12:24]), "", QUESTION]) == [
        [],
        [],
        [],
        index.find([QUESTION])[0],
    ]


def test_all_items_that_share_a_passage_are_named():
    shared = [item(QUESTION, where=f"b:{i}") for i in range(3)]
    assert {where for where, _ in found(QUESTION, *shared)} == {"b:0", "b:1", "b:2"}


UNSPACED = {
    "Chinese": "一列火车早上九点从车站出发，以每小时六十英里的速度行驶了三个小时，请问它一共行驶了多少英里？",
    "Japanese": "列車は朝九時に駅を出発し、時速六十マイルで三時間走りました。列車は全部で何マイル走ったでしょうか？",
    "Thai": "รถไฟออกจากสถานีตอนเก้าโมงและเดินทางเป็นเวลาสามชั่วโมงด้วยความเร็วหกสิบไมล์ต่อชั่วโมง รถไฟเดินทางไปไกลแค่ไหน",
    "Lao": "ມະນຸດທຸກຄົນເກີດມາມີກຽດສັກສີ ສິດທິ ເສລີພາບ ແລະ ຄວາມສະເໝີພາບເທົ່າທຽມກັນ ທຸກໆຄົນມີເຫດຜົນ",
    "Khmer": "មនុស្សទាំងអស់កើតមកមានសេរីភាពនិងសមភាពក្នុងសេចក្តីថ្លៃថ្នូរនិងសិទ្ធិ មនុស្សមានវិចារណញ្ញាណ",
    "Burmese": "လူတိုင်းသည် တူညီလွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့်လည်းကောင်း၊ တူညီလွတ်လပ်သော အခွင့်အရေးများဖြင့်လည်းကောင်း",
    "mixed": "用 Python 写一个函数 fibonacci(n)，返回斐波那契数列的第n项，并说明它的时间复杂度是多少。",
}


@pytest.mark.parametrize("script", UNSPACED)
def test_an_item_without_spaces_is_found_in_a_text_without_spaces_and_nothing_else_is_its_span(
    script,
):
    question, other = UNSPACED[script], UNSPACED["Japanese" if script == "Chinese" else "Chinese"]
    others = [item(text, where=name) for name, text in UNSPACED.items()]
    altered = question.replace("，", "、 ").replace(" ", "\u200b ")
    assert found(f"{other[:15]}{altered}{other[:15]}", *others) == [
        (script, altered.strip("？。\u1038\u103a"))
    ]  # signs
    assert not found(other[:15] + question[: len(question) // 3] + other[15:30], *others)


CHARACTERS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳"


def test_22_chinese_characters_are_enough_and_21_are_not_unless_they_are_the_whole_item():
    assert found("甲" + CHARACTERS[3:25] + "乙", item(CHARACTERS)) == [("b:1", CHARACTERS[3:25])]
    assert not found("甲" + CHARACTERS[3:24] + "乙", item(CHARACTERS))
    assert found("甲" + CHARACTERS[:14] + "乙", item(CHARACTERS[:14])) == [("b:1", CHARACTERS[:14])]
    assert not found("甲" + CHARACTERS[:13] + "乙", item(CHARACTERS[:14]))
    assert (
        not found(CHARACTERS[:13], item(CHARACTERS[:13]))
        and Index([item(CHARACTERS[:13])]).too_short.total() == 1
    )
    name = "中华人民共和国全国人民代表大会常务委员会"  # an office of 20 characters
    assert not found(f"会议由{name}召开。", item(f"根据宪法，{name}行使哪些职权，由哪些人组成？"))


def test_korean_and_hindi_have_spaces_and_vowel_signs_are_no_breaks():
    korean = "기차는 아침 아홉 시에 역을 떠나 한 시간에 육십 마일의 속도로 세 시간 동안 달렸습니다"
    hindi = "एक ट्रेन सुबह नौ बजे स्टेशन से निकलती है और तीन घंटे तक साठ मील प्रति घंटे की गति से चलती है"
    for text in (korean, hindi):
        words = text.split()
        assert len(normalise(text).split()) == len(words) >= 13
        assert found(f"क {' '.join(words[:13])} क", item(text)) == [("b:1", " ".join(words[:13]))]
        assert not found(f"क {' '.join(words[:12])} क", item(text))


def slow_find(text: str, items: list[Item]) -> set[str]:
    """The rule, word by word."""
    words, named = normalise(text).decode().split(), set()
    for one in items:
        for passage in (*one.questions, *one.answers):
            sought = passage.split()
            size = 13 if len(sought) >= 13 else len(sought)
            weight = weigh(sought)
            if weight < 13 and (passage not in one.questions or weight < 8):
                continue
            grams = {tuple(sought[i : i + size]) for i in range(len(sought) - size + 1)}
            for first in range(len(words) - size + 1):
                if first and tuple(words[first - 1 : first - 1 + size]) in grams:
                    continue  # within a shared run, which counts as a whole
                last = first
                while tuple(words[last : last + size]) in grams:
                    last += 1
                span = words[first : last - 1 + size]
                enough = weigh(span) >= 13 if weight >= 13 else len(span) == len(sought)
                if (
                    last > first
                    and enough
                    and (
                        last - 1 + size - first >= 0.8 * len(sought)
                        or len("".join(words[first : last - 1 + size]).encode())
                        >= min(120, 3 * (last - 1 + size - first))
                    )
                ):
                    named.add(one.where)
    return named


def weigh(words: list[str]) -> float:
    return sum(0.6 if "\u4e00" <= word <= "\u9fff" else 1 for word in words) + 1e-9


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_agrees_with_a_search_word_by_word(data):
    word = st.sampled_from(
        [
            "a",
            "bb",
            "a_long_word_of_many_letters",
            "a_long_word_of_some_letters",
            "\u00e9t\u00e9",
            "\u6f22",
            "\u6f22\u5b57\u6f22\u5b57\u6f22",
        ]
    )
    phrase = st.lists(word, max_size=30).map(" ".join)
    items = [
        item(*data.draw(st.lists(phrase, min_size=1, max_size=3)), where=str(i))
        for i in range(data.draw(st.integers(0, 4)))
    ]
    texts = data.draw(st.lists(phrase, min_size=1, max_size=4))
    pieces = [one.questions[0] for one in items]
    texts += [f"{data.draw(phrase)} {piece} {data.draw(phrase)}" for piece in pieces]
    assert [{hit.item for hit in hits} for hits in Index(items).find(texts)] == [
        slow_find(text, items) for text in texts
    ]


def test_every_turn_is_a_question(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({"turns": [QUESTION, SHORT]}) + "\n")
    index = Index(decontaminate.read_benchmarks({"mt_bench": f"file://{tmp_path}/b.jsonl"}))
    assert index.find([SHORT])[0] and index.too_short.total() == 0
    (tmp_path / "c.jsonl").write_text(json.dumps({"turns": QUESTION}) + "\n")
    with pytest.raises(BadInput, match="not a record of mt_bench"):
        decontaminate.read_benchmarks({"mt_bench": f"file://{tmp_path}/c.jsonl"})


def test_a_document_that_is_a_benchmark_is_searched_in_time():
    items = [
        item(f"question {i} " + " ".join(f"word{i}x{j}" for j in range(60)), where=str(i))
        for i in range(2000)
    ]
    (hits,) = Index(items).find([" ".join(one.questions[0] for one in items)])
    assert [int(hit.item) for hit in hits] == list(range(2000))


def test_drop_and_cut():
    filler = (
        "An honest sentence of the document that has nothing to do with any question at all. " * 12
    )
    texts = ["clean " + filler, f"{filler}{QUESTION} {filler}", QUESTION, f"{filler}{QUESTION}"]
    documents = [Document(text=text, id=f"d{i}") for i, text in enumerate(texts)]
    index = Index([item(QUESTION)])
    kept, report, counts = decontaminate.clean(documents, index, "drop")
    assert [document.id for document in kept] == ["d0"] and [hit["document"] for hit in report] == [
        "d1",
        "d2",
        "d3",
    ]
    assert counts == {
        "documents_dropped": 3,
        "documents_cut": 0,
        "characters_removed": sum(map(len, texts[1:])),
    }
    kept, report, counts = decontaminate.clean(documents, index, "cut")
    assert [document.id for document in kept] == ["d0", "d1#0", "d1#1", "d3#0"]
    at = len(filler)
    assert (
        kept[1].text == texts[1][: at - 200]
        and kept[2].text == texts[1][at + len(QUESTION) + 200 :]
    )
    assert kept[1].split_key == kept[2].split_key == texts[1]
    assert counts["documents_dropped"] == 1 and counts["documents_cut"] == 2
    assert counts["characters_removed"] == sum(map(len, texts)) - sum(
        len(document.text) for document in kept
    )
    assert decontaminate.summary(index, report) == {
        "b": {"items": 1, "items_found": 1, "documents": 3, "too_short": 0}
    }
    assert decontaminate.too_short({"b": 0}) == []
    assert decontaminate.too_short({"b": 0, "c": 1200, "d": 3}) == [
        "1,203 benchmark questions are too short to look for: c 1,200, d 3"
    ]


RECORDS = {
    "mmlu": {"question": QUESTION, "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 0},
    "gsm8k": {"question": QUESTION, "answer": "3*60=<<3*60=180>>180\n#### 180"},
    "hellaswag": {
        "ctx": "[header] " + QUESTION,
        "endings": ["[step] It goes on.", "x", "y", "z"],
        "label": "0",
    },
    "arc_challenge": {
        "id": "1",
        "question": QUESTION,
        "choices": {"text": ["a", "b"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "truthfulqa": {
        "question": QUESTION,
        "mc1_targets": {"choices": ["a"], "labels": [1]},
        "mc2_targets": {"choices": ["a"], "labels": [1]},
    },
    "mt_bench": {"question_id": 1, "category": "math", "turns": ["Do it.", QUESTION]},
    "bfcl_simple": {
        "id": "simple_0",
        "question": [[{"role": "user", "content": QUESTION}]],
        "function": [],
    },
    "text": {"text": QUESTION},
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_benchmarks_schema_is_read(tmp_path, name):
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps(RECORDS[name]) + "\n")
    items = decontaminate.read_benchmarks({name: f"file://{path}"})
    assert [(one.benchmark, one.where) for one in items] == [(name, f"{path}:1")]
    assert Index(items).find([QUESTION])[0]
    path.write_text('{"foo": 1}\n')
    with pytest.raises(
        BadInput, match=f"b.jsonl:1: not a record of .*check the URL of benchmark '{name}'"
    ):
        decontaminate.read_benchmarks({name: f"file://{path}?text=foo"})


def test_benchmarks_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(
        BadInput, match="'other' has no known schema: begin its name with one of mmlu, "
    ):
        decontaminate.read_benchmarks({"other": f"file://{tmp_path}/empty.jsonl"})
    with pytest.raises(BadInput, match="'mmlu' has no items"):
        decontaminate.read_benchmarks({"mmlu": f"file://{tmp_path}/empty.jsonl"})


BENCHMARKS = {
    "mmlu": "mmlu/**/*.jsonl",
    "gsm8k": "gsm8k/test.jsonl",
    "hellaswag": "hellaswag/*.jsonl",
    "arc_challenge": "arc_challenge/test.jsonl",
    "truthfulqa": "truthfulqa/*.jsonl",
    "mt_bench": "mt_bench/question.jsonl",
    "bfcl_simple": "bfcl/simple_python.jsonl",
    "bfcl_multiple": "bfcl/multiple.jsonl",
    "bfcl_irrelevance": "bfcl/irrelevance.jsonl",
}


def alter(text: str, generator: random.Random) -> str:
    """Another case, and other punctuation between the words."""
    words = re.findall(r"\w+", text.replace("'", ""))
    return "".join(
        (word.upper() if generator.random() < 0.3 else word)
        + generator.choice([" ", ", ", " \u2013 ", "; ", "\n", "... "])
        for word in words
    )


def test_200_items_planted_in_real_documents_are_all_found_and_2000_clean_ones_are_kept(
    shared_data, tmp_path
):
    urls = {name: f"file://{shared_data}/eval/{files}" for name, files in BENCHMARKS.items()}
    items = decontaminate.read_benchmarks(urls)
    assert {one.benchmark for one in items} == set(BENCHMARKS)
    generator = random.Random(0)
    texts = []
    for name in ("general", "code"):
        with lzma.open(shared_data / f"corpus/{name}.jsonl.xz") as file:
            texts += [
                text
                for text in (json.loads(line)["text"] for line in file)
                if 1_000 < len(text) < 30_000
            ]
    generator.shuffle(texts)
    clean, hosts = texts[:2000], texts[2000:2200]
    assert len(hosts) == 200
    by_length = [one for one in items if len(one.questions[0].split()) >= 13]
    changed = generator.sample(
        [one for one in by_length if len(one.questions[0].split()) >= 40], 100
    )
    whole = generator.sample([one for one in by_length if one not in changed], 100)
    planted = []
    for number, (one, host) in enumerate(zip(changed + whole, hosts)):
        words = one.questions[0].split()
        if number < 100:
            words[generator.randrange(len(words))] = "changed"
        at = host.find(" ", len(host) // 2)
        planted.append((one, f"{host[:at]}\n{alter(' '.join(words), generator)}\n{host[at:]}"))
    source = tmp_path / "corpus.jsonl"
    source.write_text(
        "".join(
            json.dumps({"text": text}) + "\n" for text in [*clean, *(text for _, text in planted)]
        )
    )
    model = tmp_path / "t.model"
    tokenizer.train(clean[:300], model, vocab_size=400, max_bytes=10**6)
    manifest = prepare.prepare_source(
        "corpus",
        f"file://{source}",
        "",
        tmp_path / "out",
        model,
        validation_fraction=0.1,
        tasks=4,
        benchmarks=urls,
    )
    report = json.loads((tmp_path / "out" / prepare.CONTAMINATED).read_text())
    named = {(hit["document"], hit["item"]) for hit in report["contaminated"]}
    expected = {(f"{source}:{2001 + number}", one.where) for number, (one, _) in enumerate(planted)}
    assert expected <= named
    assert {document for document, _ in named} == {
        document for document, _ in expected
    }  # none of the clean ones
    assert sum(manifest["splits"][split]["documents"] for split in shards.SPLITS) == 2000
    about = manifest["decontamination"]
    assert (
        about["documents_dropped"] == 200
        and about["documents_cut"] == 0
        and about["benchmarks"] == report["benchmarks"]
    )
    assert sum(counts["items_found"] for counts in about["benchmarks"].values()) >= 200
