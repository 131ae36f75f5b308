"""Multiplications by a constant, and the stored weights that could be multiplied in their place."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import FLOAT32, FLOAT64, is_float, to_numpy
from pi05c.graph.edit import producer
from pi05c.graph.runner import Array
from pi05c.graph.weights import array_of, weight_of
from pi05c.passes.patterns.attention import Attention, find_attention
from pi05c.passes.patterns.linear import Linear, find_linears
from pi05c.passes.patterns.norm import find_norms
from pi05c.passes.patterns.rope import Rope, find_rope
from pi05c.passes.patterns.walk import (
    MOVING,
    ROUNDING,
    constant,
    each_node,
    origin,
    output_ids,
    rank,
    static_shape,
)


@dataclass(frozen=True)
class Span:
    """The values from `start` to `stop` along the last axis; all of them where `stop` is None."""

    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Bias:
    """An Add between a weight and the factor, of which `inputs[index]` is a constant that would be scaled too."""

    node: gs.Node
    index: int
    span: Span


@dataclass(frozen=True)
class Site:
    """A weight that could take a factor.

    Attributes:
        scope: the graph that holds `node`.
        node: the MatMul, Gemm or Gather that reads the weight.
        weight: the initializer, as stored.
        linear: what is known of a MatMul or Gemm; None for a Gather of rows.
        path: the nodes from the initializer down to `node`.
        axis: of the weight as its node reads it: 0 where the factor stands before a linear, 1 where it stands behind.
        span: the part of that axis to scale.
        biases: what is added between the weight and the factor.
    """

    scope: gs.Graph
    node: gs.Node
    weight: gs.Constant
    linear: Linear | None
    path: tuple[gs.Node, ...]
    axis: int
    span: Span = Span()
    biases: tuple[Bias, ...] = ()


@dataclass(frozen=True)
class Factor:
    """A Mul or Div by a constant whose result weights could give instead.

    Attributes:
        scope: the graph that holds `node`.
        node: the Mul or Div.
        index: which of its inputs it multiplies.
        value: the multiplier (a divisor's reciprocal), float64: [] one number, or [C] along the last axis.
        sites: every one of them must be scaled for the node to go.
    """

    scope: gs.Graph
    node: gs.Node
    index: int
    value: Array
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class FixedFactor:
    """A Mul or Div by a constant that cannot go into a weight, with the reason.

    Attributes:
        weight: the one beside which it stands; None where an attention's Q comes from none.
    """

    node: gs.Node
    weight: gs.Constant | None
    reason: str


def find_factors(graph: gs.Graph) -> tuple[list[Factor], list[FixedFactor]]:
    """Every multiplication by a constant number or vector that a weight could take, and those that none can.

    Three forms: the scale of attention, with the linear that makes Q; a factor behind a linear or a Gather of rows;
    a factor in front of linears. One number is followed back through everything that moves values, the Split of a
    joined projection, biases and RoPE, which is linear; a vector through Split and biases. Factors inside a norm
    belong to the norm.
    """
    search = _Search(graph)
    found: list[Factor] = []
    fixed: list[FixedFactor] = []
    for scope, node, index, value, match in search.matches():
        if isinstance(match, _Stuck):
            fixed.append(FixedFactor(node, match.weight, match.reason))
        elif match is not None:
            found.append(Factor(scope, node, index, value, match))
    return found, fixed


@dataclass(frozen=True)
class _Stuck:
    """Why a factor cannot go into a weight."""

    weight: gs.Constant | None
    reason: str


_Match = tuple[Site, ...] | _Stuck | None
"""The sites of a factor, why it has none, or None where no weight is near."""


@dataclass
class _Search:
    """What the steps from a factor to its weights need to know of the graph."""

    graph: gs.Graph
    outputs: set[int] = field(init=False)
    linears: dict[int, Linear] = field(init=False)
    gathers: dict[int, gs.Graph] = field(init=False)
    ropes: dict[int, Rope] = field(init=False)

    def __post_init__(self) -> None:
        self.outputs = output_ids(self.graph)
        self.linears = {id(linear.node): linear for linear in find_linears(self.graph)}
        self.gathers = {id(node): scope for scope, node in each_node(self.graph, "Gather")}
        self.ropes = {id(rope.output): rope for rope in find_rope(self.graph)}

    def matches(self) -> Iterator[tuple[gs.Graph, gs.Node, int, Array, _Match]]:
        attentions, _ = find_attention(self.graph)
        taken = {id(node) for norm in find_norms(self.graph) for node in norm.nodes}
        taken |= {id(node) for rope in self.ropes.values() for node in rope.nodes}
        for attention in attentions:
            for node, _ in attention.scales:
                if (parsed := _by_constant(node)) is not None:
                    taken.add(id(node))
                    yield attention.scope, node, *parsed, self._query(attention)
        for scope, node in each_node(self.graph, "Mul", "Div"):
            parsed = None if id(node) in taken else _by_constant(node)
            if parsed is None:
                continue
            index, value = parsed
            match: _Match = self._behind(node.inputs[index], {id(node)}, value)
            if not isinstance(match, tuple):
                match = self._in_front(node, value) or match
            if isinstance(match, tuple) and id(node.outputs[0]) in self.outputs:
                match = _Stuck(match[0].weight, f"it makes {node.outputs[0].name!r}, an output of the graph")
            yield scope, node, index, value, match

    def _query(self, attention: Attention) -> _Match:
        queries = {id(chunk.qk.inputs[0]): chunk.qk.inputs[0] for chunk in attention.chunks}
        if len(queries) > 1:
            return _Stuck(None, "its chunks do not read one Q")
        (query,) = queries.values()
        match = self._behind(query, {id(chunk.qk) for chunk in attention.chunks}, np.ones(()))
        return match or _Stuck(None, "its Q comes from no weight that could take it")

    def _behind(self, tensor: gs.Tensor, readers: Collection[int], value: Array) -> _Match:
        """Follow a factor on `tensor`, which `readers` alone may read, back to a weight."""
        span, biases, reason = Span(), list[Bias](), ""
        rotating = False
        while (node := producer(tensor)) is not None:
            if not reason and id(tensor) in self.outputs:
                reason = f"{tensor.name!r}, which it multiplies, is an output of the graph"
            other = next((user for user in tensor.outputs if id(user) not in readers), None)
            if not reason and other is not None:
                reason = f"{other.name!r} reads {tensor.name!r} without it"
            twice = next((u for u in tensor.outputs if sum(t is tensor for t in u.inputs) > 1), None)
            if not reason and twice is not None and not rotating:
                reason = f"{twice.name!r} reads {tensor.name!r} more than once"
            rope = self.ropes.get(id(tensor))
            if id(node) in self.linears or self._gathers_rows(node):
                site = self._site(node, span, tuple(biases))
                return _Stuck(site.weight, reason) if reason else (site,)
            if rope is not None and value.ndim == 0 and span == Span():
                if not reason and not self._closed(rope):
                    reason = f"the rotation {rope.name!r} has another reader"
                tensor, readers, rotating = rope.input, {id(inner) for inner in rope.nodes}, True
                continue
            rotating = False
            if node.op == "Split" and span == Span():
                found = _span(node, tensor)
                if found is None:
                    return None
                span, tensor = found, node.inputs[0]
            elif node.op == "Add" and (bias := _bias(node, span)) is not None:
                biases.append(bias)
                tensor = node.inputs[1 - bias.index]
            elif node.op in ROUNDING or (node.op in MOVING and value.ndim == 0 and span == Span()):
                tensor = node.inputs[0]
                if not is_float(tensor.dtype):
                    return None
                if not reason and node.op == "Cast" and not self._gathers_rows(producer(tensor)):
                    reason = f"{node.name!r} rounds between the weight and the factor"
            else:
                return None
            readers = {id(node)}
        return None

    def _site(self, node: gs.Node, span: Span, biases: tuple[Bias, ...]) -> Site:
        linear = self.linears.get(id(node))
        if linear is not None:
            return Site(linear.scope, node, linear.weight, linear, linear.path, 1, span, biases)
        table, path = node.inputs[0], list[gs.Node]()
        while (above := producer(table)) is not None:
            path.insert(0, above)
            table = above.inputs[0]
        assert isinstance(table, gs.Constant)
        return Site(self.gathers[id(node)], node, table, None, tuple(path), 1, span, biases)

    def _gathers_rows(self, node: gs.Node | None) -> bool:
        if node is None or id(node) not in self.gathers:
            return False
        table = constant(node.inputs[0])
        return (
            table is not None
            and rank(table) == 2
            and is_float(table.dtype)
            and node.attrs.get("axis", 0) == 0
        )

    def _closed(self, rope: Rope) -> bool:
        """Whether nothing but the rotation reads what it computes on the way."""
        inside = {id(node) for node in rope.nodes}
        return all(
            id(tensor) not in self.outputs and all(id(user) in inside for user in tensor.outputs)
            for node in rope.nodes
            for tensor in node.outputs
            if tensor is not rope.output
        )

    def _in_front(self, node: gs.Node, value: Array) -> _Match:
        """The linears that alone read what a factor makes."""
        stack, sites, reason = [node.outputs[0]], list[Site](), ""
        while stack:
            tensor = stack.pop()
            if id(tensor) in self.outputs:
                reason = f"it makes {tensor.name!r}, an output of the graph"
            for user in tensor.outputs:
                linear = self.linears.get(id(user))
                if linear is not None and linear.activation is tensor:
                    sites.append(Site(linear.scope, user, linear.weight, linear, linear.path, 0))
                elif user.op == "Identity":
                    stack.append(user.outputs[0])
                else:
                    reason = f"{user.name!r} reads {tensor.name!r} too"
        if not sites:
            return None
        return _Stuck(sites[0].weight, reason) if reason else tuple(sites)


def _by_constant(node: gs.Node) -> tuple[int, Array] | None:
    """Which input a Mul or Div multiplies, and by which constant number or vector along the last axis."""
    for index in (1, 0) if node.op == "Mul" else (1,):
        data, other = node.inputs[1 - index], node.inputs[index]
        value = None if isinstance(origin(data, MOVING), gs.Constant) else _number_or_vector(other)
        if value is None or not is_float(data.dtype):
            continue
        if not np.isfinite(value).all() or not value.all():
            return None
        if (rank(other) or 0) > 0 and list(data.shape or ()) != list(node.outputs[0].shape or ()):
            return None  # it also changes the shape
        return 1 - index, value if node.op == "Mul" else 1 / value
    return None


def _number_or_vector(tensor: gs.Tensor) -> Array | None:
    found = origin(tensor, MOVING)
    if not isinstance(found, gs.Constant) or _rounded(tensor):
        return None
    shape = weight_of(found).shape
    if math.prod(shape) == 1:
        return array_of(found).astype(np.float64).reshape(())
    read = static_shape(tensor)
    if not read or math.prod(shape) != read[-1] or math.prod(read) != read[-1]:
        return None
    return array_of(found).astype(np.float64).reshape(-1)


def _span(split: gs.Node, part: gs.Tensor) -> Span | None:
    """Where along the last axis a part of a Split lies; None for a Split along another axis."""
    shapes = [static_shape(tensor) for tensor in split.outputs]
    if any(not shape for shape in shapes):
        return None
    sizes = [shape[-1] for shape in shapes if shape]
    if split.attrs.get("axis", 0) not in (-1, len(shapes[0] or ()) - 1):
        return None
    index = next(index for index, tensor in enumerate(split.outputs) if tensor is part)
    return Span(sum(sizes[:index]), sum(sizes[: index + 1]))


def _bias(add: gs.Node, span: Span) -> Bias | None:
    """The constant that an Add adds along the last axis."""
    for index in (0, 1):
        found = constant(add.inputs[index])
        if found is not None and not _rounded(add.inputs[index]):
            shape = weight_of(found).shape
            columns = {
                (static_shape(tensor) or (0,))[-1] for tensor in (add.inputs[1 - index], add.outputs[0])
            }
            fits = bool(shape) and shape[-1] == math.prod(shape) and columns == {shape[-1]}
            return Bias(add, index, span) if fits else None
    return None


def _rounded(tensor: gs.Tensor) -> bool:
    """Whether a constant is cast to a type narrower than float32 before it is read."""
    while (node := producer(tensor)) is not None:
        if node.op == "Cast" and to_numpy(node.attrs["to"]) not in (FLOAT32, FLOAT64):
            return True
        tensor = node.inputs[0]
    return False
