"""The chat format: messages to token ids and back. ChatML, with thoughts and tools:

    <s><|im_start|>system
    You are brief.

    Tools:
    {"name": "add", "description": "...", "parameters": {...}}<|im_end|>
    <|im_start|>user
    What is 2 + 3?<|im_end|>
    <|im_start|>assistant
    <|start_thought|>I add them.<|end_thought|><|tool_call|>{"name": "add", "arguments": {"a": 2, "b": 3}}<|im_end|>
    <|im_start|>tool
    <|tool_response|>5<|im_end|>
    <|im_start|>assistant
    It is 5.<|im_end|>

Text is encoded stretch by stretch, from one special token to the next: what a user, a tool or a document says never becomes a special token.
`chat_template.jinja` writes the same, for Hugging Face's and llama.cpp's encoders, which find special tokens in any text: who serves
strangers encodes here. An answer, like a thought, loses whitespace around it.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nanollama_jax.chat.conversations import Message, ToolCall, Tools
from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import (
    CHAT_TOKENS,
    THOUGHT_END,
    THOUGHT_START,
    TOOL_CALL,
    TOOL_RESPONSE,
    TURN_END,
    TURN_START,
    Tokenizer,
)

_ANSWER = "assistant\n"
BLANK = " \t\n\r"  # left out around what the assistant says; of other whitespace, every Jinja has its own idea


class Stretch(NamedTuple):
    """A part of a rendered conversation: one special token, or text."""

    text: str
    special: bool = False
    header: bool = False  # `text` begins with _ANSWER, which the assistant does not say
    learned: bool = False  # said by the assistant in a message to be learned, but for the header


class Encoded(NamedTuple):
    ids: np.ndarray  # int32
    # bool: for each of `ids`, whether a model learns to predict it: what the assistant says in
    # messages with `learned`
    learned: np.ndarray


def render(messages: Sequence[Message], tools: Tools = ()) -> Iterator[Stretch]:
    """The stretches of a conversation, without BOS."""
    if tools and (not messages or messages[0].role != "system"):
        messages = (Message("system", ""), *messages)
    for message in messages:
        said = message.role == "assistant"
        learned = said and message.learned
        yield Stretch(TURN_START, special=True)
        if message.role == "tool":
            yield Stretch("tool\n")
            yield Stretch(TOOL_RESPONSE, special=True)
            yield Stretch(message.content)
        elif not said:
            listed = (
                "\n".join(["Tools:", *map(_json, tools)])
                if message.role == "system" and tools
                else ""
            )
            yield Stretch(
                f"{message.role}\n" + "\n\n".join(filter(None, (message.content, listed)))
            )
        elif thought := message.thought.strip(BLANK):
            yield Stretch(_ANSWER, header=True)
            yield Stretch(THOUGHT_START, special=True, learned=learned)
            yield Stretch(thought, learned=learned)
            yield Stretch(THOUGHT_END, special=True, learned=learned)
            yield Stretch(message.content.strip(BLANK), learned=learned)
        else:
            yield Stretch(_ANSWER + message.content.strip(BLANK), header=True, learned=learned)
        for call in message.tool_calls:
            yield Stretch(TOOL_CALL, special=True, learned=learned)
            yield Stretch(_json({"name": call.name, "arguments": call.arguments}), learned=learned)
        yield Stretch(TURN_END, special=True, learned=learned)
        yield Stretch("\n")


def encode(messages: Sequence[Message], tokenizer: Tokenizer, tools: Tools = ()) -> Encoded:
    """BOS and the conversation. Raises BadInput for a tokenizer without the special tokens, or in which an answer would change its header's ids."""
    check_tokenizer(tokenizer)
    ids, learned = [tokenizer.bos_id], [False]
    stretches = [stretch for stretch in render(messages, tools) if stretch.text]
    try:
        encoded = iter(
            tokenizer.encode_batch([stretch.text for stretch in stretches if not stretch.special])
        )
    except (TypeError, UnicodeEncodeError) as error:  # SentencePiece's way to say so
        raise BadInput(f"a message cannot be written as UTF-8: {error}") from error
    header_ids = tokenizer.encode(_ANSWER)
    for stretch in stretches:
        new = [tokenizer.control_id(stretch.text)] if stretch.special else next(encoded)
        said = [stretch.learned] * len(new)
        if stretch.header:
            if new[: len(header_ids)] != header_ids:
                raise BadInput(
                    "the tokenizer joins a newline to the text after it, so that an answer would change the ids before it: train it anew"
                )
            said[: len(header_ids)] = [False] * len(header_ids)
        ids += new
        learned += said
    return Encoded(np.array(ids, np.int32), np.array(learned, bool))


def encode_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, tools: Tools = ()
) -> list[int]:
    """BOS, the conversation, and the beginning of the assistant's turn: what a model goes on with. Raises BadInput as `encode` does."""
    return [
        *encode(messages, tokenizer, tools).ids.tolist(),
        tokenizer.control_id(TURN_START),
        *tokenizer.encode(_ANSWER),
    ]


def parse_reply(ids: Sequence[int], tokenizer: Tokenizer) -> Message:
    """The message in what a model generated after `encode_prompt`. A call that is no JSON object with a name and arguments stays in the content,
    as does whatever else is out of place: a model can say anything."""
    names = {tokenizer.control_id(piece): piece for piece in CHAT_TOKENS}
    content, thought, calls = [], "", []
    within, stretch = "", []

    def close() -> None:
        nonlocal thought
        text = tokenizer.decode(stretch)
        if within == THOUGHT_START:
            thought += text
        elif within == TOOL_CALL and (call := _parse_call(text)):
            calls.append(call)
        else:
            content.append(text)

    for token in ids:
        if (name := names.get(token)) is None and token != tokenizer.eos_id:
            stretch.append(token)
            continue
        close()
        within, stretch = name, []
        if name in (TURN_END, None):
            break
    else:
        close()
    return Message("assistant", "".join(content).strip(BLANK), thought.strip(BLANK), tuple(calls))


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises BadInput for a base model's tokenizer."""
    if missing := [piece for piece in CHAT_TOKENS if tokenizer.control_id(piece) is None]:
        raise BadInput(
            f"the tokenizer has no {missing[0]}: it is a base model's, fine-tune that first (configs/sft.py)"
        )


def _parse_call(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
        json.dumps(call, ensure_ascii=False).encode()  # JSON can spell what UTF-8 cannot: "\ud800"
    except (ValueError, RecursionError):
        return None
    if (
        not isinstance(call, dict)
        or not isinstance(call.get("name"), str)
        or not isinstance(call.get("arguments"), dict)
    ):
        return None
    return ToolCall(call["name"], call["arguments"])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
