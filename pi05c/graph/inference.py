"""Types and shapes of tensors by onnx's inference, with what it needs to be led around.

onnx knows nothing of TensorRT's operators, and so of nothing behind them. While it infers, operators of its own stand for
them that make tensors of the same types and shapes.

onnx 1.23 does not look outside a body for the constant that a Reshape or Expand in it reads; and the values of shapes that
it propagates are kept by name, so that a tensor of one branch gets the shape that one of the same name has in another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pi05c.graph.domains import DYNAMIC, FP4_PLACEHOLDER, TENSORRT_DOMAIN
from pi05c.graph.errors import Pi05cError
from pi05c.graph.walk import graphs_in, nodes_in

_STAND_IN = "pi05c.stand_in"

_DEFAULTS = {"MeanVarianceNormalization": ("axes", [0, 2, 3])}
"""Attributes without which onnx up to 1.23 infers nothing of an operator, with their defaults."""


def infer_shapes(proto: onnx.ModelProto, *, data_prop: bool = False) -> onnx.ModelProto:
    """`onnx.shape_inference.infer_shapes`, which goes on behind TensorRT's operators.

    Raises:
        InferenceError, RuntimeError, ValueError, ValidationError: as that does; `proto` is as it was then.
    """
    hidden: dict[str, onnx.NodeProto] = {}
    for graph in graphs_in(proto.graph):
        _show(graph, hidden)
    result = proto
    try:
        result = onnx.shape_inference.infer_shapes(proto, data_prop=data_prop)
    finally:
        for graph in graphs_in(result.graph) if hidden else ():
            _hide(graph, hidden)
        if hidden and result is not proto:
            for graph in graphs_in(proto.graph):
                _hide(graph, hidden)
    return result


def _show(graph: onnx.GraphProto, hidden: dict[str, onnx.NodeProto]) -> None:
    """Let operators of ONNX stand for TensorRT's, which go to `hidden`."""
    if not any(is_known(node) or _lacks_default(node) for node in graph.node):
        return
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if not is_known(node) and not _lacks_default(node):
            nodes.append(node)
            continue
        name = f"{_STAND_IN}.{len(hidden)}"
        hidden[name] = onnx.NodeProto()
        hidden[name].CopyFrom(node)
        nodes += _stand_ins(node, name)
    del graph.node[:]
    graph.node.extend(nodes)


def _hide(graph: onnx.GraphProto, hidden: dict[str, onnx.NodeProto]) -> None:
    nodes = [
        hidden.get(node.name, node)
        for node in graph.node
        if node.name in hidden or not node.name.startswith(_STAND_IN)
    ]
    if len(nodes) < len(graph.node) or any(node.name in hidden for node in graph.node):
        values = [value for value in graph.value_info if not value.name.startswith(_STAND_IN)]
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.value_info[:]
        graph.value_info.extend(values)


def is_known(node: onnx.NodeProto) -> bool:
    """Whether it is an operator of TensorRT whose outputs `infer_shapes` gives types and shapes."""
    return node.op_type == FP4_PLACEHOLDER or (
        node.op_type == DYNAMIC and node.domain == TENSORRT_DOMAIN and len(node.output) == 2
    )


def _stand_ins(node: onnx.NodeProto, name: str) -> list[onnx.NodeProto]:
    """Nodes with its outputs, of which the first has that name."""
    if _lacks_default(node):
        stated = onnx.NodeProto()
        stated.CopyFrom(node)
        stated.name = name
        _state_default(stated)
        return [stated]
    if node.op_type == FP4_PLACEHOLDER:
        return [helper.make_node("Identity", node.input[:1], node.output[:1], name)]
    attributes = {each.name: each.i for each in node.attribute}
    axis, step = attributes.get("axis", -1), attributes.get("block_size", 16)
    parts = [
        helper.make_node(
            "Constant",
            [],
            [f"{name}.{key}"],
            f"{name}.{key}",
            value=numpy_helper.from_array(np.asarray([value], np.int64)),
        )
        for key, value in (("start", 0), ("end", 2**62), ("axis", axis), ("step", step))
    ]
    codes, scales = node.output
    return [
        helper.make_node("Cast", node.input[:1], [codes], name, to=TensorProto.FLOAT4E2M1),
        *parts,
        helper.make_node(
            "Slice",
            [node.input[0], *(part.output[0] for part in parts)],
            [f"{name}.first"],
            f"{name}.Slice",
        ),
        helper.make_node("Cast", [f"{name}.first"], [scales], f"{name}.scales", to=TensorProto.FLOAT8E4M3FN),
    ]


def state_defaults(graph: onnx.GraphProto) -> None:
    """Give nodes, in bodies too, the attributes without which onnx infers nothing of them, in place."""
    for node in nodes_in(graph.node):
        if _lacks_default(node):
            _state_default(node)


def _lacks_default(node: onnx.NodeProto) -> bool:
    name, _ = _DEFAULTS.get(node.op_type, ("", []))
    return bool(name and not node.domain and all(attribute.name != name for attribute in node.attribute))


def _state_default(node: onnx.NodeProto) -> None:
    name, value = _DEFAULTS[node.op_type]
    node.attribute.append(helper.make_attribute(name, value))


def with_types(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Infer element types and shapes; a model for which that fails keeps what it declares.

    Raises:
        Pi05cError: a function of the model is not valid.
    """
    renamed = _part_names(proto.graph)
    lent = _lend_shapes(proto.graph, {})
    denoted = {value.name for value in _values(proto) if _denotes(value)}
    try:
        with contextlib.suppress(onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            proto = infer_shapes(proto, data_prop=True)
    except onnx.checker.ValidationError as error:  # of its functions
        raise Pi05cError(f"the model is not valid ONNX: {' '.join(str(error).split())}") from error
    for value in _values(proto) if denoted else ():
        if value.name not in denoted:  # inference hands on what inputs denote, from size to size
            for dim in value.type.tensor_type.shape.dim:
                dim.ClearField("denotation")
    for body, count in zip(_bodies(proto.graph), lent, strict=True):
        del body.initializer[len(body.initializer) - count :]
    for body, old in zip(_bodies(proto.graph), renamed, strict=True):
        if old:
            _rename(body, old)
    return proto


def _values(proto: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    for graph in graphs_in(proto.graph):
        yield from (*graph.input, *graph.output, *graph.value_info)


def _denotes(value: onnx.ValueInfoProto) -> bool:
    return any(dim.denotation for dim in value.type.tensor_type.shape.dim)


def _part_names(graph: onnx.GraphProto) -> list[dict[str, str]]:
    """Rename what a body defines under a name that another scope has; the old names of each body by the new."""
    used = set(_defined(graph))
    result: list[dict[str, str]] = []
    for number, body in enumerate(_bodies(graph)):
        own = _defined(body)
        new: dict[str, str] = {}
        for name in own:
            if name in used:
                new[name] = f"{name} {number}"
                while new[name] in used or new[name] in own:
                    new[name] += "'"
        if new:
            _rename(body, new)
        used.update(new.get(name, name) for name in own)
        result.append({to: name for name, to in new.items()})
    return result


def _defined(graph: onnx.GraphProto) -> dict[str, None]:
    values = (*graph.input, *graph.initializer)
    return dict.fromkeys([v.name for v in values] + [name for n in graph.node for name in n.output if name])


def _rename(body: onnx.GraphProto, new: Mapping[str, str]) -> None:
    """Rename tensors of a body, where the bodies in it read them too."""
    for value in (*body.input, *body.initializer, *body.value_info, *body.output):
        value.name = new.get(value.name, value.name)
    for node in body.node:
        for names in (node.input, node.output):
            if any(name in new for name in names):
                names[:] = [new.get(name, name) for name in names]
        for attribute in node.attribute:
            for inner in _bodies_of(attribute):
                own = _defined(inner)
                _rename(inner, {name: to for name, to in new.items() if name not in own})


def _lend_shapes(graph: onnx.GraphProto, outer: Mapping[str, onnx.TensorProto]) -> list[int]:
    """Give each body the small integer constants that it captures; how many each got, in the order of `_bodies`."""
    known = {**outer, **{tensor.name: tensor for tensor in graph.initializer if _is_shape(tensor)}}
    for node in graph.node:
        value = next((a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"), None)
        if value is not None and node.output and _is_shape(value):
            known[node.output[0]] = value
    counts = []
    for node in graph.node:
        for attribute in node.attribute:
            for body in _bodies_of(attribute):
                own = {value.name for value in (*body.input, *body.initializer)}
                own.update(output for inner in body.node for output in inner.output)
                read = dict.fromkeys(name for inner in body.node for name in inner.input if name not in own)
                captured = [name for name in read if name in known]
                deeper = _lend_shapes(body, {name: known[name] for name in known if name not in own})
                for name in captured:
                    body.initializer.add().CopyFrom(known[name])
                    body.initializer[-1].name = name
                counts += [len(captured), *deeper]
    return counts


def _is_shape(tensor: onnx.TensorProto) -> bool:
    inline = tensor.data_location != onnx.TensorProto.EXTERNAL
    return tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) <= 1 and inline


def _bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Every subgraph, outer before inner."""
    for node in graph.node:
        for attribute in node.attribute:
            for body in _bodies_of(attribute):
                yield body
                yield from _bodies(body)


def _bodies_of(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs)


__all__ = ["infer_shapes", "is_known", "state_defaults", "with_types"]
