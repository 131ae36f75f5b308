"""The layers of each part, the operators of a layer, and the tensors that leave it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.domains import DYNAMIC
from pi05c.graph.edit import producer
from pi05c.graph.sort import captured_by
from pi05c.passes.patterns.attention import Attention, attention_operators, find_attention
from pi05c.passes.patterns.flow import FlowStep, find_flow, flow_linears
from pi05c.passes.patterns.linear import Linear, find_linears
from pi05c.passes.patterns.norm import Norm, find_norms
from pi05c.passes.patterns.parts import PARTS, Part, parts_of
from pi05c.passes.patterns.rope import Rope, find_rope
from pi05c.passes.patterns.two_terms import after_terms, before_terms
from pi05c.passes.patterns.walk import MOVING, QDQ, consumers, origin

OPERATORS = (
    *("attention norm", "qkv", "RoPE", "QK", "softmax", "AV", "out"),
    *("MLP norm", "gate/up", "down"),
)
"""Operators of a layer, in execution order. The two linears of a vision layer's MLP are `gate/up` and `down` too."""

OTHERS = ("patches", "action in", "action out", "linear", "norm", "flow accumulation")
"""Operators outside of layers."""

HALVES = ("attention", "MLP")
"""Behind which of its two halves a layer adds to the residual stream."""

FACTORS = ("Q", "K", "P", "V")
"""What the MatMuls of attention read: `P` stands for the probabilities."""

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
_THROUGH = MOVING | QDQ | {DYNAMIC}


@dataclass(frozen=True)
class Place:
    """Where something is.

    Attributes:
        layer: from 0 within its part; None outside of layers.
        step: of an unrolled denoising, from 0; None elsewhere, and in a loop's body, which stands for every step.
    """

    part: Part
    layer: int | None
    step: int | None

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts places in the order of execution."""
        return PARTS.index(self.part), self.step or 0, -1 if self.layer is None else self.layer


@dataclass(frozen=True)
class Operator:
    """One operator of the model.

    Attributes:
        name: one of `OPERATORS` or `OTHERS`.
        node: the node, or the last one.
        nodes: those that compute it, in order.
    """

    place: Place
    name: str
    node: gs.Node
    nodes: tuple[gs.Node, ...]


@dataclass(frozen=True)
class LayerOutput:
    """The residual stream behind one half of a layer.

    Attributes:
        half: one of `HALVES`.
        scope: the graph that holds `tensor`.
    """

    place: Place
    half: str
    scope: gs.Graph
    tensor: gs.Tensor


class Layers:
    """The layers of a graph whose nodes are sorted. Nothing is edited.

    A layer is what lies between one attention of a part and the next: its number is how many attentions of the part
    a value has been through. Attentions side by side, as of several cameras, are one layer.

    Attributes:
        operators: in execution order of each kind.
        outputs: in the order of the layers.
        flow: the steps of the flow accumulation.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self._parts = parts_of(graph)
        self._attentions = find_attention(graph)[0]
        self._linears = find_linears(graph)
        self._norms = {id(norm.output): norm for norm in find_norms(graph)}
        self.flow: list[FlowStep] = find_flow(graph)
        self._factor: dict[tuple[int, int], str] = {}
        self._after: set[int] = {id(node) for node in attention_operators(graph)}
        for attention in self._attentions:
            for chunk in attention.chunks:
                self._factor |= {(id(chunk.qk), 0): "Q", (id(chunk.qk), 1): "K"}
                self._factor |= {(id(chunk.av), 0): "P", (id(chunk.av), 1): "V"}
                self._after.add(id(chunk.av))
        self._depth: dict[int, int] = {}
        self._measure(graph)
        self._role: dict[int, str] = {}
        self._read_by: dict[int, set[str]] = {}
        self._name_linears(graph)
        steps = sum(step.scope is graph for step in self.flow)
        total = self._layers("denoise")
        self._a_step = total // steps if total and steps > 1 and total % steps == 0 else None
        self.operators = list(self._find(graph))
        self.outputs = sorted(
            self._outputs(), key=lambda found: (*found.place.order, found.half != HALVES[0])
        )

    def step_of(self, flow: FlowStep) -> int | None:
        """The number of an accumulation that is not in a loop's body."""
        beside = [step for step in self.flow if step.scope is flow.scope]
        return beside.index(flow) if len(beside) > 1 else None

    def reader(self, tensor: gs.Tensor) -> tuple[Place, str] | None:
        """What a tensor is for: the place of the linear or attention that reads it, and that linear or factor."""
        for node in consumers(tensor, _THROUGH):
            for index, read in enumerate(node.inputs):
                if origin(read, _THROUGH) is not origin(tensor, _THROUGH):
                    continue
                if (id(node), index) in self._factor:
                    return self._place(node, 0), self._factor[id(node), index]
                if id(node) in self._role and index == 0:
                    return self._place_of_linear(node), self._role[id(node)]
        return None

    def _layers(self, part: Part) -> int:
        return 1 + max(
            (self._depth[id(a.qk)] for a in self._attentions if self._parts[id(a.qk)] == part), default=-1
        )

    def _measure(self, graph: gs.Graph) -> None:
        """How many attentions of its own part lie before each node."""
        reached: dict[int, tuple[Part, int]] = {}

        def visit(scope: gs.Graph) -> None:
            for node in scope.nodes:
                for body in node.subgraphs():
                    visit(body)
                part = self._parts[id(node)]
                read = [reached.get(id(t), (part, 0)) for t in (*node.inputs, *captured_by(node))]
                depth = max((depth for maker, depth in read if maker == part), default=0)
                self._depth[id(node)] = depth
                for tensor in node.outputs:
                    reached[id(tensor)] = part, depth + (id(node) in self._after)

        visit(graph)

    def _name_linears(self, graph: gs.Graph) -> None:
        into, out = flow_linears(graph)
        for name, linears in (("action in", into), ("action out", out)):
            self._role.update((id(linear.node), name) for linear in linears)
        inner: list[Linear] = []
        candidates: dict[int, Linear] = {}
        for linear in self._linears:
            if id(linear.node) in self._role:
                continue
            activation = before_terms(linear.activation, _THROUGH)
            if self._feeds_attention(linear):
                self._role[id(linear.node)] = "qkv"
            elif self._mixed(origin(activation, _THROUGH)):
                self._role[id(linear.node)] = "out"
            elif any(id(tensor) in self._norms for tensor in _back(activation)):
                candidates[id(linear.node)] = linear
            else:
                inner.append(linear)
        for linear in inner:
            above = self._products_above(before_terms(linear.activation, _THROUGH))
            if above and above <= candidates.keys():
                self._role[id(linear.node)] = "down"
                self._role.update(dict.fromkeys(above, "gate/up"))
        for linear in self._linears:
            role = self._role.setdefault(id(linear.node), "linear")
            for tensor in _back(before_terms(linear.activation, _THROUGH)):
                self._read_by.setdefault(id(tensor), set()).add(role)

    def _feeds_attention(self, linear: Linear) -> bool:
        """Whether what it makes is a factor of an attention, without another product in between."""
        stack, seen = list(linear.node.outputs), set[int]()
        while stack:
            tensor = stack.pop()
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            for node in tensor.outputs:
                if node.op in _PRODUCTS or id(node) in self._after:
                    if any(
                        read is tensor and (id(node), i) in self._factor for i, read in enumerate(node.inputs)
                    ):
                        return True
                    if id(node) in self._after:
                        return True
                elif not _reduces(node) and len(seen) < _NEAR:
                    stack.extend(node.outputs)
        return False

    def _mixed(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is what an attention makes, the sum of its chunks included."""
        node = producer(tensor)
        if node is not None and node.op == "Add":
            return all(self._mixed(origin(side, _THROUGH)) for side in node.inputs)
        return node is not None and id(node) in self._after

    def _products_above(self, tensor: gs.Tensor) -> set[int]:
        """The products whose results meet elementwise in a tensor, by id; 0 stands for anything else."""
        found, stack, seen = set[int](), [tensor], set[int]()
        while stack:
            node = producer(stack.pop())
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            if node.op in _PRODUCTS or id(node) in self._after:
                found.add(id(node))
            elif _reduces(node) or len(seen) > _NEAR:
                found.add(0)
            else:
                stack.extend(node.inputs)
        return found

    def _place(self, node: gs.Node, back: int) -> Place:
        """The layer of a node, of which `back` attentions of the same layer lie before it."""
        depth, part = self._depth[id(node)] - back, self._parts[id(node)]
        if part == "denoise" and self._a_step is not None:
            return Place(part, depth % self._a_step, depth // self._a_step)
        return Place(part, depth, None)

    def _outside(self, node: gs.Node) -> Place:
        """The place of a node outside of layers."""
        part, step = self._parts[id(node)], None
        if part == "denoise" and self._a_step is not None:
            depth = self._depth[id(node)]
            step = (depth - (self._role.get(id(node)) != "action in" and depth > 0)) // self._a_step
        return Place(part, None, step)

    def _place_of_linear(self, node: gs.Node) -> Place:
        role = self._role[id(node)]
        if role == "qkv":
            return self._place(node, 0)
        return self._place(node, 1) if role in OPERATORS else self._outside(node)

    def _find(self, graph: gs.Graph) -> Iterator[Operator]:
        for node in (node for node in graph.nodes if node.op == "Conv"):
            yield Operator(self._outside(node), "patches", node, (node,))
        for linear in self._linears:
            node = linear.node
            yield Operator(self._place_of_linear(node), self._role[id(node)], node, (node,))
        for attention in self._attentions:
            yield from self._of_attention(attention)
        for norm in self._norms.values():
            yield self._of_norm(norm)
        for rope in find_rope(graph):
            yield self._of_rope(rope)
        for step in self.flow:
            place = Place(self._parts[id(step.add)], None, self.step_of(step))
            yield Operator(place, "flow accumulation", step.add, (step.add,))

    def _of_attention(self, attention: Attention) -> Iterator[Operator]:
        place = self._place(attention.qk, 0)
        for chunk in attention.chunks:
            yield Operator(place, "QK", chunk.qk, (chunk.qk,))
            yield Operator(place, "AV", chunk.av, (chunk.av,))
        nodes = attention.softmax.nodes
        yield Operator(place, "softmax", nodes[-1], nodes)

    def _of_norm(self, norm: Norm) -> Operator:
        roles = self._read_by.get(id(norm.output), set())
        last = norm.nodes[-1]
        if "qkv" in roles:
            return Operator(self._place(last, 0), "attention norm", last, norm.nodes)
        if "gate/up" in roles:
            return Operator(self._place(last, 1), "MLP norm", last, norm.nodes)
        return Operator(self._outside(last), "norm", last, norm.nodes)

    def _of_rope(self, rope: Rope) -> Operator:
        return Operator(self._place(rope.nodes[-1], 0), "RoPE", rope.nodes[-1], rope.nodes)

    def _outputs(self) -> Iterator[LayerOutput]:
        for linear in self._linears:
            role = self._role[id(linear.node)]
            if role in ("out", "down"):
                tensor = _residual(after_terms(linear.node.outputs[0]))
                if tensor is not None:
                    half = HALVES[role == "down"]
                    yield LayerOutput(self._place(linear.node, 1), half, linear.scope, tensor)


_NEAR = 64
"""Nodes between a linear and what it feeds within a layer: RoPE is the longest way, about 20."""


def _back(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """A tensor, and what it was before values were moved or rounded."""
    yield tensor
    while (node := producer(tensor)) is not None and node.op in _THROUGH and node.inputs:
        tensor = node.inputs[0]
        yield tensor


def _reduces(node: gs.Node) -> bool:
    return bool(node.op.startswith("Reduce") or node.op.endswith("Normalization") or node.op == "Softmax")


def _residual(tensor: gs.Tensor) -> gs.Tensor | None:
    """The sum of a linear's result, after its bias and its gate, and the residual stream; None where there is none."""
    while len(tensor.outputs) == 1:
        node = tensor.outputs[0]
        if node.op == "Add" and not _any_constant(node.inputs):
            return node.outputs[0]
        if node.op not in _THROUGH and node.op not in ("Add", "Mul"):
            return None
        tensor = node.outputs[0]
    return None


def _any_constant(tensors: Iterable[gs.Tensor]) -> bool:
    return any(isinstance(origin(tensor, _THROUGH), gs.Constant) for tensor in tensors)
