"""TensorRTBackend: requests in flight on one event loop, and what comes back in our words.

``LLM.generate`` would submit every prompt at once and die with the first bad one. Here at most ``WINDOW`` batches are
in flight, each request is checked before it can reach the executor, where a burst of bad ones would shut it down, and
every wait has an end. What a request is to blame for is its own error; everything else ends ``generate``, and who runs
this process starts a new one and finds out which request it was.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from batchinfer.backends.base import Isolation
from batchinfer.backends.tensorrt_llm.answers import Answers
from batchinfer.backends.tensorrt_llm.arguments import (
    check,
    environment,
    llm_arguments,
    sampling_arguments,
    seeds_decide,
)
from batchinfer.backends.tensorrt_llm.build import fingerprint, prepared
from batchinfer.backends.tensorrt_llm.plan import TensorRTPlan, explain, model_folder
from batchinfer.backends.tensorrt_llm.versions import installed, needed
from batchinfer.cache import cache_root
from batchinfer.deadline import seconds
from batchinfer.errors import EngineError, ModelError
from batchinfer.job import Job
from batchinfer.request import Completion, Load, Output, Request

WINDOW = 3  # batches in flight: one runs, the others keep the scheduler's choice wide and its queue from running dry
PATIENCE = 0.01  # seconds to wait for results when no request is ready
SHUTDOWN = 30.0  # seconds that an orderly end may take; it has been seen to take an hour

_ROW_ERRORS = (ValueError, TypeError, AssertionError, IndexError)
# Errors of the whole device come wrapped as errors of the request that met them first. Out of memory is not among them:
# the executor gives up that request and goes on.
_FATAL = re.compile(
    r"illegal (memory access|address|instruction)|device-side assert|misaligned address|uncorrectable|no.?device|"
    r"launch (failure|timeout)|unspecified launch|cudaErrorUnknown|nvlink|nccl|peer.*lost",
    re.IGNORECASE,
)
_END = object()


class RowFailed(Exception):
    """One request has no answer, and the engine lives."""

    def __init__(self, message: str, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class TensorRTBackend:
    def __init__(self, llm: Any, plan: TensorRTPlan, job: Job, fingerprint: dict[str, Any]) -> None:
        """
        Args:
            llm: an opened ``tensorrt_llm.LLM``.
        """
        import tensorrt_llm

        self.tokenizer_dir, self.max_seq_len = plan.tokenizer_dir, plan.profile.seq_len
        self.fingerprint = fingerprint
        self._llm = llm
        # With its last reference gone the executor swallows errors and waits for ever.
        self._executor = getattr(llm, "_executor", None)
        self._params = tensorrt_llm.SamplingParams
        self._guide = _guide(job)
        self._answers = Answers(plan.tokenizer_dir, plan.eos_token_ids, getattr(llm, "tokenizer", None))
        self._vocabulary = plan.vocab_size
        self._batch_size = plan.profile.batch_size
        self._timeout = seconds(job.limits.engine_timeout)
        self._loop = asyncio.new_event_loop()
        self._ready: deque[Completion] = deque()
        self._fatal: BaseException | None = None
        self._wake = asyncio.Event()
        self._abandoned = False  # whether the engine may still answer what nobody waits for
        self._in_flight = 0  # completions asked for and not yet there
        self._heard = time.monotonic()  # when the engine last gave a result
        self._counts = Load()

    @classmethod
    def check(cls, job: Job) -> None:
        """Nothing need be installed. Raises: JobError, ModelError as ``open``, where it can be told before."""
        check(job, installed())
        if job.engine.plan is None:
            model_folder(job.model.path)

    @classmethod
    def isolation(cls, job: Job) -> Isolation:
        """Raises: JobError, ModelError as ``open``, where it can be told before a process is started."""
        check(job, needed())
        scrub, environ = environment(job, os.environ, cache_root(), f"b{os.getpid()}")
        return Isolation(scrub, environ, job.engine.tensorrt.recycle_rows)

    @classmethod
    def open(cls, job: Job, progress: bool = True) -> TensorRTBackend:
        """
        Raises:
            JobError, ModelError: the job, the model or its plan does not fit this version or machine.
            EngineError: tensorrt_llm failed in a way that is not known here.
        """
        release = needed()
        check(job, release)
        plan = prepared(job, release)
        if progress and not seeds_decide(job, release):
            print(
                f"batchinfer: {release} draws rows of a batch together: another run may draw other tokens",
                file=sys.stderr,
            )
        arguments = llm_arguments(job, release, plan.checkpoint, plan.profile)
        try:
            llm = _llm_class(job)(**arguments)
        except Exception as error:
            if line := explain(error, release):
                raise ModelError(line) from error
            raise EngineError(f"{release} cannot load {plan.checkpoint}: {_one_line(error)}") from error
        return cls(llm, plan, job, fingerprint(job, plan, release))

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        tasks: set[asyncio.Task[None]] = set()
        exhausted, most = False, WINDOW * self._batch_size
        try:
            while not (exhausted and not tasks and not self._ready):
                waiting = False
                while not exhausted and not waiting and self._in_flight < most:
                    request = next(requests, _END)
                    exhausted, waiting = request is _END, request is None
                    if isinstance(request, Request):
                        if not tasks:
                            self._heard = time.monotonic()  # it had nothing to say
                        self._in_flight += request.sampling.n
                        task = self._loop.create_task(self._serve(request))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
                if tasks:
                    self._loop.run_until_complete(self._wait(PATIENCE if waiting else self._timeout))
                while self._ready:
                    yield self._ready.popleft()
                if self._fatal is not None:
                    raise EngineError(f"TensorRT-LLM failed: {_one_line(self._fatal)}") from self._fatal
                if tasks and time.monotonic() - self._heard > self._timeout:
                    raise EngineError(f"TensorRT-LLM gave no result for {self._timeout:g} s (limits.engine_timeout)")
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                self._abandoned = True
                self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._ready.clear()
            self._in_flight = 0

    def load(self) -> Load:
        running = min(self._in_flight, self._batch_size)
        return replace(self._counts, running=running, waiting=self._in_flight - running)

    def close(self) -> None:
        """An orderly end, if it comes in time; what is left is the process's to end."""
        ending = threading.Thread(target=self._llm.shutdown, name="batchinfer-shutdown", daemon=True)
        ending.start()
        ending.join(SHUTDOWN)
        if not ending.is_alive() and not self._abandoned:
            self._loop.close()  # with requests pending this would break the thread that hands results over

    # -- one request ----------------------------------------------------------------------------------------------

    async def _wait(self, patience: float) -> None:
        """Until something came back, or for that long."""
        try:
            await asyncio.wait_for(self._wake.wait(), patience)
        except asyncio.TimeoutError:
            return
        self._wake.clear()

    async def _serve(self, request: Request) -> None:
        """Answer a request, or end everything: whatever comes out of this goes to ``generate``."""
        key, prompt = request.key, request.prompt_token_ids
        n = request.sampling.n
        try:
            if (objection := self._objection(prompt)) is not None:
                raise RowFailed(objection)
            ids = [int(token) for token in prompt]  # it asserts Python's own ints
            done = await asyncio.gather(*(self._complete(ids, request, i) for i in range(n)), return_exceptions=True)
            # A row that is to blame says so even if another of its completions met a worse end because of it.
            for error in sorted((d for d in done if isinstance(d, BaseException)), key=_gravity):
                raise error
            outputs, cached = tuple(output for output, _ in done), sum(cached for _, cached in done)
            counts = self._counts
            counts.prompt_tokens += len(ids)
            counts.cached_tokens += cached
            counts.completion_tokens += sum(len(output.token_ids) for output in outputs)
            self._ready.append(Completion(key, outputs, len(ids), cached))
        except RowFailed as failure:
            completion = Completion(key, prompt_tokens=len(prompt), error=str(failure), retryable=failure.retryable)
            self._ready.append(completion)
        except Exception as error:
            self._fatal = self._fatal or error
        finally:
            self._in_flight -= n
            self._wake.set()

    def _objection(self, prompt: Any) -> str | None:
        """Why a prompt must not be submitted: the executor would take some of it for an error of its own."""
        if not len(prompt):
            return "the prompt is empty: expected at least one token"
        if len(prompt) >= self.max_seq_len:
            return (
                f"the prompt has {len(prompt)} tokens, the engine's profile takes at most {self.max_seq_len - 1}: "
                "raise engine.profile.seq_len or shorten it"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self._vocabulary:
            return f"the prompt has token id {low if low < 0 else high}, the model knows 0 to {self._vocabulary - 1}"
        return None

    async def _complete(self, ids: list[int], request: Request, index: int) -> tuple[Output, int]:
        """The ``index``-th completion of a request, and how many of its prompt tokens were cached.

        Raises:
            RowFailed: it is this request's own failure, or may do well another time.
            Exception: the engine is of no more use.
        """
        sampling = request.sampling
        arguments = sampling_arguments(sampling, index, self._answers.eos_token_ids)
        result = None
        try:
            # A fresh object each time, as submitting writes into it.
            params = self._params(**arguments, **({"guided_decoding": self._guide()} if self._guide else {}))
            result = self._llm.generate_async(ids, sampling_params=params)
            # Twice as long as all of them together may be silent: this one is lost while others are answered.
            await asyncio.wait_for(result.aresult(), 2 * self._timeout)
        except asyncio.TimeoutError:
            result.abort()
            raise RowFailed(f"no answer within {2 * self._timeout:g} s", retryable=True) from None
        except asyncio.CancelledError:
            if result is not None:
                result.abort()
            raise
        except Exception as error:  # the last word on this request, even if it says that it is finished
            if not self._lives_after(error):
                raise
            self._heard = time.monotonic()
            raise RowFailed(f"TensorRT-LLM refuses the request: {_one_line(error)}") from error
        self._heard = time.monotonic()
        [said] = result.outputs
        if said.finish_reason == "cancelled":
            raise RowFailed("TensorRT-LLM cancelled the request", retryable=True)
        if said.finish_reason not in ("stop", "length"):
            raise RowFailed(f"TensorRT-LLM ended the request early: {said.finish_reason or 'no finish reason'}")
        output = self._answers.output(said.token_ids, said.finish_reason, said.stop_reason, sampling)
        return output, getattr(result, "cached_tokens", None) or 0

    def _lives_after(self, error: Exception) -> bool:
        """Whether an error is that request's alone."""
        own = isinstance(error, _ROW_ERRORS) or any(c.__name__ == "RequestError" for c in type(error).__mro__)
        down = self._executor is not None and self._executor.is_shutdown()
        return own and not down and not _FATAL.search(str(error))


def _llm_class(job: Job) -> Any:
    if job.engine.tensorrt.flavour == "engine":
        from tensorrt_llm._tensorrt_engine import LLM
    else:
        from tensorrt_llm import LLM
    return LLM


def _guide(job: Job) -> Any:
    """Makes the guide of each completion; None where completions are free."""
    schema = job.engine.tensorrt.guided_json
    if schema is None:
        return None
    from tensorrt_llm.llmapi import GuidedDecodingParams

    return lambda: GuidedDecodingParams(json=schema)


def _gravity(error: BaseException) -> bool:
    return not isinstance(error, RowFailed)


def _one_line(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:500]}" if said else type(error).__name__
