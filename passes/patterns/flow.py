"""The flow accumulation x += dt * v, unrolled or in a loop's body, and the linears at its two ends."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.passes.patterns.linear import Linear, find_linears, linear_at
from pi05c.passes.patterns.walk import MOVING, consumers, made_by, origin, scalar


@dataclass(frozen=True)
class FlowStep:
    """One step of the accumulation.

    Attributes:
        add: x + dt * v.
        scaled: the product dt * v, dt being one number; None where dt is part of the weight that makes v.
        state: x before the step.
        velocity: v, or dt * v where `scaled` is None.
    """

    scope: gs.Graph
    add: gs.Node
    scaled: gs.Node | None
    state: gs.Tensor
    velocity: gs.Tensor

    @property
    def nodes(self) -> tuple[gs.Node, ...]:
        """The arithmetic of the step: the product, if there is one, and the sum."""
        return (self.add,) if self.scaled is None else (self.scaled, self.add)


def find_flow(graph: gs.Graph) -> list[FlowStep]:
    """The steps of each accumulation, first to last.

    It is a chain x + dt * v from a graph input to an output, or the one between a carried value of a loop's body and
    its next value. Where dt has gone into the weight that makes v, what tells a step from a residual connection is
    that weight: all steps share it, at least two in a chain, or one in a body, which runs again.
    """
    found: list[FlowStep] = []
    starts = {id(tensor) for tensor in graph.inputs}
    for output in graph.outputs:
        found.extend(_chain(graph, output, starts, repeats=False))
    for node in graph.nodes:
        body = node.attrs.get("body")
        if node.op not in ("Loop", "Scan") or not isinstance(body, gs.Graph):
            continue
        carried = {id(tensor) for tensor in body.inputs}
        for output in body.outputs:
            found.extend(_chain(body, output, carried, repeats=True))
    return list({id(step.add): step for step in found}.values())


def flow_linears(graph: gs.Graph) -> tuple[list[Linear], list[Linear]]:
    """The linears that read x (action_in_proj) and those that make v (action_out_proj)."""
    by_node = {id(linear.node): linear for linear in find_linears(graph)}
    into, out = {}, {}
    for step in find_flow(graph):
        for user in consumers(origin(step.state), MOVING):
            if id(user) in by_node:
                into[id(user)] = by_node[id(user)]
        linear = velocity_linear(step)
        if linear is not None:
            out[id(linear.node)] = linear
    return list(into.values()), list(out.values())


def velocity_linear(step: FlowStep) -> Linear | None:
    """The linear that makes a step's v, with or without a bias."""
    return _made_by_linear(step.scope, step.velocity)


def _chain(scope: gs.Graph, output: gs.Tensor, starts: set[int], *, repeats: bool) -> list[FlowStep]:
    """Follow x from its last value back to a start; empty where the way does not lead to one.

    Args:
        repeats: the scope is a body, so that one step stands for many.
    """
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
    folded = [linear for step in steps if step.scaled is None and (linear := velocity_linear(step))]
    if folded and (len({id(linear.weight) for linear in folded}) > 1 or len(folded) + repeats < 2):
        return []
    return steps[::-1]


def _step(scope: gs.Graph, add: gs.Node) -> FlowStep | None:
    """Tell x from dt * v, which is a product with one number or what a linear makes."""
    for index in (1, 0):
        product = _scaled(add.inputs[index])
        if product is not None and (add.op == "Add" or index == 1):
            return FlowStep(scope, add, product[0], add.inputs[1 - index], product[1])
    for index in (1, 0):
        made = _made_by_linear(scope, add.inputs[index])
        if made is not None and (add.op == "Add" or index == 1):
            return FlowStep(scope, add, None, add.inputs[1 - index], add.inputs[index])
    return None


def _made_by_linear(scope: gs.Graph, tensor: gs.Tensor) -> Linear | None:
    node = producer(origin(tensor, MOVING))
    if node is not None and node.op == "Add":  # the bias
        sides = [side for side in node.inputs if not isinstance(origin(side, MOVING), gs.Constant)]
        node = producer(origin(sides[0], MOVING)) if len(sides) == 1 else None
    return None if node is None else linear_at(scope, node)


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
