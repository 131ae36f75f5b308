"""GPUs to compile for: one table of names, tensor core formats and builders.

Sources:
    - Compute capabilities: NVIDIA, "CUDA GPU Compute Capability". Thor was 10.1 until CUDA 13 renamed it to 11.0.
    - Formats: the "Hardware and Precision" tables of the support matrices of TensorRT 10.13 and of TensorRT-RTX 1.5
      (FP8 from 8.9 on; FP4 from 10.0 on; BF16 from 8.0 on).
    - TensorRT-RTX: `trt.ComputeCapability` of tensorrt_rtx 1.7; it builds for each of these without a GPU
      ("CPU-Only AOT and TensorRT-RTX Engines" in its documentation).
    - TensorRT builds for the GPU at hand, 7.5 or later (support matrix of TensorRT 10.13).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from pi05c.graph.errors import UsageError


class Flavour(str, Enum):
    """The two builders behind one API. The value is what `--backend` calls it."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"

    @property
    def product(self) -> str:
        """NVIDIA's name of the product."""
        return "TensorRT-RTX" if self is Flavour.TENSORRT_RTX else "TensorRT"

    @property
    def module(self) -> str:
        """The Python module that it installs."""
        return "tensorrt_rtx" if self is Flavour.TENSORRT_RTX else "tensorrt"

    @property
    def extra(self) -> str:
        """The pip extra that brings it."""
        return "pi05c[rtx]" if self is Flavour.TENSORRT_RTX else "pi05c[tensorrt]"


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    Attributes:
        name: canonical name, `sm` and the compute capability.
        compute_capability: major and minor.
        architecture: NVIDIA's name of the generation.
        formats: formats that its tensor cores multiply, of `fp16`, `bf16`, `int8`, `fp8` and `fp4`.
        flavours: builders that support it.
        aliases: other names of it, devices mostly, in lower case without separators.
    """

    name: str
    compute_capability: tuple[int, int]
    architecture: str
    formats: tuple[str, ...]
    flavours: tuple[Flavour, ...]
    aliases: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


_TURING = ("fp16", "int8")
_AMPERE = ("fp16", "bf16", "int8")
_ADA = ("fp16", "bf16", "int8", "fp8")
_BLACKWELL = ("fp16", "bf16", "int8", "fp8", "fp4")
_BOTH = (Flavour.TENSORRT, Flavour.TENSORRT_RTX)
_FULL = (Flavour.TENSORRT,)

TARGETS: tuple[Target, ...] = (
    Target("sm75", (7, 5), "Turing", _TURING, _BOTH, ("t4", "rtx2080", "rtx2080ti")),
    Target("sm80", (8, 0), "Ampere", _AMPERE, _BOTH, ("a100", "a30")),
    Target(
        "sm86", (8, 6), "Ampere", _AMPERE, _BOTH, ("rtx3060", "rtx3080", "rtx3090", "rtxa6000", "a10", "a40")
    ),
    Target("sm87", (8, 7), "Ampere", _AMPERE, _FULL, ("orin", "agxorin", "jetsonorin", "orinnano", "orinnx")),
    Target(
        "sm89",
        (8, 9),
        "Ada",
        _ADA,
        _BOTH,
        ("l4", "l40", "l40s", "rtx4060", "rtx4080", "rtx4090", "rtx6000ada"),
    ),
    Target("sm90", (9, 0), "Hopper", _ADA, _FULL, ("h100", "h200", "gh200")),
    Target("sm100", (10, 0), "Blackwell", _BLACKWELL, _FULL, ("b200", "gb200")),
    Target("sm103", (10, 3), "Blackwell", _BLACKWELL, _FULL, ("b300", "gb300")),
    Target("sm110", (11, 0), "Blackwell", _BLACKWELL, _FULL, ("thor", "agxthor", "jetsonthor")),
    Target("sm120", (12, 0), "Blackwell", _BLACKWELL, _BOTH, ("rtx5060", "rtx5080", "rtx5090", "rtxpro6000")),
    Target("sm121", (12, 1), "Blackwell", _BLACKWELL, _BOTH, ("spark", "dgxspark", "gb10")),
)

_FORMAT_NAMES = {"fp16": "FP16", "bf16": "BF16", "int8": "INT8", "fp8": "FP8", "fp4": "FP4"}
_FORMAT_OF_DTYPE = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8e4m3fn": "fp8",
    "float8e5m2": "fp8",
    "float4e2m1": "fp4",
}


def parse_targets(text: str) -> tuple[Target, ...]:
    """The targets of a comma-separated list such as `sm120,rtx4090` or `8.9`, each once, in the order given.

    Raises:
        UsageError: the list is empty or holds unknown names; all of them are named, with those that are known.
    """
    names = [name for name in (part.strip() for part in text.split(",")) if name]
    unknown = [name for name in names if _key(name) not in _BY_NAME]
    if unknown or not names:
        what = f"unknown target {', '.join(unknown)}" if unknown else "no target is given"
        known = "; ".join(f"{target.name} ({', '.join(target.aliases)})" for target in TARGETS)
        raise UsageError(f"{what}: choose among {known}")
    return tuple(dict.fromkeys(_BY_NAME[_key(name)] for name in names))


def target_of(compute_capability: tuple[int, int]) -> Target | None:
    """The target of a GPU, or None where the table does not hold it."""
    return next((target for target in TARGETS if target.compute_capability == compute_capability), None)


def unsupported(target: Target, dtypes: Iterable[str]) -> str | None:
    """One sentence on what a graph asks of tensor cores that `target` lacks; None where it has everything.

    Args:
        target: the GPU.
        dtypes: formats as in `Target.formats`, or ONNX element types (`float8e4m3fn`, `float4e2m1`); types that
            tensor cores are not needed for (`float32`, `int64`, `bool`, ...) do not matter.
    """
    wanted = {_FORMAT_OF_DTYPE.get(dtype.lower(), dtype.lower()) for dtype in dtypes} & set(_FORMAT_NAMES)
    missing = [_FORMAT_NAMES[name] for name in _FORMAT_NAMES if name in wanted - set(target.formats)]
    if not missing:
        return None
    has = ", ".join(_FORMAT_NAMES[name] for name in target.formats)
    return (
        f"{target.name} ({target.architecture}: {', '.join(target.aliases)}) has no {' and no '.join(missing)} "
        f"tensor cores; it has {has}"
    )


def _key(name: str) -> str:
    key = "".join(character for character in name.lower() if character not in " -_.")
    return f"sm{key}" if key.isdigit() else key


_BY_NAME = {key: target for target in TARGETS for key in (target.name, *target.aliases)}

__all__ = ["TARGETS", "Flavour", "Target", "parse_targets", "target_of", "unsupported"]
