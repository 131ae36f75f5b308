"""The constant folding that `canonicalize` does: what can be computed at compile time without growing the file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from pi05c.graph.domains import STANDARD_DOMAINS
from pi05c.graph.dtypes import bits, to_numpy
from pi05c.graph.edit import Editor, producer
from pi05c.graph.errors import Pi05cError
from pi05c.graph.evaluate import Evaluator
from pi05c.graph.io import scopes
from pi05c.graph.runner import Array
from pi05c.graph.sort import captured_by
from pi05c.graph.weights import Cast, InMemory, Reshaped, Transposed, Weight, weight_of
from pi05c.passes.patterns.walk import output_ids, static_shape

SMALL_BYTES = 1024
"""Results up to this size are folded even where they are larger than what they come from."""

STEP_BYTES = 64 * 2**20
STEP_GROWTH = 16
"""What is computed on the way to a result may take this many bytes, or this many times those of the constants that it
comes from: a few numbers can ask for any amount of memory (ConstantOfShape, Expand, Range)."""

_NEVER = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
    | {"Dropout", "If", "Loop", "Scan", "SequenceMap", "DequantizeLinear", "SequenceConstruct", "Optional"}
)
"""Not deterministic, not a tensor, a body, or (DequantizeLinear) the mark of a weight that is stored quantized."""


@dataclass
class _Known:
    """A tensor that can be computed at compile time, with the bytes of the constants that it comes from."""

    tensor: gs.Tensor
    roots: dict[int, int] = field(default_factory=dict)


def fold_constants(graph: gs.Graph) -> Iterator[str]:
    """Replace what depends on constants alone by its value, in every scope; the name of each tensor, once replaced.

    A result is folded where it takes no more bytes than the constants that it comes from (or `SMALL_BYTES`), so
    that a bfloat16 weight with a Cast behind it stays bfloat16. A Cast, Transpose or reshape of one weight is
    folded without reading it.
    """
    known: dict[int, _Known] = {}
    for scope in scopes(graph):
        for node in scope.nodes:
            if node.op not in _NEVER and node.domain in STANDARD_DOMAINS:
                _mark(node, known)
    wanted = _boundary(graph, known)
    lazy = {id(tensor): weight for tensor in wanted if (weight := _moved(tensor)) is not None}
    rest = [tensor for tensor in wanted if id(tensor) not in lazy]
    lazy.update((id(tensor), InMemory(value)) for tensor, value in _evaluated(graph, rest))
    for tensor in wanted:
        if id(tensor) not in lazy:
            continue
        node = producer(tensor)
        assert node is not None
        node.outputs = [gs.Variable.empty() if output is tensor else output for output in node.outputs]
        tensor.to_constant(lazy[id(tensor)])
        yield tensor.name


def _evaluated(graph: gs.Graph, tensors: list[gs.Tensor]) -> list[tuple[gs.Tensor, Array]]:
    """The values of the tensors that onnxruntime can compute: arithmetic in bfloat16 and FP8 it mostly cannot."""
    if not tensors:
        return []
    try:
        return list(zip(tensors, Evaluator(graph, tensors)(), strict=True))
    except Pi05cError:
        if len(tensors) == 1:
            return []
    half = len(tensors) // 2
    return _evaluated(graph, tensors[:half]) + _evaluated(graph, tensors[half:])


def _mark(node: gs.Node, known: dict[int, _Known]) -> None:
    roots: dict[int, int] = {}
    for tensor in node.inputs:
        if isinstance(tensor, gs.Constant):
            roots[id(tensor)] = weight_of(tensor).nbytes
        elif id(tensor) in known:
            roots.update(known[id(tensor)].roots)
        elif tensor.name:
            return
    for tensor in node.outputs:
        if static_shape(tensor) is None or to_numpy(tensor.dtype) is None:
            return
        if _bytes(tensor) > max(STEP_BYTES, STEP_GROWTH * sum(roots.values())):
            return
    known.update({id(tensor): _Known(tensor, roots) for tensor in node.outputs})


def _boundary(graph: gs.Graph, known: dict[int, _Known]) -> list[gs.Tensor]:
    """The tensors to replace: read by something that is not known, and not larger than their roots.

    Where one would grow, its node counts as unknown, and what that reads is looked at in its place.
    """
    stack = []
    for scope in scopes(graph):
        for node in scope.nodes:
            if not any(id(tensor) in known for tensor in node.outputs):
                stack.extend([*node.inputs, *captured_by(node)])
    found: dict[int, gs.Tensor] = {}
    refused: set[int] = set()
    while stack:
        tensor = stack.pop()
        entry = known.get(id(tensor))
        if entry is None or id(tensor) in found or id(tensor) in refused:
            continue
        if _bytes(tensor) <= max(SMALL_BYTES, sum(entry.roots.values())):
            found[id(tensor)] = tensor
        else:
            refused.add(id(tensor))
            node = producer(tensor)
            assert node is not None
            stack.extend(node.inputs)
    return list(found.values())[::-1]


def _bytes(tensor: gs.Tensor) -> int:
    return math.prod(static_shape(tensor) or ()) * bits(tensor.dtype) // 8


def _moved(tensor: gs.Tensor) -> Weight | None:
    """A chain of Cast, Transpose and reshapes of one initializer, as operations on its weight."""
    if isinstance(tensor, gs.Constant):
        return weight_of(tensor)
    node = producer(tensor)
    if node is None or node.op not in ("Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"):
        return None
    base = _moved(node.inputs[0])
    if base is None or base.nbytes <= SMALL_BYTES:
        return None
    if node.op == "Cast":
        return Cast(base, to_numpy(node.attrs["to"]))
    if node.op == "Transpose":
        return Transposed(base, node.attrs.get("perm") or list(range(len(base.shape)))[::-1])
    if node.op == "Identity":
        return base
    shape = static_shape(tensor)
    return None if shape is None else Reshaped(base, shape)


def transpose_before_cast(graph: gs.Graph, editors: dict[int, Editor]) -> Iterator[str]:
    """Turn weight -> Cast -> Transpose into transposed weight -> Cast, where the weight has no other reader.

    Gives the name of each weight, once it is turned. Afterwards the file holds each factor of a MatMul as the MatMul reads it, in the type of the checkpoint.
    """
    returned = output_ids(graph)
    for scope in scopes(graph):
        for node in list(scope.nodes):
            if node.op != "Transpose" or not node.inputs or id(node.outputs[0]) in returned:
                continue
            cast = producer(node.inputs[0])
            if cast is None or cast.op != "Cast" or not isinstance(cast.inputs[0], gs.Constant):
                continue
            weight = cast.inputs[0]
            if (
                len(weight.outputs) != 1
                or len(cast.outputs[0].outputs) != 1
                or not returned.isdisjoint((id(weight), id(cast.outputs[0])))
            ):
                continue
            perm = node.attrs.get("perm") or list(range(len(weight.shape)))[::-1]
            weight._values = Transposed(weight_of(weight), perm)
            cast.outputs[0].shape = list(weight.shape)
            editors[id(scope)].replace_uses(node.outputs[0], cast.outputs[0])
            yield weight.name
