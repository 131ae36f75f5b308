"""Writes the steps of a loop one after the other, in the scope that holds the loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.clone import clone_node
from pi05c.graph.dtypes import to_numpy
from pi05c.graph.edit import Editor
from pi05c.graph.runner import Array
from pi05c.graph.scopes import scopes
from pi05c.graph.weights import array_of
from pi05c.passes.loop_edit import hoist, insert_before, redirect
from pi05c.passes.patterns.dependence import NONDETERMINISTIC, Dependence
from pi05c.passes.patterns.loop_form import Collected, LoopForm, Scanned, position
from pi05c.passes.patterns.loops import StaticLoop
from pi05c.passes.patterns.step_plan import StepPlan
from pi05c.passes.patterns.walk import static_shape


def obstacle_to_unrolling(loop: StaticLoop) -> str | None:
    """Why a loop cannot be replaced by its steps, in a phrase; None if it can."""
    for part in loop.form.collected if loop.steps == 0 else ():
        if part.result.name and (static_shape(part.element) is None or part.element.dtype is None):
            return f"it runs no step, and the shape of its empty output {part.result.name!r} is not known"
    for scope in scopes(loop.form.body) if loop.steps > 1 else ():
        for node in scope.nodes:
            if node.op in NONDETERMINISTIC and "seed" in node.attrs:
                return f"{node.name!r} in it goes on in one sequence of random numbers, which each copy would begin anew"
    return None


def unroll(loop: StaticLoop, plan: StepPlan, editor: Editor) -> None:
    """Replace a loop by its steps.

    What varies is copied for each step, with names that begin with `step_0/`, `step_1/`, ...; what is the same in
    every step stands once, in front; what depends on the step alone is an initializer for each step. The copies
    share their weights. The loop's outputs keep their names.

    Args:
        editor: of the scope that holds the loop.
    """
    form, classification = loop.form, plan.classification
    varying = classification.nodes(Dependence.VARYING)
    hoist(form, classification.nodes(Dependence.INVARIANT))
    form.node.outputs.clear()
    last = _produced_by_last_step(form, varying)
    nodes: list[gs.Node] = []
    current = [c.initial for c in form.carried]
    collected: list[list[gs.Tensor]] = [[] for _ in form.collected]
    for step in range(loop.steps):
        prefix = f"step_{step}/"
        tensors = dict(last) if step == loop.steps - 1 else {}
        tensors.update((id(c.entering), tensor) for c, tensor in zip(form.carried, current, strict=True))
        for scan in form.scanned:
            if id(scan.element) not in plan.tables:
                nodes.append(_slice(scan, step, loop.steps, editor))
                tensors[id(scan.element)] = nodes[-1].outputs[0]
        for key, (tensor, values) in plan.tables.items():
            tensors[key] = editor.constant(f"{prefix}{tensor.name}", values[step])
        nodes.extend(clone_node(node, tensors, editor.names, prefix) for node in varying)
        current = [tensors.get(id(c.leaving), c.leaving) for c in form.carried]
        for part, elements in zip(form.collected, collected, strict=True):
            elements.append(tensors.get(id(part.element), part.element))
    insert_before(form, nodes)
    for carried, final in zip(form.carried, current, strict=True):
        redirect(form, carried.result, final, editor)
    for part, elements in zip(form.collected, collected, strict=True):
        if part.result.name:
            _stack(form, part, elements[::-1] if part.reverse else elements, editor)
    editor.remove(form.node)


def _produced_by_last_step(form: LoopForm, varying: Sequence[gs.Node]) -> dict[int, gs.Tensor]:
    """The loop's outputs that nodes of the last step produce in place of the body's, by id of the body's."""
    produced = {id(tensor) for node in varying for tensor in node.outputs}
    found: dict[int, gs.Tensor] = {}
    for carried in form.carried:
        if carried.result.name and id(carried.leaving) in produced:
            result = found.setdefault(id(carried.leaving), carried.result)
            result.dtype = carried.leaving.dtype if result.dtype is None else result.dtype
            result.shape = carried.leaving.shape if result.shape is None else result.shape
    return found


def _slice(scan: Scanned, step: int, steps: int, editor: Editor) -> gs.Node:
    """Gather of what a step gets of a scanned tensor."""
    index = editor.constant(
        f"step_{step}/{scan.element.name}.index", np.array(position(scan, step, steps), np.int64)
    )
    name = editor.names.unique(f"step_{step}/{scan.element.name}")
    output = gs.Variable(name, scan.element.dtype, scan.element.shape)
    node_name = editor.names.unique(f"{name}.Gather")
    return gs.Node("Gather", node_name, {"axis": scan.axis}, [scan.source, index], [output])


def _stack(form: LoopForm, part: Collected, elements: Sequence[gs.Tensor], editor: Editor) -> None:
    """Stack what the steps gave, in this order, along a new axis into an output of the loop."""
    if all(isinstance(element, gs.Constant) for element in elements):
        table = editor.constant(f"{part.result.name}.values", _stacked_values(part, elements))
        redirect(form, part.result, table, editor)
        return
    axes = editor.constant(f"{part.result.name}.axes", np.array([part.axis], np.int64))
    nodes = []
    for element in elements:
        shape = None if element.shape is None else list(element.shape)
        if shape is not None:
            shape.insert(part.axis % (len(shape) + 1), 1)
        name = editor.names.unique(f"{element.name}.unsqueezed")
        row = gs.Variable(name, element.dtype, shape)
        nodes.append(
            gs.Node("Unsqueeze", editor.names.unique(f"{name}.Unsqueeze"), {}, [element, axes], [row])
        )
    rows = [node.outputs[0] for node in nodes]
    name = editor.names.unique(f"{part.result.name}.Concat")
    insert_before(form, [*nodes, gs.Node("Concat", name, {"axis": part.axis}, rows, [part.result])])


def _stacked_values(part: Collected, elements: Sequence[gs.Tensor]) -> Array:
    if elements:
        return np.stack([array_of(element) for element in elements], axis=part.axis)
    shape = list(static_shape(part.element) or ())
    shape.insert(part.axis % (len(shape) + 1), 0)
    return np.zeros(shape, to_numpy(part.element.dtype))
