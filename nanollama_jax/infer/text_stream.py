"""The text of a generation as it grows.

Text is emitted in whole characters, as soon as they are settled. A stop token or stop string ends
it.
"""

from collections.abc import Sequence

from nanollama_jax.errors import BadInput
from nanollama_jax.tokenizer import Tokenizer

# Settled tokens that are decoded again in front of new ones: some models strip the space of the
# very first piece, and bytes join to characters
_CONTEXT = 8


class TextStream:
    """The text that follows `prompt`: pushed as tokens, returned as text.

    `text` and `tokens` hold everything so far. `finish_reason` is None until the end: "stop" if a
    stop token or string came, else the reason given to `finish`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ):
        self._tokenizer, self._stop_ids = tokenizer, frozenset(stop_ids)
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(self._stop):
            raise BadInput("a stop string is empty: leave it out")
        self.tokens: list[int] = []
        self.text = ""  # settled
        self.finish_reason: str | None = None
        self._emitted = 0  # characters of `text`
        self._window = list(prompt[-_CONTEXT:])  # some settled tokens, then the unsettled ones
        self._settled = len(self._window) - tokenizer.unfinished_bytes(self._window)
        self._before = tokenizer.decode(self._window[: self._settled])

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` settle, without a possible start of a stop string.

        Empty after the end.
        """
        for token in tokens:
            if self.finish_reason is not None:
                break
            self.tokens.append(token)
            if token in self._stop_ids:
                self._settle(final=True)
                self.finish_reason = self.finish_reason or "stop"
            else:
                self._window.append(token)
                self._settle(final=False)
        return self._emit()

    def finish(self, reason: str) -> str:
        """Ends the text and returns the rest, with U+FFFD for unfinished characters."""
        if self.finish_reason is None:
            self._settle(final=True)
            self.finish_reason = self.finish_reason or reason
        return self._emit()

    def _settle(self, final: bool) -> None:
        unfinished = 0 if final else self._tokenizer.unfinished_bytes(self._window)
        settled = self._window[: len(self._window) - unfinished]
        whole = self._tokenizer.decode(settled)
        new = whole[len(self._before) :]
        search_from = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += new
        ends = [self.text.find(string, search_from) for string in self._stop]
        ends = [end for end in ends if end >= 0]
        if ends:
            self.text, self.finish_reason = self.text[: min(ends)], "stop"
        self._before = whole
        if new and len(settled) > _CONTEXT:
            del self._window[: self._settled]
            self._before = self._tokenizer.decode(self._window[: len(self._window) - unfinished])
        self._settled = len(self._window) - unfinished

    def _emit(self) -> str:
        end = size = len(self.text)
        if self.finish_reason is None:
            for string in self._stop:
                lengths = range(min(len(string) - 1, size), 0, -1)
                held = next((n for n in lengths if self.text.endswith(string[:n])), 0)
                end = min(end, size - held)
        piece, self._emitted = self.text[self._emitted : end], max(self._emitted, end)
        return piece
