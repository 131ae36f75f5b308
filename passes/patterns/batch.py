"""Which operators compute each entry along axis 0 by itself, so that several runs of one can be one run."""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from pi05c.graph.domains import STANDARD_DOMAINS
from pi05c.passes.patterns.walk import constant_integers, static_shape

Batched = frozenset[int]
"""Positions of the inputs that carry the batch."""

RESHAPES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators that keep the elements in row-major order. Values that are stacked along axis 0 lie one after another,
so their reshapes do too, whatever becomes of axis 0."""

_ELEMENTWISE = frozenset(
    {"Abs", "Cast", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish"}
    | {"Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid"}
    | {"Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Tanh", "ThresholdedRelu", "IsNaN", "IsInf"}
    | {"Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Mean", "Sum", "PRelu", "Where"}
    | {"And", "Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
)

_MOVES = "moves the batch axis"
_MIXES = "mixes the entries of the batch"
_OTHER = "reads the views by another input than its first"


def batch_obstacle(node: gs.Node, batched: Batched) -> str:
    """Why a node does not keep axis 0 of its `batched` inputs as a batch axis; empty where it does.

    It keeps it if, given values that are concatenated along axis 0 (for a reshape or Expand: with its target shape
    adapted), its outputs are those of the single values, concatenated along axis 0. Inputs outside `batched` are the
    same for all. Shapes must be static.
    """
    rule = _RULES.get(node.op) if node.domain in STANDARD_DOMAINS else None
    if rule is None:
        return "is not known to keep a batch axis"
    for tensor in (*(node.inputs[index] for index in batched), *node.outputs):
        if tensor.name and static_shape(tensor) is None:
            return f"has {tensor.name!r}, whose shape is not static"
        if tensor.name and not static_shape(tensor):
            return f"has {tensor.name!r}, which has no axes"
    return rule(node, batched)


def _reshape(node: gs.Node, batched: Batched) -> str:
    return "" if batched == {0} else _OTHER


def _expand(node: gs.Node, batched: Batched) -> str:
    source, result = static_shape(node.inputs[0]) or (), static_shape(node.outputs[0]) or ()
    if batched != {0}:
        return _OTHER
    return "" if len(source) == len(result) and source[0] == result[0] else "repeats along the batch axis"


def _elementwise(node: gs.Node, batched: Batched) -> str:
    result = static_shape(node.outputs[0]) or ()
    for index, tensor in enumerate(node.inputs):
        if not tensor.name:
            continue
        shape = static_shape(tensor)
        if shape is None:
            return f"reads {tensor.name!r}, whose shape is not static"
        if index in batched and (len(shape) != len(result) or shape[0] != result[0]):
            return f"broadcasts {tensor.name!r} along the batch axis"
        if index not in batched and len(shape) == len(result) and shape[0] != 1:
            return f"reads {tensor.name!r}, which has an entry for each of the batch"
    return ""


def _matmul(node: gs.Node, batched: Batched) -> str:
    shapes = [static_shape(tensor) for tensor in node.inputs[:2]]
    if shapes[0] is None or shapes[1] is None:
        return "has a factor whose shape is not static"
    left, right = shapes[0], shapes[1]
    if batched == {0, 1}:
        same = len(left) == len(right) >= 3 and left[0] == right[0]
        return "" if same else _MIXES
    if batched == {0} and len(left) >= 2 and len(right) == 2:
        return ""  # the batch is among the rows
    mine, other = (left, right) if batched == {0} else (right, left)
    if len(mine) < 3:
        return _MIXES
    return "" if 2 <= len(other) < len(mine) or (len(other) == len(mine) and other[0] == 1) else _MIXES


def _gemm(node: gs.Node, batched: Batched) -> str:
    if batched != {0} or node.attrs.get("transA"):
        return _MIXES
    added = static_shape(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else ()
    if added is None or (len(added) == 2 and added[0] != 1):
        return f"adds {node.inputs[2].name!r}, which has an entry for each of the batch"
    return ""


def _images(node: gs.Node, batched: Batched) -> str:
    """Operators on [N, C, ...] whose other inputs are parameters."""
    return "" if batched == {0} and len(static_shape(node.inputs[0]) or ()) >= 3 else _OTHER


def _max_pool(node: gs.Node, batched: Batched) -> str:
    if len(node.outputs) > 1 and node.outputs[1].name:
        return "counts its indices from the start of the batch"
    return _images(node, batched)


def _batch_norm(node: gs.Node, batched: Batched) -> str:
    return _MIXES if node.attrs.get("training_mode") else _images(node, batched)


def _along(default: int, crossing: str) -> Callable[[gs.Node, Batched], str]:
    """Operators that work along the axis of their attribute, or from it on, and leave the axes before it alone."""

    def rule(node: gs.Node, batched: Batched) -> str:
        if batched != {0}:
            return _OTHER
        rank = len(static_shape(node.inputs[0]) or ())
        return crossing if int(node.attrs.get("axis", default)) % rank == 0 else ""

    return rule


def _norm(node: gs.Node, batched: Batched) -> str:
    """Weight and bias broadcast to the data."""
    return _along(-1, _MIXES)(node, batched) or _elementwise(node, batched)


def _concat(node: gs.Node, batched: Batched) -> str:
    rank = len(static_shape(node.outputs[0]) or ())
    if len(batched) != len(node.inputs):
        return "puts something beside the views that is the same for all"
    return _MIXES if int(node.attrs["axis"]) % rank == 0 else ""


def _reduce(node: gs.Node, batched: Batched) -> str:
    rank = len(static_shape(node.inputs[0]) or ())
    axes = constant_integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
    if batched != {0} or not axes:
        return _MIXES
    return _MIXES if any(axis % rank == 0 for axis in axes) else ""


def _slice(node: gs.Node, batched: Batched) -> str:
    rank = len(static_shape(node.inputs[0]) or ())
    axes = constant_integers(node.inputs[3]) if len(node.inputs) > 3 else None
    if batched != {0} or axes is None:
        return "takes a part along axes that are not constants"
    return "takes a part of the batch" if any(axis % rank == 0 for axis in axes) else ""


def _transpose(node: gs.Node, batched: Batched) -> str:
    rank = len(static_shape(node.inputs[0]) or ())
    first, *_ = node.attrs.get("perm", range(rank)[::-1])
    return "" if first == 0 else _MOVES


_RULES: dict[str, Callable[[gs.Node, Batched], str]] = {
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("Conv", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _images),
    "MaxPool": _max_pool,
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization"), _images),
    "BatchNormalization": _batch_norm,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Expand": _expand,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _along(0, "splits the batch"),
    "Gather": _along(0, "takes a part of the batch"),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _along(-1, _MIXES)),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _norm),
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceSumSquare", "ReduceL2"), _reduce
    ),
}
