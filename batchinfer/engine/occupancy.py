"""Occupancy: how busy the stages of a pipeline are, and what goes between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Occupancy:
    """Adds up what ranks tell about their steps. All times are seconds of ``time.perf_counter``.

    The bubble of a rank is the part of the time with steps under way in which it computed none; waiting for its
    stage's other ranks within a step counts as computing.
    """

    def __init__(self, ranks: int, depth: int) -> None:
        self.busy = [0.0] * ranks  # seconds of each
        self.heads = [0.0] * ranks  # of those, for heads
        self.steps = self.tokens = self.samples = 0  # launched
        self._depth = depth
        self._moving = [0.0] * ranks
        self._bytes, self._bytes_before = [0] * ranks, [0] * ranks
        self._under_way = 0
        self._since = 0.0  # when the number under way last changed
        self._wall = self._slots = 0.0  # seconds with steps under way, and those times how many

    def anew(self) -> Occupancy:
        """One that has counted nothing yet, of the same ranks, which go on counting their bytes."""
        later = Occupancy(len(self.busy), self._depth)
        later._bytes, later._bytes_before = list(self._bytes), self._bytes
        return later

    def launched(self, tokens: int, samples: int, now: float) -> None:
        self._move(1, now)
        self.steps += 1
        self.tokens += tokens
        self.samples += samples

    def returned(self, now: float) -> None:
        self._move(-1, now)

    def _move(self, change: int, now: float) -> None:
        if self._under_way:
            self._wall += now - self._since
            self._slots += (now - self._since) * self._under_way
        self._under_way += change
        self._since = now

    def computed(self, rank: int, begun: float, ended: float, sent: int) -> None:
        """It ran a step through its layers.

        Args:
            sent: bytes that the rank has sent to others, since it was started.
        """
        self.busy[rank] += ended - begun
        self._bytes[rank] = sent

    def headed(self, rank: int, begun: float, ended: float, sent: int) -> None:
        """It computed the head of a step, and chose tokens."""
        self.computed(rank, begun, ended, sent)
        self.heads[rank] += ended - begun

    def moved(self, rank: int, begun: float, ended: float) -> None:
        """It sent keys and values, or waited for them and took them in."""
        self._moving[rank] += ended - begun

    def bubbles(self) -> list[float]:
        """Of each rank, 0..1."""
        return [max(0.0, 1 - busy / self._wall) if self._wall else 0.0 for busy in self.busy]

    def details(self, names: Sequence[str]) -> dict[str, Any]:
        """For a summary. ``names`` are those of the ranks."""
        steps, bubbles = max(1, self.steps), self.bubbles()
        moving = {
            name: round(moving / self._wall, 4) for name, moving in zip(names, self._moving) if moving and self._wall
        }
        sent = sum(self._bytes) - sum(self._bytes_before)
        return {
            "bubble": round(sum(bubbles) / len(bubbles), 4),
            "rank_bubbles": {name: round(bubble, 4) for name, bubble in zip(names, bubbles)},
            "rank_step_ms": {name: round(1e3 * busy / steps, 3) for name, busy in zip(names, self.busy)},
            "steps": self.steps,
            "seconds": round(self._wall, 3),
            "most_steps_under_way": self._depth,
            "slot_occupancy": round(self._slots / self._wall / self._depth, 4) if self._wall else 0.0,
            "step_tokens": round(self.tokens / steps, 1),
            "step_samples": round(self.samples / steps, 1),
            "bytes_sent": sent,
            "bytes_sent_per_token": round(sent / max(1, self.tokens), 1),
            **({"rank_moving_pages": moving} if moving else {}),  # shares of the time
        }
