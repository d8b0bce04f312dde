"""Engine: a plan, opened. Requests in, completions out, in whatever order they finish."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchinfer.engine.balance import check_partition
from batchinfer.engine.build import build, rebuild
from batchinfer.engine.kv_cache import PagePool
from batchinfer.engine.pipeline import Pipeline
from batchinfer.engine.plan import EnginePlan, versions
from batchinfer.engine.profile import Profile, Shape, in_order
from batchinfer.engine.rows import Sequence
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.stage import Stage, Tokens
from batchinfer.engine.step import StepBatch
from batchinfer.engine.text import Text
from batchinfer.engine.trace import ENGINE, Trace
from batchinfer.errors import EngineError, ModelError, StalePlanError
from batchinfer.host import available_cores, give_back_memory
from batchinfer.request import Completion, Output, Request, SamplingParams

_INTAKE = 8  # steps' worth of prompts, taken in while one is computed: more takes longer than a step of a stage does

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counters:
    """Totals since the engine was opened."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    schedule_seconds: float = 0.0  # composing steps
    compute_seconds: float = 0.0  # running them, sampling included; on a GPU launching them and waiting for tokens
    collect_seconds: float = 0.0  # taking in their tokens; text of finished requests

    def copy(self) -> Counters:
        return replace(self)

    def minus(self, earlier: Counters) -> Counters:
        return Counters(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))


@dataclass(slots=True, eq=False)
class _Entry:
    """A request under way: its sequences end one by one."""

    request: Request
    sequences: list[Sequence] = field(default_factory=list)
    unfinished: int = 0


class Engine:
    """Large-batch generation on this machine, for as many requests as the iterator brings.

    >>> engine = Engine("smollm2-135m-instruct")
    >>> for completion in engine.generate(["The capital of France is"], SamplingParams(max_tokens=8)):
    ...     print(completion.outputs[0].text)
    """

    def __init__(
        self,
        model: str | Path | EnginePlan,
        *,
        threads: int = 0,
        kv_cache_gib: float = 0.0,
        tp: int = 1,
        pp: int = 1,
        pp_partition: tuple[int, ...] = (),
        micro_batches: int = 0,
        prefill: tuple[int, int] | None = None,
        prefix_sharing: bool = True,
        trace: str | Path | None = None,
        rebuild_from: str | None = None,
        **build_options: Any,
    ) -> None:
        """
        Args:
            model: an EnginePlan, the folder of one, or anything that ``build`` takes; then it is built into the cache.
            threads: CPU threads of a rank, 0 for an even share of the cores this process may use.
            kv_cache_gib: memory of a rank for KV pages, 0 for what the profile can use.
            tp: ranks that share each layer. More ranks than one are processes of their own.
            pp: stages that the layers are dealt to.
            pp_partition: layers of each stage; none given: dealt by measured time.
            micro_batches: steps under way at once in the stages, 0 for one a stage.
            prefill: tp and pp of further ranks that compute prompts and send the keys and values to the others.
            prefix_sharing: share KV pages between requests that begin alike.
            trace: a file to write when the engine is closed, for ui.perfetto.dev: what ran where and when.
            rebuild_from: the model to build a plan of again, in its place, if it is another device's or version's.
            build_options: passed to ``build``.

        Raises:
            ModelError: the model or plan cannot be used here.
        """
        self.plan = open_plan(model, rebuild_from, **build_options)
        self.trace = Trace() if trace else None
        self._trace_file = trace
        if tp * pp == 1 and prefill is None:
            torch.set_num_threads(threads or available_cores())
            self.stage: Stage | Pipeline = Stage(self.plan, kv_cache_gib)
        else:
            check_partition(self.plan, pp, pp_partition)
            self.stage = Pipeline(
                self.plan,
                tp,
                pp,
                pp_partition,
                prefill,
                kv_cache_gib=kv_cache_gib,
                threads=threads,
                micro_batches=micro_batches,
                trace=self.trace,
            )
        self.text = Text(self.plan.tokenizer_dir)
        give_back_memory()  # reading a tokenizer takes twice what is left of it
        self.prefix_sharing = prefix_sharing
        self.counters = Counters()
        self._generating = False
        self._forget()

    def generate(
        self,
        prompts: Iterable[Request | str | list[int] | None],
        sampling: SamplingParams = SamplingParams(),
    ) -> Iterator[Completion]:
        """Complete prompts; yields each as it finishes. Prompts are pulled when there is room for them.

        Args:
            prompts: Requests, or strings or token ids that ``sampling`` applies to, with their index as key. ``None``
                means that nothing is ready yet: the engine goes on with what it has.

        Raises:
            EngineError: another iterator of this engine is under way.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be an iterable of prompts, got one string: put it in a list")
        if self._generating:
            raise EngineError("this engine is generating already: finish or close() the other iterator first")
        source = enumerate(prompts)
        exhausted = False
        self._generating = True
        try:
            while True:
                taken = 0
                while not exhausted and self._has_room() and taken < self._most_taken():
                    try:
                        index, prompt = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    if prompt is None:
                        break
                    request = prompt if isinstance(prompt, Request) else self._request(index, prompt, sampling)
                    token_ids = np.asarray(request.prompt_token_ids)
                    if (error := self._objection(token_ids)) is not None:
                        yield Completion(request.key, prompt_tokens=len(token_ids), error=error)
                    else:
                        self._add(request, token_ids.astype(np.int32))
                        taken += len(token_ids)
                yield from self._step()
                idle = not (self.scheduler.waiting or self.scheduler.num_running or self._under_way)
                if exhausted and idle:
                    return
        except GeneratorExit:  # the caller stops listening, between two steps
            self.scheduler.drop_all()
            raise
        except BaseException:  # inside a step: pages may be published that it never came to compute
            self._forget()
            raise
        finally:
            self._under_way.clear()  # of sequences that have ended: nobody asks for their tokens
            self._generating = False

    def close(self) -> None:
        """Write the trace, and end the ranks that are processes of their own; they would end with this one too."""
        if self.trace is not None:
            self.trace.write(self._trace_file, {ENGINE: "engine", **self.stage.rank_names()})
        self.stage.close()

    def _forget(self) -> None:
        """Begin with an empty page pool and nothing to do."""
        self._under_way: list[tuple[StepBatch, Tokens]] = []  # launched, oldest first
        self.pages = PagePool(self.stage.num_pages)
        self.scheduler = Scheduler(
            self.plan.profiles,
            self.pages,
            self.stage.page_size,
            self.plan.eos_token_ids,
            self.prefix_sharing,
            micro_batches=self.stage.micro_batches,
            ahead=self.stage.ahead,
            prefill_steps=self.stage.prefill_steps,
        )

    # -- intake ---------------------------------------------------------------------------------------------------

    def _has_room(self) -> bool:
        """No more is pulled than may run at once: the rest stays with the caller."""
        scheduler = self.scheduler
        return scheduler.num_running + len(scheduler.waiting) < self.plan.limits.batch_size

    def _most_taken(self) -> float:
        """Prompt tokens to take in before the next step: where others compute meanwhile, they are not to wait long.

        So they begin with the first step's worth, and have a step under way by the time that the rest is known.
        """
        if self.stage.micro_batches + self.stage.ahead == 1:
            return float("inf")
        return self.plan.limits.step_tokens * (_INTAKE if self._under_way else 1)

    def _request(self, index: int, prompt: str | list[int], sampling: SamplingParams) -> Request:
        return Request(index, self.text.encode(prompt) if isinstance(prompt, str) else prompt, sampling)

    def _objection(self, token_ids: np.ndarray) -> str | None:
        """Why a prompt cannot be served at all; None when it can."""
        longest, vocabulary = self.plan.limits.seq_len, self.plan.spec.vocab_size
        if not token_ids.size:
            return "the prompt is empty: expected at least one token"
        if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
            return f"the prompt must be a flat list of token ids, got {token_ids.dtype} of shape {token_ids.shape}"
        if len(token_ids) >= longest:
            return (
                f"the prompt has {len(token_ids)} tokens, the engine's widest profile takes at most {longest - 1}: "
                "raise engine.profile.seq_len or shorten it"
            )
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= vocabulary:
            return f"the prompt has token id {low if low < 0 else high}, the model knows 0 to {vocabulary - 1}"
        return None

    def _add(self, request: Request, prompt: np.ndarray) -> None:
        sampling = request.sampling
        entry = _Entry(request, unfinished=sampling.n)
        for index in range(sampling.n):
            sequence = Sequence(
                owner=entry,
                token_ids=prompt,
                prompt_len=len(prompt),
                limit=min(len(prompt) + sampling.max_tokens, self.plan.limits.seq_len),
                sampling=sampling,
                index=index,
                stops=self.text.stop_check(sampling.stop, sampling.stop_token_ids),
                hashes=entry.sequences[0].hashes if index else [],
            )
            entry.sequences.append(sequence)
            self.scheduler.add(sequence)

    # -- the step -------------------------------------------------------------------------------------------------

    def _step(self) -> list[Completion]:
        """Launch one step if there is one, take in another if no more can be under way; the requests that ended."""
        begun = time.perf_counter()
        launched = self.scheduler.schedule()
        scheduled = time.perf_counter()
        if launched is not None:
            self._under_way.append((launched, self.stage.launch(launched)))
        if not self._under_way or (launched is not None and not self.scheduler.full):
            return []
        step, tokens = self._under_way.pop(self.stage.next_done([tokens for _, tokens in self._under_way]))
        token_ids = tokens()
        computed = time.perf_counter()
        ended = map(self._collect, self.scheduler.complete(step, token_ids))
        completions = [completion for completion in ended if completion is not None]
        counters = self.counters
        counters.steps += 1
        counters.schedule_seconds += scheduled - begun
        counters.compute_seconds += computed - scheduled
        counters.collect_seconds += time.perf_counter() - computed
        if self.trace is not None:
            self.trace.add(ENGINE, "schedule", begun, scheduled)
            self.trace.add(ENGINE, "wait for tokens", scheduled, computed, rows=len(token_ids))
            self.trace.add(ENGINE, "collect", computed, time.perf_counter(), finished=len(completions))
        return completions

    def _collect(self, sequence: Sequence) -> Completion | None:
        """The request's completion, if ``sequence`` was the last of it."""
        entry: _Entry = sequence.owner
        entry.unfinished -= 1
        if entry.unfinished:
            return None
        request, prompt_tokens = entry.request, sequence.prompt_len
        cached = sum(s.cached_tokens for s in entry.sequences)
        self.counters.prompt_tokens += prompt_tokens
        self.counters.cached_tokens += cached
        self.counters.completion_tokens += sum(len(s.completion_ids) for s in entry.sequences)
        if any(s.finish_reason == "error" for s in entry.sequences):
            error = "the model's logits were not finite for this prompt"
            # An overflow comes again and costs one more try; a fault of the memory does not.
            return Completion(request.key, prompt_tokens=prompt_tokens, error=error, retryable=True)
        return Completion(request.key, tuple(map(self._output, entry.sequences)), prompt_tokens, cached)

    def _output(self, sequence: Sequence) -> Output:
        token_ids = sequence.completion_ids.tolist()
        sampling = sequence.sampling
        silent = (
            sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *self.plan.eos_token_ids)
        )
        said = token_ids
        if sequence.finish_reason == "stop" and token_ids[-1] in silent:
            said = token_ids[:-1]
        return Output(self.text.decode(said, sampling.stop), token_ids, sequence.finish_reason)


def open_plan(model: str | Path | EnginePlan, rebuild_from: str | None = None, **build_options: Any) -> EnginePlan:
    """
    Raises:
        StalePlanError: ``model`` is a plan of another device or version, and there is nothing to rebuild it from.
        ModelError: ``model`` is a plan already, built with other options than those asked for.
    """
    if not isinstance(model, EnginePlan):
        if not (Path(model).expanduser() / "plan.json").is_file():
            return build(str(model), **build_options)
        try:
            model = EnginePlan.load(model)
        except StalePlanError:
            if rebuild_from is None:
                raise
            return rebuild(rebuild_from, model, **build_options)
    for name, here in versions().items():
        if (then := model.fingerprint.get(name, here)) != here:
            log.warning(
                "%s was built with %s %s, here is %s: build it again to time that", model.path, name, then, here
            )
    for difference in _differences(model, build_options):
        raise ModelError(f"the plan {model.path} was built for {difference}: build another, or do not ask")
    return model


def _differences(plan: EnginePlan, asked: dict[str, Any]) -> Iterator[str]:
    """In words, what is asked for and the plan was not built with."""
    for name in ("device", "dtype", "quantization", "group_size", "kv_dtype"):
        value = getattr(plan, name)
        if asked.get(name, value) not in ("auto", 0, value):
            yield f"{name} {value}, not {asked[name]}"
    profiles = asked.get("profiles") or [{f.name: asked.get(f.name, 0) for f in fields(Shape)}]
    if len(profiles) > 1:
        wanted = in_order(Profile.of(one, plan.device, plan.spec.max_position) for one in profiles)
        if wanted != plan.profiles:
            yield f"{'; '.join(map(str, plan.profiles))}, not {'; '.join(map(str, wanted))}"
    elif difference := plan.profiles[-1].differs(profiles[0]):  # what a fitted one stands beside
        yield difference
