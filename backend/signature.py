"""What a graph or an engine takes and gives, and the one check of what is fed to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pi05c.graph.dtypes import name_of, to_numpy
from pi05c.graph.errors import Pi05cError
from pi05c.graph.runner import Array

Dim = int | str | None
"""A fixed size, a named size that may vary, or an unnamed one."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of an input or output."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        dims = ",".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}: {name_of(self.dtype)}[{dims}]"

    @property
    def is_dynamic(self) -> bool:
        """Whether a dimension is not fixed."""
        return not all(isinstance(dim, int) for dim in self.shape)


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    """The specification in a graph's input or output.

    Raises:
        Pi05cError: it is not a tensor of a known element type.
    """
    tensor = value.type.tensor_type
    dtype = to_numpy(tensor.elem_type)
    if dtype is None:
        raise Pi05cError(
            f"{value.name!r} is no tensor of a known type: a pi0.5 graph takes and gives tensors only"
        )
    dims: tuple[Dim, ...] = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim
    )
    return TensorSpec(value.name, dtype, dims)


def inputs_of(graph: onnx.GraphProto) -> tuple[TensorSpec, ...]:
    """The inputs that a caller must feed: those without an initializer of the same name."""
    defaults = {tensor.name for tensor in graph.initializer}
    return tuple(spec_of(value) for value in graph.input if value.name not in defaults)


def specs_of(model: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the graph at `model`."""
    graph = onnx.load(model, load_external_data=False).graph
    return inputs_of(graph), tuple(spec_of(value) for value in graph.output)


_NAMELESS = ("", "?")
"""What stands for a size that is not known; some exporters (paddle2onnx) write the second, and mean no one size."""


def check_inputs(specs: Sequence[TensorSpec], inputs: Mapping[str, Array]) -> None:
    """Check what is fed against what is taken.

    Raises:
        Pi05cError: an input is missing, unknown, of another type or of another shape; it is named, with what is
            expected.
    """
    by_name = {spec.name: spec for spec in specs}
    if missing := [name for name in by_name if name not in inputs]:
        raise Pi05cError(f"missing input {_names(missing)}: the graph takes {', '.join(map(str, specs))}")
    if unknown := [name for name in inputs if name not in by_name]:
        raise Pi05cError(f"unknown input {_names(unknown)}: the graph takes {', '.join(map(str, specs))}")
    sizes: dict[str, tuple[str, int]] = {}
    for name, spec in by_name.items():
        array = inputs[name]
        if np.dtype(array.dtype) != spec.dtype:
            given = str(array.dtype)
            raise Pi05cError(
                f"input {name!r} holds {given}, but the graph takes {name_of(spec.dtype)}: convert it first"
            )
        if len(array.shape) != len(spec.shape):
            raise Pi05cError(
                f"input {name!r} has {len(array.shape)} dimensions, {list(array.shape)}, but the graph takes {spec}"
            )
        for axis, (size, expected) in enumerate(zip(array.shape, spec.shape, strict=True)):
            if expected in _NAMELESS:
                continue
            if isinstance(expected, str):
                first, expected = sizes.setdefault(expected, (name, size))
                wanted = f"{expected}, as {first!r} has"
            else:
                wanted = str(expected)
            if expected is not None and size != expected:
                raise Pi05cError(
                    f"input {name!r} has shape {list(array.shape)}, but the graph takes {spec}: dimension {axis} is "
                    f"{size} instead of {wanted}; pad or cut the input, or export the model with that size"
                )


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


__all__ = ["Dim", "TensorSpec", "check_inputs", "inputs_of", "spec_of", "specs_of"]
