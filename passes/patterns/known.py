"""What is known of masks before the model runs, element by element.

A mask [batch, tokens] of which some elements are constant makes an attention mask of which some elements are. Each
element here has one of two values that are known, by conditions that are not: which elements of the model's boolean
inputs are true.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.domains import STANDARD_DOMAINS
from pi05c.graph.dtypes import BOOL, to_numpy
from pi05c.graph.edit import producer
from pi05c.graph.errors import Pi05cError
from pi05c.graph.evaluate import Evaluator
from pi05c.graph.runner import Array
from pi05c.graph.weights import array_of
from pi05c.passes.patterns.dependence import runtime_tensors
from pi05c.passes.patterns.walk import static_shape

NO_CONDITION = -1
"""Stands where an element has fewer than two conditions."""

_LARGEST = 2**24
"""Tensors of more elements are taken as unknown: no mask is that large (8 heads of 968 x 968 are half of it)."""

_DEEPEST = 64
"""Operators between a tensor and the inputs that it is known by; a mask takes about ten."""

_UNARY: dict[str, Callable[..., Array]] = {"Not": np.logical_not, "Neg": np.negative, "Identity": np.asarray}
_BINARY: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Equal": np.equal,
    "Greater": np.greater,
    "Less": np.less,
}


@dataclass(frozen=True)
class Elements:
    """Arrays of one shape, or of shapes that broadcast to one.

    Attributes:
        known: whether anything is known of an element.
        high: its value where its conditions hold.
        low: its value where one of them fails.
        first, second: its conditions, numbers of elements of boolean inputs, or `NO_CONDITION`.
    """

    known: Array
    high: Array
    low: Array
    first: Array
    second: Array

    @property
    def certain(self) -> Array:
        """Where the value is `high`, whatever the conditions are."""
        same: Array = self.known & ((self.first == NO_CONDITION) | (self.high == self.low))
        return same

    @property
    def zero(self) -> Array:
        """Where the value is zero or false in any run."""
        found: Array = self.certain & (self.high == 0)
        return found

    def moved(self, move: Callable[[Array], Array]) -> Elements:
        """What an operator makes of them that only moves elements."""
        return Elements(*(move(part) for part in (self.known, self.high, self.low, self.first, self.second)))

    def mapped(self, function: Callable[[Array], Array]) -> Elements:
        """What an elementwise function makes of them."""
        with np.errstate(all="ignore"):
            return Elements(self.known, function(self.high), function(self.low), self.first, self.second)


def constant_elements(values: Array) -> Elements:
    """Elements that are known."""
    nothing = np.full(values.shape, NO_CONDITION, np.int64)
    return Elements(np.ones(values.shape, np.bool_), values, values, nothing, nothing)


class Known:
    """What is known of each tensor of a graph, whose nodes must be sorted."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._runtime = runtime_tensors(graph)
        self._found: dict[int, Elements | None] = {}
        self._input_offsets: dict[int, int] = {}
        offset = 0
        for tensor in graph.inputs:
            shape = static_shape(tensor)
            if shape is not None and to_numpy(tensor.dtype) == BOOL:
                self._input_offsets[id(tensor)] = offset
                offset += math.prod(shape)

    def of(self, tensor: gs.Tensor, depth: int = 0) -> Elements | None:
        """What is known of a tensor's elements; None where nothing is."""
        key = id(tensor)
        if key not in self._found:
            shape = static_shape(tensor)
            small = shape is not None and math.prod(shape) <= _LARGEST
            self._found[key] = self._find(tensor, depth) if small and depth < _DEEPEST else None
        return self._found[key]

    def _find(self, tensor: gs.Tensor, depth: int) -> Elements | None:
        if isinstance(tensor, gs.Constant):
            return constant_elements(array_of(tensor))
        if id(tensor) not in self._runtime:
            try:
                return constant_elements(Evaluator(self._graph, [tensor])()[0])
            except Pi05cError:
                return None
        shape = static_shape(tensor) or ()
        if id(tensor) in self._input_offsets:
            numbers = np.arange(math.prod(shape)).reshape(shape) + self._input_offsets[id(tensor)]
            yes = np.ones(shape, np.bool_)
            return Elements(yes, yes, ~yes, numbers, np.full(shape, NO_CONDITION, np.int64))
        node = producer(tensor)
        if node is None or node.domain not in STANDARD_DOMAINS or len(node.outputs) != 1:
            return None
        return self._made(node, shape, depth + 1)

    def _made(self, node: gs.Node, shape: tuple[int, ...], depth: int) -> Elements | None:
        op, inputs = node.op, node.inputs
        if op == "Where":
            parts = [self.of(tensor, depth) for tensor in inputs]
            condition, yes, no = parts
            return None if condition is None or yes is None or no is None else choose(condition, yes, no)
        if op == "Concat":
            shapes = [static_shape(tensor) for tensor in inputs]
            if None in shapes:
                return None
            return _joined([(self.of(t, depth), static_shape(t) or ()) for t in inputs], node.attrs["axis"])
        if op in _BINARY or op == "And":
            left, right = (self.of(tensor, depth) for tensor in inputs)
            if op == "And":
                return None if left is None or right is None else both(left, right)
            return None if left is None or right is None else _combined(left, right, _BINARY[op])
        if op not in _UNARY and op != "Cast" and op not in _MOVES:
            return None
        source = self.of(inputs[0], depth)
        if source is None:
            return None
        if op in _UNARY:
            return source.mapped(_UNARY[op])
        if op == "Cast":
            dtype = to_numpy(node.attrs["to"])
            return None if dtype is None else source.mapped(lambda part: part.astype(dtype))
        move = _MOVES[op](node, shape)
        return None if move is None else source.moved(move)


def both(left: Elements, right: Elements) -> Elements:
    """Logical And: false where one is, true under the conditions of both, of which two at most are kept."""
    false = left.zero | right.zero
    first, second, fits = _merged(left, right)
    known = false | (fits & _is_condition(left) & _is_condition(right))
    first, second = (np.where(false, NO_CONDITION, part) for part in (first, second))
    return Elements(known, ~false, np.zeros_like(false), first, second)


def choose(condition: Elements, yes: Elements, no: Elements) -> Elements:
    """Where(condition, yes, no): known where the condition is, or both values are whatever the conditions."""
    true, false = condition.certain & (condition.high != 0), condition.zero
    between = _is_condition(condition) & yes.certain & no.certain
    known = np.where(true, yes.known, np.where(false, no.known, between))

    def pick(name: str, otherwise: Array) -> Array:
        return np.where(true, getattr(yes, name), np.where(false, getattr(no, name), otherwise))

    return Elements(
        known,
        pick("high", yes.high),
        pick("low", no.high),
        pick("first", condition.first),
        pick("second", condition.second),
    )


def _is_condition(elements: Elements) -> Array:
    """Where a boolean is true if and only if its conditions hold."""
    value: Array = elements.high.astype(np.bool_) & (
        ~elements.low.astype(np.bool_) | (elements.first == NO_CONDITION)
    )
    return elements.known & value


def _merged(left: Elements, right: Elements) -> tuple[Array, Array, Array]:
    """The conditions of both, and where they are two at most."""
    first, second = np.broadcast_arrays(left.first, left.second, right.first)[:2]
    fits = np.ones(np.broadcast_shapes(first.shape, right.first.shape), np.bool_)
    for more in (right.first, right.second):
        new = (more != NO_CONDITION) & (more != first) & (more != second)
        fits &= ~(new & (first != NO_CONDITION) & (second != NO_CONDITION))
        second = np.where(new & (first != NO_CONDITION) & (second == NO_CONDITION), more, second)
        first = np.where(new & (first == NO_CONDITION), more, first)
    return first, second, fits


def _combined(left: Elements, right: Elements, function: Callable[..., Array]) -> Elements:
    """An elementwise function of two operands of which one is certain."""
    known = left.known & right.known & (left.certain | right.certain)
    first, second = (
        np.where(left.certain, getattr(right, part), getattr(left, part)) for part in ("first", "second")
    )
    with np.errstate(all="ignore"):
        low = function(
            np.where(left.certain, left.high, left.low), np.where(right.certain, right.high, right.low)
        )
        return Elements(known, function(left.high, right.high), low, first, second)


def _joined(parts: list[tuple[Elements | None, tuple[int, ...]]], axis: int) -> Elements | None:
    dtype = next((part.high.dtype for part, _ in parts if part is not None), None)
    if dtype is None:
        return None
    whole = [_unknown(shape, dtype) if part is None else part for part, shape in parts]
    names = ("known", "high", "low", "first", "second")
    return Elements(*(np.concatenate([getattr(part, name) for part in whole], axis) for name in names))


def _unknown(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Elements:
    nothing = np.full(shape, NO_CONDITION, np.int64)
    return Elements(
        np.zeros(shape, np.bool_), np.zeros(shape, dtype), np.zeros(shape, dtype), nothing, nothing
    )


_Move = Callable[[Array], Array]


def _slice(node: gs.Node, shape: tuple[int, ...]) -> _Move | None:
    values = [array_of(tensor).tolist() for tensor in node.inputs[1:] if isinstance(tensor, gs.Constant)]
    rank = len(shape)
    if len(values) != len(node.inputs) - 1 or len(values) < 2:
        return None
    axes = values[2] if len(values) > 2 else list(range(len(values[0])))
    steps = values[3] if len(values) > 3 else [1] * len(axes)
    if any(step < 1 for step in steps):
        return None
    parts = [slice(None)] * rank
    for axis, start, end, step in zip(axes, *values[:2], steps, strict=True):
        parts[axis] = slice(start, end, step)
    return lambda part: part[tuple(parts)]


_MOVES: dict[str, Callable[[gs.Node, tuple[int, ...]], _Move | None]] = {
    **dict.fromkeys(
        ("Reshape", "Squeeze", "Unsqueeze", "Flatten"), lambda node, shape: lambda part: part.reshape(shape)
    ),
    "Expand": lambda node, shape: lambda part: np.broadcast_to(part, shape),
    "Transpose": lambda node, shape: lambda part: part.transpose(node.attrs.get("perm")),
    "Slice": _slice,
}
"""For each operator that moves elements without changing them, what it does, given its node and its output's shape."""


__all__ = ["NO_CONDITION", "Elements", "Known", "choose", "constant_elements"]
