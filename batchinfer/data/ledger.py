"""Ledger: what is planned, what is committed, and who may write. The folder OUT.batchinfer/ beside OUT.

    lock, lock.0-of-4 …     flocks of the running processes; they hold pid, host and start (shards.py). In an object
                            store leases that their holders renew (lease.py)
    leases/<epoch>.json     one a run: who, where, since when
    job.json                what decides the completions, written once
    plan-000.parquet        the frozen units and the files they come from (plan.py)
    wal/                    finished rows of unfinished units (journal.py)
    staged/                 written parts that are not committed yet
    commits/<unit>.json     put if absent: the moment at which a unit's rows exist (commits.py)
    retries/001.parquet     rows that are to be answered again, and how (retries.py)
    manifest.json _SUCCESS  only while the output is complete (manifest.py)
    summary.json            the last run, for people and for tools; shards/0-of-4.json … those of shards (report.py)
    runs/<epoch>.jsonl      how each run went, a line every few seconds (series.py)
    prediction.json         what `batchinfer plan --save` expected (estimate.py)

A unit is committed in this order: its part is written under ``staged/`` and fsynced; the commit record is put if
absent; the part is moved into OUT; the unit's log is dropped. So a reader of OUT sees committed rows alone, each once,
even when two runs race (the loser's part never leaves ``staged/``) or the process dies in between (opening the ledger
finishes the move). Rows that are superseded go the same way: the new part has the name of the old one, so that the move
replaces it, and at each moment a reader sees one or the other. Nothing but parts ever lies in OUT, as
``polars.scan_parquet(OUT)`` refuses any other file.

Shards of one job write to one output at the same time, each its own share of the units, also from several hosts. The
first to come writes plan and job.json, the others read them. A shard clears only what an earlier run of it left.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.cache import digest, plain
from batchinfer.data import commits, manifest, plan, retries
from batchinfer.data.commits import Commit
from batchinfer.data.drift import differences
from batchinfer.data.holder import holder
from batchinfer.data.leftovers import leftovers
from batchinfer.data.retries import Retry
from batchinfer.data.shards import Turn
from batchinfer.data.source import Source, Unit
from batchinfer.data.store import Store, open_store
from batchinfer.data.units import pick
from batchinfer.errors import IntegrityError, JobDriftError, LockedError, OutputError, WriteError
from batchinfer.shard import Shard

PATIENCE = 10.0  # seconds that a shard waits for another to have begun the output
FORK = "Undo the change, choose another output.path, or begin beside it with --fork"


class Ledger:
    """One job's control folder, held by this process from ``__enter__`` to ``close``.

    Entering takes the lock, clears what a killed run left half-written, finishes what it committed, and checks the
    commits against the parts on disk.

    Args:
        shard: works on its share of the units alone, beside other shards.

    Raises:
        LockedError: another run holds this output, or this shard of it.
        IntegrityError: a committed part is missing or has another size.
        OutputError: OUT cannot be written, or holds files that are not this job's.

    Attributes:
        output: what people call OUT.
        parts: OUT, and nothing but parts.
        store: OUT.batchinfer/.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        store: Callable[[str], Store] = open_store,
        shard: Shard | None = None,
    ) -> None:
        self.shard = shard
        self.parts = store(os.fspath(output))
        self.output = self.parts.root
        self.store = store(f"{self.output}.batchinfer")
        self.epoch = 0
        self.units: list[Unit] = []
        self.commits: dict[int, Commit] = {}  # the version that counts
        self.retries: list[Retry] = []
        self._picked: list[Unit] | None = None  # rows of the retry that is under way
        self._planned: plan.Files = {}
        self._plans: list[int] = []  # units of each
        self._appended: bytes | None = None  # a further plan, to be written when the run begins
        self.identity: dict[str, Any] | None = None  # job.json; None: this output was not begun

    def __enter__(self) -> Ledger:
        self._lock = Turn(self.store, self.output, self.shard)
        try:
            self._load()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the output free."""
        self._lock.release(leave_trace=self.identity is not None)

    # ---- beginning and resuming

    def begin(self, source: Source, unit_rows: int, semantic: dict[str, Any], operational: dict[str, Any]) -> None:
        """Plan a fresh output, or check that this job continues the one begun.

        Args:
            semantic: decides the completions; may never change.
            operational: kept for later runs to look at; may change.

        Raises:
            JobDriftError: ``semantic`` differs from what the output was begun with.
            OutputError: nothing could be begun; later, WriteErrors are worth another try.
        """
        fresh = self.identity is None
        try:
            self._begin(source, unit_rows, plain(semantic), operational)
        except WriteError as error:
            if fresh:
                raise OutputError(str(error)) from error
            raise

    def _begin(self, source: Source, unit_rows: int, semantic: dict[str, Any], operational: dict[str, Any]) -> None:
        if self.identity is not None:
            self.check_semantic(semantic)
        else:
            self._claim()
            self.units = source.units(unit_rows)
            self._plans = [len(self.units)]
            planned = plan.encode(self.units, source.files)
            self.identity = {"fingerprint": digest(semantic), "semantic": semantic, **operational}
            if self.shard is None:
                self.store.replace(plan.name_of(0), planned)
            else:
                self._begin_together(planned)
                self.check_semantic(semantic)
                self.check_input(source)
        if self.shard is None or self._appended is not None:
            manifest.withdraw(self.store)
        self._write_appended()
        if self.shard is None:
            self.identity = {**self.identity, **operational}
            self.store.replace("job.json", json.dumps(self.identity, indent=1).encode())
        self._take_epoch()

    def begin_retry(self, retry: Retry, source: Source) -> None:
        """Have the rows of a retry answered again: of a new one, which is kept for good, or of the last one."""
        assert self.identity is not None
        manifest.withdraw(self.store)
        if retry.number > len(self.retries):
            self.store.make_folder(retries.FOLDER)
            if not self.store.put_if_absent(retry.name, retry.encode()):
                raise LockedError(f"another run has just begun a retry of {self.output}; run again")
            self.retries.append(retry)
        self.identity = {**self.identity, "retries": [each.told() for each in self.retries]}
        self.store.replace("job.json", json.dumps(self.identity, indent=1).encode())
        self._take_epoch()
        units = ((self.units[index], rows) for index, rows in retry.rows.items())
        self._picked = [pick(unit, rows, source.files) for unit, rows in units]

    def _take_epoch(self) -> None:
        for folder in ("leases", "wal", "staged", "commits"):
            self.store.make_folder(folder)
        for folder in (".", ".."):  # OUT and its control folder, and what is in that, survive a power cut
            self.store.sync(folder)
        lease = json.dumps(holder(self.shard)).encode()
        self.epoch = 1 + max((int(name.split(".")[0]) for name in self.store.list("leases", ".json")), default=0)
        while not self.store.put_if_absent(f"leases/{self.epoch:06d}.json", lease):
            self.epoch += 1

    def check_semantic(self, semantic: dict[str, Any], sections: tuple[str, ...] = (), way_on: str = FORK) -> None:
        """Raises: JobDriftError with a readable difference. ``sections``: compare these top-level keys alone."""
        assert self.identity is not None
        before, now = self.identity["semantic"], plain(semantic)
        if sections:
            before, now = ({k: tree.get(k) for k in sections} for tree in (before, now))
        if changes := list(differences(before, now)):
            raise JobDriftError(
                f"the job differs from the one that {self.output} was begun with:\n  "
                + "\n  ".join(changes)
                + f"\nrows of two jobs would be mixed. {way_on}"
            )

    def check_input(self, source: Source, on_change: str = "error", unit_rows: int = 1024) -> Source:
        """The source to go on with, whose schema is the one that the output was begun with.

        Args:
            on_change: what becomes of files added since then. ``"append"``: units of ``unit_rows`` after the old ones,
                for good once ``begin`` is called; ``"ignore"``: nothing; ``"error"``: a DriftError.

        Raises:
            DriftError: a planned file was changed or removed, whatever ``on_change`` says, or files were added that may
                not be, or have other columns.
        """
        source, added = plan.continued(self._planned, source, on_change)
        if added:
            more = source.only(added)
            units = more.units(unit_rows, taken=self.rows)
            fresh = [replace(unit, index=len(self.units) + unit.index) for unit in units]
            self._appended = plan.encode(fresh, more.files)
            self._plans.append(len(fresh))
            self.units = [*self.units, *fresh]
        return source

    # ---- units and their commits

    @property
    def fingerprint(self) -> str:
        assert self.identity is not None
        return self.identity["fingerprint"]

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)

    @property
    def complete(self) -> bool:
        return self.identity is not None and len(self.commits) == len(self.units)

    @property
    def retry(self) -> Retry | None:
        """The one under way."""
        return None if self._picked is None else self.retries[-1]

    @property
    def share(self) -> list[Unit]:
        """The units that are this run's to see to: all, those of its shard, or the rows of a retry."""
        if self._picked is not None:
            return self._picked
        return self.units if self.shard is None else self.share_of(self.shard)

    def share_of(self, shard: Shard) -> list[Unit]:
        """A shard's units. Each plan is dealt for itself, so that no unit changes hands when files are appended."""
        ends = accumulate(self._plans)
        return [unit for end, size in zip(ends, self._plans) for unit in shard.deal(self.units[end - size : end])]

    def pending(self) -> list[Unit]:
        """Those of its share that it has not committed yet."""
        if self.retry is not None:
            left = set(self.retry.pending(self.commits))
            return [unit for unit in self.share if unit.index in left]
        return [unit for unit in self.share if unit.index not in self.commits]

    def gather(self) -> None:
        """Take note of what other shards have done meanwhile, once this run is done with its own."""
        if self.shard is not None:
            self._load()

    def part_name(self, unit: Unit) -> str:
        """Where a unit's rows go in OUT: beside the input's own partition folders, or where its old ones are."""
        if unit.index in self.commits:
            return self.commits[unit.index].part
        return f"{unit.folder}/part-{unit.index:06d}-{self.epoch}.parquet".lstrip("/")

    def stage(self, unit: Unit, part: bytes) -> None:
        """Write a part where no reader looks."""
        self.store.write(commits.staged(unit.index, self.epoch), part)

    def commit(self, made: list[Commit]) -> None:
        """Make staged units exist. A unit that another run committed first is dropped here, its part thrown away.

        Raises: LockedError if what was to be superseded has been by another run.
        """
        self._lock.check()
        self.store.sync("staged")
        for commit in made:
            if self.store.put_if_absent(commit.name, commit.encode()):
                self._publish(commit)
                self.commits[commit.unit] = commit
                continue
            self.store.remove([commit.staged])
            if commit.version:
                self.check_current(self.commits[commit.unit])
            self.commits[commit.unit] = commits.parse(self.store, commit.name, self.store.read(commit.name))

    def check_current(self, commit: Commit) -> None:
        """Raises: LockedError if another run has superseded it, past a lock that does not hold."""
        if commits.is_taken(self.store, commit.unit, commit.version + 1):
            raise LockedError(f"another run has just superseded rows of {self.parts.path(commit.part)}; run again")

    def verify(self) -> int:
        """Re-read every committed part: checksum and row count; the manifest too. Returns the rows verified.

        Raises: IntegrityError naming everything that is not what was committed.
        """
        problems = []
        for commit in self.commits.values():
            path = self.parts.path(commit.part)
            try:
                data = self.parts.read(commit.part)
                if hashlib.sha256(data).hexdigest() != commit.sha256:
                    problems.append(f"{path}: its bytes are not those committed (sha256 differs)")
                elif pq.read_metadata(pa.BufferReader(data)).num_rows != commit.rows:
                    problems.append(f"{path}: does not hold the {commit.rows} rows committed")
            except OSError as error:
                problems.append(f"{path}: {error.strerror or error}")
        if problems := problems or manifest.problems(self):
            raise IntegrityError("the output is damaged:\n  " + "\n  ".join(problems))
        return sum(commit.rows for commit in self.commits.values())

    # ---- inside

    def _claim(self) -> None:
        """Raises: OutputError if OUT cannot be this job's."""
        try:
            self.parts.claim(self.store)
        except OutputError:
            if self.shard is None or self.store.size(plan.name_of(0)) is None:
                raise  # else another shard has been faster

    def _begin_together(self, planned: bytes) -> None:
        """Begin an output that other shards may be beginning too, or take over what the first of them began.

        Raises: LockedError if one began another plan and nothing followed.
        """
        first = plan.name_of(0)
        if self.store.put_if_absent(first, planned) or self.store.read(first) == planned:
            self.store.put_if_absent("job.json", json.dumps(self.identity, indent=1).encode())
        patience = time.monotonic() + PATIENCE
        while self.store.size("job.json") is None:
            if time.monotonic() > patience:
                raise LockedError(
                    f"another run is beginning {self.output} with other units: {self.store.path(first)} is there, and "
                    f"job.json does not come. Run again; if no run is under way, remove {self.store.root} first"
                )
            time.sleep(0.1)
        self._load()

    def _load(self) -> None:
        committed = commits.names(self.store)  # before the plans, which then have all of their units
        try:
            self.identity = json.loads(self.store.read("job.json"))
            self.units, self._planned, self._plans = plan.read(self.store)
        except FileNotFoundError as error:
            self.identity = None
            if committed:
                raise IntegrityError(f"{error.filename} is missing, and units were committed under it") from None
            return
        except ValueError as error:
            raise IntegrityError(f"{self.store.path('job.json')} is damaged: {error}") from None
        self.commits = commits.read(self.store, committed)
        self.retries = retries.read_all(self.store)
        if stray := self.commits.keys() - range(len(self.units)):
            raise IntegrityError(f"{self.store.root} lacks a plan: unit {min(stray)} is committed and in none")
        self._check_published()
        self._clear()

    def _write_appended(self) -> None:
        if self._appended is None:
            return
        name = plan.name_of(len(self._plans) - 1)
        if not self.store.put_if_absent(name, self._appended) and self.store.read(name) != self._appended:
            raise LockedError(f"another run has just appended input files to {self.output}; run again")
        self._appended = None

    def _check_published(self) -> None:
        """Compare the parts with the commits, and finish moves that a run which died had begun."""
        there, staged = self.parts.walk(), {f"staged/{name}" for name in self.store.list("staged")}
        for commit in self.commits.values():
            if commit.staged in staged and self.store.size(commit.staged) == commit.bytes:
                self._publish(commit)
                continue
            size = there.get(commit.part)
            if size != commit.bytes:
                size = self.parts.size(commit.part)  # another run may have moved it meanwhile
            if size != commit.bytes:
                self.check_current(commit)
                found = "is missing" if size is None else f"has {size} bytes"
                raise IntegrityError(
                    f"{self.parts.path(commit.part)} {found}; {commit.bytes} bytes were committed. Restore it, or "
                    f"start over by deleting {self.output} and {self.store.root}"
                )

    def _publish(self, commit: Commit) -> None:
        """Move a part into OUT, in the place of the version before."""
        try:
            self.store.move(commit.staged, self.parts, commit.part)
        except OutputError:
            if self.store.size(commit.staged) is not None:  # else another run published it for us
                raise

    def left_behind(self) -> Iterator[str]:
        """What dead runs left in the control folder and nobody needs."""
        return leftovers(self.store, self.commits, len(self.retries), self.shard)

    def _clear(self) -> None:
        self.store.remove(self.left_behind())
