"""The sections of a job, one class each: their keys, what each may be, and what contradicts what."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_serializer, model_validator

from batchinfer.job.problems import nearest
from batchinfer.job.values import (
    Integers,
    Moment,
    Place,
    Places,
    Share,
    Size,
    Some,
    SomeStrings,
    Span,
    Strings,
    as_tuple,
)
from batchinfer.request import SamplingParams


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class InputSection(Section):
    path: Places = Field(description="Parquet files, globs or folders; also s3://, gs://, abfs://, file://")
    on_change: Literal["error", "append", "ignore"] = Field(
        "error", description="files added since the output was begun: refused, taken up last, or passed over"
    )
    id_column: str | None = Field(None, description="a column that names rows, always carried along; rows need none")
    columns: SomeStrings | None = Field(None, description="columns to read; none given: all")
    filter: str | None = Field(None, description="SQL over a row's columns: \"lang = 'en' AND length(text) > 20\"")
    sample: float = Field(1.0, gt=0, le=1, description="the share of rows to draw, each by its address")
    sample_seed: int = Field(0, ge=-(2**63), lt=2**63, description="another seed draws other rows")
    limit: int = Field(0, ge=0, description="only the first rows, after filter and sample; 0: all")


class PromptSection(Section):
    template: str | None = Field(None, description="jinja2 over the row's columns: 'Summarise: {{ text }}'")
    messages: str | None = Field(None, description="a column of chat messages: list of {role, content}")
    system: str | None = Field(None, description="jinja2 over the row's columns, the system message before a template")
    chat: Literal["auto", "on", "off"] = Field(
        "auto", description="wrap in the model's chat template; auto: if it has one"
    )
    on_overlong: Literal["error", "truncate_left", "truncate_right", "skip"] = Field(
        "error", description="a prompt too long for the model: a failed row, cut at one end, or passed over"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> PromptSection:
        if (self.template is None) == (self.messages is None):
            raise ValueError("give exactly one of template and messages")
        if self.chat == "off" and (self.messages is not None or self.system is not None):
            raise ValueError('messages and system need the chat template: chat = "off" contradicts them')
        return self


class SamplingSection(Section):
    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = Field(0, description="the job's seed; a row's own is derived from it and the row's address")
    n: int = Field(1, description="completions a row; above 1 the completion columns are lists")
    stop: Strings = ()
    stop_token_ids: Integers = ()
    ignore_eos: bool = False
    columns: dict[str, str] = Field(
        default_factory=dict, description="per-row sampling: parameter = 'column'; a null cell takes the job's value"
    )

    @model_validator(mode="after")
    def _in_range(self) -> SamplingSection:
        self.params()
        allowed = [name for name in SamplingParams.names() if name != "n"]
        for name in self.columns:
            if name not in allowed:
                raise ValueError(f"columns: no per-row parameter {name!r}{nearest(name, allowed)}")
        return self

    def params(self) -> SamplingParams:
        return SamplingParams(**{name: getattr(self, name) for name in SamplingParams.names()})


class ModelSection(Section):
    path: Some = Field(description="a Hugging Face folder, a .gguf file, or the name of an installed model")

    @property
    def name(self) -> str:
        """What people call it: the last part of its path."""
        return Path(os.path.abspath(self.path)).name.removesuffix(".gguf")


class RangeSection(Section):
    """What is least, usual and most. 0 leaves the choice to the build."""

    min: int = Field(0, ge=0)
    opt: int = Field(0, ge=0)
    max: int = Field(0, ge=0)


# A number is the most: what may be is a limit, what is usual is what the engine is made fast for.
Range = Annotated[RangeSection, BeforeValidator(lambda value: {"max": value} if type(value) is int else value)]


class ProfileSection(Section):
    """The shapes that an engine is built for."""

    batch_size: Range = Field(RangeSection(), description="sequences that run at once; a number, or { min, opt, max }")
    step_tokens: Range = Field(RangeSection(), description="tokens of one step, prefill and decode together; likewise")
    seq_len: Range = Field(RangeSection(), description="prompt plus completion tokens of one sequence; likewise")


def _some(profiles: tuple[ProfileSection, ...]) -> tuple[ProfileSection, ...]:
    if not profiles:
        raise ValueError("expected one at least")
    return profiles


Profiles = Annotated[
    tuple[ProfileSection, ...],
    AfterValidator(_some),
    BeforeValidator(lambda value: (value,) if isinstance(value, dict) else as_tuple(value)),
]


class TensorRTSection(Section):
    """What only the tensorrt-llm backend knows."""

    flavour: Literal["pytorch", "engine"] = Field(
        "pytorch", description="pytorch loads checkpoints; engine compiles them (up to 1.3.0rc20)"
    )
    kv_cache_fraction: float = Field(0.9, gt=0, lt=1, description="share of the memory left that KV pages may take")
    capacity_policy: Literal["guaranteed_no_evict", "max_utilization"] = Field(
        "guaranteed_no_evict", description="admit what is sure to fit, or more, and evict if need be"
    )
    guided_json: str | None = Field(None, description="a JSON schema, as text, that every completion must follow")
    guided_decoding_backend: Literal["xgrammar", "llguidance"] = Field(
        "xgrammar", description="who holds completions to the schema; llguidance: pytorch flavour only"
    )
    recycle_rows: int = Field(100_000, ge=0, description="rows after which the engine is started anew; 0: never")

    @model_validator(mode="after")
    def _fits_flavour(self) -> TensorRTSection:
        if self.flavour == "engine" and self.guided_decoding_backend == "llguidance":
            raise ValueError('guided_decoding_backend = "llguidance" needs flavour = "pytorch"')
        if self.guided_json is not None:
            try:
                schema = json.loads(self.guided_json)
            except ValueError as error:
                raise ValueError(f"guided_json is not JSON: {error}") from None
            if not isinstance(schema, dict):
                raise ValueError("guided_json must be a JSON object, a schema")
        return self


class EngineSection(Section):
    backend: Literal["native", "tensorrt-llm", "echo"] = "native"
    isolation: Literal["auto", "process", "none"] = Field(
        "auto",
        description="where the engine runs: in a process of its own, so that no row can end the run, or in this one; "
        "auto: in its own, but for echo, which has nothing that can die",
    )
    plan: str | None = Field(
        None, description="an engine folder made by `batchinfer build`; none: built into the cache"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    tp: int = Field(1, ge=1, description="tensor-parallel ranks of a stage")
    pp: int = Field(1, ge=1, description="pipeline stages")
    pp_partition: Integers = Field((), description="layers of each stage; none given: dealt by measured time")
    micro_batches: int = Field(0, ge=0, description="steps under way at once in the stages; 0: one a stage")
    mode: Literal["colocated", "disaggregated"] = Field(
        "colocated", description="disaggregated: further ranks compute prompts, those of tp and pp only decode"
    )
    prefill_tp: int = Field(1, ge=1, description="tensor-parallel ranks of a stage that computes prompts")
    prefill_pp: int = Field(1, ge=1, description="pipeline stages that compute prompts")
    threads: int = Field(0, ge=0, description="CPU threads a rank; 0: an even share of the cores this process may use")
    kv_cache_gib: float = Field(
        0.0, ge=0, description="memory for KV pages a rank; 0: chosen from the profile and free memory"
    )
    prefix_sharing: bool = Field(True, description="share KV pages between rows with a common prefix")
    profile: Profiles = Field(
        (ProfileSection(),), description="several, each [[engine.profile]]: a step takes the narrowest that holds it"
    )
    tensorrt: TensorRTSection = TensorRTSection()

    @field_serializer("profile")
    def _as_written(self, profiles: tuple[ProfileSection, ...]) -> Any:
        """As one section where there is one, so that single keys of it can be overridden."""
        told = [profile.model_dump() for profile in profiles]
        return told[0] if len(told) == 1 else told

    @model_validator(mode="after")
    def _fits_backend(self) -> EngineSection:
        if self.backend != "tensorrt-llm":
            if self.tensorrt != TensorRTSection():
                raise ValueError(f'tensorrt is for backend = "tensorrt-llm" alone, and the backend is "{self.backend}"')
            return self
        if self.device == "cpu":
            raise ValueError('device = "cpu" contradicts backend = "tensorrt-llm", which needs an NVIDIA GPU')
        if self.isolation == "none":
            raise ValueError('isolation = "none" contradicts backend = "tensorrt-llm", which needs its own process')
        if self.kv_cache_gib:
            raise ValueError('kv_cache_gib is not for backend = "tensorrt-llm": use engine.tensorrt.kv_cache_fraction')
        if len(self.profile) > 1:
            raise ValueError('profile: backend = "tensorrt-llm" takes one, not several')
        return self

    @property
    def ranks(self) -> int:
        """Processes that compute, each on a GPU of its own where there are any."""
        prefill = self.prefill_tp * self.prefill_pp if self.mode == "disaggregated" else 0
        return self.tp * self.pp + prefill


NativeSchemes = Literal["int8", "int4", "gptq", "awq", "w8a8", "smoothquant"]
TensorRTSchemes = Literal["int4_awq", "w4a8_awq", "nvfp4", "int8_sq"]


class BuildSection(Section):
    """How a model becomes an engine, beside what it is built for."""

    quantization: Literal["auto", "none", "fp8", NativeSchemes, TensorRTSchemes] = Field(
        "auto", description="how the weights of layers are kept; auto: as the model comes; each backend has its own"
    )
    rebuild: bool = Field(
        False, description="build engine.plan again, in its place, where it is another device's or version's"
    )
    calibration_rows: int = Field(512, ge=1, description="prompts of the job that a build calibrates with")
    kv_dtype: Literal["auto", "fp8", "int8", "nvfp4"] = Field(
        "auto", description="keys and values; int8 on CPUs, fp8 on GPUs: half the memory; more in tensorrt-llm"
    )
    group_size: int = Field(0, ge=-1, description="4-bit weights that share a scale; -1: all of a row, 0: 128")
    max_quality_loss: float = Field(
        -1.0,
        description="perplexity that quantising may cost, 0.01 is 1 %; below 0: 1 % for 8 bits, 3 % for 4; where it "
        "costs more, the matrices that cost most stay as they are, up to half of the weights",
    )


class OutputSection(Section):
    path: Place = Field(
        description="folder for the Parquet parts, or s3://, gs://, abfs://; control files go to PATH.batchinfer"
    )
    columns: Strings | None = Field(None, description="input columns carried to the output; none given: all")
    prefix: str = Field(
        "", description="put before the names of the result columns, to keep them apart from the input's"
    )
    part_size: Size | None = Field(
        None, description='about how large a part is to be: "128MB"; none given: checkpoint.unit_rows decides'
    )
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = "zstd"


class CheckpointSection(Section):
    unit_rows: int = Field(1024, ge=1, description="rows of one unit: the grain of commits and of output parts")
    sync_seconds: float | None = Field(
        None, ge=0, description="longest time a finished row waits for its fsync; none given: 1, in an object store 10"
    )
    sync_rows: int | None = Field(
        None, ge=1, description="most finished rows that wait for one; none given: 64, in an object store 4096"
    )


class LimitsSection(Section):
    max_failed_fraction: float = Field(0.5, ge=0, le=1, description="more failed rows than this end in exit code 3")
    retries: int = Field(1, ge=0, description="how often a row is asked again whose failure was the engine's own")
    restarts: int = Field(
        10, ge=0, description="restarts of a dead engine without a row answered in between; more of them end the run"
    )
    engine_timeout: Span = Field("10m", description="longest time that an engine at work may show no sign of life")
    deadline: Moment | None = Field(
        None, description='when to stop taking up rows: "06:00", the next one, or an ISO date and time'
    )
    max_time: Span | None = Field(None, description='how long to take up rows: "4h", "90m", "1h30m"')


class ReportSection(Section):
    log_seconds: float = Field(5.0, gt=0, description="seconds between progress lines where there is no terminal")
    prometheus: Some | None = Field(None, description="a file for the node exporter's textfile collector: run.prom")
    pushgateway: Some | None = Field(None, description="URL of a Prometheus push gateway")
    opentelemetry: bool = Field(False, description="a span and gauges; the OTEL_… variables say where they go")
    price_per_hour: float = Field(0.0, ge=0, description="what the machine costs, for the cost of a run")
    trace: Some | None = Field(None, description="a file for ui.perfetto.dev: what the engine did when, rank by rank")


class RaySection(Section):
    engines: int = Field(0, ge=0, description="how many engines; 0: as many as the cluster has room for")
    cpus: int = Field(1, ge=1, description="CPUs that the cluster sets aside for an engine, beside a GPU for each rank")
    nodes: int = Field(1, ge=1, description="nodes that the ranks of an engine spread over, as many on each")
    restarts: int = Field(
        2, ge=0, description="how often an engine that is lost is started again, and a unit tried again"
    )


class JobSection(Section):
    name: str = "batchinfer"
    shard: Share | None = Field(
        None, description='one of several runs that share the work: "0/4" is the first of four; "auto" for array jobs'
    )
