"""What a model says, in the log and in `nanollama chat`."""

import io

import pytest

from nanollama_jax.chat.conversations import Message, ToolCall, parse_tools
from nanollama_jax.commands.chat import reply
from nanollama_jax.console import Console
from nanollama_jax.errors import BadInput
from nanollama_jax.infer.samples import encode, lines
from nanollama_jax.infer.sampling import Sampling
from nanollama_jax.synthetic import tools
from tests.infer.scripted import CUT, Scripted


def test_lines_of_the_log_show_thoughts_words_and_calls_apart(chat_tokenizer):
    called = Message(
        "assistant",
        "I look.",
        "Of what?\nA lamp.",
        (ToolCall("get_price", {"item": "lamp", "city": "Oslo"}),),
    )
    engine = Scripted(chat_tokenizer, [called, f"and so on{CUT}", ""])
    prompts = encode(("A\nlamp?", "Go on.", "Nothing?"), chat_tokenizer, context_length=64)
    assert list(lines(engine, prompts, 50)) == [
        "asked: 'A\\nlamp?'",
        "thinks: 'Of what?\\nA lamp.'",
        "says: 'I look.'",
        'calls: \'get_price({"item": "lamp", "city": "Oslo"})\'',
        "asked: 'Go on.'",
        "says: 'and so on'",
        "(cut off)",
        "asked: 'Nothing?'",
        "says: ''",
    ]


def test_a_prompt_that_fills_the_context_is_refused_before_training(chat_tokenizer):
    with pytest.raises(
        BadInput,
        match=r"samples.prompts: 'Count: 1 1 1.* has \d+ tokens, and the context has 64: shorten",
    ):
        encode(("Hello", "Count:" + 64 * " 1"), chat_tokenizer, context_length=64)


def test_chat_runs_the_calls_and_shows_the_model_its_mistakes(chat_tokenizer):
    wrong = ToolCall("get_price", {"item": "lamp", "city": "Atlantis"})
    calls = (
        wrong,
        ToolCall("get_weather", {"city": "Oslo", "date": "2026-08-02"}),
        ToolCall("get_price", {"item": "lamp", "city": "Oslo"}),
    )
    engine = Scripted(
        chat_tokenizer,
        [
            Message("assistant", "", tool_calls=calls),
            Message("assistant", "It is [b] cheap :x: \\", "I see."),
        ],
    )
    shown = io.StringIO()
    offered = parse_tools([tools.schema("get_price")])
    messages = reply(
        engine, [Message("user", "A lamp?")], offered, Sampling(), 50, Console(file=shown)
    )
    assert tools.execute(calls[1].name, calls[1].arguments), "there is, but it was not offered"
    price = tools.execute("get_price", {"item": "lamp", "city": "Oslo"})["price"]
    results = [message.content for message in messages if message.role == "tool"]
    assert (
        "Atlantis is unknown" in results[0]
        and "there is no tool 'get_weather'" in results[1]
        and results[2] == f'{{"price": {price}}}'
    )
    assert (
        all(result in engine.prompts[1] for result in results[2:])
        and engine.prompts[0] in engine.prompts[1]
    )
    assert shown.getvalue().rstrip().endswith("thinks: I see.\n  says: It is [b] cheap :x: \\")
    # One that only ever calls is stopped.
    engine = Scripted(chat_tokenizer, [Message("assistant", "", tool_calls=(wrong,))] * 9)
    reply(engine, [Message("user", "A lamp?")], offered, Sampling(), 50, Console(file=shown))
    assert len(engine.replies) == 5 and "no answer after 4 messages with calls" in shown.getvalue()
