"""What a fine-tuning stage opens, and how often it says that it reads it."""

import json

import pytest
from ml_collections import ConfigDict

from nanollama_jax.corpus import finetuning
from nanollama_jax.train.metrics import log
from nanollama_jax.train.tasks import task_of

SEQ_LEN, ROWS = 128, 20


@pytest.fixture
def config(chat_tokenizer, tmp_path) -> ConfigDict:
    """A stage of 2 rows a step, on `read`; `seen` is only to validate on."""
    for name, words in (("read", 30), ("seen", 1)):
        made = [{"question": f"{'word ' * words}{i:02}", "answer": "b"} for i in range(ROWS)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        settings = dict(
            out_dir=tmp_path / name,
            tokenizer=chat_tokenizer,
            max_tokens=SEQ_LEN,
            validation_fraction=0.4,
        )
        finetuning.prepare(
            name, f"file://{tmp_path}/{name}.jsonl", "-", "conversations", "stop", **settings
        )
    return ConfigDict(
        {
            "task": "sft",
            "name": "sft",
            "seed": 0,
            "seq_len": SEQ_LEN,
            "batch_size": 2,
            "accumulation": 1,
            "tokens_per_step": 2 * SEQ_LEN,
            "start_step": 0,
            "end_step": 1,
            "validation": {"tokens": 64},
            "data": {
                "dir": str(tmp_path),
                "sources": {"read": 1.0},
                "validation": ("read", "seen"),
                "max_segments": 4,
            },
        }
    )


def test_of_a_source_to_validate_on_only_that_is_opened(chat_tokenizer, config):
    feed = task_of(config).open_data(config, chat_tokenizer, None)
    documents = {
        name: {split: about["documents"] for split, about in source.manifest["splits"].items()}
        for name, source in feed.sources.items()
    }
    assert all(0 < count < ROWS for counts in documents.values() for count in counts.values())
    expected = [
        documents["read"]["train"],
        documents["read"]["validation"],
        documents["seen"]["validation"],
    ]
    assert [len(rows.units) for rows in feed.rows] == expected
    assert [rows.first_pair for rows in feed.rows] == [0, expected[0], sum(expected[:2])]


@pytest.mark.parametrize("more", [0, 1])
def test_epochs_are_of_rows(chat_tokenizer, config, monkeypatch, more):
    """Padding, too, is of the rows that are read, and is no token on disk."""
    warnings = []
    monkeypatch.setattr(log, "warning", lambda form, *values: warnings.append(form % values))
    train = task_of(config).open_data(config, chat_tokenizer, None).rows[0]
    config.batch_size, config.end_step = len(train), 4 + more
    task_of(config).open_data(config, chat_tokenizer, None)
    assert (
        train.fill < 0.9
        and [text.split(":")[0] for text in warnings] == ["read is read 5.00 times in sft"] * more
    )
