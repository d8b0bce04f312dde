"""UnitQueue: which engine of a cluster does which unit, decided while they work."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence

from batchinfer.data.journal import Tally
from batchinfer.errors import EngineError
from batchinfer.request import Load

SPREAD = 3  # an engine gets the 3rd part of its fair share at a time, less and less towards the end


class UnitQueue:
    """Deals units to engines that ask for some. What an engine had and did not commit is dealt again when it is lost.

    Knows numbers of units alone: rows go from the input to the engine that computes them and from there to the output.

    Args:
        attempts: engines that a unit may be lost with before the job is given up.
    """

    def __init__(self, engines: int, attempts: int) -> None:
        self._engines, self._attempts = engines, attempts
        self._waiting: list[int] | None = None  # ascending; None: nobody has said yet what is to be done
        self._dealt: dict[int, int] = {}  # unit → engine
        self._lost: Counter[int] = Counter()
        self._tally = Tally()
        self._loads: dict[int, Load] = {}

    def offer(self, pending: Sequence[int]) -> None:
        """What is to be done, as an engine found it. The first one's word counts, as all see the same plan."""
        if self._waiting is None:
            self._waiting = sorted(pending)

    def pull(self, engine: int, committed: Collection[int], tally: Tally, load: Load) -> list[int] | None:
        """Units for an engine that has room: neighbours, which are read in one pass. Empty: ask again later, as others
        may be lost; None: everything is committed.

        Args:
            committed: what the engine has committed since it last asked, and ``tally`` counts its rows.
        """
        for unit in committed:
            self._dealt.pop(unit, None)
        _add(self._tally, tally)
        self._loads[engine] = load
        if self._waiting is None or not self._waiting:
            return [] if self._waiting is None or self._dealt else None
        count = max(1, len(self._waiting) // (SPREAD * self._engines))
        units, self._waiting = self._waiting[:count], self._waiting[count:]
        self._dealt.update(dict.fromkeys(units, engine))
        return units

    def lost(self, engine: int, committed: Collection[int]) -> list[int]:
        """Deal again what an engine had. Returns those units.

        Args:
            committed: all units of which there is a commit, as the engine may have died before it could tell.

        Raises: EngineError if a unit has been lost too often.
        """
        self._loads.pop(engine, None)
        had = [unit for unit, whose in self._dealt.items() if whose == engine]
        for unit in had:
            del self._dealt[unit]
        again = [unit for unit in had if unit not in committed]
        self._lost.update(again)
        for unit in again:
            if self._lost[unit] >= self._attempts:
                raise EngineError(
                    f"{self._lost[unit]} engines died while they had unit {unit}, the last one number {engine}; the "
                    "cluster's logs say how. Run again to go on"
                )
        self._waiting = sorted([*(self._waiting or ()), *again])
        return again

    def standing(self) -> tuple[Tally, Load]:
        """What the engines have committed, and what they are at, all together."""
        load = Load()
        for one in self._loads.values():
            for name in ("running", "waiting", "prompt_tokens", "cached_tokens", "completion_tokens", "preemptions"):
                setattr(load, name, getattr(load, name) + getattr(one, name))
            load.kv_used += one.kv_used / len(self._loads)
            for name in ("restarts", "quarantined"):  # of their processes
                load.details[name] = load.details.get(name, 0) + one.details.get(name, 0)
        return self._tally, dataclasses.replace(load)


def _add(total: Tally, more: Tally) -> None:
    for name in ("rows", "failed", "prompt_tokens", "completion_tokens"):
        setattr(total, name, getattr(total, name) + getattr(more, name))
    total.finish_reasons.update(more.finish_reasons)
    total.failures.update(more.failures)
