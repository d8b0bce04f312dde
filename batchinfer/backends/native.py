"""NativeBackend: our own engine behind the door."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from batchinfer.job import Job
from batchinfer.request import Completion, Load, Request

if TYPE_CHECKING:
    from batchinfer.engine.engine import Engine


class NativeBackend:
    def __init__(self, engine: Engine) -> None:
        from batchinfer.engine.plan import describe

        self.engine = engine
        self.tokenizer_dir = engine.plan.tokenizer_dir
        self.max_seq_len = engine.plan.limits.seq_len
        self.fingerprint = describe(engine.plan)

    @classmethod
    def open(cls, job: Job, progress: bool = True) -> NativeBackend:
        from batchinfer.data.calibration import prompts
        from batchinfer.engine.engine import Engine

        options = job.engine
        engine = Engine(
            options.plan or job.model.path,
            threads=options.threads,
            kv_cache_gib=options.kv_cache_gib,
            tp=options.tp,
            pp=options.pp,
            pp_partition=options.pp_partition,
            micro_batches=options.micro_batches,
            prefill=(options.prefill_tp, options.prefill_pp) if options.mode == "disaggregated" else None,
            trace=job.report.trace,
            prefix_sharing=options.prefix_sharing,
            rebuild_from=job.model.path if job.build.rebuild else None,
            progress=progress,
            calibration=prompts(job),
            **job.build_options(),
        )
        return cls(engine)

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        return self.engine.generate(requests)

    def load(self) -> Load:
        scheduler, pages, counters = self.engine.scheduler, self.engine.pages, self.engine.counters
        return Load(
            running=scheduler.num_running,
            waiting=len(scheduler.waiting),
            kv_used=pages.held / pages.num_pages,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            completion_tokens=counters.completion_tokens,
            preemptions=scheduler.preemptions,
            steps=counters.steps,
            details=self.engine.stage.details(),
        )

    def close(self) -> None:
        self.engine.close()
