"""GpuSteps: steps on a card, without the host in between.

A step costs the host one upload, one launch and, a step later, one look at what came back. The tokens that a step
begins with are those that the last one sampled, and they never leave the card. Steps are CUDA graphs, recorded for a
ladder of sizes; only those that compute so much that launching kernel by kernel is no delay are launched so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchinfer.engine.comm import Peers
from batchinfer.engine.kernels import AttentionBatch, Kernels
from batchinfer.engine.kernels.attention import SHARERS, shared_pages
from batchinfer.engine.kernels.gpu.sampling import argmax
from batchinfer.engine.model.decoder import Decoder
from batchinfer.engine.profile import Shape
from batchinfer.engine.scheduler import AHEAD
from batchinfer.engine.step import StepBatch

PREFILLS = 128  # most sequences of a recorded step that have more than a token to compute
LARGEST = 4096  # tokens of a recorded step
SHARING = 128  # sequences from which on it pays to look for pages that neighbours share

Shapes = dict[str, tuple[int, ...]]


class GpuSteps:
    """Recorded steps are padded: with sequences past those counted, tokens without a slot, samples of nobody's row.

    Of steps with prompts few tokens are sampled: what comes after the last layer's attention is recorded apart, for a
    ladder of numbers of samples.

    A rank that holds a part of the model takes and gives the residual stream; sums over its peers are recorded too.
    """

    def __init__(
        self, decoder: Decoder, caches: list[Tensor], kernels: Kernels, limits: Shape, page_size: int, peers: Peers
    ) -> None:
        self._decoder = decoder
        self._caches = caches
        self._kernels = kernels
        self._limits = limits
        self._page_size = page_size
        self._peers = peers
        shard, rows, device = decoder.shard, limits.batch_size, decoder.cos_sin.device
        self._whole = shard.first and shard.last and shard.tp == 1
        self._table_width = -(-limits.seq_len // page_size)
        self._padding = {"slots": -1, "rows": rows, "sampled_rows": rows}
        self._inbox = Inbox(3 * limits.step_tokens + rows * (self._table_width + 7), AHEAD + 1, device)
        self._largest = largest = min(LARGEST, limits.step_tokens)
        if shard.first:  # by row of the scheduler's table, the token sampled last; padding samples to the end
            self._last = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        if self._whole:
            self._tokens = torch.zeros(rows, dtype=torch.int32, device=device)
            self._replies = [torch.zeros(rows, dtype=torch.int32, pin_memory=True) for _ in range(AHEAD + 1)]
            self._replied = [torch.cuda.Event() for _ in range(AHEAD + 1)]
        self._residual = torch.zeros(largest, shard.spec.hidden_size, dtype=torch.float32, device=device)
        self._logits = None
        if shard.last:
            self._logits = torch.empty(rows, len(shard.vocabulary), dtype=decoder.dtype, device=device)
        self._launched = 0
        self._pool: tuple[int, int] | None = None
        mixed = [*range(128, min(largest, 2048), 128), *range(2048, largest, 256), largest]
        self._samples = ladder(min(rows, largest))
        self._mixed = self._record(mixed, PREFILLS)
        self._finishes = self._record_finishes() if shard.last else {}
        self._decodes = self._record(ladder(rows), 0)

    def launch(self, step: StepBatch) -> Callable[[], np.ndarray]:
        """Begin a step. The result waits for its tokens, int32 ``[samples]``: to be asked before the next but one."""
        views, _ = self._run(step, None)
        samples, rows = len(step.sampled), views.get("sampled_rows", views["rows"])
        if not step.sampling.all_greedy:
            self._keep(self._kernels.sample(self._logits[:samples], step.sampling), rows[:samples])
        reply, replied = (each[self._launched % (AHEAD + 1)] for each in (self._replies, self._replied))
        reply[:samples].copy_(self._tokens[:samples], non_blocking=True)
        replied.record()

        def tokens() -> np.ndarray:
            replied.synchronize()
            return reply[:samples].numpy().copy()

        return tokens

    def forward(self, step: StepBatch, inputs: Tensor | None) -> Tensor:
        """A part of a model: what ``Decoder.forward`` gives. Logits are to be read before the next step.

        Args:
            inputs: the residual stream; None for the first layers, which begin with the step's tokens.
        """
        _, out = self._run(step, inputs)
        if self._decoder.shard.last:
            return out[: len(step.sampled)]
        return out[: step.num_tokens].clone()  # may be on its way to another rank while the next step is computed

    def learn(self, rows: np.ndarray, tokens: Tensor) -> None:
        """Keep the tokens that another rank sampled for ``rows``: what a step leaves out is these."""
        self._last[torch.from_numpy(rows).to(self._last.device, non_blocking=True)] = tokens

    def _run(self, step: StepBatch, inputs: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """What was uploaded, and what the layers gave."""
        self._launched += 1
        prefills = len(step.rows) - step.singles
        if step.num_tokens == len(step.rows) == len(step.sampled):
            return self._replay(self._decodes, step, 0, inputs)
        if step.num_tokens <= self._largest and prefills <= PREFILLS:
            return self._replay(self._mixed, step, PREFILLS, inputs)
        fields = self._fields(step)
        shapes = {name: field.shape for name, field in fields.items()}
        if samples := len(step.sampled):
            # As many as some recorded step has: the library loads a product's kernel when it is first used, and that
            # waits for the whole GPU, while nobody gets to know what is done.
            samples = _rung(ladder(self._limits.batch_size), samples)
            shapes |= dict.fromkeys(("sampled", "sampled_rows"), (samples,))
        views = self._inbox.send(fields, shapes, self._padding, self._launched)
        return views, self._compute(views, step.singles, prefills, int(step.context_lens.max()), inputs)

    def _replay(
        self, graphs: Graphs, step: StepBatch, prefills: int, inputs: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Run the smallest of ``graphs`` that a step fits in, and what follows it for those that are sampled."""
        rung = _rung(list(graphs), step.num_tokens)
        views = self._inbox.send(self._fields(step), self._shapes(rung, prefills), self._padding, self._launched)
        if inputs is not None:
            self._residual[: len(inputs)] = inputs
        out = self._play(graphs[rung])
        if prefills and self._finishes:
            if not len(step.sampled):
                return views, self._logits[:0]
            out = self._play(self._finishes[_rung(list(self._finishes), len(step.sampled))])
        return views, out

    def _play(self, recorded: Recorded) -> Tensor:
        recorded.graph.replay()
        self._peers.sent += recorded.sent
        return recorded.out

    def _compute(
        self, views: dict[str, Tensor], decodes: int, prefills: int, context: int, inputs: Tensor | None
    ) -> Tensor:
        """A step that has at most so many sequences, of at most so much context; a whole model's tokens are kept.

        The first layers fill in the tokens that the host did not know.
        """
        residual = self._begin(views) if inputs is None else inputs
        batch = self._batch(views, decodes, prefills, context)
        attended = self._decoder.attend(residual, batch, self._caches)
        return self._finish(residual, attended, views.get("sampled"), views.get("sampled_rows", views["rows"]))

    def _begin(self, views: dict[str, Tensor]) -> Tensor:
        """The residual stream of the first layers."""
        token_ids, rows = views["token_ids"], views["rows"]
        decoding = token_ids[: len(rows)]  # among them all that the host does not know
        decoding.copy_(torch.where(decoding < 0, self._last[rows].clamp_(min=0), decoding))
        return self._decoder.embed(token_ids)

    def _batch(self, views: dict[str, Tensor], decodes: int, prefills: int, context: int) -> AttentionBatch:
        return AttentionBatch(
            positions=views["positions"],
            slots=views["slots"],
            query_starts=views.get("query_starts", views["rows"]),  # not read where every sequence has one row
            context_lens=views["context_lens"],
            page_table=views["page_table"],
            max_query_len=len(views["token_ids"]) if prefills else 1,
            max_context_len=context,
            decodes=decodes,
            prefills=prefills,
            counts=views["counts"],
            shared=views.get("shared"),
        )

    def _finish(self, residual: Tensor, attended: Tensor, sampled: Tensor | None, rows: Tensor) -> Tensor:
        out = self._decoder.finish(residual, attended, sampled, self._logits)
        if self._whole and len(out):
            self._keep(argmax(out), rows)
        return out

    def _keep(self, tokens: Tensor, rows: Tensor) -> None:
        self._tokens[: len(tokens)] = tokens
        self._last[rows] = tokens

    def _shapes(self, tokens: int, prefills: int) -> Shapes:
        sequences = min(tokens, self._limits.batch_size)
        # In front, where whatever finishes a step finds them.
        shapes = dict.fromkeys(("sampled", "sampled_rows"), (self._samples[-1],)) if prefills else {}
        shapes |= dict.fromkeys(("token_ids", "positions", "slots"), (tokens,))
        shapes |= dict.fromkeys(("rows", "context_lens"), (sequences,))
        shapes |= {"page_table": (sequences, self._table_width), "counts": (2,)}
        if sequences >= SHARING:
            shapes["shared"] = (-(-sequences // SHARERS),)
        if prefills:
            shapes["query_starts"] = (sequences + 1,)
        return shapes

    def _fields(self, step: StepBatch) -> dict[str, np.ndarray]:
        names = ["token_ids", "positions", "slots", "rows", "context_lens", "page_table"]
        names += ["sampled", "sampled_rows", "query_starts"]
        fields = {name: getattr(step, name) for name in names}
        fields["counts"] = np.array([step.singles, len(step.rows)], np.int32)
        if step.singles >= SHARING:
            alone = slice(step.singles)
            fields["shared"] = shared_pages(step.page_table[alone], step.context_lens[alone], self._page_size)
        return fields

    @torch.inference_mode()
    def _record(self, rungs: list[int], prefills: int) -> Graphs:
        """A graph for each number of tokens; of the last layers with prompts, what comes before ``_finishes``."""

        def work(tokens: int) -> Callable[[], Tensor]:
            views, shard = self._inbox.views(self._shapes(tokens, prefills)), self._decoder.shard
            for name, view in views.items():
                view.fill_(self._padding.get(name, 0))
            sequences, residual = len(views["rows"]), self._residual[:tokens]
            if not (prefills and shard.last):
                inputs = None if shard.first else residual
                return lambda: self._compute(views, sequences, prefills, self._limits.seq_len, inputs)
            batch = self._batch(views, sequences, prefills, self._limits.seq_len)

            def attend() -> Tensor:
                if shard.first:
                    residual.copy_(self._begin(views))
                return self._decoder.attend(residual, batch, self._caches)

            return attend

        return self._record_each(rungs, work)

    @torch.inference_mode()
    def _record_finishes(self) -> Graphs:
        """For each number of samples what they need after the last layer's attention, which no other token does."""
        views = self._inbox.views(self._shapes(self._largest, PREFILLS))
        attended = self._mixed[self._largest].out

        def work(samples: int) -> Callable[[], Tensor]:
            sampled, rows = views["sampled"][:samples], views["sampled_rows"][:samples]
            sampled.zero_()
            rows.fill_(self._padding["rows"])
            return lambda: self._finish(self._residual, attended, sampled, rows)

        return self._record_each(self._samples, work)

    def _record_each(self, rungs: list[int], work: Callable[[int], Callable[[], Tensor]]) -> Graphs:
        """The largest first, so that the others live in its memory."""
        graphs, stream = {}, torch.cuda.Stream()
        for rung in reversed(rungs):
            ready = work(rung)
            ready()  # whatever is compiled or allocated once comes about here
            torch.cuda.synchronize()
            graph, sent = torch.cuda.CUDAGraph(), self._peers.sent
            with torch.cuda.stream(stream):
                # Others of this process's threads, which watch over its peers, may go on asking the card.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                out = ready()
                graph.capture_end()
            self._pool = self._pool or graph.pool()
            graphs[rung] = Recorded(graph, out, self._peers.sent - sent)
            self._peers.sent = sent
        return dict(reversed(graphs.items()))


@dataclass(frozen=True, slots=True)
class Recorded:
    graph: torch.cuda.CUDAGraph
    out: Tensor  # what the layers give, in the same memory every time
    sent: int  # bytes that go to peers


Graphs = dict[int, Recorded]  # by their number of tokens, or samples


class Inbox:
    """One upload a step: arrays side by side in pinned memory, and the memory of the card where they arrive."""

    _ALIGN = 32  # int32s; kernels read 16 bytes at a time

    def __init__(self, size: int, slots: int, device: torch.device) -> None:
        size += 16 * self._ALIGN
        self._outgoing = [torch.zeros(size, dtype=torch.int32, pin_memory=True) for _ in range(slots)]
        self._gone = [torch.cuda.Event() for _ in range(slots)]
        self._arrived = torch.zeros(size, dtype=torch.int32, device=device)

    def send(
        self, fields: dict[str, np.ndarray], shapes: Shapes, padding: dict[str, int], number: int
    ) -> dict[str, Tensor]:
        """
        Args:
            shapes: may be larger than the arrays'.
            padding: what fills an array, there or not, up to its shape, 0 unless given. Tables are not filled up.
            number: of the step; pinned memory is used again after as many steps as there are slots.
        """
        outgoing, gone = (each[number % len(self._outgoing)] for each in (self._outgoing, self._gone))
        gone.synchronize()
        memory = outgoing.numpy()
        end = 0
        for name, (start, end) in self._places(shapes).items():
            target = memory[start:end].reshape(shapes[name])
            array = fields.get(name, target[:0])
            if array.ndim == 1:
                target[: len(array)] = array
                target[len(array) :] = padding.get(name, 0)
            else:
                target[: len(array), : array.shape[1]] = array
        self._arrived[:end].copy_(outgoing[:end], non_blocking=True)
        gone.record()
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


def _rung(rungs: list[int], least: int) -> int:
    return rungs[bisect_left(rungs, least)]


def ladder(most: int) -> list[int]:
    """Batch sizes to record: little padding at any size, few at large ones."""
    rungs = [1, 2, 4, 8, *range(16, 128, 16), *range(128, 256, 32), *range(256, most, 64)]
    return [rung for rung in rungs if rung < most] + [most]
