"""Attention: softmax of scaled, masked QK^T, times V."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.passes.patterns.softmax import Softmax, find_softmaxes
from pi05c.passes.patterns.walk import consumers, is_output, origin, scalar

_AFTER_SOFTMAX = frozenset({"Cast", "Identity", "Reshape", "QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        scope: the graph that holds it.
        softmax: the softmax in the middle.
        qk, av: the two MatMuls.
        between: the nodes from `qk` to the softmax, in order: Cast, the scale's Mul or Div, the mask's Add or Where.
        scales: those of `between` that multiply the unmasked logits by a constant, with the factor.
        masked: whether a mask is added or selected.
    """

    scope: gs.Graph
    softmax: Softmax
    qk: gs.Node
    av: gs.Node
    between: tuple[gs.Node, ...]
    scales: tuple[tuple[gs.Node, float], ...]
    masked: bool

    @property
    def name(self) -> str:
        """The name of the softmax, which names the attention in reports."""
        return str(self.softmax.name)


@dataclass(frozen=True)
class NotAttention:
    """A softmax that is no whole attention, with the reason."""

    softmax: Softmax
    reason: str


def find_attention(graph: gs.Graph) -> tuple[list[Attention], list[NotAttention]]:
    """Every attention, in execution order, and every softmax that is none, with the reason."""
    found: list[Attention] = []
    refused: list[NotAttention] = []
    for softmax in find_softmaxes(graph):
        match = _match(graph, softmax)
        if isinstance(match, Attention):
            found.append(match)
        else:
            refused.append(match)
    return found, refused


def _match(graph: gs.Graph, softmax: Softmax) -> Attention | NotAttention:
    between: list[gs.Node] = []
    scales: list[tuple[gs.Node, float]] = []
    masked = False
    tensor = softmax.input
    while (node := producer(tensor)) is not None and node.op != "MatMul":
        step = _step(node)
        if step is None:
            return NotAttention(
                softmax, f"its logits pass through {node.op} {node.name!r}, no mask and no scale"
            )
        tensor, factor, masks = step
        between.insert(0, node)
        if factor is not None:
            scales.insert(0, (node, factor))
        if masks:
            masked = True
            scales.clear()  # what lies below the mask scales the mask too
    if node is None:
        return NotAttention(softmax, "its logits come from no MatMul")
    for inner in (node, *between):
        if is_output(inner.outputs[0], graph):
            return NotAttention(softmax, f"the output of {inner.name!r} is an output of the graph")
        if len({id(user) for user in inner.outputs[0].outputs}) != 1 and inner is not (between or [None])[-1]:
            return NotAttention(softmax, f"the output of {inner.name!r} has another consumer")
    if is_output(softmax.output, graph):
        return NotAttention(softmax, "its probabilities are an output of the graph")
    users = consumers(softmax.output, _AFTER_SOFTMAX)
    if len(users) != 1 or users[0].op != "MatMul":
        kinds = ", ".join(sorted({user.op for user in users})) or "nothing"
        return NotAttention(softmax, f"its probabilities feed {kinds}, not one MatMul")
    av = users[0]
    if origin(av.inputs[0], _AFTER_SOFTMAX) is not softmax.output:
        return NotAttention(softmax, f"its probabilities are the right factor of {av.name!r}")
    return Attention(softmax.scope, softmax, node, av, tuple(between), tuple(scales), masked)


def _step(node: gs.Node) -> tuple[gs.Tensor, float | None, bool] | None:
    """One node between QK^T and the softmax: the tensor above it, its scale factor, whether it masks."""
    if node.op in ("Cast", "Identity", "Reshape"):
        return node.inputs[0], None, False
    if node.op in ("Mul", "Div"):
        value = scalar(node.inputs[1])
        if value is not None and value != 0:
            return node.inputs[0], (value if node.op == "Mul" else 1 / value), False
        value = scalar(node.inputs[0]) if node.op == "Mul" else None
        return None if value is None else (node.inputs[1], value, False)
    if node.op in ("Add", "Sub"):
        logits = [index for index in (0, 1) if _leads_to_matmul(node.inputs[index])]
        if len(logits) == 1 and (node.op == "Add" or logits == [0]):
            return node.inputs[logits[0]], None, True
        return None
    if node.op == "Where":
        logits = [index for index in (1, 2) if _leads_to_matmul(node.inputs[index])]
        return (node.inputs[logits[0]], None, True) if len(logits) == 1 else None
    return None


def _leads_to_matmul(tensor: gs.Tensor) -> bool:
    """Whether a few steps through scales, masks and casts lead up to a MatMul."""
    stack, seen = [tensor], 0
    while stack and seen < 16:
        node = producer(stack.pop())
        seen += 1
        if node is None:
            continue
        if node.op == "MatMul":
            return True
        if node.op in ("Cast", "Identity", "Reshape"):
            stack.append(node.inputs[0])
        elif node.op in ("Mul", "Div", "Add", "Sub"):
            stack.extend(node.inputs)
        elif node.op == "Where":
            stack.extend(node.inputs[1:])
    return False
