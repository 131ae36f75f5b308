"""Spells out FP4 for onnxruntime, which has neither the type's operators nor TensorRT's dynamic quantization.

A tensor of FLOAT4E2M1 becomes a float32 tensor of the same values: stored codes are read as the unsigned four-bit
integers that they are and looked up in a table; what makes FP4 rounds to E2M1 to the nearest, ties to even, beyond 6
to 6; what dequantizes it multiplies. `trt::TRT_FP4DynamicQuantize` does what TensorRT documents for DynamicQuantize: each
block of the axis gets the scale amax / 6, divided by the second input and rounded to E4M3; the codes are computed from
that scale as stored. The codes of a block whose scale is zero are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from pi05c.graph.domains import DYNAMIC, TENSORRT_DOMAIN
from pi05c.graph.dtypes import FLOAT4E2M1, FLOAT8E4M3FN, LARGEST
from pi05c.graph.errors import Pi05cError

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of E2M1 by code, signs aside (OCP MX specification 1.0, FP4)."""

_MAX = LARGEST[FLOAT4E2M1]
_SUPPORTED = ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity", "Reshape", "Transpose")
"""Operators that may read or make FP4."""


def uses_fp4(graphs: Sequence[onnx.GraphProto]) -> bool:
    """Whether any tensor of the graphs is FP4, or any node makes it."""
    return any(
        any(tensor.data_type == TensorProto.FLOAT4E2M1 for tensor in (*graph.initializer, *_constants(graph)))
        or any(is_fp4(value) for value in (*graph.input, *graph.output))
        or any(node.domain == TENSORRT_DOMAIN and node.op_type == DYNAMIC for node in graph.node)
        or any(_makes_fp4(node) for node in graph.node)
        for graph in graphs
    )


def is_fp4(value: onnx.ValueInfoProto) -> bool:
    """Whether it is declared FP4."""
    return bool(value.type.tensor_type.elem_type == TensorProto.FLOAT4E2M1)


def _constants(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """The FP4 values of Constant nodes."""
    nodes = (node for node in graph.node if node.op_type == "Constant" and not node.domain)
    values = (attribute.t for node in nodes for attribute in node.attribute if attribute.name == "value")
    return [value for value in values if value.data_type == TensorProto.FLOAT4E2M1]


def _makes_fp4(node: onnx.NodeProto) -> bool:
    return any(
        attribute.name in ("to", "output_dtype") and attribute.i == TensorProto.FLOAT4E2M1
        for attribute in node.attribute
    )


def _store_constants(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes of FP4 into initializers."""
    kept = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"), None)
        if value is not None and value.data_type == TensorProto.FLOAT4E2M1:
            graph.initializer.add().CopyFrom(value)
            graph.initializer[-1].name = node.output[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


class Fp4Lowering:
    """Rewrites graphs in place; one for a model, so that names stay unique."""

    def __init__(self, names: set[str], shapes: dict[str, tuple[int | None, ...]]) -> None:
        """
        Args:
            names: of all tensors of the model, to which new ones are added.
            shapes: of the tensors whose rank is known.
        """
        self._names = names
        self._shapes = shapes
        self._fp4: set[str] = set()
        self._nodes: list[onnx.NodeProto] = []
        self._graph = onnx.GraphProto()

    def run(self, graph: onnx.GraphProto) -> None:
        """Rewrite a graph and the bodies inside it.

        Raises:
            Pi05cError: an operator that computes in FP4 and is not among those known.
        """
        outer = self._graph, self._nodes
        self._graph, self._nodes = graph, []
        if _constants(graph):
            _store_constants(graph)
        for tensor in graph.initializer:
            if tensor.data_type == TensorProto.FLOAT4E2M1:
                self._decode(tensor)
        for value in (*graph.input, *graph.output):
            if is_fp4(value):
                value.type.tensor_type.elem_type = TensorProto.FLOAT
                self._fp4.add(value.name)
        for node in graph.node:
            for attribute in node.attribute:
                for body in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                    self.run(body)
            self._lower(node)
        nodes = list(self._nodes)
        del graph.node[:]
        graph.node.extend(nodes)
        self._graph, self._nodes = outer

    def _lower(self, node: onnx.NodeProto) -> None:
        reads = [name for name in node.input if name in self._fp4]
        if node.domain == TENSORRT_DOMAIN and node.op_type == DYNAMIC:
            self._quantize_dynamically(node)
        elif not reads and not _makes_fp4(node):
            self._nodes.append(node)
        elif node.op_type not in _SUPPORTED:
            raise Pi05cError(
                f"node {node.name or node.output[0]!r} ({node.op_type}) computes in float4e2m1, which the onnxruntime "
                f"backend simulates for {', '.join(_SUPPORTED)} and {DYNAMIC}: run the engine, or choose passes "
                "without FP4"
            )
        elif node.op_type == "DequantizeLinear":
            self._dequantize(node)
        elif node.op_type == "QuantizeLinear":
            scale = self._expanded(node, self._float32(node.input[1]), node.input[0])
            self._round(self._add("Div", [self._float32(node.input[0]), scale]), node.output[0])
            self._fp4.add(node.output[0])
        elif _makes_fp4(node):
            self._round(self._float32(node.input[0]), node.output[0])
            self._fp4.add(node.output[0])
        else:
            if node.op_type != "Cast":
                self._fp4.add(node.output[0])
            self._nodes.append(node)

    def _decode(self, tensor: TensorProto) -> None:
        """The values of stored codes, whose bytes stay where they are and are read as UINT4.

        ModelOpt lists them among the inputs of the graph too, which gives an input a value to fall back on.
        """
        listed = next((value for value in self._graph.input if value.name == tensor.name), None)
        if listed is not None:
            self._graph.input.remove(listed)
        name, codes = tensor.name, self._new(f"{tensor.name}.codes")
        tensor.name, tensor.data_type = codes, TensorProto.UINT4
        table = self._constant(np.asarray([*VALUES, *(-value for value in VALUES)], np.float32))
        index = self._add("Cast", [codes], to=TensorProto.INT32)
        self._add("Gather", [table, index], output=name)
        self._fp4.add(name)

    def _dequantize(self, node: onnx.NodeProto) -> None:
        values, scale = node.input[:2]
        stated = next((each.i for each in node.attribute if each.name == "output_dtype"), 0)
        product = self._add("Mul", [values, self._expanded(node, self._float32(scale), values)])
        if stated:
            self._add("Cast", [product], output=node.output[0], to=stated)
        else:
            self._add("CastLike", [product, scale], output=node.output[0])

    def _expanded(self, node: onnx.NodeProto, scale: str, values: str) -> str:
        """A scale for each value: of a block, of an index of the axis, or one for all."""
        size = next((each.i for each in node.attribute if each.name == "block_size"), 0)
        axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
        rank = len(self._shapes.get(node.input[1], ()))
        if rank == 0:
            return scale
        if not size:
            full = len(self._shapes.get(node.input[0], (None,) * rank))
            around = [index for index in range(full) if index != axis % full]
            return self._add("Unsqueeze", [scale, self._constant(np.asarray(around, np.int64))])
        place = axis % rank + 1
        apart = self._add("Unsqueeze", [scale, self._constant(np.asarray([place], np.int64))])
        copies = np.ones(rank + 1, np.int64)
        copies[place] = size
        repeated = self._add("Expand", [apart, self._constant(copies)])
        return self._add("Reshape", [repeated, self._add("Shape", [values])])

    def _quantize_dynamically(self, node: onnx.NodeProto) -> None:
        attributes = {each.name: each.i for each in node.attribute}
        size, axis = attributes.get("block_size", 16), attributes.get("axis", -1)
        shape = self._shapes.get(node.input[0])
        if shape is None or any(dim is None for dim in shape[axis % len(shape) + 1 :]):
            raise Pi05cError(
                f"the shape of {node.input[0]!r}, which node {node.name!r} quantizes, is not known behind axis {axis}: "
                "run shape inference on the model first"
            )
        if any(dim != 1 for dim in self._shapes.get(node.input[1], ())):
            raise Pi05cError(
                f"the scale {node.input[1]!r} of node {node.name!r} ({DYNAMIC}) holds several numbers, where it takes one: "
                "merge them into the largest"
            )
        axis %= len(shape)
        x, factor = (self._float32(name) for name in node.input[:2])
        split = np.asarray([*(0,) * axis, -1, size, *(dim or 0 for dim in shape[axis + 1 :])], np.int64)
        blocks = self._add("Reshape", [x, self._constant(split)])
        along = self._constant(np.asarray([axis + 1], np.int64))
        amax = self._add("ReduceMax", [self._add("Abs", [blocks]), along], keepdims=1)
        six = self._add("Mul", [factor, self._constant(np.float32(_MAX))])
        largest = np.float32(LARGEST[FLOAT8E4M3FN])
        wanted = self._add(
            "Clip", [self._add("Div", [amax, six]), self._constant(np.float32(0)), self._constant(largest)]
        )
        stored = self._add("Cast", [wanted], to=TensorProto.FLOAT8E4M3FN)
        narrow = self._add("Cast", [stored], to=TensorProto.FLOAT)
        scale = self._add("Mul", [narrow, factor])
        zero = self._add("Equal", [scale, self._constant(np.float32(0))])
        quotient = self._add(
            "Where", [zero, self._constant(np.float32(0)), self._add("Div", [blocks, scale])]
        )
        codes, scales = (name or self._new(f"{node.input[0]}.unused") for name in node.output[:2])
        rounded = self._round(quotient)
        self._add("Reshape", [rounded, self._add("Shape", [x])], output=codes)
        self._fp4.add(codes)
        self._add("Cast", [self._add("Squeeze", [narrow, along])], output=scales, to=TensorProto.FLOAT8E4M3FN)

    def _round(self, x: str, output: str = "") -> str:
        """float32 to the nearest E2M1 value: steps of 1/2 below 2, of 1 below 4, of 2 up to 6; ties to even codes.

        In units of its step a value is even where its code is, so that Round, which takes halves to even, decides
        ties as the format does.
        """
        clipped = self._add("Clip", [x, self._constant(np.float32(-_MAX)), self._constant(np.float32(_MAX))])
        size = self._add("Abs", [clipped])
        two, four = (self._constant(np.float32(value)) for value in (2, 4))
        wide = self._add("Where", [self._add("Less", [size, four]), self._constant(np.float32(1)), two])
        step = self._add("Where", [self._add("Less", [size, two]), self._constant(np.float32(0.5)), wide])
        whole = self._add("Round", [self._add("Div", [clipped, step])])
        return self._add("Mul", [whole, step], output=output)

    def _float32(self, name: str) -> str:
        return name if name in self._fp4 else self._add("Cast", [name], to=TensorProto.FLOAT)

    def _constant(self, value: np.ndarray | np.generic) -> str:
        name = self._new("fp4")
        self._graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add(self, operator: str, inputs: Sequence[str], *, output: str = "", **attributes: int) -> str:
        result = output or self._new("fp4")
        node = helper.make_node(operator, inputs, [result], name=f"{result}__{operator}")
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self._nodes.append(node)
        return result

    def _new(self, base: str) -> str:
        name, number = base, len(self._names)
        while name in self._names:
            name, number = f"{base}.{number}", number + 1
        self._names.add(name)
        return name


def shape_of(value: onnx.ValueInfoProto) -> tuple[int | None, ...] | None:
    """The stated dimensions, None for one that is not a number; None where the rank is not known."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)


__all__ = ["Fp4Lowering", "is_fp4", "shape_of", "uses_fp4"]
