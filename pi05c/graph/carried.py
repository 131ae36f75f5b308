"""What a file holds that onnx-graphsurgeon 0.6 has no place for, carried beside its objects through load and save.

It drops doc strings and metadata of everything but the graph, the overload of a node and of a function, empty lists (of
which it forgets the type) and attributes that are types, sparse tensors or lists of tensors; it fails on strings that
are not UTF-8 and on values that are optional or maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from pi05c.graph.domains import bare_name, tell_apart
from pi05c.graph.dtypes import to_numpy
from pi05c.graph.errors import Pi05cError
from pi05c.graph.scopes import bodies_of, graphs_in, nodes_in, nodes_of, scopes

CARRIED = ("metadata", "doc_string", "overload")
"""Attributes of a node that copies of it take over."""

_RAW = frozenset(
    {
        *(AttributeProto.TENSORS, AttributeProto.TYPE_PROTO, AttributeProto.TYPE_PROTOS),
        *(AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS),
    }
)
_LISTS = {
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
}
_SCALARS = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
}


class Empty(list[Any]):
    """The value of a list attribute without elements, with its type in `AttributeProto.AttributeType`."""

    def __init__(self, kind: AttributeProto.AttributeType) -> None:
        super().__init__()
        self.kind = kind


_SPECIAL = (gs.Graph, Empty, AttributeProto)
"""Values of attributes that hold something carried, or are carried themselves."""


def refuse_unknown(proto: onnx.ModelProto) -> None:
    """Raise for what can be neither represented nor carried; sizes below zero become unknown ones.

    Raises:
        Pi05cError: a sparse initializer, a value that is optional or a map, an attribute that is a list of graphs, is there twice or whose
            type is not that of its value.
    """
    for graph in graphs_in(proto.graph):
        for sparse in graph.sparse_initializer:
            raise Pi05cError(
                f"initializer {sparse.values.name!r} is sparse, which no backend takes: store all its values"
            )
        for tensor in graph.initializer:
            _refuse_tensor(tensor, f"initializer {tensor.name!r}")
        for value in (*graph.input, *graph.output, *graph.value_info):
            _refuse_type(value)
    for node in (*nodes_in(proto.graph), *(node for function in proto.functions for node in function.node)):
        seen: set[str] = set()
        for attribute in node.attribute:
            where = f"attribute {attribute.name!r} of {node.op_type} {node.name!r}"
            if attribute.name in seen:
                raise Pi05cError(f"{where} is there twice: the file is not a valid ONNX model")
            seen.add(attribute.name)
            if attribute.type == AttributeProto.GRAPHS or attribute.graphs:
                raise Pi05cError(f"{where} is a list of graphs, which only operators of other tools have")
            field = _SCALARS.get(attribute.type)
            if field in ("g", "t") and not attribute.ref_attr_name and not attribute.HasField(field):
                raise Pi05cError(f"{where} has no value: the file is not a valid ONNX model")
            if attribute.HasField("g") and field != "g":
                raise Pi05cError(
                    f"{where} has another type than its value: the file is not a valid ONNX model"
                )
            known = field or attribute.type in _LISTS or attribute.type in _RAW
            if not attribute.ref_attr_name and not known:
                raise Pi05cError(f"{where} has no type: the file is not a valid ONNX model")
            for tensor in (*([attribute.t] if field == "t" else []), *attribute.tensors):
                _refuse_tensor(tensor, where)
            if any(t.data_location == onnx.TensorProto.EXTERNAL for t in attribute.tensors):
                raise Pi05cError(f"{where} lies in another file: only single tensors may")


def _refuse_tensor(tensor: onnx.TensorProto, where: str) -> None:
    if to_numpy(tensor.data_type) is None:
        raise Pi05cError(
            f"{where} is of a type that ONNX does not have, {tensor.data_type}: the file is damaged"
        )
    if any(dim < 0 for dim in tensor.dims):
        raise Pi05cError(f"{where} has the shape {list(tensor.dims)}, which is none: the file is damaged")


def _refuse_type(value: onnx.ValueInfoProto) -> None:
    kind = value.type.WhichOneof("value")
    if kind == "sequence_type":
        kind = f"sequence of {value.type.sequence_type.elem_type.WhichOneof('value')}"
    if kind not in (None, "tensor_type", "sequence of tensor_type"):
        what = kind.removesuffix("_type")
        raise Pi05cError(
            f"tensor {value.name!r} is of type {what}: pi05c knows tensors and sequences of them"
        )
    tensor = (
        value.type.sequence_type.elem_type.tensor_type if kind != "tensor_type" else value.type.tensor_type
    )
    if kind is not None and not tensor.elem_type:
        value.ClearField("type")  # onnx-graphsurgeon fails on one that is stated to be unknown
    elif kind is not None and to_numpy(tensor.elem_type) is None:
        raise Pi05cError(
            f"tensor {value.name!r} is of a type that ONNX does not have, {tensor.elem_type}: the file is damaged"
        )
    for dim in tensor.shape.dim if kind is not None else ():
        if dim.dim_value < 0:
            dim.Clear()  # some write -1 for what only a run knows; onnx 1.23 ends the process over it


def take(proto: onnx.ModelProto) -> list[dict[str, Any]]:
    """Take off each node the attributes that onnx-graphsurgeon cannot import; their values by name, for `attach`."""
    taken = [_taken(node) for node in _each_node(proto)]
    for function in proto.functions:
        taken.append(
            {
                "attribute_proto": [
                    AttributeProto.FromString(a.SerializeToString()) for a in function.attribute_proto
                ]
            }
        )
        del function.attribute_proto[:]
    return taken


def _taken(node: onnx.NodeProto) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        field = _LISTS.get(attribute.type)
        if attribute.ref_attr_name:
            continue
        if attribute.type in _RAW:
            found[attribute.name] = AttributeProto.FromString(attribute.SerializeToString())
        elif field is not None and not getattr(attribute, field):
            found[attribute.name] = Empty(attribute.type)
        elif attribute.type == AttributeProto.STRING and not _is_text(attribute.s):
            found[attribute.name] = attribute.s
        elif attribute.type == AttributeProto.STRINGS and not all(map(_is_text, attribute.strings)):
            found[attribute.name] = list(attribute.strings)
    if found:
        left = [attribute for attribute in node.attribute if attribute.name not in found]
        left = [AttributeProto.FromString(attribute.SerializeToString()) for attribute in left]
        del node.attribute[:]
        node.attribute.extend(left)
    return found


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def attach(proto: onnx.ModelProto, graph: gs.Graph, taken: Sequence[dict[str, Any]]) -> None:
    """Give onnx-graphsurgeon's objects what it did not import.

    Args:
        proto: the model that `graph` was imported from.
        taken: what `take` gave.
    """
    nodes = len(taken) - len(proto.functions)
    for old, new, values in zip(_each_node(proto), _each_gs_node(graph), taken[:nodes], strict=True):
        tell_apart(new)
        new.attrs = {**new.attrs, **values}  # an OrderedDict is twice as large and as slow to walk
        new.metadata = _metadata(old)
        new.doc_string = old.doc_string
        new.overload = old.overload
    for theirs, function, values in zip(proto.functions, graph.functions, taken[nodes:], strict=True):
        function.metadata = _metadata(theirs)
        function.attribute_proto = values["attribute_proto"]
        function.overload = theirs.overload
        function.value_info = list(theirs.value_info)
    for theirs, scope in zip(graphs_in(proto.graph), scopes(graph), strict=True):
        scope.metadata = _metadata(theirs)
        scope.quantization_annotation = list(theirs.quantization_annotation)
        named = (*map(_texts, theirs.value_info), *theirs.input, *theirs.output)
        described = {v.name: v for v in named if v.doc_string or v.metadata_props or _denotes(v)}
        stored = {t.name: t for t in theirs.initializer if t.doc_string or t.metadata_props}
        for tensor in _own_tensors(scope) if described or stored else ():
            if tensor.name in described:
                tensor.described = described[tensor.name]
            if tensor.name in stored:
                tensor.described_weight = stored[tensor.name]


def describe(tensor: gs.Constant, node: gs.Node) -> None:
    """Let an initializer take over what is said of the Constant node that it was."""
    if node.doc_string or node.metadata:
        tensor.described_weight = onnx.TensorProto(doc_string=node.doc_string)
        _add_metadata(tensor.described_weight, node.metadata)


@contextmanager
def set_aside(graph: gs.Graph) -> Iterator[None]:
    """While onnx-graphsurgeon exports a graph: plain operator names, no attributes that it cannot export."""
    kept = []
    for node in _each_gs_node(graph):
        name = bare_name(node)
        if name != node.op or (
            node.attrs and any(isinstance(value, (Empty, AttributeProto)) for value in node.attrs.values())
        ):
            kept.append((node, node.op, node.attrs))
            node.op, node.attrs = name, exportable(node.attrs)
    try:
        yield
    finally:
        for node, op, attrs in kept:
            node.op, node.attrs = op, attrs


def exportable(attrs: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a node that onnx-graphsurgeon can export."""
    return {key: value for key, value in attrs.items() if not isinstance(value, (Empty, AttributeProto))}


def attributes_of(attrs: dict[str, Any]) -> list[AttributeProto]:
    """The attributes of a node as protos."""
    return [*OnnxExporter.export_attributes(exportable(attrs)), *_others(attrs)]


def _others(attrs: dict[str, Any]) -> Iterator[AttributeProto]:
    for key, value in attrs.items():
        if isinstance(value, Empty):
            yield AttributeProto(name=key, type=value.kind)
        elif isinstance(value, AttributeProto):
            yield value


def restore(graph: gs.Graph, proto: onnx.ModelProto) -> None:
    """Put what is carried into what onnx-graphsurgeon exported of `graph`."""
    _restore_graph(graph, proto.graph)
    for function, ours in zip(graph.functions, proto.functions, strict=True):
        constants = len(ours.node) - len(function.nodes)  # one in front for each initializer that was put in
        _restore_nodes(function.nodes, ours.node[constants:])
        kept = vars(function)
        _add_metadata(ours, kept.get("metadata", {}))
        _say(ours, overload=kept.get("overload"))
        ours.value_info.extend(kept.get("value_info", ()))
        ours.attribute_proto.extend(kept.get("attribute_proto", ()))


def _restore_graph(graph: gs.Graph, ours: onnx.GraphProto) -> None:
    _restore_nodes(graph.nodes, ours.node)
    _add_metadata(ours, vars(graph).get("metadata", {}))
    told = [t for t in _own_tensors(graph) if hasattr(t, "described") or hasattr(t, "described_weight")]
    for kept, values in (
        ("described", (*ours.input, *ours.output, *ours.value_info) if told else ()),
        ("described_weight", ours.initializer),
    ):
        known = {t.name: getattr(t, kept) for t in told if hasattr(t, kept)}
        for value in values if known else ():
            if value.name in known:
                _describe(value, known[value.name])
    annotations = vars(graph).get("quantization_annotation", ())
    names = {tensor.name for tensor in _own_tensors(graph)} if annotations else set()
    ours.quantization_annotation.extend(a for a in annotations if a.tensor_name in names)


def _restore_nodes(nodes: Sequence[gs.Node], ours: Sequence[onnx.NodeProto]) -> None:
    """Put what nodes carry, in their bodies too, into their protos; those of the others are left alone, which is quicker."""
    assert len(nodes) == len(ours)
    for index, node in enumerate(nodes):
        kept = vars(node)
        special = {key: value for key, value in node.attrs.items() if isinstance(value, _SPECIAL)}
        if not special and not any(map(kept.get, CARRIED)):
            continue
        new = ours[index]
        for attribute in new.attribute:
            if isinstance(body := special.get(attribute.name), gs.Graph):
                _restore_graph(body, attribute.g)
        new.attribute.extend(_others(special))
        _say(new, doc_string=kept.get("doc_string"), overload=kept.get("overload"))
        _add_metadata(new, kept.get("metadata", {}))


def _describe(value: Any, kept: Any) -> None:
    _say(value, doc_string=kept.doc_string)
    del value.metadata_props[:]
    value.metadata_props.extend(kept.metadata_props)
    if not isinstance(value, onnx.ValueInfoProto) or not isinstance(kept, onnx.ValueInfoProto):
        return
    if kept.type.denotation:
        value.type.denotation = kept.type.denotation
    ours, theirs = value.type.tensor_type.shape.dim, kept.type.tensor_type.shape.dim
    if len(ours) == len(theirs):
        for dim, other in zip(ours, theirs, strict=True):
            if other.denotation:
                dim.denotation = other.denotation


def _say(holder: Any, **texts: str | None) -> None:
    for field, text in texts.items():
        if text:
            setattr(holder, field, text)


def _texts(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """Without the type, of which inference may have made something up."""
    return onnx.ValueInfoProto(
        name=value.name, doc_string=value.doc_string, metadata_props=value.metadata_props
    )


def _denotes(value: Any) -> bool:
    if not isinstance(value, onnx.ValueInfoProto):
        return False
    return bool(value.type.denotation or any(dim.denotation for dim in value.type.tensor_type.shape.dim))


def _own_tensors(scope: gs.Graph) -> Iterator[gs.Tensor]:
    yield from (*scope.inputs, *scope.outputs)
    for node in scope.nodes:
        yield from node.outputs
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                yield tensor


def _metadata(holder: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in holder.metadata_props}


def _add_metadata(holder: Any, entries: dict[str, str]) -> None:
    for key, value in entries.items():
        holder.metadata_props.add(key=key, value=value)


def _each_node(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from nodes_in(proto.graph)
    for function in proto.functions:
        yield from _with_bodies(function.node)


def _with_bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for body in bodies_of(node):
            yield from nodes_in(body)


def _each_gs_node(graph: gs.Graph) -> Iterator[gs.Node]:
    yield from nodes_of(graph)
    for function in graph.functions:
        yield from nodes_of(function)


__all__ = [
    "CARRIED",
    "Empty",
    "attach",
    "attributes_of",
    "describe",
    "exportable",
    "refuse_unknown",
    "restore",
    "set_aside",
    "take",
]
