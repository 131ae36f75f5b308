"""canonicalize: one spelling for everything that the later passes look for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.domains import STANDARD_DOMAINS
from pi05c.graph.dtypes import to_numpy
from pi05c.graph.edit import Editor, Names
from pi05c.graph.io import scopes
from pi05c.graph.sort import sort_graph
from pi05c.graph.weights import InMemory
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.fold_constants import fold_constants, transpose_before_cast
from pi05c.passes.patterns.walk import each_node, output_ids, rank, scalar, static_shape
from pi05c.passes.retype import each_redundant_cast


@graph_pass(exact=True)
def canonicalize(graph: gs.Graph, ctx: PassContext) -> None:
    """Fold constants that do not grow, drop no-ops, spell linears as MatMul, make names unique.

    Weights are stored as their MatMul reads them: a Transpose of a weight is folded into it, also through a Cast.
    Gemm becomes MatMul and Add. Shapes that are static become constants. Nodes and tensors
    without a name, or with one that another has, get one. No arithmetic on activations changes.
    """
    renamed = _name_everything(graph, ctx.names)
    if renamed:
        ctx.changed(*renamed)
    editors = {id(scope): ctx.editor(scope) for scope in scopes(graph)}
    for name in _static_shapes(graph):
        ctx.changed(name)
    for scope, gemm in list(each_node(graph, "Gemm")):
        reason = _gemm_obstacle(gemm)
        if reason:
            ctx.skip(gemm, reason)
        else:
            _as_matmul(gemm, editors[id(scope)])
            ctx.changed(gemm)
    for name in transpose_before_cast(graph, editors):
        ctx.changed(name)
    sort_graph(graph)  # folding goes in execution order, and what a Gemm became stands at the end
    for name in fold_constants(graph):
        ctx.changed(name)
    outputs = output_ids(graph)
    for scope, node in list(each_node(graph)):
        if _is_no_op(node) and id(node.outputs[0]) not in outputs:
            editors[id(scope)].replace_uses(node.outputs[0], node.inputs[0])
            ctx.changed(node)
    for cast in each_redundant_cast(graph):
        ctx.changed(cast)


def _name_everything(graph: gs.Graph, names: Names) -> list[str]:
    """Give each node and each tensor a name of its own in all scopes; inputs and outputs keep theirs.

    Returns:
        The old names of what has a new one, or the new name where there was none.
    """
    renamed = []
    seen_nodes: set[str] = set()
    owner = {tensor.name: id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for _, node in each_node(graph):
        if not node.name or node.name in seen_nodes:
            old, node.name = node.name, names.unique(node.name or node.op)
            renamed.append(old or node.name)
        seen_nodes.add(node.name)
    for scope in scopes(graph):
        local = [*scope.inputs, *(t for node in scope.nodes for t in (*node.outputs, *node.inputs))]
        for tensor in local:
            if tensor.name and owner.setdefault(tensor.name, id(tensor)) != id(tensor):
                renamed.append(tensor.name)
                tensor.name = names.unique(tensor.name)
                owner[tensor.name] = id(tensor)
    return renamed


def _static_shapes(graph: gs.Graph) -> Iterator[str]:
    """Make constants of shapes and sizes that are known; the name of each, once it is one."""
    outputs = output_ids(graph)
    for _, node in list(each_node(graph, "Shape", "Size")):
        shape = static_shape(node.inputs[0])
        output = node.outputs[0]
        if shape is None or id(output) in outputs:
            continue
        values = np.asarray(shape[node.attrs.get("start", 0) : node.attrs.get("end", None)], np.int64)
        node.outputs.clear()
        output.to_constant(InMemory(values if node.op == "Shape" else np.asarray(np.prod(shape), np.int64)))
        yield output.name


def _gemm_obstacle(gemm: gs.Node) -> str:
    if gemm.attrs.get("transA"):
        return "its left factor is transposed"
    if gemm.attrs.get("alpha", 1.0) != 1.0 or (len(gemm.inputs) > 2 and gemm.attrs.get("beta", 1.0) != 1.0):
        return "its alpha or beta is not 1"
    return ""


def _as_matmul(gemm: gs.Node, editor: Editor) -> None:
    left, right = gemm.inputs[:2]
    output = gemm.outputs[0]
    dtype, shape = output.dtype, output.shape
    if gemm.attrs.get("transB"):
        turned = None if right.shape is None else right.shape[::-1]
        right = editor.add(
            "Transpose", [right], f"{right.name}.T", dtype=right.dtype, shape=turned, attrs={"perm": [1, 0]}
        )
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 and gemm.inputs[2].name else None
    gemm.op, gemm.attrs = "MatMul", {}
    gemm.inputs = [left, right]
    if bias is not None:
        product = gs.Variable(editor.names.unique(f"{output.name}.product"), dtype=dtype, shape=shape)
        gemm.outputs = [product]
        name = editor.names.unique(f"{gemm.name}.bias")
        editor.scope.nodes.append(gs.Node("Add", name, {}, [product, bias], [output]))


def _is_no_op(node: gs.Node) -> bool:
    """Whether a node's only output is its first input."""
    if node.domain not in STANDARD_DOMAINS or len(node.outputs) != 1 or not node.inputs:
        return False
    source, result = node.inputs[0], node.outputs[0]
    same_shape = static_shape(source) is not None and static_shape(source) == static_shape(result)
    if node.op == "Identity":
        return True
    if node.op == "Dropout":
        return len(node.inputs) < 3
    if node.op == "Cast":
        return to_numpy(node.attrs["to"]) == to_numpy(source.dtype)
    if node.op in ("Reshape", "Expand", "Tile", "Slice", "Squeeze", "Unsqueeze", "Flatten", "Concat"):
        return (
            same_shape
            and (node.op != "Slice" or not _reverses(node))
            and (node.op != "Concat" or len(node.inputs) == 1)
        )
    if node.op == "Transpose":
        size = rank(source)
        return size is not None and list(node.attrs.get("perm", range(size)[::-1])) == list(range(size))
    if node.op in ("Mul", "Div"):
        return same_shape and scalar(node.inputs[1]) == 1
    if node.op in ("Add", "Sub"):
        return same_shape and scalar(node.inputs[1]) == 0
    return False


def _reverses(slice_node: gs.Node) -> bool:
    """Whether a Slice has a step other than 1, or one that is not known."""
    if len(slice_node.inputs) < 5:
        return False
    steps = slice_node.inputs[4]
    return not isinstance(steps, gs.Constant) or any(step != 1 for step in steps._values.load().reshape(-1))
