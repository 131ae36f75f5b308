"""`manifest.json`: what an engine folder holds, how it was made, and how good it is."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from pi05c.backend.inductor import INDUCTOR
from pi05c.folder import CHECKPOINT, MANIFEST, PACKAGE, PLAN
from pi05c.graph.errors import Pi05cError, shortened
from pi05c.graph.files import read_text, write_text

FORMAT: Final = 3
"""Raised whenever an older pi05c could not read what this one writes."""

_READ_BYTES = 2**24


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_NOT_FINITE = ("inf", "-inf", "nan")
"""What stands for a number that JSON has no spelling for."""

Number = Annotated[
    float,
    BeforeValidator(lambda value: float(value) if value in _NOT_FINITE else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else str(value), when_used="json"),
]


def _inside(name: str) -> str:
    """A path that a manifest may name: below its folder, so that nobody's folder makes pi05c read or write elsewhere."""
    path = PurePosixPath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} lies outside of the folder")
    return name


PathInside = Annotated[str, AfterValidator(_inside)]

Size = Annotated[int, Field(ge=0, lt=2**63)]
"""A size as ONNX has it."""


class FileRecord(_Record):
    """A file of the folder."""

    bytes: int
    sha256: str


class TensorRecord(_Record):
    """An input or output: `shape` holds sizes, and names where a dimension may vary.

    `low` and `high` are the smallest and largest value seen over all samples; None where none were run. `fixed` holds
    the values for which the graph was specialized, in row-major order, None for an element that the caller gives; an
    input of which all elements are fixed is not fed.
    """

    name: str
    dtype: str
    shape: list[Size | str]
    low: Number | None = None
    high: Number | None = None
    fixed: list[bool | None] | None = None

    @model_validator(mode="after")
    def _fixes_each_element(self) -> TensorRecord:
        sizes = [size for size in self.shape if isinstance(size, int)]
        if self.fixed is not None and (sizes != self.shape or len(self.fixed) != math.prod(sizes)):
            raise ValueError(f"{len(self.fixed)} values are fixed of a tensor of shape {self.shape}")
        return self

    @property
    def fed(self) -> bool:
        """Whether an input is to be fed."""
        return self.fixed is None or None in self.fixed

    @property
    def contract(self) -> str:
        """What must be known of an input beside its type, in a phrase; empty for most."""
        if self.fixed is None:
            return ""
        values = ",".join("*" if value is None else str(int(value)) for value in self.fixed)
        return f"fixed to {values}" + (" (* is given)" if self.fed else ", not fed")


class SourceRecord(_Record):
    """The plain graph that was compiled. `sha256` covers the graph and its weights."""

    name: str
    sha256: str
    opset: int
    weights_random: bool | None = None
    config: Any = None
    robot: Any = None
    metadata: dict[str, str] = Field(default_factory=dict)


class SkipRecord(_Record):
    """A place that a pass recognised and left alone."""

    where: str
    reason: str


class CostRecord(_Record):
    """What one part of a graph costs in one type (`pi05c.cost.Cost`); `seconds` is None where no GPU's rates are known.

    `dtype` is what the operators compute in, as `pi05c cost` shows it; empty in records of all types together.
    """

    part: str
    dtype: str = ""
    flops: int
    weight_bytes: int
    activation_bytes: int
    kernels: int
    operators: int
    seconds: Number | None


class PassRecord(_Record):
    """What one pass did, with every option it ran with, and what each part costs after it (empty: not known).

    `moved` is the relative L2 error of the outputs against those before the pass; None where it was not measured.
    """

    name: str
    exact: bool
    options: dict[str, Any]
    changed: int
    skipped: list[SkipRecord]
    notes: list[str]
    seconds: Number
    nodes_before: int
    nodes_after: int
    cost: list[CostRecord] = Field(default_factory=list)
    moved: Number | None = None


class PipelineRecord(_Record):
    """`requested` is what was asked for; `resolved` names every pass with the options given for it.

    `cost` is that of the plain graph by part, and `cost_device` the GPU that all costs of the pipeline are for.
    """

    requested: str
    resolved: str
    passes: list[PassRecord]
    cost: list[CostRecord] = Field(default_factory=list)
    cost_device: str | None = None


class PrecisionRecord(_Record):
    """How many operators of one kind compute in one type, in one part of the model."""

    part: str
    kind: str
    dtype: str
    count: int


class OperatorRecord(_Record):
    """One operator of one layer, all its steps, chunks and parallel linears together, in one type.

    Attributes:
        layer: from 0 within its part; None outside of layers.
        operator: one of `pi05c.passes.patterns.layers.OPERATORS` or `OTHERS`.
        dtype: the type that it computes in, as `PrecisionRecord` has it.
        nodes: of the rewritten graph.
    """

    part: str
    layer: int | None
    operator: str
    dtype: str
    nodes: list[str]


class CalibrationRecord(_Record):
    """The data that ranges were measured on. `used` and `held_back` count samples; `method` chose what is clipped."""

    source: str
    sha256: str
    synthetic: bool
    used: int
    held_back: int
    method: str = "max"


class ErrorRecord(_Record):
    """Departure of one output of one sample from the float32 plain graph.

    `relative_l2` is |result - reference| / |reference|, `sqnr_db` its inverse square in decibels (None where the
    result is equal bit by bit), `max_abs` in the units of the output.
    """

    sample: int
    output: str
    relative_l2: Number
    cosine: Number
    sqnr_db: Number | None
    max_abs: Number


class DriftRecord(_Record):
    """Departure of the flow in one denoising step: relative L2 errors, each of the worst held-back sample.

    Attributes:
        step: from 0.
        x: of the state after the step.
        v: of what the step adds to it, dt * v.
        x_node, v_node: that make them in the rewritten graph.
    """

    step: int
    x: Number
    v: Number
    x_node: str
    v_node: str


class LayerErrorRecord(_Record):
    """Departure of the residual stream behind one half of a layer: the relative L2 error of the worst sample.

    Attributes:
        part, layer: as `OperatorRecord`.
        step: the denoising step, None in other parts.
        half: `attention` or `MLP`.
        node: that makes it in the rewritten graph.
    """

    part: str
    layer: int
    step: int | None
    half: str
    relative_l2: Number
    node: str

    @property
    def where(self) -> str:
        """The place in words."""
        step = "" if self.step is None else f"step {self.step} of "
        return f"{step}{self.part}, layer {self.layer}, behind its {self.half}"


class QuantizerRecord(_Record):
    """What one FP8 QuantizeLinear met over all held-back samples, and all steps of the loop that it may lie in.

    Attributes:
        node: the QuantizeLinear; `tensor` is what it reads.
        part, layer, step: of who reads the result; None where that is not known.
        operator: the linear that reads the result, or the factor of attention: Q, K, P (probabilities) or V.
        scale: one code is worth that much; 448 * scale is the largest value.
        low, high: smallest and largest value.
        elements: how many were quantized; None where the shape is not static.
        clipped: how many of them lay beyond 448 * scale.
        flushed: how many that were not zero became zero.
    """

    node: str
    tensor: str
    part: str | None
    layer: int | None
    step: int | None
    operator: str | None
    scale: Number
    low: Number
    high: Number
    elements: int | None
    clipped: int
    flushed: int


class VerificationRecord(_Record):
    """The rewritten graph, run in onnxruntime, against the plain graph. `limit` holds for `relative_l2`.

    Attributes:
        drift: by denoising step; empty where no flow accumulation is found in both graphs.
        layers: in order of execution, those that both graphs have in one shape.
        layer_samples: on how many held-back samples layers were compared.
        quantizers: in order of execution.
    """

    limit: Number
    passed: bool
    errors: list[ErrorRecord] = Field(min_length=1)
    drift: list[DriftRecord] = Field(default_factory=list)
    layers: list[LayerErrorRecord] = Field(default_factory=list)
    layer_samples: int = 0
    quantizers: list[QuantizerRecord] = Field(default_factory=list)

    def first_departure(self) -> LayerErrorRecord | None:
        """The first layer whose output departs by more than the limit."""
        return next((layer for layer in self.layers if not layer.relative_l2 <= self.limit), None)

    def first_drift(self) -> DriftRecord | None:
        """The first denoising step after which x departs by more than the limit."""
        return next((step for step in self.drift if not step.x <= self.limit), None)

    def worst(self) -> ErrorRecord:
        """The output of the sample with the largest relative L2 error; nan counts as largest."""
        return max(self.errors, key=lambda error: (error.relative_l2 != error.relative_l2, error.relative_l2))


def _with_profiles(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a builder; `shapes`, where there are any, by input the smallest, the usual and the largest."""
    TypeAdapter(dict[str, Annotated[list[list[Size]], Field(min_length=3, max_length=3)]]).validate_python(
        options.get("shapes", {}), strict=True
    )
    return options


class EngineRecord(_Record):
    """The plan, or the package of Inductor, or how it is to be built.

    Attributes:
        targets: GPUs by canonical name; `cpu` alone for a package that runs on the CPU.
        flavour: `tensorrt-rtx`, `tensorrt`, `inductor`, or None for a folder without a plan.
        options: builder options beside the targets.
        version: of the builder (of torch for a package); None while there is no plan.
        file: the plan; None while there is none.
        reason: why there is no plan.
    """

    targets: list[str]
    flavour: str | None
    options: Annotated[dict[str, Any], AfterValidator(_with_profiles)] = Field(default_factory=dict)
    version: str | None = None
    file: PathInside | None = None
    seconds: Number | None = None
    reason: str | None = None

    @property
    def product(self) -> str:
        """The name of the file that the builder makes."""
        return PACKAGE if self.flavour == INDUCTOR else PLAN


class PartRecord(_Record):
    """One engine of several that make up a policy, in the subfolder of its name.

    Attributes:
        name: its parts, joined by `+`; `step` is run once for each denoising step.
        inputs: those of the policy that it takes, and what earlier parts hand over, in the type in which both sides
            have it.
        outputs: what it hands over, and the outputs of the policy that it makes.
        runs: how often it runs for one observation: a step as often as the policy was exported with.
        errors: departure of what it hands over from the plain graph, all parts before it rewritten too.
    """

    name: PathInside
    pipeline: PipelineRecord
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    precision: list[PrecisionRecord]
    errors: list[ErrorRecord]
    engine: EngineRecord
    runs: int = 1


class Manifest(_Record):
    """Everything a robot's operator must know about an engine folder.

    Of a split engine `parts` holds one record a part, in order of execution. `pipeline` then says what was asked for,
    without passes of its own, and `engine` what the plans share, without a file.
    """

    format: Literal[2, 3]
    versions: dict[str, str]
    source: SourceRecord
    pipeline: PipelineRecord
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    precision: list[PrecisionRecord]
    calibration: CalibrationRecord | None
    verification: VerificationRecord | None
    engine: EngineRecord
    files: dict[PathInside, FileRecord]
    parts: list[PartRecord] = Field(default_factory=list)
    operators: list[OperatorRecord] = Field(default_factory=list)

    @property
    def places(self) -> list[str]:
        """The subfolders that hold a graph each; the empty text for the folder itself."""
        return [part.name for part in self.parts] or [""]

    def engine_of(self, place: str) -> EngineRecord:
        """The plan of a place."""
        return next((part.engine for part in self.parts if part.name == place), self.engine)

    def with_engine(self, place: str, engine: EngineRecord) -> Manifest:
        """This manifest with another plan of a place."""
        if not place:
            return self.model_copy(update={"engine": engine})
        parts = [
            part.model_copy(update={"engine": engine}) if part.name == place else part for part in self.parts
        ]
        return self.model_copy(update={"parts": parts})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an engine folder.

    Raises:
        Pi05cError: there is none, it is damaged, or a newer pi05c wrote it.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise Pi05cError(
            f"{folder} is not an engine folder: it has no {MANIFEST}; pi05c MODEL.onnx -o {folder} makes one"
        )
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Pi05cError(f"{path} is not JSON ({error}): compile the folder again") from error
    written = found.get("format") if isinstance(found, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise Pi05cError(
            f"{path} has format {written}, this pi05c reads up to {FORMAT}: use the pi05c that wrote it or a newer one"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Pi05cError(
            f"{path} is damaged at {where or 'its root'} ({first['msg']}): compile again"
        ) from error
    for place in manifest.places:
        if (plan := manifest.engine_of(place).file) is not None and plan not in manifest.files:
            raise Pi05cError(f"{path} is damaged: it names no file {shortened(plan)}; compile again")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, in one step so that a reader never sees half of it."""
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file."""
    return FileRecord(bytes=path.stat().st_size, sha256=sha256([path]))


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file of a folder but its manifest, by path relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): file_record(path)
        for path in files
        if path.name not in (MANIFEST, CHECKPOINT)
    }


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check that the files of a folder are those that its manifest names, byte by byte.

    Raises:
        Pi05cError: one is missing or differs; a plan that a device made for itself is not in the manifest.
    """
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise Pi05cError(f"{path} is missing: copy the folder again, or compile it again")
        if path.stat().st_size != record.bytes or sha256([path]) != record.sha256:
            raise Pi05cError(
                f"{path} is not the file that {MANIFEST} names: copy the folder again, or compile it again"
            )


def sha256(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()
