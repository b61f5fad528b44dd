import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from nanollama_jax.chat.conversations import parse_conversation
from nanollama_jax.chat.oasst import conversations
from nanollama_jax.corpus.rows import read_rows
from nanollama_jax.corpus.sources import read_documents, read_records
from nanollama_jax.errors import BadInput


def row(message_id, parent_id=None, **fields):
    """A message of tree `message_id[0]`; replies have longer ids than what they reply to, and prompters' have an odd number of letters."""
    role = "prompter" if len(message_id) % 2 else "assistant"
    fields = {"rank": None, "lang": "en", "deleted": False, "text": message_id.upper()} | fields
    # What else a row of the hub's has, as far as it could be mistaken for something that is read.
    other = {
        "user_id": "u",
        "review_result": True,
        "synthetic": False,
        "tree_state": "ready_for_export",
        "labels": {"name": ["spam"], "value": [0.0]},
    }
    return (
        {
            "message_id": message_id,
            "parent_id": parent_id,
            "message_tree_id": message_id[0],
            "role": role,
        }
        | fields
        | other
    )


# Depth-first, as on the hub. In a: ab is ranked second, ac first, ad not at all. The best, ac, has follow-ups: two that are answered (ace, acf),
# one that is not (acg), and one that is deleted although it is answered (ach).
ROWS = [
    row("a"),
    row("ab", "a", rank=1),
    row("abx", "ab"),
    row("abxy", "abx", rank=0),
    row("ad", "a"),
    row("ac", "a", rank=0),
    row("ace", "ac", rank=0),
    row("acek", "ace"),  # none is ranked: the first is taken
    row("acel", "ace"),
    row("acf", "ac"),
    row("acfm", "acf", rank=0, deleted=True),
    row("acfn", "acf"),
    row("acfo", "acf", rank=2),
    row("acfop", "acfo"),  # nobody answered: acfo is the last
    row("acg", "ac"),
    row("ach", "ac", deleted=True),
    row("achq", "ach"),
    row("b", lang="de"),
    row("bc", "b", lang="de", rank=1),
    row("bd", "b", lang="en", rank=0),  # a tree's language is its first prompt's
    row("c"),  # without an answer
    row("d", deleted=True),
    row("de", "d"),
    row("f"),
    row("fg", "f", deleted=True),
    row("h"),
    row("hi", "h"),
]
ENGLISH = [["A", "AC", "ACE", "ACEK"], ["A", "AC", "ACF", "ACFO"], ["H", "HI"]]
GERMAN = ["B", "BD"]


def rows_of(*records):
    return [(f"x:{i}", record) for i, record in enumerate(records, 1)]


def texts_of(records):
    return [[message["content"] for message in record["messages"]] for _, record in records]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return f"file://{path}?tree=oasst"


def test_the_best_reply_and_every_follow_up_are_taken():
    found = list(conversations(rows_of(*ROWS)))
    assert texts_of(found) == [*ENGLISH[:2], GERMAN, ENGLISH[2]]
    for where, record in found:
        conversation = parse_conversation(record, where)
        assert [message.role for message in conversation.messages] == ["user", "assistant"] * (
            len(conversation.messages) // 2
        )
        last = conversation.messages[-1].content.lower()
        assert where == f"x:{1 + [each['message_id'] for each in ROWS].index(last)}"


def test_trees_of_other_languages_are_passed_over():
    assert texts_of(conversations(rows_of(*ROWS), "en")) == ENGLISH
    assert texts_of(conversations(rows_of(*ROWS), "de")) == [GERMAN]
    assert texts_of(conversations(rows_of(row("a", lang=None), row("ab", "a")), "en")) == []
    assert list(conversations([], "en")) == []


@pytest.mark.parametrize(
    ("rows", "complaint", "kept"),
    [
        (
            [row("a"), row("ab", "a"), row("acd", "ac")],
            "x:3: message 'acd' replies to 'ac', which has not come in its tree",
            [["A", "AB"]],
        ),
        (
            [row("ab", "a"), row("a")],
            "x:1: message 'ab' replies to 'a', which has not come in its tree",
            [],
        ),
        (
            [row("a"), row("ab", "a"), row("b"), row("bc", "a")],
            "x:4: .* which has not come in its tree",
            [["A", "AB"]],
        ),
        (
            [row("a"), row("b"), row("ab", "a")],
            "x:3: tree 'a' comes back after another: sort the rows",
            [],
        ),
        (
            [row("a"), row("ab", "a"), row("b"), row("ac", "a"), row("bc", "b")],
            "x:4: tree 'a' comes back",
            [["A", "AB"], ["B", "BC"]],
        ),
        (
            [row("a"), row("ab", "a"), row("ab", "a", text="again")],
            "x:3: message 'ab' comes a second time",
            [["A", "AB"]],
        ),
        (
            [row("a"), row("ab", "a"), row("acd")],
            "x:3: message 'acd' has no parent_id, and does not begin its tree",
            [["A", "AB"]],
        ),
        (
            [row("a"), row("ab", "a", role="prompter")],
            "x:2: role 'prompter', where assistant is expected",
            [],
        ),
        (
            [row("a"), row("ab", "a", role="bot"), row("ac", "a")],
            "x:2: role 'bot', where assistant is expected",
            [["A", "AC"]],
        ),
        ([row("a", role="assistant")], "x:1: role 'assistant', where prompter is expected", []),
        (
            [row("a"), row("ab", "a", text=None)],
            "x:2: `text` is missing: .* leave it out for rows that are conversations",
            [],
        ),
        ([row("a"), row("ab", "a", rank=0.0)], "x:2: `rank` is of type float, not int", []),
        ([row("a"), row("ab", "a", deleted="no")], "x:2: `deleted` is of type str, not bool", []),
        ([{"messages": []}], "x:1: `message_id` is missing", []),
        (
            [row("a"), BadInput("x:2: malformed JSON"), row("ab", "a")],
            "x:2: malformed JSON",
            [["A", "AB"]],
        ),
    ],
)
def test_a_row_without_a_place_in_its_tree_is_named_and_left_out(rows, complaint, kept):
    found = list(conversations(rows_of(*rows)))
    assert texts_of(each for each in found if not isinstance(each[1], BadInput)) == kept
    ((where, mistake),) = [each for each in found if isinstance(each[1], BadInput)]
    with pytest.raises(BadInput, match=complaint):
        raise mistake
    assert str(mistake).startswith(f"{where}: ") and "\n" not in str(mistake)


def test_a_tree_is_given_before_the_one_after_the_next_is_read():
    def endless():
        for number in range(10**9):
            read.append(number)
            yield f"x:{2 * number}", row("a") | {"message_tree_id": str(number)}
            yield f"x:{2 * number + 1}", row("ab", "a") | {"message_tree_id": str(number)}

    read = []
    found = conversations(endless())
    assert [next(found)[0] for _ in range(3)] == ["x:1", "x:3", "x:5"] and read == [0, 1, 2, 3]


def test_a_long_conversation_is_no_problem():
    rows = [
        row(f"a{i}", f"a{i - 1}" if i else None, role=("prompter", "assistant")[i % 2])
        for i in range(4000)
    ]
    ((_, record),) = conversations(rows_of(*rows))
    assert len(record["messages"]) == 4000


def test_jsonl_parquet_and_the_hubs_layout_give_the_same(tmp_path):
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    half = 9  # a tree goes on in the next file
    for shard, part in enumerate((ROWS[:half], ROWS[half:])):
        table = pa.Table.from_pylist(part)
        table = table.set_column(
            table.column_names.index("rank"), "rank", table["rank"].cast(pa.int32())
        )
        pa.parquet.write_table(table, folder / f"train-{shard:05d}-of-00002.parquet")
    pa.parquet.write_table(
        pa.Table.from_pylist(ROWS[-2:]), folder / "validation-00000-of-00001.parquet"
    )
    without_nulls = [
        {key: value for key, value in each.items() if value is not None} for each in ROWS
    ]
    write_jsonl(tmp_path / "messages.jsonl", without_nulls)
    (tmp_path / "hub" / "messages.jsonl.gz").write_bytes(
        gzip.compress((tmp_path / "messages.jsonl").read_bytes())
    )
    hub = f"hf://{tmp_path}/hub"
    urls = [
        f"{hub}?split=train",
        f"file://{folder}/train-*.parquet?text=text",
        f"file://{tmp_path}/messages.jsonl?text=text",
    ]
    for url in urls:
        read = list(read_rows(f"{url}&tree=oasst&lang=en", parse_conversation, on_bad=None))
        assert [[message.content for message in each.messages] for each in read] == ENGLISH
    assert [
        each.where
        for each in read_rows(f"{urls[0]}&tree=oasst&lang=de", parse_conversation, on_bad=None)
    ] == [f"{hub}/train/1:11"]
    assert [
        each.where
        for each in read_rows(f"{hub}?split=validation&tree=oasst", parse_conversation, on_bad=None)
    ] == [f"{hub}/validation/0:2"]
    assert len(list(read_records(f"{urls[1]}&tree=oasst", columns=["text"]))) == 4


def test_strict_reading_stops_at_a_bad_row_and_other_reading_goes_on(tmp_path):
    url = write_jsonl(
        tmp_path / "a.jsonl", [row("a"), row("ab", "a"), row("b"), row("acd", "ac"), row("bc", "b")]
    )
    bad = []
    read = list(
        read_rows(
            url, parse_conversation, on_bad=lambda where, mistake: bad.append((where, str(mistake)))
        )
    )
    assert [each.where for each in read] == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:5"]
    assert [where for where, _ in bad] == [
        f"{tmp_path}/a.jsonl:4"
    ] and "tree 'a' comes back" in bad[0][1]
    with pytest.raises(BadInput, match=r"a.jsonl:4: tree 'a' comes back"):
        list(read_records(url))


def test_what_the_options_do_not_know(tmp_path):
    url = write_jsonl(tmp_path / "a.jsonl", ROWS).removesuffix("?tree=oasst")
    for options, complaint in (
        ("?tree=threads", "tree=threads is unknown: there is only oasst"),
        ("?lang=en", "lang selects trees: add &tree=oasst"),
    ):
        with pytest.raises(BadInput, match=complaint):
            next(read_records(url + options))
    with pytest.raises(BadInput, match="2 ranks would split its trees"):
        next(read_records(f"{url}?tree=oasst", 0, 2))
    with pytest.raises(BadInput, match="unknown option 'tree'"):
        next(read_records("tfds://oasst?tree=oasst"))
    with pytest.raises(BadInput, match="no field 'text': choose one of messages"):
        next(read_documents(f"{url}?tree=oasst", 0, 1))
