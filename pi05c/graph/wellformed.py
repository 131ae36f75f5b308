"""What must hold of a proto before anything walks it: texts, tensors, attributes, calls, and each node's arity.

Every walk relies on a MatMul having two inputs and a Loop having a body. Types and shapes are left to onnx's own checker
(`check`), which needs weights taken out first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import onnx
from google.protobuf.message import Message

from pi05c.graph.domains import STANDARD_DOMAINS
from pi05c.graph.dtypes import to_numpy
from pi05c.graph.errors import Pi05cError, shortened
from pi05c.graph.walk import graphs_in, nodes_in

OLDEST_OPSET = 7
"""From here on operators broadcast and take attributes as the passes know them (ONNX 1.2)."""

_SCAN_OPSET = 9
"""From which Scan gives its body what it takes (ONNX operator changelog); before, the node alone has an axis of a batch."""

MAX_RANK = 64
"""Most dimensions that a numpy array has (numpy 2; numpy 1 has 32 and says so itself)."""

MAX_CALL_DEPTH = 100
"""How deep functions of a model may call each other: what onnx's checker allows."""

MAX_UNFOLDED_NODES = 10_000_000
"""How many nodes a graph may have once its functions are unfolded, as onnxruntime does when it loads them."""

_MAX_ELEMENTS = 2**59
"""How many float64 numpy can address in 63 bits, dimensions of size 0 taken for 1 as numpy does."""

_LISTED_CHARACTERS = 200
_AGAIN = "export the model again"
_Key = tuple[str, str]
"""Domain and name of a function."""

_TYPE_NAMES = {value: name for name, value in onnx.AttributeProto.AttributeType.items()}
_OPTIONAL = onnx.defs.OpSchema.FormalParameterOption.Optional


def refuse_malformed(proto: onnx.ModelProto) -> None:
    """Check what every walk over a proto relies on.

    Raises:
        Pi05cError: a text is not UTF-8, a tensor is of a type that nobody knows or of a negative size, a node lacks
            what makes it one, a model holds sparse weights, or its functions call each other without end.
    """
    _refuse_bytes(proto, ("producer_name", "producer_version", "domain", "doc_string"))
    for entry in (*proto.metadata_props, *proto.opset_import):
        _refuse_bytes(entry, ("key", "value") if hasattr(entry, "key") else ("domain",))
    for graph in graphs_in(proto.graph):
        _refuse_bytes(graph, ("name", "doc_string"))
        if graph.sparse_initializer:
            raise Pi05cError(
                f"initializer {shortened(graph.sparse_initializer[0].values.name)} is sparse: store it as a dense tensor"
            )
        for value in (*graph.input, *graph.output, *graph.value_info):
            _check_value(value)
        for tensor in graph.initializer:
            _check_tensor(tensor)
        _check_nodes(graph.node)
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.HasField("sequence_type"):
            raise Pi05cError(
                f"{shortened(value.name)} is a sequence, where an engine takes and gives tensors: {_AGAIN}"
            )
        if value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            raise Pi05cError(f"{shortened(value.name)} holds texts, which no engine takes or gives: {_AGAIN}")
    for function in proto.functions:
        _refuse_bytes(function, ("name", "domain", "doc_string"))
        if function.domain in STANDARD_DOMAINS:
            raise Pi05cError(
                f"function {shortened(function.name)} is of ONNX's own domain, where it would pass for the operator of its "
                "name: give it a domain of its own"
            )
        _check_nodes(nodes_in(function.node))
    _check_calls(proto)


def _refuse_bytes(message: Message, fields: Iterable[str]) -> None:
    """protobuf hands out texts that are not UTF-8 as bytes."""
    for field in fields:
        if isinstance(text := getattr(message, field), bytes):
            raise Pi05cError(
                f"{field} {shortened(repr(text)[2:-1])} is not UTF-8 text: export the model again"
            )


def _refuse_bytes_in(texts: Iterable[Any], what: str) -> None:
    for text in texts:
        if isinstance(text, bytes):
            raise Pi05cError(
                f"{what} {shortened(repr(text)[2:-1])} is not UTF-8 text: export the model again"
            )


def _check_value(value: onnx.ValueInfoProto) -> None:
    _refuse_bytes(value, ("name", "doc_string"))
    if (kind := value.type.WhichOneof("value")) not in (None, "tensor_type", "sequence_type"):
        raise Pi05cError(
            f"{shortened(value.name)} is a value of the kind {kind!r}, where only tensors and sequences are known: {_AGAIN}"
        )
    if value.type.HasField("tensor_type"):
        tensor = value.type.tensor_type
        _known_type(value.name, tensor.elem_type, undefined=True)
        for dim in tensor.shape.dim:
            _refuse_bytes(dim, ("dim_param",))


def _check_tensor(tensor: onnx.TensorProto) -> None:
    _refuse_bytes(tensor, ("name", "doc_string"))
    _refuse_bytes_in((text for entry in tensor.external_data for text in (entry.key, entry.value)), "entry")
    name = shortened(tensor.name)
    _known_type(tensor.name, tensor.data_type)
    if tensor.data_type == onnx.TensorProto.STRING:
        raise Pi05cError(
            f"tensor {name} holds texts, which no engine computes with: leave it out of the model"
        )
    if tensor.HasField("segment"):
        raise Pi05cError(f"tensor {name} is stored in segments: export the model again")
    if (
        len(tensor.dims) > MAX_RANK
        or any(dim < 0 for dim in tensor.dims)
        or math.prod(max(dim, 1) for dim in tensor.dims) > _MAX_ELEMENTS
    ):
        raise Pi05cError(
            f"tensor {name} is declared with the shape {_listed(tensor.dims)}, which no tensor has: export the model "
            "again"
        )


def _known_type(name: str, data_type: int, *, undefined: bool = False) -> None:
    if to_numpy(data_type) is None and not (undefined and data_type == onnx.TensorProto.UNDEFINED):
        raise Pi05cError(
            f"tensor {shortened(name)} has the element type {data_type}, which onnx {onnx.__version__} does not know: "
            "export the model again, or install a newer onnx"
        )


def _listed(dims: Iterable[int]) -> str:
    text = str(list(dims))
    return text if len(text) <= _LISTED_CHARACTERS else f"{text[:_LISTED_CHARACTERS]}...]"


def _check_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        _refuse_bytes(node, ("op_type", "name", "domain", "doc_string"))
        _refuse_bytes_in((*node.input, *node.output), "tensor name")
        _refuse_bytes_in(
            (text for entry in node.metadata_props for text in (entry.key, entry.value)), "entry"
        )
        where = f"{node.op_type or 'a node without an operator'} {shortened(node.name)}"
        if not node.op_type:
            raise Pi05cError(f"{where} cannot be computed: export the model again")
        seen = set()
        for attribute in node.attribute:
            _refuse_bytes(attribute, ("name", "ref_attr_name", "doc_string"))
            _check_attribute(attribute, where)
            if attribute.name in seen:
                raise Pi05cError(
                    f"{where} has its attribute {shortened(attribute.name)} twice: export the model again"
                )
            seen.add(attribute.name)
        if (
            node.op_type == "Constant"
            and not node.domain
            and (len(node.attribute), len(node.output)) != (1, 1)
        ):
            raise Pi05cError(f"{where} does not hold one value for one output: export the model again")


_FIELDS = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.TYPE_PROTO: "tp",
    onnx.AttributeProto.FLOATS: "floats",
    onnx.AttributeProto.INTS: "ints",
    onnx.AttributeProto.STRINGS: "strings",
    onnx.AttributeProto.TENSORS: "tensors",
    onnx.AttributeProto.GRAPHS: "graphs",
    onnx.AttributeProto.TYPE_PROTOS: "type_protos",
}
"""What an attribute of each type holds; one with a sparse tensor is not known here."""


def _check_attribute(attribute: onnx.AttributeProto, where: str) -> None:
    name = shortened(attribute.name)
    field = _FIELDS.get(attribute.type)
    if field is None or not attribute.name:
        raise Pi05cError(
            f"attribute {name} of {where} is of a type that is not known: export the model again"
        )
    if field in ("f", "i", "s", "t", "g", "tp") and not (
        attribute.ref_attr_name or attribute.HasField(field)
    ):
        raise Pi05cError(f"attribute {name} of {where} has no value: export the model again")
    for tensor in (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors):
        _check_tensor(tensor)


def _check_calls(proto: onnx.ModelProto) -> None:
    """Refuse functions that call themselves, and those that unfold to more than anybody can hold."""
    functions: dict[_Key, onnx.FunctionProto] = {}
    for function in proto.functions:
        if functions.setdefault((function.domain, function.name), function) is not function:
            raise Pi05cError(f"function {shortened(function.name)} is defined twice: export the model again")
    known: dict[_Key, tuple[int, int]] = {}

    def unfolded(nodes: Iterable[onnx.NodeProto], callers: tuple[_Key, ...]) -> tuple[int, int]:
        """How many nodes they become, and how many levels of calls there are below them."""
        total, levels = 0, 0
        for node in nodes_in(nodes):
            total += 1
            if (node.domain, node.op_type) in functions:
                size, depth = of_function((node.domain, node.op_type), callers)
                total, levels = total + size, max(levels, depth)
        return total, levels

    def of_function(key: _Key, callers: tuple[_Key, ...]) -> tuple[int, int]:
        if key in callers:
            raise Pi05cError(
                f"function {shortened(key[1])} calls itself, so it cannot be unfolded: export the model again"
            )
        if key not in known and len(callers) < MAX_CALL_DEPTH:
            size, levels = unfolded(functions[key].node, (*callers, key))
            known[key] = size, levels + 1
        if key not in known or known[key][1] > MAX_CALL_DEPTH:
            raise Pi05cError(
                f"functions call each other more than {MAX_CALL_DEPTH} levels deep, {shortened(key[1])} among them: "
                "export the model again"
            )
        return known[key]

    if functions:
        for key in functions:
            of_function(key, ())
        total, _ = unfolded(proto.graph.node, ())
        if total > MAX_UNFOLDED_NODES:
            raise Pi05cError(
                f"the functions of the model unfold to {total:,} nodes, more than {MAX_UNFOLDED_NODES:,}: export the "
                "model again"
            )


def refuse_misused_operators(proto: onnx.ModelProto) -> None:
    """Check that the installed onnx knows each standard operator, and that each node is one of it.

    Raises:
        Pi05cError: names the node, what it has of inputs, outputs or attributes, and what its operator takes.
    """
    functions = {(function.domain, function.name) for function in proto.functions}
    _check_arity(proto.graph.node, _opset(proto.opset_import, "the model"), functions)
    for function in proto.functions:
        where = f"function {shortened(function.name)}"
        _check_arity(function.node, _opset(function.opset_import, where), functions)


def _opset(imports: Iterable[onnx.OperatorSetIdProto], where: str) -> int:
    versions = {entry.version for entry in imports if entry.domain in STANDARD_DOMAINS}
    newest = onnx.defs.onnx_opset_version()
    if len(versions) > 1:
        listed = ", ".join(map(str, sorted(versions)))
        raise Pi05cError(f"{where} states several opsets ({listed}): {_AGAIN}")
    version = next(iter(versions), newest)
    if version > newest:
        raise Pi05cError(
            f"{where} is of opset {version}, and the installed onnx {onnx.__version__} knows opsets up to {newest}: "
            "install a newer onnx, or export the model at an older opset"
        )
    if version < OLDEST_OPSET:
        raise Pi05cError(f"{where} is of opset {version}: export it at {OLDEST_OPSET} or later, best at 21")
    return version


def _check_arity(nodes: Sequence[onnx.NodeProto], opset: int, functions: set[tuple[str, str]]) -> None:
    for node in nodes_in(nodes):
        if node.domain not in STANDARD_DOMAINS or (node.domain, node.op_type) in functions:
            continue
        schema = _schema(node.op_type, opset)
        where = f"{node.op_type} {shortened(node.name)}"
        if schema is None:
            raise Pi05cError(
                f"onnx {onnx.__version__} has no operator {shortened(node.op_type)} at opset {opset}: {_AGAIN}"
            )
        for kind, given, least, most in (
            ("input", node.input, schema.min_input, schema.max_input),
            ("output", node.output, schema.min_output, schema.max_output),
        ):
            if not least <= len(given) <= most:
                allowed = (
                    f"{least}"
                    if least == most
                    else f"{least} to {most}"
                    if most < 2**16
                    else f"{least} or more"
                )
                raise Pi05cError(
                    f"{where} has {len(given)} {kind}{'' if len(given) == 1 else 's'}, where its operator has {allowed}: "
                    f"{_AGAIN}"
                )
        if node.op_type == "Scan" and opset < _SCAN_OPSET:
            raise Pi05cError(
                f"{where} is of opset {opset}, which scans each sequence of a batch: export the model at opset "
                f"{_SCAN_OPSET} or later"
            )
        for name, parameter in zip(node.input, schema.inputs, strict=False):
            if not name and parameter.option != _OPTIONAL:
                raise Pi05cError(f"{where} lacks its input {parameter.name!r}: {_AGAIN}")
        _check_required(node, schema, where)


def _check_required(node: onnx.NodeProto, schema: onnx.defs.OpSchema, where: str) -> None:
    given = {attribute.name: attribute for attribute in node.attribute}
    attributes: Mapping[str, onnx.defs.OpSchema.Attribute] = schema.attributes
    for name, attribute in given.items():
        known = attributes.get(name)
        if known is None or attribute.ref_attr_name:
            continue
        wanted, found = (_TYPE_NAMES[kind] for kind in (int(cast(Any, known.type).value), attribute.type))
        if wanted != found:
            raise Pi05cError(
                f"attribute {shortened(name)} of {where} is of type {found}, where its operator takes {wanted}: {_AGAIN}"
            )
    if missing := [name for name, known in attributes.items() if known.required and name not in given]:
        raise Pi05cError(f"{where} lacks its attribute {missing[0]!r}: {_AGAIN}")


@cache
def _schema(operator: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(operator, opset, "")
    except onnx.defs.SchemaError:
        return None


__all__ = [
    "MAX_CALL_DEPTH",
    "MAX_UNFOLDED_NODES",
    "OLDEST_OPSET",
    "refuse_malformed",
    "refuse_misused_operators",
]
