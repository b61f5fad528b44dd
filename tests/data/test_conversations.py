import copy
import json
import re
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanollama_jax.data.conversations import FORMATS, Conversation, Message, ToolCall, parse_conversation, parse_tools, read_rows
from nanollama_jax.data.preference import parse_preference, parse_row
from nanollama_jax.errors import BadInput

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "4"}
TOOL_USE = {"messages": [USER, CALLED, RESULT, ANSWER], "tools": [{"type": "function", "function": ADD}]}
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
        {"from": "tool", "value": '<tool_response>\n{"name": "add", "content": 4}\n</tool_response>\n<tool_response>\n5\n</tool_response>\n'},
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
    found = parse_conversation(chat(system, USER, thoughtful, USER, ANSWER, source="x"), "chats.jsonl:7")
    turns = (Message("user", "2 + 2?"), Message("assistant", "4", "Two and two."), Message("user", "2 + 2?"), Message("assistant", "4"))
    assert found == Conversation("chats.jsonl:7", (Message("system", "Be brief."), *turns), ())
    prompter = [{"role": "prompter", "content": "2 + 2?"}, ANSWER | {"content": " 4\n", "thought": None, "tool_calls": None}]
    assert messages(chat(*prompter)) == [Message("user", "2 + 2?"), Message("assistant", " 4\n")], "content is kept as it is"


def test_tool_calls_as_openai_writes_them():
    called, done = (Message("assistant", "", tool_calls=(ToolCall("add", {"a": 2}),)), (Message("tool", "4"), Message("assistant", "4")))
    assert parse_conversation(TOOL_USE, "x:1") == Conversation("x:1", (Message("user", "2 + 2?"), called, *done), (ADD,))
    for tools in (json.dumps([ADD]), [ADD], [{"type": "function", "function": ADD | {"strict": None}}]):
        assert parse_conversation(TOOL_USE | {"tools": tools}, "x:1").tools == (ADD,)
    other = changed(CALLED, "2", "tool_calls", 0, "id")["tool_calls"]
    swapped = [USER, CALLED | {"tool_calls": CALLED["tool_calls"] + other}, RESULT | {"tool_call_id": "2"}, RESULT, ANSWER]
    assert "message 3: `tool_call_id` is '2', where the result of '1' is due: order" in mistake(TOOL_USE | {"messages": swapped})
    swapped[2:4] = swapped[3:1:-1]
    assert len(messages(TOOL_USE | {"messages": swapped})) == 5
    tagged = ANSWER | {"content": '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>\n'}
    assert "message 2: `content` is a <tool_call>, which would be learnt as text" in mistake(TOOL_USE | {"messages": [USER, tagged]})
    bare = changed(TOOL_USE, [{"name": "add", "arguments": {"a": 2}}], "messages", 1, "tool_calls")
    assert parse_conversation(bare, "x:1") == parse_conversation(TOOL_USE, "x:1")
    twice = CALLED | {"tool_calls": CALLED["tool_calls"] * 2}
    assert len(messages(TOOL_USE | {"messages": [USER, twice, RESULT, RESULT, twice, RESULT, RESULT, ANSWER]})) == 8
    blank = CALLED | {"content": "\n", "thought": " "}
    assert messages(TOOL_USE | {"messages": [USER, blank]}) == messages(TOOL_USE | {"messages": [USER, CALLED]})
    assert messages(TOOL_USE | {"messages": [USER, CALLED]})[-1].tool_calls, "a call can be the last that is learnt"
    assert parse_conversation(chat(USER, ANSWER, tools=[ADD]), "x:1").tools == (ADD,), "nor must a tool be called"
    assert parse_tools(None) == parse_tools([]) == parse_tools("") == parse_tools("[]") == ()


def test_question_and_answer_and_metamathqa():
    answered = Message("assistant", "4", "Two and two.")
    assert messages({"question": "2 + 2?", "thought": "Two and two.", "answer": "4"}) == [Message("user", "2 + 2?"), answered]
    assert messages({"question": "2 + 2?", "thought": "", "answer": "4"}) == [Message("user", "2 + 2?"), Message("assistant", "4")]
    row = {"query": "2 + 2?", "response": "4", "type": "GSM_Rephrased", "original_question": "Two and two?"}
    assert messages(row) == [Message("user", "2 + 2?"), Message("assistant", "4")]


def test_a_thought_at_the_beginning_of_an_answer():
    for text in ("<think>\nTwo and two.\n</think>\n\n4", " <think>Two and two.</think>4"):
        for row in (
            chat(USER, ANSWER | {"content": text}),
            {"query": "2 + 2?", "response": text},
            changed(SHAREGPT, text, "conversations", 1, "value"),
        ):
            assert messages(row)[1] == Message("assistant", "4", "Two and two.")
    assert messages(chat(USER, ANSWER | {"content": "<think></think>4"}))[1] == Message("assistant", "4")
    assert messages(chat(USER, ANSWER | {"content": "It says <think>a</think>."}))[1].content == "It says <think>a</think>."
    assert messages(chat(USER, ANSWER | {"reasoning_content": "Two and two."}))[1] == Message("assistant", "4", "Two and two.")
    assert "`content` is empty" in mistake(chat(USER, ANSWER | {"content": "<think>So.</think>\n"}))


def test_sharegpt():
    assert messages(SHAREGPT) == messages(chat(USER, ANSWER))
    assert messages({"conversations": [USER, ANSWER]}) == messages(chat(USER, ANSWER)), "the list's name does not matter"
    human, gpt = SHAREGPT["conversations"]
    call, observed = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'}, {"from": "observation", "value": "4"}
    row = {"conversations": [human, call, observed, gpt], "tools": json.dumps([ADD])}
    assert parse_conversation(row, "x:1") == parse_conversation(TOOL_USE, "x:1")
    call["value"] = f"[{call['value']}, {call['value']}]"
    assert messages(row)[1].tool_calls == (ToolCall("add", {"a": 2}),) * 2


def test_what_stands_beside_a_value_is_kept():
    human, gpt = SHAREGPT["conversations"]
    assert messages({"conversations": [human, gpt | {"reasoning_content": "So."}]})[1] == Message("assistant", "4", "So.")
    calls = CALLED["tool_calls"]
    for value, thought in (("", {}), ("I add.", {"thought": "So."}), (None, {"thought": "So."})):
        said = Message("assistant", value or "", thought.get("thought", ""), (ToolCall("add", {"a": 2}),))
        turn = {"from": "gpt", "value": value, "tool_calls": calls} | thought
        assert messages({"conversations": [human, turn], "tools": [ADD]})[1] == said
    text = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'
    assert messages({"conversations": [human, gpt | {"value": text, "thought": "So."}], "tools": [ADD]})[1].thought == "So."
    both = {"conversations": [human, gpt | {"value": text, "tool_calls": calls}], "tools": [ADD]}
    assert "message 2: tool calls stand both in `value` and in `tool_calls`: keep one" in mistake(both)


def test_a_system_prompt_beside_the_messages():
    for row in (chat(USER, ANSWER), SHAREGPT, {"question": "2 + 2?", "answer": "4"}, {"query": "2 + 2?", "response": "4"}):
        assert messages(row | {"system": "Be brief."}) == messages(chat(SYSTEM, USER, ANSWER))
        assert messages(row | {"system": ""}) == messages(chat(USER, ANSWER))
    assert "`system` stands beside a first message of role system: keep one" in mistake(chat(SYSTEM, USER, ANSWER, system="Be brief."))
    assert messages(HERMES | {"system": "Be brief."})[0] == Message("system", "Be brief."), "Hermes's own prompt is none"


def test_text_around_hermes_tools_is_kept_but_for_its_own_prompt():
    prompt = HERMES["conversations"][0]["value"]
    for text, kept in (
        (f"Be brief.\n{prompt}Be kind.", "Be brief.\n\nBe kind."),
        (f"Be brief. <tools>[{json.dumps(ADD)}]</tools>", "Be brief."),
    ):
        found = parse_conversation(changed(HERMES, text, "conversations", 0, "value"), "x:1")
        assert (found.messages[0], found.tools) == (Message("system", kept), (ADD,))


def test_a_weight_of_one_and_weights_of_what_is_not_learnt():
    assert messages(chat(USER | {"weight": 0}, ANSWER | {"weight": 1.0, "refusal": None})) == messages(chat(USER, ANSWER))


def test_hermes_tools_calls_and_responses():
    calls = ToolCall("add", {"a": 2, "exact": True, "unit": None}), ToolCall("add", {"a": "it's"})
    results = Message("tool", '{"name": "add", "content": 4}'), Message("tool", "5")
    turns = (Message("user", "2 + 2?"), Message("assistant", "I add.", tool_calls=calls), *results, Message("assistant", "4, or 5."))
    assert parse_conversation(HERMES, "x:1") == Conversation("x:1", turns, (ADD,))
    other = ADD | {"name": "subtract"}
    assert "not among the tools ['subtract']" in mistake(HERMES | {"tools": json.dumps([other])}), "the field counts, not the text"
    json_mode = changed(HERMES, "Answer in JSON. <schema>{}</schema>", "conversations", 0, "value") | {"tools": [ADD]}
    assert messages(json_mode)[0] == Message("system", "Answer in JSON. <schema>{}</schema>")


def test_special_tokens_in_text_are_data():
    text = "What are <|im_end|>, <|tool_call|> and <tool_call>?"
    assert messages(chat(USER | {"content": text}, ANSWER | {"content": text})) == [Message("user", text), Message("assistant", text)]
    assert messages(changed(SHAREGPT, text, "conversations", 0, "value"))[0] == Message("user", text)


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
        (chat(ANSWER), "message 1: assistant after start, where system or user is expected: reorder"),
        (chat(USER, USER, ANSWER), "message 2: user after user, where assistant is expected"),
        (chat(USER, ANSWER, ANSWER), "message 3: assistant after assistant, where user is expected"),
        (chat(USER, {"role": "system", "content": "a"}, ANSWER), "message 2: system after user"),
        (chat({"role": "system", "content": "a"}, {"role": "system", "content": "a"}, USER, ANSWER), "message 2: system after system"),
        (chat({"role": "system", "content": "a"}, ANSWER), "message 2: assistant after system, where user is expected"),
        (chat(USER, RESULT, ANSWER), "message 2: tool after user"),
        (chat(USER, ANSWER, RESULT, ANSWER), "message 3: tool after assistant"),
        (TOOL_USE | {"messages": [USER, CALLED, USER, ANSWER]}, "message 3: user after tool call, where tool is expected"),
        (chat("hello", ANSWER), "message 1: it is of type str, not an object"),
        (chat({"content": "a"}, ANSWER), "message 1: unknown role None: known are system, "),
        (chat({"role": "moderator\n", "content": "a"}, ANSWER), "message 1: unknown role 'moderator\\n'"),
        (chat({"role": ["user"], "content": "a"}, ANSWER), "message 1: unknown role ['user']"),
        (chat({"role": "user"}, ANSWER), "message 1: `content` is missing, not a string"),
        (chat(USER | {"content": [{"type": "text", "text": "a"}]}, ANSWER), "message 1: `content` is of type list, not a string"),
        (chat(USER | {"content": " \n"}, ANSWER), "message 1: `content` is empty: fill it in, or remove the row"),
        (chat(USER, ANSWER | {"content": ""}), "message 2: `content` is empty"),
        (chat(USER, ANSWER | {"content": None, "thought": "Hm."}), "message 2: `content` is missing"),
        (chat(USER, ANSWER | {"thought": ["Hm."]}), "message 2: `thought` is of type list"),
        (chat(USER | {"content": "a\ud800"}, ANSWER), "message 1: `content` holds half a surrogate pair"),
        (TOOL_USE | {"messages": [USER, CALLED, RESULT | {"content": ""}, ANSWER]}, "message 3: `content` is empty"),
        ({"question": "2 + 2?", "answer": 4}, "`answer` is of type int, not a string"),
        ({"question": "", "answer": "4"}, "`question` is empty"),
        ({"query": "2 + 2?", "response": ""}, "`response` is empty"),
        (changed(SHAREGPT, "bing", "conversations", 1, "from"), "message 2: unknown role 'bing'"),
        (changed(SHAREGPT, "", "conversations", 1, "value"), "message 2: `value` is empty"),
        (changed(SHAREGPT, 4, "conversations", 1, "value"), "message 2: `value` is of type int"),
        (changed(HERMES, "<tool_response></tool_response>", "conversations", 3, "value"), "message 4: `value` is empty"),
        (changed(HERMES, "<tool_call>\n{'name': 'add'", "conversations", 2, "value"), "message 3: a <tool_call> without its </tool_call>"),
        (changed(HERMES, "<tool_call>add(2)</tool_call>", "conversations", 2, "value"), "message 3: a tool call is not JSON: 'add(2)'"),
        (changed(HERMES, "<tools>[{'name': }]</tools>", "conversations", 0, "value"), "message 1: `tools` is not JSON"),
        (changed(TOOL_USE, "add", "messages", 1, "tool_calls"), "message 2: `tool_calls` is of type str, not a list"),
        (changed(TOOL_USE, ["add"], "messages", 1, "tool_calls"), "message 2: a tool call is of type str, not an object"),
        (
            changed(TOOL_USE, "subtract", "messages", 1, "tool_calls", 0, "function", "name"),
            "message 2: a tool call of 'subtract', which is not among",
        ),
        (chat(USER, CALLED, RESULT, ANSWER), "message 2: a tool call of 'add', which is not among the tools []: list it in `tools`"),
        (
            changed(TOOL_USE, "{'a': 2", "messages", 1, "tool_calls", 0, "function", "arguments"),
            "`arguments` of a call of 'add' is not JSON: \"{'a': 2\"",
        ),
        (changed(TOOL_USE, "[2]", "messages", 1, "tool_calls", 0, "function", "arguments"), "`arguments` of a call of 'add' is of type list, not an"),
        (
            changed(TOOL_USE, None, "messages", 1, "tool_calls", 0, "function", "arguments"),
            "`arguments` of a call of 'add' is missing, not an object",
        ),
        (changed(TOOL_USE, '{"a": NaN}', "messages", 1, "tool_calls", 0, "function", "arguments"), "`arguments` of a call of 'add' is not JSON"),
        (changed(TOOL_USE, {"a": "\udc00"}, "messages", 1, "tool_calls", 0, "function", "arguments"), "`arguments` of a call of 'add' is not JSON"),
        (changed(TOOL_USE, "[" * 10**5, "messages", 1, "tool_calls", 0, "function", "arguments"), "`arguments` of a call of 'add' is not JSON: '[[["),
        (TOOL_USE | {"tools": "add"}, "`tools` is not JSON: 'add'"),
        (TOOL_USE | {"tools": ADD}, "`tools` is of type dict, not a list"),
        (TOOL_USE | {"tools": ["add"]}, "tool 1: it is of type str, not an object"),
        (TOOL_USE | {"tools": [{"function": "add"}]}, "tool 1: `function` is of type str, not an object"),
        (TOOL_USE | {"tools": [ADD, {"parameters": {}}]}, "tool 2: `name` is missing, not a string"),
        (TOOL_USE | {"tools": [ADD | {"parameters": "a: number"}]}, "tool 1: `parameters` is of type str, not an object"),
        (TOOL_USE | {"tools": 0}, "`tools` is of type int, not a list"),
        (TOOL_USE | {"tools": False}, "`tools` is of type bool, not a list"),
        (chat(USER, ANSWER, system=7), "`system` is of type int, not a string"),
        (chat(USER, ANSWER, functions=[ADD]), "`functions` is not read, and would change what is learnt: write it as `tools`, or remove it"),
        (chat(USER, ANSWER, thoughts="Hm."), "`thoughts` is not read, and would change what is learnt: write it as `thought`"),
        ({"question": "2 + 2?", "rationale": "Hm.", "answer": "4"}, "`rationale` is not read"),
        ({"question": "2 + 2?", "reasoning": "Hm.", "answer": "4"}, "`reasoning` is not read"),
        (chat(USER, ANSWER | {"function_call": {"name": "add"}}), "message 2: `function_call` is not read, and would change what is learnt: write"),
        (chat(USER, ANSWER | {"refusal": "No."}), "message 2: `refusal` is not read, and would change what is learnt: write it as `content`"),
        (chat(USER, ANSWER | {"thinking": "Hm."}), "message 2: `thinking` is not read"),
        (changed(SHAREGPT, "Hm.", "conversations", 1, "reasoning"), "message 2: `reasoning` is not read"),
        (chat(USER, ANSWER | {"weight": 0}), "message 2: `weight` is 0, where every answer counts 1"),
        (changed(SHAREGPT, 0.5, "conversations", 1, "weight"), "message 2: `weight` is 0.5, where every answer counts 1"),
        (TOOL_USE | {"tools": [ADD, ADD]}, "tool 2: another is named 'add': rename one"),
    ],
)
def test_every_mistake_is_one_line_that_names_the_place(record, says):
    assert says in mistake(record)


WORDS = ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "add", "", "<think>a</think>b", "<tools>[{}]</tools>"]
WORDS += ["<tool_call>{'name': 'add', 'arguments': {}}</tool_call>", "<tool_call>", "<tool_response>1</tool_response>", "[{'name': 'add'}]", "\ud800"]
WORDS += ["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", '{"name": "add", "arguments": {}}']
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=()), max_size=5)
JSON = SCALARS | st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4), max_leaves=6
)
PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": [CALLED, RESULT, {"role": "assistant", "content": "5"}], "tools": [ADD]}
TRANSCRIPTS = {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"}


def places(value, path=()):
    """The path of everything in a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield path + (key,)
        yield from places(inner, path + (key,))


@st.composite
def almost_good_rows(draw):
    record = draw(st.sampled_from([TOOL_USE, HERMES, SHAREGPT, PAIR, TRANSCRIPTS, {"question": "a", "thought": "b", "answer": "c"}]))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(record), key=str)))
        record = changed(record, draw(JSON | st.sampled_from([TOOL_USE["messages"], HERMES["conversations"], [], {}])), *path)
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
    for depth in range(sys.getrecursionlimit() - 300, sys.getrecursionlimit() + 1, 10):
        deep: dict = {}
        for _ in range(depth):
            deep = {"a": deep}
        asked = [CALLED | {"tool_calls": [{"name": "add", "arguments": deep}]}]
        said.add(mistake({"prompt": "2 + 2?", "chosen": asked, "rejected": asked, "tools": [ADD]}, parse_preference))
        said.add(mistake({"tools": [ADD | {"parameters": deep}]}))
    assert {text.partition(": ")[2].partition(": {")[0] for text in said} == {
        "`chosen` equals `rejected`: there is nothing to prefer, remove the row",
        "`chosen`: message 2: `arguments` of a call of 'add' is not JSON",
        f"unknown format, with keys ['tools']: known are {FORMATS}",
        "`tools` is not JSON: [{'description': 'Adds.', 'name': 'add', 'parameters'",
    }


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([USER, ANSWER, CALLED, RESULT, {"role": "system", "content": "a"}]), max_size=7))
def test_what_is_accepted_is_in_order(turns):
    letters = "".join({"user": "u", "system": "s", "tool": "t", "assistant": "c" if "tool_calls" in turn else "a"}[turn["role"]] for turn in turns)
    try:
        parse_conversation(chat(*turns, tools=[ADD]), "x:1")
        accepted = True
    except BadInput:
        accepted = False
    assert accepted == bool(re.fullmatch("s?(u(ct+)*a)*u(ct+)*[ac]", letters)), letters


def test_files_and_what_is_bad_in_them(tmp_path):
    lines = [json.dumps(SHAREGPT), "{", "", json.dumps(chat(USER)), "[]", json.dumps(TOOL_USE)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    bad = []
    rows = list(read_rows(f"file://{tmp_path}/a.jsonl", parse_conversation, on_bad=lambda where, error: bad.append((where, str(error)))))
    assert [row.where for row in rows] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:6"]
    assert [where.rpartition(":")[2] for where, _ in bad] == ["2", "4", "5"] and all(error.startswith(f"{where}: ") for where, error in bad)
    assert "malformed JSON" in bad[0][1] and "nothing to learn" in bad[1][1] and "not a list" in bad[2][1]

    def stop(where, error):
        raise error

    rows = read_rows(f"file://{tmp_path}/a.jsonl", parse_conversation, on_bad=stop)
    assert next(rows).where.endswith(":1")
    with pytest.raises(BadInput, match=r"a.jsonl:2: malformed"):
        next(rows)


def test_parquet_fills_with_nulls_what_a_row_does_not_have(tmp_path):
    rows = [TOOL_USE | {"question": None, "answer": None}, {"question": "2 + 2?", "answer": "4"}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(read_rows(f"file://{tmp_path}/a.parquet", parse_conversation, on_bad=lambda where, error: pytest.fail(str(error))))
    assert [row.messages for row in found] == [parse_conversation(row, "").messages for row in rows]


@pytest.mark.parametrize("hub", [False, True])
def test_nor_do_calls_learn_each_other_s_arguments(tmp_path, hub):
    """Parquet gives each object the keys of all others in its column: a call of one tool those of another's arguments, as nulls."""
    tools = [
        {"name": name, "parameters": {"type": "object", "properties": {key: {"type": "string"}}}} for name, key in (("add", "a"), ("sky", "city"))
    ]
    calls = [{"name": "add", "arguments": {"a": "1"}}, {"name": "sky", "arguments": {"city": "Rome"}}]
    rows = [{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": tools} for call in calls]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    url = f"hf://{tmp_path}" if hub else f"file://{tmp_path}/*.parquet"
    found = list(read_rows(url, parse_conversation, on_bad=lambda where, error: pytest.fail(str(error))))
    assert [(row.messages[1].tool_calls[0].arguments, row.tools) for row in found] == [(call["arguments"], tuple(tools)) for call in calls]


@pytest.mark.parametrize(("name", "rows", "turns"), [("chat_oasst", 100, 284), ("math_cot_gsm8k", 4000, 8000), ("reasoning_cot_flan", 6000, 12000)])
def test_real_conversations(shared_data, name, rows, turns):
    url = f"file://{shared_data}/sft/{name}.jsonl"
    found = list(read_rows(url, parse_conversation, on_bad=lambda where, error: pytest.fail(str(error))))
    assert (len(found), sum(len(row.messages) for row in found)) == (rows, turns)
    assert name == "chat_oasst" or all(row.messages[1].thought for row in found)


def test_descriptions_of_apis_are_no_conversations(shared_data):
    bad = []
    url = f"file://{shared_data}/sft/tool_toolalpaca_apis.jsonl"
    assert not list(read_rows(url, parse_conversation, on_bad=lambda where, error: bad.append(str(error))))
    assert len(bad) == 21 and all(f":{number}: unknown format, with keys ['Name', 'Description', " in line for number, line in enumerate(bad, 1))
