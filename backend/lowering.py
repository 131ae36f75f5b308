"""Spells out for onnxruntime's CPU provider what it lacks, or computes in a wider format than the graph says.

Measured with onnxruntime 1.32 at opsets 17, 19, 21 and 23:

    - float16 has a kernel for every operator of a pi0.5 graph, but chains of them run in float32 throughout: the
      provider drops the casts between them, so that nothing is rounded and nothing overflows at 65504. Below 1.30
      QuantizeLinear makes wrong INT8 codes of it, below 1.32 it takes no float32 scale beside it.
    - bfloat16 exists for what moves data (Reshape, Transpose, Concat, Split, Slice, Gather, ...), not for arithmetic,
      Where, Expand, Tile, Pad (below 21), reductions, MatMul, QuantizeLinear or DequantizeLinear.
    - FP8 exists for QuantizeLinear, DequantizeLinear and Cast, and from opset 21 on for Reshape and Transpose.

Each such operator therefore runs in float32 on the values of the narrow type, and its result is rounded to that
type by a Cast of its own, which onnxruntime keeps: one operator, one rounding. For operators that only move data
this changes no bit. FP4, which it lacks altogether, is spelled out first (see `fp4`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx
import onnx.inliner
from onnx import TensorProto

from pi05c.backend.fp4 import Fp4Lowering, is_fp4, shape_of, uses_fp4
from pi05c.graph.domains import STANDARD_DOMAINS
from pi05c.graph.errors import Pi05cError
from pi05c.graph.inference import infer_shapes, is_known
from pi05c.graph.sort import sort_proto
from pi05c.graph.spelling import spell_as_onnx
from pi05c.graph.walk import bodies_of, graphs_in

_FLOW = frozenset({"Cast", "CastLike", "Constant", "Identity", "If", "Loop", "Scan", "Shape", "Size"})
_MOVES = frozenset(
    {
        *(
            "Concat",
            "ConstantOfShape",
            "Flatten",
            "Gather",
            "GatherND",
            "Reshape",
            "Slice",
            "Split",
            "Squeeze",
        ),
        *("Transpose", "Unsqueeze"),
    }
)
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_FLOAT16 = (
    _FLOW | _MOVES | {"DequantizeLinear", "Expand", "Tile", "Where", "Pad", "GatherElements", "ScatterND"}
)
_BFLOAT16 = _FLOW | _MOVES
_FLOAT8 = _FLOW | _QUANTIZERS

_FLOAT8_RESHAPED_FROM = 21
"""Opset from which onnxruntime reshapes and transposes FP8."""

_FLOAT8_TYPES = (
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
)
_NARROW_NAMES = ("INT2", "UINT2", "INT4", "UINT4", "FLOAT8E8M0")
_NOT_IN_NUMPY = frozenset(
    {
        *(TensorProto.BFLOAT16, *_FLOAT8_TYPES),
        *(getattr(TensorProto, name) for name in _NARROW_NAMES if hasattr(TensorProto, name)),
    }
)
"""Types that onnxruntime's Python API neither takes from nor gives to numpy; float32 holds each of their values."""

KEPT = "EliminateIdentity"
"""The optimizer of onnxruntime that must be disabled where a lowered model runs."""

_TYPE_ATTRIBUTES = ("output_dtype", "dtype")


@dataclass
class Lowered:
    """A model that onnxruntime runs with the bits of the original.

    Attributes:
        changed: whether it differs from the original.
        feeds: inputs that are fed as float32, with the name under which.
        fetches: outputs that are fetched as float32, with the name under which.
    """

    model: onnx.ModelProto
    changed: bool = False
    feeds: dict[str, str] = field(default_factory=dict)
    fetches: dict[str, str] = field(default_factory=dict)


def lower(model: onnx.ModelProto) -> Lowered:
    """Lower a model, whose weights may be external; the proto is consumed.

    Raises:
        Pi05cError: an operator computes in FP4 that cannot be spelled out, or the types of a graph contradict each other.
    """
    repeated = _drop_repeated_names(model) | _drop_inputs_with_values(model.graph)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    respelled = spell_as_onnx(model)
    for graph in graphs_in(model.graph):
        sort_proto(graph)
    model = _with_types(model)
    fp4 = uses_fp4(list(graphs_in(model.graph)))
    fed, fetched = (
        {value.name: value.name for value in values if is_fp4(value)}
        for values in (model.graph.input, model.graph.output)
    )
    lowering = _Lowering(_without_fp4(model) if fp4 else model)
    lowering.result.changed = fp4 or respelled or repeated
    lowering.result.feeds.update(fed)
    lowering.result.fetches.update(fetched)
    lowering.run()
    return lowering.result if lowering.result.changed else Lowered(model)


class _Scope:
    """Tensor types and float32 copies that are visible in one graph."""

    def __init__(self, graph: onnx.GraphProto, outer: _Scope | None) -> None:
        self.graph = graph
        self.outer = outer
        self.types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.HasField("tensor_type"):
                self.types.setdefault(value.name, value.type.tensor_type.elem_type)
        self.float32: dict[str, str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def type_of(self, name: str) -> int:
        """Element type of a tensor of this graph or one around it; UNDEFINED where inference did not find it."""
        found: int | None = self.types.get(name)
        if found is None:
            return self.outer.type_of(name) if self.outer else TensorProto.UNDEFINED
        return found

    def float32_of(self, name: str) -> str | None:
        """Name of the float32 copy of a tensor, where there is one already."""
        return self.float32.get(name) or (self.outer.float32_of(name) if self.outer else None)


class _Lowering:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.result = Lowered(model)
        opset = next((entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), 0)
        float8 = _FLOAT8 | {"Reshape", "Transpose"} if opset >= _FLOAT8_RESHAPED_FROM else _FLOAT8
        self.native: Mapping[int, frozenset[str]] = {
            TensorProto.FLOAT16: _FLOAT16,
            TensorProto.BFLOAT16: _BFLOAT16,
            **dict.fromkeys(_FLOAT8_TYPES, float8),
        }
        self.names = _names(model)

    def run(self) -> None:
        graph = self.result.model.graph
        self._widen_sequences()
        scope = _Scope(graph, None)
        for value in graph.input:
            if value.type.tensor_type.elem_type in _NOT_IN_NUMPY:
                self._feed_as_float32(scope, value)
        self._lower_nodes(scope)
        for value in graph.output:
            if value.type.tensor_type.elem_type in _NOT_IN_NUMPY:
                self.result.fetches[value.name] = self._widen(scope, value.name)
                value.name = self.result.fetches[value.name]
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        self._finish(scope)
        self._shield_captured_casts()
        self._name_returned_inputs()

    def _lower_nodes(self, scope: _Scope) -> None:
        for node in scope.graph.node:
            for body in bodies_of(node):
                inner = _Scope(body, scope)
                self._lower_nodes(inner)
                self._finish(inner)
            self._lower_node(scope, node)

    def _finish(self, scope: _Scope) -> None:
        del scope.graph.node[:]
        scope.graph.node.extend(scope.nodes)

    def _lower_node(self, scope: _Scope, node: onnx.NodeProto) -> None:
        self._omit_default_type(scope, node)
        casts = []
        for index, name in enumerate(node.input):
            if name and self._lacks(node, scope.type_of(name)):
                node.input[index] = self._widen(scope, name)
        for index, name in enumerate(node.output):
            dtype = scope.type_of(name)
            if name and self._lacks(node, dtype):
                wide = self._new_name(name)
                node.output[index] = wide
                casts.append(_cast(wide, name, dtype))
                self.result.changed = True
                for attribute in node.attribute:
                    if attribute.name in _TYPE_ATTRIBUTES and attribute.i == dtype:
                        attribute.i = TensorProto.FLOAT
        scope.nodes += [node, *casts]

    def _omit_default_type(self, scope: _Scope, node: onnx.NodeProto) -> None:
        """Say no type of a DequantizeLinear where it is that of its scale.

        onnxruntime 1.32 cannot load one of float16 that says so and whose result nothing reads.
        """
        if node.op_type == "DequantizeLinear":
            for attribute in list(node.attribute):
                if attribute.name == "output_dtype" and attribute.i == scope.type_of(node.input[1]):
                    node.attribute.remove(attribute)
                    self.result.changed = True

    def _widen_sequences(self) -> None:
        """Let sequences hold float32: what makes and reads one is widened like any other operator."""
        for graph in graphs_in(self.result.model.graph):
            for value in (*graph.input, *graph.value_info, *graph.output):
                element = value.type.sequence_type.elem_type.tensor_type
                if value.type.HasField("sequence_type") and element.elem_type in self.native:
                    element.elem_type = TensorProto.FLOAT
            for node in graph.node:
                for attribute in node.attribute:
                    if node.op_type == "SequenceEmpty" and attribute.i in self.native:
                        attribute.i = TensorProto.FLOAT

    def _shield_captured_casts(self) -> None:
        """Put an Identity behind each Cast to float16, and each Cast of a Cast, that a body reads.

        onnxruntime 1.32 removes float16 -> float32 -> float16, and float32 -> float64 -> float32, where nothing of the
        same graph reads the result, what it drops in between included, and the body then misses an input. `KEPT` keeps
        it from dropping the Identity.
        """
        for graph in graphs_in(self.result.model.graph):
            captured = {name for node in graph.node for body in bodies_of(node) for name in _read_in(body)}
            nodes, cast = [], set[str]()
            for node in graph.node:
                nodes.append(node)
                to = (
                    next((a.i for a in node.attribute if a.name == "to"), None)
                    if node.op_type == "Cast"
                    else None
                )
                again = to is not None and node.input[0] in cast
                if to is not None:
                    cast.add(node.output[0])
                if (to == TensorProto.FLOAT16 or again) and node.output[0] in captured:
                    shielded = node.output[0]
                    node.output[0] = self._new_name(shielded)
                    nodes.append(onnx.helper.make_node("Identity", node.output, [shielded]))
                    self.result.changed = True
            if len(nodes) > len(graph.node):
                del graph.node[:]
                graph.node.extend(nodes)

    def _name_returned_inputs(self) -> None:
        """Put an Identity behind what a Scan's body returns as it got it.

        onnxruntime 1.32 hands out memory that nobody wrote in its place. `KEPT` keeps it from dropping the Identity.
        """
        for graph in graphs_in(self.result.model.graph):
            for body in (body for node in graph.node if node.op_type == "Scan" for body in bodies_of(node)):
                given = {value.name for value in body.input}
                for value in body.output:
                    if value.name in given:
                        source, value.name = value.name, self._new_name(value.name)
                        body.node.append(onnx.helper.make_node("Identity", [source], [value.name]))
                        self.result.changed = True

    def _lacks(self, node: onnx.NodeProto, dtype: int) -> bool:
        adds = node.op_type == "ScatterND" and any(
            attribute.name == "reduction" and attribute.s != b"none" for attribute in node.attribute
        )
        return dtype in self.native and (node.op_type not in self.native[dtype] or adds)

    def _widen(self, scope: _Scope, name: str) -> str:
        """The float32 copy of a tensor, made in this graph unless it is there already."""
        wide = scope.float32_of(name)
        if wide is None:
            wide = scope.float32[name] = self._new_name(name)
            scope.nodes.append(_cast(name, wide, TensorProto.FLOAT))
            self.result.changed = True
        return wide

    def _feed_as_float32(self, scope: _Scope, value: onnx.ValueInfoProto) -> None:
        fed = self.result.feeds[value.name] = self._new_name(value.name)
        scope.nodes.append(_cast(fed, value.name, value.type.tensor_type.elem_type))
        value.name = fed
        value.type.tensor_type.elem_type = TensorProto.FLOAT
        self.result.changed = True

    def _new_name(self, name: str) -> str:
        new = f"{name}__float32"
        while new in self.names:
            new += "_"
        self.names.add(new)
        return new


def _read_in(body: onnx.GraphProto) -> Iterator[str]:
    for graph in graphs_in(body):
        yield from (name for node in graph.node for name in node.input)
        yield from (value.name for value in graph.output)


def _drop_repeated_names(model: onnx.ModelProto) -> bool:
    """Take away the names of nodes that others of their graph have: ONNX allows it, onnxruntime refuses it."""
    found = False
    for graph in graphs_in(model.graph):
        seen: set[str] = set()
        for node in graph.node:
            if node.name in seen:
                node.name = ""
                found = True
            elif node.name:
                seen.add(node.name)
    return found


def _drop_inputs_with_values(graph: onnx.GraphProto) -> bool:
    """Let inputs that have a value to fall back on be constants: nobody feeds them, and their tensors may be rewritten."""
    values = {tensor.name for tensor in graph.initializer}
    left = [value for value in graph.input if value.name not in values]
    found = len(left) < len(graph.input)
    if found:
        del graph.input[:]
        graph.input.extend(left)
    return found


def _cast(source: str, target: str, dtype: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], name=f"{target}__cast", to=dtype)


def _with_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the type of every tensor as its operators define it.

    What the file states for them is forgotten first, since an edit may have left it stale, except for the results of
    operators that are not ONNX's own.
    """
    for graph in graphs_in(model.graph):
        foreign = {
            name
            for node in graph.node
            if node.domain not in STANDARD_DOMAINS and not is_known(node)
            for name in node.output
        }
        kept = [value for value in graph.value_info if value.name in foreign]
        del graph.value_info[:]
        graph.value_info.extend(kept)
    try:
        return infer_shapes(model)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise Pi05cError(
            f"the types of the graph contradict each other: {' '.join(str(error).split())}"
        ) from error


def _without_fp4(model: onnx.ModelProto) -> onnx.ModelProto:
    """The typed model with FP4 spelled out in float32, and typed again."""
    graphs = list(graphs_in(model.graph))
    shapes = {
        value.name: shape
        for graph in graphs
        for value in (*graph.input, *graph.value_info, *graph.output)
        if (shape := shape_of(value)) is not None
    }
    shapes |= {tensor.name: tuple(tensor.dims) for graph in graphs for tensor in graph.initializer}
    Fp4Lowering(_names(model), shapes).run(model.graph)
    return _with_types(model)


def _names(model: onnx.ModelProto) -> set[str]:
    """The names of all tensors of a model."""
    return {
        name
        for graph in graphs_in(model.graph)
        for name in (
            *(value.name for value in (*graph.input, *graph.initializer)),
            *(output for node in graph.node for output in node.output),
        )
    }


__all__ = ["KEPT", "Lowered", "lower"]
