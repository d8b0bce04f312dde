"""Ray: a job on a cluster, one actor an engine, each with a placement group of its own.

An actor is a shard that is dealt its units on the way: it reads its own rows, journals and commits them by itself, and
asks a small queue for more. So machines of different speed end together, and a lost actor or node costs its rows in
flight. Input and output must be where all nodes see them. No row passes through Ray.

An engine that no node can hold spreads over ``ray.nodes`` of them: its group has as many bundles, its ranks are actors
of their own (ray_rank.py), and what feeds it lives beside the first.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from batchinfer.data.journal import Tally
from batchinfer.data.ledger import Ledger
from batchinfer.data.look import look
from batchinfer.data.report import Progress, Summary, summarize, tally_of, write_summary
from batchinfer.data.threads import Deadline, Halt, StopNow, StopSignals
from batchinfer.deadline import ends_at
from batchinfer.errors import BatchInferError, EngineError, ExitCode, JobError
from batchinfer.integrations.ray_rank import Meeting, RankActor
from batchinfer.integrations.unit_queue import UnitQueue
from batchinfer.job import Job
from batchinfer.log import say
from batchinfer.request import Load
from batchinfer.shard import Shard

if TYPE_CHECKING:
    from batchinfer.data.units import Unit

LOCAL = "local"
ASK = 0.2  # seconds between two questions of an engine that has nothing to do
PLACED = 120.0  # seconds that a cluster, which may have to grow, has to find room for an engine


def run_on_ray(job: Job, address: str = LOCAL, progress: bool | None = None) -> Summary:
    """Work through a job as ``runner.run`` does, with engines on a Ray cluster.

    Args:
        address: of a running cluster (``auto``, ``ray://host:10001``), or ``local`` for one on this machine.

    Raises: as ``runner.run``; JobError also if the cluster has no room for an engine.
    """
    if job.job.shard is not None:
        raise JobError("--ray deals the units itself: leave job.shard out")
    if job.ray.nodes > 1 and (job.engine.backend != "native" or job.engine.ranks % job.ray.nodes):
        raise JobError(
            f"ray.nodes = {job.ray.nodes} spreads the ranks of a native engine, as many on each node: expected a "
            f"multiple of {job.ray.nodes}, found {job.engine.ranks} ranks of the {job.engine.backend} engine. Set "
            "engine.tp and engine.pp, or ray.nodes = 1"
        )
    if not ray.is_initialized():
        ray.init(address=None if address == LOCAL else address, include_dashboard=False, log_to_driver=False)
    halt = Halt()
    with StopSignals(halt) as signals, Deadline(halt, ends_at(job.limits.deadline, job.limits.max_time)):
        fleet = Fleet(job, halt)
        try:
            signals.phase = "work"
            return fleet.work(progress)
        except StopNow:
            return fleet.summary()
        finally:
            signals.phase = "end"
            fleet.close()


@dataclass(frozen=True)
class Puller(Shard):
    """A shard that has no units of its own and asks the queue for them."""

    queue: Any = field(compare=False)
    halts: list[Halt] = field(default_factory=list, compare=False)  # the run's, once it has begun

    def __str__(self) -> str:
        return f"engine {self.index}/{self.count}"

    def deal(self, units: Sequence[Unit]) -> list[Unit]:
        return list(units)

    def chunks(self, ledger: Ledger, load: Callable[[], Load], halt: Halt) -> Iterator[list[Unit]]:
        self.halts.append(halt)
        known = set(ledger.commits)
        ray.get(self.queue.offer.remote([unit.index for unit in ledger.pending()]))
        while not halt.now:
            fresh = ledger.commits.keys() - known
            known |= fresh
            tally = tally_of(ledger.commits[unit] for unit in fresh)
            units = ray.get(self.queue.pull.remote(self.index, fresh, tally, load()))
            if units is None:
                return
            yield [ledger.units[unit] for unit in units if unit not in known]
            if not units:
                time.sleep(ASK)


class EngineActor:
    """Lives in an actor: one engine, and the run that feeds it."""

    def __init__(self, job: dict[str, Any], shard: Puller) -> None:
        self._job, self._shard = Job.from_dict(job), shard

    def meeting(self) -> Meeting:
        """Where its ranks may come to."""
        return Meeting.here()

    def work(self, meeting: Meeting | None) -> None:
        """``meeting``: where its ranks come to, if those are actors."""
        from batchinfer.runner import run

        os.environ.update(meeting.environment if meeting else {})
        run(self._job, progress=False, shard=self._shard)

    def stop(self, reason: str) -> bool:
        """Finish what is under way and commit. False: it has not begun, ask again."""
        for halt in self._shard.halts:
            halt.stop(reason)
        return bool(self._shard.halts)


class Fleet:
    """The engines of a job: placed, started, counted, started again when they are lost."""

    def __init__(self, job: Job, halt: Halt) -> None:
        self._job, self._halt, self._begun = job, halt, time.perf_counter()
        self._nodes = job.ray.nodes
        self._needs = {"CPU": job.ray.cpus, "GPU": _gpus(job) // self._nodes}  # on each node
        self._count = job.ray.engines or _room(self._needs, self._nodes)
        self._queue = ray.remote(num_cpus=0)(UnitQueue).remote(self._count, 1 + job.ray.restarts)
        self._left = [job.ray.restarts] * self._count
        self._groups: dict[int, Any] = {}
        self._actors: dict[int, Any] = {}
        self._ranks: dict[int, list[Any]] = {}
        self._meetings: dict[int, Any] = {}  # of their engines
        self._serving: dict[Any, tuple[int, int]] = {}  # what a rank's service will come to → engine and rank
        self._stopped: set[int] = set()
        self._tally, self._load, self._telling = Tally(), Load(), False

    def work(self, progress: bool | None) -> Summary:
        """Returns when everything is committed, or what ``halt`` allowed."""
        self._place()
        running = {self._start(engine): engine for engine in range(self._count)}
        error: BaseException | None = None
        with contextlib.ExitStack() as telling:
            while running:
                ended, _ = ray.wait(list(running), timeout=ASK)
                self._revive()
                for reference in ended:
                    engine = running.pop(reference)
                    try:
                        ray.get(reference)
                    except RayActorError:
                        error = error or self._lost(engine)
                        if error is None and not self._halt.stopping and self._left[engine]:
                            self._left[engine] -= 1
                            running[self._start(engine)] = engine
                    except RayTaskError as failed:
                        error = error or failed.cause
                if error is not None:
                    self._halt.stop("an engine failed")
                self._pass_on(running.values())
                self._look(telling, progress)
        if error is not None:
            raise error if isinstance(error, BatchInferError) else EngineError(f"an engine failed: {error}")
        summary = self.summary()
        if summary.state != "complete" and not self._halt.stopping:
            raise EngineError("all engines are lost and no restart is left; run again to go on")
        write_summary(look(self._job.output.path), summary)
        return summary

    def summary(self) -> Summary:
        seconds = time.perf_counter() - self._begun
        limit = self._job.limits.max_failed_fraction
        try:
            ledger = look(self._job.output.path)
        except JobError:  # no engine had begun
            return Summary(self._job.output.path, "stopped", ExitCode.STOPPED, reason=self._halt.reason)
        return summarize(ledger, limit, run=self._tally, seconds=seconds, load=self._load, reason=self._halt.reason)

    def close(self) -> None:
        for actor in [*self._actors.values(), *chain(*self._ranks.values()), self._queue]:
            ray.kill(actor)
        for group in self._groups.values():
            remove_placement_group(group)

    def _place(self) -> None:
        """Raises: JobError if the cluster has no room."""
        bundle = {name: amount for name, amount in self._needs.items() if amount}
        for engine in range(self._count):
            self._groups[engine] = placement_group([bundle] * self._nodes, strategy="PACK")
        try:
            ray.get([group.ready() for group in self._groups.values()], timeout=PLACED)
        except GetTimeoutError:
            raise JobError(
                f"the cluster has no room for {self._count} engines of {self._nodes} × {bundle}: it has "
                f"{ray.cluster_resources()}. Set ray.engines, ray.nodes or ray.cpus, or add nodes"
            ) from None

    def _start(self, engine: int) -> Any:
        """Start an engine, and its work. Returns what the work will come to."""
        spread = self._nodes > 1
        actor = ray.remote(EngineActor).options(
            num_cpus=self._needs["CPU"],
            num_gpus=0 if spread else self._needs["GPU"],
            max_concurrency=2,  # so that it can be stopped while it works
            scheduling_strategy=self._place_of(engine, 0),
        )
        shard = Puller(engine, self._count, self._queue)
        self._actors[engine] = actor.remote(self._job.model_dump(mode="json"), shard)
        self._stopped.discard(engine)
        meeting = self._start_ranks(engine) if spread else None
        return self._actors[engine].work.remote(meeting)

    def _start_ranks(self, engine: int) -> Any:
        """Start an engine's ranks anew. Returns where they will meet it."""
        for rank in self._ranks.get(engine, ()):
            ray.kill(rank)
        self._serving = {service: whose for service, whose in self._serving.items() if whose[0] != engine}
        self._meetings[engine] = self._actors[engine].meeting.remote()
        ranks = self._job.engine.ranks
        self._ranks[engine] = []
        for rank in range(ranks):
            actor = ray.remote(RankActor).options(
                num_cpus=0,
                num_gpus=int(self._needs["GPU"] > 0),
                max_restarts=-1,
                scheduling_strategy=self._place_of(engine, rank * self._nodes // ranks),
            )
            self._ranks[engine].append(actor.remote())
            self._serve(engine, rank)
        return self._meetings[engine]

    def _serve(self, engine: int, rank: int) -> None:
        service = self._ranks[engine][rank].serve.remote(rank, self._meetings[engine])
        self._serving[service] = engine, rank

    def _revive(self) -> None:
        """Lost ranks come back, and are told again where to go."""
        if self._serving:
            ended, _ = ray.wait(list(self._serving), num_returns=len(self._serving), timeout=0)
            for service in ended:
                self._serve(*self._serving.pop(service))

    def _place_of(self, engine: int, node: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._groups[engine], placement_group_bundle_index=node)

    def _lost(self, engine: int) -> EngineError | None:
        """Have the others do what it had. An error: there is no way on."""
        try:
            committed = set(look(self._job.output.path).commits)
        except JobError:
            committed = set()
        try:
            again = ray.get(self._queue.lost.remote(engine, committed))
        except RayTaskError as hopeless:
            return hopeless.cause
        left = f"{len(again)} units are dealt again, {self._left[engine]} restarts left"
        say(f"engine {engine} is lost: {left}", "warning")
        return None

    def _pass_on(self, engines: Iterable[int]) -> None:
        """Tell engines to stop, each once it has begun."""
        if not self._halt.stopping:
            return
        for engine in set(engines) - self._stopped:
            with contextlib.suppress(RayActorError, GetTimeoutError):
                if ray.get(self._actors[engine].stop.remote(self._halt.reason), timeout=ASK):
                    self._stopped.add(engine)

    def _look(self, telling: contextlib.ExitStack, progress: bool | None) -> None:
        tally, load = ray.get(self._queue.standing.remote())
        for mine, now in ((self._tally, tally), (self._load, load)):
            for name in mine.__slots__:
                setattr(mine, name, getattr(now, name))
        if progress is not False and not self._telling:
            with contextlib.suppress(JobError):  # the plan is not there yet
                ledger = look(self._job.output.path)
                before = sum(commit.rows for commit in ledger.commits.values()) - self._tally.rows
                told = Progress(
                    ledger.rows,
                    lambda: before + self._tally.rows,
                    self._tally,
                    lambda: self._load,
                    self._job.report.log_seconds,
                    progress,
                )
                telling.enter_context(told)
                self._telling = True


def _gpus(job: Job) -> int:
    """That an engine takes."""
    on_gpu = job.engine.backend != "echo" and job.engine.device != "cpu" and "GPU" in ray.cluster_resources()
    return job.engine.ranks if on_gpu else 0


def _room(needs: dict[str, int], nodes: int) -> int:
    """How many engines fit."""
    has = ray.cluster_resources()
    return max(1, min(int(has.get(name, 0) // amount) // nodes for name, amount in needs.items() if amount))
