"""Job: one validated, frozen description of the work."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from batchinfer.errors import JobError
from batchinfer.job.layers import from_dotted, from_environ, merge, read_toml
from batchinfer.job.problems import explain
from batchinfer.job.sections import (
    BuildSection,
    CheckpointSection,
    EngineSection,
    InputSection,
    JobSection,
    LimitsSection,
    ModelSection,
    OutputSection,
    PromptSection,
    RaySection,
    ReportSection,
    SamplingSection,
    Section,
)


class Job(Section):
    """What to read, ask, run and write. Frozen: two equal jobs do the same work."""

    job: JobSection = JobSection()
    input: InputSection
    prompt: PromptSection
    sampling: SamplingSection = SamplingSection()
    model: ModelSection
    engine: EngineSection = EngineSection()
    build: BuildSection = BuildSection()
    output: OutputSection
    checkpoint: CheckpointSection = CheckpointSection()
    limits: LimitsSection = LimitsSection()
    report: ReportSection = ReportSection()
    ray: RaySection = RaySection()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        overrides: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Job:
        """Read a job: overrides > ``BATCHINFER_*`` > file > defaults.

        Args:
            path: a TOML file; without one, overrides and environment say everything.
            overrides: dotted key → value, ``{"sampling.max_tokens": 64}``.
            environ: ``BATCHINFER_SECTION__KEY`` variables, ``os.environ`` unless given. Values are read as TOML, else
                as text.

        Raises:
            JobError: the file is missing or not TOML, a key is unknown, a value has the wrong type or range. Every
                problem is named with its key and where it came from.
        """
        origin: dict[str, str] = {}
        tree: dict[str, Any] = {}
        layers = [
            (f"{path}", read_toml(path) if path is not None else {}),
            ("environment", from_environ(os.environ if environ is None else environ)),
            ("command line", from_dotted(overrides or {})),
        ]
        for name, layer in layers:
            merge(tree, layer, origin, name)
        return cls.from_dict(tree, origin)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> Job:
        """Validate a nested dict. ``origin`` maps dotted keys to where they came from, for messages."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise JobError(explain(error, origin or {}, cls)) from None

    def build_options(self) -> dict[str, Any]:
        """What the build of a native engine is asked for."""
        engine = {"device": self.engine.device, "dtype": self.engine.dtype}
        engine["profiles"] = [profile.model_dump() for profile in self.engine.profile]
        build = self.build.model_dump(include={"quantization", "group_size", "max_quality_loss", "kv_dtype"})
        return engine | build | {"calibration_key": self.calibration_key()}

    def calibration_key(self) -> str:
        """Names the prompts that a build calibrates with.

        Rows may be appended while a job is under way: its engine stays the one that it was begun with.
        """
        asked = [self.input.path, self.prompt.model_dump(mode="json"), self.build.calibration_rows]
        return json.dumps(asked, sort_keys=True)

    def changed(self, overrides: Mapping[str, Any]) -> Job:
        """This job with other values for some dotted keys. Raises: JobError as ``load``."""
        tree, origin = self.model_dump(), {}
        merge(tree, from_dotted(overrides), origin, "command line")
        return self.from_dict(tree, origin)

    def semantic(self) -> dict[str, Any]:
        """The part of the job that decides what a row's completion is; the rest may change between runs.

        The engine adds its own part (weights, tokenizer, dtype): see ``Backend.fingerprint``.
        """
        columns = self.output.columns and (*filter(None, [self.input.id_column]), *self.output.columns)
        chosen = {"columns", "filter", "sample", "sample_seed", "limit"}
        return {
            "input": self.input.model_dump(mode="json", include=chosen),
            "prompt": self.prompt.model_dump(mode="json"),
            "sampling": self.sampling.model_dump(mode="json"),
            "output": {"columns": columns, "prefix": self.output.prefix},
        }
