"""A job: one validated, frozen description of the work, read from TOML, environment and overrides."""

from __future__ import annotations

from batchinfer.job.example import starter
from batchinfer.job.job import Job
from batchinfer.job.layers import parse_value
from batchinfer.job.sections import (
    BuildSection,
    CheckpointSection,
    EngineSection,
    InputSection,
    JobSection,
    LimitsSection,
    ModelSection,
    OutputSection,
    ProfileSection,
    PromptSection,
    RangeSection,
    RaySection,
    ReportSection,
    SamplingSection,
    TensorRTSection,
)

__all__ = [
    "Job",
    "BuildSection",
    "CheckpointSection",
    "EngineSection",
    "InputSection",
    "JobSection",
    "LimitsSection",
    "ModelSection",
    "OutputSection",
    "ProfileSection",
    "PromptSection",
    "RangeSection",
    "RaySection",
    "ReportSection",
    "SamplingSection",
    "TensorRTSection",
    "parse_value",
    "starter",
]
