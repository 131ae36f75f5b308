"""What a graph costs on a GPU: work and traffic by part, kind and type, and the roofline time of each kernel.

A kernel takes at least as long as its products at the peak rate of their type, as everything else at the rate of the
ordinary cores, and as its bytes at the memory's bandwidth: the largest of the three. The sum over all kernels is the
floor of the graph as `pi05c.kernels` fuses it; launches, caches and kernels below their peak are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_graphsurgeon as gs

from pi05c.backend.devices import Device
from pi05c.folder import GRAPH
from pi05c.graph.check import load_valid
from pi05c.graph.io import Model, load
from pi05c.graph.ranges import Ranges
from pi05c.kernels import KINDS, Kernel, kernels_of
from pi05c.manifest import CostRecord, read_manifest
from pi05c.passes.patterns.parts import PARTS

_FORMATS = {
    "float64": "fp32",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int8": "int8",
    "uint8": "int8",
    "float8e4m3fn": "fp8",
    "float8e5m2": "fp8",
    "float4e2m1": "fp4",
}
"""The tensor core format of an ONNX type; what is not in it is computed by the ordinary cores."""

_WIDTH = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8, "fp4": 4}


@dataclass(frozen=True)
class Cost:
    """Sums over kernels, each as often as it runs.

    Attributes:
        flops: of products.
        vector_flops: of everything else.
        weight_bytes: constants read.
        activation_bytes: other values read and written.
        kernels: launches after fusion.
        operators: launches if nothing were fused.
        seconds: the floor; None where no GPU was named.
    """

    flops: int = 0
    vector_flops: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    kernels: int = 0
    operators: int = 0
    seconds: float | None = None

    @property
    def bytes(self) -> int:
        """All traffic."""
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True)
class Group:
    """Kernels of one part, kind and type; what does not tell them apart is empty."""

    part: str
    kind: str
    dtype: str
    cost: Cost


def cost_of(path: Path | str) -> tuple[Kernel, ...]:
    """The kernels of an ONNX file or of an engine folder, those of a denoising step once for each. Weights are not read.

    Raises:
        Pi05cError: it is neither, or its sizes are not fixed.
    """
    path = Path(path)
    if not path.is_dir():
        return kernels_of(load_valid(path))
    runs = {part.name: part.runs for part in read_manifest(path).parts} or {"": 1}
    return tuple(
        replace(kernel, times=kernel.times * count)
        for place, count in runs.items()
        for kernel in kernels_of(load(path / place / GRAPH))
    )


def seconds(kernel: Kernel, device: Device, *, tf32: bool = False) -> float:
    """The least time that all runs of a kernel take on a GPU.

    Args:
        tf32: let float32 products use TF32 tensor cores; pi05c builds engines that do not.
    """
    sides = [_FORMATS.get(side, "fp32") for side in kernel.dtype.split(" x ")]
    number_format = max(sides, key=_WIDTH.__getitem__)
    if tf32 and number_format == "fp32":
        number_format = "tf32"
    moved = kernel.weight_bytes + kernel.activation_bytes
    once = max(
        kernel.flops / device.rate(number_format),
        kernel.vector_flops / device.rate("fp32"),
        moved / device.bandwidth,
    )
    return kernel.times * once


def total(kernels: Iterable[Kernel], device: Device | None = None, *, tf32: bool = False) -> Cost:
    """The sum over kernels; on `device` where one is given."""
    kernels = list(kernels)

    def sum_of(name: str) -> int:
        return sum(getattr(kernel, name) * kernel.times for kernel in kernels)

    return Cost(
        flops=sum_of("flops"),
        vector_flops=sum_of("vector_flops"),
        weight_bytes=sum_of("weight_bytes"),
        activation_bytes=sum_of("activation_bytes"),
        kernels=sum(kernel.times for kernel in kernels),
        operators=sum_of("operators"),
        seconds=None
        if device is None
        else sum((seconds(kernel, device, tf32=tf32) for kernel in kernels), start=0.0),
    )


def grouped(
    kernels: Sequence[Kernel],
    device: Device | None = None,
    *,
    by: Sequence[str] = ("part", "kind", "dtype"),
    tf32: bool = False,
) -> list[Group]:
    """Costs by some of part, kind and type, in the order of the model's parts and of `KINDS`."""
    groups: dict[tuple[str, ...], list[Kernel]] = {}
    for kernel in kernels:
        key = tuple(getattr(kernel, name) if name in by else "" for name in ("part", "kind", "dtype"))
        groups.setdefault(key, []).append(kernel)
    order = {name: index for index, name in enumerate(("", *PARTS, *KINDS))}
    return [
        Group(part, kind, dtype, total(groups[part, kind, dtype], device, tf32=tf32))
        for part, kind, dtype in sorted(groups, key=lambda key: (order[key[0]], order[key[1]], key[2]))
    ]


def cost_records(kernels: Sequence[Kernel], device: Device | None = None) -> list[CostRecord]:
    """Costs by part and type, as the manifest holds them."""
    return [
        CostRecord(
            part=group.part,
            dtype=group.dtype,
            flops=group.cost.flops,
            weight_bytes=group.cost.weight_bytes,
            activation_bytes=group.cost.activation_bytes,
            kernels=group.cost.kernels,
            operators=group.cost.operators,
            seconds=group.cost.seconds,
        )
        for group in grouped(kernels, device, by=("part", "dtype"))
    ]


@dataclass(frozen=True)
class PassCost:
    """What a graph costs after a pass; `name` is empty before the first one."""

    name: str
    changed: int
    kernels: tuple[Kernel, ...]


def cost_after_each_pass(
    path: Path | str,
    passes: str,
    before_pass: Callable[[str], None] | None = None,
    *,
    plugins: Sequence[str | Path] = (),
) -> list[PassCost]:
    """Run a pipeline on a graph that is then thrown away, with `AssumedRanges` for what passes would calibrate.

    Args:
        plugins: as `pi05c.plugins.parse_passes` takes them.

    Raises:
        Pi05cError: as `cost_of`, a plug-in cannot be loaded, or a pass cannot run.
    """
    from pi05c.passes import pipeline
    from pi05c.plugins import parse_passes

    steps = parse_passes(passes, plugins)
    model = load_valid(path)
    found = [PassCost("", 0, kernels_of(model))]

    def after_step(current: Model, result: pipeline.StepResult) -> None:
        kernels = kernels_of(current) if result.changes else found[-1].kernels
        found.append(PassCost(result.step.text, len(result.changes), kernels))

    pipeline.run(
        model,
        steps,
        calibrate=lambda _model, _tensors: AssumedRanges(),
        before_step=None if before_pass is None else lambda step: before_pass(step.spec.name),
        after_step=after_step,
    )
    return found


class AssumedRanges(Ranges):
    """Ranges for a graph that nobody calibrates: every activation is said to reach 1; constants are as they are.

    With them a pass quantizes and lowers all that it can, so the cost is that of the whole recipe. How accurate that
    is cannot be said: no graph made with them may be kept.
    """

    def __init__(self) -> None:
        super().__init__({}, {}, source="assumed", synthetic=True)

    def amax(self, tensor: gs.Tensor) -> float | None:
        """1 of an activation, the largest magnitude of a constant."""
        return super().amax(tensor) if isinstance(tensor, gs.Constant) else 1.0


__all__ = [
    "AssumedRanges",
    "Cost",
    "Group",
    "Kernel",
    "PassCost",
    "cost_after_each_pass",
    "cost_of",
    "cost_records",
    "grouped",
    "seconds",
    "total",
]
