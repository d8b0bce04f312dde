"""Text: from token ids to completions that people read, and the search for stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from batchinfer.errors import ModelError


class Text:
    """The tokenizer of a plan, for a developer's own strings and for completions."""

    def __init__(self, tokenizer_dir: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
        except Exception as error:  # the Rust library raises bare Exception
            raise ModelError(f"cannot read {tokenizer_dir / 'tokenizer.json'}: {error}") from None
        # Left in some files by whoever trained with them.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._control = {token.content: token_id for token_id, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """Token ids of text whose control tokens are meant as such. Rows of data go through PromptRenderer instead."""
        return self._tokenizer.encode(text).ids

    def decode(self, token_ids: Sequence[int], stop: Sequence[str] = ()) -> str:
        """Text without control tokens, cut before the first of the ``stop`` strings."""
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        ends = [end for string in stop if (end := text.find(string)) >= 0]
        return text[: min(ends)] if ends else text

    def stop_check(self, stop: Sequence[str], stop_token_ids: Sequence[int]) -> StopCheck | None:
        """The check for a request, None where it asks for no stops. A control token among the strings is that token."""
        control = [self._control[string] for string in stop if string in self._control]
        spelled = [string for string in stop if string not in self._control]
        return StopCheck(self._tokenizer, spelled, [*stop_token_ids, *control]) if stop or stop_token_ids else None


class StopCheck:
    """Whether a completion has just reached a stop token or spelled a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._stop_token_ids = frozenset(stop_token_ids)
        # A token carries a byte at least, so this many spell the longest stop string; a few more, because the first
        # ones of a window may decode differently than within their text.
        self._window = max((len(string.encode()) for string in stop), default=0) + 4

    def __call__(self, completion_ids: np.ndarray) -> bool:
        if int(completion_ids[-1]) in self._stop_token_ids:
            return True
        if not self._stop:
            return False
        tail = self._tokenizer.decode(completion_ids[-self._window :].tolist(), skip_special_tokens=True)
        return any(string in tail for string in self._stop)
