"""Random batches for the kernel tests: mixed prefill and decode, shared pages, poisoned memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from batchinfer.engine.kernels import AttentionBatch, SamplingBatch
from batchinfer.engine.kernels.attention import shared_pages


@dataclass
class Sequences:
    """Sequences with their pages, fed in steps: ``contexts`` are final lengths, ``queries`` the last step's rows."""

    contexts: list[int]
    queries: list[int]
    page_size: int
    pages: list[list[int]]
    num_pages: int

    @classmethod
    def random(
        cls, rng: np.random.Generator, contexts: list[int], queries: list[int], page_size: int, spare: int = 3
    ) -> Sequences:
        counts = [-(-c // page_size) for c in contexts]
        order = rng.permutation(sum(counts) + spare).tolist()
        pages = [[order.pop() for _ in range(count)] for count in counts]
        return cls(contexts, queries, page_size, pages, sum(counts) + spare)

    def step(self, starts: list[int], ends: list[int]) -> AttentionBatch:
        """Rows for positions ``starts[s]:ends[s]`` of each sequence; a sequence without rows is left out."""
        active = [s for s in range(len(starts)) if ends[s] > starts[s]]
        lengths = [ends[s] - starts[s] for s in active]
        positions = np.concatenate([np.arange(starts[s], ends[s]) for s in active])
        slots = [self.pages[s][p // self.page_size] * self.page_size + p % self.page_size
                 for s in active for p in range(starts[s], ends[s])]  # fmt: skip
        table = np.full((len(active), 3 + max(len(p) for p in self.pages)), 2**30, np.int32)  # garbage past the end
        for row, s in enumerate(active):
            table[row, : -(-ends[s] // self.page_size)] = self.pages[s][: -(-ends[s] // self.page_size)]

        decodes = next((s for s, length in enumerate(lengths) if length > 1), len(lengths))

        def ints(values: object) -> torch.Tensor:
            return torch.tensor(np.asarray(values, np.int32))

        contexts = np.array([ends[s] for s in active])
        shared = shared_pages(table[:decodes], contexts[:decodes], self.page_size) if decodes else None
        return AttentionBatch(
            positions=ints(positions),
            slots=ints(slots),
            query_starts=ints(np.cumsum([0, *lengths])),
            context_lens=ints(contexts),
            page_table=ints(table)[:, :-2],
            max_query_len=max(lengths),
            max_context_len=int(contexts.max()),
            decodes=decodes,
            prefills=len(active) - decodes,
            counts=ints([decodes, len(active)]),
            shared=None if shared is None else ints(shared),
        )

    def history(self) -> AttentionBatch:
        """Everything before the last step, as one prefill."""
        return self.step([0] * len(self.contexts), [c - q for c, q in zip(self.contexts, self.queries)])

    def last(self) -> AttentionBatch:
        return self.step([c - q for c, q in zip(self.contexts, self.queries)], self.contexts)


def rope_table(head_dim: int, length: int, theta: float = 10000.0) -> torch.Tensor:
    """float32 ``[length, head_dim]``: cosines, then sines."""
    angles = torch.outer(torch.arange(length).float(), theta ** (-torch.arange(0, head_dim, 2).float() / head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def sampling_batch(rows: int, **columns: object) -> SamplingBatch:
    """Every filter off unless named; a scalar stands for every row."""
    defaults: dict[str, tuple[type, object]] = {
        "temperature": (np.float32, 0), "top_k": (np.int32, 0), "top_p": (np.float32, 1), "min_p": (np.float32, 0),
        "repetition_penalty": (np.float32, 1), "seed": (np.int64, 0), "index": (np.int32, 0), "position": (np.int64, 0),
        "history_rows": (np.int32, 0), "history_lens": (np.int32, 0),
    }  # fmt: skip
    history = columns.pop("history", np.zeros((1, 1), np.int32))
    values = {name: np.full(rows, 0, dtype) + np.asarray(columns.pop(name, default), dtype)
              for name, (dtype, default) in defaults.items()}  # fmt: skip
    assert not columns, columns
    greedy = bool((values["temperature"] == 0).all() and (values["repetition_penalty"] == 1).all())
    return SamplingBatch(**values, history=history, all_greedy=greedy)
