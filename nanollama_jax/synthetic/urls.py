"""What builtin:// URLs stand for: the built-in corpus, and rows that are made to order."""

from collections.abc import Iterator
from typing import Any

from nanollama_jax.errors import BadInput
from nanollama_jax.synthetic import builtin, reasoning, tool_conversations

OPTIONS = ("rows", "split", "tasks")
# Made to order, a row at a time, from (split, index)
GENERATED = {
    "tools": tool_conversations.conversations,
    "math": reasoning.conversations,
    "right_or_wrong": reasoning.preferences,
    "transcripts": tool_conversations.transcript,
}


def read(
    name: str, rank: int, ranks: int, columns: list[str] | None = None, **options: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """This rank's records of builtin://NAME, as (where, record)."""
    if name in GENERATED:
        yield from _generated(name, rank, ranks, **options)
        return
    if options:
        raise BadInput(
            f"builtin://{name} takes no options: {min(options)} is an option of "
            f"{', '.join(GENERATED)}"
        )
    for document_id, text in builtin.read(name, rank, ranks):
        yield f"builtin://{document_id}", {"text": text}


def split_key(where: str) -> str:
    """What decides the split of a record instead of its text; "" for most."""
    return builtin.split_key(where.removeprefix("builtin://")) or ""


def _generated(
    name: str,
    rank: int,
    ranks: int,
    rows: str = "1000",
    split: str = "train",
    tasks: str = ",".join(reasoning.TASKS),
) -> Iterator[tuple[str, dict[str, Any]]]:
    if not rows.isdecimal() or split not in ("train", "test"):
        raise BadInput(
            f"builtin://{name}?rows={rows}&split={split}: rows is a number, and split is train or "
            "test"
        )
    wanted = set(tasks.split(","))
    among = [position for position, task in enumerate(reasoning.TASKS) if task in wanted]
    some = len(among) < len(reasoning.TASKS)
    if not wanted <= set(reasoning.TASKS) or (some and name not in ("math", "right_or_wrong")):
        raise BadInput(
            f"builtin://{name}?tasks={tasks}: tasks is for math and right_or_wrong, some of "
            f"{', '.join(sorted(set(reasoning.TASKS)))}"
        )
    for row in range(rank, int(rows), ranks):
        index = row // len(among) * len(reasoning.TASKS) + among[row % len(among)]
        yield f"builtin://{name}/{split}:{index + 1}", GENERATED[name](split, index)
