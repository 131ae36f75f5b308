"""A graph with its bodies as one table of integers: who makes, reads and returns each tensor.

Alignment compares two graphs of tens of thousands of nodes; it needs every scope at once, an order that does not
depend on how the nodes are listed, and constants by what they hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs

from pi05c.graph.text import attribute_text
from pi05c.graph.weights import weight_of

MISSING = -1
"""Stands for an optional input or output that a node leaves out."""

TRANSPARENT = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear")
"""Operators that hand on their first input in another type: what a change of precision puts in and takes out."""

Content = tuple[str, tuple[int, ...], str]
"""Type, shape and SHA-256 of a constant: what it holds, whatever it is called."""


@dataclass(frozen=True)
class Scope:
    """The graph itself, or a body: `owner` is the node that holds it, `key` the attribute."""

    graph: gs.Graph
    owner: int
    key: str


@dataclass
class Wiring:
    """Nodes and tensors by number.

    Nodes are numbered in an order of execution that follows from the wiring alone: depth first from the outputs, inputs
    before bodies, bodies before the node that holds them. Nodes that no output needs come last.

    Attributes:
        scope: of each node.
        attributes: of each node as canonical text, see `attributes_of`.
        transparent: whether each node is one of `TRANSPARENT`.
        ins, outs: tensors of each node, `MISSING` for those left out.
        maker: node and output that make a tensor; None of an input and of a constant.
        uses: nodes and input places that read a tensor.
        returned: scopes and output places that return a tensor.
        content: what a constant holds; None of any other tensor.
        entries, results: input and output tensors of each scope.
    """

    scopes: list[Scope] = field(default_factory=list)
    nodes: list[gs.Node] = field(default_factory=list)
    scope: list[int] = field(default_factory=list)
    attributes: list[dict[str, str]] = field(default_factory=list)
    transparent: list[bool] = field(default_factory=list)
    ins: list[list[int]] = field(default_factory=list)
    outs: list[list[int]] = field(default_factory=list)
    tensors: list[gs.Tensor] = field(default_factory=list)
    maker: list[tuple[int, int] | None] = field(default_factory=list)
    uses: list[list[tuple[int, int]]] = field(default_factory=list)
    returned: list[list[tuple[int, int]]] = field(default_factory=list)
    content: list[Content | None] = field(default_factory=list)
    entries: list[list[int]] = field(default_factory=list)
    results: list[list[int]] = field(default_factory=list)
    entry: dict[int, tuple[int, int]] = field(default_factory=dict)
    bodies: dict[int, list[int]] = field(default_factory=dict)

    def source(self, tensor: int) -> int:
        """The tensor behind any `TRANSPARENT` nodes."""
        while (
            tensor != MISSING
            and (made := self.maker[tensor]) is not None
            and self.transparent[made[0]]
            and self.ins[made[0]]
        ):
            tensor = self.ins[made[0]][0]
        return tensor

    def path(self, scope: int) -> str:
        """Where a scope lies, for people: names of the nodes around it and their attributes; empty of the graph."""
        parts: list[str] = []
        while (found := self.scopes[scope]).owner != MISSING:
            node = self.nodes[found.owner]
            parts.insert(0, f"{node.name or node.op}/{found.key}")
            scope = self.scope[found.owner]
        return "/".join(parts)


def wiring(graph: gs.Graph) -> Wiring:
    """Number the nodes and tensors of a graph and of its bodies. Weights that have a recorded checksum are not read."""
    result = Wiring()
    numbers: dict[int, int] = {}

    def number(tensor: gs.Tensor) -> int:
        if not isinstance(tensor, gs.Constant) and not tensor.name:
            return MISSING
        if id(tensor) not in numbers:
            numbers[id(tensor)] = len(result.tensors)
            result.tensors.append(tensor)
            result.maker.append(None)
            result.uses.append([])
            result.returned.append([])
            result.content.append(content_of(tensor) if isinstance(tensor, gs.Constant) else None)
        return numbers[id(tensor)]

    positions: dict[int, int] = {}
    for node, scope_id in _execution_order(graph):
        positions[id(node)] = len(result.nodes)
        result.nodes.append(node)
        result.scope.append(scope_id)
    owners = [(graph, None, "")] + [(body, node, key) for node in result.nodes for key, body in _bodies(node)]
    scope_numbers = {id(body): index for index, (body, _, _) in enumerate(owners)}
    result.scope = [scope_numbers[scope_id] for scope_id in result.scope]
    for index, (body, node, key) in enumerate(owners):
        owner = MISSING if node is None else positions[id(node)]
        result.scopes.append(Scope(body, owner, key))
        if owner != MISSING:
            result.bodies.setdefault(owner, []).append(index)
        result.entries.append([number(tensor) for tensor in body.inputs])
        for place, tensor in enumerate(result.entries[-1]):
            result.entry[tensor] = (index, place)
    result.attributes = [attributes_of(node) for node in result.nodes]
    result.transparent = [node.op in TRANSPARENT and not node.domain for node in result.nodes]
    for index, node in enumerate(result.nodes):
        result.ins.append([number(tensor) for tensor in node.inputs])
        result.outs.append([number(tensor) for tensor in node.outputs])
        for place, tensor in enumerate(result.outs[-1]):
            if tensor != MISSING:
                result.maker[tensor] = (index, place)
        for place, tensor in enumerate(result.ins[-1]):
            if tensor != MISSING:
                result.uses[tensor].append((index, place))
    for index, (body, _, _) in enumerate(owners):
        result.results.append([number(tensor) for tensor in body.outputs])
        for place, tensor in enumerate(result.results[-1]):
            if tensor != MISSING:
                result.returned[tensor].append((index, place))
    return result


def content_of(constant: gs.Constant) -> Content:
    """What a constant holds."""
    weight = weight_of(constant)
    return (str(weight.dtype), weight.shape, weight.checksum())


def attributes_of(node: gs.Node) -> dict[str, str]:
    """The attributes of a node as canonical text; bodies are left out, tensors are shown by their checksum."""
    return {
        key: str(content_of(value)) if isinstance(value, gs.Constant) else attribute_text(key, value)
        for key, value in sorted(node.attrs.items())
        if not isinstance(value, gs.Graph)
    }


def _bodies(node: gs.Node) -> list[tuple[str, gs.Graph]]:
    return [(key, value) for key, value in sorted(node.attrs.items()) if isinstance(value, gs.Graph)]


def _execution_order(graph: gs.Graph) -> list[tuple[gs.Node, int]]:
    """Every node of every scope with the id of its scope."""
    order: list[tuple[gs.Node, int]] = []
    entered: set[int] = set()
    scope_of: dict[int, int] = {id(node): id(graph) for node in graph.nodes}
    for body in graph.subgraphs(recursive=True):
        scope_of.update((id(node), id(body)) for node in body.nodes)
    live = [tensor.inputs[0] for tensor in graph.outputs if tensor.inputs]
    for root in (*live, *graph.nodes):
        stack: list[tuple[gs.Node, bool]] = [(root, False)]
        while stack:
            node, finished = stack.pop()
            if finished:
                order.append((node, scope_of[id(node)]))
                continue
            if id(node) in entered or id(node) not in scope_of:
                continue
            entered.add(id(node))
            stack.append((node, True))
            stack.extend((needed, False) for needed in reversed(_needed(node)))
    return order


def _needed(node: gs.Node) -> list[gs.Node]:
    """Nodes that come before: makers of the inputs, then what the bodies return, then the rest of the bodies."""
    needed = [tensor.inputs[0] for tensor in node.inputs if tensor.inputs]
    for _, body in _bodies(node):
        needed += [tensor.inputs[0] for tensor in body.outputs if tensor.inputs]
        needed += list(body.nodes)
    return needed


def is_unknown_dim(dim: Any) -> bool:
    """Whether a dimension is one that type inference made up, or none at all."""
    return dim is None or (isinstance(dim, str) and dim.startswith("unk__"))
