"""Job: one validated, frozen description of the work, read from TOML, environment and overrides."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    model_validator,
)

from batchinfer import deadline, shard, size
from batchinfer.errors import JobError
from batchinfer.location import checked, redacted
from batchinfer.request import SamplingParams

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENV_PREFIX = "BATCHINFER_"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _as_tuple(value: Any) -> Any:
    """TOML writes a list where a Job holds a tuple; a lone string stands for a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _written_as(parse: Any) -> tuple[Any, Any]:
    """A text that ``parse`` understands and that is kept as it is; TOML's own dates and times become text."""
    to_text = BeforeValidator(lambda value: value.isoformat() if hasattr(value, "isoformat") else value)
    return to_text, AfterValidator(lambda value: parse(value) and value)


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Some = Annotated[str, Field(min_length=1)]  # "" would be the folder in which batchinfer is started
Place = Annotated[Some, AfterValidator(checked)]  # a path or a URL
Places = Annotated[
    tuple[Some, ...],
    Field(min_length=1),
    BeforeValidator(_as_tuple),
    AfterValidator(lambda paths: tuple(map(checked, paths))),
]
SomeStrings = Annotated[tuple[Some, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
Integers = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
Moment = Annotated[(str, *_written_as(deadline.moment))]
Size = Annotated[(str, *_written_as(size.in_bytes))]
Span = Annotated[(str, *_written_as(deadline.seconds))]
Share = Annotated[(str, *_written_as(shard.check))]


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
                raise ValueError(f"columns: no per-row parameter {name!r}{_nearest(name, allowed)}")
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
    BeforeValidator(lambda value: (value,) if isinstance(value, dict) else _as_tuple(value)),
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
        -1.0, description="perplexity that quantising may cost, 0.01 is 1 %; below 0: 1 % for 8 bits, 3 % for 4"
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
            (f"{path}", _read_toml(path) if path is not None else {}),
            ("environment", _from_environ(os.environ if environ is None else environ)),
            ("command line", _from_dotted(overrides or {})),
        ]
        for name, layer in layers:
            _merge(tree, layer, origin, name)
        return cls.from_dict(tree, origin)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> Job:
        """Validate a nested dict. ``origin`` maps dotted keys to where they came from, for messages."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise JobError(_explain(error, origin or {})) from None

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
        _merge(tree, _from_dotted(overrides), origin, "command line")
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


def starter() -> str:
    """A job file to start from: the keys that a job must have, and all others as comments with their defaults."""
    examples = ("prompts.parquet", "Summarise in one sentence: {{ text }}", "smollm2-135m-instruct", "out")
    needed = dict(zip(_NEEDED.values(), examples))
    head = "# A batchinfer job. Relative paths count from the folder in which batchinfer is started.\n"
    sections = ((name, section.annotation) for name, section in Job.model_fields.items())
    return "\n".join([head, *("\n".join(_starter_section(name, section, needed)) for name, section in sections)])


def _starter_section(name: str, section: Any, needed: Mapping[str, str]) -> Iterator[str]:
    yield f"[{name}]"
    nested = []
    for key, about in section.model_fields.items():
        default = needed.get(f"{name}.{key}", about.get_default(call_default_factory=True))
        if isinstance(default, tuple) and default and isinstance(default[0], Section):
            [default] = default
        if isinstance(default, Section) and not isinstance(default, RangeSection):
            nested.append((f"{name}.{key}", type(default)))
            continue
        shown = '"…"' if default is None else json.dumps(0 if isinstance(default, RangeSection) else default)
        line = f"{key} = {shown}" if f"{name}.{key}" in needed else f"# {key} = {shown}"
        yield f"{line:<40}  # {about.description}" if about.description else line
    yield ""
    for inner in nested:
        yield from _starter_section(*inner, needed)


def parse_value(text: str) -> Any:
    """A value typed on a command line or in a variable: TOML if it is TOML (``3``, ``true``, ``["a"]``), else text."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise JobError(f"no job file at {path}; `batchinfer init` writes one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cannot read the job file {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{path} is not valid TOML: {error}") from None


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    """``BATCHINFER_ENGINE__THREADS=2`` → ``{"engine": {"threads": 2}}``; names without ``__`` are not job keys."""
    names = (name for name in sorted(environ) if name.startswith(ENV_PREFIX) and "__" in name)
    return _from_dotted({n.removeprefix(ENV_PREFIX).lower().replace("__", "."): parse_value(environ[n]) for n in names})


def _from_dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise JobError(f"cannot set {key}: {parent} is a value, not a section")
        node[leaf] = value
    return tree


def _merge(tree: dict[str, Any], layer: Mapping[str, Any], origin: dict[str, str], name: str, prefix: str = "") -> None:
    for key, value in layer.items():
        origin[prefix + key] = name
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value, origin, name, f"{prefix}{key}.")
        elif isinstance(value, dict):
            tree[key] = {}
            _merge(tree[key], value, origin, name, f"{prefix}{key}.")
        else:
            tree[key] = value


def _nearest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(valid))}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the section that ``location`` lies in."""
    model: Any = Job
    for part in location:
        model = _section(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section(annotation: Any) -> Any:
    """The type itself, or that of the items of a tuple."""
    return get_args(annotation)[0] if get_origin(annotation) is tuple else annotation


_NEEDED = {"input": "input.path", "prompt": "prompt.template", "model": "model.path", "output": "output.path"}


def _explain(error: ValidationError, origin: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors():
        location = tuple(part for part in problem["loc"] if isinstance(part, str))
        key = ".".join(location)
        where = f" ({origin[key]})" if key in origin else ""
        kind = problem["type"]
        if kind == "extra_forbidden":
            lines.append(f"unknown key {key!r}{where}{_nearest(location[-1], _fields_at(location[:-1]))}")
        elif kind == "missing":
            key = _NEEDED.get(key, key)
            lines.append(f"missing {key}: the job must say it in the file or with --set {key}=…")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            field = f"{key}.{message.split(maxsplit=1)[0]}"  # a section's own checks begin with the field they mean
            where = f" ({origin[field]})" if field in origin else where
            shown = f", got {redacted(repr(problem['input']))}" if kind != "value_error" else ""
            lines.append(f"{key or 'job'}{where}: {message[0].lower() + message[1:]}{shown}")
    return "\n".join(lines) if len(lines) == 1 else "the job has several problems:\n  " + "\n  ".join(lines)
