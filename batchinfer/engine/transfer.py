"""KV transfer: prompts are computed by some ranks and decoded by others, and their pages follow.

Pages have one number everywhere, so that nothing but their content is moved. Sequences that go on from a token of their
own decode; all others are prompts, or are computed again, in steps of their own. The pages that such a step writes to
are sent as soon as it is computed, while the next one is. The decoding ranks take them in when the engine has the
step's tokens, before the first step that may read them: until then they decode others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from batchinfer.engine.comm import Peers
from batchinfer.engine.layout import Piece
from batchinfer.engine.stage import Stage
from batchinfer.engine.step import StepBatch

PIECE_BYTES = 4 << 20  # about what goes in one tensor: large enough to be fast, small enough to be on its way soon
GPU_PIECE_BYTES = 256 << 20  # what a link carries while a few kernels are launched


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
    """A piece of ``pages``, some pages at a time: where they lie, and which pages."""
    views = stage.kv_views(piece.layers, piece.kv_heads)
    if stage.device.type == "cuda":
        views = [view.view(torch.int64) for view in views]  # as wide as a thread can copy it
    elif views[0].dtype.itemsize == 1:  # not every operation knows FP8
        views = [view.view(torch.uint8) for view in views]
    most = max(1, (GPU_PIECE_BYTES if stage.device.type == "cuda" else PIECE_BYTES) // page_bytes(views))
    for first in range(0, len(pages), most):
        yield views, torch.from_numpy(pages[first : first + most].astype(np.int64)).to(stage.device)


def page_bytes(views: list[Tensor]) -> int:
    return sum(view[0].numel() * view.dtype.itemsize for view in views)
