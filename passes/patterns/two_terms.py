"""Products in two terms: one MatMul of q(x) and of what q left of x, as further rows, whose halves are added."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.passes.patterns.walk import origin


def before_terms(tensor: gs.Tensor, through: Iterable[str]) -> gs.Tensor:
    """The x behind Concat(x, x - q(x)), which a MatMul reads through operators of `through`; else `tensor` itself."""
    node = producer(origin(tensor, through))
    if node is None or node.op != "Concat" or len(node.inputs) != 2:
        return tensor
    x, left = node.inputs
    rest = producer(left)
    if rest is None or rest.op != "Sub" or rest.inputs[0] is not x:
        return tensor
    return x if origin(rest.inputs[1], through) is origin(x, through) else tensor


def after_terms(tensor: gs.Tensor) -> gs.Tensor:
    """The sum of the two halves that a Split makes of a MatMul's output; else `tensor` itself."""
    if len(tensor.outputs) != 1 or tensor.outputs[0].op != "Split":
        return tensor
    halves = tensor.outputs[0].outputs
    readers = {id(node): node for half in halves for node in half.outputs}
    if len(halves) != 2 or len(readers) != 1:
        return tensor
    (node,) = readers.values()
    both = {id(half) for half in halves} == {id(read) for read in node.inputs}
    return node.outputs[0] if node.op == "Add" and both else tensor
