"""What a build leaves on disk, and whether it belongs to this machine, this version and this job.

```
ENGINE/
  plan.json     what it was made of and for
  checkpoint/   rank0.engine and its like, or a quantised checkpoint; absent where the model itself is loaded
  tokenizer/    tokenizer.json and its relatives
```

tensorrt_llm's own build cache asks neither for the weights nor for the GPU, and what it says of an engine that does not
fit is about its insides: the fingerprint here is checked first, and ``explain`` turns the rest into a line to act on.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batchinfer.backends.tensorrt_llm.arguments import Limits
from batchinfer.backends.tensorrt_llm.versions import Release
from batchinfer.cache import cache_root, make_folder
from batchinfer.engine.model.source import ModelSource
from batchinfer.errors import ModelError
from batchinfer.job import Job

FORMAT = "tensorrt-llm 1"


@dataclass(frozen=True)
class TensorRTPlan:
    path: Path
    model: str  # where the weights came from, as an absolute path
    flavour: str  # pytorch | engine
    quantization: str
    kv_dtype: str
    tp: int
    pp: int
    profile: Limits
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    fingerprint: dict[str, str]  # weights and tokenizer digests, gpu, tensorrt_llm, batchinfer

    @classmethod
    def load(cls, path: str | Path) -> TensorRTPlan:
        """
        Raises:
            ModelError: there is no such plan, or another version of this project or the native engine wrote it.
        """
        path = Path(path).expanduser().resolve()
        try:
            value = json.loads((path / "plan.json").read_text("utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{path} is no engine plan: no plan.json in it; `batchinfer build` makes one") from None
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path / 'plan.json'}: {error}") from None
        if (found := value.pop("format", None)) != FORMAT:
            raise ModelError(
                f'{path} has plan format {found}, engine.backend = "tensorrt-llm" reads {FORMAT}: build it again'
            )
        typed = {"profile": Limits(**value["profile"]), "eos_token_ids": tuple(value["eos_token_ids"])}
        return cls(path=path, **value | typed)

    def save(self) -> None:
        value = {"format": FORMAT} | asdict(self)
        del value["path"]
        (self.path / "plan.json").write_text(json.dumps(value, indent=1), "utf-8")

    @property
    def checkpoint(self) -> Path:
        """What ``LLM(...)`` loads."""
        made = self.path / "checkpoint"
        return made if made.is_dir() else Path(self.model)

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"

    def check(self, job: Job, release: Release, gpu: str) -> None:
        """
        Raises:
            ModelError: the plan was built for something else; both sides are named.
        """
        engine, own = job.engine, job.engine.tensorrt
        asked: dict[str, tuple[Any, Any]] = {
            "flavour": (self.flavour, own.flavour),
            "quantization": (self.quantization, job.build.quantization.replace("auto", self.quantization)),
        }
        if self.flavour == "engine":
            asked |= {
                "tp": (self.tp, engine.tp),
                "pp": (self.pp, engine.pp),
                "kv_dtype": (self.kv_dtype, job.build.kv_dtype),
            }
        for name, built in asdict(self.profile).items():
            asked[f"profile.{name}"] = built, getattr(engine.profile[0], name).max or built
        for name, (built, wanted) in asked.items():
            if built != wanted:
                raise ModelError(
                    f"the plan {self.path} was built with {name} {built}, the job asks for {wanted}: build another, or "
                    f"set it to {built}"
                )
        if self.flavour == "engine":
            here = (self.fingerprint["gpu"], gpu), (self.fingerprint["tensorrt_llm"], str(release))
            for built, found in here:
                if built != found:
                    raise ModelError(f"the plan {self.path} was built for {built}, here is {found}: build it again")
        if (
            self.checkpoint == Path(self.model)
            and weights_digest(model_folder(self.model)) != self.fingerprint["weights"]
        ):
            raise ModelError(f"{self.model} has other weights than the plan {self.path} was built from: build it again")


def model_folder(model: str) -> ModelSource:
    """
    Raises:
        ModelError: there is no Hugging Face folder, which is all that tensorrt_llm reads.
    """
    source = ModelSource.resolve(model)
    if source.gguf is not None:
        raise ModelError(
            f'{model} is a GGUF file, engine.backend = "tensorrt-llm" reads Hugging Face folders: name one, or use '
            "the native engine"
        )
    return source


def weights_digest(source: ModelSource) -> str:
    """Of all weights; read once, and again only when the files changed."""
    target = cache_root() / "digests" / source.stat_digest()[:32]
    if not target.is_dir():
        make_folder(target, lambda folder: (folder / "weights").write_text(source.weights_digest()))
    return (target / "weights").read_text()


def explain(error: BaseException | str, release: Release | None = None) -> str | None:
    """What tensorrt_llm says when it cannot build or load, as a line to act on; None for what is not known."""
    said = str(error)
    for pattern, line in _KNOWN:
        if match := re.search(pattern, said, re.IGNORECASE):
            return line.format(*match.groups(), release=release or "tensorrt_llm")
    return None


_KNOWN = (
    (
        r"(tp|pp)_size (\d+) is not consistent with the \w+'s [tp]p_size (\d+)",
        "the engine was built for {0} {2}, the job asks for {1}: set engine.{0} = {2}, or build it again",
    ),
    (
        r"incompatible device, expecting compute ([\d.]+) got compute ([\d.]+)",
        "the engine was built for a GPU of compute capability {0}, this one has {1}: build it again",
    ),
    (r"version tag does not match", "the engine was built by another version of TensorRT: build it again"),
    (r"got invalid argument: (\w+)", "{release} does not know the argument {0}: expected a version from 1.0 to 1.4"),
    (
        r"(\w+)\n\s+Extra inputs are not permitted",
        "{release} does not know the argument {0}: expected a version from 1.0 to 1.4",
    ),
    (r"specific to TensorRT backend", "{release} takes TensorRT arguments in its engine class alone"),
    (
        r"Only (\d+) GPUs are available, but (\d+) are required",
        "engine.tp × engine.pp needs {1} GPUs, here are {0}: lower one of them",
    ),
    (
        r"All nodes .* already filled",
        "the batch system lets MPI start no ranks here: ask it for as many tasks as engine.tp × engine.pp",
    ),
    (
        r"out of memory",
        "the GPU's memory is too small for this: lower engine.tensorrt.kv_cache_fraction or engine.profile.batch_size, "
        "or raise engine.tp",
    ),
    (r"lib(cuda|mpi|nvinfer)\S*: cannot open shared object", "lib{0} is not installed here: `batchinfer doctor` tells"),
    (r"No module named '(\S+)'", "the Python package {0} is not installed, and {release} needs it for this"),
)
