"""Balance: how many layers each stage gets, by the time that layers, embedding and head take on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from batchinfer.cache import digest, keep, kept
from batchinfer.engine.clock import best_seconds
from batchinfer.engine.kernels import AttentionBatch, SamplingBatch
from batchinfer.engine.layout import Layout
from batchinfer.engine.model.shard import Shard
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.occupancy import Occupancy
from batchinfer.engine.plan import EnginePlan
from batchinfer.engine.stage import Stage
from batchinfer.engine.step import StepBatch
from batchinfer.errors import ModelError

SAMPLED = 0.4  # of a step's tokens, with prompts somewhat longer than completions: the head runs on these alone
_ROWS, _CONTEXT = 128, 128  # of the step that is timed
_LAYERS = 8  # at most: one alone would stay in the cache that a model's layers drive each other out of
_SECONDS = 0.15  # spent on timing each part
_ENOUGH = 256  # steps that tell more than such timing


@dataclass(frozen=True)
class Costs:
    """Seconds a token."""

    layer: float
    embedding: float
    head: float  # and sampling, a sampled token
    sampled: float = SAMPLED  # the share of the tokens that goes through the head

    def stages(self, partition: Sequence[int], head_floats: bool = False) -> list[float]:
        """Seconds that each stage takes for a token."""
        seconds, head = [layers * self.layer for layers in partition], self.head * self.sampled
        seconds[0] += self.embedding + (head / 2 if head_floats else 0)
        seconds[-1] += head / 2 if head_floats else head
        return seconds

    @classmethod
    def of_weights(cls, spec: DecoderSpec) -> Costs:
        """As many as there are weights to multiply with: not seconds, but in proportion."""
        attention = spec.hidden_size * (spec.qkv_size + spec.num_heads * spec.head_dim)
        layer = attention + 3 * spec.hidden_size * spec.intermediate_size
        return cls(float(layer), 0.0, float(spec.vocab_size * spec.hidden_size))

    @classmethod
    def of_run(cls, layout: Layout, occupancy: Occupancy) -> Costs | None:
        """What a run's steps say of it; None where they were few."""
        ranks, partition = layout.ranks[:: layout.tp], layout.partition
        tokens, samples = occupancy.tokens, occupancy.samples
        if len(partition) == 1 or occupancy.steps < _ENOUGH or not samples:
            return None
        busy, heads = ([spent[rank] for rank in ranks] for spent in (occupancy.busy, occupancy.heads))
        if layout.head_floats:
            layer = (sum(busy[1:]) - sum(heads[1:])) / sum(partition[1:]) / tokens
            embedding = max(0.0, (busy[0] - heads[0]) / tokens - partition[0] * layer)
            return cls(layer, embedding, sum(heads) / samples, samples / tokens)
        layer = sum(busy[:-1]) / sum(partition[:-1]) / tokens  # the embedding is little and counted with them
        return cls(layer, 0.0, max(0.0, busy[-1] - partition[-1] * layer * tokens) / samples, samples / tokens)


def deal(layers: int, pp: int, costs: Costs, head_floats: bool = False) -> tuple[int, ...]:
    """The partition whose slowest stage is fastest: each layer goes where it makes the least."""
    partition = [1] * pp
    for _ in range(layers - pp):
        after = costs.stages([count + 1 for count in partition], head_floats)
        partition[after.index(min(after))] += 1
    return tuple(partition)


class FloatingHead:
    """Says of each step which stage computes its head, the first or the last: the one that has had less to do.

    The first is told by the last in any case what a step's tokens are, so that it can as well choose them. Layers alone
    cannot be dealt evenly: prompts need hardly any head, and tokens that follow each other one each.
    """

    def __init__(self, partition: Sequence[int], costs: Costs) -> None:
        self._last, self._head = partition[-1] * costs.layer, costs.head
        self._layers = self._last - partition[0] * costs.layer - costs.embedding
        self._more = 0.0  # that the last stage has had to do; what lies further back than a step is made good by none

    def on_first(self, step: StepBatch) -> bool:
        """To be asked for each step, in their order."""
        head = self._head * len(step.sampled)
        most = self._last * step.num_tokens + head
        self._more = min(max(self._more + self._layers * step.num_tokens, -most), most)
        on_first = head > 0 and self._more > 0
        self._more += -head if on_first else head
        return on_first


def check_partition(plan: EnginePlan, pp: int, asked: tuple[int, ...]) -> None:
    """
    Raises:
        ModelError: the layers cannot be dealt so.
    """
    layers = plan.spec.num_layers
    if asked and (len(asked) != pp or sum(asked) != layers or min(asked) < 1):
        raise ModelError(
            f"engine.pp_partition = {list(asked)} must give each of {pp} stages a layer or more, {layers} in all"
        )
    if pp > layers:
        raise ModelError(f"engine.pp = {pp}, but {plan.model} has {layers} layers and each stage needs one: lower it")


@torch.inference_mode()
def measure(plan: EnginePlan, tp: int, tp_rank: int) -> Costs:
    """Time a rank's share of a layer, the embedding and the head, at a decode step's shape."""
    layers = min(_LAYERS, plan.spec.num_layers)
    model = replace(plan.spec, num_layers=layers)
    stage = Stage(plan, 0.0, Shard(model, range(layers), tp, tp_rank), record=False)
    decoder, limits = stage.decoder, plan.limits
    rows, context = min(_ROWS, limits.step_tokens), min(_CONTEXT, limits.seq_len)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(stage.device)

    pages = np.arange(rows * -(-context // stage.page_size)).reshape(rows, -1) % stage.num_pages
    place = context - 1
    batch = AttentionBatch(
        positions=tensor(np.full(rows, place)),
        slots=tensor(pages[:, place // stage.page_size] * stage.page_size + place % stage.page_size),
        query_starts=tensor(np.arange(rows + 1)),
        context_lens=tensor(np.full(rows, context)),
        page_table=tensor(pages),
        max_query_len=1,
        max_context_len=context,
        decodes=rows,
        counts=tensor(np.array([rows, rows])),
    )
    token_ids, sampled = tensor(np.arange(rows) % model.vocab_size), torch.arange(rows, device=stage.device)
    nothing = dict.fromkeys(("seed", "index", "position", "history_rows", "history_lens"), np.zeros(rows, np.int32))
    off = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), np.zeros(rows, np.float32))
    greedy = SamplingBatch(**nothing, **off, history=np.zeros((rows, 1), np.int32), all_greedy=True)
    for cache in stage.caches:
        cache.zero_()
    hidden = torch.zeros(rows, model.hidden_size, device=stage.device)
    embedding = best_seconds(lambda: decoder.embed(token_ids), stage.device, _SECONDS)
    head = best_seconds(lambda: decoder.logits(hidden), stage.device, _SECONDS)
    whole = best_seconds(lambda: decoder.forward(token_ids, batch, stage.caches, sampled), stage.device, _SECONDS)
    logits = decoder.logits(hidden)
    sampling = best_seconds(lambda: stage.kernels.sample(logits, greedy), stage.device, _SECONDS)
    layer = max(whole - embedding, 1e-9) / layers
    return Costs(layer / rows, embedding / rows, (head + sampling) / rows)


def known_costs(plan: EnginePlan, tp: int, threads: int) -> Costs | None:
    """As ``keep_costs`` kept them."""
    try:
        return Costs(**kept("costs", _key(plan, tp, threads)))
    except TypeError:
        return None


def keep_costs(plan: EnginePlan, tp: int, threads: int, costs: Costs) -> None:
    """Remember costs for the next engine of this plan here; where nothing can be written, it measures again."""
    keep("costs", _key(plan, tp, threads), asdict(costs))


def _key(plan: EnginePlan, tp: int, threads: int) -> str:
    return digest([plan.fingerprint, plan.dtype, asdict(plan.limits), tp, threads])
