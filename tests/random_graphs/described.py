"""What a file may hold beside its graph."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from random_graphs.core import (
    FLOAT4,
    FLOAT8,
    Array,
    Generated,
    numpy_type,
)


def described(graph: Generated, rng: random.Random) -> Generated:
    """The same with what a file may hold that computes nothing: texts, metadata, domains, and odd constants."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)

    def text() -> str:
        return rng.choice(("", "words", "слово \n", "<i>&amp;</i>", "x" * 2000))

    def describe(holder: Any) -> None:
        if rng.random() < 0.3 and (said := text()):
            holder.doc_string = said
        if rng.random() < 0.3 and not isinstance(holder, onnx.ModelProto):
            holder.metadata_props.add(key=f"key {text()[:5]}", value=text())

    proto.domain, proto.model_version = rng.choice(("", "org.example")), rng.choice((0, 7, 2**40))
    proto.producer_name, proto.producer_version = text(), text()
    describe(proto)
    proto.metadata_props.add(key="pi05c.weights", value="random")
    if rng.random() < 0.5:
        proto.opset_import.append(helper.make_opsetid("com.example", 3))
    _add_constants(proto, rng)
    for body in _graphs_in(proto.graph):
        values = {value.name: value for value in (*body.output, *body.input)}
        repeated = len(values) < len(body.output) + len(body.input)  # what is said of a tensor is said once
        for holder in (body, *body.node, *body.initializer, *(() if repeated else values.values())):
            describe(holder)
        told: dict[str, onnx.ValueInfoProto] = {}
        for value in (*body.input, *body.output):  # what a body returns twice, or as it got it, is one tensor
            value.CopyFrom(told.setdefault(value.name, value))
    for value in proto.graph.input:
        if rng.random() < 0.2:
            value.type.denotation = "TENSOR"
            for dim in value.type.tensor_type.shape.dim[:1]:
                dim.denotation = "DATA_BATCH"
    for function in proto.functions:
        describe(function)
        for node in function.node:
            describe(node)
    return replace(graph, proto=proto)


def _add_constants(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Outputs of constants in types that arithmetic lacks."""
    types = [TensorProto.BOOL, TensorProto.INT8, TensorProto.DOUBLE]
    if proto.opset_import[0].version >= 19:
        types += [FLOAT8, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E4M3FNUZ]
    if proto.opset_import[0].version >= 23:
        types += [FLOAT4, TensorProto.INT4]
    for index in range(rng.randint(0, 2)):
        dtype, shape = rng.choice(types), rng.choice(((), (3,), (5, 7), (64, 63)))
        values: Array = np.random.default_rng(index).standard_normal(shape).astype(np.float32)
        tensor = numpy_helper.from_array(values.astype(numpy_type(dtype)), f"stored {index}")
        proto.graph.initializer.append(tensor)
        proto.graph.node.append(
            helper.make_node("Identity", [tensor.name], [f"kept {index}"], f"keep {index}")
        )
        proto.graph.output.append(helper.make_tensor_value_info(f"kept {index}", dtype, shape))


def _graphs_in(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs_in(attribute.g)
