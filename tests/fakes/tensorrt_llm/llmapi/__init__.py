"""Configuration classes. Unknown fields are refused."""

from enum import Enum
from typing import Literal

from packaging.version import Version
from pydantic import BaseModel, ConfigDict

from tensorrt_llm import __version__
from tensorrt_llm.sampling_params import GuidedDecodingParams

here = Version(__version__)
HAS_ENGINE = here < Version("1.3.0rc21")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KvCacheConfig(Strict):
    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    free_gpu_memory_fraction: float | None = 0.9
    host_cache_size: int | None = None
    dtype: Literal["auto", "fp8", "nvfp4"] = "auto"
    tokens_per_block: int = 32
    enable_partial_reuse: bool = True


class CapacitySchedulerPolicy(str, Enum):
    MAX_UTILIZATION = "MAX_UTILIZATION"
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    STATIC_BATCH = "STATIC_BATCH"


class SchedulerConfig(Strict):
    capacity_scheduler_policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    context_chunking_policy: str | None = None


class CudaGraphConfig(Strict):
    batch_sizes: list[int] | None = None
    max_batch_size: int = 0
    enable_padding: bool = False


class Base(Strict):
    model: str
    tokenizer: str | None = None
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    revision: str | None = None
    tokenizer_revision: str | None = None
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    max_batch_size: int | None = 2048
    max_num_tokens: int | None = 8192
    max_seq_len: int | None = None
    max_input_len: int | None = 1024
    max_beam_width: int | None = 1
    enable_chunked_prefill: bool = False
    guided_decoding_backend: Literal["xgrammar", "llguidance"] | None = None
    kv_cache_config: KvCacheConfig = KvCacheConfig()
    scheduler_config: SchedulerConfig = SchedulerConfig()
    backend: str | None = None


class TorchLlmArgs(Base):
    cuda_graph_config: CudaGraphConfig | None = CudaGraphConfig()
    disable_overlap_scheduler: bool = False
    enable_iter_perf_stats: bool = False
    enable_autotuner: bool = True
    stream_interval: int = 1


if here < Version("1.1.0.dev0"):

    class TorchLlmArgs(TorchLlmArgs):  # noqa: F811
        use_torch_sampler: bool = False

elif here < Version("1.3.0rc26"):

    class TorchLlmArgs(TorchLlmArgs):  # noqa: F811
        sampler_type: Literal["auto", "TorchSampler", "TRTLLMSampler"] = "auto"

else:

    class TorchLlmArgs(TorchLlmArgs):  # noqa: F811
        sampler_type: Literal["auto", "TorchSampler"] = "auto"


ONLY_ENGINE = {"build_config", "quant_config", "calib_config", "batching_type", "fast_build", "enable_build_cache"}
__all__ = ["GuidedDecodingParams", "KvCacheConfig", "SchedulerConfig", "CudaGraphConfig"]

if HAS_ENGINE:

    class BuildConfig(Strict):
        max_input_len: int = 1024
        max_seq_len: int | None = None
        max_batch_size: int = 2048
        opt_batch_size: int = 8
        max_beam_width: int = 1
        max_num_tokens: int = 8192
        strongly_typed: bool = True

    class QuantAlgo(str, Enum):
        FP8 = "FP8"
        INT8 = "INT8"
        NVFP4 = "NVFP4"
        W4A16_AWQ = "W4A16_AWQ"
        W4A8_AWQ = "W4A8_AWQ"
        W8A8_SQ_PER_CHANNEL = "W8A8_SQ_PER_CHANNEL"

    class QuantConfig(Strict):
        quant_algo: QuantAlgo | None = None
        kv_cache_quant_algo: QuantAlgo | None = None

    class CalibConfig(Strict):
        device: str = "cuda"
        calib_dataset: str = "cnn_dailymail"
        calib_batches: int = 512
        calib_batch_size: int = 1
        calib_max_seq_length: int = 512
        random_seed: int = 1234
        tokenizer_max_seq_length: int = 2048

    class TrtLlmArgs(Base):
        build_config: BuildConfig | None = None
        quant_config: QuantConfig | None = None
        calib_config: CalibConfig | None = None
        enable_build_cache: bool = False
        fast_build: bool = False
        batching_type: str | None = None

    __all__ += ["BuildConfig", "QuantAlgo", "QuantConfig", "CalibConfig"]
