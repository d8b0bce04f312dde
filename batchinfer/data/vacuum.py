"""Vacuum: remove what killed runs left behind and no commit refers to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchinfer.data.commits import Commit
from batchinfer.data.ledger import Ledger
from batchinfer.data.leftovers import lives
from batchinfer.data.look import look
from batchinfer.words import counted

PART = re.compile(r"part-\d+-\d+\.parquet")  # Ledger.part_name


@dataclass
class Vacuumed:
    """What was removed, or would be."""

    output: Path | str
    dry_run: bool
    files: dict[str, int] = field(default_factory=dict)  # path → bytes
    foreign: list[str] = field(default_factory=list)  # files in OUT that are nobody's parts; they stay

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "output": str(self.output), "bytes": sum(self.files.values())}

    def __str__(self) -> str:
        lines = list(self.files)
        lines += [f"{path} stays: batchinfer did not write it" for path in self.foreign]
        verb, size = "would remove" if self.dry_run else "removed", sum(self.files.values())
        removed = f"{verb} {counted(len(self.files), 'file')}, {counted(size, 'byte')}"
        done = removed if self.files else "nothing to remove"
        return "\n".join([*lines, f"{done} · {self.output}"])


def vacuum(output: str | os.PathLike[str], dry_run: bool = False) -> Vacuumed:
    """Remove parts that were never committed, staged parts, logs of committed units, half-written control files and all
    leases but the last. What a later run may need stays.

    Args:
        dry_run: change nothing.

    Raises:
        JobError: no job was begun there.
        LockedError: a run holds the output.
        IntegrityError: a committed part is missing or has another size; nothing is removed, as a stray file may be it.
    """
    look(output)
    with _Resting(output) as ledger:
        done = Vacuumed(ledger.output, dry_run)
        committed = {commit.part for commit in ledger.commits.values()}
        stray = {name: size for name, size in ledger.parts.walk().items() if name not in committed}
        done.foreign = [str(ledger.parts.path(name)) for name in stray if not PART.fullmatch(name.rpartition("/")[2])]
        stray = {name: size for name, size in stray.items() if PART.fullmatch(name.rpartition("/")[2])}
        left = {name: ledger.store.size(name) or 0 for name in ledger.left_behind()}
        for store, files in ((ledger.parts, stray), (ledger.store, left)):
            done.files |= {str(store.path(name)): size for name, size in files.items()}
            if not dry_run:
                store.remove(files, strict=True)
    return done


class _Resting(Ledger):
    """A ledger that is held and left as it is."""

    def __init__(self, output: str | os.PathLike[str]) -> None:
        super().__init__(output)
        self._due: set[str] = set()  # staged parts that the next run will move into OUT

    def _publish(self, commit: Commit) -> None:
        self._due.add(commit.staged)

    def _clear(self) -> None:
        """For ``left_behind``."""

    def left_behind(self) -> Iterator[str]:
        yield from (name for name in super().left_behind() if name not in self._due)
        *old, _ = self.store.list("leases", ".json") or [""]  # the last says which epoch is next
        yield from (f"leases/{name}" for name in old if not lives(self.store, name))
