"""Overlong prompts that are cut: whole tokens go from one end of the text until the rest fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from batchinfer.data.columns import RowError
from batchinfer.data.template import Message
from batchinfer.data.tokenizer import PromptTokenizer

Asked = str | list[Message]  # a plain prompt, or a conversation
Put = Callable[[str], Any]
ROUNDS = 4  # prompts tokenised anew before a row is given up; nearly all fit after one


class Overlong(RowError):
    """The prompt does not fit, whatever else is right with it."""


class Truncation:
    """Cuts the text of a prompt: all of it, or in a conversation the text of the last user message.

    What the chat template writes, system and earlier messages, and control tokens stay whole. A prompt that is cut, or
    need not be, leaves room for ``max_tokens`` or a quarter of the sequence, whichever is less.
    """

    def __init__(self, side: Literal["truncate_left", "truncate_right"], tokenizer: PromptTokenizer, max_seq_len: int):
        self._left = side == "truncate_left"
        self._tokenizer, self._max_seq_len = tokenizer, max_seq_len

    def most_tokens(self, max_tokens: int) -> int:
        """How long a prompt may be."""
        return self._max_seq_len - min(max_tokens, max(1, self._max_seq_len // 4))

    def shorten(self, asked: Asked, characters: int) -> Asked:
        """The prompt with no more than so many characters of text: a gigabyte need not be tokenised to be cut."""
        text, put = _place(asked)
        if len(text) <= characters:
            return asked
        return put(text[-characters:] if self._left else text[:characters])

    def fit(self, asked: Asked, tokens: int, most: int, encode: Callable[[Asked], list[int]]) -> list[int]:
        """The ids of the prompt, cut from ``tokens`` to ``most`` or a little less.

        Raises: RowError if too little text is there to be cut.
        """
        text, put = _place(asked)
        spans = self._tokenizer.spans(text)
        keep, excess = len(spans), tokens - most
        for _ in range(ROUNDS):
            keep -= excess
            rest = self._cut(text, spans, keep) if keep > 0 else ""
            if not rest.strip():
                break
            ids = encode(put(rest))
            excess = len(ids) - most
            if excess <= 0:
                return ids
        what = "text" if isinstance(asked, str) else "last user message"
        raise RowError(
            f"the prompt has {tokens} tokens, {most} may stay, and its {what} has only {len(spans)} that can be cut"
        )

    def _cut(self, text: str, spans: list[tuple[int, int]], keep: int) -> str:
        if self._left:
            return text[spans[-keep - 1][1] :]
        return text[: min(spans[keep - 1][1], spans[keep][0])]  # they overlap where a character is several tokens


def _place(asked: Asked) -> tuple[str, Put]:
    """The text that may be cut, empty if there is none, and how to put another in its place."""
    if isinstance(asked, str):
        return asked, str
    return _last(asked, lambda message: message["role"] == "user", "content")


def _last(items: list[Any], wanted: Callable[[Any], bool], key: str) -> tuple[str, Put]:
    at = max((i for i, item in enumerate(items) if wanted(item)), default=None)
    if at is None:
        return "", lambda _: items
    value, put = items[at].get(key) or "", str
    if isinstance(value, list):  # content in parts: the last that is text
        value, put = _last(value, lambda part: isinstance(part, dict) and isinstance(part.get("text"), str), "text")
    return value, lambda text: [*items[:at], {**items[at], key: put(text)}, *items[at + 1 :]]
