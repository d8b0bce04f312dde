"""The tokenizer files of a model, in the one form that the rest reads: a folder with tokenizer.json."""

from __future__ import annotations

from pathlib import Path

from batchinfer.cache import cache_root, digest, make_folder
from batchinfer.engine.model.source import ModelSource, code_digest
from batchinfer.errors import ModelError


def export_tokenizer(model: str | ModelSource) -> Path:
    """A cached folder with the model's tokenizer.json, tokenizer_config.json and chat template.

    Raises:
        ModelError: the model is missing, or has no tokenizer that converts to the fast (Rust) form.
    """
    source = model if isinstance(model, ModelSource) else ModelSource.resolve(model)
    target = cache_root() / "tokenizers" / digest([source.stat_digest(), code_digest()])[:24]
    if not target.is_dir():
        make_folder(target, lambda folder: write_tokenizer(source, folder))
    return target


def write_tokenizer(source: ModelSource, folder: Path) -> None:
    """Convert the model's tokenizer into ``folder``; code from the checkpoint is never run."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    gguf = {"gguf_file": source.gguf.name} if source.gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False, **gguf)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # transformers raises whatever its converters raise
        raise ModelError(f"cannot load the tokenizer of {source.name} in {source.folder}: {error}") from None
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"the tokenizer of {source.name} has no tokenizer.json form; expected a fast tokenizer")
