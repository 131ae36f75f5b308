"""Softmax, as the operator or as Sub(ReduceMax)-Exp-Div(ReduceSum)."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from pi05c.passes.patterns.region import Region
from pi05c.passes.patterns.walk import constant_integers, each_node, made_by, origin


class Softmax(Region):
    """One softmax: the operator, or reduction, exponential, sum and quotient."""

    @property
    def over_last_axis(self) -> bool:
        """Whether it is sure to run over the last axis."""
        last = (-1, len(self.input.shape or ()) - 1)
        if self.nodes[0].op == "Softmax":
            return self.nodes[0].attrs.get("axis", -1) in last
        return all(
            axes is not None and len(axes) == 1 and axes[0] in last
            for axes in (_axes(node) for node in self.nodes if node.op in ("ReduceMax", "ReduceSum"))
        )


def _axes(reduce: gs.Node) -> tuple[int, ...] | None:
    """The constant axes of a reduction, an attribute before opset 18 (13 for ReduceSum), then an input."""
    if len(reduce.inputs) > 1:
        return constant_integers(reduce.inputs[1])
    axes = reduce.attrs.get("axes")
    return None if axes is None else tuple(axes)


def find_softmaxes(graph: gs.Graph) -> list[Softmax]:
    """Every softmax, in execution order."""
    found = []
    for scope, node in each_node(graph, "Softmax", "Div"):
        if node.op == "Softmax":
            found.append(Softmax(scope, (node,), node.inputs[0], node.outputs[0]))
        elif (match := _decomposed(scope, node)) is not None:
            found.append(match)
    return found


def _decomposed(scope: gs.Graph, div: gs.Node) -> Softmax | None:
    total = made_by(div.inputs[1], "ReduceSum")
    exp = made_by(div.inputs[0], "Exp")
    if total is None or exp is None or origin(total.inputs[0]) is not exp.outputs[0]:
        return None
    sub = made_by(exp.inputs[0], "Sub")
    if sub is None:
        return Softmax(scope, (exp, total, div), exp.inputs[0], div.outputs[0])
    largest = made_by(sub.inputs[1], "ReduceMax")
    if largest is None or origin(largest.inputs[0]) is not origin(sub.inputs[0]):
        return None
    return Softmax(scope, (largest, sub, exp, total, div), sub.inputs[0], div.outputs[0])
