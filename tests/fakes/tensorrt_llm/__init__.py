"""A stand-in for NVIDIA's package: the documented interface of the version that its metadata names."""

import importlib.metadata

__version__ = importlib.metadata.version("tensorrt_llm")

from tensorrt_llm import faults

faults.strike("import")

from tensorrt_llm.llm import TorchLLM as LLM  # noqa: E402
from tensorrt_llm.sampling_params import SamplingParams  # noqa: E402

__all__ = ["LLM", "SamplingParams", "__version__"]
