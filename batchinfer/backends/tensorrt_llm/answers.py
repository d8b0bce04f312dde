"""Answers: what tensorrt_llm gives back, as an Output. ``token_ids`` include a final stop token, ``text`` does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from batchinfer.engine.text import Text
from batchinfer.request import Output, SamplingParams


class Answers:
    """The text of a model's completions, and where they end.

    Args:
        eos_token_ids: those of the model.
        tokenizer: that of the opened LLM, which knows the EOS that it stops at; None if it has none.
    """

    def __init__(self, tokenizer_dir: Path, eos_token_ids: Sequence[int], tokenizer: Any) -> None:
        own = getattr(tokenizer, "eos_token_id", None)
        self.eos_token_ids = tuple(dict.fromkeys((*([] if own is None else [int(own)]), *eos_token_ids)))
        self._text = Text(tokenizer_dir)

    def output(
        self,
        token_ids: Sequence[int],
        finish_reason: Literal["stop", "length"],
        stop_reason: int | str | None,
        sampling: SamplingParams,
    ) -> Output:
        ids = list(token_ids)
        silent = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.eos_token_ids)}
        if finish_reason == "stop" and not (ids and ids[-1] in silent):
            # Whether the token that it stopped at comes back differs between its samplers.
            if isinstance(stop_reason, int):
                ids.append(stop_reason)
            elif stop_reason is None:
                ids += self.eos_token_ids[:1]
        if sampling.stop and (end := self._spelled(ids, sampling.stop)) is not None:
            ids, finish_reason = ids[:end], "stop"
        said = ids[:-1] if finish_reason == "stop" and ids and ids[-1] in silent else ids
        return Output(self._text.decode(said, sampling.stop), ids, finish_reason)

    def _spelled(self, ids: list[int], stop: Sequence[str]) -> int | None:
        """How many tokens spell the first stop string to its end; None if none is there.

        tensorrt_llm looks for the tokens of a stop string, so one that is spelled by others runs on.
        """

        def there(count: int) -> bool:
            text = self._text.decode(ids[:count])
            return any(string in text for string in stop)

        if not there(len(ids)):
            return None
        low, high = 1, len(ids)
        while low < high:  # more tokens spell no less
            middle = (low + high) // 2
            low, high = (low, middle) if there(middle) else (middle + 1, high)
        return low
