"""Turns OpenAssistant's rows of one message each into conversations (`?tree=oasst` of a source URL).

A row of OpenAssistant/oasst2, and of its .messages.jsonl.gz files, has `message_id`, `parent_id`
(null or absent for a tree's first prompt), `message_tree_id`, `role` (prompter or assistant),
`text`, `lang`, `rank` (0 is the best among siblings; null: not ranked) and `deleted`. The rows of a
tree are consecutive and in depth-first order, as the dataset's card says
(https://huggingface.co/datasets/OpenAssistant/oasst2).
"""

import dataclasses
import reprlib
from collections.abc import Iterable, Iterator

from nanollama_jax.errors import BadInput

_REQUIRED = {"message_id": str, "message_tree_id": str, "role": str, "text": str}
_OPTIONAL = {"parent_id": str, "lang": str, "rank": int, "deleted": bool}
_NEXT = {"assistant": "prompter", "prompter": "assistant"}


@dataclasses.dataclass(frozen=True)
class _Message:
    where: str
    record: dict
    replies: list["_Message"] = dataclasses.field(default_factory=list)  # without the deleted ones


def conversations(
    records: Iterable[tuple[str, dict | BadInput]], lang: str | None = None
) -> Iterator[tuple[str, dict | BadInput]]:
    """Yields (where, {"messages": [{"role", "content"}, ...]}) for the trees in `records`, or only
    for trees that begin in `lang`.

    A conversation takes the best-ranked reply at each of the assistant's turns (unranked replies
    come last; among equals, the first) and every follow-up at each of the user's turns. It ends at
    an assistant's message that no follow-up leads on from; `where` is that message's row. Deleted
    messages are left out with all replies to them. A row that is a `BadInput`, or that has no place
    in its tree, is yielded as a `BadInput`. Keeps one tree, and the ids of all trees, in memory.
    """
    tree, tree_id, ended = _empty_tree(), None, set()
    for where, record in records:
        if bad := record if isinstance(record, BadInput) else _bad_row(where, record):
            yield where, bad
            continue
        if record["message_tree_id"] != tree_id:
            if record["message_tree_id"] in ended:
                again = f"tree {record['message_tree_id']!r} comes back after another"
                yield (
                    where,
                    BadInput(
                        f"{where}: {again}: sort the rows so that those of a tree stand together"
                    ),
                )
                continue
            yield from _conversations(tree, lang)
            tree, tree_id = _empty_tree(), record["message_tree_id"]
            ended.add(tree_id)
        if bad := _bad_place(where, record, tree):
            yield where, bad
            continue
        tree[record["message_id"]] = _Message(where, record)
        if not record.get("deleted"):
            tree[record.get("parent_id")].replies.append(tree[record["message_id"]])
    yield from _conversations(tree, lang)


def _empty_tree() -> dict[str | None, _Message]:
    """A tree's messages by id; the first prompt replies to the one that stands under None."""
    return {None: _Message("", {"role": "assistant"})}


def _bad_row(where: str, record: dict) -> BadInput | None:
    for name, kind in (_REQUIRED | _OPTIONAL).items():
        value = record.get(name)
        if not isinstance(value, kind) and not (value is None and name in _OPTIONAL):
            found = f"of type {type(value).__name__}, not {kind.__name__}"
            problem = f"`{name}` is {'missing' if value is None else found}"
            return BadInput(
                f"{where}: {problem}: ?tree=oasst reads OpenAssistant's flat messages; leave it "
                "out for rows that are conversations"
            )
    return None


def _bad_place(where: str, record: dict, tree: dict[str | None, _Message]) -> BadInput | None:
    parent_id, message_id = record.get("parent_id"), repr(record["message_id"])
    if parent_id not in tree:
        return BadInput(
            f"{where}: message {message_id} replies to {parent_id!r}, which has not come in its "
            "tree, or was refused: "
            "put a message before its replies, or remove them"
        )
    if record["message_id"] in tree:
        return BadInput(f"{where}: message {message_id} comes a second time: remove one of the two")
    if parent_id is None and len(tree) > 1:
        return BadInput(
            f"{where}: message {message_id} has no parent_id, and does not begin its tree: name the "
            "message that it replies to"
        )
    if record["role"] != (expected := _NEXT[tree[parent_id].record["role"]]):
        return BadInput(
            f"{where}: role {reprlib.repr(record['role'])}, where {expected} is expected: correct "
            "the role or the parent_id"
        )
    return None


def _conversations(
    tree: dict[str | None, _Message], lang: str | None
) -> Iterator[tuple[str, dict]]:
    paths = [
        (tree[None],)
    ]  # each ends with an assistant's message, or is empty but for what the first prompt replies to
    while paths:
        path = paths.pop()
        prompts = [
            prompt
            for prompt in path[-1].replies
            if prompt.replies and (len(path) > 1 or lang in (None, prompt.record.get("lang")))
        ]
        paths += [path + (prompt, min(prompt.replies, key=_rank)) for prompt in reversed(prompts)]
        if not prompts and len(path) > 1:
            yield path[-1].where, {"messages": [_turn(message.record) for message in path[1:]]}


def _rank(reply: _Message) -> tuple[bool, int]:
    rank = reply.record.get("rank")
    return rank is None, rank or 0


def _turn(record: dict) -> dict[str, str]:
    return {
        "role": "user" if record["role"] == "prompter" else "assistant",
        "content": record["text"],
    }
