"""Attention: softmax of scaled, masked QK^T, times V."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.passes.patterns.softmax import Softmax, find_softmaxes
from pi05c.passes.patterns.walk import consumers, each_node, made_by, origin, output_ids, rank, scalar

_BEFORE_SPLIT = frozenset({"Cast", "Identity", "Reshape"})
_AFTER_SOFTMAX = frozenset({"Cast", "Identity", "Reshape", "QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class Chunk:
    """The two MatMuls over one part of the keys and values."""

    qk: gs.Node
    av: gs.Node


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        scope: the graph that holds it.
        softmax: the softmax in the middle.
        chunks: its MatMuls: one pair, or one for each part of keys and values whose logits are concatenated.
        join: the Concat of the logits of several chunks.
        between: the nodes from the logits to the softmax, in order: Cast, the scale's Mul or Div, the mask's Add or
            Where.
        scales: those of `between` that multiply the unmasked logits by a constant, with the factor.
        masked: whether a mask is added or selected.
    """

    scope: gs.Graph
    softmax: Softmax
    chunks: tuple[Chunk, ...]
    join: gs.Node | None
    between: tuple[gs.Node, ...]
    scales: tuple[tuple[gs.Node, float], ...]
    masked: bool

    @property
    def qk(self) -> gs.Node:
        """QK^T of the first chunk."""
        return self.chunks[0].qk

    @property
    def av(self) -> gs.Node:
        """The product with V of the first chunk."""
        return self.chunks[0].av

    @property
    def nodes(self) -> tuple[gs.Node, ...]:
        """All of its nodes, but for what moves the probabilities."""
        products = (node for chunk in self.chunks for node in (chunk.qk, chunk.av))
        return (*products, *([self.join] if self.join else []), *self.between, *self.softmax.nodes)

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
    outputs = output_ids(graph)
    homes = {id(node): scope for scope, node in each_node(graph)}
    for softmax in find_softmaxes(graph):
        match = _match(softmax, outputs)
        if isinstance(match, Attention):
            match = next(
                (
                    f"{node.name!r} is in another body"
                    for node in match.nodes
                    if homes[id(node)] is not softmax.scope
                ),
                match,
            )
        if isinstance(match, Attention):
            found.append(match)
        else:
            refused.append(NotAttention(softmax, match))
    return found, refused


def attention_operators(graph: gs.Graph) -> list[gs.Node]:
    """Attentions that are one operator (ONNX 23, onnxruntime's own), whose inside no pass reaches."""
    own = ("com.microsoft::Attention", "MultiHeadAttention", "GroupQueryAttention")
    return [node for _, node in each_node(graph, "Attention", *own)]


def _match(softmax: Softmax, outputs: set[int]) -> Attention | str:
    """The attention around a softmax, or why there is none."""
    if not softmax.over_last_axis:
        return "it runs over another axis than the last, which keys lie along"
    between: list[gs.Node] = []
    scales: list[tuple[gs.Node, float]] = []
    masked = False
    tensor = softmax.input
    while (node := producer(tensor)) is not None and node.op not in ("MatMul", "Concat"):
        step = _step(node)
        if step is None:
            return f"its logits pass through {node.op} {node.name!r}, no mask and no scale"
        tensor, factor, masks = step
        between.insert(0, node)
        if factor is not None:
            scales.insert(0, (node, factor))
        if masks:
            masked = True
            scales.clear()  # what lies below the mask scales the mask too
    products = [] if node is None else [node] if node.op == "MatMul" else _joined(node)
    if node is None or not products:
        return "its logits come from no MatMul"
    inner = (*products, *([node] if node.op == "Concat" else []), *between)
    for index, part in enumerate(inner):
        if id(part.outputs[0]) in outputs:
            return f"the output of {part.name!r} is an output of the graph"
        last = index == len(inner) - 1  # a decomposed softmax reads its input twice
        if len({id(user) for user in part.outputs[0].outputs}) != 1 and not last:
            return f"the output of {part.name!r} has another consumer"
    strangers = {id(user) for user in softmax.input.outputs} - {id(own) for own in softmax.nodes}
    if strangers:
        return f"its logits {softmax.input.name!r} have another consumer"
    mixed = _mixes(softmax, len(products), outputs)
    if isinstance(mixed, str):
        return mixed
    chunks = tuple(Chunk(qk, av) for qk, av in zip(products, mixed, strict=True))
    join = node if node.op == "Concat" else None
    return Attention(softmax.scope, softmax, chunks, join, tuple(between), tuple(scales), masked)


def _joined(concat: gs.Node) -> list[gs.Node]:
    """The MatMuls whose products a Concat along the last axis joins, none where one is something else."""
    shape = concat.outputs[0].shape
    if shape is None or concat.attrs.get("axis") not in (-1, len(shape) - 1):
        return []
    made = [made_by(tensor, "MatMul") for tensor in concat.inputs]
    found = [node for node in made if node is not None]
    return found if len(found) == len(made) else []


def _mixes(softmax: Softmax, count: int, outputs: set[int]) -> list[gs.Node] | str:
    """The MatMuls with V, one a chunk, or why they are not found."""
    if _is_returned(softmax.output, _AFTER_SOFTMAX, outputs):
        return "its probabilities are an output of the graph"
    parts = [softmax.output]
    if count > 1:
        users = consumers(softmax.output, _BEFORE_SPLIT)
        if len(users) != 1 or users[0].op != "Split" or len(users[0].outputs) != count:
            return f"its logits are joined from {count} chunks, its probabilities are not split again"
        parts = list(users[0].outputs)
        if any(_is_returned(part, _AFTER_SOFTMAX, outputs) for part in parts):
            return "a part of its probabilities is an output of the graph"
    found = []
    for part in parts:
        users = consumers(part, _AFTER_SOFTMAX)
        if len(users) != 1 or users[0].op != "MatMul":
            kinds = ", ".join(sorted({user.op for user in users})) or "nothing"
            return f"its probabilities feed {kinds}, not one MatMul"
        if origin(users[0].inputs[0], _AFTER_SOFTMAX) is not part:
            return f"its probabilities are the right factor of {users[0].name!r}"
        found.append(users[0])
    return found


def _is_returned(tensor: gs.Tensor, through: Collection[str], outputs: set[int]) -> bool:
    """Whether a tensor, or what operators of `through` make of it, is an output of a graph."""
    return id(tensor) in outputs or any(
        _is_returned(result, through, outputs)
        for user in tensor.outputs
        if user.op in through
        for result in user.outputs
    )


def _step(node: gs.Node) -> tuple[gs.Tensor, float | None, bool] | None:
    """One node between QK^T and the softmax: the tensor above it, its scale factor, whether it masks."""
    if node.op in ("Cast", "Identity", "Reshape"):
        return node.inputs[0], None, False
    if node.op in ("Mul", "Div"):
        if _raises_rank(node):
            return None
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


def _raises_rank(node: gs.Node) -> bool:
    """Whether a Mul or Div by a number of more axes than the data has adds axes to it."""
    ranks = [size for tensor in node.inputs if (size := rank(tensor)) is not None and scalar(tensor) is None]
    numbers = [rank(tensor) or 0 for tensor in node.inputs if scalar(tensor) is not None]
    return bool(ranks and numbers) and max(numbers) > max(ranks)


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
        elif node.op in ("Mul", "Div", "Add", "Sub", "Concat"):
            stack.extend(node.inputs)
        elif node.op == "Where":
            stack.extend(node.inputs[1:])
    return False
