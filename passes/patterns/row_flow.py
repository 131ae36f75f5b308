"""For each operator, which elements of its inputs the needed elements of its output come from, axis by axis.

What is needed of a tensor is one array for each axis, as long as the axis: for each index `DEAD`, `ALWAYS`, or the
condition on which it is needed; None stands for an axis of which all is always needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.domains import STANDARD_DOMAINS
from pi05c.graph.runner import Array
from pi05c.graph.weights import array_of
from pi05c.passes.patterns.masked_keys import ALWAYS, DEAD
from pi05c.passes.patterns.walk import MOVING, origin, static_shape

Axis = Array | None
Need = tuple[Axis, ...]


@dataclass(frozen=True)
class Flow:
    """What a node reads and makes, given what is needed of its outputs.

    Attributes:
        reads: for each input.
        makes: for each output; at least what is needed.
    """

    reads: list[Need]
    makes: list[Need]


def indices(axis: Axis, size: int) -> Array:
    """The indices that are needed, ascending."""
    return np.arange(size) if axis is None else np.flatnonzero(axis != DEAD)


def union(left: Axis, right: Axis) -> Axis:
    """What either needs; on a condition only where both name the same, or one needs nothing."""
    if left is None or right is None:
        return None
    merged = np.where(
        left == right, left, np.where(left == DEAD, right, np.where(right == DEAD, left, ALWAYS))
    )
    return simple(merged)


def simple(axis: Axis) -> Axis:
    """None for an axis of which all is always needed."""
    return None if axis is None or bool((axis == ALWAYS).all()) else axis


def everything(rank: int) -> Need:
    """All of a tensor, always."""
    return (None,) * rank


def is_dead(axis: Axis) -> bool:
    """Whether no index of an axis is needed."""
    return axis is not None and bool((axis == DEAD).all())


def nothing(shape: Sequence[int]) -> Need:
    """No element of a tensor that has at least one axis."""
    return tuple(np.full(size, DEAD, np.int64) for size in shape)


def is_shrunk(need: Need) -> bool:
    """Whether some index of some axis is not needed."""
    return any(axis is not None and bool((axis == DEAD).any()) for axis in need)


def flow(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    """What a node reads for the needed part of its outputs; None where its operator or its shapes are not known."""
    if node.domain not in STANDARD_DOMAINS or node.op not in _FLOWS:
        return None
    tensors = [*(tensor for tensor in node.inputs if tensor.name), *node.outputs]
    if any(0 in (static_shape(tensor) or (0,)) and static_shape(tensor) != () for tensor in tensors):
        return None
    if len(outputs) != 1 and node.op != "Split":
        return None
    return _FLOWS[node.op](node, outputs)


def shape_of(tensor: gs.Tensor) -> tuple[int, ...]:
    """The shape of a tensor that `flow` has accepted; () for an input that is left out."""
    return static_shape(tensor) or ()


def selected_by(node: gs.Node) -> dict[int, Array] | None:
    """For a Slice with positive steps, or a Gather by constant indices, which indices it takes along which axis."""
    shape = shape_of(node.inputs[0])
    if node.op == "Gather":
        if not isinstance(node.inputs[1], gs.Constant):
            return None
        axis = node.attrs.get("axis", 0) % len(shape)
        taken = array_of(node.inputs[1])
        return {axis: np.where(taken < 0, taken + shape[axis], taken)}
    if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:] if tensor.name):
        return None
    starts, ends, *rest = (
        array_of(tensor).reshape(-1).tolist() if tensor.name else [] for tensor in node.inputs[1:]
    )
    axes, steps = [*rest, [], []][:2]
    axes, steps = axes or list(range(len(starts))), steps or [1] * len(starts)
    if any(step < 1 for step in steps):
        return None
    return {
        axis % len(shape): np.arange(shape[axis])[start:end:step]
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    }


def groups(inner: Sequence[int], outer: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The axes of two shapes of equal size that belong together, as Reshape keeps the order of elements."""
    if 0 in inner or 0 in outer:  # which of no elements belong together cannot be said
        return [(list(range(len(inner))), list(range(len(outer))))]
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(inner) or j < len(outer):
        left, right = ([i], [j]) if i < len(inner) and j < len(outer) else ([], [])
        i, j = i + len(left), j + len(right)
        if not left:  # what is left over has size 1
            left, right = list(range(i, len(inner))), list(range(j, len(outer)))
            i, j = len(inner), len(outer)
        sizes = [math.prod(inner[k] for k in left), math.prod(outer[k] for k in right)]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                left.append(i)
                sizes[0] *= inner[i]
                i += 1
            else:
                right.append(j)
                sizes[1] *= outer[j]
                j += 1
        found.append((left, right))
    return found


def _aligned(shape: tuple[int, ...], output: tuple[int, ...], need: Need) -> Need:
    """What is needed of an operand that broadcasts to the output."""
    offset = len(output) - len(shape)
    return tuple(
        need[offset + axis] if size == output[offset + axis] else None for axis, size in enumerate(shape)
    )


def _elementwise(node: gs.Node, outputs: Sequence[Need]) -> Flow:
    shape = shape_of(node.outputs[0])
    return Flow([_aligned(shape_of(t), shape, outputs[0]) for t in node.inputs], [outputs[0]])


def _matmul(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    return matmul(node, outputs[0], None)


def matmul(node: gs.Node, need: Need, contracted: Axis) -> Flow | None:
    """A MatMul of which only the indices `contracted` of the inner axis count.

    A weight keeps its columns: to shrink them would be another weight.
    """
    left, right = (shape_of(tensor) for tensor in node.inputs)
    if len(left) < 2 or len(right) < 2:
        return None
    batch = shape_of(node.outputs[0])[:-2]
    weight = isinstance(origin(node.inputs[1], MOVING), gs.Constant)
    *outer, rows, columns = need
    columns = None if weight else columns
    made = (*outer, rows, columns)
    return Flow(
        [
            (*_aligned(left[:-2], batch, tuple(outer)), rows, contracted),
            (*_aligned(right[:-2], batch, tuple(outer)), contracted, columns),
        ],
        [made],
    )


def _gemm(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    if node.attrs.get("transA"):
        return None
    made = (outputs[0][0], None)
    shape = shape_of(node.outputs[0])
    rest = [_aligned(shape_of(tensor), shape, made) for tensor in node.inputs[2:]]
    return Flow([made, everything(2), *rest], [made])


def _batchwise(node: gs.Node, outputs: Sequence[Need]) -> Flow:
    """Conv: the batch axis alone."""
    made = (outputs[0][0], *everything(len(outputs[0]) - 1))
    rest = [everything(len(shape_of(tensor))) for tensor in node.inputs[1:]]
    return Flow([(made[0], *everything(len(shape_of(node.inputs[0])) - 1)), *rest], [made])


def _transpose(node: gs.Node, outputs: Sequence[Need]) -> Flow:
    rank = len(outputs[0])
    perm = list(node.attrs.get("perm", range(rank)[::-1]))
    return Flow([tuple(outputs[0][perm.index(axis)] for axis in range(rank))], [outputs[0]])


def _reshape(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
        return None
    inner, outer = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if math.prod(inner) != math.prod(outer):
        return None  # one of the shapes that the file states is wrong
    read: list[Axis] = [None] * len(inner)
    made: list[Axis] = [None] * len(outer)
    for left, right in groups(inner, outer):
        sizes = [outer[axis] for axis in right]
        axes = [outputs[0][axis] for axis in right]
        if all(axis is None for axis in axes):
            continue
        flat = _flat(axes, sizes)
        hull = _projected(flat, [inner[axis] for axis in left])
        flat = _flat(hull, [inner[axis] for axis in left])
        again = _projected(flat, sizes)
        if not np.array_equal(_flat(again, sizes) == DEAD, flat == DEAD):
            continue  # no box of the input is a box of the output
        for axis, part in zip(left, hull, strict=True):
            read[axis] = simple(part)
        for axis, part in zip(right, again, strict=True):
            made[axis] = simple(part)
    return Flow([tuple(read), *(everything(len(shape_of(t))) for t in node.inputs[1:])], [tuple(made)])


def _flat(axes: Sequence[Axis], sizes: Sequence[int]) -> Array:
    """Axes that are merged into one."""
    flat = np.full((), ALWAYS, np.int64)
    for axis, size in zip(axes, sizes, strict=True):
        part = np.full(size, ALWAYS) if axis is None else axis
        outer = flat[..., None]
        both = np.where(outer == ALWAYS, part, np.where((part == ALWAYS) | (part == outer), outer, ALWAYS))
        flat = np.where((outer == DEAD) | (part == DEAD), DEAD, both)
    return flat.reshape(-1)


def _projected(flat: Array, sizes: Sequence[int]) -> list[Array]:
    """For each axis of a box what is needed of it, if `flat` is needed of its elements."""
    box = flat.reshape(list(sizes))
    found = []
    for axis, size in enumerate(sizes):
        rows = np.moveaxis(box, axis, 0).reshape(size, -1)
        alive = rows != DEAD
        high = np.max(rows, axis=1)
        same = (~alive | (rows == high[:, None])).all(axis=1)
        found.append(np.where(same, high, ALWAYS))
    return found


def _expand(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    if not isinstance(node.inputs[1], gs.Constant):
        return None
    need = _aligned(shape_of(node.inputs[0]), shape_of(node.outputs[0]), outputs[0])
    return Flow([need, everything(1)], [outputs[0]])


def _tile(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    if not isinstance(node.inputs[1], gs.Constant):
        return None
    source, result = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    made = tuple(
        need if old in (new, 1) else None for need, old, new in zip(outputs[0], source, result, strict=True)
    )
    read = tuple(need if old == new else None for need, old, new in zip(made, source, result, strict=True))
    return Flow([read, everything(1)], [made])


def _concat(node: gs.Node, outputs: Sequence[Need]) -> Flow:
    need = outputs[0]
    axis = node.attrs["axis"] % len(need)
    reads: list[Need] = []
    start = 0
    for tensor in node.inputs:
        size = shape_of(tensor)[axis]
        part = need[axis]
        piece = None if part is None else simple(part[start : start + size])
        reads.append((*need[:axis], piece, *need[axis + 1 :]))
        start += size
    return Flow(reads, [need])


def _split(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    """An output that nobody reads is needed nowhere along the axis; it makes nothing."""
    source = shape_of(node.inputs[0])
    axis = node.attrs.get("axis", 0) % len(source)
    if len(node.inputs) > 1 and not isinstance(node.inputs[1], gs.Constant):
        return None
    sizes = [shape_of(tensor)[axis] for tensor in node.outputs]
    parts = [
        np.full(size, ALWAYS) if need[axis] is None else need[axis]
        for need, size in zip(outputs, sizes, strict=True)
    ]
    alive = [need for need in outputs if not any(is_dead(part) for part in need)]
    rest = [
        None if other == axis else _union_of([need[other] for need in alive]) for other in range(len(source))
    ]
    makes = [(*rest[:axis], simple(part), *rest[axis + 1 :]) for part in parts]
    read = (*rest[:axis], simple(np.concatenate(parts)), *rest[axis + 1 :])
    return Flow([read, *(everything(1) for _ in node.inputs[1:])], makes)


def _union_of(axes: Sequence[Axis]) -> Axis:
    result = axes[0]
    for axis in axes[1:]:
        result = union(result, axis)
    return result


def _select(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    """Slice, and Gather by constant indices."""
    taken = selected_by(node)
    if taken is None:
        return _lookup(node, outputs) if node.op == "Gather" else None
    shape = shape_of(node.inputs[0])
    need = list(outputs[0])
    if node.op == "Gather":
        ((axis, chosen),) = taken.items()
        if chosen.ndim > 1:
            return None
        if chosen.ndim == 0:
            need.insert(axis, None)
    for axis, chosen in taken.items():
        wanted = need[axis]
        read = np.full(shape[axis], DEAD, np.int64)
        for place, index in enumerate(np.atleast_1d(chosen)):
            condition = ALWAYS if wanted is None else wanted[place]
            if condition != DEAD:
                read[index] = condition if read[index] in (DEAD, condition) else ALWAYS
        need[axis] = simple(read)
    return Flow([tuple(need), *(everything(len(shape_of(t))) for t in node.inputs[1:])], [outputs[0]])


def _lookup(node: gs.Node, outputs: Sequence[Need]) -> Flow:
    """Gather of rows of a table that only a run knows."""
    need, rank = outputs[0], len(shape_of(node.inputs[1]))
    axis = node.attrs.get("axis", 0) % len(shape_of(node.inputs[0]))
    table = (*need[:axis], None, *need[axis + rank :])
    return Flow([table, need[axis : axis + rank]], [need])


def _normalized(node: gs.Node, outputs: Sequence[Need]) -> Flow:
    """LayerNormalization, RMSNormalization, Softmax: all along the normalized axes, one by one along the others.

    Weight and bias of a norm broadcast to its data.
    """
    rank = len(outputs[0])
    first = node.attrs.get("axis", -1) % rank
    many = node.op not in ("Softmax", "LogSoftmax")
    made = tuple(
        None if axis == first or (many and axis > first) else need for axis, need in enumerate(outputs[0])
    )
    shape = shape_of(node.outputs[0])
    return Flow([made, *(_aligned(shape_of(tensor), shape, made) for tensor in node.inputs[1:])], [made])


def reduced_axes(node: gs.Node) -> list[int] | None:
    """The axes that a reduction or a CumSum runs over; None where they are not known."""
    rank = len(shape_of(node.inputs[0]))
    axes = node.attrs.get("axes")
    if len(node.inputs) > 1 and node.inputs[1].name:
        if not isinstance(node.inputs[1], gs.Constant):
            return None
        axes = array_of(node.inputs[1]).reshape(-1).tolist()
    if axes is None or len(axes) == 0:
        return [] if node.attrs.get("noop_with_empty_axes") else list(range(rank))
    return [axis % rank for axis in axes]


def _reduction(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    axes = reduced_axes(node)
    if axes is None:
        return None
    need = list(outputs[0])
    if not node.attrs.get("keepdims", 1):
        for axis in sorted(axes):
            need.insert(axis, None)
    read = tuple(None if axis in axes else part for axis, part in enumerate(need))
    return Flow([read, *(everything(len(shape_of(tensor))) for tensor in node.inputs[1:])], [outputs[0]])


def _cumulative(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    if not isinstance(node.inputs[1], gs.Constant):
        return None
    axis = int(array_of(node.inputs[1]).reshape(-1)[0]) % len(outputs[0])
    made = tuple(None if index == axis else need for index, need in enumerate(outputs[0]))
    return Flow([made, everything(len(shape_of(node.inputs[1])))], [made])


def _quantization(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    if any(math.prod(shape_of(tensor)) != 1 for tensor in node.inputs[1:]):
        return None
    return Flow([outputs[0], *(everything(len(shape_of(t))) for t in node.inputs[1:])], [outputs[0]])


def _rotation(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    """RotaryEmbedding of [B, heads, S, d] or [B, S, width] by tables of [B, S, d / 2]."""
    if len(node.inputs) != 3:
        return None
    need, rows = outputs[0], len(outputs[0]) - 2
    made = (*need[:-1], None)
    return Flow([made, *([(need[0], need[rows], None)] * 2)], [made])


def _attention(node: gs.Node, outputs: Sequence[Need]) -> Flow | None:
    """Attention as one operator: its query rows."""
    ranks = {len(shape_of(tensor)) for tensor in node.inputs[:3]}
    if ranks != {4} or len(node.inputs) > 4 or node.attrs.get("is_causal"):
        return None
    rows = outputs[0][2]
    made = (None, None, rows, None)
    rest = [everything(len(shape_of(tensor))) for tensor in node.inputs[1:]]
    if len(node.inputs) == 4 and node.inputs[3].name:
        shape = shape_of(node.inputs[3])
        rest[2] = (
            *everything(len(shape) - 2),
            rows if shape[-2] == shape_of(node.outputs[0])[2] else None,
            None,
        )
    return Flow([made, *rest], [made])


_FLOWS: dict[str, Callable[[gs.Node, Sequence[Need]], Flow | None]] = {
    **dict.fromkeys(
        (
            *(
                "Abs",
                "Cast",
                "Ceil",
                "Clip",
                "Cos",
                "Elu",
                "Erf",
                "Exp",
                "Floor",
                "Gelu",
                "Identity",
                "IsNaN",
                "Log",
            ),
            *(
                "Neg",
                "Not",
                "Reciprocal",
                "Relu",
                "Round",
                "Sigmoid",
                "Sign",
                "Sin",
                "Softplus",
                "Sqrt",
                "Swish",
            ),
            *(
                "Tanh",
                "Add",
                "And",
                "Div",
                "Equal",
                "Greater",
                "GreaterOrEqual",
                "Less",
                "LessOrEqual",
                "Max",
                "Min",
            ),
            *("Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor"),
        ),
        _elementwise,
    ),
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), _reshape),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax"), _normalized),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"), _reduction),
    **dict.fromkeys(("ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"), _reduction),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantization),
    **dict.fromkeys(("Slice", "Gather"), _select),
    "Attention": _attention,
    "Concat": _concat,
    "Conv": _batchwise,
    "CumSum": _cumulative,
    "Expand": _expand,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "RotaryEmbedding": _rotation,
    "Split": _split,
    "Tile": _tile,
    "Transpose": _transpose,
}
"""By operator (ONNX operator specification, opset 13 to 24)."""
