"""The models by which the ONNX project tests backends: one or more of each operator, small networks, old exports.

Those of operators are made in memory by `onnx.backend.test.case.node`; the others are files of the onnx package.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from random_graphs import all_nodes

Array = npt.NDArray[Any]

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"


@dataclass(frozen=True, eq=False)
class CorpusCase:
    """A model with the inputs of one run; `outputs` are what it is said to give for them, empty where nothing is said."""

    name: str
    proto: onnx.ModelProto
    inputs: dict[str, Array]
    outputs: tuple[Any, ...] = ()

    @property
    def operators(self) -> frozenset[str]:
        return frozenset(node.op_type for node in all_nodes(self.proto.graph))

    @property
    def types(self) -> tuple[object, ...]:
        """Kind and element type of what it takes and gives."""
        values = (*self.proto.graph.input, *self.proto.graph.output)
        return tuple((v.type.WhichOneof("value"), v.type.tensor_type.elem_type) for v in values)


@lru_cache(maxsize=1)
def operator_cases() -> tuple[CorpusCase, ...]:
    """Those of single operators and of the functions that some are defined by."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found = sorted(collect_testcases(None), key=lambda each: each.name)
    return tuple(
        _case(each.name, each.model, *data) for each in found for data in each.data_sets[:1] if each.model
    )


def file_cases() -> tuple[CorpusCase, ...]:
    """Exports of PyTorch 0.x, sequences and strings, and nine networks whose weights are made up as they load."""
    return (*_with_data_sets(), *_networks())


def _with_data_sets() -> Iterator[CorpusCase]:
    for path in sorted(DATA.glob("pytorch-*/*/model.onnx")) + sorted(DATA.glob("simple/*/model.onnx")):
        model = onnx.load(path)
        folder = path.parent / "test_data_set_0"
        inputs, outputs = (
            [_read(folder / f"{kind}_{index}.pb", value.type) for index, value in enumerate(values)]
            for kind, values in (("input", _fed(model)), ("output", model.graph.output))
        )
        yield _case(f"{path.parent.parent.name}/{path.parent.name}", model, inputs, outputs)


def _networks() -> Iterator[CorpusCase]:
    for path in sorted(DATA.glob("light/*.onnx")):
        model = onnx.load(path)
        fed = _fed(model)[0]
        shape = [dim.dim_value for dim in fed.type.tensor_type.shape.dim]
        image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        yield CorpusCase(f"light/{path.stem}", model, {fed.name: image})


def one_of_each(cases: Sequence[CorpusCase], alike: Callable[[CorpusCase], object]) -> tuple[CorpusCase, ...]:
    """The first case of those that are alike."""
    found: dict[object, CorpusCase] = {}
    for case in cases:
        found.setdefault(alike(case), case)
    return tuple(found.values())


def with_constants(case: CorpusCase, fed: int) -> CorpusCase | None:
    """The same model with its inputs stored in it, but for the first `fed`; None where they cannot be."""
    values = _fed(case.proto)[fed:]
    numeric = all(isinstance(case.inputs.get(value.name), np.ndarray) for value in values)
    if not values or not numeric or any(case.inputs[value.name].dtype == object for value in values):
        return None
    proto = onnx.ModelProto()
    proto.CopyFrom(case.proto)
    names = {value.name for value in values}
    kept = [value for value in proto.graph.input if value.name not in names]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.graph.initializer.extend(numpy_helper.from_array(case.inputs[name], name) for name in names)
    proto.ir_version = max(proto.ir_version, 4)  # before, a constant is an input too
    inputs = {name: array for name, array in case.inputs.items() if name not in names}
    return CorpusCase(case.name, proto, inputs, case.outputs)


def _fed(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]


def _case(name: str, model: onnx.ModelProto, inputs: Sequence[Any], outputs: Sequence[Any]) -> CorpusCase:
    fed = {value.name: _array(each) for value, each in zip(_fed(model), inputs, strict=True)}
    return CorpusCase(name, model, fed, tuple(map(_array, outputs)))


def _array(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return value if value is None or isinstance(value, (list, dict)) else np.asarray(value)


def _read(path: Path, kind: onnx.TypeProto) -> Any:
    raw = path.read_bytes()
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(raw))
    if kind.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(raw))
    return onnx.TensorProto.FromString(raw)


__all__ = ["CorpusCase", "file_cases", "one_of_each", "operator_cases", "with_constants"]
