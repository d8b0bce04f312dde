"""What each version of tensorrt_llm has. Whatever depends on the version is asked here and nowhere else.

| | 1.0 | 1.1, 1.2 | 1.3.0rc1 – rc20 | rc21 – rc23 | rc24, rc25 | rc26 – 1.4 |
|---|---|---|---|---|---|---|
| PyTorch flavour | yes | yes | yes | yes | yes | yes |
| TensorRT-engine flavour | yes | yes | yes | – | – | – |
| the C++ sampler, asked for by | ``use_torch_sampler`` | ``sampler_type`` | ``sampler_type`` | same | same | – |
| the torch sampler knows min_p and penalties | – | – | – | – | yes | yes |
| the torch sampler draws by a request's seed alone | – | – | – | – | – | – |

Read: the public sources of ``llm.py``, ``llm_args.py``, ``sampling_params.py``, ``executor/`` and the samplers at
single commits between 1.0.0rc4 and mid 2026; the published documentation of 1.3.0rc24 and rc26; the list of LLM
arguments that late telemetry names. Not read: ``llm.py`` and ``llm_args.py`` of 1.4, and what else changed within a
column. None of it was run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

from packaging.version import InvalidVersion, Version

from batchinfer.errors import ModelError

PACKAGE = "tensorrt_llm"
INSTALL = 'pip install "batchinfer[tensorrt-llm]" with NVIDIA\'s package index'
KNOWN = "1.0 to 1.4"
_OLDEST, _BEYOND = Version("1.0.0"), Version("1.5.0.dev0")

# feature → first version that has it, first that has it no more
_FEATURES: dict[str, tuple[str | None, str | None]] = {
    "engine flavour": (None, "1.3.0rc21"),
    "C++ sampler": (None, "1.3.0rc26"),
    "use_torch_sampler": (None, "1.1.0.dev0"),
    "sampler_type": ("1.1.0.dev0", "1.3.0rc26"),
    "torch sampler with min_p and penalties": ("1.3.0rc24", None),
}


class Release:
    """One version: ``has`` asks for a feature.

    Raises:
        ModelError: it is none of those that are known here.
    """

    def __init__(self, version: str) -> None:
        try:
            parsed = Version(version)
        except InvalidVersion:
            parsed = _BEYOND
        if not _OLDEST <= parsed < _BEYOND:
            raise ModelError(f"{PACKAGE} {version} is not known here: expected {KNOWN}, install one of those")
        self._version = parsed
        self.series = f"{parsed.major}.{parsed.minor}"

    def __str__(self) -> str:
        return f"{PACKAGE} {self._version}"

    def has(self, feature: str) -> bool:
        since, until = _FEATURES[feature]
        return (since is None or self._version >= Version(since)) and (until is None or self._version < Version(until))


def installed() -> Release | None:
    """The version here, told without importing it (seconds, and it may start MPI); None if there is none.

    Raises:
        ModelError: it is not known here.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    try:
        return Release(importlib.metadata.version(PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        return None


def needed() -> Release:
    """``installed``, or a line that says how to install it."""
    release = installed()
    if release is None:
        raise ModelError(f'engine.backend = "tensorrt-llm" needs {PACKAGE}, which is not installed: {INSTALL}')
    return release
