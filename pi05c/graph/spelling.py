"""Operators of older exporters, spelled as ONNX spells them.

ModelOpt's torch exporter wrote FP8 as `trt::TRT_FP8QuantizeLinear(x, scale)` and `trt::TRT_FP8DequantizeLinear(codes,
scale)`, with codes declared uint8 and scale = amax / 448, and DequantizeLinear in the domain `trt`
(modelopt/torch/quantization/export_onnx.py). They compute what QuantizeLinear and DequantizeLinear compute with a zero
point of type FLOAT8E4M3FN.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

import onnx
from onnx import TensorProto, helper

from pi05c.graph.domains import FP4_PLACEHOLDER, STANDARD_DOMAINS, TENSORRT_DOMAIN
from pi05c.graph.errors import Pi05cError
from pi05c.graph.walk import nodes_in

_FP8 = {"TRT_FP8QuantizeLinear": "QuantizeLinear", "TRT_FP8DequantizeLinear": "DequantizeLinear"}

_STANDARD = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""Operators that exporters put into TensorRT's domain though ONNX has them."""

_FP8_OPSET = 19
"""The first opset whose QuantizeLinear makes FLOAT8E4M3FN (ONNX operator changelog)."""

_NEWEST_OPSET = 21
"""Up to which TensorRT 10.13 reads."""

_ZERO = "fp8.zero_point"


def awaits_fp4(model: onnx.ModelProto) -> bool:
    """Whether a weight of a model is still to be turned into FP4."""
    return any(node.op_type == FP4_PLACEHOLDER for graph in _graphs(model.graph) for node in graph.node)


def spell_as_onnx(model: onnx.ModelProto) -> bool:
    """Respell the operators of a model in place, bodies included; whether any was.

    Raises:
        Pi05cError: its opset has no FP8.
    """
    old = [
        node
        for graph in _graphs(model.graph)
        for node in graph.node
        if node.domain == TENSORRT_DOMAIN and (node.op_type in _FP8 or node.op_type in _STANDARD)
    ]
    fp8 = [node for node in old if node.op_type in _FP8]
    if fp8:
        opset = max(
            (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0
        )
        if opset < _FP8_OPSET:
            raise Pi05cError(
                f"{fp8[0].op_type} {fp8[0].name!r} makes FP8, which opset {opset} of the model does not have: export "
                f"it at opset {_FP8_OPSET} or later"
            )
        zero = _unused_name(model.graph)
        model.graph.initializer.append(
            helper.make_tensor(zero, TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
        )
        codes = {node.output[0] if _FP8[node.op_type] == "QuantizeLinear" else node.input[0] for node in fp8}
        for graph in _graphs(model.graph):
            _declare_fp8(graph, codes)
        for node in fp8:
            node.op_type = _FP8[node.op_type]
            node.input.append(zero)
    for node in old:
        node.domain = ""
    return bool(old)


def state_opset(model: onnx.ModelProto) -> None:
    """Let a model that has none of ONNX's own operators say which opset they would be of, in place.

    Whoever puts one in, a Cast or a reduction, needs it said: the newest opset that the model's IR version knows, and
    no newer than TensorRT 10.13 reads.
    """
    stated = any(entry.domain in STANDARD_DOMAINS for entry in model.opset_import)
    if stated or any(node.domain in STANDARD_DOMAINS for node in nodes_in(model.graph.node)):
        return
    known = (
        version
        for (domain, version), ir in helper.OP_SET_ID_VERSION_MAP.items()
        if domain == "ai.onnx" and ir <= model.ir_version
    )
    model.opset_import.add(domain="", version=min(max(known, default=1), _NEWEST_OPSET))


def _declare_fp8(graph: onnx.GraphProto, codes: Set[str]) -> None:
    """Give the codes their type where the exporter declared bytes."""
    for value in (*graph.value_info, *graph.output):
        if value.name in codes and value.type.tensor_type.elem_type == TensorProto.UINT8:
            value.type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
    for tensor in graph.initializer:
        if tensor.name in codes and tensor.data_type == TensorProto.UINT8:
            tensor.data_type = TensorProto.FLOAT8E4M3FN


def _unused_name(graph: onnx.GraphProto) -> str:
    used = {
        name
        for each in _graphs(graph)
        for name in (
            *(tensor.name for tensor in each.initializer),
            *(value.name for value in each.input),
            *(output for node in each.node for output in node.output),
        )
    }
    name, number = _ZERO, 0
    while name in used:
        number += 1
        name = f"{_ZERO}_{number}"
    return name


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


__all__ = ["awaits_fp4", "spell_as_onnx", "state_opset"]
