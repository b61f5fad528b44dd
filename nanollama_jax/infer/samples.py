"""A fine-tuned model's replies in readable form: thoughts, words and calls apart."""

import json
from collections.abc import Iterator, Sequence

from nanollama_jax.chat import chatml as chat
from nanollama_jax.chat.conversations import Message
from nanollama_jax.errors import BadInput
from nanollama_jax.infer.engine import Engine
from nanollama_jax.tokenizer import Tokenizer


def encode(
    prompts: Sequence[str], tokenizer: Tokenizer, context_length: int
) -> dict[str, list[int]]:
    """prompt -> ids, each as a user's message in a conversation of its own.

    Raises BadInput for a prompt that leaves no room for a reply.
    """
    encoded = {
        prompt: chat.encode_prompt([Message("user", prompt)], tokenizer) for prompt in prompts
    }
    for prompt, ids in encoded.items():
        if len(ids) >= context_length:
            raise BadInput(
                f"samples.prompts: {prompt[:40]!r}... has {len(ids)} tokens, and the context has "
                f"{context_length}: shorten it"
            )
    return encoded


def lines(engine: Engine, prompts: dict[str, list[int]], max_new_tokens: int) -> Iterator[str]:
    """The greedy reply to each prompt of `encode`, escaped, for a log."""
    completions = engine.generate(list(prompts.values()), max_new_tokens=max_new_tokens)
    for prompt, completion in zip(prompts, completions, strict=True):
        yield f"asked: {prompt!r}"
        for what, text in parts(chat.parse_reply(completion.tokens, engine.tokenizer)):
            yield f"{what}: {text!r}"
        if completion.finish_reason != "stop":
            yield "(cut off)"


def parts(message: Message) -> Iterator[tuple[str, str]]:
    """The parts of an assistant's message.

    ("thinks", text), ("says", text), and ("calls", NAME(JSON)) for each call.
    """
    if message.thought:
        yield "thinks", message.thought
    if message.content or not message.tool_calls:
        yield "says", message.content
    for call in message.tool_calls:
        yield "calls", f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})"
