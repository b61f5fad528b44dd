import ast
import hashlib
import json
import math
import os
import re
import subprocess
import sys

import pytest
import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS

from nanollama_jax.chat.conversations import parse_conversation
from nanollama_jax.chat.preference import parse_preference
from nanollama_jax.corpus.sources import read_records
from nanollama_jax.errors import BadInput
from nanollama_jax.synthetic import builtin, reasoning

ROWS = 1200  # 200 of each of the tasks
# Of the first 300 rows of each kind and split, on any Python: print(digest()) after a change that was meant to change them.
DIGEST = "e8d0d0f27522bc541fe6b367376bc54ef5a1dc4518744c386830ef08a0792a5f"
SCRIPT = "from tests.synthetic.test_reasoning import digest; print(digest())"


def digest() -> str:
    makers = (reasoning.conversations, reasoning.preferences)
    rows = [
        maker(split, index)
        for maker in makers
        for split in ("train", "test")
        for index in range(300)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return {
        split: [reasoning.conversations(split, index) for index in range(ROWS)]
        for split in ("train", "test")
    }


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict]]:
    return {
        split: [reasoning.preferences(split, index) for index in range(ROWS)]
        for split in ("train", "test")
    }


def solve(question: str) -> str:
    """The answer, worked out from the question alone."""
    if sum_ := re.search(r"problem: (.*) =", question):
        return str(eval(sum_[1]))
    if numbers := re.search(r"these numbers: (\d+), (\d+)", question):
        return str(math.gcd(int(numbers[1]), int(numbers[2])))
    if found := re.search(r"in (ascending|descending) order: (.*)\n", question):
        return str(sorted(found[2].split(", "), key=float, reverse=found[1] == "descending"))
    if found := re.search(
        r"(Keep|Remove) all numbers (larger|smaller) than (\d+) in this list: (\[.*\])", question
    ):
        fits = [
            int(number) > int(found[3]) if found[2] == "larger" else int(number) < int(found[3])
            for number in ast.literal_eval(found[4])
        ]
        return str(
            [
                number
                for number, fit in zip(ast.literal_eval(found[4]), fits)
                if fit == (found[1] == "Keep")
            ]
        )
    if animals := re.search(r"in total if you have (.*)\?", question):
        counted = [animal.split(" ", 1) for animal in animals[1].split(", ")]
        return str(
            sum(
                int(count) * ANIMALS[animal if count == "1" else animal[:-1]]
                for count, animal in counted
            )
        )
    raise ValueError(question)


def test_every_row_parses(splits, pairs):
    for rows in splits.values():
        for row in rows:
            question, answer = parse_conversation(row, "row").messages
            assert (question.content, answer.thought, answer.content) == (
                row["question"],
                row["thought"],
                row["answer"],
            )
    for rows in pairs.values():
        for row in rows:
            pair = parse_preference(row, "row")
            assert [len(part) for part in (pair.prompt, pair.chosen, pair.rejected)] == [
                1,
                1,
                1,
            ] and pair.chosen[0].thought


def test_answers_are_right(splits):
    for split, rows in splits.items():
        for index, row in enumerate(rows):
            assert reasoning.check(split, index, row["answer"] + "\n")
            assert row["answer"] == solve(row["question"])


def test_what_is_wrong_does_not_pass(splits):
    for split, rows in splits.items():
        for index, row in enumerate(rows):
            assert not reasoning.check(split, index, "") and not reasoning.check(
                split, index, f"the answer is {row['answer']}"
            )
            other = rows[(index + len(reasoning.TASKS)) % ROWS]["answer"]
            if not row["question"].startswith("Sort"):  # there, one more or less passes
                assert reasoning.check(split, index, other) == (other == row["answer"])


def test_thoughts_lead_to_the_answer(splits):
    for rows in splits.values():
        for row in rows:
            *steps, last = row["thought"].split("\n")
            assert last.rpartition(" = ")[2] == row["answer"]
            for left, right in re.findall(
                r"(?:^|: )([-\d][-+*\d ]*) = ([-+*\d ]+)$", "\n".join((*steps, last)), re.MULTILINE
            ):
                assert eval(left) == eval(right), row
            for name, numbers, picked in re.findall(
                r"^(smallest|largest) of (.*): (.*)$", row["thought"], re.MULTILINE
            ):
                assert float(picked) == {"smallest": min, "largest": max}[name](
                    map(float, numbers.split(", "))
                )
            kept = [
                number
                for number, fate in re.findall(
                    r"^(\d+) [<=>] \d+: (keep|remove)$", row["thought"], re.MULTILINE
                )
                if fate == "keep"
            ]
            if "in this list" in row["question"]:
                assert str(kept) == row["answer"]


def test_chosen_is_right_and_rejected_wrong(pairs):
    shorter = 0
    for rows in pairs.values():
        for index, row in enumerate(rows):
            (chosen,), (rejected,) = row["chosen"], row["rejected"]
            right = solve(row["prompt"])
            assert chosen["content"] == right and ast.literal_eval(
                rejected["content"]
            ) != ast.literal_eval(right)
            dataset = reasoning_gym.create_dataset(
                reasoning.TASKS[index % len(reasoning.TASKS)], seed=0, size=1
            )
            entry = {
                "answer": right,
                "metadata": {
                    "direction": "descending" if "descending" in row["prompt"] else "ascending"
                },
            }
            assert (
                dataset.score_answer(chosen["content"], entry)
                == 1
                > dataset.score_answer(rejected["content"], entry)
            )
            shorter += len(rejected["content"]) < len(chosen["content"])
    assert shorter < ROWS  # of 2 * ROWS: to be short is not to be wrong


def test_pairs_part_at_the_last_line_of_the_thought(pairs):
    for row in (*pairs["train"], *pairs["test"]):
        thoughts = [row[key][0]["thought"].split("\n") for key in ("chosen", "rejected")]
        assert thoughts[0][:-1] == thoughts[1][:-1]
        assert [thought[-1].rpartition(" = ")[2] for thought in thoughts] == [
            row[key][0]["content"] for key in ("chosen", "rejected")
        ]


def test_no_question_of_test_is_in_train_or_in_the_built_in_corpus(splits, pairs):
    train = {row["question"] for row in splits["train"]} | {row["prompt"] for row in pairs["train"]}
    train |= {
        reasoning.conversations("train", index)["question"] for index in range(ROWS, 6 * ROWS)
    }
    test = {row["question"] for row in splits["test"]} | {row["prompt"] for row in pairs["test"]}
    read = (
        text
        for name, text in builtin.read("reasoning", 0, 1)
        if name.startswith(("reasoning/chain_sum/", "reasoning/gcd/"))
    )
    corpus = {text.partition("\n")[0].removeprefix("Question: ") for text in read}
    assert len(corpus) > 1000 and len(test) > ROWS
    assert not test & train and not test & corpus
    steps = {split: {row["thought"] for row in rows} for split, rows in splits.items()}
    assert not steps["train"] & steps["test"]


def test_some_tasks_alone():
    rows = list(read_records("builtin://math?rows=7&tasks=gcd,chain_sum", 0, 1))
    assert [record for _, record in rows] == [
        reasoning.conversations("train", index) for index in (0, 2, 5, 6, 8, 11, 12)
    ]
    assert [reasoning.TASKS[index % 6] for index in (0, 2, 5)] == ["chain_sum", "chain_sum", "gcd"]
    for url, said in (
        ("math?tasks=gdc", "some of chain_sum, gcd"),
        ("tools?tasks=gcd", "is for math"),
        ("transcripts?tasks=gcd", "is for math"),
        ("docs?tasks=gcd", "tasks is an option of"),
    ):
        with pytest.raises(BadInput, match=said):
            list(read_records(f"builtin://{url}", 0, 1))


def test_rows_are_short(splits):
    sizes = [len("".join(row.values())) for row in splits["train"]]
    print(f"characters a row: mean {sum(sizes) / len(sizes):.0f}, longest {max(sizes)}")
    assert sum(sizes) / len(sizes) < 300 and max(sizes) < 800


def test_seeds_are_far_from_the_built_in_corpus():
    (train_start, train_stop), (test_start, test_stop) = (
        reasoning.SEEDS["train"],
        reasoning.SEEDS["test"],
    )
    assert (
        builtin.REASONING_SEED + builtin.REASONING_ITEMS
        < train_start
        < train_stop
        <= test_start
        < test_stop
    )
    assert set(reasoning.TASKS) <= set(
        builtin.REASONING_TASKS
    )  # none of those that are not repeatable


def test_another_process_with_another_hash_seed_makes_the_same():
    assert digest() == DIGEST
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.getcwd()}
    assert (
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        == DIGEST
    )
