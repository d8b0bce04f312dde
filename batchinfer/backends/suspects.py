"""Suspects: which of the rows that an engine held when it died is the one that kills it."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from batchinfer.request import Request

PARTS = 4  # a group that killed is split into; as many trials as by halves, and half of the deaths
STRIKES = 2  # deaths alone that convict: one may have been anybody's


class Suspects:
    """Tries the rows under way at a death again, in smaller and smaller groups with nothing else at risk.

    Groups are tried in the order in which they were made, so that innocent rows are soon done with. A row that killed
    alone is tried again at once, in a fresh engine with nothing before it. One that hangs a fresh engine is not: that
    costs too much time.
    """

    def __init__(self) -> None:
        self._groups: deque[list[Request]] = deque()
        self._trial: deque[Request] | None = None  # rows still to be sent of the group that is tried
        self._alone = False  # whether that group is a single row
        self._strikes: dict[Hashable, int] = {}

    def __bool__(self) -> bool:
        """Whether anyone is suspected."""
        return self._trial is not None or bool(self._groups)

    def take(self, most: int, idle: bool) -> list[Request] | None:
        """Rows to be tried now, ``most`` of them at most; None when nobody is suspected any more.

        Args:
            idle: the engine holds no row, so that the next group may begin.
        """
        if idle and not self._trial:
            self._trial = deque(self._groups.popleft()) if self._groups else None
            self._alone = self._trial is not None and len(self._trial) == 1
        if self._trial is None:
            return None
        return [self._trial.popleft() for _ in range(min(most, len(self._trial)))]

    def died(self, held: list[Request], fresh: bool, hung: bool) -> Request | None:
        """Suspect the rows that an engine held when it died. Returns the row that is convicted by that, if one is.

        Args:
            fresh: the engine had answered nothing before.
            hung: it was killed since it got nowhere.
        """
        alone, self._alone = self._alone, False
        if self._trial:  # not sent, so not held: innocent of this death
            self._groups.appendleft(list(self._trial))
        self._trial = None
        if alone and held:
            [row] = held
            strikes = self._strikes[row.key] = self._strikes.get(row.key, 0) + 1
            if strikes >= STRIKES or (hung and fresh):
                del self._strikes[row.key]
                return row
            self._groups.appendleft(held)
        elif held:
            size = -(-len(held) // PARTS)
            self._groups.extend(held[i : i + size] for i in range(0, len(held), size))
        return None
