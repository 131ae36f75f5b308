"""Rotary position embedding, half-split, as the operator or as its arithmetic, and the angles it reads."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.passes.patterns.region import Region
from pi05c.passes.patterns.walk import each_node, made_by, origin


class Rope(Region):
    """One rotation: slices of the unrotated tensor, products with cosine and sine, sum, concatenation."""


def find_rope(graph: gs.Graph) -> list[Rope]:
    """Every rotation, in execution order of its last node.

    Three spellings: `RotaryEmbedding`; `x * cos + Concat(-x2, x1) * sin`; `Concat(x1 * cos - x2 * sin,
    x2 * cos + x1 * sin)`; x1 and x2 being the halves of x by Slice or Split.
    """
    found = []
    for scope, node in each_node(graph, "RotaryEmbedding", "Add", "Concat"):
        if node.op == "RotaryEmbedding":
            found.append(Rope(scope, (node,), node.inputs[0], node.outputs[0]))
            continue
        match = _rotate_half(node) if node.op == "Add" else _rotate_parts(node)
        if match is not None:
            nodes, source = match
            found.append(Rope(scope, tuple(nodes), source, node.outputs[0]))
    return found


def _rotate_half(add: gs.Node) -> tuple[list[gs.Node], gs.Tensor] | None:
    """x * cos + Concat(-x2, x1) * sin."""
    products = [made_by(tensor, "Mul") for tensor in add.inputs]
    for straight, crossed in (products, products[::-1]):
        if straight is None or crossed is None:
            continue
        for turned in crossed.inputs:
            concat = made_by(turned, "Concat")
            if concat is None or len(concat.inputs) != 2:
                continue
            negative = made_by(concat.inputs[0], "Neg")
            if negative is None:
                continue
            second, first = _half(negative.inputs[0]), _half(concat.inputs[1])
            if second is None or first is None or second[0] is not first[0]:
                continue
            source = first[0]
            if any(origin(tensor) is source for tensor in straight.inputs):
                return [*_unique(first[1], second[1]), negative, concat, straight, crossed, add], source
    return None


def _rotate_parts(concat: gs.Node) -> tuple[list[gs.Node], gs.Tensor] | None:
    """Concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)."""
    if len(concat.inputs) != 2:
        return None
    minus, plus = made_by(concat.inputs[0], "Sub"), made_by(concat.inputs[1], "Add")
    if minus is None or plus is None:
        return None
    products = [made_by(tensor, "Mul") for tensor in (*minus.inputs, *plus.inputs)]
    halves = []
    for product in products:
        sides = [half for tensor in product.inputs if (half := _half(tensor)) is not None] if product else []
        if not sides:
            return None
        halves.append(sides[0])
    if len({id(source) for source, _ in halves}) != 1:
        return None
    if len({id(half.outputs[0]) for _, half in halves}) > 2:
        return None
    slices = _unique(*(half for _, half in halves))
    return [*slices, *(product for product in products if product is not None), minus, plus, concat], halves[
        0
    ][0]


def _half(tensor: gs.Tensor) -> tuple[gs.Tensor, gs.Node] | None:
    """The tensor of which this is a slice, and the node that slices."""
    node = made_by(tensor, "Slice", "Split")
    return None if node is None else (origin(node.inputs[0]), node)


def _unique(*nodes: gs.Node) -> list[gs.Node]:
    return list({id(node): node for node in nodes}.values())


def find_angles(graph: gs.Graph) -> list[tuple[gs.Graph, tuple[gs.Node, ...]]]:
    """For each Cos and Sin: the float arithmetic above it, back to integers, constants and inputs, and itself.

    It is the path of positions and of the denoising time, whose phase needs float32: at position 967 a float16
    angle is off by up to 0.25.
    """
    found = []
    for scope, node in each_node(graph, "Cos", "Sin"):
        nodes, stack, seen = [node], list(node.inputs), {id(node)}
        while stack:
            above = producer(stack.pop())
            if above is None or id(above) in seen or above.op not in _ANGLE_ARITHMETIC:
                continue
            seen.add(id(above))
            nodes.append(above)
            stack.extend(above.inputs)
        found.append((scope, tuple(nodes[::-1])))
    return found


_ANGLE_ARITHMETIC = frozenset(
    {
        "Mul",
        "Div",
        "Add",
        "Sub",
        "Pow",
        "Exp",
        "Reciprocal",
        "MatMul",
        "Cast",
        "Unsqueeze",
        "Squeeze",
        "Reshape",
    }
    | {"Transpose", "Concat", "Expand", "Slice", "Identity", "Einsum", "Gather"}
)
