"""An engine that says what a test tells it to."""

from collections.abc import Iterator, Sequence

from nanollama_jax.chat import chatml as chat
from nanollama_jax.chat.conversations import Message
from nanollama_jax.infer.batch import Completion
from nanollama_jax.tokenizer import TURN_END, Tokenizer

CUT = "(cut off)"  # after a text: its end is left out


class Scripted:
    """Answers prompts with `replies`, in order: messages, or texts."""

    def __init__(self, tokenizer: Tokenizer, replies: Sequence[Message | str]):
        self.tokenizer, self.replies, self.prompts, self.grammars = (
            tokenizer,
            list(replies),
            [],
            None,
        )

    def generate(self, prompts, *_, **__) -> list[Completion]:
        self.prompts += [self.tokenizer.decode(prompt) for prompt in prompts]
        return [self._completion(self.replies.pop(0)) for _ in prompts]

    def completions(self, prompts, *_, grammar=None, **__) -> Iterator[tuple[int, Completion]]:
        self.grammars = grammar
        yield from enumerate(self.generate(prompts))

    def _completion(self, reply: Message | str) -> Completion:
        if isinstance(reply, str):
            ids = self.tokenizer.encode(reply.removesuffix(CUT))
            cut = reply.endswith(CUT)
            return Completion(
                "",
                ids if cut else [*ids, self.tokenizer.control_id(TURN_END)],
                "length" if cut else "stop",
            )
        encoded = chat.encode([Message("user", "x"), reply], self.tokenizer)
        return Completion("", encoded.ids[encoded.learned].tolist(), "stop")
