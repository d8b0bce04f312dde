"""LLM of both flavours."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from packaging.version import Version
from tokenizers import Tokenizer

from tensorrt_llm import __version__, faults, llmapi
from tensorrt_llm.executor.engine import Executor
from tensorrt_llm.sampling_params import SamplingParams

here = Version(__version__)


class FakeTokenizer:
    def __init__(self, folder):
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        self.eos_token_id = self._tokenizer.token_to_id(config["eos_token"])

    def encode(self, text):
        return self._tokenizer.encode(text).ids

    def encode_stop(self, text):
        """As tokenizers do that put a space before a text of its own: not how it is spelled within another."""
        return self.encode(f" {text}" if faults.ASKED.get("stops_with_space") else text)

    def decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class BaseLLM:
    def __init__(self, model, tokenizer=None, **kwargs):
        for key in kwargs:
            if key not in self.arguments.model_fields:
                raise ValueError(f"{type(self).__name__} got invalid argument: {key}")
        self.args = self.arguments(model=model, tokenizer=tokenizer, **kwargs)
        gpus, ranks = faults.ASKED.get("gpus", 8), self.args.tensor_parallel_size * self.args.pipeline_parallel_size
        if ranks > gpus:
            raise RuntimeError(f"Only {gpus} GPUs are available, but {ranks} are required.")
        environ = {k: v for k, v in os.environ.items() if k.startswith(_TOLD)}
        faults.note("load", arguments=self.args.model_dump(mode="json"), environ=environ)
        faults.strike("load")
        folder = self._folder(Path(model))
        self.tokenizer = FakeTokenizer(folder)
        config = json.loads((folder / "config.json").read_text())
        defaults = folder / "generation_config.json"
        self._defaults = json.loads(defaults.read_text()) if defaults.is_file() else {}
        by_seed, penalises = self._sampler()
        longest = self.args.max_seq_len or config.get("max_position_embeddings", 2048)
        vocabulary = config.get("vocab_size", 1 << 30)
        self._executor = Executor(self.tokenizer, vocabulary, self.args.max_batch_size, longest, by_seed, penalises)

    def generate_async(self, inputs, sampling_params=None, streaming=False):
        if self._executor is None or self._executor.is_shutdown():
            raise RuntimeError("LLM is shutting down")
        params = SamplingParams() if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"The sampling_params must be type SamplingParams or None, but got {type(params)}")
        params._setup(self.tokenizer, self._defaults)
        self._check_arguments(len(inputs))
        return self._executor.generate_async(inputs, params)

    def generate(self, inputs, sampling_params=None):
        """All at once, one after the other, and the first failure is everybody's."""
        inputs = inputs or [[]]
        futures = [self.generate_async(prompt, sampling_params) for prompt in inputs]
        return [future.result() for future in futures]

    def shutdown(self):
        faults.strike("shutdown")
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def __getstate__(self):
        raise RuntimeError("LLM object can not be pickled.")

    def _check_arguments(self, prompt_len):
        if not self.args.enable_chunked_prefill and prompt_len > self.args.max_num_tokens:
            raise ValueError(f"The sum of prompt length ({prompt_len}) should not exceed max_num_tokens")


class TorchLLM(BaseLLM):
    arguments = llmapi.TorchLlmArgs

    def __init__(self, model, tokenizer=None, **kwargs):
        if only := sorted(llmapi.ONLY_ENGINE & kwargs.keys()):
            raise ValueError(f"{only} are specific to TensorRT backend, please use the TensorRT engine's LLM")
        if kwargs.pop("backend", "pytorch") != "pytorch":
            raise ValueError("backend must be pytorch")
        super().__init__(model, tokenizer, **kwargs)

    def _folder(self, model):
        return model

    def _sampler(self):
        """Whether tokens are drawn by seed, whether min_p and penalties count."""
        cpp = (
            getattr(self.args, "sampler_type", "") == "TRTLLMSampler"
            or getattr(self.args, "use_torch_sampler", True) is False
        )
        return cpp, cpp or here >= Version("1.3.0rc24")


if llmapi.HAS_ENGINE:

    class EngineLLM(BaseLLM):
        arguments = llmapi.TrtLlmArgs

        def _folder(self, model):
            args, gpu = self.args, faults.ASKED.get("gpu", "9.0")
            assert args.kv_cache_config.dtype == "auto", "KvCacheConfig.dtype is not supported by the TensorRT backend."
            if (model / "rank0.engine").is_file():
                built = json.loads((model / "config.json").read_text())
                for name, asked in {"tp": args.tensor_parallel_size, "pp": args.pipeline_parallel_size}.items():
                    if asked not in (1, built[f"{name}_size"]):
                        has = built[f"{name}_size"]
                        raise ValueError(f"{name}_size {asked} is not consistent with the engine's {name}_size {has}")
                if built["compute"] != gpu:
                    raise RuntimeError(
                        "The engine plan file is generated on an incompatible device, expecting compute "
                        f"{built['compute']} got compute {gpu}, please rebuild."
                    )
                if built["version"] != __version__:
                    raise RuntimeError("Version tag does not match.")
                self._engine_dir = model
                return model
            self._engine_dir = made = Path(tempfile.mkdtemp(prefix="fake-engine-"))
            config = json.loads((model / "config.json").read_text())
            config |= {
                "version": __version__,
                "compute": gpu,
                "tp_size": args.tensor_parallel_size,
                "pp_size": args.pipeline_parallel_size,
                "build_config": args.build_config.model_dump(),
                "quantization": args.quant_config and args.quant_config.model_dump(mode="json"),
            }
            (made / "config.json").write_text(json.dumps(config))
            for rank in range(args.tensor_parallel_size * args.pipeline_parallel_size):
                (made / f"rank{rank}.engine").write_bytes(b"compiled")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(model / name, made / name)
            calibration = args.calib_config and Path(args.calib_config.calib_dataset, "train.jsonl").read_text()
            faults.note("compile", rows=len(calibration.splitlines()) if calibration else 0, **config)
            return made

        def save(self, engine_dir):
            shutil.copytree(self._engine_dir, engine_dir)

        def _sampler(self):
            return True, True


_TOLD = ("TRTLLM_", "TLLM_", "PMIX_", "OMPI_", "PMI_", "SLURM_", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
