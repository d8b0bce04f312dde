from tensorrt_llm.llmapi import HAS_ENGINE

if not HAS_ENGINE:
    raise ModuleNotFoundError("No module named 'tensorrt_llm._tensorrt_engine'")

from tensorrt_llm.llm import EngineLLM as LLM  # noqa: E402

__all__ = ["LLM"]
