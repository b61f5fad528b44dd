"""Conversations and pairs on disk: what a record says, what is refused, and what is left out and named."""

import json

import pytest

from nanollama_jax import checkpoint
from nanollama_jax.chat import chatml as chat
from nanollama_jax.chat.conversations import Message, parse_conversation
from nanollama_jax.chat.preference import parse_preference
from nanollama_jax.corpus import finetuning
from nanollama_jax.corpus.rows import read_rows
from nanollama_jax.corpus.sources import read_prepared
from nanollama_jax.data import pipeline, rows
from nanollama_jax.data.records import SAID
from nanollama_jax.errors import BadInput
from nanollama_jax.files import locked
from nanollama_jax.synthetic import urls
from nanollama_jax.tokenizer import Tokenizer
from nanollama_jax.train import feed

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
USER, ANSWER = GOOD["messages"]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
TOOLS = [{"name": "now", "parameters": {}}]
BAD = {
    "no message is the assistant's": {"messages": [{"role": "user", "content": "a"}]},
    "user after user, where assistant is expected": {
        "messages": [GOOD["messages"][0], GOOD["messages"][0]]
    },
    "is not JSON": {
        "messages": [
            GOOD["messages"][0],
            {"role": "assistant", "tool_calls": [{"name": "now", "arguments": "{"}]},
        ],
        "tools": TOOLS,
    },
    "not among the tools": {
        "messages": [
            GOOD["messages"][0],
            {"role": "assistant", "tool_calls": [{"name": "x", "arguments": {}}]},
        ],
        "tools": TOOLS,
    },
    "no message of the assistant is to be trained on": {
        "messages": [USER, ANSWER | {"train": False}]
    },
    "`loss_scale` is 2, which is not understood": {"messages": [USER, ANSWER | {"loss_scale": 2}]},
    "a thought is read between one <think>": {"question": "a", "answer": "<think>b"},
    "has `args` but no `parameters`": GOOD | {"tools": [{"name": "now", "args": {"a": {}}}]},
    "contradicts the labels": PAIR | {"score_chosen": 1, "score_rejected": 2},
    "which is a tie": PAIR | {"chosen-rating": 4.0, "rejected-rating": 4},
    "`chosen` equals `rejected`:": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "`chosen` equals `rejected` but for whitespace": {
        "prompt": "a",
        "chosen": "b",
        "rejected": "b\n",
    },
}


@pytest.fixture
def tokenizer(chat_tokenizer) -> Tokenizer:
    return chat_tokenizer


def prepare(folder, tokenizer, made, kind="conversations", **settings):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    about = dict(
        url=f"file://{folder}/rows.jsonl",
        licence="none",
        kind=kind,
        bad_rows="stop",
        max_tokens=128,
        validation_fraction=0.0,
    )
    return finetuning.prepare(
        "chats", out_dir=folder / "chats", tokenizer=tokenizer, **about | settings
    )


def opened(folder, tokenizer, kind, split="train"):
    source = pipeline.open_source(folder, "chats", tokenizer, kind)
    return rows.Rows.of(source, split, seq_len=source.manifest["max_tokens"], max_segments=64)


def test_records_are_the_conversations(tokenizer, shared_data, tmp_path):
    url = f"file://{shared_data}/sft/chat_oasst.jsonl"
    manifest = finetuning.prepare(
        "chats",
        url,
        "Apache-2.0",
        "conversations",
        "stop",
        out_dir=tmp_path / "chats",
        tokenizer=tokenizer,
        max_tokens=1024,
        validation_fraction=0.2,
    )
    expected = [
        chat.encode(row.messages, tokenizer)
        for row in read_rows(url, parse_conversation, on_bad=None)
    ]
    fitting = sorted(e.ids.tolist() for e in expected if len(e.ids) <= 1024)
    found = [
        unit[0]
        for split in ("train", "validation")
        for unit in opened(tmp_path, tokenizer, "conversations", split).units
    ]
    assert sorted((unit & ~SAID).tolist() for unit in found) == fitting and len(fitting) > 50
    said = {tuple(e.ids.tolist()): e.learned.tolist() for e in expected}
    assert all(
        (unit >> 31).astype(bool).tolist() == said[tuple((unit & ~SAID).tolist())] for unit in found
    )
    assert manifest["left_out"] == {
        "bad": 0,
        "too long": len(expected) - len(fitting),
        "contaminated": 0,
    }
    assert manifest["splits"]["validation"]["documents"] > 5


def test_of_a_pair_only_the_answers_are_learnt(tokenizer, shared_data, tmp_path):
    url = f"file://{shared_data}/preference/oasst.jsonl"
    pairs = list(read_rows(url, parse_preference, on_bad=None))
    finetuning.prepare(
        "chats",
        url,
        "-",
        "preferences",
        "stop",
        out_dir=tmp_path / "chats",
        tokenizer=tokenizer,
        max_tokens=4096,
        validation_fraction=0,
    )
    sides = {}
    for pair in pairs:
        prompt = len(chat.encode(pair.prompt, tokenizer).ids)
        for answer in (pair.chosen, pair.rejected):
            encoded = chat.encode(pair.prompt + answer, tokenizer)
            sides[tuple(encoded.ids.tolist())] = [
                said and at >= prompt for at, said in enumerate(encoded.learned.tolist())
            ]
    found = opened(tmp_path, tokenizer, "preferences").units
    assert len(found) > 50 and all(len(unit) == 2 for unit in found)
    for unit in found:
        for side in unit:
            assert (side >> 31).astype(bool).tolist() == sides[tuple((side & ~SAID).tolist())]


def test_a_pair_is_chosen_then_rejected_and_has_its_tools(tokenizer, tmp_path):
    asked = [*GOOD["messages"], {"role": "user", "content": "c"}]
    prepare(
        tmp_path,
        tokenizer,
        [{"prompt": asked, "chosen": "x", "rejected": "y", "tools": TOOLS}],
        kind="preferences",
    )
    ((chosen, rejected),) = opened(tmp_path, tokenizer, "preferences").units
    for side, answer in ((chosen, "x"), (rejected, "y")):
        prompt = chat.encode_prompt([Message(**message) for message in asked], tokenizer, TOOLS)
        assert (side & ~SAID)[: len(prompt)].tolist() == prompt and not (
            side[: len(prompt)] >> 31
        ).any()
        said = side[len(prompt) :]
        assert tokenizer.show(said[said >> 31 == 1] & ~SAID) == f"{answer}<|im_end|>"


def test_what_is_not_to_be_trained_on_weighs_nothing(tokenizer, tmp_path):
    """From the file through the record to the row and to what the log shows of it."""
    a0, a1 = (USER | {"content": f"a{i}"} for i in range(2))
    b0, b1 = (ANSWER | {"content": f"b{i}", "thought": "c"} for i in range(2))
    made = [{"messages": [a0, b0, a1, b1]}, {"messages": [a0, b0 | {"train": False}, a1, b1]}]
    made.append({"conversations": [a0, b0, a1, b1 | {"weight": 0}]})
    prepare(tmp_path, tokenizer, made)
    whole = opened(tmp_path, tokenizer, "conversations")
    ((row, *others), said) = [whole[number] for number in range(len(whole))], []
    assert not others
    for segment in (1, 2, 3):
        targets = row["targets"][(row["segment_ids"] == segment) & (row["loss_weights"] == 1)]
        said.append(tokenizer.show(targets.tolist()))
    answers = [f"<|start_thought|>c<|end_thought|>b{i}<|im_end|>" for i in range(2)]
    assert sorted(said) == sorted(["".join(answers), *answers])
    special, text = 3, tokenizer.encode("c") + tokenizer.encode("b0")  # of each of four answers
    learned = 4 * (special + len(text))
    shown = feed.show_row({name: array[None] for name, array in row.items()}, tokenizer)
    assert shown.startswith(f"3 segment(s), {learned} tokens learned: '<s><|im_start|>user")


def test_of_a_pair_too(tokenizer, tmp_path):
    call = {"role": "assistant", "tool_calls": [{"name": "now", "arguments": ""}], "train": False}
    chosen = [call, {"role": "tool", "content": "12:00"}, ANSWER | {"content": "x"}]
    made = [PAIR | {"chosen": chosen, "rejected": "y", "tools": TOOLS}]
    prepare(tmp_path, tokenizer, made, kind="preferences")
    sides = opened(tmp_path, tokenizer, "preferences").units[0]
    said = [tokenizer.show((side[side >> 31 == 1] & ~SAID).tolist()) for side in sides]
    assert said == ["x<|im_end|>", "y<|im_end|>"]


def test_what_just_fits_is_kept(tokenizer, tmp_path):
    longer = {"question": "aaaa", "answer": "b"}
    length = len(chat.encode(parse_conversation(longer, "").messages, tokenizer).ids)
    for max_tokens, left_out in ((length, 0), (length - 1, 1)):
        folder = tmp_path / str(max_tokens)
        folder.mkdir()
        assert (
            prepare(folder, tokenizer, [GOOD, longer], max_tokens=max_tokens)["left_out"][
                "too long"
            ]
            == left_out
        )


def test_rows_are_not_in_the_order_of_the_file(tokenizer, tmp_path):
    prepare(tmp_path, tokenizer, [{"question": f"{i:02}", "answer": "b"} for i in range(50)])
    found, again = (
        [
            tokenizer.decode(unit[0] & ~SAID)
            for unit in opened(tmp_path, tokenizer, "conversations").units
        ]
        for _ in range(2)
    )
    assert found == again and len(set(found)) == 50 and found != sorted(found)


def test_one_question_is_on_one_side(tokenizer, tmp_path):
    made = [{"question": f"What is {i % 50}?", "answer": f"It is {i}."} for i in range(400)]
    prepare(tmp_path, tokenizer, made, validation_fraction=0.3)
    asked = {}
    for split in ("train", "validation"):
        units = opened(tmp_path, tokenizer, "conversations", split).units
        asked[split] = {
            tokenizer.decode((unit[0] & ~SAID).tolist()).split("?")[0] for unit in units
        }
    assert (
        len(asked["train"]) + len(asked["validation"]) == 50 and 5 < len(asked["validation"]) < 30
    )


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_row_is_named(tokenizer, tmp_path, mistake):
    pairs = "chosen" in BAD[mistake]
    made = [PAIR if pairs else GOOD, BAD[mistake]]
    with pytest.raises(BadInput) as caught:
        prepare(tmp_path, tokenizer, made, kind="preferences" if pairs else "conversations")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/rows.jsonl:2: ") and mistake in said
    assert (
        "check_finetuning_data.py lists all bad rows; --config.tuning.chats.bad_rows=skip leaves"
        in said
    )
    assert not (tmp_path / "chats" / "manifest.json").exists()


def test_what_is_left_out_is_counted_and_named(tokenizer, tmp_path, capsys):
    long = {"question": "ab" * 200, "answer": "b"}
    manifest = prepare(
        tmp_path, tokenizer, [GOOD, long, BAD["is not JSON"], *[GOOD] * 3], bad_rows="skip"
    )
    (tmp_path / "pairs").mkdir()
    pairs = [PAIR, *(row for row in BAD.values() if "chosen" in row)]
    found = prepare(tmp_path / "pairs", tokenizer, pairs, kind="preferences", bad_rows="skip")
    assert found["left_out"] == {"bad": 4, "too long": 0, "contaminated": 0}
    assert (
        manifest["left_out"] == {"bad": 1, "too long": 1, "contaminated": 0}
        and manifest["splits"]["train"]["documents"] == 4
    )
    named = (tmp_path / "chats" / "left_out.txt").read_text().splitlines()
    assert (
        "rows.jsonl:3: " in named[0]
        and "rows.jsonl:2: " in named[1]
        and "where seq_len is 128" in named[1]
    )


@pytest.mark.parametrize(
    ("licence", "url", "noted"),
    [
        ("", None, "not stated"),
        ("CC0", None, "CC0"),
        ("", "builtin://math?rows=7", "Apache-2.0 (generated by reasoning-gym)"),
        ("mine", "builtin://math?rows=7", "mine"),
    ],
)
def test_a_licence_goes_with_the_url(tokenizer, tmp_path, licence, url, noted):
    manifest = prepare(
        tmp_path,
        tokenizer,
        [GOOD] * 3,
        licence=licence,
        max_tokens=2048,
        **({"url": url} if url else {}),
    )
    assert manifest["licence"] == noted
    assert (
        prepare(
            tmp_path,
            tokenizer,
            [GOOD] * 3,
            licence="another",
            max_tokens=2048,
            **({"url": url} if url else {}),
        )
        == manifest
    )


def test_prepared_again(tokenizer, tmp_path):
    first = prepare(tmp_path, tokenizer, [GOOD] * 3)
    shard = tmp_path / "chats" / first["splits"]["train"]["shards"][0]["file"]
    before = shard.stat().st_mtime_ns
    assert prepare(tmp_path, tokenizer, [GOOD] * 3) == first and shard.stat().st_mtime_ns == before
    with pytest.raises(BadInput, match="was prepared with max_tokens=128, not 64"):
        prepare(tmp_path, tokenizer, [GOOD] * 3, max_tokens=64)
    with pytest.raises(BadInput, match="holds conversations and this stage trains on documents"):
        pipeline.open_source(tmp_path, "chats", tokenizer)
    source = pipeline.open_source(tmp_path, "chats", tokenizer, "conversations")
    with pytest.raises(BadInput, match="was prepared for rows of 128 tokens"):
        rows.Rows.of(source, "train", seq_len=64, max_segments=8)
    with pytest.raises(
        BadInput,
        match=r"rows.jsonl were changed since .*prepared: put them back, or move them away",
    ):
        prepare(tmp_path, tokenizer, [GOOD] * 4)
    with pytest.raises(BadInput, match="rows.jsonl were changed since"):
        prepare(
            tmp_path, tokenizer, [GOOD] * 2 + [json.loads(json.dumps(GOOD).replace('"b"', '"a"'))]
        )
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(BadInput, match="its checksum differs"):
        prepare(tmp_path, tokenizer, [GOOD] * 3)


def test_made_rows_of_another_version_are_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(urls.GENERATED, "tools", lambda split, index: GOOD)
    url = "builtin://tools?rows=7"
    first = prepare(tmp_path, tokenizer, [], url=url)
    assert (
        first["splits"]["train"]["documents"] == 7
        and prepare(tmp_path, tokenizer, [], url=url) == first
    )
    monkeypatch.setitem(
        urls.GENERATED,
        "tools",
        lambda split, index: GOOD if index < 6 else GOOD | {"kind": "none"},
    )
    with pytest.raises(
        BadInput,
        match=r"chats was prepared when builtin://tools\?rows=7 gave other rows, or that was not noted",
    ):
        prepare(tmp_path, tokenizer, [], url=url)


def test_prepared_by_one_process_at_a_time(tokenizer, tmp_path):
    (tmp_path / "chats/logs").mkdir(parents=True)
    with (
        locked(tmp_path / "chats/logs/lock", ""),
        pytest.raises(BadInput, match="is being prepared by another process"),
    ):
        prepare(tmp_path, tokenizer, [GOOD])
    assert prepare(tmp_path, tokenizer, [GOOD])["splits"]["train"]["documents"] == 1


def test_a_longer_conversation_is_on_the_side_of_its_beginning(tokenizer, tmp_path):
    made = []
    for i in range(20):
        turns = [
            {"role": "user", "content": f"a{i}"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
        made += [
            {"prompt": turns[:1], "chosen": "x", "rejected": "y"},
            {"prompt": turns, "chosen": "x", "rejected": "y"},
        ]
    prepare(tmp_path, tokenizer, made, kind="preferences", validation_fraction=0.5)
    for split in ("train", "validation"):
        texts = [
            tokenizer.decode(unit[0] & ~SAID)
            for unit in opened(tmp_path, tokenizer, "preferences", split).units
        ]
        begun = sorted(text.split("\n")[1] for text in texts)
        assert begun and begun[::2] == begun[1::2] and len(set(begun)) == len(begun) / 2


def test_a_row_that_holds_an_item_of_a_benchmark_is_left_out(tokenizer, tmp_path):
    words = (
        "how many of the seven grey geese that crossed our river last spring came back in autumn"
    )
    (tmp_path / "gsm8k.jsonl").write_text(
        json.dumps({"question": f"{words}?", "answer": "Four."}) + "\n"
    )
    benchmarks = {"gsm8k": f"file://{tmp_path}/gsm8k.jsonl", "mmlu": ""}
    asked = {
        "messages": [
            {"role": "user", "content": f"Tell me: {words.upper()}, please?"},
            GOOD["messages"][1],
        ]
    }
    thought = {
        "messages": [
            GOOD["messages"][0],
            {"role": "assistant", "content": "b", "thought": f"They ask {words}."},
        ]
    }
    parted = {
        "messages": [
            {"role": "user", "content": words[:40]},
            {"role": "assistant", "content": "b " + words[44:]},
        ]
    }
    manifest = prepare(
        tmp_path, tokenizer, [asked, GOOD, thought, parted], benchmarks=benchmarks, max_tokens=512
    )
    assert (
        manifest["left_out"] == {"bad": 0, "too long": 0, "contaminated": 2}
        and manifest["splits"]["train"]["documents"] == 2
    )
    named = (tmp_path / "chats" / "left_out.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in named] == [
        f"{tmp_path}/rows.jsonl:1",
        f"{tmp_path}/rows.jsonl:3",
    ]
    assert named[0].endswith(f"is of {tmp_path}/gsm8k.jsonl:1") and words.upper()[4:] in named[0]
    with pytest.raises(BadInput, match="was prepared with benchmarks="):
        prepare(tmp_path, tokenizer, [asked, GOOD, thought, parted], max_tokens=512)
    pairs = [
        {"prompt": "a", "chosen": "b", "rejected": words},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    (tmp_path / "pairs").mkdir()
    manifest = prepare(
        tmp_path / "pairs",
        tokenizer,
        pairs,
        kind="preferences",
        benchmarks=benchmarks,
        max_tokens=512,
    )
    assert (
        manifest["left_out"]["contaminated"] == 1 and manifest["splits"]["train"]["documents"] == 1
    )


def test_it_is_no_corpus_of_documents(tokenizer, tmp_path):
    prepare(tmp_path, tokenizer, [GOOD])
    with pytest.raises(BadInput, match="chats holds conversations: name a corpus of documents"):
        list(read_prepared(tmp_path / "chats", tokenizer))


def test_nothing_to_train_on(tokenizer, trained, tmp_path):
    with pytest.raises(
        BadInput,
        match=r"no row of .* is left to train on \(0 bad, 1 too long, 0 contaminated, 0 in validation\): check it",
    ):
        prepare(tmp_path, tokenizer, [{"question": "ab" * 200, "answer": "b"}])
    with pytest.raises(BadInput, match=r"has no <\|im_start\|>: it is a base model's"):
        prepare(tmp_path, checkpoint.load(trained).tokenizer, [GOOD])
    with pytest.raises(
        BadInput, match="tuning_validation_fraction=1.0 must be at least 0 and below 1"
    ):
        prepare(tmp_path, tokenizer, [GOOD], validation_fraction=1.0)
