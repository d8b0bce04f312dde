"""The process that a build runs NVIDIA's tools in: ``python -m batchinfer.backends.tensorrt_llm.make SPEC.json``.

They want the GPU, MPI and a ``__main__`` of their own, and what they hold is given back when it ends. The model's own
code is never run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# build.quantization → Model-Optimizer's config, TensorRT-LLM's algorithm.
SCHEMES = {
    "fp8": ("FP8_DEFAULT_CFG", "FP8"),
    "int4_awq": ("INT4_AWQ_CFG", "W4A16_AWQ"),
    "w4a8_awq": ("W4A8_AWQ_BETA_CFG", "W4A8_AWQ"),
    "nvfp4": ("NVFP4_DEFAULT_CFG", "NVFP4"),
    "int8_sq": ("INT8_SMOOTHQUANT_CFG", "W8A8_SQ_PER_CHANNEL"),
}
_MOST_CALIBRATION_TOKENS = 2048  # of a prompt: longer ones say little more about activations, and cost memory


def quantise(spec: Mapping[str, Any]) -> None:
    """Post-training quantisation into a Hugging Face checkpoint that the PyTorch flavour loads."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = spec["dtype"] if spec["dtype"] == "auto" else getattr(torch, spec["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=dtype, device_map="auto", local_files_only=True, trust_remote_code=False
    )
    lines = Path(spec["calibration"], "train.jsonl").read_text("utf-8").splitlines()
    prompts = [json.loads(line)["ids"][: min(spec["seq_len"], _MOST_CALIBRATION_TOKENS)] for line in lines]

    def calibrate(model: Any) -> None:
        for ids in prompts:
            model(torch.tensor([ids], device=model.device))

    with torch.inference_mode():
        mtq.quantize(model, getattr(mtq, SCHEMES[spec["quantization"]][0]), calibrate)
        export_hf_checkpoint(model, export_dir=spec["output"])
    AutoTokenizer.from_pretrained(spec["model"], local_files_only=True).save_pretrained(spec["output"])


def compile_engine(spec: Mapping[str, Any]) -> None:
    """A TensorRT engine, quantised on the way if asked for."""
    from tensorrt_llm._tensorrt_engine import LLM
    from tensorrt_llm.llmapi import BuildConfig, CalibConfig, QuantAlgo, QuantConfig

    arguments: dict[str, Any] = {}
    quantised = {}
    if spec["quantization"] != "none":
        quantised["quant_algo"] = getattr(QuantAlgo, SCHEMES[spec["quantization"]][1])
        # A folder with a train split and a text column. By name, a data set would be downloaded.
        arguments["calib_config"] = CalibConfig(
            calib_dataset=spec["calibration"],
            calib_batches=spec["calibration_rows"],
            calib_max_seq_length=min(spec["seq_len"], _MOST_CALIBRATION_TOKENS),
        )
    if spec["kv_dtype"] != "auto":
        quantised["kv_cache_quant_algo"] = getattr(QuantAlgo, spec["kv_dtype"].upper())
    if quantised:
        arguments["quant_config"] = QuantConfig(**quantised)
    llm = LLM(
        model=spec["model"],
        dtype=spec["dtype"],
        tensor_parallel_size=spec["tp"],
        pipeline_parallel_size=spec["pp"],
        build_config=BuildConfig(
            max_input_len=spec["seq_len"],
            max_seq_len=spec["seq_len"],
            max_batch_size=spec["batch_size"],
            max_num_tokens=spec["step_tokens"],
        ),
        **arguments,
    )
    llm.save(spec["output"])
    llm.shutdown()


def warm_up(spec: Mapping[str, Any]) -> None:
    """Load a checkpoint as a run will, with all the choosing and capturing that goes with it."""
    from tensorrt_llm import LLM

    LLM(**spec["arguments"]).shutdown()


STEPS = {"quantise": quantise, "compile": compile_engine, "warm up": warm_up}

if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    STEPS[asked["step"]](asked)
