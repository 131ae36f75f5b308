"""Packages by AOTInductor, PyTorch's compiler: for GPUs that no TensorRT flavour serves, and for CPUs.

A package (`model.pt2`) holds the kernels and what launches them. Weights stay in `model.onnx.data` beside it, where a
folder has them anyway. The compiler runs in a child process (`inductor_worker`); nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from pi05c.backend.child import BuildProgress, produce
from pi05c.backend.gpu import compute_capabilities
from pi05c.backend.inductor_worker import Request
from pi05c.backend.targets import Target, target_of
from pi05c.graph.errors import Pi05cError
from pi05c.graph.requirements import WITH_TORCH

INDUCTOR = "inductor"
"""What `--backend` calls it."""

CPU = "cpu"
"""What `--target` calls the processor of this machine."""

WORKER_COMMAND: tuple[str, ...] = (sys.executable, "-m", "pi05c.backend.inductor_worker")
"""The command that takes the path of a request; tests put a misbehaving one in its place."""


@dataclass(frozen=True)
class InductorOptions:
    """How to compile.

    Attributes:
        cpu: for the CPU at hand instead of the GPU at hand.
        max_autotune: try several kernels for each matrix product and keep the fastest, which takes minutes.
        time_limit_s: the build fails after so many seconds.
        memory_limit: the build fails when the compiler holds more bytes of memory, mapped files not counted (Linux).
    """

    cpu: bool = False
    max_autotune: bool = False
    time_limit_s: float | None = None
    memory_limit: int | None = None


@dataclass(frozen=True)
class Package:
    """A package that was built.

    Attributes:
        version: of torch.
        seconds: from the start of the child process to its end.
        peak_memory: largest resident set of the child in bytes, mapped weights included; 0 where unknown.
    """

    version: str
    seconds: float
    peak_memory: int


def is_installed() -> bool:
    """Whether torch is there, without importing it."""
    spec = importlib.util.find_spec("torch")
    return spec is not None and spec.origin is not None


def cannot_compile(targets: Sequence[Target], options: InductorOptions) -> str | None:
    """Why this machine cannot make the package; None if it can."""
    if not is_installed():
        return f"PyTorch is not installed (pip install '{WITH_TORCH}')"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"Inductor needs a C++ compiler, and there is no {compiler} (CXX names another)"
    if _links_statically(compiler):
        return (
            f"{compiler} has the standard C++ library only as libstdc++.a, and a package with its own copy crashes within "
            "torch (CXX names another compiler)"
        )
    if options.cpu:
        return None
    present = compute_capabilities()
    if not present:
        return "Inductor compiles for the GPU at hand, and this machine has none"
    here = target_of(present[0])
    if any(target != here for target in targets):
        names = ", ".join(target.name for target in targets)
        return f"Inductor compiles for the GPU at hand, which is {here or present[0]}, not {names}"
    return None


def _links_statically(compiler: str) -> bool:
    """Whether a compiler finds libstdc++ to link statically only. It prints the bare name of a file that it lacks."""

    def has(name: str) -> bool:
        asked = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        return os.sep in found

    return has("libstdc++.a") and not has("libstdc++.so")


def build(
    model_path: Path,
    package_path: Path,
    targets: Sequence[Target],
    options: InductorOptions,
    *,
    progress: Callable[[BuildProgress], None] | None = None,
    reproducer_dir: Path | None = None,
) -> Package:
    """Compile the graph at `model_path` into `package_path`.

    Args:
        progress: called from time to time while the compiler works.
        reproducer_dir: where to leave, if it fails, the command that fails again, its log and the versions.

    Raises:
        Pi05cError: this machine cannot compile for the targets.
        BuildError: an operator is outside the table, an input has no fixed shape, or Inductor failed, crashed or
            exceeded its limits. `package_path` is as it was before.
    """
    if reason := cannot_compile(targets, options):
        raise Pi05cError(f"{reason}: build it on the device itself, with `pi05c build`")
    request = Request(
        model="", package="", device=CPU if options.cpu else "cuda", max_autotune=options.max_autotune
    )
    run = produce(
        WORKER_COMMAND,
        lambda model, package: replace(request, model=model, package=package).to_json(),
        model_path,
        package_path,
        failed=f"Inductor did not compile {model_path}",
        versions={"torch": metadata.version("torch")},
        time_limit_s=options.time_limit_s,
        memory_limit=options.memory_limit,
        progress=progress,
        reproducer_dir=reproducer_dir,
    )
    assert run.built is not None
    return Package(run.built["version"], run.seconds, run.peak_memory)


__all__ = [
    "CPU",
    "INDUCTOR",
    "InductorOptions",
    "Package",
    "build",
    "cannot_compile",
    "is_installed",
]
