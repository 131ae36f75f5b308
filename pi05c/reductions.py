"""Reductions inside a graph: what calibration adds to a model so that onnxruntime returns ranges, not tensors.

Beside each tensor stand a few reductions to one number each; all numbers leave the graph as one small output. In
the body of a Loop or Scan they leave as one more scan output, which is reduced over the steps outside.

Some rows of a tensor can leave the graph as well, chosen anew for each run by an input of their indices.

The order in which nodes are listed matters. onnxruntime executes depth first from the last node of a graph, of
several inputs the one with the highest index first (`ReverseDFSFrom` in onnxruntime/core/graph/graph_viewer.cc).
With reductions listed in order it would run the whole model first and hold every tensor until then; listed
backward, each reduction runs as soon as its tensor is there, and memory does not grow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from pi05c.graph.dtypes import FLOAT32, FLOAT64, is_float, name_of, to_numpy, to_onnx
from pi05c.graph.edit import Names, producer
from pi05c.graph.io import Model
from pi05c.graph.runner import Array
from pi05c.passes.quantize import E4M3_MAX

SAME_VALUES = frozenset({"Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators whose output holds exactly the values of their first input, so that one reduction serves both."""

_TENSORS_A_GROUP = 64
"""Tensors whose numbers are joined by one Concat."""

_AXES_AS_INPUT = {"ReduceSum": 13, "ReduceMax": 18, "ReduceMin": 18}
"""Opset from which a reduction takes its axes as an input (ONNX operator changelog)."""


class Of(Enum):
    """What stands in place of an element x, other than x itself; conditions give 1 or 0."""

    NAN = "x is NaN"
    SQUARE = "x * x"
    CLIPPED = "|x| > 448"
    FLUSHED = "0 < |x| <= 2^-10"


E4M3_FLUSHED = 2.0**-10
"""The largest value that FP8 E4M3 rounds to zero: half of its smallest, ties to even (OCP 8-bit floating point, 2023)."""


@dataclass(frozen=True)
class Probe:
    """One number that a tensor is reduced to.

    Attributes:
        operator: reduces the tensor, and over the steps of a body what each step gave.
        identity: what it gives for nothing, a body that never ran.
        of: what is reduced in place of the elements; None for themselves.
    """

    operator: str
    identity: float
    of: Of | None = None


LOW = Probe("ReduceMin", math.inf)
HIGH = Probe("ReduceMax", -math.inf)
TOTAL = Probe("ReduceSum", 0.0)
"""A NaN anywhere makes the sum NaN, which onnxruntime's ReduceMax and ReduceMin may pass over; so do inf - inf and
an overflow of both signs."""
HAS_NAN = Probe("ReduceMax", 0.0, Of.NAN)
SQUARES = Probe("ReduceSum", 0.0, Of.SQUARE)
CLIPPED = Probe("ReduceSum", 0.0, Of.CLIPPED)
FLUSHED = Probe("ReduceSum", 0.0, Of.FLUSHED)


@dataclass(frozen=True)
class RowOutput:
    """Rows of one tensor that leave the graph.

    Attributes:
        tensor: its name.
        indices: name of the input that says which, int64 [any number]; rows are counted over all axes but the last.
        output: float32 [that number, size].
        count: how many rows the tensor has.
        size: of its last axis.
    """

    tensor: str
    indices: str
    output: str
    count: int
    size: int


@dataclass(frozen=True)
class Reductions:
    """What `add_reductions` added.

    Attributes:
        outputs: names of the outputs with numbers, each float64 [probes, tensors], to be joined along the tensors.
        names: the tensors that are reduced, in execution order.
        measured_as: for each wanted tensor the one of `names` that holds the same values.
        left_out: wanted tensors that cannot be reduced, with the reason.
        rows: of the tensors of which rows can be taken.
    """

    outputs: tuple[str, ...]
    names: tuple[str, ...]
    measured_as: dict[str, str]
    left_out: dict[str, str]
    rows: tuple[RowOutput, ...] = ()


def add_reductions(
    model: Model,
    proto: onnx.ModelProto,
    wanted: Sequence[str] | Mapping[str, AbstractSet[Probe]],
    probes: Sequence[Probe],
    rows: Collection[str] = (),
    *,
    keep_outputs: bool = False,
) -> Reductions:
    """Reduce tensors inside a graph; its only outputs become their numbers, and rows.

    Args:
        model: the model, which stays as it is.
        proto: its export, whose nodes come in the same order, edited in place.
        wanted: names of tensors of floating type; those of other types are passed over. Of a mapping each gets the
            probes that it names, and the identity of the others.
        rows: names of tensors of which rows are wanted. Those of bodies and those whose shape is not static are
            passed over.
        keep_outputs: let the numbers be further outputs.
    """
    found = _Found(model.graph)
    measured_as, left_out = {}, {}
    for name in dict.fromkeys(wanted):
        tensor = found.tensors.get(name)
        if tensor is None:
            left_out[name] = "the graph computes no tensor of that name"
            continue
        root = _same_values(tensor)
        reason = found.obstacle(root)
        if reason is None:
            measured_as[name] = root.name
        elif reason:
            left_out[name] = reason
    own = {root: wanted[name] for name, root in measured_as.items()} if isinstance(wanted, Mapping) else None
    writer = _Writer(model, proto, probes, set(measured_as.values()), frozenset(rows), own)
    parts = writer.parts(model.graph, proto.graph)
    names = tuple(name for part in parts for name in part.names)
    for name, root in list(measured_as.items()):
        if root not in names:
            del measured_as[name]
            left_out[name] = "it lies in a subgraph whose steps cannot be followed"
    if parts or writer.rows:
        if not keep_outputs:
            del proto.graph.output[:]
        proto.graph.output.extend(writer.declared(part) for part in parts)
        proto.graph.output.extend(_declared_rows(taken) for taken in writer.rows)
        proto.graph.input.extend(
            helper.make_tensor_value_info(taken.indices, TensorProto.INT64, [None]) for taken in writer.rows
        )
    return Reductions(
        tuple(part.tensor for part in parts), names, measured_as, left_out, rows=tuple(writer.rows)
    )


def _declared_rows(taken: RowOutput) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(taken.output, TensorProto.FLOAT, [None, taken.size])


def _same_values(tensor: gs.Tensor) -> gs.Tensor:
    """The first tensor upstream that holds the same values."""
    while True:
        node = producer(tensor)
        if node is None or node.domain or node.op not in SAME_VALUES:
            return tensor
        if not isinstance(node.inputs[0], gs.Variable):
            return tensor
        tensor = node.inputs[0]


class _Found:
    """Where the tensors of a graph are: outside, in a body that steps, or where no step can be followed."""

    def __init__(self, graph: gs.Graph) -> None:
        self.tensors: dict[str, gs.Tensor] = {}
        self._inside: dict[int, str] = {}
        self._walk(graph, "")

    def _walk(self, graph: gs.Graph, obstacle: str) -> None:
        for tensor in (*graph.inputs, *(tensor for node in graph.nodes for tensor in node.outputs)):
            if tensor.name:
                self.tensors.setdefault(tensor.name, tensor)
                if obstacle:
                    self._inside[id(tensor)] = obstacle
        for node in graph.nodes:
            for body in node.attrs.values():
                if isinstance(body, gs.Graph):
                    where = f"it lies in a branch of {node.op} {node.name!r}, which does not always run"
                    self._walk(body, obstacle or ("" if steps(node) else where))

    def obstacle(self, tensor: gs.Tensor) -> str | None:
        """Why a tensor cannot be reduced: None if it can, empty if its type has no range."""
        dtype = to_numpy(tensor.dtype)
        if dtype is None:
            return "its element type is not known"
        if not is_float(dtype) and not name_of(dtype).startswith("float"):
            return ""
        if tensor.shape is not None and 0 in tensor.shape:
            return "it has no elements"
        return self._inside.get(id(tensor))


def steps(node: gs.Node) -> bool:
    """Whether a node runs its body step by step and can return what each step gives."""
    return node.op in ("Loop", "Scan") and not node.domain


@dataclass(frozen=True)
class _Part:
    """Numbers of some tensors: a float64 tensor [probes, tensors], and the tensors' names."""

    tensor: str
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Rows:
    """A tensor of which rows are taken."""

    tensor: gs.Tensor


class _Writer:
    """Appends nodes to a proto; constants go to the outermost graph, where every body sees them."""

    def __init__(
        self,
        model: Model,
        proto: onnx.ModelProto,
        probes: Sequence[Probe],
        wanted: set[str],
        sampled: frozenset[str],
        own: Mapping[str, AbstractSet[Probe]] | None,
    ) -> None:
        self._names = Names(model.graph)
        self._opset: int = model.graph.opset
        self._initializers = proto.graph.initializer
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._probes = tuple(probes)
        self._wanted = wanted
        self._sampled = sampled
        self._own = own
        self.rows: list[RowOutput] = []

    def scope(self, scope: gs.Graph, graph: onnx.GraphProto) -> _Part | None:
        """Add the reductions of a body and of the bodies in it; None where nothing in it is wanted."""
        parts = self.parts(scope, graph, sampled=False)
        if not parts:
            return None
        whole = self._new("ranges")
        graph.node.append(helper.make_node("Concat", [part.tensor for part in parts], [whole], axis=1))
        return _Part(whole, tuple(name for part in parts for name in part.names))

    def parts(self, scope: gs.Graph, graph: onnx.GraphProto, *, sampled: bool = True) -> list[_Part]:
        """Add the reductions of one graph and of the bodies in it, group by group.

        Each group ends in a tensor of its own, so that rows are taken between groups and not behind all of them.

        Args:
            sampled: whether rows of its tensors may be taken.
        """
        parts: list[_Part] = []
        reductions: list[list[onnx.NodeProto]] = []
        joins: list[list[onnx.NodeProto]] = []
        for item in self._in_groups(scope, graph, sampled):
            if isinstance(item, _Part):
                nodes, part = self._over_steps(item)
                reductions.append(nodes)
            elif isinstance(item, _Rows):
                joins.append(self._take(item))
                continue
            else:
                numbers = [self._reduce(tensor) for tensor in item]
                reductions.extend(nodes for nodes, _ in numbers)
                nodes, part = self._join(item, [outputs for _, outputs in numbers])
                joins.append(nodes)
            parts.append(part)
        for nodes in (*reversed(reductions), *reversed(joins)):
            graph.node.extend(nodes)
        return parts

    def declared(self, part: _Part) -> onnx.ValueInfoProto:
        """The declaration of a part as an output of its graph."""
        shape = [len(self._probes), len(part.names)]
        return helper.make_tensor_value_info(part.tensor, TensorProto.DOUBLE, shape)

    def _in_groups(
        self, scope: gs.Graph, graph: onnx.GraphProto, sampled: bool
    ) -> Iterator[list[gs.Tensor] | _Part | _Rows]:
        """Tensors of one graph in execution order, neighbours of one width together, and what its bodies return."""

        def group_of(item: gs.Tensor | _Part | _Rows) -> object:
            return id(item) if isinstance(item, (_Part, _Rows)) else to_numpy(item.dtype) == FLOAT64

        for _, items in itertools.groupby(self._in_order(scope, graph, sampled), group_of):
            while chunk := list(itertools.islice(items, _TENSORS_A_GROUP)):
                if isinstance(chunk[0], (_Part, _Rows)):
                    yield chunk[0]
                else:
                    yield chunk

    def _in_order(
        self, scope: gs.Graph, graph: onnx.GraphProto, sampled: bool
    ) -> Iterator[gs.Tensor | _Part | _Rows]:
        def asked(tensor: gs.Tensor) -> Iterator[gs.Tensor | _Rows]:
            if tensor.name in self._wanted:
                yield tensor
            if sampled and tensor.name in self._sampled:
                shape = tensor.shape
                if shape and all(isinstance(dim, int) and dim > 0 for dim in shape):
                    yield _Rows(tensor)

        for tensor in scope.inputs:
            yield from asked(tensor)
        for node, exported in zip(scope.nodes, list(graph.node), strict=True):
            if steps(node):
                body = self.scope(node.attrs["body"], _body(exported))
                if body is not None:
                    yield self._returned(exported, body)
            for tensor in node.outputs:
                yield from asked(tensor)

    def _take(self, item: _Rows) -> list[onnx.NodeProto]:
        """The rows of a tensor that an input names, as an output."""
        tensor = item.tensor
        *outer, size = (int(dim) for dim in tensor.shape)
        flat, taken, wide = self._new("rows"), self._new("rows"), self._new("rows")
        rows = RowOutput(tensor.name, self._new("indices"), wide, math.prod(outer), size)
        self.rows.append(rows)
        shape = self._constant(np.array([-1, size]))
        return [
            helper.make_node("Reshape", [tensor.name, shape], [flat]),
            helper.make_node("Gather", [flat, rows.indices], [taken], axis=0),
            helper.make_node("Cast", [taken], [wide], to=TensorProto.FLOAT),
        ]

    def _returned(self, node: onnx.NodeProto, body: _Part) -> _Part:
        """Make a body return its numbers: the new output of its node is float64 [steps, probes, tensors]."""
        graph = _body(node)
        carried = 1 if node.op_type == "Loop" else 0
        while len(node.output) < len(graph.output) - carried:
            node.output.append(self._new("unused"))
        graph.output.append(self.declared(body))
        for attribute in node.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.append(0)
        node.output.append(self._new("steps"))
        return _Part(node.output[-1], body.names)

    def _reduce(self, tensor: gs.Tensor) -> tuple[list[onnx.NodeProto], list[str]]:
        """One number a probe, each of shape [1], float32 or, of a float64 tensor, float64."""
        nodes: list[onnx.NodeProto] = []

        def apply(operator: str, *inputs: str, **attributes: Any) -> str:
            output = self._new("range")
            nodes.append(helper.make_node(operator, inputs, [output], **attributes))
            return output

        values: str = tensor.name
        if to_numpy(tensor.dtype) not in (FLOAT32, FLOAT64):
            values = apply("Cast", values, to=TensorProto.FLOAT)
        values = apply("Reshape", values, self._constant(np.array([-1])))
        numbers = []
        dtype = to_numpy(tensor.dtype) if to_numpy(tensor.dtype) == FLOAT64 else FLOAT32
        probes = self._probes if self._own is None else self._own[tensor.name]
        for probe in self._probes:
            if probe not in probes:
                numbers.append(self._constant(np.full(1, probe.identity, dtype)))
                continue
            elements = values
            if probe.of is Of.SQUARE:
                elements = apply("Mul", values, values)
            elif probe.of is not None:
                elements = apply("Cast", self._condition(probe.of, values, dtype, apply), to=to_onnx(dtype))
            numbers.append(apply(probe.operator, elements, keepdims=1))
        return nodes, numbers

    def _condition(self, of: Of, values: str, dtype: Any, apply: Callable[..., str]) -> str:
        if of is Of.NAN:
            return apply("IsNaN", values)
        size = apply("Abs", values)
        if of is Of.CLIPPED:
            return apply("Greater", size, self._constant(np.array(E4M3_MAX, dtype)))
        small = apply("LessOrEqual", size, self._constant(np.array(E4M3_FLUSHED, dtype)))
        return apply("And", small, apply("Greater", size, self._constant(np.array(0, dtype))))

    def _join(self, tensors: list[gs.Tensor], numbers: list[list[str]]) -> tuple[list[onnx.NodeProto], _Part]:
        """The numbers of several tensors as one part."""
        joined, shaped, wide = self._new("group"), self._new("group"), self._new("group")
        shape = self._constant(np.array([len(self._probes), len(tensors)]))
        nodes = [
            helper.make_node(
                "Concat", [one for row in zip(*numbers, strict=True) for one in row], [joined], axis=0
            ),
            helper.make_node("Reshape", [joined, shape], [shaped]),
            helper.make_node("Cast", [shaped], [wide], to=TensorProto.DOUBLE),
        ]
        return nodes, _Part(wide, tuple(tensor.name for tensor in tensors))

    def _over_steps(self, part: _Part) -> tuple[list[onnx.NodeProto], _Part]:
        """Reduce what a body returned over its steps, of which there may be none."""
        identity = np.array([probe.identity for probe in self._probes])
        nothing = np.tile(identity[None, :, None], (1, 1, len(part.names)))
        padded = self._new("steps")
        nodes = [helper.make_node("Concat", [self._constant(nothing), part.tensor], [padded], axis=0)]
        rows = []
        for index, probe in enumerate(self._probes):
            row, reduced = self._new("steps"), self._new("steps")
            nodes.append(helper.make_node("Gather", [padded, self._constant(np.array(index))], [row], axis=1))
            if self._opset >= _AXES_AS_INPUT[probe.operator]:
                axes = self._constant(np.array([0]))
                nodes.append(helper.make_node(probe.operator, [row, axes], [reduced], keepdims=1))
            else:
                nodes.append(helper.make_node(probe.operator, [row], [reduced], keepdims=1, axes=[0]))
            rows.append(reduced)
        joint = self._new("steps")
        nodes.append(helper.make_node("Concat", rows, [joint], axis=0))
        return nodes, _Part(joint, part.names)

    def _constant(self, values: Array) -> str:
        key = str(values.dtype), values.shape, values.tobytes()
        if key not in self._constants:
            self._constants[key] = self._new("constant")
            self._initializers.append(numpy_helper.from_array(values, self._constants[key]))
        return self._constants[key]

    def _new(self, what: str) -> str:
        return self._names.unique(f"calibration.{what}")


def _body(node: onnx.NodeProto) -> onnx.GraphProto:
    body: onnx.GraphProto = next(attribute.g for attribute in node.attribute if attribute.name == "body")
    return body


__all__ = [
    "CLIPPED",
    "FLUSHED",
    "HAS_NAN",
    "HIGH",
    "LOW",
    "SAME_VALUES",
    "SQUARES",
    "TOTAL",
    "Of",
    "Probe",
    "Reductions",
    "RowOutput",
    "add_reductions",
    "steps",
]
