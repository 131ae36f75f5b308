"""Engines by TensorRT and TensorRT-RTX: one interface, two flavours.

The builder runs in a child process (`tensorrt_worker`) that streams the plan into a temporary file beside its
place; it gets its name when it is whole. Networks are strongly typed: the graph says in which precision each
operator runs, and the builder obeys.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from pi05c.backend.allocator import with_mimalloc
from pi05c.backend.child import BuildProgress, produce
from pi05c.backend.gpu import compute_capabilities
from pi05c.backend.signature import TensorSpec, inputs_of
from pi05c.backend.targets import Flavour, Target, target_of
from pi05c.backend.tensorrt_worker import Request
from pi05c.graph.errors import BuildError, Pi05cError, UsageError
from pi05c.graph.requirements import unsupported

WORKER_COMMAND: tuple[str, ...] = (sys.executable, "-m", "pi05c.backend.tensorrt_worker")
"""The command that takes the path of a request; tests put a misbehaving one in its place."""

MIN_TENSORRT = (10, 13)
"""Oldest TensorRT that reads what the default pipeline writes: FP8 attention at opset 21."""

_LOG_TAIL = 40


@dataclass(frozen=True)
class ShapeProfile:
    """Shapes that an engine must take for one dynamic input, and the one it is tuned for."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        flavour: the builder, as `find_flavour` gives it.
        targets: GPUs to build for. TensorRT builds for the GPU at hand, which must be the one target, if any is
            named; TensorRT-RTX makes one plan for all, or for every GPU from 8.6 on if none is named.
        profiles: one for each dynamic input.
        version_compatible: the plan runs on later releases of the builder's major version too.
        hardware_compatible: the plan runs on every GPU from Ampere on (TensorRT only), at a cost in speed.
        strip_weights: leave the weights out of the plan; they come back by refitting. Needs a GPU.
        timing_cache: file of kernel timings to start from and to add to (TensorRT only).
        optimization_level: 0 to 5, None for the builder's own (3).
        workspace: bytes of GPU memory that one layer may use as scratch, None for all there is.
        time_limit_s: the build fails after so many seconds.
        memory_limit: the build fails when the builder holds more bytes of memory, mapped files not counted (Linux).
        verbose: log what the builder does.
    """

    flavour: Flavour
    targets: tuple[Target, ...] = ()
    profiles: tuple[ShapeProfile, ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False
    timing_cache: Path | None = None
    optimization_level: int | None = None
    workspace: int | None = None
    time_limit_s: float | None = None
    memory_limit: int | None = None
    verbose: bool = False


@dataclass(frozen=True)
class BuildResult:
    """A plan that was built.

    Attributes:
        version: of the builder, as it states it.
        plan_bytes: size of the plan.
        seconds: from the start of the child process to its end.
        peak_memory: largest resident set of the child in bytes, mapped weights included; 0 where unknown.
        warnings: the builder's, each once.
        log_tail: the last lines of its log.
    """

    flavour: Flavour
    version: str
    targets: tuple[Target, ...]
    plan_bytes: int
    seconds: float
    peak_memory: int
    warnings: tuple[str, ...]
    log_tail: tuple[str, ...]


def installed_flavours() -> tuple[Flavour, ...]:
    """The flavours whose Python module is installed, TensorRT first."""
    return tuple(flavour for flavour in Flavour if _is_installed(flavour))


def _is_installed(flavour: Flavour) -> bool:
    """Whether its module is there; a folder that happens to have the name has no origin."""
    spec = importlib.util.find_spec(flavour.module)
    return spec is not None and spec.origin is not None


def installed_version(flavour: Flavour) -> str | None:
    """Version of an installed flavour, without importing it; None where it is not installed."""
    try:
        return metadata.version(flavour.module)
    except metadata.PackageNotFoundError:
        return None


def find_flavour(requested: str | Flavour | None = None, targets: Sequence[Target] = ()) -> Flavour:
    """The flavour to build with.

    Args:
        requested: `tensorrt`, `tensorrt-rtx`, or None to choose: the first installed one, TensorRT before
            TensorRT-RTX, that can build for all of `targets`, or just the first installed one if none can.

    Raises:
        UsageError: the name is unknown.
        BuildError: what was asked for, or either, is not installed.
    """
    installed = installed_flavours()
    if requested is None:
        if not installed:
            raise BuildError(
                f"neither TensorRT-RTX nor TensorRT is installed: pip install '{Flavour.TENSORRT_RTX.extra}' "
                f"(builds without a GPU) or '{Flavour.TENSORRT.extra}'"
            )
        return next((flavour for flavour in installed if can_build(targets, flavour) is None), installed[0])
    try:
        flavour = Flavour(requested)
    except ValueError as error:
        known = ", ".join(flavour.value for flavour in Flavour)
        raise UsageError(f"unknown builder {requested!r}: choose among {known}") from error
    if flavour not in installed:
        raise BuildError(f"{flavour.product} is not installed: pip install '{flavour.extra}'")
    return flavour


def can_build(targets: Sequence[Target], flavour: Flavour) -> str | None:
    """Why `flavour` cannot build for all of `targets` on this machine; None if it can."""
    if not _is_installed(flavour):
        return f"{flavour.product} is not installed (pip install '{flavour.extra}')"
    if foreign := [target.name for target in targets if flavour not in target.flavours]:
        return f"{flavour.product} does not build for {', '.join(foreign)}"
    if flavour is Flavour.TENSORRT_RTX:
        return None
    present = compute_capabilities()
    if not present:
        return "TensorRT builds for the GPU at hand, and this machine has none"
    here = target_of(present[0])
    if any(target != here for target in targets):
        names = ", ".join(target.name for target in targets)
        return f"TensorRT builds for the GPU at hand, which is {here or present[0]}, not {names}"
    return None


def build(
    model_path: Path,
    plan_path: Path,
    options: BuildOptions,
    *,
    progress: Callable[[BuildProgress], None] | None = None,
    reproducer_dir: Path | None = None,
) -> BuildResult:
    """Build the engine of the ONNX model at `model_path` and write it to `plan_path`.

    Args:
        progress: called from time to time while the builder works.
        reproducer_dir: where to leave, if the builder fails, the command that fails again, its log and the
            versions. It names the model by its path.

    Raises:
        UsageError: options that contradict each other or the flavour; a profile that does not fit the model.
        Pi05cError: the targets cannot be built here, or a dynamic input has no profile.
        BuildError: the builder is not installed, or in a version that is not supported; it logged an error, crashed,
            was killed, or exceeded its limits. `plan_path` is as it was before.
    """
    check_options(options)
    if reason := can_build(options.targets, options.flavour):
        kind = Pi05cError if _is_installed(options.flavour) else BuildError
        raise kind(f"{reason}: build it on the device itself, with build_engine.sh or `pi05c build`")
    _check_profiles(model_path, options.profiles)
    request = Request(
        rtx=options.flavour is Flavour.TENSORRT_RTX,
        model="",
        plan="",
        compute_capabilities=tuple(target.compute_capability for target in options.targets),
        shapes={profile.name: (profile.min, profile.opt, profile.max) for profile in options.profiles},
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        strip_weights=options.strip_weights,
        timing_cache=None if options.timing_cache is None else str(options.timing_cache.absolute()),
        optimization_level=options.optimization_level,
        workspace=options.workspace,
        verbose=options.verbose,
    )
    names = " and ".join(target.name for target in options.targets) or "the portable targets"
    run = produce(
        with_mimalloc(WORKER_COMMAND) if request.rtx else WORKER_COMMAND,
        lambda model, plan: replace(request, model=model, plan=plan).to_json(),
        model_path,
        plan_path,
        failed=f"{options.flavour.product} did not build {model_path} for {names}",
        versions={options.flavour.value: installed_version(options.flavour) or "unknown"},
        time_limit_s=options.time_limit_s,
        memory_limit=options.memory_limit,
        progress=progress,
        reproducer_dir=reproducer_dir,
    )
    return BuildResult(
        flavour=options.flavour,
        version="" if run.built is None else run.built["version"],
        targets=options.targets,
        plan_bytes=plan_path.stat().st_size,
        seconds=run.seconds,
        peak_memory=run.peak_memory,
        warnings=tuple(dict.fromkeys(run.lines("[W]"))),
        log_tail=tuple(run.log)[-_LOG_TAIL:],
    )


def check_options(options: BuildOptions) -> None:
    """Refuse what the flavour or this machine cannot do.

    Raises:
        UsageError: names the option and what to do.
        BuildError: the version of the flavour is not supported.
    """
    if reason := unsupported(options.flavour.extra):
        raise BuildError(reason)
    rtx = options.flavour is Flavour.TENSORRT_RTX
    if rtx and options.timing_cache is not None:
        raise UsageError("TensorRT-RTX times nothing while it builds: leave the timing cache to TensorRT")
    if rtx and options.hardware_compatible:
        raise UsageError(
            "TensorRT-RTX makes one plan for several GPUs by itself: name them as targets instead of asking for "
            "hardware compatibility"
        )
    if options.strip_weights and not compute_capabilities():
        raise UsageError(
            "stripping weights from a plan needs a GPU, and this machine has none: build with weights"
        )
    if rtx and options.strip_weights and len(options.targets) > 1:
        raise UsageError("TensorRT-RTX strips weights for at most one target: name one")


def _check_profiles(model_path: Path, profiles: Sequence[ShapeProfile]) -> None:
    import onnx

    specs = {spec.name: spec for spec in inputs_of(onnx.load(model_path, load_external_data=False).graph)}
    by_name = {profile.name: profile for profile in profiles}
    if unknown := [name for name in by_name if name not in specs]:
        raise UsageError(
            f"a shape profile names {', '.join(unknown)}, which is no input of {model_path}: "
            f"its inputs are {', '.join(map(str, specs.values()))}"
        )
    for name, spec in specs.items():
        if name in by_name:
            check_profile(by_name[name], spec)
        elif spec.is_dynamic:
            raise Pi05cError(
                f"input {spec} has dimensions that are not fixed: give its minimum, optimum and maximum shape, or "
                "export the model with fixed sizes"
            )


def check_profile(profile: ShapeProfile, spec: TensorSpec) -> None:
    """Raise a UsageError that names both where the shapes of a profile are not such as an input can have."""
    shapes = (profile.min, profile.opt, profile.max)
    fits = all(len(shape) == len(spec.shape) for shape in shapes) and all(
        0 < low <= usual <= high and (not isinstance(dim, int) or low == high == dim)
        for low, usual, high, dim in zip(*shapes, spec.shape, strict=True)
    )
    if not fits:
        given = ", ".join(str(list(shape)) for shape in shapes)
        raise UsageError(
            f"the shapes {given} do not fit input {spec}: minimum, optimum and maximum must not descend, and fixed "
            "dimensions keep their size"
        )


def trtexec_script(model_name: str, targets: Sequence[Target], options: BuildOptions) -> str:
    """The text of `build_engine.sh`: builds `model.engine` from the folder that it lies in, on the target device.

    Args:
        model_name: file name of the ONNX model beside the script.
        targets: for whom the graph was made.
        options: `flavour` chooses between `trtexec` of TensorRT and `tensorrt_rtx` of TensorRT-RTX.

    Option spellings: NVIDIA/TensorRT samples/common/sampleOptions.cpp (10.13, 11.x, where `--stronglyTyped` is
    the default and still accepted) and the TensorRT-RTX documentation, "CPU-Only AOT and TensorRT-RTX Engines".
    """
    rtx = options.flavour is Flavour.TENSORRT_RTX
    arguments = ["--stronglyTyped", "--noTF32", "--profilingVerbosity=detailed", "--skipInference"]
    if rtx:
        arguments = ["--profilingVerbosity=detailed", "--skipInference"]
        if targets:
            numbers = ",".join("{}{}".format(*target.compute_capability) for target in targets)
            arguments.append(f"--computeCapabilities={numbers}")
    for which in ("min", "opt", "max"):
        if options.profiles:
            shapes = ",".join(
                f"{profile.name}:{'x'.join(map(str, getattr(profile, which)))}"
                for profile in options.profiles
            )
            arguments.append(f"--{which}Shapes={shapes}")
    if options.version_compatible:
        arguments.append("--versionCompatible")
        if rtx:
            arguments.append("--excludeLeanRuntime")
    if options.hardware_compatible and not rtx:
        arguments.append("--hardwareCompatibilityLevel=ampere+")
    if options.strip_weights:
        arguments.append("--stripWeights")
    if options.optimization_level is not None:
        arguments.append(f"--builderOptimizationLevel={options.optimization_level}")
    if options.workspace is not None:
        arguments.append(f"--memPoolSize=workspace:{max(1, options.workspace // 2**20)}")
    if not rtx:
        arguments.append("--timingCacheFile=timing.cache")
    if options.verbose:
        arguments.append("--verbose")
    return _SCRIPT.format(
        model=shlex.quote(model_name),
        target_names=", ".join(target.name for target in targets) or "the GPU at hand",
        capabilities=" ".join("{}.{}".format(*target.compute_capability) for target in targets),
        title=options.flavour.product,
        tool="tensorrt_rtx" if rtx else "trtexec",
        variable="TENSORRT_RTX" if rtx else "TRTEXEC",
        install=_RTX_INSTALL if rtx else _TENSORRT_INSTALL,
        version_check="" if rtx else _VERSION_CHECK,
        arguments=" \\\n    ".join(shlex.quote(argument) for argument in arguments),
    )


_TENSORRT_INSTALL = (
    "install TensorRT {}.{} or later (JetPack 7 has it on Jetson Thor; otherwise the packages tensorrt and "
    "libnvinfer-bin)".format(*MIN_TENSORRT)
)
_RTX_INSTALL = "install the TensorRT-RTX SDK, which holds it in bin"

_VERSION_CHECK = f"""
# trtexec states its version as v101303 for 10.13.3.
version=$("$tool" --help 2>&1 | sed -n 's/.*\\[TensorRT v\\([0-9]*\\)\\].*/\\1/p' | head -n 1)
if [ -n "$version" ] && [ "$version" -lt {MIN_TENSORRT[0] * 10_000 + MIN_TENSORRT[1] * 100} ]; then
    echo "$0: $tool is of TensorRT $version (101303 is 10.13.3), too old for this graph: {_TENSORRT_INSTALL}" >&2
    exit 1
fi
"""

_SCRIPT = """\
#!/bin/sh
# Builds model.engine for {target_names} from {model} with {title}. Run it on the device.
# {variable}=/path/to/{tool} chooses the tool.
set -eu
cd "$(dirname "$0")"

tool=${{{variable}:-}}
for candidate in {tool} /usr/src/tensorrt/bin/{tool}; do
    [ -n "$tool" ] || tool=$(command -v "$candidate") || true
done
if [ -z "$tool" ]; then
    echo "$0: {tool} is not on the PATH: {install}, or name it: {variable}=/path/to/{tool} $0" >&2
    exit 1
fi
if [ ! -f {model} ]; then
    echo "$0: there is no {model} here: copy the whole folder" >&2
    exit 1
fi
{version_check}
here=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) || here=
case " {capabilities} " in
    "  " | *" ${{here:-unknown}} "*) ;;
    *) [ -z "$here" ] || echo "$0: the graph was made for {target_names}, but this GPU is $here" >&2 ;;
esac

trap 'rm -f .model.engine.partial' EXIT
"$tool" --onnx={model} --saveEngine=.model.engine.partial \\
    {arguments}
mv .model.engine.partial model.engine
echo "model.engine is built: $(wc -c < model.engine) bytes"
"""


__all__ = [
    "MIN_TENSORRT",
    "BuildOptions",
    "BuildResult",
    "ShapeProfile",
    "build",
    "can_build",
    "check_options",
    "find_flavour",
    "installed_flavours",
    "installed_version",
    "trtexec_script",
]
