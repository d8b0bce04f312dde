"""Pipeline and tensor parallelism between GPUs, in one command: ``python -m tests.bench.multi_gpu``.

For every layout that this machine's GPUs allow: whether it gives the tokens of one GPU in float32, and its speed in
bfloat16 beside one GPU's, with random weights of a Llama of about a billion parameters. Prints a JSON line a layout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from batchinfer import Engine, SamplingParams
from batchinfer.bench import workload
from tests.engine.test_families import prompts
from tests.engine.tiny import make_model

# tp, pp, and tp and pp of further ranks for prompts
LAYOUTS = [
    (1, 2, None),
    (2, 1, None),
    (1, 1, (1, 1)),
    (2, 2, None),
    (1, 4, None),
    (4, 1, None),
    (1, 2, (2, 1)),
    (8, 1, None),
]
SHAPE = dict(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=4096,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="how many to use")
    parser.add_argument("--requests", type=int, default=2048)
    parser.add_argument("--device", default="cuda", help="cpu tries the command itself")
    asked = parser.parse_args()
    layouts = [(tp, pp, prefill) for tp, pp, prefill in LAYOUTS if tp * pp + _size(prefill) <= asked.gpus]
    if not layouts:
        raise SystemExit(f"two GPUs are needed, {asked.gpus} are here")
    with tempfile.TemporaryDirectory() as folder:
        same = _same_tokens(Path(folder, "tiny"), layouts, asked.device)
        model = _make_model(Path(folder, "billion"), small=asked.device == "cpu")
        for layout in [(1, 1, None), *layouts]:
            print(json.dumps(_speed(model, layout, asked) | {"same_tokens_fp32": same.get(layout)}), flush=True)


def _size(prefill: tuple[int, int] | None) -> int:
    return prefill[0] * prefill[1] if prefill else 0


def _same_tokens(folder: Path, layouts: list, device: str) -> dict[Any, bool]:
    model = str(make_model(folder, "llama"))
    options = dict(dtype="float32", device=device, batch_size=16, step_tokens=128, progress=False)

    def said(engine: Engine) -> dict:
        with contextlib.closing(engine):
            return {c.key: c.outputs for c in engine.generate(prompts(32), SamplingParams(max_tokens=32))}

    expected = said(Engine(model, **options))
    fits = [layout for layout in layouts if layout[0] <= 6 and layout[1] <= 3]  # heads and layers of the tiny model
    return {
        (tp, pp, prefill): said(Engine(model, tp=tp, pp=pp, prefill=prefill, **options)) == expected
        for tp, pp, prefill in fits
    }


def _make_model(folder: Path, small: bool) -> str:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.engine.tiny import make_tokenizer

    torch.manual_seed(0)
    shape = SHAPE | (dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4) if small else {})
    AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def _speed(model: str, layout: tuple, asked: argparse.Namespace) -> dict[str, Any]:
    tp, pp, prefill = layout
    options = dict(dtype="bfloat16", device=asked.device, seq_len=1024, progress=False)
    jobs = workload(asked.requests, vocabulary=SHAPE["vocab_size"])
    begun = time.perf_counter()
    with contextlib.closing(Engine(model, tp=tp, pp=pp, prefill=prefill, **options)) as engine:
        list(engine.generate(jobs[:64]))
        opened = time.perf_counter() - begun
        engine.pages.forget_idle()
        if engine.stage.details():
            engine.stage.forget()
        before, begun = engine.counters.copy(), time.perf_counter()
        failed = [c.error for c in engine.generate(jobs) if c.error]
        seconds = time.perf_counter() - begun
        done, told = engine.counters.minus(before), engine.stage.details()
    assert not failed, failed[0]
    return {
        "tp": tp,
        "pp": pp,
        "prefill": prefill,
        "tok_s": round((done.prompt_tokens + done.completion_tokens) / seconds),
        "open_seconds": round(opened, 1),
        **{
            name: told[name] for name in ("partition", "bubble", "rank_step_ms", "bytes_sent_per_token") if name in told
        },
    }


if __name__ == "__main__":
    main()
