"""The flow accumulation x += dt * v, unrolled or in a loop's body, and the linears at its two ends."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.passes.patterns.linear import Linear, find_linears
from pi05c.passes.patterns.walk import MOVING, consumers, made_by, origin, scalar


@dataclass(frozen=True)
class FlowStep:
    """One step of the accumulation.

    Attributes:
        add: x + dt * v.
        scaled: the product dt * v, dt being one number.
        state: x before the step.
        velocity: v.
    """

    scope: gs.Graph
    add: gs.Node
    scaled: gs.Node
    state: gs.Tensor
    velocity: gs.Tensor


def find_flow(graph: gs.Graph) -> list[FlowStep]:
    """The steps of each accumulation, first to last: a chain x + dt * v from a graph input to an output, and the one
    between a carried value of a loop's body and its next value."""
    found: list[FlowStep] = []
    starts = {id(tensor) for tensor in graph.inputs}
    for output in graph.outputs:
        found.extend(_chain(graph, output, starts))
    for node in graph.nodes:
        body = node.attrs.get("body")
        if node.op not in ("Loop", "Scan") or not isinstance(body, gs.Graph):
            continue
        carried = {id(tensor) for tensor in body.inputs}
        for output in body.outputs:
            found.extend(_chain(body, output, carried))
    return found


def flow_linears(graph: gs.Graph) -> tuple[list[Linear], list[Linear]]:
    """The linears that read x (action_in_proj) and those that make v (action_out_proj)."""
    steps = find_flow(graph)
    by_node = {id(linear.node): linear for linear in find_linears(graph)}
    into, out = {}, {}
    for step in steps:
        for user in consumers(origin(step.state), MOVING):
            if id(user) in by_node:
                into[id(user)] = by_node[id(user)]
        node = producer(origin(step.velocity, MOVING))
        if node is not None and node.op == "Add":  # the bias
            node = made_by(node.inputs[0], "MatMul", through=MOVING) or made_by(
                node.inputs[1], "MatMul", through=MOVING
            )
        if node is not None and id(node) in by_node:
            out[id(node)] = by_node[id(node)]
    return list(into.values()), list(out.values())


def _chain(scope: gs.Graph, output: gs.Tensor, starts: set[int]) -> list[FlowStep]:
    """Follow x from its last value back to a start; empty where the way does not lead to one."""
    steps: list[FlowStep] = []
    tensor = origin(output)
    while id(tensor) not in starts:
        add = producer(tensor)
        if add is None or add.op not in ("Add", "Sub") or len(add.inputs) != 2:
            return []
        step = _step(scope, add)
        if step is None:
            return []
        steps.append(step)
        tensor = origin(step.state)
    return steps[::-1]


def _step(scope: gs.Graph, add: gs.Node) -> FlowStep | None:
    """Tell x from dt * v, which is a product with one number."""
    for index in (1, 0):
        product = _scaled(add.inputs[index])
        if product is not None and (add.op == "Add" or index == 1):
            return FlowStep(scope, add, product[0], add.inputs[1 - index], product[1])
    return None


def _scaled(tensor: gs.Tensor) -> tuple[gs.Node, gs.Tensor] | None:
    """dt * v, where dt is one number: a constant, or computed in the loop."""
    node = made_by(tensor, "Mul")
    if node is None:
        return None
    for index in (0, 1):
        factor = node.inputs[index]
        if scalar(factor) is not None or (factor.shape is not None and list(factor.shape) in ([], [1])):
            return node, node.inputs[1 - index]
    return None
