"""What a fine-tuned model says, shown to people: thoughts, words and calls apart."""

from collections.abc import Iterator, Sequence

from nanollama_jax.data import chat
from nanollama_jax.data.conversations import Message
from nanollama_jax.infer.engine import Engine

NAMES = {"user": "asked", "assistant": "says", "tool": "tool"}


def lines(engine: Engine, prompts: Sequence[str], max_new_tokens: int) -> Iterator[str]:
    """The greedy reply to each prompt, asked by a user in a conversation of its own."""
    asked = [Message("user", prompt) for prompt in prompts]
    encoded = [chat.encode_prompt([message], engine.tokenizer) for message in asked]
    for message, completion in zip(asked, engine.generate(encoded, max_new_tokens=max_new_tokens), strict=True):
        yield from show(message)
        yield from show(chat.parse_reply(completion.tokens, engine.tokenizer), ended=completion.finish_reason == "stop")


def show(message: Message, ended: bool = True) -> Iterator[str]:
    """A line for each part of a message."""
    if message.thought:
        yield f"thinks: {message.thought!r}"
    if message.content or not (message.thought or message.tool_calls):
        yield f"{NAMES.get(message.role, message.role)}: {message.content!r}"
    for call in message.tool_calls:
        yield f"calls: {call.name!r} ({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})"
    if not ended:
        yield "(cut off)"
