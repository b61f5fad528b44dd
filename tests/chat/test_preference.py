import collections
import json
import re
import subprocess
import sys

import pytest

from nanollama_jax.chat.conversations import Conversation, Message
from nanollama_jax.chat.preference import Preference, parse_preference, parse_row
from nanollama_jax.commands.check_finetuning_data import kind_of_mistake
from nanollama_jax.corpus.rows import check, read_rows
from nanollama_jax.errors import BadInput
from tests.chat.test_conversations import (
    ADD,
    ANSWER,
    CALLED,
    RESULT,
    SYSTEM,
    TOOL_USE,
    USER,
    mistake,
)
from tests.conftest import ROOT

WRONG = {"role": "assistant", "content": "5"}
PAIR = Preference(
    "x:1", (Message("user", "2 + 2?"),), (Message("assistant", "4"),), (Message("assistant", "5"),)
)
TEXTS = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
HH = {
    "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
    "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5",
}


@pytest.mark.parametrize(
    "record",
    [
        TEXTS,
        {"messages": [USER], "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]},
        {"prompt": "2 + 2?", "chosen": [ANSWER], "rejected": "5"},
        {
            "prompt": [{"from": "human", "value": "2 + 2?"}],
            "chosen": [{"from": "gpt", "value": "4"}],
            "rejected": [WRONG],
        },
        {"chosen": [USER, ANSWER], "rejected": [USER, WRONG]},
        # UltraFeedback-binarized
        {
            "prompt": "2 + 2?",
            "prompt_id": "a",
            "chosen": [USER, ANSWER],
            "rejected": [USER, WRONG],
            "messages": [USER, ANSWER],
            "score_chosen": 8.0,
        },
        HH,
        {"prompt": "\n\nHuman: 2 + 2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"},
        {"prompt": "2 + 2?", "messages": None, **HH},
        # transcripts as copies of hh-rlhf write them
        {key: text.lstrip() for key, text in HH.items()},
        {key: text.replace("\n", "\r\n") for key, text in HH.items()},
        {"prompt": "Human: 2 + 2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"},
        {"prompt": "Human: 2 + 2?\r\n\r\nAssistant: ", "chosen": "4", "rejected": [WRONG]},
        {"prompt": "\n\nHuman: 2 + 2?", "chosen": [ANSWER], "rejected": [WRONG]},
        {"prompt": "\n\nHuman: 2 + 2?\n\nAssistant:", **HH},
        {
            "prompt": [{"from": "human", "value": "2 + 2? "}],
            "chosen": [USER, ANSWER],
            "rejected": [USER, WRONG],
        },
        {"prompt": "", "chosen": [USER, ANSWER], "rejected": [USER, WRONG]},
    ],
)
def test_every_format_gives_the_same_pair(record):
    assert parse_preference(record, "x:1") == PAIR == parse_row(record, "x:1")


def test_the_prompt_is_all_that_they_begin_with_alike():
    beginning = "\n\nHuman: Hello?\n\nAssistant: Hello.\n\nHuman: 2 + 2?\n\nAssistant:"
    found = parse_preference(
        {"chosen": f"{beginning} 4\n\nas always", "rejected": f"{beginning} 5"}, "x:1"
    )
    assert found.prompt == (
        Message("user", "Hello?"),
        Message("assistant", "Hello."),
        Message("user", "2 + 2?"),
    )
    assert (found.chosen, found.rejected) == (
        (Message("assistant", "4\n\nas always"),),
        (Message("assistant", "5"),),
    )
    # In some of hh-rlhf's rows the conversations part before the last turn.
    found = parse_preference(
        {
            "chosen": HH["chosen"] + "\n\nHuman: Sure?\n\nAssistant: Yes.",
            "rejected": HH["rejected"],
        },
        "x:1",
    )
    assert found.prompt == PAIR.prompt and found.rejected == PAIR.rejected
    assert found.chosen == (
        Message("assistant", "4"),
        Message("user", "Sure?"),
        Message("assistant", "Yes."),
    )


def test_a_prompt_beside_whole_conversations_is_their_beginning_or_their_last_question():
    turns = [SYSTEM, USER, ANSWER, USER | {"content": "Sure?"}]
    lists = {"chosen": [*turns, ANSWER], "rejected": [*turns, WRONG]}
    for prompt in (turns, turns[:2], turns[:1], "Sure?", [turns[-1]]):
        assert parse_preference({"prompt": prompt, **lists}, "x:1") == parse_preference(
            lists, "x:1"
        )
    for prompt in (
        "OTHER",
        "2 + 2?",
        turns[1:],
        [SYSTEM, turns[-1]],
        [SYSTEM | {"content": "Be long."}, USER],
        4,
        [*turns, ANSWER],
    ):
        said = mistake({"prompt": prompt, **lists}, parse_preference)
        assert (
            "`: the prompt is neither the beginning of the conversation nor its last user message: make it so, or remove it"
            in said
        )
    for contradiction in ({"prompt": "OTHER"}, {"messages": [SYSTEM, USER]}):
        assert "`chosen`: the prompt is neither the beginning" in mistake(
            contradiction | HH, parse_preference
        )


def test_a_system_prompt_beside_a_pair():
    assert parse_preference(TEXTS | {"system": "Be brief."}, "x:1").prompt == (
        Message("system", "Be brief."),
        *PAIR.prompt,
    )
    assert "`chosen`: `system` stands beside" in mistake(
        TEXTS | {"prompt": [SYSTEM, USER], "system": "Be brief."}, parse_preference
    )


def test_a_transcript_goes_on_in_the_answer():
    answers = {
        key: HH[key].partition("Assistant:")[2] + "\n\nHuman: Sure?\n\nAssistant: Yes."
        for key in HH
    }
    found = parse_preference({"prompt": "Human: 2 + 2?\n\nAssistant:", **answers}, "x:1")
    assert found.prompt == PAIR.prompt and found.chosen == (
        Message("assistant", "4"),
        Message("user", "Sure?"),
        Message("assistant", "Yes."),
    )


def test_thoughts_and_tool_calls():
    found = parse_preference(
        {
            "messages": [USER],
            "chosen": [CALLED, RESULT, ANSWER],
            "rejected": [ANSWER | {"thought": "Easy."}],
            "tools": [ADD],
        },
        "x:1",
    )
    assert found.chosen == parse_row(TOOL_USE, "x:1").messages[1:] and found.tools == (ADD,)
    assert found.rejected == (Message("assistant", "4", "Easy."),)


def bad(**fields) -> str:
    return mistake(TEXTS | fields, parse_preference)


def test_what_is_not_trained_on_is_context_in_pairs_too():
    trained = [USER, ANSWER, USER]
    turns = [USER, ANSWER | {"train": False}, USER]
    for side in ("chosen", "rejected"):
        record = {"chosen": [*turns, ANSWER], "rejected": [*turns, WRONG]}
        expected = parse_preference(record, "x:1")
        assert parse_preference(record | {side: [*trained, record[side][-1]]}, "x:1") == expected
        record[side][-1] = record[side][-1] | {"weight": 0}
        record[side][1] = ANSWER
        said = mistake(record, parse_preference)
        assert f"`{side}`: its answer is not to be trained on: remove the row" in said
    calls = [CALLED | {"train": 0}, RESULT, ANSWER]
    found = parse_preference(TEXTS | {"chosen": calls, "tools": [ADD]}, "x:1").chosen
    assert [each.learned for each in found if each.role == "assistant"] == [False, True]


SCORES = [
    ("score_chosen", "score_rejected"),  # UltraFeedback, binarized
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),  # Argilla's
    ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("reward_chosen", "reward_rejected"),
    ("chosenScore", "rejectedScore"),
]


@pytest.mark.parametrize(("chosen", "rejected"), SCORES)
def test_scores_must_agree_with_the_labels(chosen, rejected):
    for better, worse in ((8, 7), (8.0, -1.5), (1e-9, 0), (None, 9), (9, None)):
        assert parse_preference(TEXTS | {chosen: better, rejected: worse}, "x:1") == PAIR
    assert parse_preference(TEXTS | {chosen: 1}, "x:1") == PAIR, "nothing to compare it with"
    said = bad(**{chosen: 3, rejected: 7.5})
    assert f"`{chosen}` is 3 and `{rejected}` is 7.5, which contradicts the labels: correct" in said
    for tie in (0, 5.0):
        assert f"`{rejected}` is {tie}, which is a tie" in bad(**{chosen: tie, rejected: tie})
    for value in (float("nan"), float("inf"), "8", True, [8], {"helpful": 3}):
        for key, other in ((chosen, rejected), (rejected, chosen)):
            assert f"`{key}` is {value!r}, not a finite number" in bad(**{key: value, other: 5})


def test_margins_ranks_and_what_is_no_score():
    for key in ("margin", "score_diff", "reward_margin"):
        assert parse_preference(TEXTS | {key: 0.5}, "x:1") == PAIR
        assert f"`{key}` is 0, which is a tie" in bad(**{key: 0})
        assert f"`{key}` is -2, which contradicts the labels" in bad(**{key: -2})
        assert f"`{key}` is 'large', not a finite number" in bad(**{key: "large"})
    ranked = TEXTS | {"chosen_rank": 1, "rejected_rank": 4}
    assert parse_preference(ranked, "x:1") == PAIR, "the first is the best"
    assert "contradicts the labels" in bad(rank_chosen=4, rank_rejected=1)
    others = {"chosen-model": "a", "chosen_generating_model": "b", "score": "good"}
    others |= {"chosen_length": 9, "rejected_length": 10}
    assert parse_preference(TEXTS | others, "x:1") == PAIR
    assert "`chosen` equals" in bad(rejected="4", score_chosen=8, score_rejected=7)


def test_a_row_is_told_by_its_keys():
    assert isinstance(parse_row(TOOL_USE | {"chosen": None, "rejected": None}, "x:1"), Conversation)
    assert isinstance(parse_row(TEXTS | {"question": "a", "answer": "b"}, "x:1"), Preference)
    assert "unknown format, with keys ['text']" in mistake({"text": "a"}, parse_row)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ([], "the row is of type list, not an object"),
        (
            {"messages": [USER, ANSWER]},
            "no preference, with keys ['messages']: known are `prompt` or `messages` with `chosen` and `rejected`",
        ),
        (
            TEXTS | {"rejected": None},
            "`rejected`: it is missing, empty, or neither a string nor a list of messages: fill it in",
        ),
        (TEXTS | {"chosen": " "}, "`chosen`: it is missing, empty, "),
        (TEXTS | {"chosen": []}, "`chosen`: it is missing, empty, "),
        (
            TEXTS | {"chosen": {"role": "assistant", "content": "4"}},
            "`chosen`: it is missing, empty, or neither a string nor a list",
        ),
        (
            TEXTS | {"rejected": "4"},
            "`chosen` equals `rejected`: there is nothing to prefer, remove the row",
        ),
        (
            TEXTS | {"prompt": None},
            "`chosen`: there is no prompt to this answer: add `prompt` or `messages`",
        ),
        (TEXTS | {"prompt": ""}, "`chosen`: message 1: `content` is empty"),
        (TEXTS | {"prompt": 4}, "`chosen`: message 1: `content` is of type int"),
        (TEXTS | {"prompt": []}, "`chosen`: message 1: assistant after start"),
        (TEXTS | {"prompt": [USER, ANSWER]}, "`chosen`: message 3: assistant after assistant"),
        (TEXTS | {"chosen": ["4"]}, "`chosen`: message 1 is of type str, not an object"),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER | {"content": "3 + 2?"}, WRONG]},
            "the prompts of `chosen` and `rejected` differ, at message 1",
        ),
        (
            {"chosen": HH["chosen"], "rejected": HH["rejected"].replace("2?", "3?")},
            "the prompts of `chosen` and `rejected` differ, at message 1",
        ),
        (
            {
                side: [
                    {"from": "system", "value": f"<tools>[{{'name': '{side}'}}]</tools>"},
                    USER,
                    answer,
                ]
                for side, answer in (("chosen", ANSWER), ("rejected", WRONG))
            },
            "the prompts of `chosen` and `rejected` differ, at message 2 or in their tools",
        ),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER, WRONG]},
            "one of `chosen` and `rejected` is the beginning of the other",
        ),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER]},
            "`rejected`: no message is the assistant's",
        ),
        (
            {"chosen": HH["chosen"], "rejected": HH["rejected"][:-2]},
            "`rejected`: message 2: `content` is empty",
        ),
        (
            {"chosen": HH["chosen"] + "\n\nHuman: Sure?", "rejected": HH["rejected"]},
            "`chosen`: the last message is of role user",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": HH["rejected"]},
            "`chosen`: message 2: user after user",
        ),
        (
            TEXTS | {"chosen": [CALLED]},
            "`chosen`: message 2: a tool call of 'add', which is not among the tools []",
        ),
        (TEXTS | {"tools": "add"}, "`tools` is not JSON"),
        (
            TEXTS | {"functions": [ADD]},
            "`functions` is not read, and would change what is learned: write it as `tools`",
        ),
        (
            TEXTS | {"chosen": [ANSWER | {"weight": 0}]},
            "`chosen`: no message of the assistant is to",
        ),
        (
            TEXTS | {"rejected": [WRONG | {"train_detail": []}]},
            "`rejected`: message 2: `train_detail`",
        ),
        (TEXTS | {"weight": 2.0}, "`weight` is 2.0 for the whole row, where every row counts 1"),
        (
            TEXTS | {"prompt": "Be kind.\n\nHuman: a"},
            "`chosen`: the prompt holds a transcript's turns but does not begin with `Human:`",
        ),
        (
            TEXTS | {"prompt": "a\r\n\r\nAssistant:"},
            "`chosen`: the prompt holds a transcript's turns but does not begin with `Human:`",
        ),
    ],
)
def test_every_mistake_is_one_line_that_names_the_place(record, says):
    assert says in mistake(record, parse_preference)


def test_mistakes_of_a_kind():
    kinds = {
        kind_of_mistake("chats.jsonl:7", text)
        for text in (
            mistake({"messages": [{"role": role, "content": "a"}]}, parse_row)
            for role in ("bing", "it's", "2", '"')
        )
    }
    assert kinds == {
        "message ...: unknown role ...: known are "
        + mistake({"messages": [{}]}, parse_row).partition("known are ")[2]
    }


@pytest.mark.parametrize(
    ("name", "rows", "equal", "empty"),
    [
        ("oasst", 212, [], []),
        ("ultrafeedback_eval", 200, [44], []),
        ("ultrafeedback_train", 1000, [307, 656, 911, 998], [479, 834]),
    ],
)
def test_real_pairs(shared_data, name, rows, equal, empty):
    path, bad = shared_data / f"preference/{name}.jsonl", {}
    found = list(
        read_rows(
            f"file://{path}",
            parse_preference,
            on_bad=lambda where, error: bad.update({int(where.rpartition(":")[2]): str(error)}),
        )
    )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == rows == len(found) + len(bad) and sorted(bad) == sorted(equal + empty)
    assert all(
        "equals" in bad[number] and lines[number - 1]["chosen"] == lines[number - 1]["rejected"]
        for number in equal
    )
    assert all(
        "empty" in bad[number]
        and "" in (lines[number - 1]["chosen"], lines[number - 1]["rejected"])
        for number in empty
    )
    for pair in found:
        record = lines[int(pair.where.rpartition(":")[2]) - 1]
        assert (pair.chosen, pair.rejected) == (
            (Message("assistant", record["chosen"]),),
            (Message("assistant", record["rejected"]),),
        )
        assert [message.content for message in pair.prompt] == (
            [m["content"] for m in record["messages"]]
            if "messages" in record
            else [record["prompt"]]
        )


def run_tool(*arguments, expect):
    result = subprocess.run(
        [sys.executable, "tools/check_finetuning_data.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == expect, result.stderr
    return result


def in_words(table: str) -> str:
    return " ".join(table.replace("│", " ").split())


def test_the_tool_on_good_rows_and_bad(tmp_path):
    (tmp_path / "chats.jsonl").write_text(
        json.dumps(TOOL_USE)
        + "\n"
        + json.dumps({"question": "a", "thought": "b", "answer": "c"})
        + "\n"
    )
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps(TEXTS) + "\n" + json.dumps(TEXTS | {"rejected": "4"}) + "\n"
    )
    (tmp_path / "[b]ad.jsonl").write_text(
        "{\n" * 30 + json.dumps({"messages": [{"role": "\u2028[red]", "content": "a"}]})
    )
    shown = run_tool(f"file://{tmp_path}/chats.jsonl", expect=0).stdout
    # file, rows, good, bad, pairs, turns, with thoughts, with tools, with calls, characters
    assert f"{tmp_path}/chats.jsonl 2 2 0 0 6 1 1 1 19" in in_words(shown)
    result = run_tool(
        f"file://{tmp_path}/chats.jsonl",
        f"file://{tmp_path}/pairs.jsonl",
        f"file://{tmp_path}/[[]b]ad.jsonl",
        expect=2,
    )
    shown = in_words(result.stdout)
    assert (
        f"{tmp_path}/pairs.jsonl 2 1 1 1 3 0 0 0 8" in shown
        and f"{tmp_path}/[b]ad.jsonl 31 0 31 0 0" in shown
    )
    lines = result.stdout.splitlines()
    assert (
        f"{tmp_path}/pairs.jsonl:2: `chosen` equals `rejected`: there is nothing to prefer, remove the row"
        in lines
    )
    assert sum(line.startswith(f"{tmp_path}/") for line in lines) == 32, "each bad row is shown"
    assert lines.index(f"{tmp_path}/[b]ad.jsonl:31: " + lines[31].partition(": ")[2]) == 31, (
        "as it comes, before the table"
    )
    assert any(re.fullmatch(r" +30  malformed JSON: .* at column \.\.\.", line) for line in lines)
    assert any(
        line.startswith("        1  message ...: unknown role ...: known are") for line in lines
    )


def test_the_tool_stops_at_the_first_bad_row_when_strict(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps(TEXTS) + "\n" + json.dumps(TEXTS | {"rejected": "4"}) + "\n{\n"
    )
    result = run_tool(f"file://{tmp_path}/a.jsonl", "--strict", expect=2)
    assert (
        result.stderr
        == f"error: {tmp_path}/a.jsonl:2: `chosen` equals `rejected`: there is nothing to prefer, remove the row\n"
    )
    assert f"{tmp_path}/a.jsonl 2 1 1 1 3" in in_words(result.stdout)


def test_the_tool_s_help_and_a_source_that_cannot_be_read(tmp_path):
    assert "nanollama check-finetuning-data file://" in run_tool("--help", expect=0).stdout
    for url, says in (
        ("chats.jsonl", "begin it with one of"),
        (f"file://{tmp_path}/absent.jsonl", "no file matches"),
    ):
        assert says in run_tool(url, expect=2).stderr
    (tmp_path / "a.jsonl").write_text(json.dumps(TEXTS) + "\n{\n")
    result = run_tool(f"file://{tmp_path}/a.jsonl", f"file://{tmp_path}/absent.jsonl", expect=2)
    assert result.stdout.startswith(
        f"{tmp_path}/a.jsonl:2: malformed JSON: "
    ) and f"{tmp_path}/a.jsonl 2 1 1 1 3" in in_words(result.stdout)
    assert (
        result.stderr == f"error: no file matches file://{tmp_path}/absent.jsonl: check the path\n"
    )


def test_what_was_read_before_a_damaged_file_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(TEXTS) + "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    files = collections.defaultdict(collections.Counter)
    with pytest.raises(BadInput, match="b.jsonl.gz cannot be read"):
        check(f"file://{tmp_path}/*", files, lambda where, error: pytest.fail(str(error)))
    assert files[f"{tmp_path}/a.jsonl"]["good"] == 1


def test_an_empty_file_is_a_mistake_also_among_others(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(TEXTS) + "\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("*", "empty"):
        result = run_tool(f"file://{tmp_path}/{name}.jsonl", expect=2)
        assert (
            result.stdout.splitlines()[0]
            == f"{tmp_path}/empty.jsonl: no rows: is it the right file?"
            and not result.stderr
        )
        assert f"{tmp_path}/empty.jsonl 0 0 0 0 0" in in_words(result.stdout)


def test_the_room_does_not_import_jax():
    code = "import sys, nanollama_jax.chat.preference; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
