"""Rows to fine-tune on, read from a source URL; and the check that
tools/check_finetuning_data.py shows."""

import collections
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from nanollama_jax.chat.preference import Preference, parse_row
from nanollama_jax.corpus.sources import matched_files, read_records
from nanollama_jax.errors import BadInput

_Row = TypeVar("_Row")


def read_rows(
    url: str, parse: Callable[[Any, str], _Row], on_bad: Callable[[str, BadInput], None]
) -> Iterator[_Row]:
    """Yields what `parse(record, where)` makes of each row of a source URL (corpus/sources.py).

    A bad row goes to `on_bad(where, mistake)`, which can raise it to stop. Raises `BadInput` for a
    source that cannot be read to its end.
    """
    for where, record in read_records(url, strict=False):
        try:
            if isinstance(record, BadInput):
                raise record
            row = parse(record, where)
        except BadInput as mistake:
            on_bad(where, mistake)
        else:
            yield row


def check(
    url: str,
    files: collections.defaultdict[str, collections.Counter[str]],
    on_bad: Callable[[str, BadInput], None],
) -> None:
    """Counts what each file of `url` holds in `files`, also if reading it raises `BadInput`.

    Bad rows and empty files go to `on_bad`.
    """

    def file_of(where: str) -> collections.Counter[str]:
        return files[re.sub(r":\d+$", "", where)]

    def count_bad(where: str, mistake: BadInput) -> None:
        file_of(where).update(rows=1, bad=1)
        on_bad(where, mistake)

    for row in read_rows(url, parse_row, count_bad):
        calls = [call.arguments for message in row.messages for call in message.tool_calls]
        texts = (text for message in row.messages for text in (message.content, message.thought))
        counts = {
            "rows": 1,
            "good": 1,
            "pairs": isinstance(row, Preference),
            "turns": len(row.messages),
            "characters": sum(map(len, texts)) + sum(len(json.dumps(call)) for call in calls),
            "with thoughts": any(message.thought for message in row.messages),
            "with tools": bool(row.tools),
            "with calls": bool(calls),
        }
        file_of(row.where).update({name: int(count) for name, count in counts.items()})
    for file in matched_files(url) or ([] if files else [url]):
        if not files[file]["rows"]:
            on_bad(file, BadInput(f"{file}: no rows: is it the right file?"))
