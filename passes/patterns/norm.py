"""RMSNorm, adaRMS and LayerNorm, as operators or as their arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import FLOAT32, to_numpy
from pi05c.graph.edit import producer
from pi05c.graph.runner import Array
from pi05c.graph.weights import array_of
from pi05c.passes.patterns.region import Region
from pi05c.passes.patterns.walk import (
    ROUNDING,
    consumers,
    each_node,
    made_by,
    origin,
    output_ids,
    scalar,
    stored_vector,
)

_OPERATORS = {
    "LayerNormalization": "LayerNorm",
    "RMSNormalization": "RMSNorm",
    "SimplifiedLayerNormalization": "RMSNorm",
}

LARGEST_EPSILON = 1e-2
"""A constant added to a variance is taken for an epsilon up to this size; trained models use 1e-12 to 1e-3."""


@dataclass(frozen=True)
class PerChannel:
    """A factor or summand with one value for each channel.

    Attributes:
        node: the Mul, the Add or the operator of the whole norm that reads it, as `inputs[index]`.
        stored: the initializer behind it; None where it is computed, rounded on the way, or not a vector.
        plus_one: whether one is added to it on the way (Gemma's 1 + w, adaRMS's 1 + scale).
    """

    node: gs.Node
    index: int
    stored: gs.Constant | None
    plus_one: bool = False

    @property
    def values(self) -> Array | None:
        """The vector as the node reads it, float32 [channels]; None where nothing is stored."""
        if self.stored is None:
            return None
        vector = array_of(self.stored).astype(np.float32).reshape(-1)
        return vector + np.float32(1) if self.plus_one else vector


@dataclass(frozen=True)
class Norm(Region):
    """One normalization: statistics, division, and multiplication and addition of weight, scale, bias or shift.

    Attributes:
        kind: `RMSNorm`, `adaRMS` (its scale or shift is no constant of the channel's size alone) or `LayerNorm`.
        weight: the weight or, of adaRMS, 1 + scale; None where the norm has none.
        bias: the bias or, of adaRMS, the shift; None where the norm has none.
    """

    kind: str
    weight: PerChannel | None = None
    bias: PerChannel | None = None

    @property
    def rounds(self) -> bool:
        """Whether anything from the division on is in another type than float32."""
        parts = [part.node for part in (self.weight, self.bias) if part is not None]
        made = [tensor for node in parts for tensor in (*node.inputs, node.outputs[0]) if tensor.name]
        casts = [node.outputs[0] for node in self.nodes if node.op == "Cast"]
        return any(to_numpy(tensor.dtype) != FLOAT32 for tensor in (*made, *casts, self.output))


def find_norms(graph: gs.Graph) -> list[Norm]:
    """Every normalization over the last axis, in execution order of their statistics."""
    found = []
    outputs = output_ids(graph)
    for scope, node in each_node(graph, "ReduceMean", *_OPERATORS):
        if node.op in _OPERATORS:
            found.append(_from_operator(scope, node))
        elif (match := _from_mean_of_squares(scope, node, outputs)) is not None:
            found.append(match)
    return found


def _from_operator(scope: gs.Graph, node: gs.Node) -> Norm:
    channels = _channels(node.inputs[0])
    read = [
        PerChannel(node, index, stored_vector(tensor, channels)) if tensor.name else None
        for index, tensor in enumerate(node.inputs[1:3], 1)
    ]
    weight, bias, *_ = (*read, None, None)
    return Norm(scope, (node,), node.inputs[0], node.outputs[0], _OPERATORS[node.op], weight, bias)


def _channels(tensor: gs.Tensor) -> int:
    """The size of the last axis, -1 where it is not known."""
    last = tensor.shape[-1] if tensor.shape else None
    return int(last) if isinstance(last, (int, np.integer)) else -1


def _from_mean_of_squares(scope: gs.Graph, mean: gs.Node, outputs: set[int]) -> Norm | None:
    square = producer(mean.inputs[0])
    if square is None:
        return None
    by_power = square.op == "Pow" and scalar(square.inputs[1]) == 2
    if not by_power and not (square.op == "Mul" and square.inputs[0] is square.inputs[1]):
        return None
    value = square.inputs[0]
    nodes = [square, mean]
    reciprocal = _one_over_root(mean.outputs[0], nodes)
    if reciprocal is None:
        return None
    root, inverse = reciprocal
    scaled = None
    for user in consumers(root):
        others = [t for t in user.inputs if origin(t) is not root]
        wanted = ("Mul",) if inverse else ("Div",)
        if user.op in wanted and len(others) == 1 and origin(others[0]) is origin(value):
            scaled = user
    if scaled is None:
        return None
    nodes.append(scaled)
    kind, start = "RMSNorm", origin(value)
    centre = producer(start)
    if centre is not None and centre.op == "Sub":
        inner = made_by(centre.inputs[1], "ReduceMean")
        if inner is not None and origin(inner.inputs[0]) is origin(centre.inputs[0]):
            nodes[:0] = [inner, centre]
            kind, start = "LayerNorm", origin(centre.inputs[0])
    output, parts, adaptive = _affine(scaled.outputs[0], nodes, outputs)
    if kind == "RMSNorm" and adaptive:
        kind = "adaRMS"
    return Norm(scope, tuple(nodes), start, output, kind, parts.get("Mul"), parts.get("Add"))


def _one_over_root(variance: gs.Tensor, nodes: list[gs.Node]) -> tuple[gs.Tensor, bool] | None:
    """Follow `variance + eps` through its square root; the result and whether it is the reciprocal already."""
    users = consumers(variance)
    if len(users) != 1 or users[0].op != "Add":
        return None
    add = users[0]
    epsilon = [value for tensor in add.inputs if (value := scalar(tensor)) is not None]
    if len(epsilon) != 1 or not 0 < epsilon[0] <= LARGEST_EPSILON:
        return None
    nodes.append(add)
    users = consumers(add.outputs[0])
    if len(users) != 1:
        return None
    root = users[0]
    if root.op == "Pow" and scalar(root.inputs[1]) in (0.5, -0.5):
        nodes.append(root)
        return root.outputs[0], scalar(root.inputs[1]) == -0.5
    if root.op != "Sqrt":
        return None
    nodes.append(root)
    users = consumers(root.outputs[0])
    if len(users) == 1 and (
        users[0].op == "Reciprocal" or (users[0].op == "Div" and scalar(users[0].inputs[0]) == 1)
    ):
        nodes.append(users[0])
        return users[0].outputs[0], True
    return root.outputs[0], False


def _affine(
    tensor: gs.Tensor, nodes: list[gs.Node], outputs: set[int]
) -> tuple[gs.Tensor, dict[str, PerChannel], bool]:
    """Take the weight's or scale's Mul and the bias' or shift's Add that follow into `nodes`.

    It ends before what has another reader, as an output has.

    Returns:
        The last result, what each operator reads, and whether any of it is no constant.
    """
    adaptive = False
    parts: dict[str, PerChannel] = {}
    for op in ("Mul", "Add"):
        users = tensor.outputs
        casts: list[gs.Node] = []
        while len(users) == 1 and users[0].op in ROUNDING:
            casts.append(users[0])
            users = users[0].outputs[0].outputs
        if any(id(made) in outputs for made in (tensor, *(cast.outputs[0] for cast in casts))):
            break
        if len(users) != 1 or users[0].op != op or len(users[0].inputs) != 2:
            break
        user = users[0]
        other = next((t for t in user.inputs if origin(t) is not origin(tensor)), None)
        if other is None or not _modulates(other, user.outputs[0]):
            break
        above = producer(origin(other))
        if op == "Mul" and above is not None and above.op == "Add" and _adds_one(above):
            nodes.append(above)
        adaptive = adaptive or not (isinstance(origin(other), gs.Constant) or _weight_plus_one(above))
        nodes.extend([*casts, user])
        parts[op] = _per_channel(user, other)
        tensor = user.outputs[0]
    return tensor, parts, adaptive


def _per_channel(node: gs.Node, read: gs.Tensor) -> PerChannel:
    index = 0 if node.inputs[0] is read else 1
    channels = _channels(node.outputs[0])
    above = producer(read)
    if above is not None and above.op == "Add" and _adds_one(above) and to_numpy(read.dtype) == FLOAT32:
        sides = [tensor for tensor in above.inputs if scalar(tensor) != 1]
        if len(sides) == 1:
            return PerChannel(node, index, stored_vector(sides[0], channels), plus_one=True)
    return PerChannel(node, index, stored_vector(read, channels))


def _modulates(other: gs.Tensor, result: gs.Tensor) -> bool:
    """Whether a factor or summand has one value a channel: its last axis is the result's, the one before is 1."""
    shape, whole = other.shape, result.shape
    if shape is None or whole is None or not shape or not whole:
        return False
    return bool(shape[-1] in (whole[-1], 1) and (len(shape) == 1 or len(whole) < 2 or shape[-2] == 1))


def _adds_one(node: gs.Node) -> bool:
    return any(scalar(tensor) == 1 for tensor in node.inputs)


def _weight_plus_one(node: gs.Node | None) -> bool:
    """Gemma's (1 + weight)."""
    return (
        node is not None
        and node.op == "Add"
        and all(isinstance(origin(tensor), gs.Constant) for tensor in node.inputs)
    )
