"""Structural checks of a graph: what must hold after every pass, whatever it computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import name_of
from pi05c.graph.io import Model, scopes, to_proto
from pi05c.graph.weights import PENDING, array_of

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def problems(model: Model) -> list[str]:
    """What is wrong with a model, each in one sentence that names the node or tensor; empty where nothing is.

    onnx's checker with full type inference, and what it misses: duplicate node names, scales that are not
    positive, an output that is declared with another type than it has. Weights are not read.
    """
    found = [*_duplicate_nodes(model.graph), *_bad_scales(model.graph)]
    proto, _ = to_proto(model)
    declared = {output.name: output.type.tensor_type.elem_type for output in proto.graph.output}
    _weights_as_inputs(proto.graph)
    try:
        onnx.checker.check_model(proto, full_check=False)
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return [*found, " ".join(str(error).split())]
    for output in inferred.graph.output:
        actual = output.type.tensor_type.elem_type
        if actual != declared[output.name]:
            found.append(
                f"output {output.name!r} is declared {name_of(declared[output.name])} but is {name_of(actual)}"
            )
    return found


def _duplicate_nodes(graph: gs.Graph) -> list[str]:
    seen: set[str] = set()
    found = []
    for scope in scopes(graph):
        for node in scope.nodes:
            if node.name and node.name in seen:
                found.append(f"node name {node.name!r} is used twice")
            seen.add(node.name)
    return found


def _bad_scales(graph: gs.Graph) -> list[str]:
    found = []
    for scope in scopes(graph):
        for node in scope.nodes:
            if node.op in QUANTIZERS and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
                scale = array_of(node.inputs[1]).astype(np.float32)
                if not (np.isfinite(scale) & (scale > 0)).all():
                    found.append(f"the scale of {node.op} {node.name!r} is not positive and finite")
    return found


def _with_bodies(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [graph, *(inner for body in bodies for inner in _with_bodies(body))]


def _weights_as_inputs(graph: onnx.GraphProto) -> None:
    """Turn initializers without bytes, in bodies too, into inputs of the graph, which the checker accepts."""
    known = {value.name for value in graph.input}
    for scope in _with_bodies(graph):
        kept = []
        for tensor in scope.initializer:
            if not any(entry.value.startswith(PENDING) for entry in tensor.external_data):
                kept.append(tensor)
            elif tensor.name not in known:
                known.add(tensor.name)
                graph.input.append(
                    onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                )
        del scope.initializer[:]
        scope.initializer.extend(kept)
