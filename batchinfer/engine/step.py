"""Step: the tokens that go through the model at once, of all the sequences that have a part in them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from batchinfer.engine.kernels.sampling import SamplingBatch


@dataclass(slots=True)
class StepBatch:
    """The tokens of one step, on the host. ``rows`` below are rows of the table of sequences that run."""

    token_ids: np.ndarray  # int32 [tokens]; -1 stands for the row's token sampled last, which is not known here yet
    positions: np.ndarray  # int32 [tokens]
    slots: np.ndarray  # int32 [tokens] KV slot of each token: page * page_size + offset
    rows: np.ndarray  # int64 [sequences]
    query_starts: np.ndarray  # int32 [sequences + 1]
    context_lens: np.ndarray  # int32 [sequences]
    page_table: np.ndarray  # int32 [sequences, pages]
    extends: np.ndarray  # bool [sequences] it goes on from a token of its own, where it decodes
    sampled: np.ndarray  # int64 [samples] the tokens, by place in this step, whose logits are wanted
    sampled_rows: np.ndarray  # int64 [samples]
    tenancies: np.ndarray  # int64 [samples] which of the sequences that had the row after each other
    sampling: SamplingBatch

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def unknown(self) -> np.ndarray:
        """Places of the tokens that are not known here, which are those of the sequences in the same places."""
        return np.flatnonzero(self.token_ids[: self.singles] < 0)

    @property
    def singles(self) -> int:
        """So many sequences, at the front, have one token in this step."""
        more = np.diff(self.query_starts) != 1
        return int(more.argmax()) if more.any() else len(more)

    def fields(self) -> dict[str, Any]:
        """As a message has them; of the table of histories only the rows that are read."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sampling"}
        how = {f.name: getattr(self.sampling, f.name) for f in fields(self.sampling)}
        if how["all_greedy"]:
            how = {name: value[:0] if isinstance(value, np.ndarray) else value for name, value in how.items()}
        else:
            read = np.flatnonzero(how["repetition_penalty"] != 1)
            rows, longest = how["history_rows"][read], how["history_lens"][read].max(initial=0)
            how["history"] = how["history"][rows, :longest]
            how["history_rows"] = np.zeros_like(how["history_rows"])
            how["history_rows"][read] = np.arange(len(read))
        return told | {f"sampling.{name}": value for name, value in how.items()}

    @classmethod
    def of_fields(cls, told: dict[str, Any]) -> StepBatch:
        how = SamplingBatch(**{f.name: told[f"sampling.{f.name}"] for f in fields(SamplingBatch)})
        return cls(**{f.name: told[f.name] for f in fields(cls) if f.name != "sampling"}, sampling=how)
