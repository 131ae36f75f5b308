"""Reductions inside a graph: what calibration adds to a model so that onnxruntime returns ranges, not tensors.

Each tensor is reduced to a few numbers, small ones of one shape together; the numbers leave the graph as small outputs.
In the body of a Loop or Scan they leave as one more scan output, which is reduced over the steps outside.

Some rows of a tensor can leave the graph as well, chosen anew for each run by an input of their indices, and so can a
histogram of magnitudes, whose bins end at the power of two above the largest.

The order in which nodes are listed matters. onnxruntime executes depth first from the last node of a graph, of
several inputs the one with the highest index first (`ReverseDFSFrom` in onnxruntime/core/graph/graph_viewer.cc).
With reductions listed in order it would run the whole model first and hold every tensor until then; listed
backward, each reduction runs as soon as its tensor is there, and memory does not grow.
"""

from __future__ import annotations

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
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model
from pi05c.graph.runner import Array
from pi05c.passes.quantize import E4M3_MAX

SAME_VALUES = frozenset({"Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators whose output holds exactly the values of their first input, so that one reduction serves both."""

_TENSORS_A_GROUP = 64
_BYTES_A_GROUP = 2**23
"""Tensors of one shape are reduced together, so many, of so many bytes at most: every node costs the time of loading a
graph, which for a small tensor is more than the time of reducing it, but what waits for its group takes memory."""

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


BINS_AN_OCTAVE = 64
OCTAVES = 32
BINS = BINS_AN_OCTAVE * OCTAVES
"""A histogram has bins of equal ratio, 2^(1/64), over 32 octaves: FP8 rounds by ratio too, and E4M3 spans 18 octaves."""

LEAST_EXPONENT, LARGEST_EXPONENT = -100, 128
"""Histograms end at 2 to a power between these; smaller magnitudes count as zero."""

HISTOGRAM_OPSET = 18
"""ScatterElements adds from opset 16 on, ReduceMax takes its axes as an input from 18 on (ONNX operator changelog)."""


@dataclass(frozen=True)
class HistogramOutput:
    """Histograms of the magnitudes of some tensors that leave the graph.

    Attributes:
        output: int32 [any number of steps, ..., tensors, 1 + BINS]: what is to be added to `LEAST_EXPONENT` for the power of
            two at which the last bin ends, above the largest one, and how many elements each bin holds, the first with all that is smaller.
        names: the tensors.
    """

    output: str
    names: tuple[str, ...]


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
        names: the tensors that are reduced, in the order of the numbers.
        order: the same in execution order.
        measured_as: for each wanted tensor the one of `names` that holds the same values.
        left_out: wanted tensors that cannot be reduced, with the reason.
        rows: of the tensors of which rows can be taken.
        histograms: of the tensors that are counted, each among `names`.
    """

    outputs: tuple[str, ...]
    names: tuple[str, ...]
    order: tuple[str, ...]
    measured_as: dict[str, str]
    left_out: dict[str, str]
    rows: tuple[RowOutput, ...] = ()
    histograms: tuple[HistogramOutput, ...] = ()


def add_reductions(
    model: Model,
    proto: onnx.ModelProto,
    wanted: Sequence[str] | Mapping[str, AbstractSet[Probe]],
    probes: Sequence[Probe],
    rows: Collection[str] = (),
    *,
    histograms: Collection[str] = (),
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
        histograms: those of `wanted` whose magnitudes are counted.
        keep_outputs: let the numbers be further outputs.

    Raises:
        Pi05cError: the opset of the graph is too low for histograms.
    """
    if histograms and model.graph.opset < HISTOGRAM_OPSET:
        raise Pi05cError(
            f"histograms need opset {HISTOGRAM_OPSET} or later, and the graph has {model.graph.opset}: take "
            "--calibration-method max, or export the model again"
        )
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
    counted = frozenset(measured_as[name] for name in histograms if name in measured_as)
    writer = _Writer(model, proto, probes, set(measured_as.values()), frozenset(rows), counted, own)
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
        proto.graph.output.extend(counts.value for counts in writer.histograms)
        proto.graph.input.extend(
            helper.make_tensor_value_info(taken.indices, TensorProto.INT64, [None]) for taken in writer.rows
        )
    return Reductions(
        tuple(part.tensor for part in parts),
        names,
        tuple(writer.order),
        measured_as,
        left_out,
        tuple(writer.rows),
        tuple(HistogramOutput(counts.value.name, counts.names) for counts in writer.histograms),
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
        if isinstance(tensor, gs.Variable) and tensor.type != "tensor_type":
            return ""
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


@dataclass(frozen=True)
class _Counts:
    """Histograms, declared as an output of the graph or body that they leave."""

    value: onnx.ValueInfoProto
    names: tuple[str, ...]


class _Writer:
    """Appends nodes to a proto; constants go to the outermost graph, where every body sees them."""

    def __init__(
        self,
        model: Model,
        proto: onnx.ModelProto,
        probes: Sequence[Probe],
        wanted: set[str],
        sampled: frozenset[str],
        counted: frozenset[str],
        own: Mapping[str, AbstractSet[Probe]] | None,
    ) -> None:
        self._names = Names(model.graph)
        self._opset: int = model.graph.opset
        self._initializers = proto.graph.initializer
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._probes = tuple(probes)
        self._wanted = wanted
        self._sampled = sampled
        self._counted = counted
        self._own = own
        self.histograms: list[_Counts] = []
        self.rows: list[RowOutput] = []
        self.order: list[str] = []

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
        added: list[list[onnx.NodeProto]] = []
        for item in self._in_groups(scope, graph, sampled):
            if isinstance(item, _Rows):
                added.append(self._take(item))
                continue
            nodes, part = self._over_steps(item) if isinstance(item, _Part) else self._reduce(item)
            added.append(nodes)
            parts.append(part)
        for nodes in reversed(added):
            graph.node.extend(nodes)
        return parts

    def declared(self, part: _Part) -> onnx.ValueInfoProto:
        """The declaration of a part as an output of its graph."""
        shape = [len(self._probes), len(part.names)]
        return helper.make_tensor_value_info(part.tensor, TensorProto.DOUBLE, shape)

    def _in_groups(
        self, scope: gs.Graph, graph: onnx.GraphProto, sampled: bool
    ) -> Iterator[list[gs.Tensor] | _Part | _Rows]:
        """Tensors of one graph, small ones in groups of one shape, and what its bodies return.

        All in execution order, where a group stands at its last tensor.
        """
        waiting: dict[object, list[gs.Tensor]] = {}
        for item in self._in_order(scope, graph, sampled):
            if isinstance(item, (_Part, _Rows)):
                yield item
                continue
            room = _group_size(item)
            if room == 1:
                yield [item]
                continue
            counted = item.name in self._counted
            key = (tuple(item.shape), to_numpy(item.dtype), self._probes_of(item), counted)
            group = waiting.setdefault(key, [])
            group.append(item)
            if len(group) == room:
                yield waiting.pop(key)
        yield from waiting.values()

    def _in_order(
        self, scope: gs.Graph, graph: onnx.GraphProto, sampled: bool
    ) -> Iterator[gs.Tensor | _Part | _Rows]:
        def asked(tensor: gs.Tensor) -> Iterator[gs.Tensor | _Rows]:
            if tensor.name in self._wanted:
                self.order.append(tensor.name)
                yield tensor
            if sampled and tensor.name in self._sampled:
                shape = tensor.shape
                if shape and all(isinstance(dim, int) and dim > 0 for dim in shape):
                    yield _Rows(tensor)

        for tensor in scope.inputs:
            yield from asked(tensor)
        for node, exported in zip(scope.nodes, list(graph.node), strict=True):
            if steps(node):
                outside, self.histograms = self.histograms, []
                body = self.scope(node.attrs["body"], _body(exported))
                inside, self.histograms = self.histograms, outside
                self.histograms += [self._returned_counts(exported, counts) for counts in inside]
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
        return _Part(self._return(node, self.declared(body)), body.names)

    def _returned_counts(self, node: onnx.NodeProto, counts: _Counts) -> _Counts:
        """Make a body return histograms, one more axis in front."""
        dims = counts.value.type.tensor_type.shape.dim
        shape = [None, *(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)]
        name = self._return(node, counts.value)
        return _Counts(helper.make_tensor_value_info(name, TensorProto.INT32, shape), counts.names)

    def _return(self, node: onnx.NodeProto, value: onnx.ValueInfoProto) -> str:
        """Make a body return a tensor as a scan output; the name of what the node then gives."""
        graph = _body(node)
        carried = 1 if node.op_type == "Loop" else 0
        while len(node.output) < len(graph.output) - carried:
            node.output.append(self._new("unused"))
        graph.output.append(value)
        for attribute in node.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.append(0)
        node.output.append(self._new("steps"))
        return str(node.output[-1])

    def _probes_of(self, tensor: gs.Tensor) -> AbstractSet[Probe]:
        return frozenset(self._probes) if self._own is None else frozenset(self._own[tensor.name])

    def _reduce(self, tensors: list[gs.Tensor]) -> tuple[list[onnx.NodeProto], _Part]:
        """The numbers of tensors of one shape and type."""
        nodes: list[onnx.NodeProto] = []

        def apply(operator: str, *inputs: str, **attributes: Any) -> str:
            output = self._new("range")
            nodes.append(helper.make_node(operator, inputs, [output], **attributes))
            return output

        names = tuple(str(tensor.name) for tensor in tensors)
        values = names[0] if len(names) == 1 else apply("Concat", *names, axis=0)
        dtype = to_numpy(tensors[0].dtype)
        if dtype not in (FLOAT32, FLOAT64):
            values, dtype = apply("Cast", values, to=TensorProto.FLOAT), FLOAT32
        values = apply("Reshape", values, self._constant(np.array([1, len(names), -1])))
        numbers = []
        for probe in self._probes:
            if probe not in self._probes_of(tensors[0]):
                numbers.append(self._constant(np.full((1, len(names)), probe.identity, dtype)))
                continue
            elements = values
            if probe.of is Of.SQUARE:
                elements = apply("Mul", values, values)
            elif probe.of is not None:
                elements = apply("Cast", self._condition(probe.of, values, dtype, apply), to=to_onnx(dtype))
            numbers.append(self._over_axis(probe.operator, elements, 2, apply, keepdims=0))
        joined = numbers[0] if len(numbers) == 1 else apply("Concat", *numbers, axis=0)
        part = _Part(apply("Cast", joined, to=TensorProto.DOUBLE), names)
        if names[0] in self._counted:
            if dtype != FLOAT32:
                values = apply("Cast", values, to=TensorProto.FLOAT)
            self._count(values, names, apply)
        return nodes, part

    def _count(self, values: str, names: tuple[str, ...], apply: Callable[..., str]) -> None:
        """The histograms of float32 [1, tensors, any number]."""
        exponents = np.arange(LEAST_EXPONENT, LARGEST_EXPONENT + 1, dtype=np.float64)
        ends = self._constant((2.0 ** exponents[:-1]).astype(np.float32))
        starts = self._constant((BINS_AN_OCTAVE * (exponents - OCTAVES)).astype(np.float32))
        bins_an_e_fold = self._constant(np.array(BINS_AN_OCTAVE / math.log(2), np.float32))
        sizes = apply("Abs", values)
        largest = self._over_axis("ReduceMax", sizes, 2, apply, keepdims=1)
        beyond = apply("Cast", apply("GreaterOrEqual", largest, ends), to=TensorProto.INT32)
        exponent = self._over_axis("ReduceSum", beyond, 2, apply, keepdims=1)
        logarithms = apply("Mul", apply("Log", sizes), bins_an_e_fold)
        places = apply("Sub", logarithms, apply("Gather", starts, exponent, axis=0))
        first, last = (self._constant(np.array(index, np.int32)) for index in (0, BINS - 1))
        bins = apply("Clip", apply("Cast", places, to=TensorProto.INT32), first, last)
        one = numpy_helper.from_array(np.ones(1, np.int32))
        ones = apply("ConstantOfShape", apply("Shape", bins), value=one)
        empty = self._constant(np.zeros((1, len(names), BINS), np.int32))
        counts = apply("ScatterElements", empty, bins, ones, axis=2, reduction="add")
        joined = apply("Concat", exponent, counts, axis=2)
        shape = [1, len(names), 1 + BINS]
        self.histograms.append(
            _Counts(helper.make_tensor_value_info(joined, TensorProto.INT32, shape), names)
        )

    def _over_axis(
        self, operator: str, values: str, axis: int, apply: Callable[..., str], *, keepdims: int
    ) -> str:
        if self._opset >= _AXES_AS_INPUT[operator]:
            return apply(operator, values, self._constant(np.array([axis])), keepdims=keepdims)
        return apply(operator, values, axes=[axis], keepdims=keepdims)

    def _condition(self, of: Of, values: str, dtype: Any, apply: Callable[..., str]) -> str:
        if of is Of.NAN:
            return apply("IsNaN", values)
        size = apply("Abs", values)
        if of is Of.CLIPPED:
            return apply("Greater", size, self._constant(np.array(E4M3_MAX, dtype)))
        small = apply("LessOrEqual", size, self._constant(np.array(E4M3_FLUSHED, dtype)))
        return apply("And", small, apply("Greater", size, self._constant(np.array(0, dtype))))

    def _over_steps(self, part: _Part) -> tuple[list[onnx.NodeProto], _Part]:
        """Reduce what a body returned over its steps, of which there may be none."""
        nodes: list[onnx.NodeProto] = []

        def apply(operator: str, *inputs: str, **attributes: Any) -> str:
            output = self._new("steps")
            nodes.append(helper.make_node(operator, inputs, [output], **attributes))
            return output

        identity = np.array([probe.identity for probe in self._probes])
        nothing = np.tile(identity[None, :, None], (1, 1, len(part.names)))
        padded = apply("Concat", self._constant(nothing), part.tensor, axis=0)
        rows = [
            self._over_axis(
                probe.operator,
                apply("Gather", padded, self._constant(np.array(index)), axis=1),
                0,
                apply,
                keepdims=1,
            )
            for index, probe in enumerate(self._probes)
        ]
        return nodes, _Part(apply("Concat", *rows, axis=0), part.names)

    def _constant(self, values: Array) -> str:
        key = str(values.dtype), values.shape, values.tobytes()
        if key not in self._constants:
            self._constants[key] = self._new("constant")
            self._initializers.append(numpy_helper.from_array(values, self._constants[key]))
        return self._constants[key]

    def _new(self, what: str) -> str:
        return self._names.unique(f"calibration.{what}")


def _group_size(tensor: gs.Tensor) -> int:
    """How many tensors of one shape are reduced together; their first axis, which they are joined along, is static."""
    shape = tensor.shape
    if not shape or not all(isinstance(dim, int) for dim in shape):
        return 1
    elements = math.prod(int(dim) for dim in shape)
    return max(1, min(_TENSORS_A_GROUP, _BYTES_A_GROUP // (4 * elements)))


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
