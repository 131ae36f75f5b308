"""Which builder makes the plan, or the package, for which GPUs; and the plan or package itself."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from pi05c.backend import inductor, tensorrt
from pi05c.backend.gpu import compute_capabilities
from pi05c.backend.inductor import CPU, INDUCTOR, InductorOptions, Package
from pi05c.backend.signature import inputs_of
from pi05c.backend.targets import Flavour, Target, parse_targets, target_of, unsupported
from pi05c.backend.tensorrt import BuildOptions, BuildResult, ShapeProfile
from pi05c.folder import FAILED_BUILD, GRAPH, PACKAGE, PLAN, REPORT, inside
from pi05c.graph.check import weights_as_inputs
from pi05c.graph.errors import BuildError, Pi05cError, UsageError
from pi05c.graph.files import write_text
from pi05c.graph.io import Model, to_proto
from pi05c.graph.requirements import WITH_TORCH
from pi05c.graph.requirements import unsupported as unsupported_packages
from pi05c.manifest import (
    EngineRecord,
    Manifest,
    TensorRecord,
    file_record,
    read_manifest,
    write_manifest,
)
from pi05c.precision import dtypes_of
from pi05c.progress import Progress, Update
from pi05c.report import write_report

if TYPE_CHECKING:
    from pi05c.backend.child import BuildProgress

NO_PLAN = "onnxruntime"
"""The word for `--backend` that asks for a folder without a plan."""

DEFAULT_TARGET = "sm120"
"""What TensorRT-RTX builds for where no target is named and no GPU is present: consumer Blackwell."""

_STORED_TYPES = {"float16", "bfloat16"}
"""Types of checkpoints, which no choice of passes takes out of every weight."""

_PROFILE = re.compile(r"(?P<name>[^=]+)=(?P<min>[^:]+):(?P<opt>[^:]+):(?P<max>[^:]+)\Z")


@dataclass(frozen=True)
class Builder:
    """What is to be built, decided before anything is written.

    Attributes:
        options: of TensorRT (flavour, targets and the rest) or of Inductor; None for a folder without a plan.
        obstacle: why the plan cannot be built on this machine; None if it can.
        chosen: one sentence where the target was chosen and not asked for.
    """

    options: BuildOptions | InductorOptions | None
    targets: tuple[Target, ...] = ()
    obstacle: str | None = None
    chosen: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the program that builds is there at all, if one is needed."""
        if isinstance(self.options, InductorOptions):
            return inductor.is_installed()
        return self.options is None or self.options.flavour in tensorrt.installed_flavours()

    @property
    def profiles(self) -> tuple[ShapeProfile, ...]:
        """Shapes of dynamic inputs."""
        return self.options.profiles if isinstance(self.options, BuildOptions) else ()


def choose(backend: str | None, target: str | None, options: Mapping[str, Any]) -> Builder:
    """Decide who builds for what.

    Args:
        backend: `tensorrt-rtx`, `tensorrt`, `inductor`, `onnxruntime` for no plan, or None to choose.
        target: GPUs as `--target` takes them, `cpu` (of Inductor), or None for the GPU at hand.
        options: the other fields of `BuildOptions` or `InductorOptions`.

    Raises:
        UsageError: an unknown backend or target; a time limit that is not positive; an option that the builder or
            this machine cannot do.
        BuildError: no builder is installed and no target is named for which the plan could be built elsewhere; the
            builder is installed in a version that is not supported.
    """
    time_limit = options.get("time_limit_s")
    if time_limit is not None and not time_limit > 0:
        raise UsageError(f"--time-limit {time_limit:g} leaves no time to build: give seconds above 0")
    if backend == INDUCTOR:
        return _choose_inductor(target, options)
    if options.get("max_autotune"):
        raise UsageError(f"--max-autotune is Inductor's: give --backend {INDUCTOR}, or leave it out")
    targets = parse_targets(target) if target is not None else ()
    if backend == NO_PLAN:
        return Builder(None, targets)
    if backend is not None and backend not in (flavour.value for flavour in Flavour):
        known = ", ".join([*(flavour.value for flavour in Flavour), INDUCTOR, NO_PLAN])
        raise UsageError(f"unknown backend {backend!r}: choose among {known}")
    chosen = None
    if targets:
        flavour = _flavour_for(backend, targets)
    else:
        flavour = tensorrt.find_flavour(backend)
        here = [target_of(capability) for capability in compute_capabilities()[:1]]
        if here and here[0] is not None:
            targets = (here[0],)
            chosen = f"no --target: building for the GPU at hand, {targets[0].name}"
        elif flavour is Flavour.TENSORRT_RTX:
            targets = parse_targets(DEFAULT_TARGET)
            chosen = f"no --target and no GPU here: building for {DEFAULT_TARGET} ({targets[0].architecture})"
    own = {name: value for name, value in options.items() if name != "max_autotune"}
    decided = BuildOptions(flavour=flavour, targets=targets, **own)
    obstacle = tensorrt.can_build(targets, flavour)
    if obstacle is None:  # what is built elsewhere is checked there
        tensorrt.check_options(decided)
    return Builder(decided, targets, obstacle, chosen)


_INDUCTOR_OPTIONS = {field.name for field in fields(InductorOptions)}


def _choose_inductor(target: str | None, options: Mapping[str, Any]) -> Builder:
    """A builder of packages, for the CPU where no GPU is named and none is present."""
    foreign = [
        name for name, value in options.items() if value and name not in (*_INDUCTOR_OPTIONS, "verbose")
    ]
    if foreign:
        name = "shapes" if foreign[0] == "profiles" else foreign[0].replace("_", "-")
        raise UsageError(f"--{name} is TensorRT's: leave it out with --backend {INDUCTOR}")
    targets: tuple[Target, ...] = ()
    chosen = None
    cpu = target == CPU
    if target is not None:
        targets = () if cpu else parse_targets(target)
    elif present := compute_capabilities():
        here = target_of(present[0])
        targets = () if here is None else (here,)
        chosen = f"no --target: compiling for the GPU at hand, {here or '.'.join(map(str, present[0]))}"
    else:
        cpu = True
        chosen = "no --target and no GPU here: compiling for this CPU"
    own = {name: value for name, value in options.items() if name in _INDUCTOR_OPTIONS}
    decided = InductorOptions(cpu=cpu, **own)
    obstacle = inductor.cannot_compile(targets, decided)
    if obstacle is None and (reason := unsupported_packages(WITH_TORCH)):
        raise BuildError(reason)
    return Builder(decided, targets, obstacle, chosen)


def _flavour_for(backend: str | None, targets: Sequence[Target]) -> Flavour:
    """The flavour for named targets; where none that is installed can build, the one for the device's own build."""
    installed = tensorrt.installed_flavours()
    if backend is not None:
        return Flavour(backend)
    able = [flavour for flavour in installed if tensorrt.can_build(targets, flavour) is None]
    if able:
        return able[0]
    return next(flavour for flavour in Flavour if all(flavour in target.flavours for target in targets))


def refuse_unsupported(targets: Iterable[Target], dtypes: Iterable[str]) -> None:
    """Refuse number formats that a target lacks.

    Raises:
        Pi05cError: names the target, what it lacks and what it has.
    """
    wanted = set(dtypes)
    for target in targets:
        if reason := unsupported(target, wanted):
            by_passes = unsupported(target, wanted - _STORED_TYPES) is not None
            passes = ", or --passes fp16 (or default without the passes that quantize)" if by_passes else ""
            raise Pi05cError(f"{reason}: choose another --target{passes}")


def refuse_without_profile(builder: Builder, inputs: Sequence[TensorRecord]) -> None:
    """Refuse a plan for a graph with dynamic inputs that have no shape profile, and profiles for no input.

    A package takes no dynamic inputs.

    Raises:
        UsageError: names the input.
    """
    if builder.options is None:
        return
    profiles = {profile.name for profile in builder.profiles}
    takes_shapes = isinstance(builder.options, BuildOptions)
    if unknown := sorted(profiles - {record.name for record in inputs}):
        names = ", ".join(record.name for record in inputs)
        raise UsageError(f"--shapes names {unknown[0]!r}, which is no input: the inputs are {names}")
    for record in inputs:
        if record.name not in profiles and not all(isinstance(dim, int) for dim in record.shape):
            raise UsageError(
                f"input {record.name} has shape {record.shape}, which is not fixed: "
                + (
                    f"give --shapes {record.name}=MIN:OPT:MAX with sizes such as 1x3, or "
                    if takes_shapes
                    else ""
                )
                + "export the model with fixed sizes"
            )


def refuse_impossible_shapes(builder: Builder, model: Model) -> None:
    """Refuse shapes that an input cannot have, or that something in the graph cannot take, before anything is built.

    Raises:
        UsageError: names the input, or the node with the shapes that it would get.
    """
    if not isinstance(builder.options, BuildOptions) or not builder.options.profiles:
        return
    proto, _ = to_proto(model)
    specs = {spec.name: spec for spec in inputs_of(proto.graph)}
    weights_as_inputs(proto.graph)
    for profile in builder.options.profiles:
        tensorrt.check_profile(profile, specs[profile.name])
    for kind in ("min", "opt", "max"):
        shapes = {profile.name: getattr(profile, kind) for profile in builder.options.profiles}
        for value in proto.graph.input:
            for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
                dim.dim_value = size
        try:
            onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            given = ", ".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in shapes.items())
            raise UsageError(
                f"--shapes {given} do not fit the graph: {_where_it_fails(proto, str(error))}; export the model for these "
                "sizes, or give those that it was exported for"
            ) from error


def _where_it_fails(proto: onnx.ModelProto, message: str) -> str:
    """The node that shape inference fails at, with the shapes of its inputs as far as they are known."""
    reason = " ".join(message.split())
    named = re.search(r"op_type:\w+, node name: (.*?)\)", message)
    node = next((n for n in proto.graph.node if named is not None and n.name == named[1]), None)
    if node is None:
        return reason
    typed = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    known = {
        value.name: [
            dim.dim_value if dim.HasField("dim_value") else "?" for dim in value.type.tensor_type.shape.dim
        ]
        for value in (*typed.value_info, *typed.input)
    }
    known.update((tensor.name, list(tensor.dims)) for tensor in typed.initializer)
    sizes = [f"{name!r} [{', '.join(map(str, known[name]))}]" for name in node.input if name in known]
    return f"{node.op_type} {node.name!r} gets {' and '.join(sizes)}"


def parse_profile(text: str) -> ShapeProfile:
    """Read `name=1x8:1x16:1x32`.

    Raises:
        UsageError: the text is malformed.
    """
    match = _PROFILE.match(text)
    try:
        if match is None:
            raise ValueError
        low, usual, high = (
            tuple(int(size) for size in match[which].split("x")) for which in ("min", "opt", "max")
        )
    except ValueError as error:
        raise UsageError(
            f"--shapes {text!r} is malformed: write NAME=MIN:OPT:MAX with sizes such as 1x3x224x224"
        ) from error
    return ShapeProfile(match["name"], low, usual, high)


def engine_record(builder: Builder, *, reason: str | None = None) -> EngineRecord:
    """What the manifest says while there is no plan."""
    targets = [target.name for target in builder.targets]
    if builder.options is None:
        return EngineRecord(
            targets=targets, flavour=None, reason=reason or "asked for a folder without a plan"
        )
    options = builder.options
    if isinstance(options, InductorOptions):
        return EngineRecord(
            targets=[CPU] if options.cpu else targets,
            flavour=INDUCTOR,
            options={"max_autotune": options.max_autotune},
            reason=reason or builder.obstacle,
        )
    return EngineRecord(
        targets=targets,
        flavour=options.flavour.value,
        options={
            "shapes": {p.name: [list(p.min), list(p.opt), list(p.max)] for p in options.profiles},
            "version_compatible": options.version_compatible,
            "hardware_compatible": options.hardware_compatible,
            "strip_weights": options.strip_weights,
        },
        reason=reason or builder.obstacle,
    )


def built(record: EngineRecord, result: BuildResult | Package, place: str = "") -> EngineRecord:
    """What the manifest says of the plan or package of a place."""
    return record.model_copy(
        update={
            "version": result.version,
            "file": inside(place, record.product),
            "seconds": round(result.seconds, 3),
            "reason": None,
        }
    )


def build_plan(folder: Path, plan: Path, builder: Builder, update: Update) -> BuildResult | Package:
    """Build the plan or package of the graph in `folder`; a failure leaves its log and a command that repeats it there.

    Raises:
        BuildError: the builder failed.
    """
    options = builder.options
    assert options is not None

    def progress(state: BuildProgress) -> None:
        update(state.step / state.steps if state.steps else None, state.phase)

    failure = folder / FAILED_BUILD
    result: BuildResult | Package
    try:
        if isinstance(options, InductorOptions):
            result = inductor.build(
                folder / GRAPH, plan, builder.targets, options, progress=progress, reproducer_dir=failure
            )
        else:
            result = tensorrt.build(folder / GRAPH, plan, options, progress=progress, reproducer_dir=failure)
    except BuildError:
        for path in failure.glob("*"):  # so that the folder may move, to another machine too
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
            write_text(path, text.replace(f"{folder.absolute()}/", "../"))
        raise
    shutil.rmtree(failure, ignore_errors=True)
    return result


def build(
    folder: Path | str,
    *,
    target: str | None = None,
    backend: str | None = None,
    time_limit_s: float | None = None,
    verbose: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Make the plan or package of an engine folder on this machine, from its graph and manifest.

    An old one stays until the new one is whole. `target` and `backend` replace those of the manifest.

    Raises:
        Pi05cError: it is no engine folder, its graph failed verification, or the plan cannot be built here.
        BuildError: the builder is not installed, not supported in its version, or failed.
    """
    from pi05c.graph.io import load

    folder = Path(folder)
    progress = progress or Progress()
    manifest = read_manifest(folder)
    if manifest.verification is not None and not manifest.verification.passed:
        raise Pi05cError(
            f"the graph in {folder} failed verification: compile again with other --passes, or with a larger "
            "--max-error if its error is acceptable"
        )
    known = manifest.engine
    backend = backend or known.flavour
    recorded = [name for name in known.targets if name != CPU or backend == INDUCTOR]
    options = known.options if backend == known.flavour or INDUCTOR not in (backend, known.flavour) else {}
    builder = choose(
        backend,
        target or ",".join(recorded) or None,
        {
            "profiles": tuple(
                ShapeProfile(name, *(tuple(shape) for shape in shapes))
                for name, shapes in options.get("shapes", {}).items()
            ),
            "version_compatible": options.get("version_compatible", False),
            "hardware_compatible": options.get("hardware_compatible", False),
            "strip_weights": options.get("strip_weights", False),
            "max_autotune": options.get("max_autotune", False),
            "time_limit_s": time_limit_s,
            "verbose": verbose,
        },
    )
    if builder.chosen:
        progress.note(builder.chosen)
    if builder.options is None:
        raise UsageError(f"--backend {NO_PLAN} makes no plan: name tensorrt-rtx, tensorrt or {INDUCTOR}")
    if builder.obstacle is not None:
        kind = Pi05cError if builder.is_installed else BuildError
        raise kind(f"{builder.obstacle}: run this on the device, or name another --target or --backend")
    refuse_without_profile(builder, manifest.inputs)
    places = manifest.places
    for place in places:
        refuse_unsupported(builder.targets, dtypes_of(load(folder / place / GRAPH).graph))
    product = engine_record(builder).product
    partials = {place: folder / place / f".new-{product}" for place in places}
    results = {}
    try:
        for place, partial in partials.items():
            with progress.stage(f"build the engine{place and f' of {place}'}") as update:
                results[place] = build_plan(folder / place, partial, builder, update)
        plans = [inside(place, name) for place in places for name in (PLAN, PACKAGE)]
        files = {name: record for name, record in manifest.files.items() if name not in (*plans, REPORT)}
        manifest = manifest.model_copy(update={"engine": engine_record(builder), "files": files})
        for place in places:
            manifest = manifest.with_engine(place, engine_record(builder))
        write_manifest(folder, manifest)
        for place, partial in partials.items():
            partial.replace(folder / place / product)
            for other in {PLAN, PACKAGE} - {product}:
                (folder / place / other).unlink(missing_ok=True)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    for place, result in results.items():
        files[inside(place, product)] = file_record(folder / place / product)
        manifest = manifest.with_engine(place, built(engine_record(builder), result, place))
    write_report(folder, manifest)
    files[REPORT] = file_record(folder / REPORT)
    manifest = manifest.model_copy(update={"files": files})
    write_manifest(folder, manifest)
    return manifest


__all__ = [
    "DEFAULT_TARGET",
    "NO_PLAN",
    "Builder",
    "build",
    "build_plan",
    "built",
    "choose",
    "engine_record",
    "parse_profile",
    "refuse_impossible_shapes",
    "refuse_unsupported",
    "refuse_without_profile",
]
