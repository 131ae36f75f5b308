"""Finds in a rewritten graph what one kernel computes: FP8 linears, linears of few rows, attention of few rows.

The graph is changed in place: a pattern becomes one node of the domain `pi05c`, which only the torch backend knows.
What is computed stays the same, roundings included; `torch_kernels` says how.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import FLOAT8E4M3FN, FLOAT16, FLOAT32, LARGEST, to_numpy
from pi05c.graph.edit import producer, remove_dead
from pi05c.graph.runner import Array
from pi05c.graph.sort import sort_graph
from pi05c.graph.weights import array_of

DOMAIN = "pi05c"
ROW_LINEAR, SCALED_MATMUL, ROW_ATTENTION, ATTENTION = "RowLinear", "ScaledMatMul", "RowAttention", "Attention"

MAX_ROWS = 64
"""Rows up to which a linear is bound by reading its weight, so that one kernel may recompute what precedes it."""

ALIGNMENT = 16
"""Sizes that FP8 products take are multiples of it (cuBLASLt), and tiles of the row kernels are too."""

_WHOLE = 0.99
"""Probability that the codes must reach: a kernel that takes parts of a softmax rounds the largest of each as 1."""


@dataclass
class Factor:
    """A factor of a product in FP8: the codes, and the scale that they are to be multiplied with, or one a column."""

    codes: gs.Tensor
    scale: Array

    @property
    def one(self) -> float | None:
        """The scale, where there is one for all."""
        return float(self.scale[0]) if self.scale.size == 1 else None


@dataclass
class _Fusion:
    """One node to be made."""

    op: str
    inputs: list[gs.Tensor]
    output: gs.Tensor
    attrs: dict[str, Any] = field(default_factory=dict)


def fuse(graph: gs.Graph) -> dict[str, int]:
    """Replace what is found; how often, by name."""
    counts: dict[str, int] = {}
    outputs = {id(tensor) for tensor in graph.outputs}
    _join_row_linears(graph)
    for find in (_row_attention, _attention, _linear):
        for node in list(graph.nodes):
            found = find(node, outputs) if node.outputs else None
            if found is None:
                continue
            made = found.output.inputs[0]
            made.outputs.clear()
            name = f"{made.name}.{found.op}"
            graph.nodes.append(
                gs.Node(found.op, name, found.attrs, found.inputs, [found.output], domain=DOMAIN)
            )
            counts[found.op] = counts.get(found.op, 0) + 1
        remove_dead(graph)
    if counts:
        sort_graph(graph)
        _quantize_where_made(graph, outputs)
    return counts


def _quantize_where_made(graph: gs.Graph, outputs: set[int]) -> None:
    """Give what linears of few rows quantize, all by one scale, as codes by the node that makes it."""
    for node in fused_nodes(graph):
        result = node.outputs[0]
        if node.op not in (ROW_LINEAR, ROW_ATTENTION) or id(result) in outputs:
            continue
        scales = {_scale_read_by(reader, result) for reader in result.outputs}
        if len(scales) == 1 and (scale := scales.pop()) is not None:
            node.attrs["out_scale"] = scale
            result.dtype = FLOAT8E4M3FN


def _scale_read_by(node: gs.Node, tensor: gs.Tensor) -> float | None:
    """The scale that a linear of few rows quantizes a tensor by, before anything else."""
    if node.op != ROW_LINEAR or "norm_scale" in node.attrs["names"]:
        return None
    uses = [name for name, item in zip(node.attrs["names"], node.inputs, strict=True) if item is tensor]
    return node.attrs["scale"] if uses == ["x"] else None


def _join_row_linears(graph: gs.Graph) -> None:
    """Give linears of few rows that read one tensor one joined weight, each column with the scale that it had."""
    joined: dict[tuple[int, ...], gs.Tensor] = {}
    for tensor in [tensor for node in graph.nodes for tensor in node.outputs]:
        rows = _rows(tensor)
        if rows is None or rows > MAX_ROWS:
            continue
        group = [node for node in tensor.outputs if node.op == "MatMul" and node.inputs[0] is tensor]
        factors = [_weight(node.inputs[1]) for node in group]
        if len(group) < 2 or any(factor is None for factor in factors):
            continue
        key = tuple(id(node.inputs[1]) for node in group)
        if key not in joined:
            joined[key] = _joined(graph, [node.inputs[1] for node in group], factors)  # type: ignore[arg-type]
        sizes = [int(node.outputs[0].shape[-1]) for node in group]
        shape = [*(tensor.shape or ())[:-1], sum(sizes)]
        name = f"{group[0].name}.joined"
        result = gs.Variable(name, group[0].outputs[0].dtype, shape)
        split = gs.Constant(f"{name}.sizes", np.array(sizes, np.int64))
        pieces = [node.outputs[0] for node in group]
        for node in group:
            node.inputs.clear()
            node.outputs.clear()
        graph.nodes.append(gs.Node("MatMul", name, {}, [tensor, joined[key]], [result]))
        graph.nodes.append(
            gs.Node("Split", f"{name}.Split", {"axis": len(shape) - 1}, [result, split], pieces)
        )
    if joined:
        remove_dead(graph)
        sort_graph(graph)


def _joined(graph: gs.Graph, weights: list[gs.Tensor], factors: list[Factor]) -> gs.Tensor:
    name = f"{factors[0].codes.name}.joined"
    values = np.concatenate([array_of(factor.codes) for factor in factors], axis=1)
    codes = gs.Constant(name, values)
    if all(weight is factor.codes for weight, factor in zip(weights, factors, strict=True)):
        return codes
    scale_dtype = to_numpy(producer(weights[0]).inputs[1].dtype)  # type: ignore[union-attr]
    columns = [np.broadcast_to(factor.scale, factor.codes.shape[1]) for factor in factors]
    scale = gs.Constant(f"{name}.scale", np.concatenate(columns).astype(scale_dtype))
    result = gs.Variable(f"{name}.dequantized", scale_dtype, list(values.shape))
    graph.nodes.append(gs.Node("DequantizeLinear", f"{name}.DQ", {"axis": 1}, [codes, scale], [result]))
    return result


def _weight(tensor: gs.Tensor) -> Factor | None:
    """A constant matrix in float16 or FP8."""
    found = _quantized(tensor)
    if found is None and to_numpy(tensor.dtype) == FLOAT16:
        found = Factor(tensor, np.ones(1, np.float32))
    if found is None or not isinstance(found.codes, gs.Constant) or len(found.codes.shape) != 2:
        return None
    return found


def _linear(node: gs.Node, outputs: set[int]) -> _Fusion | None:
    """A MatMul with a constant weight: of few rows with what surrounds it, else in FP8."""
    if node.op != "MatMul":
        return None
    x, factor = node.inputs
    weight = _weight(factor)
    rows = _rows(x)
    activation = _quantized(x)
    if weight is None or rows is None or to_numpy(node.outputs[0].dtype) != FLOAT16:
        return None
    inner, outer = weight.codes.shape
    if inner % ALIGNMENT or outer % ALIGNMENT or (activation is None) != (weight.codes is factor):
        return None
    if activation is not None and activation.one is None:
        return None
    if rows <= MAX_ROWS:
        return _row_linear(node, weight, activation, outputs)
    if activation is None or weight.one is None:
        return None
    return _Fusion(
        SCALED_MATMUL,
        [activation.codes, weight.codes],
        node.outputs[0],
        {"names": ("codes", "weight"), "scale": activation.one, "weight_scale": weight.one},
    )


def _row_linear(
    node: gs.Node, weight: Factor, activation: Factor | None, outputs: set[int]
) -> _Fusion | None:
    """[norm, modulation, quantize,] MatMul [, bias][, gated GELU][, gate, residual] as one node."""
    inner, outer = weight.codes.shape
    attrs: dict[str, Any] = {"weight_scale": weight.scale, "scale": None, "epsilon": None, "gated": False}
    x = node.inputs[0]
    named: dict[str, gs.Tensor] = {"weight": weight.codes}
    if activation is not None:
        attrs["scale"] = activation.one
        quantizer = _made_by(activation.codes, "QuantizeLinear")
        if quantizer is None:
            return None
        x = quantizer.inputs[0]
    if (norm := _norm(x, inner)) is not None:
        x, attrs["epsilon"], scale, shift = norm
        named |= {"norm_scale": scale} | ({"norm_shift": shift} if shift is not None else {})
    named = {"x": x, **named}
    y = node.outputs[0]
    if (added := _only(y, "Add", outputs)) is not None:
        other = _other(added, y)
        if isinstance(other, gs.Constant) and _size(other) == outer:
            named["bias"], y = other, added.outputs[0]
    if (split := _only(y, "Split", outputs)) is not None and (product := _gated(split, outputs)) is not None:
        attrs["gated"], y = True, product
    columns = outer // 2 if attrs["gated"] else outer
    branch, gate = y, None
    if (gated := _only(y, "Mul", outputs)) is not None:
        other = _other(gated, y)
        if _size(other) == columns and to_numpy(other.dtype) == FLOAT16:
            gate, branch = other, gated.outputs[0]
    if (added := _only(branch, "Add", outputs)) is not None:
        other = _other(added, branch)
        if not isinstance(other, gs.Constant) and list(other.shape or ()) == list(y.shape or ()):
            named |= {"residual": other} | ({"gate": gate} if gate is not None else {})
            y = added.outputs[0]
    attrs["names"] = tuple(named)
    return _Fusion(ROW_LINEAR, list(named.values()), y, attrs)


def _norm(x: gs.Tensor, width: int) -> tuple[gs.Tensor, float, gs.Tensor, gs.Tensor | None] | None:
    """x = Cast(RMSNorm(Cast(h)) * scale [+ shift]) in float32 -> h, epsilon, scale, shift."""
    cast = _made_by(x, "Cast")
    if cast is None or to_numpy(cast.inputs[0].dtype) != FLOAT32:
        return None
    tensor, shift = cast.inputs[0], None
    if (added := _made_by(tensor, "Add")) is not None:
        for tensor, shift in (tuple(added.inputs), tuple(added.inputs)[::-1]):
            if _size(shift) == width and _made_by(tensor, "Mul") is not None:
                break
        else:
            return None
    scaled = _made_by(tensor, "Mul")
    if scaled is None:
        return None
    for normed, scale in (tuple(scaled.inputs), tuple(scaled.inputs)[::-1]):
        product = _made_by(normed, "Mul")
        if product is None or _size(scale) != width:
            continue
        for wide, factor in (tuple(product.inputs), tuple(product.inputs)[::-1]):
            epsilon = _inverse_root_mean_square(factor, wide)
            source = _made_by(wide, "Cast")
            if epsilon is not None and source is not None and to_numpy(source.inputs[0].dtype) == FLOAT16:
                return source.inputs[0], epsilon, scale, shift
    return None


def _inverse_root_mean_square(factor: gs.Tensor, wide: gs.Tensor) -> float | None:
    """The epsilon of 1 / sqrt(mean(wide^2) + epsilon) over the last axis."""
    added = _chain(factor, "Reciprocal", "Sqrt")
    node = None if added is None else _made_by(added, "Add")
    if node is None:
        return None
    for mean, epsilon in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        reduced = _made_by(mean, "ReduceMean")
        squared = None if reduced is None else _made_by(reduced.inputs[0], "Pow")
        if squared is None or squared.inputs[0] is not wide or not isinstance(epsilon, gs.Constant):
            continue
        axes = reduced.inputs[1] if len(reduced.inputs) > 1 else None  # type: ignore[union-attr]
        if not isinstance(axes, gs.Constant) or not isinstance(squared.inputs[1], gs.Constant):
            continue
        last = len(wide.shape or ()) - 1
        if list(np.ravel(array_of(axes))) in ([-1], [last]) and float(array_of(squared.inputs[1])) == 2.0:
            return float(np.ravel(array_of(epsilon))[0])
    return None


def _gated(split: gs.Node, outputs: set[int]) -> gs.Tensor | None:
    """GELU(first half) * second half of the last axis."""
    if len(split.outputs) != 2 or split.attrs.get("axis") not in (-1, len(split.inputs[0].shape or ()) - 1):
        return None
    gate, up = split.outputs
    if list(gate.shape or ()) != list(up.shape or ()):
        return None
    gelu, product = _only(gate, "Gelu", outputs), _only(up, "Mul", outputs)
    if gelu is None or product is None or gelu.attrs.get("approximate") != "tanh":
        return None
    return product.outputs[0] if _other(product, up) is gelu.outputs[0] else None


def _row_attention(node: gs.Node, outputs: set[int]) -> _Fusion | None:
    """Attention of a few rows over cached keys and their own, rotary positions included, around a Softmax."""
    if node.op != "Softmax" or to_numpy(node.outputs[0].dtype) != FLOAT32:
        return None
    masked = _made_by(node.inputs[0], "Add")
    logits = None if masked is None else _chain(masked.inputs[0], "Reshape", "Cast")
    joined = None if logits is None else _made_by(logits, "Concat")
    if joined is None or len(joined.inputs) != 2:
        return None
    mask = masked.inputs[1]  # type: ignore[union-attr]
    cached, own = (_made_by(tensor, "MatMul") for tensor in joined.inputs)
    split = _consumers(node.outputs[0], ("Cast", "Reshape", "Split"), outputs)
    if cached is None or own is None or split is None or len(split.outputs) != 2:
        return None
    weighed = [_weighed(piece, outputs) for piece in split.outputs]
    if None in weighed:
        return None
    (cached_product, cached_probability), (own_product, own_probability) = weighed  # type: ignore[misc]
    added = _only(cached_product.outputs[0], "Add", outputs)
    if added is None or _other(added, cached_product.outputs[0]) is not own_product.outputs[0]:
        return None
    if own_probability is not None:
        return None
    last = _consumers(added.outputs[0], ("Reshape", "Transpose", "Reshape"), outputs)
    queries = own.inputs[0]
    query_scale = None
    if (quantized := _quantized(cached.inputs[0])) is not None:
        quantizer = producer(quantized.codes)
        if quantizer is None or quantizer.inputs[0] is not queries:
            return None
        query_scale = quantized.one
    elif cached.inputs[0] is not queries:
        return None
    keys, values = _quantized(cached.inputs[1]), _quantized(cached_product.inputs[1])
    if len({item is None for item in (query_scale, keys, values, cached_probability)}) != 1 or last is None:
        return None
    if cached_probability is not None and cached_probability * LARGEST[FLOAT8E4M3FN] < _WHOLE:
        return None
    query = _rotated(_chain(queries, "Reshape"))
    key = _rotated(_chain(own.inputs[1], "Transpose"))
    value = _heads(own_product.inputs[1])
    if query is None or key is None or value is None or query.cos is not key.cos or query.sin is not key.sin:
        return None
    batch, heads, rows, width = query.shape
    if batch != 1 or key.shape[:2] != [1, 1] or width % 32 or mask.shape != [1, 1, 1, mask.shape[-1]]:
        return None
    sources = [_piece_of(tensor) for tensor in (query.source, key.source, value)]
    named = {
        **dict(zip(("query", "key", "value"), (source for source, _ in sources), strict=True)),
        "cached_keys": cached.inputs[1] if keys is None else keys.codes,
        "cached_values": cached_product.inputs[1] if values is None else values.codes,
        "cos": query.cos,
        "sin": query.sin,
        "mask": mask,
    }
    attrs = {
        "names": tuple(named),
        "heads": heads,
        "rows": rows,
        "starts": tuple(start for _, start in sources),
        "scales": None
        if keys is None or values is None
        else (query_scale, keys.one, cached_probability, values.one),
    }
    return _Fusion(ROW_ATTENTION, list(named.values()), last.outputs[0], attrs)


def _piece_of(tensor: gs.Tensor) -> tuple[gs.Tensor, int]:
    """What a tensor is cut out of along its last axis, and where it starts; itself and 0 where it is not."""
    node = _made_by(tensor, "Split")
    if node is None or node.attrs.get("axis") not in (-1, len(tensor.shape or ()) - 1):
        return tensor, 0
    index = next(index for index, piece in enumerate(node.outputs) if piece is tensor)
    return node.inputs[0], sum(int(piece.shape[-1]) for piece in node.outputs[:index])


def _weighed(piece: gs.Tensor, outputs: set[int]) -> tuple[gs.Node, float | None] | None:
    """The MatMul that a piece of the probabilities goes to, and the scale that it is quantized by."""
    if (product := _only(piece, "MatMul", outputs)) is not None:
        return product, None
    quantizer = _only(piece, "QuantizeLinear", outputs)
    if quantizer is None:
        return None
    dequantizer = _only(quantizer.outputs[0], "DequantizeLinear", outputs)
    factor = None if dequantizer is None else _quantized(dequantizer.outputs[0])
    product = None if dequantizer is None else _only(dequantizer.outputs[0], "MatMul", outputs)
    return None if factor is None or product is None else (product, factor.one)


@dataclass
class _Rotated:
    source: gs.Tensor
    shape: list[int]
    cos: gs.Tensor
    sin: gs.Tensor


def _rotated(tensor: gs.Tensor | None) -> _Rotated | None:
    """Cast(t cos + [-t_high, t_low] sin), t the float32 of heads -> what the heads are made of."""
    added = None if tensor is None else _chain(tensor, "Cast")
    node = None if added is None else _made_by(added, "Add")
    if node is None:
        return None
    products = [_made_by(item, "Mul") for item in node.inputs]
    for straight, turned in (products, products[::-1]):
        if straight is None or turned is None:
            return None
        wide, cos = straight.inputs
        joined = _made_by(turned.inputs[0], "Concat")
        if joined is None or len(joined.inputs) != 2:
            continue
        negative, low = _made_by(joined.inputs[0], "Neg"), _made_by(joined.inputs[1], "Slice")
        high = None if negative is None else _made_by(negative.inputs[0], "Slice")
        half = (wide.shape or [0])[-1] // 2
        if low is None or high is None or low.inputs[0] is not wide or high.inputs[0] is not wide:
            continue
        if _bounds(low) != (0, half) or _bounds(high)[0] != half or _made_by(wide, "Cast") is None:
            continue
        source = _heads(producer(wide).inputs[0])  # type: ignore[union-attr]
        if source is not None:
            return _Rotated(source, list(wide.shape), cos, turned.inputs[1])
    return None


def _bounds(node: gs.Node) -> tuple[int, int]:
    if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:3]):
        return (-1, -1)
    return tuple(int(np.ravel(array_of(tensor))[0]) for tensor in node.inputs[1:3])  # type: ignore[return-value]


def _heads(tensor: gs.Tensor) -> gs.Tensor | None:
    """Transpose(Reshape(x), [0, 2, 1, 3]) -> x."""
    transposed = _made_by(tensor, "Transpose")
    if transposed is None or list(transposed.attrs.get("perm", ())) != [0, 2, 1, 3]:
        return None
    return _chain(transposed.inputs[0], "Reshape")


def _attention(node: gs.Node, outputs: set[int]) -> _Fusion | None:
    """Softmax(Cast(Q K^T)) V without a mask and without Q/DQ."""
    if node.op != "Softmax" or to_numpy(node.outputs[0].dtype) != FLOAT32:
        return None
    logits = _chain(node.inputs[0], "Cast")
    scores = None if logits is None else _made_by(logits, "MatMul")
    product = _consumers(node.outputs[0], ("Cast", "MatMul"), outputs)
    if scores is None or product is None or to_numpy(logits.dtype) != FLOAT16:  # type: ignore[union-attr]
        return None
    keys = _made_by(scores.inputs[1], "Transpose")
    if keys is None or list(keys.attrs.get("perm", ())) != [0, 1, 3, 2]:
        return None
    tensors = [scores.inputs[0], keys.inputs[0], product.inputs[1]]
    if any(_quantized(tensor) is not None or len(tensor.shape or ()) != 4 for tensor in tensors):
        return None
    return _Fusion(ATTENTION, tensors, product.outputs[0], {"names": ("query", "key", "value")})


def _quantized(tensor: gs.Tensor) -> Factor | None:
    """The FP8 codes behind a DequantizeLinear of one scale."""
    node = _made_by(tensor, "DequantizeLinear")
    if node is None or to_numpy(node.inputs[0].dtype) != FLOAT8E4M3FN:
        return None
    scale = node.inputs[1]
    if not isinstance(scale, gs.Constant) or (_size(scale) != 1 and node.attrs.get("axis") != 1):
        return None
    return Factor(node.inputs[0], np.ravel(array_of(scale)).astype(np.float32))


def _made_by(tensor: gs.Tensor, op: str) -> gs.Node | None:
    node = producer(tensor)
    return node if node is not None and node.op == op and not node.domain else None


def _chain(tensor: gs.Tensor, *ops: str) -> gs.Tensor | None:
    """What the first of several nodes, from the last back, reads."""
    for op in ops:
        node = _made_by(tensor, op)
        if node is None:
            return None
        tensor = node.inputs[0]
    return tensor


def _only(tensor: gs.Tensor, op: str, outputs: set[int]) -> gs.Node | None:
    """The one node that reads a tensor, if it is of that kind."""
    if len(tensor.outputs) != 1 or id(tensor) in outputs or tensor.outputs[0].op != op:
        return None
    return tensor.outputs[0]


def _consumers(tensor: gs.Tensor, ops: tuple[str, ...], outputs: set[int]) -> gs.Node | None:
    """The last of several nodes of which each is the only reader of the one before."""
    node: gs.Node | None = None
    for op in ops:
        node = _only(tensor, op, outputs)
        if node is None:
            return None
        tensor = node.outputs[0]
    return node


def _other(node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]


def _size(tensor: gs.Tensor) -> int:
    shape = tensor.shape
    return math.prod(shape) if shape is not None and all(isinstance(dim, int) for dim in shape) else -1


def _rows(tensor: gs.Tensor) -> int | None:
    shape = tensor.shape
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        return None
    return math.prod(shape[:-1])  # type: ignore[no-any-return]


def fused_nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    """The nodes of the domain `pi05c`."""
    return (node for node in graph.nodes if node.domain == DOMAIN)


__all__ = [
    "ATTENTION",
    "DOMAIN",
    "ROW_ATTENTION",
    "ROW_LINEAR",
    "SCALED_MATMUL",
    "fuse",
    "fused_nodes",
]
