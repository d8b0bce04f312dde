"""Stage: one rank. Its layers, its KV pages, and the step that turns tokens into sampled tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from batchinfer.engine.comm import ALONE, Peers
from batchinfer.engine.kernels import KV_DTYPES, AttentionBatch, PagedAttention, select
from batchinfer.engine.model.decoder import Decoder
from batchinfer.engine.model.shard import Shard
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.plan import EnginePlan
from batchinfer.engine.profile import Shape
from batchinfer.engine.scheduler import AHEAD
from batchinfer.engine.step import StepBatch
from batchinfer.engine.tactics import winners
from batchinfer.errors import ModelError
from batchinfer.host import available_memory

Tokens = Callable[[], np.ndarray]  # waits for the tokens of a step, int32 [samples]

_GIB = 2**30


class Stage:
    """The whole model on one device, or a shard of it beside its peers."""

    def __init__(
        self,
        plan: EnginePlan,
        kv_cache_gib: float = 0.0,
        shard: Shard | None = None,
        peers: Peers = ALONE,
        agree: Callable[[int], int] = int,
        record: bool = True,
    ) -> None:
        """
        Args:
            kv_cache_gib: memory for KV pages; 0 takes what the profile can use, up to a share of what is free.
            shard: the part of the model to hold, all of it unless given.
            peers: the ranks that hold the rest.
            agree: takes the pages that this rank has room for, gives those that all ranks have room for.
            record: make CUDA graphs, where there are any.

        Raises:
            ModelError: the memory does not hold one sequence of the profile's length.
        """
        self.micro_batches = 1  # steps that may be launched before the first is taken
        self.ahead = 0  # as many more may go on with tokens that nobody but the device knows yet
        self.prefill_steps = 0  # and as many of prompts alone, for other ranks
        self.shard = shard or Shard(plan.spec, range(plan.spec.num_layers))
        self.peers = peers
        spec, limits = self.shard.spec, plan.limits
        self.device = torch.device(plan.device)
        dtype = plan.torch_dtype
        fastest = winners(plan.tactics)
        self.kernels = select(self.device, dtype, fastest)
        self.kernels_name = self.kernels.name
        self._how_kept = dtype, KV_DTYPES[plan.kv_dtype]
        attention = self._attention(spec, self.device)
        self.decoder = Decoder(
            self.shard,
            plan.weights,
            self.kernels,
            attention,
            max_tokens=limits.step_tokens,
            max_position=limits.seq_len,
            dtype=dtype,
            device=self.device,
            all_reduce=(peers if self.shard.tp > 1 else ALONE).all_reduce,
            winners=fastest,
        )
        self.page_size = attention.page_size
        page_bytes = attention.page_bytes(spec.num_layers)
        self.num_pages = agree(self._count_pages(plan, page_bytes, kv_cache_gib))
        self.caches = attention.allocate(spec.num_layers, self.num_pages)
        self._last = torch.zeros(limits.batch_size, dtype=torch.int32)  # by row of the scheduler's table
        self._gpu_steps = None
        if self.device.type == "cuda" and record:
            from batchinfer.engine.gpu_steps import GpuSteps

            if peers is ALONE:
                self.ahead = AHEAD
            self._gpu_steps = GpuSteps(self.decoder, self.caches, self.kernels, limits, self.page_size, peers)

    def _attention(self, spec: DecoderSpec, device: torch.device) -> PagedAttention:
        heads, page_size = (spec.num_heads, spec.num_kv_heads, spec.head_dim), self.kernels.attention.page_size
        dtype, kv_dtype = self._how_kept
        return self.kernels.attention(*heads, page_size, spec.window, dtype, device, kv_dtype)

    def _count_pages(self, plan: EnginePlan, page_bytes: int, kv_cache_gib: float) -> int:
        limits = plan.limits
        pages_per_sequence = -(-limits.seq_len // self.page_size)
        if kv_cache_gib:
            pages = int(kv_cache_gib * _GIB) // page_bytes
        else:
            wanted = max(p.batch_size * -(-p.opt.seq_len // self.page_size) for p in plan.profiles)
            wanted = max(wanted, pages_per_sequence)
            free = _free_memory(self.device, self.shard.spec, limits) / self.peers.on_this_device
            pages = min(int(free) // page_bytes, wanted)
        if pages < pages_per_sequence:
            raise ModelError(
                f"KV pages for one sequence of {limits.seq_len} tokens take "
                f"{pages_per_sequence * page_bytes / _GIB:.2f} GiB, {pages * page_bytes / _GIB:.2f} GiB are to be had: "
                "raise engine.kv_cache_gib or lower engine.profile.seq_len"
            )
        return pages

    def launch(self, step: StepBatch) -> Tokens:
        """Compute a step, or begin to: keys and values into their pages, and sampled tokens to be asked for."""
        if self._gpu_steps is not None:
            return self._gpu_steps.launch(step)
        return to_host(self.sample(step, self.forward(step, None)))

    def learn(self, rows: np.ndarray, tokens: torch.Tensor) -> None:
        """Keep the tokens sampled for ``rows`` of the scheduler's table: what a step leaves out is these."""
        if self._gpu_steps is not None:
            self._gpu_steps.learn(rows, tokens)
        else:
            self._last[torch.from_numpy(rows)] = tokens

    def next_done(self, launched: Sequence[Tokens]) -> int:
        """Which of the steps under way, oldest first, to ask for its tokens: they end in order."""
        return 0

    def details(self) -> dict[str, Any]:
        """Nothing beyond what every engine tells."""
        return {}

    def rank_names(self) -> dict[int, str]:
        """One rank computes where the engine waits."""
        return {}

    def close(self) -> None:
        """Nothing outlives the process; the memory goes with the object."""

    @torch.inference_mode()
    def forward(self, step: StepBatch, inputs: torch.Tensor | None) -> torch.Tensor:
        """This shard's part of a step: what ``Decoder.forward`` gives for ``inputs``, or None for the step's tokens.

        On a GPU logits are recorded with the last layer, and come with it.
        """
        if self._gpu_steps is not None:
            return self._gpu_steps.forward(step, inputs)
        inputs = self._tensor(self._filled_in(step)) if inputs is None else inputs
        batch = AttentionBatch(
            positions=self._tensor(step.positions),
            slots=self._tensor(step.slots),
            query_starts=self._tensor(step.query_starts),
            context_lens=self._tensor(step.context_lens),
            page_table=self._tensor(step.page_table),
            max_query_len=int(np.diff(step.query_starts).max()),
            max_context_len=int(step.context_lens.max()),
            decodes=step.singles,
            prefills=len(step.rows) - step.singles,
            counts=self._tensor(np.array([step.singles, len(step.rows)], np.int32)),
        )
        return self.decoder.forward(inputs, batch, self.caches, self._tensor(step.sampled))

    def _filled_in(self, step: StepBatch) -> np.ndarray:
        """A step's tokens, those among them that the host did not know."""
        token_ids, unknown = step.token_ids.copy(), step.unknown
        # -1: a sequence that has failed, in a step for nothing
        token_ids[unknown] = self._last.numpy()[step.rows[unknown]].clip(0)
        return token_ids

    @torch.inference_mode()
    def sample(self, step: StepBatch, out: torch.Tensor) -> torch.Tensor | None:
        """Choose tokens from what ``forward`` gave, int32 ``[samples]``; None on all but a stage's first rank."""
        if not len(step.sampled):
            return None if self.shard.tp_rank else torch.empty(0, dtype=torch.int32)
        logits = self.decoder.logits(out) if self._gpu_steps is None else out
        if self.shard.tp > 1:
            logits = self.peers.gather(logits, self.shard.vocabulary_shares)
        return None if logits is None else self.kernels.sample(logits, step.sampling)

    def kv_views(self, layers: range, kv_heads: range, other: Shard | None = None) -> list[torch.Tensor]:
        """The pages of the model's ``kv_heads``, of all its ``layers``: views ``[pages, kv_heads, …]``.

        Args:
            other: another rank's shard: views of how they lie there, without memory.
        """
        shard, caches = other or self.shard, self.caches
        if other is not None:
            caches = self._attention(shard.spec, torch.device("meta")).allocate(shard.spec.num_layers, self.num_pages)
        heads = slice(kv_heads.start - shard.kv_heads.start, kv_heads.stop - shard.kv_heads.start)
        caches = caches[layers.start - shard.layers.start : layers.stop - shard.layers.start]
        return [view[:, heads] for view in self.decoder.attention.by_head(caches)]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def to_host(tokens: torch.Tensor) -> Tokens:
    """Begin to copy. They may be read when the device has come to this point of its work."""
    copy = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=tokens.is_cuda)
    return copy.copy_(tokens, non_blocking=True).numpy


def _free_memory(device: torch.device, spec: DecoderSpec, limits: Shape) -> float:
    """Bytes that KV pages may take: a GPU's but for what steps need, a quarter of a host's that others live on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what weights were cut from
        a_token = 8 * spec.hidden_size + 4 * spec.qkv_size + 6 * spec.intermediate_size
        steps = 2 * a_token * limits.step_tokens + 6 * spec.vocab_size * limits.batch_size
        return 0.97 * torch.cuda.mem_get_info()[0] - steps - 2**30
    return available_memory() * 0.25
