"""Raises the opset of a graph with onnx's own converter, one operator at a time.

Given a whole model, the converter loses the metadata of nodes, and older releases lose external weights (onnx issue
6529) and leave out bodies. So it is shown only nodes whose operator has another version at the target, each as a model
of its own without weights, and what comes back takes the node's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx.version_converter
import onnx_graphsurgeon as gs

from pi05c.graph.carried import CARRIED, attributes_of
from pi05c.graph.domains import STANDARD_DOMAINS
from pi05c.graph.dtypes import to_onnx
from pi05c.graph.edit import Names
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model, model_from_proto, scopes
from pi05c.graph.scopes import nodes_of
from pi05c.graph.weights import array_of

_TYPES_ONLY = frozenset({"Constant", "If", "Loop", "Scan", "SequenceMap"})
"""Operators whose newer versions, from opset 11 on, take more types and change nothing else."""

_MISCONVERTED = {"GroupNormalization": 21, "Hardmax": 13}
"""Operators that onnx 1.23's converter leaves as they are at an opset that gave them another meaning: scale and bias
are one a group before, one a channel from then on; all axes from one on are taken together before, one axis from then
on."""

_CHOOSING_PIXELS = 11
"""The opset from which on Resize states which pixels it takes, and takes other ones where it does not. Onnx 1.23's converter
states nothing (ONNX operator changelog)."""


def raise_opset(model: Model, opset: int) -> bool:
    """Convert `model` in place up to `opset`; a model that is there already is left as it is.

    Bodies and functions of the model are converted too; names, types, metadata and weights are kept, and weights are
    not read. Nothing is edited if anything cannot be converted.

    Returns:
        Whether the opset was raised.

    Raises:
        Pi05cError: onnx knows no such opset, or has no conversion for an operator.
    """
    graph = model.graph
    if graph.opset >= opset:
        return False
    if opset > onnx.defs.onnx_opset_version():
        raise Pi05cError(
            f"the graph cannot be raised to opset {opset}: the installed onnx {onnx.__version__} knows opsets up to "
            f"{onnx.defs.onnx_opset_version()}, install a newer one"
        )
    forms: dict[object, bytes | None] = {}
    changed: dict[int, bytes] = {}
    wholes = [graph, *(function for function in graph.functions if function.opset < opset)]
    for whole in wholes:
        for node in nodes_of(whole):
            if _has_other_version(node, whole.opset, opset):
                converted = _convert(node, whole.opset, opset, forms)
                if converted is not None:
                    changed[id(node)] = converted
    for whole in wholes:
        names = Names(whole)
        domains = [
            onnx.helper.make_opsetid(
                known.domain, opset if known.domain in STANDARD_DOMAINS else known.version
            )
            for known in whole.import_domains or [onnx.helper.make_opsetid("", opset)]
        ]
        for scope in list(scopes(whole)):
            scope.nodes = [
                new
                for node in scope.nodes
                for new in (_replacement(node, changed[id(node)], names) if id(node) in changed else [node])
            ]
            scope.opset, scope.import_domains = opset, domains
    needed = onnx.helper.find_min_ir_version_for(graph.import_domains, True)
    graph.ir_version = max(graph.ir_version or 0, needed)
    return True


def _has_other_version(node: gs.Node, old: int, new: int) -> bool:
    if node.domain not in STANDARD_DOMAINS or node.op in _TYPES_ONLY or not onnx.defs.has(node.op):
        return False
    try:
        before = onnx.defs.get_schema(node.op, old)
        after = onnx.defs.get_schema(node.op, new)
    except onnx.defs.SchemaError:
        return False
    return bool(before.since_version != after.since_version)


def _convert(node: gs.Node, old: int, new: int, forms: dict[object, bytes | None]) -> bytes | None:
    """A model of the node alone at the new opset, whose inputs are `in0`, ... and outputs `out0`, ...

    None where the node stays as it is. `forms` holds the answers for nodes that differ in names only.
    """
    given = {key: value for key, value in node.attrs.items() if isinstance(value, gs.Node.AttributeRef)}
    attributes = attributes_of({key: value for key, value in node.attrs.items() if key not in given})
    resized = node.op in ("Upsample", "Resize") and old < _CHOOSING_PIXELS <= new
    pixels = _pixels(node) if resized else {}
    key = (
        node.op,
        tuple(pixels.items()),
        tuple(given),
        tuple(sorted(attribute.SerializeToString() for attribute in attributes)),
        tuple(_declared(tensor) for tensor in node.inputs),
        tuple(_declared(tensor) for tensor in node.outputs),
    )
    if key not in forms:
        alone = _alone(node, attributes, old)
        try:
            if old < _MISCONVERTED.get(node.op, 0) <= new:
                raise ValueError(f"it means something else from opset {_MISCONVERTED[node.op]} on")
            if resized and not pixels:
                raise ValueError("which pixels it takes depends on whether the image grows along each axis")
            converted = onnx.version_converter.convert_version(alone, new)
            for made in converted.graph.node:
                if made.op_type == "Resize":
                    made.attribute.extend(onnx.helper.make_attribute(*item) for item in pixels.items())
        except Exception as error:  # the converter raises whatever its C++ assertions become
            reason = " ".join(str(error).split())
            raise Pi05cError(
                f"the graph cannot be raised from opset {old} to {new}: onnx cannot convert {node.op} "
                f"{node.name!r} ({reason}); export the model at opset {new}"
            ) from error
        same = len(converted.graph.node) == 1 and _bare(converted.graph.node[0]) == _bare(alone.graph.node[0])
        known: Mapping[str, object] = onnx.defs.get_schema(node.op, new).attributes
        if given and (not same or not known.keys() >= given.keys()):
            raise Pi05cError(
                f"the graph cannot be raised from opset {old} to {new}: {node.op} {node.name!r} in a function of the "
                f"model has attributes that its callers give ({', '.join(given)}); export the model at opset {new}"
            )
        forms[key] = None if same else converted.SerializeToString()
    return forms[key]


def _pixels(node: gs.Node) -> dict[str, str]:
    """Attributes that state which pixels an Upsample or Resize of an older opset takes; none where no attributes do.

    The nearest pixel is the one before where an image grows, and the one behind where it shrinks (onnxruntime 1.32).
    """
    attributes = {"coordinate_transformation_mode": "asymmetric"}
    if node.attrs.get("mode", "nearest") != "nearest":
        return attributes
    scales = node.attrs.get("scales")
    if scales is None and isinstance(node.inputs[-1], gs.Constant):
        scales = array_of(node.inputs[-1]).reshape(-1)
    if node.op == "Resize" and (scales is None or min(scales) < 1 < max(scales)):
        return {}
    return {**attributes, "nearest_mode": "floor" if node.op == "Upsample" or min(scales) >= 1 else "ceil"}


def _declared(tensor: gs.Tensor) -> object:
    if not tensor.name:
        return None
    shape = None if tensor.shape is None else tuple(tensor.shape)
    return (None if tensor.dtype is None else to_onnx(tensor.dtype), shape)


def _alone(node: gs.Node, attributes: list[onnx.AttributeProto], opset: int) -> onnx.ModelProto:
    """A model of this node only. A type that is not known is declared float32, which no conversion looks at."""
    inputs, outputs = _value_infos("in", node.inputs), _value_infos("out", node.outputs)
    proto = onnx.helper.make_node(node.op, [i.name for i in inputs], [o.name for o in outputs], name="node")
    proto.attribute.extend(attributes)
    graph = onnx.helper.make_graph(
        [proto], "node", [i for i in inputs if i.name], [o for o in outputs if o.name]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


def _value_infos(kind: str, tensors: Sequence[gs.Tensor]) -> list[onnx.ValueInfoProto]:
    return [
        onnx.helper.make_tensor_value_info(
            f"{kind}{index}" if tensor.name else "",
            onnx.TensorProto.FLOAT if tensor.dtype is None else to_onnx(tensor.dtype),
            tensor.shape,
        )
        for index, tensor in enumerate(tensors)
    ]


def _bare(node: onnx.NodeProto) -> object:
    attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
    return (node.op_type, list(node.input), list(node.output), attributes)


def _replacement(node: gs.Node, converted: bytes, names: Names) -> list[gs.Node]:
    """The nodes of a converted form in the place of `node`, whose tensors they take over."""
    part = model_from_proto(onnx.ModelProto.FromString(converted)).graph
    taken: dict[int, gs.Tensor] = {
        **{id(tensor): node.inputs[int(tensor.name.removeprefix("in"))] for tensor in part.inputs},
        **{id(tensor): node.outputs[int(tensor.name.removeprefix("out"))] for tensor in part.outputs},
    }
    node.inputs.clear()
    node.outputs.clear()
    for new in part.nodes:
        new.name = node.name if new.op == node.op else names.unique(f"{node.name}.{new.op}")
        formal = onnx.defs.get_schema(new.op, part.opset).inputs
        for index, tensor in enumerate(new.inputs):
            if isinstance(tensor, gs.Constant):
                tensor.name = names.unique(f"{new.name}.{formal[min(index, len(formal) - 1)].name}")
        for tensor in new.outputs:
            if tensor.name and id(tensor) not in taken:
                tensor.name = names.unique(f"{new.name}.{tensor.name}")
        for kept in CARRIED:
            if hasattr(node, kept):
                setattr(new, kept, getattr(node, kept))
    for new in part.nodes:
        new.inputs = [taken.get(id(tensor), tensor) for tensor in new.inputs]
        new.outputs = [taken.get(id(tensor), tensor) for tensor in new.outputs]
    return list(part.nodes)
