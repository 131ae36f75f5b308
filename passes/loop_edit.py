"""Edits at the border between a loop's body and the scope that holds the loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import onnx_graphsurgeon as gs

from pi05c.graph.edit import Editor, Names
from pi05c.graph.io import scopes
from pi05c.passes.patterns.loop_form import Collected, LoopForm


def insert_before(form: LoopForm, nodes: Sequence[gs.Node]) -> None:
    """Put nodes in front of the loop in the node list of its scope."""
    index = next(index for index, node in enumerate(form.scope.nodes) if node is form.node)
    form.scope.nodes[index:index] = nodes


def hoist(form: LoopForm, nodes: Sequence[gs.Node]) -> None:
    """Move `nodes` of the body, which read nothing that changes from step to step, in front of the loop."""
    moved = {id(node) for node in nodes}
    form.body.nodes = [node for node in form.body.nodes if id(node) not in moved]
    insert_before(form, nodes)


def redirect(form: LoopForm, result: gs.Variable, value: gs.Tensor, editor: Editor) -> None:
    """Let `value` stand for an output of the loop, which no longer produces it.

    An output of the scope stays, as another name of `value`.
    """
    if not result.name or result is value:
        return
    if any(result is output for output in form.scope.outputs):
        name = editor.names.unique(f"{result.name}.Identity")
        insert_before(form, [gs.Node("Identity", name, {}, [value], [result])])
    else:
        editor.replace_uses(result, value)


def drop_carried(form: LoopForm, dropped: Collection[int]) -> None:
    """Take carried values, given by the ids of their `entering`, off the inputs and outputs of loop and body."""
    drop_parts(form, dropped, form.collected)


def drop_parts(form: LoopForm, dropped: Collection[int], collected: Sequence[Collected]) -> None:
    """Take carried values, given by the ids of their `entering`, and all but some collected ones off loop and body."""
    kept = [c for c in form.carried if id(c.entering) not in dropped]
    first = [tensor for tensor in (form.iteration, form.condition) if tensor is not None]
    form.node.inputs = [
        *form.node.inputs[: len(first)],
        *(c.initial for c in kept),
        *(s.source for s in form.scanned),
    ]
    form.node.outputs = [*(c.result for c in kept), *(part.result for part in collected)]
    form.body.inputs = [*first, *(c.entering for c in kept), *(s.element for s in form.scanned)]
    form.body.outputs = [
        *([form.body.outputs[0]] if form.condition is not None else []),
        *(c.leaving for c in kept),
        *(part.element for part in collected),
    ]
    for key, values in (
        ("scan_output_axes", [part.axis for part in collected]),
        ("scan_output_directions", [int(part.reverse) for part in collected]),
    ):
        if form.node.op == "Scan" and key in form.node.attrs:
            form.node.attrs[key] = values
            if not values:  # an empty list has no type
                del form.node.attrs[key]


def drop_unchanged(form: LoopForm, editor: Editor, body_editor: Editor) -> None:
    """Let the body read carried values that no step changes from outside.

    Args:
        editor: of the scope that holds the loop.
        body_editor: of the body.
    """
    unchanged = form.unchanged
    drop_carried(form, {id(c.entering) for c in unchanged})
    for carried in unchanged:
        body_editor.replace_uses(carried.entering, carried.initial)
        redirect(form, carried.result, carried.initial, editor)


def make_names_unique(graph: gs.Graph, body: gs.Graph, names: Names) -> None:
    """Rename nodes, results and initializers of `body` whose name something else has, so that they may leave it.

    ONNX lets two bodies use one name, but not a graph.
    """
    tensors = {id(tensor): tensor for scope in scopes(graph) for tensor in _tensors(scope)}
    uses = Counter(tensor.name for tensor in tensors.values())
    node_uses = Counter(node.name for scope in scopes(graph) for node in scope.nodes)
    kept = {id(tensor) for tensor in graph.outputs}
    for scope in scopes(body):
        for node in scope.nodes:
            _rename(node, node_uses, names)
            for tensor in (*node.outputs, *(t for t in node.inputs if isinstance(t, gs.Constant))):
                if id(tensor) not in kept:
                    _rename(tensor, uses, names)


def _rename(named: gs.Node | gs.Tensor, uses: Counter[str], names: Names) -> None:
    if named.name and uses[named.name] > 1:
        uses[named.name] -= 1
        named.name = names.unique(named.name)


def _tensors(scope: gs.Graph) -> Iterator[gs.Tensor]:
    yield from scope.inputs
    yield from scope.outputs
    for node in scope.nodes:
        yield from node.inputs
        yield from node.outputs
