"""KV transfer: prompts are computed by some ranks and decoded by others, and their pages follow.

Pages have one number everywhere, so that nothing but their content is moved. A step is split in two: sequences that
go on from a token of their own decode; all others are prompts, or are computed again. The pages that the second part
writes to are sent as soon as it is computed, while the next step is. The decoding ranks take them in between this step
and the next, which is the first that may read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from batchinfer.engine.comm import Peers
from batchinfer.engine.kernels import SamplingBatch
from batchinfer.engine.layout import Piece
from batchinfer.engine.scheduler import StepBatch
from batchinfer.engine.stage import Stage

PIECE_BYTES = 4 << 20  # about what goes in one tensor: large enough to be fast, small enough to be on its way soon
GPU_PIECE_BYTES = 64 << 20  # each layer of it is a kernel's launch, which takes as long as copying megabytes


def split(step: StepBatch, chosen: np.ndarray) -> StepBatch | None:
    """The part of a step that is about the sequences ``chosen`` (bool); None if it is about none of them."""
    if not chosen.any():
        return None
    counts = np.diff(step.query_starts)
    tokens = np.repeat(chosen, counts)
    samples = tokens[step.sampled]
    return StepBatch(
        token_ids=step.token_ids[tokens],
        positions=step.positions[tokens],
        slots=step.slots[tokens],
        rows=step.rows[chosen],
        query_starts=np.concatenate([[0], np.cumsum(counts[chosen])]).astype(np.int32),
        context_lens=step.context_lens[chosen],
        page_table=step.page_table[chosen],
        extends=step.extends[chosen],
        sampled=(np.cumsum(tokens) - 1)[step.sampled[samples]],
        sampled_rows=step.sampled_rows[samples],
        tenancies=step.tenancies[samples],
        sampling=_choose(step.sampling, samples),
    )


def _choose(how: SamplingBatch, samples: np.ndarray) -> SamplingBatch:
    whole = {"history", "all_greedy"}
    return replace(how, **{f.name: getattr(how, f.name)[samples] for f in fields(how) if f.name not in whole})


def pages_of(step: StepBatch, page_size: int) -> np.ndarray:
    """The pages that a step writes to, int32, each once."""
    return np.unique(step.slots // page_size).astype(np.int32)


def send_pages(stage: Stage, peers: Peers, pieces: Sequence[Piece], pages: np.ndarray) -> None:
    """Begin to send this rank's share of ``pages`` to all who need a piece of it."""
    for piece in pieces:
        for views, numbers in _parcels(stage, piece, pages):
            peers.send(piece.target, torch.stack([view[numbers] for view in views]))


def expect_pages(stage: Stage, peers: Peers, pieces: Sequence[Piece], pages: np.ndarray) -> None:
    """Begin to receive what ``send_pages`` sends."""
    for piece in pieces:
        for views, numbers in _parcels(stage, piece, pages):
            shape = (len(views), len(numbers), *views[0].shape[1:])
            peers.expect(piece.source, shape, views[0].dtype)


def take_pages(stage: Stage, peers: Peers, pieces: Sequence[Piece], pages: np.ndarray) -> None:
    """Put what was expected into this rank's pages."""
    for piece in pieces:
        for views, numbers in _parcels(stage, piece, pages):
            for view, content in zip(views, peers.receive(piece.source), strict=True):
                view[numbers] = content


def _parcels(stage: Stage, piece: Piece, pages: np.ndarray) -> Iterator[tuple[list[Tensor], Tensor]]:
    """A piece of ``pages``, some pages at a time: where its layers lie, and which pages."""
    views = stage.kv_views(piece.layers, piece.kv_heads)
    if views[0].dtype.itemsize == 1:  # not every operation knows FP8
        views = [view.view(torch.uint8) for view in views]
    most = max(1, (GPU_PIECE_BYTES if stage.device.type == "cuda" else PIECE_BYTES) // page_bytes(views))
    for first in range(0, len(pages), most):
        yield views, torch.from_numpy(pages[first : first + most].astype(np.int64)).to(stage.device)


def page_bytes(views: list[Tensor]) -> int:
    return sum(view[0].numel() * view.dtype.itemsize for view in views)
