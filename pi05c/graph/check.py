"""Structural checks of a graph: what must hold after every pass, whatever it computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from pi05c.graph.domains import STANDARD_DOMAINS, TENSORRT_DOMAIN, bare_name
from pi05c.graph.dtypes import BOOL, name_of, to_numpy
from pi05c.graph.errors import Pi05cError
from pi05c.graph.inference import state_defaults
from pi05c.graph.io import Model, load, scopes, to_proto
from pi05c.graph.walk import graphs_in
from pi05c.graph.weights import PENDING, array_of

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")

_FOLLOWERS = {
    "Attention": ((3, "mask", (BOOL,)),),
    "RotaryEmbedding": ((1, "cosines", ()), (2, "sines", ())),
}
"""Inputs that must have the type of the first one, or one of those named (ONNX opset 23; measured for the mask)."""


def problems(model: Model) -> list[str]:
    """What is wrong with a model, each in one sentence that names the node or tensor; empty where nothing is.

    What onnx's checker says with full type inference, and what it misses: bodies that take or give another number of
    tensors than their node, duplicate node names, scales that are not positive, an output that is declared with another
    type than it has. Weights are not read.
    """
    reason, declared = _checked(model)
    found = [*_bad_bodies(model.graph), *repeated_names(model.graph), *_bad_scales(model.graph)]
    return [*found, *(declared if reason is None else [reason])]


def refuse_invalid(model: Model) -> list[str]:
    """Refuse a model that is not valid ONNX, by onnx's checker and by its bodies; of one that is, give the `problems`.

    Raises:
        Pi05cError: with what is not valid.
    """
    bodies = _bad_bodies(model.graph)
    reason, declared = (bodies[0], []) if bodies else _checked(model)
    if reason is not None:
        where = "the graph" if model.path is None else str(model.path)
        raise Pi05cError(f"{where} is not valid ONNX: {reason}")
    return [*repeated_names(model.graph), *_bad_scales(model.graph), *declared]


def _checked(model: Model) -> tuple[str | None, list[str]]:
    """What onnx says, and the outputs of a valid model that have another type than they are declared with."""
    proto, _ = to_proto(model)
    declared = {output.name: output.type.tensor_type.elem_type for output in proto.graph.output}
    weights_as_inputs(proto.graph)
    state_defaults(proto.graph)
    if not proto.graph.name:
        proto.graph.name = "graph"  # the checker asks for one, and nothing else does
    try:
        serialized = proto.SerializeToString()
        onnx.checker.check_model(serialized, full_check=False)
        inferred = onnx.shape_inference.infer_shapes(serialized, check_type=True, strict_mode=True)
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        RuntimeError,
        ValueError,
    ) as error:
        return " ".join(str(error).split()), []
    actual = {output.name: output.type.tensor_type.elem_type for output in inferred.graph.output}
    return None, [
        f"output {name!r} is declared {name_of(declared[name])} but is {name_of(actual[name])}"
        for name in declared
        if actual[name] != declared[name]
    ]


def load_valid(path: Path | str) -> Model:
    """Read an ONNX model whose graph is valid, as what looks for patterns in one takes for granted.

    Raises:
        Pi05cError: as `load`; or what is not valid.
    """
    model = load(path)
    refuse_invalid(model)
    return model


def unseen_problems(model: Model) -> list[str]:
    """What neither onnx's checker nor the parser of TensorRT-RTX 1.7 sees, and what then fails or misleads.

    Two tensors of one name in different scopes; an Attention whose mask is neither bool nor of the type of Q, which
    parses and does not build; a RotaryEmbedding whose cos and sin have another type than x; an operator of a domain
    that no backend knows.
    """
    return [
        *_duplicate_tensors(model.graph),
        *(problem for scope in scopes(model.graph) for node in scope.nodes for problem in _odd_types(node)),
        *_unknown_domains(model.graph),
    ]


def _duplicate_tensors(graph: gs.Graph) -> list[str]:
    owner: dict[str, int] = {}
    found: dict[str, None] = {}
    for scope in scopes(graph):
        for tensor in (*scope.inputs, *(t for node in scope.nodes for t in (*node.inputs, *node.outputs))):
            if tensor.name and owner.setdefault(tensor.name, id(tensor)) != id(tensor):
                found[f"tensor name {tensor.name!r} is used twice"] = None
    return list(found)


def _odd_types(node: gs.Node) -> list[str]:
    if node.domain not in STANDARD_DOMAINS or not node.inputs:
        return []
    found = []
    for position, what, allowed in _FOLLOWERS.get(node.op, ()):
        if position < len(node.inputs) and node.inputs[position].name:
            follower, leader = (to_numpy(node.inputs[index].dtype) for index in (position, 0))
            known = follower is not None and leader is not None
            if known and follower not in (leader, *allowed):
                found.append(
                    f"the {what} of {node.op} {node.name!r} is {name_of(follower)}, where its data is {name_of(leader)}"
                )
    return found


def _unknown_domains(graph: gs.Graph) -> list[str]:
    own = {(function.domain, function.name) for function in graph.functions}
    return [
        f"{bare_name(node)} {node.name!r} is of the domain {node.domain!r}, which no backend knows"
        for scope in scopes(graph)
        for node in scope.nodes
        if node.domain not in (*STANDARD_DOMAINS, TENSORRT_DOMAIN)
        and (node.domain, bare_name(node)) not in own
    ]


def repeated_names(graph: gs.Graph) -> list[str]:
    """Names that several nodes have, each in a sentence."""
    seen: set[str] = set()
    found = []
    for scope in scopes(graph):
        for node in scope.nodes:
            if node.name and node.name in seen:
                found.append(f"node name {node.name!r} is used twice")
            seen.add(node.name)
    return found


def _bad_bodies(graph: gs.Graph) -> list[str]:
    return [
        f"the {key} of {node.op} {node.name!r} {problem}"
        for scope in scopes(graph)
        for node in scope.nodes
        for key, problem in (_misfits(node) if node.op in ("Loop", "Scan", "If") else ())
    ]


def _misfits(node: gs.Node) -> Iterator[tuple[str, str]]:
    """Bodies that do not fit their node, with what does not."""
    for key in ("then_branch", "else_branch") if node.op == "If" else ("body",):
        body = node.attrs.get(key)
        if not isinstance(body, gs.Graph):
            yield key, "is no graph"
            continue
        states, scans = len(node.inputs) - 2, 0
        if node.op == "Scan":
            scans = int(node.attrs.get("num_scan_inputs", 0))
            states = len(node.inputs) - scans
        taken, least = {"If": (0, 0), "Loop": (2 + states, 1 + states), "Scan": (states + scans, states)}[
            node.op
        ]
        if len(body.inputs) != taken:
            yield key, f"takes {len(body.inputs)} tensors, where the node gives it {taken}"
        given = len(body.outputs) - (node.op == "Loop")
        if len(body.outputs) < least or given < len(node.outputs):
            yield key, f"gives {len(body.outputs)} tensors, which are too few"


def _bad_scales(graph: gs.Graph) -> list[str]:
    found = []
    for scope in scopes(graph):
        for node in scope.nodes:
            if node.op in QUANTIZERS and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
                scale = array_of(node.inputs[1]).astype(np.float32)
                if not (np.isfinite(scale) & (scale > 0)).all():
                    found.append(f"the scale of {node.op} {node.name!r} is not positive and finite")
    return found


def weights_as_inputs(graph: onnx.GraphProto) -> None:
    """Turn initializers without bytes, in bodies too, into inputs of the graph, which the checker accepts.

    One that a body returns becomes a new name of such an input, made in the body.
    """
    known = {value.name for value in graph.input}
    for scope in list(graphs_in(graph)):
        kept = []
        returned = {value.name for value in scope.output} if scope is not graph else set()
        for tensor in scope.initializer:
            if not any(entry.value.startswith(PENDING) for entry in tensor.external_data):
                kept.append(tensor)
                continue
            name = tensor.name
            if name in returned:
                name = f"{name} outside"
                scope.node.insert(0, onnx.helper.make_node("Identity", [name], [tensor.name]))
            if name not in known:
                known.add(name)
                graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        del scope.initializer[:]
        scope.initializer.extend(kept)
