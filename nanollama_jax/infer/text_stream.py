"""The text of a generation as it grows: whole characters as soon as they are settled, and the end when a stop token or stop string comes."""

from collections.abc import Sequence

from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer

_CONTEXT = 8  # tokens decoded again in front of new ones: some models strip the space of the very first piece, and bytes join to characters


class TextStream:
    """What follows `prompt`, pushed in tokens and given back in text. `text` and `tokens` are what has come so far; `finish_reason` is None until
    it ends: "stop" here, "length" by the caller."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ):
        self._tokenizer, self._stop, self._stop_ids = (
            tokenizer,
            (stop,) if isinstance(stop, str) else tuple(stop),
            frozenset(stop_ids),
        )
        if not all(self._stop):
            raise BadInput("a stop string is empty: leave it out")
        self.tokens: list[int] = []
        self.text = ""  # settled
        self.finish_reason: str | None = None
        self._given = 0  # characters of `text` that were handed out
        self._window = list(
            prompt[-_CONTEXT:]
        )  # a few settled tokens, then those whose text is not settled
        self._settled = len(self._window) - tokenizer.unfinished_bytes(self._window)
        self._before = tokenizer.decode(self._window[: self._settled])

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` settle; what could be the beginning of a stop string is held back. After the end, nothing."""
        for token in tokens:
            if self.finish_reason is not None:
                break
            self.tokens.append(token)
            if token in self._stop_ids:
                self._settle(all_of_it=True)
                self.finish_reason = self.finish_reason or "stop"
            else:
                self._window.append(token)
                self._settle(all_of_it=False)
        return self._hand_out()

    def finish(self, reason: str) -> str:
        """The rest of the text: unfinished characters as U+FFFD, and what was held back."""
        if self.finish_reason is None:
            self._settle(all_of_it=True)
            self.finish_reason = self.finish_reason or reason
        return self._hand_out()

    def _settle(self, all_of_it: bool) -> None:
        unfinished = 0 if all_of_it else self._tokenizer.unfinished_bytes(self._window)
        settled = self._window[: len(self._window) - unfinished]
        whole = self._tokenizer.decode(settled)
        new = whole[len(self._before) :]
        searched_from = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += new
        ends = [
            at for at in (self.text.find(string, searched_from) for string in self._stop) if at >= 0
        ]
        if ends:
            self.text, self.finish_reason = self.text[: min(ends)], "stop"
        self._before = whole
        if new and len(settled) > _CONTEXT:
            del self._window[: self._settled]
            self._before = self._tokenizer.decode(self._window[: len(self._window) - unfinished])
        self._settled = len(self._window) - unfinished

    def _hand_out(self) -> str:
        end = len(self.text)
        if self.finish_reason is None:
            for string in self._stop:
                held = next(
                    (
                        n
                        for n in range(min(len(string) - 1, end), 0, -1)
                        if self.text.endswith(string[:n])
                    ),
                    0,
                )
                end = min(end, len(self.text) - held)
        piece, self._given = self.text[self._given : end], max(self._given, end)
        return piece
