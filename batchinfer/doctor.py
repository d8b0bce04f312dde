"""What is installed on this machine, and which engines can run on it; nothing is changed or loaded onto a GPU."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

from batchinfer import __version__
from batchinfer.backends.tensorrt_llm.versions import INSTALL, installed
from batchinfer.errors import ModelError
from batchinfer.host import available_cores, available_memory
from batchinfer.words import counted

# What people call it → the name it is installed under.
_PACKAGES = {
    "transformers": "transformers",
    "Triton": "triton",
    "FlashInfer": "flashinfer-python",
    "TensorRT-LLM": "tensorrt-llm",
    "Model-Optimizer": "nvidia-modelopt",
}
_GPU = ("name", "compute_cap", "memory.total", "driver_version")
_PATIENCE = 20  # seconds for nvidia-smi, which a broken driver can keep waiting


@dataclass(frozen=True)
class Diagnosis:
    installed: dict[str, str]  # what → version, or that it is not there
    backends: dict[str, str]  # engine.backend → how it can run here
    lacks: dict[str, str]  # engine.backend → why it cannot

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        width = max(map(len, [*self.installed, *self.backends, *self.lacks]))
        lines = [f"{name:<{width}}  {found}" for name, found in self.installed.items()]
        lines += ["", *(f"{name:<{width}}  runs here: {how}" for name, how in self.backends.items())]
        lines += [f"{name:<{width}}  does not run here: {why}" for name, why in self.lacks.items()]
        return "\n".join(lines)


def examine() -> Diagnosis:
    import torch

    gpus = _gpus()
    cuda = torch.cuda.is_available()
    found = {
        "batchinfer": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "CPU": f"{counted(available_cores(), 'core')}, {available_memory() / 2**30:.1f} GiB free, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "compiler": _compiler(),
        "GPU": "; ".join(f"{g['name']} (sm_{g['compute_cap'].replace('.', '')}, {g['memory.total']})" for g in gpus)
        or "none",
        "driver": gpus[0]["driver_version"] if gpus else "none",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none: this torch is built for CPUs",
        **{name: _version(package) for name, package in _PACKAGES.items()},
    }
    compiled = "with compiled kernels" if "not found" not in found["compiler"] else "without a compiler, much slower"
    backends, lacks = {"native": f"on the CPU {compiled}{', and on the GPU' if cuda else ''}"}, {}
    try:
        backends["tensorrt-llm"] = _tensorrt(bool(gpus))
    except ModelError as error:
        lacks["tensorrt-llm"] = str(error)
    return Diagnosis(found, backends | {"echo": "always, without a model"}, lacks)


def _tensorrt(has_gpu: bool) -> str:
    """How it can run. Raises: ModelError, which says why it cannot."""
    if not has_gpu:
        raise ModelError("there is no NVIDIA GPU, or no driver for it")
    release = installed()
    if release is None:
        raise ModelError(f"tensorrt_llm is not installed: {INSTALL}")
    engine = 'flavour "pytorch" and "engine"' if release.has("engine flavour") else 'flavour "pytorch" alone'
    return f"{release}, {engine}"


def _gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU; nothing where there is none, or no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(_GPU)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(_GPU, (cell.strip() for cell in line.split(",")))) for line in said.splitlines() if line.strip()]


def _compiler() -> str:
    from batchinfer.engine.kernels.cpu.library import BuildError, find_compiler

    try:
        command = find_compiler()
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=_PATIENCE).stdout
    except BuildError as error:
        return str(error)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{shlex.join(command)} does not run: {error}"
    return next(iter(said.splitlines()), shlex.join(command))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
