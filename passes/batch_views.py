"""batch_views: one run of the vision tower over a batch of views."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.edit import Editor, detach, producer, replace_input
from pi05c.graph.io import scopes
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.batch import RESHAPES
from pi05c.passes.patterns.views import Border, Join, Twins, find_twins
from pi05c.passes.patterns.walk import each_node, static_shape


@graph_pass(exact=True, after=("canonicalize",), min_opset=13)
def batch_views(graph: gs.Graph, ctx: PassContext) -> None:
    """Run subgraphs that differ in their input alone, as a loop over cameras exports them, once over a batch.

    Copies are found from Convs that share their weight. Their inputs become one tensor along axis 0: a Concat, or a
    reshape of the tensor whose slices they are. One copy stays, target shapes of its reshapes adapted. Where a Concat
    puts the results of all views side by side, a reshape of the batch takes their place; a Split gives single results
    to other readers. Every operator of a copy must keep axis 0 as a batch axis, and every constant must be the same in
    all; where that ends before the copies meet, the rest stays one a view, and with it everything if the rest has as
    many MatMuls and Convs as the batch would.
    """
    twins, apart = find_twins(graph)
    editors = {id(scope): ctx.editor(scope) for scope in scopes(graph)}
    for found in apart:
        ctx.skip(found.node, found.reason)
    for copies in twins:
        if copies.rest is not None:
            ctx.skip(copies.rest.node, f"it {copies.rest.reason}")
        _batch(copies, editors[id(copies.scope)])
        ctx.changed(copies.rows[0][0])
    if not twins and not apart:
        some = any(True for _ in each_node(graph, "Conv"))
        reason = "no two of its Convs apply one weight to different tensors: its views are one batch already, or each has weights of its own"
        ctx.skip("graph", reason if some else "it has no Conv")


def _batch(twins: Twins, editor: Editor) -> None:
    count = len(twins.views)
    batch = _batched_views(twins, editor)
    first = [row[0] for row in twins.rows]
    for node in first:
        replace_input(node, twins.views[0], batch)
    for row in twins.rows:
        for node in row[1:]:
            detach(node)
    borders = {(border.row, border.output): border for border in twins.borders}
    inside = {id(node) for node in first}
    for index, node in enumerate(first):
        for output, result in enumerate(list(node.outputs)):
            shape = static_shape(result)
            if shape is None:
                continue
            border = borders.get((index, output))
            if border is not None:
                node.outputs[output] = _split_off(border, inside, count, editor)
            else:
                result.shape = [count * shape[0], *shape[1:]]
        _adapt(node, editor)
    for border in twins.borders:
        _hand_over(border, first[border.row].outputs[border.output], editor)


def _batched_views(twins: Twins, editor: Editor) -> gs.Tensor:
    """The views along axis 0."""
    view = twins.views[0]
    count, shape = len(twins.views), static_shape(view) or ()
    target = [count * shape[0], *shape[1:]]
    if twins.stack is not None:
        stack = twins.stack
        return _swapped(stack.tensor, (stack.outer, count), target, f"{stack.tensor.name}.views", editor)
    return editor.add(
        "Concat", twins.views, f"{view.name}.views", dtype=view.dtype, shape=target, attrs={"axis": 0}
    )


def _split_off(border: Border, inside: set[int], count: int, editor: Editor) -> gs.Variable:
    """A batched twin of the first view's result, which the nodes of `inside` read from now on."""
    result = border.results[0]
    shape = static_shape(result) or ()
    batch = gs.Variable(
        editor.names.unique(f"{result.name}.views"), result.dtype, [count * shape[0], *shape[1:]]
    )
    for reader in list(result.outputs):
        if id(reader) in inside:
            replace_input(reader, result, batch)
    return batch


def _adapt(node: gs.Node, editor: Editor) -> None:
    """Give a reshape or Expand the shape that its output now has."""
    if node.op in RESHAPES or node.op == "Expand":
        result = node.outputs[0]
        target = editor.constant(f"{result.name}.shape", np.asarray(result.shape, np.int64))
        node.op = "Expand" if node.op == "Expand" else "Reshape"
        node.attrs = {}
        node.inputs = [node.inputs[0], target]


def _hand_over(border: Border, batch: gs.Tensor, editor: Editor) -> None:
    """Give the readers outside what they read before: the views side by side, or one by one."""
    for join in border.joins:
        _join(join, border, batch, editor)
    if not border.single:
        return
    count, size = len(border.results), (static_shape(border.results[0]) or ())[0]
    sizes = editor.constant(f"{batch.name}.sizes", np.full(count, size, np.int64))
    name = editor.names.unique(f"{batch.name}.Split")
    editor.scope.nodes.append(gs.Node("Split", name, {"axis": 0}, [batch, sizes], list(border.results)))


def _join(join: Join, border: Border, batch: gs.Tensor, editor: Editor) -> None:
    """Let a Concat read the views as one tensor, side by side along its axis, or let that take its place."""
    count, shape = len(border.results), list(static_shape(border.results[0]) or ())
    concat, joined = join.concat, batch
    if join.axis:
        outer = math.prod(shape[: join.axis])
        shape[join.axis] *= count
        joined = _swapped(batch, (count, outer), shape, f"{batch.name}.joined", editor)
    inputs = list(concat.inputs)
    place = next(index for index, tensor in enumerate(inputs) if tensor is border.results[0])
    concat.inputs = [*inputs[:place], joined, *inputs[place + count :]]
    if len(concat.inputs) == 1:
        concat.op, concat.attrs = "Identity", {}
        made = producer(joined) if join.axis else None
        if made is not None and made.op == "Reshape":
            concat.op, concat.inputs = "Reshape", list(made.inputs)


def _swapped(
    tensor: gs.Tensor, leading: tuple[int, int], shape: Sequence[int], name: str, editor: Editor
) -> gs.Tensor:
    """Swap the two outermost axes of `tensor`, taken as [*leading, rest], and give the result `shape`."""
    rest = math.prod(shape) // math.prod(leading)
    if 1 not in leading:
        apart = _reshaped(tensor, [*leading, rest], f"{name}.apart", editor)
        swapped = [leading[1], leading[0], rest]
        tensor = editor.add(
            "Transpose",
            [apart],
            f"{name}.swapped",
            dtype=tensor.dtype,
            shape=swapped,
            attrs={"perm": [1, 0, 2]},
        )
    return _reshaped(tensor, shape, name, editor)


def _reshaped(tensor: gs.Tensor, shape: Sequence[int], name: str, editor: Editor) -> gs.Tensor:
    if static_shape(tensor) == tuple(shape):
        return tensor
    target = editor.constant(f"{name}.shape", np.asarray(shape, np.int64))
    return editor.add("Reshape", [tensor, target], name, dtype=tensor.dtype, shape=shape)
