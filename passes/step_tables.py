"""Keeps a loop, and lets its body read what depends on the step alone from tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.edit import Editor, detach, producer
from pi05c.graph.weights import array_of
from pi05c.passes.loop_edit import drop_carried, hoist, redirect
from pi05c.passes.patterns.dependence import Dependence
from pi05c.passes.patterns.loop_form import LoopForm, same_value
from pi05c.passes.patterns.loops import StaticLoop
from pi05c.passes.patterns.step_plan import StepPlan


def is_indexed(loop: StaticLoop, plan: StepPlan) -> bool:
    """Whether nothing is left to do: the body computes only what varies, and the trip count is a constant."""
    return (
        not plan.classification.stepwise
        and not _movable(loop.form, plan)
        and not _new_tables(loop, plan)
        and _is_counted(loop)
    )


def index_tables(loop: StaticLoop, plan: StepPlan, editor: Editor, body_editor: Editor) -> None:
    """Give a loop a constant trip count, and its body a table for what depends on the step alone.

    A table holds the value of every step, [steps, ...]. The body of a Loop reads it with Gather by the number of
    the step, that of a Scan as one more scanned input. Carried values that depend on the step alone are gone; what
    is the same in every step is computed in front of the loop.

    Args:
        editor: of the scope that holds the loop.
        body_editor: of the body.
    """
    form, classification = loop.form, plan.classification
    tables = _new_tables(loop, plan)
    steps = {id(node) for node in classification.nodes(Dependence.STEP)} - _table_readers(loop, plan)
    hoist(form, _movable(form, plan))
    drop_carried(form, {id(c.entering) for c in classification.stepwise})
    for carried in classification.stepwise:
        if id(carried.leaving) in plan.tables:
            final = plan.tables[id(carried.leaving)][1][-1]
            redirect(form, carried.result, editor.constant(f"{carried.result.name}.value", final), editor)
    if not _is_counted(loop):
        _count(loop, editor)
    for node in form.body.nodes:
        if id(node) in steps:
            detach(node)
    form.body.nodes = [node for node in form.body.nodes if id(node) not in steps]
    _read_from_tables(loop, plan, tables, editor, body_editor)
    _name_outer_outputs(form, editor)


def _movable(form: LoopForm, plan: StepPlan) -> list[gs.Node]:
    """The nodes to hoist: all that are the same in every step, but for new names of what the body returns."""
    returned = {id(tensor) for tensor in form.body.outputs}
    return [
        node
        for node in plan.classification.nodes(Dependence.INVARIANT)
        if node.op != "Identity" or id(node.outputs[0]) not in returned
    ]


def _new_tables(loop: StaticLoop, plan: StepPlan) -> list[gs.Tensor]:
    """The frontier without what the body reads from a table as it is."""
    return [value for value in plan.classification.frontier() if not _is_read_from_table(value, loop)]


def _table_readers(loop: StaticLoop, plan: StepPlan) -> set[int]:
    """Ids of the nodes that read tables which the body has, and of those that make their index."""
    kept: set[int] = set()
    for value in plan.classification.frontier():
        node = producer(value)
        if node is not None and _is_read_from_table(value, loop):
            kept.add(id(node))
            if (index := producer(node.inputs[1])) is not None:
                kept.add(id(index))
    return kept


def _is_read_from_table(value: gs.Tensor, loop: StaticLoop) -> bool:
    form = loop.form
    if value is form.iteration or any(value is scan.element for scan in form.scanned):
        return True
    node = producer(value)
    if node is None or node.op != "Gather" or node.attrs.get("axis", 0) != 0:
        return False
    index = producer(node.inputs[1])
    number = index.inputs[0] if index is not None and index.op == "Reshape" else node.inputs[1]
    table = node.inputs[0]
    return isinstance(table, gs.Constant) and table.shape[:1] == (loop.steps,) and number is form.iteration


def _read_from_tables(
    loop: StaticLoop, plan: StepPlan, tables: Sequence[gs.Tensor], editor: Editor, body_editor: Editor
) -> None:
    form = loop.form
    readers: list[gs.Node] = []
    index = _index(form, readers, editor) if tables else None
    for value in tables:
        table = editor.constant(f"{value.name}.table", np.stack(plan.tables[id(value)][1]))
        row = value
        if any(value is carried.entering for carried in form.carried):
            row = gs.Variable(editor.names.unique(f"{value.name}.row"), value.dtype, value.shape)
            body_editor.replace_uses(value, row)
        if index is None:
            _add_scanned(form.node, table, row)
        else:
            name = editor.names.unique(f"{value.name}.Gather")
            readers.append(gs.Node("Gather", name, {"axis": 0}, [table, index], [row]))
    form.body.nodes[:0] = readers


def _index(form: LoopForm, readers: list[gs.Node], editor: Editor) -> gs.Tensor | None:
    """The number of the step as a scalar, so that Gather drops the first axis; None for a Scan."""
    if form.iteration is None or (form.iteration.shape is not None and not len(form.iteration.shape)):
        return form.iteration
    scalar = gs.Variable(editor.names.unique(f"{form.iteration.name}.scalar"), form.iteration.dtype, [])
    shape = editor.constant(f"{scalar.name}.shape", np.zeros(0, np.int64))
    name = editor.names.unique(f"{scalar.name}.Reshape")
    readers.append(gs.Node("Reshape", name, {}, [form.iteration, shape], [scalar]))
    return scalar


def _add_scanned(scan: gs.Node, table: gs.Tensor, row: gs.Variable) -> None:
    scan.inputs.append(table)
    scan.attrs["body"].inputs.append(row)
    scan.attrs["num_scan_inputs"] += 1
    for key in ("scan_input_axes", "scan_input_directions"):
        if key in scan.attrs:
            scan.attrs[key] = [*scan.attrs[key], 0]


def _is_counted(loop: StaticLoop) -> bool:
    """Whether a constant trip count alone ends the loop."""
    form = loop.form
    if form.condition is None:
        return True
    limit, initial = form.node.inputs[:2]
    leaving = form.body.outputs[0]
    return (
        isinstance(limit, gs.Constant)
        and int(array_of(limit).item()) == loop.steps
        and (isinstance(initial, gs.Constant) or not initial.name)
        and (isinstance(leaving, gs.Constant) or same_value(leaving) is form.condition)
    )


def _count(loop: StaticLoop, editor: Editor) -> None:
    form = loop.form
    assert form.condition is not None
    form.node.inputs[0] = editor.constant(f"{form.node.name}.steps", np.array(loop.steps, np.int64))
    form.node.inputs[1] = editor.constant(f"{form.node.name}.condition", np.array(True))
    leaving = gs.Variable(editor.names.unique(f"{form.condition.name}.leaving"), np.dtype(np.bool_), [])
    form.body.outputs[0] = leaving
    name = editor.names.unique(f"{leaving.name}.Identity")
    form.body.nodes.append(gs.Node("Identity", name, {}, [form.condition], [leaving]))


def _name_outer_outputs(form: LoopForm, editor: Editor) -> None:
    """Give a name of its own to what the body returns from outside, which it may not return directly.

    So do those inputs of a Scan's body that it returns: onnxruntime 1.32 hands out memory that nobody wrote in their place.
    """
    inside = {id(tensor) for node in form.body.nodes for tensor in node.outputs}
    if form.condition is not None:
        inside.update(id(tensor) for tensor in form.body.inputs)
    for index, tensor in enumerate(form.body.outputs):
        if isinstance(tensor, gs.Variable) and id(tensor) not in inside:
            name = editor.names.unique(f"{tensor.name}.inside")
            inner = gs.Variable(name, tensor.dtype, tensor.shape)
            node_name = editor.names.unique(f"{name}.Identity")
            form.body.nodes.append(gs.Node("Identity", node_name, {}, [tensor], [inner]))
            form.body.outputs[index] = inner
