"""The child process that builds an engine: `python -m pi05c.backend.tensorrt_worker REQUEST.json`.

Polygraphy decides between TensorRT and TensorRT-RTX once a process, and spells the log as `child` reads it. Exit
status: 0 built, 1 not built.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pi05c.backend.child import end_with_parent, memory_of, send
from pi05c.backend.targets import Flavour
from pi05c.backend.tensorrt_library import load_library
from pi05c.graph.errors import Pi05cError

_PROGRESS_INTERVAL_S = 0.2


@dataclass(frozen=True)
class Request:
    """All that the builder needs to know, as plain values; paths are absolute or relative to the working folder.

    Attributes:
        rtx: TensorRT-RTX instead of TensorRT.
        compute_capabilities: GPUs to build for (TensorRT-RTX); empty for its portable default.
        shapes: minimum, optimum and maximum shape of each dynamic input.
        workspace: bytes of GPU memory that one layer may use as scratch, None for the builder's own limit.
    """

    rtx: bool
    model: str
    plan: str
    compute_capabilities: tuple[tuple[int, int], ...] = ()
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = dataclasses.field(
        default_factory=dict
    )
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False
    timing_cache: str | None = None
    optimization_level: int | None = None
    workspace: int | None = None
    verbose: bool = False

    def to_json(self) -> str:
        """The request as `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Request:
        """The request that `to_json` wrote."""
        return cls(**json.loads(text))


def build(request: Request) -> None:
    """Build the engine and write it to `request.plan`.

    Raises:
        Pi05cError: the builder's library does not load.
        polygraphy.exception.PolygraphyException: the graph cannot be parsed or the engine cannot be built; the
            reasons are the `[E]` lines of the log.
    """
    trt = load_library(Flavour.TENSORRT_RTX if request.rtx else Flavour.TENSORRT)
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if request.rtx else "0"
    from polygraphy.backend.trt import network_from_onnx_path
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.colors = False
    G_LOGGER.severity = G_LOGGER.VERBOSE if request.verbose else G_LOGGER.INFO
    strongly_typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    builder, network, _parser = network_from_onnx_path(request.model, strongly_typed=strongly_typed)
    config = _config(request, trt, builder, network)
    with Path(request.plan).open("wb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):
            built = builder.build_serialized_network_to_stream(network, config, _writer(trt, file))
        else:
            plan = builder.build_serialized_network(network, config)
            built = plan is not None and file.write(plan) > 0
    if not built:
        raise PolygraphyException("the builder returned no engine")
    if request.timing_cache is not None:
        _save_timing_cache(config, request.timing_cache)
    send(event="built", version=trt.__version__, peak_memory=memory_of())


def _config(request: Request, trt: Any, builder: Any, network: Any) -> Any:
    """The builder configuration through Polygraphy's loaders, with detailed profiling verbosity (their default)."""
    from polygraphy.backend.tensorrt_rtx import create_config_rtx
    from polygraphy.backend.trt import Profile, create_config

    profile = Profile()
    for name, (smallest, usual, largest) in request.shapes.items():
        profile.add(name, tuple(smallest), tuple(usual), tuple(largest))
    options: dict[str, Any] = {
        "profiles": [profile],
        "version_compatible": request.version_compatible,
        "strip_plan": request.strip_weights,
        "builder_optimization_level": request.optimization_level,
        "progress_monitor": _monitor(trt),
    }
    if request.workspace is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: request.workspace}
    if request.rtx:
        # RTX has no lean runtime to embed, and NVIDIA's recipe for weightless engines sets both flags.
        options["exclude_lean_runtime"] = request.version_compatible
        options["refittable"] = request.strip_weights
        if request.compute_capabilities:
            options["compute_capabilities"] = [
                (major, minor) for major, minor in request.compute_capabilities
            ]
        config = create_config_rtx(builder, network, **options)
        # What the graph keeps in float32 is meant in float32, and TF32 has float16's mantissa. Polygraphy clears
        # the flag for TensorRT.
        config.clear_flag(trt.BuilderFlag.TF32)
        return config
    if request.hardware_compatible:
        options["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return create_config(builder, network, load_timing_cache=request.timing_cache, **options)


def _writer(trt: Any, file: BinaryIO) -> Any:
    class FileWriter(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return file.write(data)

    return FileWriter()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.reported = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.steps[name] = steps
            self._report(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self._report(name, step + 1)
            return True

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

        def _report(self, name: str, done: int) -> None:
            if time.monotonic() - self.reported >= _PROGRESS_INTERVAL_S:
                self.reported = time.monotonic()
                send(event="progress", phase=name, step=done, steps=self.steps.get(name, 0))

    return Monitor()


def _save_timing_cache(config: Any, path: str) -> None:
    """Write the timings of this build and those that the file held before."""
    from polygraphy import util

    cache = config.get_timing_cache()
    if not cache:
        return
    with util.LockFile(path):
        if Path(path).exists():
            cache.combine(config.create_timing_cache(Path(path).read_bytes()), ignore_mismatch=True)
        with cache.serialize() as serialized:
            Path(path).write_bytes(bytes(serialized))


def main(path: str) -> int:
    """Build what the request file at `path` asks for; failures go to the log."""
    end_with_parent()
    request = Request.from_json(Path(path).read_text(encoding="utf-8"))
    try:
        build(request)
    except Pi05cError as error:
        print(f"[E] {error}", flush=True)
        return 1
    except Exception as error:
        # Polygraphy's own exceptions only repeat that there were errors: the reasons are logged as [E] already.
        letter = "!" if type(error).__name__ == "PolygraphyException" else "E"
        print(f"[{letter}] {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
