"""Peers: how a rank reaches the others. Stage hops and sums over a stage's ranks, each wait with a deadline.

Ranks on one machine's CPU share memory; between machines there is gloo, between GPUs NCCL.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from batchinfer.engine.kernels.cpu.library import library
from batchinfer.engine.layout import World
from batchinfer.errors import EngineError

SPIN_SECONDS = 50e-6  # about what a sleeper takes to wake
_MOST_SENDING = 8  # tensors that are kept until gloo is asked whether they have gone: it does not tell by itself


class Peers(Protocol):
    """The ranks beside this one. Tensors between two ranks arrive in the order in which they were sent."""

    on_this_device: int  # ranks that live on the same memory, this one included
    sent: int  # bytes that went to others, those of sums and gatherings included

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over this stage's ranks, the same bits on each. ``x`` may be overwritten."""

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        """The columns of this stage's ranks beside each other, the ``r``-th has ``widths[r]``. For the first alone."""

    def send(self, to: int, x: Tensor) -> None:
        """Begin to send; ``x`` must not be changed any more."""

    def expect(self, sender: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Begin to receive what ``sender`` sends next, so that it travels while something else is computed."""

    def receive(self, sender: int) -> Tensor:
        """What was expected of ``sender`` first; it may be changed in place until the next ``receive``."""


class Alone:
    """One rank has no peers."""

    on_this_device = 1
    sent = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


ALONE = Alone()


class Arena:
    """Memory that several processes map; each takes its parts in the same order, so that all agree on the places."""

    ALIGNMENT = 128  # two cache lines: processors fetch them in pairs

    def __init__(self, memory: np.ndarray | None = None) -> None:
        """
        Args:
            memory: uint8; without it only the need is counted, in ``used``.
        """
        self.memory = memory
        self.used = 0

    def take(self, size: int) -> Tensor:
        start = self.used
        self.used += -(-size // self.ALIGNMENT) * self.ALIGNMENT
        if self.memory is None:
            return torch.empty(0, dtype=torch.uint8)
        return torch.from_numpy(self.memory[start : start + size])


class Counter:
    """A number in shared memory that one process raises and others wait for."""

    def __init__(self, arena: Arena, owner: str, deadline: float) -> None:
        self._word = arena.take(4)
        self._address = self._word.data_ptr()
        self._owner = owner
        self._deadline = deadline
        operators = library()
        self._raise, self._wait = operators.raise_to, operators.wait_for

    def raise_to(self, value: int) -> None:
        """Whoever sees ``value`` sees everything written before."""
        self._raise(self._address, value & 0xFFFFFFFF)

    def wait_for(self, value: int) -> None:
        """
        Raises:
            EngineError: the owner did not come so far before the deadline.
        """
        if not self._wait(self._address, value & 0xFFFFFFFF, SPIN_SECONDS, self._deadline):
            raise EngineError(f"{self._owner} was silent for {self._deadline:g} s")


class Ring:
    """Slots of shared memory from one rank to another: the sender goes on while the receiver is busy."""

    def __init__(self, arena: Arena, sender: int, receiver: int, slots: int, slot_bytes: int, deadline: float) -> None:
        self._written = Counter(arena, f"rank {sender}", deadline)
        self._freed = Counter(arena, f"rank {receiver}", deadline)
        self._slots = [arena.take(slot_bytes) for _ in range(slots)]
        self._expected: deque[tuple[tuple[int, ...], torch.dtype]] = deque()
        self._sent = self._received = 0

    def send(self, x: Tensor) -> None:
        self._freed.wait_for(self._sent + 1 - len(self._slots))
        _view(self._slots[self._sent % len(self._slots)], x.shape, x.dtype).copy_(x)
        self._sent += 1
        self._written.raise_to(self._sent)

    def expect(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._expected.append((shape, dtype))

    def receive(self) -> Tensor:
        self._freed.raise_to(self._received)  # what was received before is done with
        slot = self._slots[self._received % len(self._slots)]
        self._received += 1
        self._written.wait_for(self._received)
        return _view(slot, *self._expected.popleft())


class Seat:
    """One rank's place at its stage's table: two buffers in turn, and how many it has filled.

    Two are enough: a rank fills a buffer again only when all have filled the other, and so have read this one.
    """

    def __init__(self, arena: Arena, rank: int, size: int, deadline: float) -> None:
        self.filled = Counter(arena, f"rank {rank}", deadline)
        self.buffers = [arena.take(size), arena.take(size)]


@dataclass(frozen=True)
class Sizes:
    """Of what ranks exchange in shared memory."""

    slots: int  # tensors that may be under way from a rank to another
    hop_bytes: int  # the largest tensor of a hop
    token_bytes: int  # the tokens of a step, or what they are chosen from
    team_bytes: int  # the largest tensor of a sum or a gathering
    piece_bytes: int  # the largest tensor of keys and values


class SharedPeers:
    """Ranks on one machine's CPU, through shared memory."""

    def __init__(
        self,
        arena: Arena,
        world: World,
        transfers: Iterable[tuple[int, int]],
        rank: int,
        deadline: float,
        sizes: Sizes,
    ) -> None:
        """
        Args:
            transfers: pairs of ranks that keys and values go between.
        """
        self.on_this_device = world.size
        self.sent = 0
        self._rank = rank
        links = dict.fromkeys(world.hops(), sizes.hop_bytes) | dict.fromkeys(world.feedback(), sizes.token_bytes)
        links |= dict.fromkeys(transfers, sizes.piece_bytes)
        self._rings = {(a, b): Ring(arena, a, b, sizes.slots, size, deadline) for (a, b), size in links.items()}
        teams = {r: world.layout(r).team(r) for r in range(world.size)}
        seats = [Seat(arena, r, sizes.team_bytes if len(teams[r]) > 1 else 0, deadline) for r in teams]
        self._seat, self._table = seats[rank], [seats[r] for r in teams[rank]]
        self._meetings = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        return functools.reduce(torch.add, self._meet(x, [x.shape] * len(self._table)))

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        parts = self._meet(x, [(len(x), width) for width in widths])
        return torch.cat(parts, dim=1) if self._seat is self._table[0] else None

    def _meet(self, x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Everyone's tensor, good until the next meeting."""
        buffer = self._meetings % 2
        self._meetings += 1
        self.sent += x.nbytes * (len(self._table) - 1)
        _view(self._seat.buffers[buffer], x.shape, x.dtype).copy_(x)
        self._seat.filled.raise_to(self._meetings)
        parts = []
        for seat, shape in zip(self._table, shapes, strict=True):
            seat.filled.wait_for(self._meetings)
            parts.append(_view(seat.buffers[buffer], shape, x.dtype))
        return parts

    def send(self, to: int, x: Tensor) -> None:
        self.sent += x.nbytes
        self._rings[self._rank, to].send(x)

    def expect(self, sender: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._rings[sender, self._rank].expect(shape, dtype)

    def receive(self, sender: int) -> Tensor:
        return self._rings[sender, self._rank].receive()


class DistributedPeers:
    """Ranks of torch.distributed: NCCL between GPUs, gloo between CPUs of several machines."""

    on_this_device = 1

    def __init__(self, world: World, rank: int, deadline: float, store: dist.Store, device: torch.device) -> None:
        self._device = device
        backend = "nccl" if device.type == "cuda" else "gloo"
        patience = timedelta(seconds=deadline)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world.size, timeout=patience)
        self._team = None
        for team in dict.fromkeys(world.layout(r).team(r) for r in range(world.size)):
            if len(team) > 1:  # every rank takes part in making every group
                group = dist.new_group(list(team), timeout=patience)
                self._team = group if rank in team else self._team
        # NCCL keeps the order of what two ranks send each other in one group: tokens would wait for hops and they for
        # tokens.
        pairs = world.feedback()
        group = dist.new_group(sorted({r for pair in pairs for r in pair}), timeout=patience) if pairs else None
        self._feedback = dict.fromkeys(pairs, group)
        self.sent = 0
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()
        self._expected: dict[int, deque[Callable[[], tuple[dist.Work, Tensor]]]] = defaultdict(deque)
        if backend == "nccl":  # makes a connection at its first use, for which both ends wait: now, all in one order
            for sender, receiver in [*world.hops(), *self._feedback]:
                if rank in (sender, receiver):
                    self._greet(sender, receiver)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.sent += x.nbytes * (dist.get_world_size(self._team) - 1)
        dist.all_reduce(x, group=self._team)
        return x

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        self.sent += x.nbytes
        padded = torch.nn.functional.pad(x, (0, max(widths) - x.shape[1]))
        first = dist.get_group_rank(self._team, dist.get_rank()) == 0
        parts = [torch.empty_like(padded) for _ in widths] if first else None
        dist.gather(padded, parts, group=self._team, group_dst=0)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths)], dim=1) if first else None

    def send(self, to: int, x: Tensor) -> None:
        self.sent += x.nbytes
        while self._sending and (self._sending[0][0].is_completed() or len(self._sending) >= _MOST_SENDING):
            self._sending.popleft()[0].wait()
        self._sending.append((dist.isend(x, to, self._feedback.get((dist.get_rank(), to))), x))

    def expect(self, sender: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        begin = functools.cache(functools.partial(self._begin, sender, shape, dtype))
        if self._device.type != "cuda":
            begin()
        # On a GPU what waits for a sender keeps all that waits for the whole GPU, as a kernel's first launch may, from
        # going on, and the sender may be waiting for that. Begun in its turn it is still ahead of the computation.
        self._expected[sender].append(begin)

    def receive(self, sender: int) -> Tensor:
        work, x = self._expected[sender].popleft()()
        work.wait()
        return x

    def _begin(self, sender: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dist.Work, Tensor]:
        x = torch.empty(shape, dtype=dtype, device=self._device)
        return dist.irecv(x, sender, self._feedback.get((sender, dist.get_rank()))), x

    def _greet(self, sender: int, receiver: int) -> None:
        x, group = torch.zeros(1, device=self._device), self._feedback.get((sender, receiver))
        if dist.get_rank() == sender:
            dist.send(x, receiver, group)
        else:
            dist.recv(x, sender, group)


def _view(memory: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size = int(np.prod(shape)) * dtype.itemsize
    if size > len(memory):
        raise EngineError(f"a tensor of {size} bytes does not fit the {len(memory)} that ranks share for it")
    return memory[:size].view(dtype).view(tuple(shape))
