"""Generates small problems with the steps that solve them, and pairs of a right and a wrong
solution; any number of rows.

Questions and scores are reasoning-gym's; the thoughts are computed here, and their last line has
the answer. The split of a question is decided by the hash of its steps alone, so that the splits
share no question and no steps in other words (gcd of 34 and 51, and of 51 and 34). The built-in
corpus has no question of the test split. Records depend only on the split and the index, not on the
process or the version of Python.
"""

import functools
import hashlib
import random
from collections.abc import Callable
from typing import Any

from nanollama_jax.synthetic.builtin import REASONING_ITEMS, REASONING_SEED

# Row i is of task i modulo their number; a task that is named twice has twice the share.
TASKS = ("chain_sum", "number_sorting", "chain_sum", "number_filtering", "leg_counting", "gcd")
# Item i is drawn from seed + i: far from the built-in corpus's seeds, and from each other.
SEEDS = {"train": (10**9, 10**10), "test": (10**10, 2 * 10**10)}
_NUMBERS = {"min_decimals": 0, "max_decimals": 0, "min_value": 1, "max_value": 99}
_SIZES = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "number_sorting": {"min_numbers": 3, "max_numbers": 5} | _NUMBERS,
    "number_filtering": {"min_numbers": 3, "max_numbers": 5} | _NUMBERS,
    "leg_counting": {"min_animals": 2, "max_animals": 3, "min_instances": 1, "max_instances": 9},
    "gcd": {"min_value": 2, "max_value": 99},
}


def conversations(split: str, index: int) -> dict[str, str]:
    """Row `index` of "train" or "test": {"question", "thought", "answer"} (chat/conversations.py).

    The answer is bare; `index` has no limit.
    """
    task, entry = _draw(random.Random(f"reasoning {split} {index}"), split, index)
    return {
        "question": entry["question"].strip(),
        "thought": _thought(task, entry, entry["answer"]),
        "answer": entry["answer"],
    }


def preferences(split: str, index: int) -> dict[str, Any]:
    """Row `index` of pairs: {"prompt", "chosen", "rejected"} (chat/preference.py).

    The questions differ from those of `conversations`. Each answer is a message with its thought;
    the rejected one goes wrong in the last line of its thought. The task scores the chosen answer
    1.0 and the rejected one less: a near miss or, for a number, perhaps the answer to another
    question.
    """
    rng = random.Random(f"preference {split} {index}")
    task, entry = _draw(rng, split, index)
    misses = _near_misses(task, entry, rng)
    if task not in ("number_sorting", "number_filtering"):
        misses.append(_draw(rng, split, index)[1]["answer"])
    rng.shuffle(misses)
    wrong = next(miss for miss in misses if _score(task, entry, miss) < 1)
    answers = {"chosen": entry["answer"], "rejected": wrong}
    said = {
        key: [{"role": "assistant", "thought": _thought(task, entry, answer), "content": answer}]
        for key, answer in answers.items()
    }
    return {"prompt": entry["question"].strip()} | said


def check(split: str, index: int, answer: str) -> bool:
    """Whether the task scores `answer` 1.0 for the question of `conversations(split, index)`."""
    task, entry = _draw(random.Random(f"reasoning {split} {index}"), split, index)
    return _score(task, entry, answer.strip()) == 1


def _draw(rng: random.Random, split: str, index: int) -> tuple[str, dict[str, Any]]:
    """A task and an item of it that belongs to the split."""
    task = TASKS[index % len(TASKS)]
    while True:
        entry = _dataset(task)[rng.randrange(*SEEDS[split])]
        question = entry["question"].strip()
        steps = _thought(task, entry, entry["answer"])
        is_test = hashlib.blake2b(steps.encode()).digest()[0] % 8 == 0
        if is_test == (split == "test") and (split == "train" or question not in _built_in(task)):
            return task, entry


@functools.cache
def _dataset(task: str) -> Any:
    import reasoning_gym  # takes two seconds

    return reasoning_gym.create_dataset(task, seed=0, size=SEEDS["test"][1], **_SIZES[task])


@functools.cache
def _built_in(task: str) -> frozenset[str]:
    """The questions of builtin://reasoning, which a pre-trained model has seen.

    Without this check, a sum of two digits would soon be drawn again.
    """
    import reasoning_gym

    items = reasoning_gym.create_dataset(task, seed=REASONING_SEED, size=REASONING_ITEMS)
    return frozenset(items[index]["question"].strip() for index in range(REASONING_ITEMS))


def _score(task: str, entry: dict[str, Any], answer: str) -> float:
    return _dataset(task).score_answer(answer, entry)


def _thought(task: str, entry: dict[str, Any], answer: str) -> str:
    """The steps; the last one gives `answer`, right or wrong."""
    return "\n".join(_STEPS[task](entry["metadata"], answer))


def _chain_sum(metadata: dict[str, Any], answer: str) -> list[str]:
    """Sums from left to right, the last with `answer`."""
    total, *rest = metadata["expression"].split()
    lines = []
    for sign, term in zip(rest[::2], rest[1::2]):
        after = int(total) + int(term) if sign == "+" else int(total) - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = str(after)
    return [*lines[:-1], f"{lines[-1].rpartition(' = ')[0]} = {answer}"]


def _leg_counting(metadata: dict[str, Any], answer: str) -> list[str]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    legs = {animal: count * ANIMALS[animal] for animal, count in metadata["animals"].items()}
    lines = [
        f"{animal}: {count} * {ANIMALS[animal]} = {legs[animal]}"
        for animal, count in metadata["animals"].items()
    ]
    return lines + _chain_sum({"expression": " + ".join(map(str, legs.values()))}, answer)


def _gcd(metadata: dict[str, Any], answer: str) -> list[str]:
    """Euclid's algorithm."""
    a, b = sorted(metadata["numbers"], reverse=True)
    lines = []
    while b:
        lines.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    return [*lines, f"GCD = {answer}"]


def _number_sorting(metadata: dict[str, Any], answer: str) -> list[str]:
    left, lines = list(metadata["original_numbers"]), []
    name = "smallest" if metadata["direction"] == "ascending" else "largest"
    for number in metadata["sorted_numbers"][:-1]:
        lines.append(f"{name} of {', '.join(left)}: {number}")
        left.remove(number)
    return [*lines, answer]


def _number_filtering(metadata: dict[str, Any], answer: str) -> list[str]:
    limit, lines = metadata["filter_value"], []
    for number in metadata["original_numbers"]:
        sign = "<" if int(number) < int(limit) else ">" if int(number) > int(limit) else "="
        lines.append(
            f"{number} {sign} {limit}: {'keep' if number in metadata['result'] else 'remove'}"
        )
    return [*lines, answer]


_STEPS: dict[str, Callable[[dict[str, Any], str], list[str]]] = {
    "chain_sum": _chain_sum,
    "number_sorting": _number_sorting,
    "number_filtering": _number_filtering,
    "leg_counting": _leg_counting,
    "gcd": _gcd,
}


def _near_misses(task: str, entry: dict[str, Any], rng: random.Random) -> list[str]:
    """Answers with a plausible slip; some can be right by chance."""
    if task == "number_sorting":
        right = entry["metadata"]["sorted_numbers"]
        at, gone = rng.randrange(len(right) - 1), rng.randrange(len(right))
        swapped = right[:at] + [right[at + 1], right[at]] + right[at + 2 :]
        return [str(right[::-1]), str(swapped), str(right[:gone] + right[gone + 1 :])]
    if task == "number_filtering":
        numbers, result = entry["metadata"]["original_numbers"], entry["metadata"]["result"]
        slip = rng.choice(numbers)
        others = [number for number in numbers if number not in result]
        return [
            str(others),
            str([number for number in numbers if (number in result) != (number == slip)]),
        ]
    right = int(entry["answer"])
    misses = [right - 1, right + 1]
    if abs(right) >= 10:
        reversed_digits = int(str(abs(right))[::-1])
        misses += [right - 10, right + 10, reversed_digits if right > 0 else -reversed_digits]
    if task == "chain_sum":
        return [str(miss) for miss in (*misses, -right)]
    return [str(miss) for miss in misses if miss > 0]
