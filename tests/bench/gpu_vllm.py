"""vLLM on the same workloads, offline, with dummy weights: ``python -m tests.bench.gpu_vllm 8b fp8 NAME …``.

Prints a line of JSON a workload: output tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from tests.bench.workloads import WORKLOADS, like_chat

CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256,
    rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=8192, hidden_act="silu",
    tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2,
)  # fmt: skip
OTHERS = {
    "8b": {},
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True),
    "70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=OTHERS)
    parser.add_argument("mode", choices=["bf16", "fp8"])
    parser.add_argument("names", nargs="+", choices=WORKLOADS)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--requests", type=int, help="of chat, others accordingly; their own number unless given")
    asked = parser.parse_args()
    os.environ |= dict(VLLM_USE_FLASHINFER_SAMPLER="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG | OTHERS[asked.model]))
        fp8 = dict(quantization="fp8", kv_cache_dtype="fp8") if asked.mode == "fp8" else {}
        engine = LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, gpu_memory_utilization=0.92,
            tensor_parallel_size=asked.tp, pipeline_parallel_size=asked.pp, **fp8,
        )  # fmt: skip
        jobs = {name: like_chat(name, asked.requests) if asked.requests else WORKLOADS[name]() for name in asked.names}
        for name, workload in {"warm-up": WORKLOADS["chat"](64), **jobs}.items():
            prompts = [{"prompt_token_ids": prompt} for prompt, _ in workload]
            how = [SamplingParams(temperature=0, max_tokens=o, ignore_eos=True, detokenize=False) for _, o in workload]
            engine.reset_prefix_cache()
            started = time.perf_counter()
            engine.generate(prompts, how, use_tqdm=False)
            seconds = time.perf_counter() - started
            print(json.dumps({name: round(sum(output for _, output in workload) / seconds)}), flush=True)


if __name__ == "__main__":
    main()
