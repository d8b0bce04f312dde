"""GpuSteps: steps on a card, without the host in between.

A step costs the host one upload, one launch and, a step later, one look at what came back. The tokens that a step
begins with are those that the last one sampled, and they never leave the card. Steps are CUDA graphs, recorded for a
ladder of sizes; only those that compute so much that launching kernel by kernel is no delay are launched so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from batchinfer.engine.kernels import AttentionBatch, Kernels
from batchinfer.engine.kernels.gpu.sampling import argmax
from batchinfer.engine.model.decoder import Decoder
from batchinfer.engine.profile import Shape
from batchinfer.engine.scheduler import StepBatch

AHEAD = 1  # steps composed before the last one's tokens are known: one hides the host, more only waste more
PREFILLS = 128  # most sequences of a recorded step that have more than a token to compute
LARGEST = 4096  # tokens of a recorded step

Shapes = dict[str, tuple[int, ...]]


class GpuSteps:
    """Recorded steps are padded: with sequences past those counted, tokens without a slot, samples of nobody's row."""

    def __init__(self, decoder: Decoder, caches: list[Tensor], kernels: Kernels, limits: Shape, page_size: int) -> None:
        self._decoder = decoder
        self._caches = caches
        self._kernels = kernels
        self._limits = limits
        rows, device = limits.batch_size, decoder.embedding.device
        self._table_width = -(-limits.seq_len // page_size)
        self._padding = {"slots": -1, "rows": rows, "sampled_rows": rows}
        # By row of the scheduler's table, the token sampled last; the end is where padding samples to.
        self._last = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(rows, dtype=torch.int32, device=device)
        self._logits = decoder.embedding.new_empty(rows, decoder.spec.vocab_size)
        self._inbox = Inbox(3 * limits.step_tokens + rows * (self._table_width + 6), AHEAD + 1, device)
        self._replies = [torch.zeros(rows, dtype=torch.int32, pin_memory=True) for _ in range(AHEAD + 1)]
        self._replied = [torch.cuda.Event() for _ in range(AHEAD + 1)]
        self._launched = 0
        self._pool: tuple[int, int] | None = None
        self._largest = largest = min(LARGEST, limits.step_tokens)
        mixed = [*range(128, min(largest, 2048), 128), *range(2048, largest, 256), largest]
        self._mixed = self._record(mixed, PREFILLS)
        self._decodes = self._record(ladder(rows), 0)

    def launch(self, step: StepBatch) -> Callable[[], np.ndarray]:
        """Begin a step. The result waits for its tokens, int32 ``[samples]``: to be asked before the next but one."""
        self._launched += 1
        samples, prefills = len(step.sampled), len(step.rows) - step.singles
        if step.num_tokens == len(step.rows) == samples:
            rows = self._replay(self._decodes, step, 0)
        elif step.num_tokens <= self._largest and prefills <= PREFILLS:
            rows = self._replay(self._mixed, step, PREFILLS)
        else:
            views = self._inbox.send(_fields(step, mixed=True), None, self._padding, self._launched)
            self._compute(views, step.singles, prefills, int(step.context_lens.max()))
            rows = views["sampled_rows"]
        if not step.sampling.all_greedy:
            self._keep(self._kernels.sample(self._logits[:samples], step.sampling), rows[:samples])
        reply, replied = (each[self._launched % (AHEAD + 1)] for each in (self._replies, self._replied))
        reply[:samples].copy_(self._tokens[:samples], non_blocking=True)
        replied.record()

        def tokens() -> np.ndarray:
            replied.synchronize()
            return reply[:samples].numpy().copy()

        return tokens

    def _replay(self, graphs: Graphs, step: StepBatch, prefills: int) -> Tensor:
        """Run the smallest of ``graphs`` that a step fits in; the rows of its samples."""
        rungs = list(graphs)
        rung = rungs[bisect_left(rungs, step.num_tokens)]
        shapes = self._shapes(rung, prefills)
        views = self._inbox.send(_fields(step, mixed=prefills > 0), shapes, self._padding, self._launched)
        graphs[rung].replay()
        return views.get("sampled_rows", views["rows"])

    def _compute(self, views: dict[str, Tensor], decodes: int, prefills: int, context: int) -> None:
        """A step that has at most so many sequences, of at most so much context; its greedy tokens are kept."""
        token_ids, rows = views["token_ids"], views["rows"]
        decoding = token_ids[: len(rows)]  # among them all that the host does not know
        decoding.copy_(torch.where(decoding < 0, self._last[rows].clamp_(min=0), decoding))
        batch = AttentionBatch(
            positions=views["positions"],
            slots=views["slots"],
            query_starts=views.get("query_starts", rows),  # not read where every sequence has one row
            context_lens=views["context_lens"],
            page_table=views["page_table"],
            max_query_len=len(token_ids) if prefills else 1,
            max_context_len=context,
            decodes=decodes,
            prefills=prefills,
            counts=views["counts"],
        )
        logits = self._decoder.forward(token_ids, batch, self._caches, views.get("sampled"), self._logits)
        if len(logits):
            self._keep(argmax(logits), views.get("sampled_rows", rows))

    def _keep(self, tokens: Tensor, rows: Tensor) -> None:
        self._tokens[: len(tokens)] = tokens
        self._last[rows] = tokens

    def _shapes(self, tokens: int, prefills: int) -> Shapes:
        sequences = min(tokens, self._limits.batch_size)
        shapes = dict.fromkeys(("token_ids", "positions", "slots"), (tokens,))
        shapes |= dict.fromkeys(("rows", "context_lens"), (sequences,))
        shapes |= {"page_table": (sequences, self._table_width), "counts": (2,)}
        if prefills:
            shapes |= dict.fromkeys(("sampled", "sampled_rows"), (sequences,)) | {"query_starts": (sequences + 1,)}
        return shapes

    @torch.inference_mode()
    def _record(self, rungs: list[int], prefills: int) -> Graphs:
        """A graph for each number of tokens; the largest first, so that the others live in its memory."""
        graphs = {}
        stream = torch.cuda.Stream()
        for tokens in reversed(rungs):
            shapes = self._shapes(tokens, prefills)
            views = self._inbox.views(shapes)
            for name, view in views.items():
                view.fill_(self._padding.get(name, 0))
            arguments = views, len(views["rows"]), prefills, self._limits.seq_len
            self._compute(*arguments)  # whatever is compiled or allocated once comes about here
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=self._pool)
                self._compute(*arguments)
                graph.capture_end()
            self._pool = self._pool or graph.pool()
            graphs[tokens] = graph
        return dict(reversed(graphs.items()))


Graphs = dict[int, torch.cuda.CUDAGraph]  # by their number of tokens


class Inbox:
    """One upload a step: arrays side by side in pinned memory, and the memory of the card where they arrive."""

    _ALIGN = 32  # int32s; kernels read 16 bytes at a time

    def __init__(self, size: int, slots: int, device: torch.device) -> None:
        size += 16 * self._ALIGN
        self._outgoing = [torch.zeros(size, dtype=torch.int32, pin_memory=True) for _ in range(slots)]
        self._arrived = torch.zeros(size, dtype=torch.int32, device=device)

    def send(
        self, fields: dict[str, np.ndarray], shapes: Shapes | None, padding: dict[str, int], number: int
    ) -> dict[str, Tensor]:
        """
        Args:
            shapes: where they are larger than the arrays'.
            padding: what fills an array up to its shape, 0 unless given. Tables are not filled up.
            number: of the step; pinned memory is used again after as many steps as there are slots.
        """
        outgoing = self._outgoing[number % len(self._outgoing)]
        memory = outgoing.numpy()
        shapes = shapes or {name: array.shape for name, array in fields.items()}
        end = 0
        for name, (start, end) in self._places(shapes).items():
            array, target = fields[name], memory[start:end].reshape(shapes[name])
            if array.ndim == 1:
                target[: len(array)] = array
                target[len(array) :] = padding.get(name, 0)
            else:
                target[: len(array), : array.shape[1]] = array
        self._arrived[:end].copy_(outgoing[:end], non_blocking=True)
        return self.views(shapes)

    def views(self, shapes: Shapes) -> dict[str, Tensor]:
        places = self._places(shapes)
        return {name: self._arrived[slice(*places[name])].view(shape) for name, shape in shapes.items()}

    def _places(self, shapes: Shapes) -> dict[str, tuple[int, int]]:
        places, start = {}, 0
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            places[name] = start, start + size
            start += -(-size // self._ALIGN) * self._ALIGN
        return places


def _fields(step: StepBatch, mixed: bool) -> dict[str, np.ndarray]:
    names = ["token_ids", "positions", "slots", "rows", "context_lens", "page_table"]
    names += ["sampled", "sampled_rows", "query_starts"] if mixed else []
    counts = np.array([step.singles, len(step.rows)], np.int32)
    return {name: getattr(step, name) for name in names} | {"counts": counts}


def ladder(most: int) -> list[int]:
    """Batch sizes to record: little padding at any size, few at large ones."""
    rungs = [1, 2, 4, 8, *range(16, 128, 16), *range(128, 256, 32), *range(256, most, 64)]
    return [rung for rung in rungs if rung < most] + [most]
