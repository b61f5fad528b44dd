import collections
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys

import jsonschema
import pytest

from nanollama_jax.chat.conversations import parse_conversation
from nanollama_jax.corpus.sources import read_records
from nanollama_jax.errors import BadInput
from nanollama_jax.synthetic import tool_conversations, tools

ROWS = 2000
# Of the first 500 rows of either split, on any Python: print(digest()) after a change that was meant to change them.
DIGEST = "c8440ec0ee6eb264e9a70d515f1f3adc6b4be45fd84127a27c1fb9ec1dad54ba"
SCRIPT = "from tests.synthetic.test_tool_conversations import digest; print(digest())"


def expected_calls(row):
    """(name, arguments) of each call of the row's first message that calls; none where no message does."""
    calling = next(
        (message["tool_calls"] for message in row["messages"] if "tool_calls" in message), []
    )
    return [(call["name"], call["arguments"]) for call in calling]


def digest() -> str:
    rows = [
        tool_conversations.conversations(split, index)
        for split in ("train", "test")
        for index in range(500)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return {
        split: [tool_conversations.conversations(split, index) for index in range(ROWS)]
        for split in ("train", "test")
    }


@pytest.fixture(scope="module")
def rows(splits) -> list[dict]:
    return [*splits["train"], *splits["test"]]


def called(row: dict) -> list[tuple[str, dict, str]]:
    """Name and arguments of every call, with the result that the row has for it."""
    calls = [
        (call["name"], call["arguments"])
        for message in row["messages"]
        for call in message.get("tool_calls", ())
    ]
    results = [message["content"] for message in row["messages"] if message["role"] == "tool"]
    return [(*call, result) for call, result in zip(calls, results, strict=True)]


def templates(split: str) -> list[str]:
    asked = [each.requests[split] for each in (*tools.TOOLS.values(), *tool_conversations.CHAINS)]
    asked += [tool.missing.requests[split] for tool in tools.TOOLS.values() if tool.missing]
    return [
        template
        for each in (
            *asked,
            tool_conversations.JOINED[split],
            tool_conversations.OUT_OF_REACH[split],
        )
        for template in each
    ]


def test_every_row_is_a_conversation_with_one_to_four_tools(rows):
    for row in rows:
        conversation = parse_conversation(row, "row")
        assert (
            len(conversation.messages) == len(row["messages"])
            and list(conversation.tools) == row["tools"]
        )
    assert {len(row["tools"]) for row in rows} == {1, 2, 3, 4}


def test_calls_fit_their_schemas_and_give_the_results_that_follow(rows):
    seen = set()
    schemas = {tool["name"]: tool["parameters"] for row in rows for tool in row["tools"]}
    validators = {
        name: jsonschema.Draft202012Validator(schema | {"additionalProperties": False})
        for name, schema in schemas.items()
    }
    for row in rows:
        assert all(tool["parameters"] == schemas[tool["name"]] for tool in row["tools"])
        for name, arguments, result in called(row):
            assert name in {tool["name"] for tool in row["tools"]}
            validators[name].validate(arguments)
            assert list(arguments) == list(schemas[name]["properties"])  # as a grammar writes them
            assert json.dumps(tools.execute(name, arguments)) == result
            seen.add(name)
    assert seen == set(tools.TOOLS)


def test_answers_have_the_computed_values(rows):
    for row in rows:
        results = [json.loads(result) for _, _, result in called(row)]
        for value in itertools.chain(
            *(result.values() for result in (results[-1:] if row["kind"] == "chain" else results))
        ):
            assert re.search(
                rf"(?<![\d.]){re.escape(str(value))}(?!\d)", row["messages"][-1]["content"]
            ), row


def test_kinds_have_their_shares_and_their_form(splits):
    forms = {
        "call": ["user", "assistant", "tool", "assistant"],
        "parallel": ["user", "assistant", "tool", "tool", "assistant"],
        "chain": ["user", "assistant", "tool", "assistant", "tool", "assistant"],
        "missing": ["user", "assistant", "user", "assistant", "tool", "assistant"],
        "none": ["user", "assistant"],
    }
    for rows in splits.values():
        for kind, count in collections.Counter(row["kind"] for row in rows).items():
            assert (
                0.8
                < count
                / ROWS
                / (tool_conversations.KINDS[kind] / sum(tool_conversations.KINDS.values()))
                < 1.2
            ), (kind, count)
        for row in rows:
            assert [message["role"] for message in row["messages"]] == forms[row["kind"]]
            assert len(expected_calls(row)) == {"parallel": 2, "none": 0}.get(row["kind"], 1)
    assert set(forms) == set(tool_conversations.KINDS)


def test_the_second_call_of_a_chain_needs_the_first(rows):
    for row in rows:
        if row["kind"] == "chain":
            (_, _, result), (_, arguments, _) = called(row)
            assert set(json.loads(result).values()) & set(arguments.values())


def test_what_is_missing_is_in_the_reply_alone(rows):
    for name, tool in tools.TOOLS.items():
        for template in itertools.chain(*tool.missing.requests.values()) if tool.missing else ():
            named = set(re.findall(r"\{(\w+)\}", template))
            assert tool.missing.argument not in named and named <= set(tool.properties), (
                name,
                template,
            )
    for row in rows:
        if row["kind"] == "missing":
            ((name, arguments),) = expected_calls(row)
            assert (
                str(arguments[tools.TOOLS[name].missing.argument]) in row["messages"][2]["content"]
            )


def test_where_no_tool_is_called_none_that_is_offered_fits(rows):
    patterns = collections.defaultdict(list)
    for name, tool in tools.TOOLS.items():
        for template in itertools.chain(*tool.requests.values()):
            pattern = re.escape(template).replace(r"\{sign\}", "(plus|minus|times|divided by)")
            for argument, schema in tool.properties.items():
                values = (
                    r"\S"
                    if argument == "letter"
                    else r"\S+"
                    if schema["type"] == "string"
                    else r"\d+"
                )
                pattern = pattern.replace(rf"\{{{argument}\}}", values)
            patterns[name].append(pattern)

    def asks_for(name: str, row: dict) -> bool:
        return any(
            re.fullmatch(pattern, row["messages"][0]["content"]) for pattern in patterns[name]
        )

    kinds = collections.defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    assert all(
        asks_for(expected_calls(row)[0][0], row) for row in kinds["call"]
    )  # the patterns find what there is
    assert not [
        row for row in kinds["none"] if any(asks_for(tool["name"], row) for tool in row["tools"])
    ]
    assert all(
        row["messages"][-1]["content"].startswith("None of my tools can ") for row in kinds["none"]
    )


def test_no_request_and_no_call_of_test_is_in_train(splits):
    asked = {
        split: {row["messages"][0]["content"] for row in rows} for split, rows in splits.items()
    }
    asked["train"] |= {
        tool_conversations.conversations("train", index)["messages"][0]["content"]
        for index in range(ROWS, 10_000)
    }
    assert not asked["train"] & asked["test"] and len(asked["test"]) > ROWS / 2
    calls = {
        split: {json.dumps(call) for row in rows for call in expected_calls(row)}
        for split, rows in splits.items()
    }
    assert not calls["train"] & calls["test"] and len(calls["test"]) > ROWS / 3


def test_held_out_requests_are_other_arrangements_of_known_words():
    words = {
        split: set(re.findall("[a-z]+", re.sub(r"\{\w+\}", "", " ".join(templates(split))).lower()))
        for split in ("train", "test")
    }
    assert words["test"] <= words["train"]
    assert not set(templates("test")) & set(templates("train"))
    assert all(
        each.requests[split]
        for each in (*tools.TOOLS.values(), *tool_conversations.CHAINS)
        for split in ("train", "test")
    )


def test_transcripts_are_plain_text_of_other_conversations(splits):
    texts = [record["text"] for _, record in read_records("builtin://transcripts?rows=200", 0, 1)]
    asked = {
        message["content"]
        for row in splits["test"]
        for message in row["messages"]
        if message["role"] == "user"
    }
    for text in texts:
        tools_, said = text.split("\nUser: ", 1)
        assert all(
            {"name", "description", "parameters"} == json.loads(line).keys()
            for line in tools_.split("\n")
        )
        assert said.split("\n")[0] not in asked and "<|" not in text and "Assistant: " in said
    assert len(set(texts)) == 200 and sum("\nTool: {" in text for text in texts) > 100
    assert not {text.split("\nUser: ", 1)[1] for text in texts} & {
        row["messages"][0]["content"] for row in splits["train"]
    }


def test_rows_are_short_enough_for_a_small_model(rows):
    def characters(row: dict) -> int:
        said = sum(
            len(message["role"] + message.get("thought", "") + message.get("content", ""))
            for message in row["messages"]
        )
        return (
            said
            + len(json.dumps(row["tools"]))
            + sum(len(json.dumps(call)) for call in expected_calls(row))
        )

    sizes = [characters(row) for row in rows]
    print(f"characters a row: mean {sum(sizes) / len(sizes):.0f}, longest {max(sizes)}")
    assert sum(sizes) / len(sizes) < 900 and max(sizes) < 2000


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


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("calculate", {"operation": "divide", "a": 7, "b": 2}, {"result": 3.5}),
        ("calculate", {"operation": "subtract", "a": 2, "b": 2.5}, {"result": -0.5}),
        ("convert_units", {"value": 93, "from_unit": "m", "to_unit": "km"}, {"result": 0.093}),
        ("convert_units", {"value": 2, "from_unit": "days", "to_unit": "hours"}, {"result": 48}),
        (
            "convert_time",
            {"time": "09:30", "from_city": "Tokyo", "to_city": "Lima"},
            {"result": "19:30"},
        ),
        ("add_days", {"date": "2024-02-28", "days": 2}, {"result": "2024-03-01"}),
        ("days_between", {"start": "2024-12-30", "end": "2025-01-02"}, {"days": 3}),
        ("count_letter", {"word": "banana", "letter": "a"}, {"count": 3}),
    ],
)
def test_tools_compute(name, arguments, result):
    assert tools.execute(name, arguments) == result


def test_the_world_is_one_world():
    there = tools.execute("get_distance", {"from_city": "Oslo", "to_city": "Lima"})
    assert tools.execute("get_distance", {"from_city": "Lima", "to_city": "Oslo"}) == there
    assert (
        len(
            {
                tools.execute("get_price", {"item": item, "city": city})["price"]
                for item in tools.ITEMS
                for city in tools.CITIES
            }
        )
        == 59
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("fly", {}, "no tool 'fly'"),
        ("get_population", {}, "takes city, not nothing"),
        ("get_population", {"city": "Oslo", "date": "2024-02-28"}, "takes city, not city, date"),
        ("get_population", {"city": 3}, "`city` is 3, not of type string"),
        ("get_population", {"city": "Atlantis"}, "Atlantis is unknown"),
        ("get_weather", {"city": "Oslo", "date": "someday"}, "Invalid isoformat"),
        ("add_days", {"date": "2024-02-28", "days": True}, "`days` is True, not of type integer"),
        ("add_days", {"date": "2024-02-30", "days": 1}, "cannot take"),
        (
            "convert_units",
            {"value": 1, "from_unit": "pounds", "to_unit": "kg"},
            "give one of g, kg",
        ),
        (
            "convert_units",
            {"value": 1, "from_unit": "m", "to_unit": "kg"},
            "m is a length, kg a mass",
        ),
        ("calculate", {"operation": "divide", "a": 1, "b": 0}, "division by zero"),
    ],
)
def test_a_call_that_cannot_be_run_is_refused(name, arguments, message):
    with pytest.raises(BadInput, match=message):
        tools.execute(name, arguments)
