import copy
import json
import re
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollama_jax.chat.conversations import (
    FORMATS,
    Conversation,
    Message,
    ToolCall,
    parse_conversation,
    parse_tools,
)
from nanollama_jax.chat.preference import parse_preference, parse_row
from nanollama_jax.corpus.rows import read_rows
from nanollama_jax.errors import BadInput

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
ADD = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "4"}
TOOL_USE = {
    "messages": [USER, CALLED, RESULT, ANSWER],
    "tools": [{"type": "function", "function": ADD}],
}
# As in NousResearch/hermes-function-calling-v1: Python's spelling of a call, and tags that are also mentioned before they are used.
HERMES = {
    "id": "753d8365",
    "conversations": [
        {
            "from": "system",
            "value": "You are a function calling AI model. You are provided with function signatures within <tools> </tools> XML tags.\n<tools>\n"
            f"[{{'type': 'function', 'function': {ADD!r}}}]\n</tools>\nFor each function call return a json object with function name and arguments "
            "within <tool_call> </tool_call> tags:\n<tool_call>\n{'arguments': <args-dict>, 'name': <function-name>}\n</tool_call>\n",
        },
        {"from": "human", "value": "2 + 2?"},
        {
            "from": "gpt",
            "value": "I add.\n<tool_call>\n{'arguments': {'a': 2, 'exact': True, 'unit': None}, 'name': 'add'}\n</tool_call>\n"
            '<tool_call>\n{"name": "add", "arguments": {"a": "it\'s"}}\n</tool_call>\n',
        },
        {
            "from": "tool",
            "value": '<tool_response>\n{"name": "add", "content": 4}\n</tool_response>\n<tool_response>\n5\n</tool_response>\n',
        },
        {"from": "gpt", "value": "4, or 5."},
    ],
    "category": "Arithmetic",
}
SHAREGPT = {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}


def chat(*turns, **fields):
    return {"messages": list(turns)} | fields


def changed(record, value, *path):
    """A copy of `record` with `value` at `path`."""
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


def mistake(record, parse=parse_conversation) -> str:
    with pytest.raises(BadInput) as error:
        parse(record, "chats.jsonl:7")
    text = str(error.value)
    assert text.startswith("chats.jsonl:7: ") and "\n" not in text and len(text) < 400, text
    return text


def messages(record) -> list[Message]:
    return list(parse_conversation(record, "x:1").messages)


def test_messages():
    system = {"role": "system", "content": "Be brief."}
    thoughtful = ANSWER | {"thought": "Two and two."}
    found = parse_conversation(
        chat(system, USER, thoughtful, USER, ANSWER, source="x"), "chats.jsonl:7"
    )
    turns = (
        Message("user", "2 + 2?"),
        Message("assistant", "4", "Two and two."),
        Message("user", "2 + 2?"),
        Message("assistant", "4"),
    )
    assert found == Conversation("chats.jsonl:7", (Message("system", "Be brief."), *turns), ())
    prompter = [
        {"role": "prompter", "content": "2 + 2?"},
        ANSWER | {"content": " 4\n", "thought": None, "tool_calls": None},
    ]
    assert messages(chat(*prompter)) == [Message("user", "2 + 2?"), Message("assistant", " 4\n")], (
        "content is kept as it is"
    )


def test_tool_calls_as_openai_writes_them():
    called, done = (
        Message("assistant", "", tool_calls=(ToolCall("add", {"a": 2}),)),
        (Message("tool", "4"), Message("assistant", "4")),
    )
    assert parse_conversation(TOOL_USE, "x:1") == Conversation(
        "x:1", (Message("user", "2 + 2?"), called, *done), (ADD,)
    )
    for tools in (
        json.dumps([ADD]),
        [ADD],
        [{"type": "function", "function": ADD | {"strict": None}}],
    ):
        assert parse_conversation(TOOL_USE | {"tools": tools}, "x:1").tools == (ADD,)
    tagged = ANSWER | {"content": '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>\n'}
    assert "message 2: `content` is a <tool_call>, which would be learned as text" in mistake(
        TOOL_USE | {"messages": [USER, tagged]}
    )
    bare = changed(TOOL_USE, [{"name": "add", "arguments": {"a": 2}}], "messages", 1, "tool_calls")
    assert parse_conversation(bare, "x:1") == parse_conversation(TOOL_USE, "x:1")
    again = [USER, CALLED, RESULT, CALLED, RESULT, ANSWER]
    assert len(messages(TOOL_USE | {"messages": again})) == 6, "an id is for one message's calls"
    blank = CALLED | {"content": "\n", "thought": " "}
    assert messages(TOOL_USE | {"messages": [USER, blank]}) == messages(
        TOOL_USE | {"messages": [USER, CALLED]}
    )
    assert messages(TOOL_USE | {"messages": [USER, CALLED]})[-1].tool_calls, (
        "a call can be the last that is learned"
    )
    assert parse_conversation(chat(USER, ANSWER, tools=[ADD]), "x:1").tools == (ADD,), (
        "nor must a tool be called"
    )
    assert parse_tools(None) == parse_tools([]) == parse_tools("") == parse_tools("[]") == ()


def test_question_and_answer_and_metamathqa():
    answered = Message("assistant", "4", "Two and two.")
    assert messages({"question": "2 + 2?", "thought": "Two and two.", "answer": "4"}) == [
        Message("user", "2 + 2?"),
        answered,
    ]
    assert messages({"question": "2 + 2?", "thought": "", "answer": "4"}) == [
        Message("user", "2 + 2?"),
        Message("assistant", "4"),
    ]
    row = {
        "query": "2 + 2?",
        "response": "4",
        "type": "GSM_Rephrased",
        "original_question": "Two and two?",
    }
    assert messages(row) == [Message("user", "2 + 2?"), Message("assistant", "4")]


def test_a_thought_at_the_beginning_of_an_answer():
    for text in ("<think>\nTwo and two.\n</think>\n\n4", " <think>Two and two.</think>4"):
        for row in (
            chat(USER, ANSWER | {"content": text}),
            {"query": "2 + 2?", "response": text},
            changed(SHAREGPT, text, "conversations", 1, "value"),
        ):
            assert messages(row)[1] == Message("assistant", "4", "Two and two.")
    assert messages(chat(USER, ANSWER | {"content": "<think></think>4"}))[1] == Message(
        "assistant", "4"
    )
    assert "`content` is empty" in mistake(chat(USER, ANSWER | {"content": "<think>So.</think>\n"}))


def test_sharegpt():
    assert messages(SHAREGPT) == messages(chat(USER, ANSWER))
    assert messages({"conversations": [USER, ANSWER]}) == messages(chat(USER, ANSWER)), (
        "the list's name does not matter"
    )
    human, gpt = SHAREGPT["conversations"]
    call, observed = (
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
    )
    row = {"conversations": [human, call, observed, gpt], "tools": json.dumps([ADD])}
    assert parse_conversation(row, "x:1") == parse_conversation(TOOL_USE, "x:1")
    call["value"] = f"[{call['value']}, {call['value']}]"
    assert messages(row)[1].tool_calls == (ToolCall("add", {"a": 2}),) * 2


def test_what_stands_beside_a_value_is_kept():
    human, gpt = SHAREGPT["conversations"]
    assert messages({"conversations": [human, gpt | {"reasoning_content": "So."}]})[1] == Message(
        "assistant", "4", "So."
    )
    calls = CALLED["tool_calls"]
    for value, thought in (("", {}), ("I add.", {"thought": "So."}), (None, {"thought": "So."})):
        said = Message(
            "assistant", value or "", thought.get("thought", ""), (ToolCall("add", {"a": 2}),)
        )
        turn = {"from": "gpt", "value": value, "tool_calls": calls} | thought
        assert messages({"conversations": [human, turn], "tools": [ADD]})[1] == said
    text = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'
    assert (
        messages(
            {"conversations": [human, gpt | {"value": text, "thought": "So."}], "tools": [ADD]}
        )[1].thought
        == "So."
    )
    both = {"conversations": [human, gpt | {"value": text, "tool_calls": calls}], "tools": [ADD]}
    assert "message 2: tool calls stand both in `value` and in `tool_calls`: keep one" in mistake(
        both
    )


def test_a_system_prompt_beside_the_messages():
    for row in (
        chat(USER, ANSWER),
        SHAREGPT,
        {"question": "2 + 2?", "answer": "4"},
        {"query": "2 + 2?", "response": "4"},
    ):
        assert messages(row | {"system": "Be brief."}) == messages(chat(SYSTEM, USER, ANSWER))
        assert messages(row | {"system": ""}) == messages(chat(USER, ANSWER))
    assert "`system` stands beside a first message of role system: keep one" in mistake(
        chat(SYSTEM, USER, ANSWER, system="Be brief.")
    )
    assert messages(HERMES | {"system": "Be brief."})[0] == Message("system", "Be brief."), (
        "Hermes's own prompt is none"
    )


def test_text_around_hermes_tools_is_kept_but_for_its_own_prompt():
    prompt = HERMES["conversations"][0]["value"]
    for text, kept in (
        (f"Be brief.\n{prompt}Be kind.", "Be brief.\n\nBe kind."),
        (f"Be brief. <tools>[{json.dumps(ADD)}]</tools>", "Be brief."),
    ):
        found = parse_conversation(changed(HERMES, text, "conversations", 0, "value"), "x:1")
        assert (found.messages[0], found.tools) == (Message("system", kept), (ADD,))


# ---- Training control


SECOND = [{"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "6"}]


def learned(record) -> list[bool]:
    return [message.learned for message in messages(record) if message.role == "assistant"]


TRAINED = ["train", "training", "trainable", "weight", "loss", "loss_weight", "loss_mask"]
QUESTIONS = ({"question": "2 + 2?", "answer": "4"}, {"query": "2 + 2?", "response": "4"})


@pytest.mark.parametrize("key", TRAINED)
def test_a_message_that_is_not_to_be_trained_on_is_context(key):
    for no, yes in ((False, True), (0, 1), (0.0, 1.0)):
        turns = [turn | {key: no} for turn in (USER, ANSWER, SECOND[0])]
        row = chat(*turns, SECOND[1] | {key: yes})
        assert learned(row) == [False, True]
        assert messages(row) == messages(chat(USER, ANSWER, *SECOND))
        assert learned(chat(USER, ANSWER, SECOND[0], SECOND[1] | {key: no})) == [True, False]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", key: False}] * 2
    assert learned({"conversations": [*turns[:3], turns[3] | {key: None}]}) == [False, True]
    assert "no message of the assistant is to be trained on" in mistake({"conversations": turns})
    call = CALLED | {key: 0}
    assert learned(TOOL_USE | {"messages": [USER, call, RESULT, ANSWER]}) == [False, True]
    for value in (0.5, 2, -1, "false", [0, 1], {}, float("nan")):
        said = mistake(chat(USER, ANSWER | {key: value}))
        assert f"message 2: `{key}` is {value!r}, which is not understood: write" in said
    said = mistake(chat(USER | {key: True}, ANSWER))
    assert f"message 1: `{key}` is True in a message of role user" in said
    for row in (chat(USER, ANSWER), SHAREGPT, *QUESTIONS):
        assert messages(row | {key: True}) == messages(chat(USER, ANSWER))
        for value in (False, 0.5, 3):
            assert f"`{key}` is {value!r} for the whole row" in mistake(row | {key: value})


@pytest.mark.parametrize(
    "key",
    ["train_detail", "mask", "masked", "loss_scale", "train_on_turn", "step_loss_mask", "weights"],
)
def test_control_that_is_not_understood_is_refused(key):
    for value in (True, 0, [{"begin_offset": 0, "end_offset": 1, "train": False}]):
        assert f"message 2: `{key}` is " in mistake(chat(USER, ANSWER | {key: value}))
        row = changed(SHAREGPT, value, "conversations", 0, key)
        assert f"message 1: `{key}` is " in mistake(row)
    assert learned(chat(USER, ANSWER | {key: None})) == [True], "as Parquet fills it"


def test_control_of_rows_and_contradictions():
    for key in ("mask_history", "train_on_inputs", "masked", "weights", "loss_mask", "mask"):
        for value in (True, 0, [0, 1])[key == "loss_mask" :]:
            said = mistake(chat(USER, ANSWER, **{key: value}))
            assert f"`{key}` is {value!r} for the whole row, where every row counts 1" in said
    assert "`sample_weight` is 2" in mistake(chat(USER, ANSWER, sample_weight=2))
    others = {"training_split": "a", "lossless": 1, "source_weight": 3}
    assert len(messages(chat(USER, ANSWER, **others))) == 2, "not about what is learned"
    said = mistake(chat(USER, ANSWER | {"train": True, "weight": 0}))
    assert "message 2: `train` and `weight` contradict each other: keep one" in said


# ---- Thoughts


def answers_of(text: str) -> list[dict]:
    """Rows of every format in which the assistant says `text`."""
    return [
        chat(USER, ANSWER | {"content": text}),
        changed(SHAREGPT, text, "conversations", 1, "value"),
        changed(QUESTIONS[0], text, "answer"),
        changed(QUESTIONS[1], text, "response"),
    ]


def test_a_thought_without_its_opening_tag():
    thought = "Two and two."
    expected = [Message("user", "2 + 2?"), Message("assistant", "4", thought)]
    for text in (
        f"{thought}\n</think>\n\n4",
        f"{thought}</think>4",
        f"\n<think>{thought}</think> 4",
    ):
        for row in answers_of(text):
            assert messages(row) == expected
    call = json.dumps({"name": "add", "arguments": {"a": 2}})
    called = f"I add.</think>\n<tool_call>{call}</tool_call>"
    row = changed(SHAREGPT, called, "conversations", 1, "value") | {"tools": [ADD]}
    assert messages(row)[1] == Message("assistant", "", "I add.", (ToolCall("add", {"a": 2}),))


@pytest.mark.parametrize("key", ["thought", "reasoning_content", "reasoning", "thinking"])
def test_a_thought_beside_the_answer(key):
    expected = [Message("user", "2 + 2?"), Message("assistant", "4", "Two and two.")]
    for row in (chat(USER, ANSWER), SHAREGPT):
        name = "messages" if "messages" in row else "conversations"
        assert messages(changed(row, "Two and two.", name, 1, key)) == expected
        said = mistake(changed(row, "a<think>b", name, 1, key))
        assert "<think> in what the assistant says" in said
    assert messages({"question": "2 + 2?", key: "Two and two.", "answer": "4"}) == expected
    both = chat(USER, ANSWER | {key: "Two and two.", "reasoning_content": "Two and two."})
    assert messages(both) == expected, "OpenRouter writes it twice"


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think>b<think>c</think>d",
        "<think>a<think>b</think>c</think>d",
        "<think>a",
        "4<think>a",
        "a</think>b</think>c",
        "It says <think>a</think>.",
        "<THINK>a</THINK>4",
        "<|begin_of_thought|>a<|end_of_thought|>4",
        "<thinking>a</thinking>4",
        "\n<reasoning>\na</reasoning>4",
        "<thought>a</thought>4",
        "[THINK]a[/THINK]4",
    ],
)
def test_other_tags_of_thoughts_are_refused(text):
    for row in answers_of(text):
        left = " in what the assistant says: a thought is read "
        begun = r"` begins with .*, which would be learned as text: write the thought as `thought`"
        assert re.search(f"{left}|{begun}", mistake(row))


def test_tags_of_thoughts_where_no_thought_is():
    text = "Why </think>?"
    for row in (
        chat(USER | {"content": text}, ANSWER),
        chat(USER, ANSWER, system=text),
        chat({"role": "system", "content": text}, USER, ANSWER),
        TOOL_USE | {"messages": [USER, CALLED, RESULT | {"content": text}, ANSWER]},
        {"question": text, "answer": "4"},
        changed(SHAREGPT, text, "conversations", 0, "value"),
    ):
        said = mistake(row)
        assert "</think> in what the " in said and "at the beginning of an answer" in said
    for text in ("1 < 2 and <thinks> nothing", "It is <reasoning>.", "think>a</thinker>"):
        found = messages(chat(USER | {"content": text}, ANSWER | {"content": text}))
        assert found == [Message("user", text), Message("assistant", text)]
    inside = '<think>a <tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call></think>4'
    row = changed(SHAREGPT, inside, "conversations", 1, "value") | {"tools": [ADD]}
    assert "message 2: a <tool_call> in a thought" in mistake(row)


def test_hermes_tools_calls_and_responses():
    calls = ToolCall("add", {"a": 2, "exact": True, "unit": None}), ToolCall("add", {"a": "it's"})
    results = Message("tool", '{"name": "add", "content": 4}'), Message("tool", "5")
    turns = (
        Message("user", "2 + 2?"),
        Message("assistant", "I add.", tool_calls=calls),
        *results,
        Message("assistant", "4, or 5."),
    )
    assert parse_conversation(HERMES, "x:1") == Conversation("x:1", turns, (ADD,))
    other = ADD | {"name": "subtract"}
    assert "not among the tools ['subtract']" in mistake(HERMES | {"tools": json.dumps([other])}), (
        "the field counts, not the text"
    )
    json_mode = changed(
        HERMES, "Answer in JSON. <schema>{}</schema>", "conversations", 0, "value"
    ) | {"tools": [ADD]}
    assert messages(json_mode)[0] == Message("system", "Answer in JSON. <schema>{}</schema>")


def test_special_tokens_in_text_are_data():
    text = "What are <|im_end|>, <|tool_call|> and <tool_call>?"
    assert messages(chat(USER | {"content": text}, ANSWER | {"content": text})) == [
        Message("user", text),
        Message("assistant", text),
    ]
    assert messages(changed(SHAREGPT, text, "conversations", 0, "value"))[0] == Message(
        "user", text
    )


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (7, "the row is of type int, not an object"),
        (None, "the row is missing, not an object"),
        ({"text": "a", "meta": None}, f"unknown format, with keys ['text']: known are {FORMATS}"),
        ({"question": "2 + 2?"}, "unknown format, with keys ['question']"),
        ({"messages": "hello"}, "the field with the messages is of type str, not a list"),
        (chat(), "no message is the assistant's"),
        (chat({"role": "system", "content": "a"}), "no message is the assistant's"),
        (chat(USER), "no message is the assistant's: there is nothing to learn, remove the row"),
        (chat(USER, ANSWER, USER), "the last message is of role user: end with the assistant's"),
        (TOOL_USE | {"messages": [USER, CALLED, RESULT]}, "the last message is of role tool"),
        (
            chat(ANSWER),
            "message 1: assistant after start, where system or user is expected: reorder",
        ),
        (chat(USER, USER, ANSWER), "message 2: user after user, where assistant is expected"),
        (
            chat(USER, ANSWER, ANSWER),
            "message 3: assistant after assistant, where user is expected",
        ),
        (chat(USER, {"role": "system", "content": "a"}, ANSWER), "message 2: system after user"),
        (
            chat(
                {"role": "system", "content": "a"}, {"role": "system", "content": "a"}, USER, ANSWER
            ),
            "message 2: system after system",
        ),
        (
            chat({"role": "system", "content": "a"}, ANSWER),
            "message 2: assistant after system, where user is expected",
        ),
        (chat(USER, RESULT, ANSWER), "message 2: tool after user"),
        (chat(USER, ANSWER, RESULT, ANSWER), "message 3: tool after assistant"),
        (
            TOOL_USE | {"messages": [USER, CALLED, USER, ANSWER]},
            "message 3: user after tool call, where tool is expected",
        ),
        (chat("hello", ANSWER), "message 1: it is of type str, not an object"),
        (chat({"content": "a"}, ANSWER), "message 1: unknown role None: known are system, "),
        (
            chat({"role": "moderator\n", "content": "a"}, ANSWER),
            "message 1: unknown role 'moderator\\n'",
        ),
        (chat({"role": ["user"], "content": "a"}, ANSWER), "message 1: unknown role ['user']"),
        (chat({"role": "user"}, ANSWER), "message 1: `content` is missing, not a string"),
        (
            chat(USER | {"content": [{"type": "text", "text": "a"}]}, ANSWER),
            "message 1: `content` is of type list, not a string",
        ),
        (
            chat(USER | {"content": " \n"}, ANSWER),
            "message 1: `content` is empty: fill it in, or remove the row",
        ),
        (chat(USER, ANSWER | {"content": ""}), "message 2: `content` is empty"),
        (
            chat(USER, ANSWER | {"content": None, "thought": "Hm."}),
            "message 2: `content` is missing",
        ),
        (chat(USER, ANSWER | {"thought": ["Hm."]}), "message 2: `thought` is of type list"),
        (
            chat(USER | {"content": "a\ud800"}, ANSWER),
            "message 1: `content` holds half a surrogate pair",
        ),
        (
            TOOL_USE | {"messages": [USER, CALLED, RESULT | {"content": ""}, ANSWER]},
            "message 3: `content` is empty",
        ),
        ({"question": "2 + 2?", "answer": 4}, "`answer` is of type int, not a string"),
        ({"question": "", "answer": "4"}, "`question` is empty"),
        ({"query": "2 + 2?", "response": ""}, "`response` is empty"),
        (changed(SHAREGPT, "bing", "conversations", 1, "from"), "message 2: unknown role 'bing'"),
        (changed(SHAREGPT, "", "conversations", 1, "value"), "message 2: `value` is empty"),
        (changed(SHAREGPT, 4, "conversations", 1, "value"), "message 2: `value` is of type int"),
        (
            changed(HERMES, "<tool_response></tool_response>", "conversations", 3, "value"),
            "message 4: `value` is empty",
        ),
        (
            changed(HERMES, "<tool_call>\n{'name': 'add'", "conversations", 2, "value"),
            "message 3: a <tool_call> without its </tool_call>",
        ),
        (
            changed(HERMES, "<tool_call>add(2)</tool_call>", "conversations", 2, "value"),
            "message 3: a tool call is not JSON: 'add(2)'",
        ),
        (
            changed(HERMES, "<tools>[{'name': }]</tools>", "conversations", 0, "value"),
            "message 1: `tools` is not JSON",
        ),
        (
            changed(TOOL_USE, "add", "messages", 1, "tool_calls"),
            "message 2: `tool_calls` is of type str, not a list",
        ),
        (
            changed(TOOL_USE, ["add"], "messages", 1, "tool_calls"),
            "message 2: a tool call is of type str, not an object",
        ),
        (
            changed(TOOL_USE, "subtract", "messages", 1, "tool_calls", 0, "function", "name"),
            "message 2: a tool call of 'subtract', which is not among",
        ),
        (
            chat(USER, CALLED, RESULT, ANSWER),
            "message 2: a tool call of 'add', which is not among the tools []: list it in `tools`",
        ),
        (
            changed(TOOL_USE, "{'a': 2", "messages", 1, "tool_calls", 0, "function", "arguments"),
            "`arguments` of a call of 'add' is not JSON: \"{'a': 2\"",
        ),
        (
            changed(TOOL_USE, "[2]", "messages", 1, "tool_calls", 0, "function", "arguments"),
            "`arguments` of a call of 'add' is of type list, not an",
        ),
        (
            changed(
                TOOL_USE, '{"a": NaN}', "messages", 1, "tool_calls", 0, "function", "arguments"
            ),
            "`arguments` of a call of 'add' is not JSON",
        ),
        (
            changed(
                TOOL_USE, {"a": "\udc00"}, "messages", 1, "tool_calls", 0, "function", "arguments"
            ),
            "`arguments` of a call of 'add' is not JSON",
        ),
        (
            changed(TOOL_USE, "[" * 10**5, "messages", 1, "tool_calls", 0, "function", "arguments"),
            "`arguments` of a call of 'add' is not JSON: '[[[",
        ),
        (TOOL_USE | {"tools": "add"}, "`tools` is not JSON: 'add'"),
        (TOOL_USE | {"tools": ADD}, "`tools` is of type dict, not a list"),
        (TOOL_USE | {"tools": ["add"]}, "tool 1: it is of type str, not an object"),
        (
            TOOL_USE | {"tools": [{"function": "add"}]},
            "tool 1: `function` is of type str, not an object",
        ),
        (
            TOOL_USE | {"tools": [ADD, {"parameters": {}}]},
            "tool 2: `name` is missing, not a string",
        ),
        (
            TOOL_USE | {"tools": [ADD | {"parameters": "a: number"}]},
            "tool 1: `parameters` is of type str, not an object",
        ),
        (TOOL_USE | {"tools": 0}, "`tools` is of type int, not a list"),
        (TOOL_USE | {"tools": False}, "`tools` is of type bool, not a list"),
        (chat(USER, ANSWER, system=7), "`system` is of type int, not a string"),
        (
            chat(USER, ANSWER, functions=[ADD]),
            "`functions` is not read, and would change what is learned: write it as `tools`, or remove it",
        ),
        (
            chat(USER, ANSWER, thoughts="Hm."),
            "`thoughts` is not read, and would change what is learned: write it as `thought`",
        ),
        ({"question": "2 + 2?", "rationale": "Hm.", "answer": "4"}, "`rationale` is not read"),
        (
            chat(USER, ANSWER | {"function_call": {"name": "add"}}),
            "message 2: `function_call` is not read, and would change what is learned: write",
        ),
        (
            chat(USER, ANSWER | {"refusal": "No."}),
            "message 2: `refusal` is not read, and would change what is learned: write it as `content`",
        ),
        (
            chat(USER, ANSWER | {"reasoning_details": [{}]}),
            "message 2: `reasoning_details` is not read",
        ),
        (
            chat(USER | {"reasoning": "Hm."}, ANSWER),
            "message 1: `reasoning` is not read, and would change what is learned: write it as the",
        ),
        (
            chat(USER, ANSWER | {"reasoning": {"a": 1}}),
            "message 2: `reasoning` is of type dict, not a",
        ),
        (
            chat(USER, ANSWER | {"thought": "Hm.", "reasoning": "So."}),
            "`thought` and `reasoning` are different thoughts: keep one",
        ),
        (TOOL_USE | {"tools": [ADD, ADD]}, "tool 2: another is named 'add': rename one"),
    ],
)
def test_every_mistake_is_one_line_that_names_the_place(record, says):
    assert says in mistake(record)


WORDS = [
    "user",
    "assistant",
    "system",
    "tool",
    "human",
    "gpt",
    "function_call",
    "observation",
    "add",
    "",
    "<think>a</think>b",
    "<tools>[{}]</tools>",
]
WORDS += [
    "<tool_call>{'name': 'add', 'arguments': {}}</tool_call>",
    "<tool_call>",
    "<tool_response>1</tool_response>",
    "[{'name': 'add'}]",
    "\ud800",
]
WORDS += ["a</think>b", "<think>", 0, 1]
WORDS += [
    "\n\nHuman: a\n\nAssistant: b",
    "\n\nHuman: a\n\nAssistant: c",
    '{"name": "add", "arguments": {}}',
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(st.characters(exclude_categories=()), max_size=5)
)
JSON = SCALARS | st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=6,
)
PAIR = {
    "prompt": "2 + 2?",
    "chosen": "4",
    "rejected": [CALLED, RESULT, {"role": "assistant", "content": "5"}],
    "tools": [ADD],
}
TRANSCRIPTS = {
    "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
    "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5",
}


def places(value, path=()):
    """The path of everything in a JSON value."""
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield path + (key,)
        yield from places(inner, path + (key,))


@st.composite
def almost_good_rows(draw):
    record = draw(
        st.sampled_from(
            [
                TOOL_USE,
                HERMES,
                SHAREGPT,
                PAIR,
                TRANSCRIPTS,
                {"question": "a", "thought": "b", "answer": "c"},
            ]
        )
    )
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(record), key=str)))
        record = changed(
            record,
            draw(JSON | st.sampled_from([TOOL_USE["messages"], HERMES["conversations"], [], {}])),
            *path,
        )
    return record


@settings(max_examples=400, deadline=None)
@given(almost_good_rows() | JSON)
def test_no_json_raises_anything_but_bad_input(record):
    for parse in (parse_conversation, parse_preference, parse_row):
        try:
            said = parse(record, "x:1").where
        except BadInput as error:
            said = str(error)
        assert said.startswith("x:1") and len(said.splitlines()) == 1


def test_brackets_as_deep_as_python_goes_and_deeper():
    said = set()
    for depth in range(sys.getrecursionlimit() // 4, sys.getrecursionlimit() + 1, 10):
        deep: dict = {}
        for _ in range(depth):
            deep = {"a": deep}
        asked = [CALLED | {"tool_calls": [{"name": "add", "arguments": deep}]}]
        said.add(
            mistake(
                {"prompt": "2 + 2?", "chosen": asked, "rejected": asked, "tools": [ADD]},
                parse_preference,
            )
        )
        said.add(mistake({"tools": [ADD | {"parameters": {"properties": deep}}]}))
    assert {text.partition(": ")[2] for text in said} == {
        "`chosen` equals `rejected`: there is nothing to prefer, remove the row",
        f"unknown format, with keys ['tools']: known are {FORMATS}",
        "it is nested too deeply: flatten it",
    }


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([USER, ANSWER, CALLED, RESULT, {"role": "system", "content": "a"}]),
        max_size=7,
    )
)
def test_what_is_accepted_is_in_order(turns):
    letters = "".join(
        {
            "user": "u",
            "system": "s",
            "tool": "t",
            "assistant": "c" if "tool_calls" in turn else "a",
        }[turn["role"]]
        for turn in turns
    )
    try:
        parse_conversation(chat(*turns, tools=[ADD]), "x:1")
        accepted = True
    except BadInput:
        accepted = False
    assert accepted == bool(re.fullmatch("s?(u(ct)*a)*u(ct)*[ac]", letters)), letters


# ---- Calls and tools


def call_of(tool, *arguments):
    """What is read of one call, written without `arguments` or with those given."""
    call = {"name": tool["name"]} | ({"arguments": arguments[0]} if arguments else {})
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": [tool]}


def read_call(*row):
    return messages(call_of(*row))[1].tool_calls[0].arguments


def test_calls_without_arguments():
    optional = ADD | {"parameters": ADD["parameters"] | {"required": []}}
    for tool in ({"name": "now"}, {"name": "now", "parameters": {}}, ADD, optional):
        for passed in ([], [None], [""], [" "], ["null"], ["{}"], [{}]):
            assert read_call(tool, *passed) == {}
    required = ADD | {"parameters": ADD["parameters"] | {"required": ["a"]}}
    for passed in ([], [None], [""], ["null"]):
        said = mistake(call_of(required, *passed))
        assert "`arguments` of a call of 'add' is missing, and ['a'] is required: give them" in said
    for text in ("{", "0", "[]", 0, False, []):
        assert "`arguments` of a call of 'add' is " in mistake(call_of(ADD, text))
    others = {"parameters": {"a": 2}, "input": {"a": 2}, "args": '{"a": 2}', "kwargs": [2]}
    for key, value in others.items():
        row = changed(call_of(ADD), value, "messages", 1, "tool_calls", 0, key)
        assert f"a call of 'add' has `{key}`, not `arguments`" in mistake(row)
    call = {"function": {"name": "add"}, "arguments": {"a": 2}}
    outside = changed(call_of(ADD), [call], "messages", 1, "tool_calls")
    assert "a call of 'add' has `arguments` outside `function`: move it" in mistake(outside)


NULLABLE = {
    "name": "find",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string"},
            "day": {"type": ["string", "null"]},
            "hour": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "where": {"type": "object", "properties": {"x": {"type": "number"}}},
        },
        "required": ["city", "day", "hour"],
    },
}


def test_nulls_in_arguments_are_the_same_from_json_and_parquet(tmp_path):
    given = [
        {"city": "Rome", "unit": None, "day": None, "hour": None, "where": {"x": None, "y": 2}},
        {"city": "Oslo", "unit": "C", "day": "today", "hour": 3, "where": {"x": 1, "y": None}},
    ]
    rows = [call_of(NULLABLE, arguments) for arguments in given]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [
        {"city": "Rome", "where": {"y": 2}, "day": None, "hour": None},
        {"city": "Oslo", "unit": "C", "day": "today", "hour": 3, "where": {"x": 1}},
    ]
    for kind in ("jsonl", "parquet"):
        read = read_rows(f"file://{tmp_path}/a.{kind}", parse_conversation, on_bad=None)
        found = [json.dumps(row.messages[1].tool_calls[0].arguments) for row in read]
        assert found == list(map(json.dumps, expected)), "the text, not only the object"
    text = '{"city": "Rome", "unit": null, "list": [null]}'
    assert read_call(NULLABLE, text) == json.loads(text), "a string is the same everywhere"


def test_where_the_parameters_of_a_tool_stand():
    schema = ADD["parameters"]
    for key in ("parameters", "input_schema", "inputSchema"):
        tool = {"name": "add", "description": "Adds.", key: schema}
        for form in (tool, {"type": "function", "function": tool}, {"type": "custom", **tool}):
            (found,) = parse_tools([form])
            assert found.items() >= ADD.items()
            assert found.keys().isdisjoint({"input_schema", "inputSchema"})
    assert parse_tools([ADD | {"inputSchema": schema, "input_schema": None}]) == (ADD,)
    now = {"name": "now", "description": "The time."}
    assert parse_tools([now]) == (now,)
    with pytest.raises(BadInput, match="tool 1: `parameters` and `inputSchema` differ: keep one"):
        parse_tools([ADD | {"inputSchema": {}}])
    for key in ("arguments", "args", "schema", "properties", "parameter_definitions", "input"):
        with pytest.raises(BadInput, match=f"tool 1: it has `{key}` but no `parameters`: write"):
            parse_tools([{"name": "add", "description": "Adds.", key: schema}])
    with pytest.raises(BadInput, match="tool 1: it has `parameters` but"):
        parse_tools([{"type": "function", "function": {"name": "add"}, "parameters": schema}])
    for flat in ({"a": {"type": "number"}}, {"a": "number"}, {"type": {"type": "string"}}):
        with pytest.raises(BadInput, match="tool 1: `parameters` is not the JSON schema of an obj"):
            parse_tools([ADD | {"parameters": flat}])
    for key, value in (("properties", ["a"]), ("required", "a"), ("required", [{"a": 1}])):
        with pytest.raises(BadInput, match=f"tool 1: .*`{key}` of `parameters` is of type"):
            parse_tools([ADD | {"parameters": schema | {key: value}}])


def results_of(ids, answered) -> list[dict]:
    calls = [{"id": each, "name": "add", "arguments": {"a": 1}} for each in ids]
    results = [{"role": "tool", "content": f"of {each}", "tool_call_id": each} for each in answered]
    called = {"role": "assistant", "tool_calls": calls}
    return TOOL_USE | {"messages": [USER, called, *results, ANSWER]}


def results_in(record) -> list[str]:
    return [message.content for message in messages(record) if message.role == "tool"]


def test_results_are_put_in_the_order_of_their_calls():
    for answered in ("abc", "cab", "bca"):
        assert results_in(results_of("abc", answered)) == ["of a", "of b", "of c"]
    assert results_in(results_of([7, 8], [8, 7])) == ["of 7", "of 8"]
    for ids, answered in (("ab", [None, None]), ([None, None], "ab"), ([None, "b"], "ba")):
        found = results_in(results_of(ids, answered))
        assert found == [f"of {each}" for each in answered], "without ids, as they come"
    for ids, answered, says in (
        ("ab", "ax", "message 4: `tool_call_id` is 'x', where one of ['b'] is due: correct"),
        ("ab", "aa", "message 4: `tool_call_id` is 'a', where one of ['b'] is due"),
        ("ab", "abb", "message 5: `tool_call_id` is 'b', where one of [] is due"),
        ("aa", "aa", "message 4: `tool_call_id` is 'a', where one of [] is due"),
        ("ab", "b", "message 4: not each of the calls ['a', 'b'] has a result"),
        ("ab", ["a", None], "message 5: not each of the calls ['a', 'b'] has a result"),
    ):
        assert says in mistake(results_of(ids, answered))
    human, gpt = SHAREGPT["conversations"]
    called = gpt | {"value": "", "tool_calls": results_of("ab", "")["messages"][1]["tool_calls"]}
    results = [{"from": "tool", "value": f"of {each}", "tool_call_id": each} for each in "ba"]
    row = {"conversations": [human, called, *results, gpt], "tools": [ADD]}
    assert results_in(row) == ["of a", "of b"]


# ---- Files


def test_files_and_what_is_bad_in_them(tmp_path):
    lines = [json.dumps(SHAREGPT), "{", "", json.dumps(chat(USER)), "[]", json.dumps(TOOL_USE)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    bad = []
    rows = list(
        read_rows(
            f"file://{tmp_path}/a.jsonl",
            parse_conversation,
            on_bad=lambda where, error: bad.append((where, str(error))),
        )
    )
    assert [row.where for row in rows] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:6"]
    assert [where.rpartition(":")[2] for where, _ in bad] == ["2", "4", "5"] and all(
        error.startswith(f"{where}: ") for where, error in bad
    )
    assert (
        "malformed JSON" in bad[0][1]
        and "nothing to learn" in bad[1][1]
        and "not a list" in bad[2][1]
    )

    def stop(where, error):
        raise error

    rows = read_rows(f"file://{tmp_path}/a.jsonl", parse_conversation, on_bad=stop)
    assert next(rows).where.endswith(":1")
    with pytest.raises(BadInput, match=r"a.jsonl:2: malformed"):
        next(rows)


def test_parquet_fills_with_nulls_what_a_row_does_not_have(tmp_path):
    rows = [TOOL_USE | {"question": None, "answer": None}, {"question": "2 + 2?", "answer": "4"}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(
        read_rows(
            f"file://{tmp_path}/a.parquet",
            parse_conversation,
            on_bad=lambda where, error: pytest.fail(str(error)),
        )
    )
    assert [row.messages for row in found] == [parse_conversation(row, "").messages for row in rows]


@pytest.mark.parametrize("hub", [False, True])
def test_nor_do_calls_learn_each_other_s_arguments(tmp_path, hub):
    """Parquet gives each object the keys of all others in its column: a call of one tool those of another's arguments, as nulls."""
    tools = [
        {"name": name, "parameters": {"type": "object", "properties": {key: {"type": "string"}}}}
        for name, key in (("add", "a"), ("sky", "city"))
    ]
    calls = [
        {"name": "add", "arguments": {"a": "1"}},
        {"name": "sky", "arguments": {"city": "Rome"}},
    ]
    rows = [
        {
            "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}],
            "tools": tools,
        }
        for call in calls
    ]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    url = f"hf://{tmp_path}" if hub else f"file://{tmp_path}/*.parquet"
    found = list(
        read_rows(url, parse_conversation, on_bad=lambda where, error: pytest.fail(str(error)))
    )
    assert [(row.messages[1].tool_calls[0].arguments, row.tools) for row in found] == [
        (call["arguments"], tuple(tools)) for call in calls
    ]


@pytest.mark.parametrize(
    ("name", "rows", "turns"),
    [("chat_oasst", 100, 284), ("math_cot_gsm8k", 4000, 8000), ("reasoning_cot_flan", 6000, 12000)],
)
def test_real_conversations(shared_data, name, rows, turns):
    url = f"file://{shared_data}/sft/{name}.jsonl"
    found = list(
        read_rows(url, parse_conversation, on_bad=lambda where, error: pytest.fail(str(error)))
    )
    assert (len(found), sum(len(row.messages) for row in found)) == (rows, turns)
    assert name == "chat_oasst" or all(row.messages[1].thought for row in found)


def test_descriptions_of_apis_are_no_conversations(shared_data):
    bad = []
    url = f"file://{shared_data}/sft/tool_toolalpaca_apis.jsonl"
    assert not list(
        read_rows(url, parse_conversation, on_bad=lambda where, error: bad.append(str(error)))
    )
    assert len(bad) == 21 and all(
        f":{number}: unknown format, with keys ['Name', 'Description', " in line
        for number, line in enumerate(bad, 1)
    )
