"""Where a policy can be cut into parts, and what crosses each border."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import BOOL, is_float, to_numpy
from pi05c.graph.edit import producer
from pi05c.graph.errors import Pi05cError
from pi05c.passes.patterns.attention import attention_operators, find_attention
from pi05c.passes.patterns.dependence import reads, runtime_tensors
from pi05c.passes.patterns.parts import PARTS, Part, parts_of
from pi05c.passes.patterns.walk import MOVING, each_node, static_shape

_WEIGHTED = frozenset(
    {"MatMul", "Gemm", "Conv", "Einsum", "Softmax", "Loop", "Scan"}
    | {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
    | {"Attention", "MultiHeadAttention", "GroupQueryAttention"}
)
"""Operators whose results are worth handing over. What no such node precedes (masks, positions, angles) is cheap."""

_REPEATING = frozenset({"Expand", "Tile"}) | MOVING
"""Operators that only move or repeat values: a border is drawn above them where that is fewer bytes."""


@dataclass(frozen=True)
class Crossing:
    """A tensor that one part makes and a later one reads.

    Attributes:
        name: what it is called between parts, whatever the exporter called it: see `find_crossings`.
        maker: index of the group that makes it.
        readers: indexes of the groups that read it.
    """

    tensor: gs.Tensor
    name: str
    maker: int
    readers: frozenset[int]


def find_crossings(
    graph: gs.Graph, groups: Sequence[Sequence[Part]], *, recompute: bool = True
) -> list[Crossing]:
    """What crosses the borders between groups of parts, in the order of execution. Nodes must be sorted.

    A value that depends on weights alone is made where it is read. So is one that comes from the model's inputs
    without any linear (masks, positions), from the fewest tensors that determine it. Repeated keys cross before
    they are repeated. Names: `image_features`, `prefix_keys_N` and `prefix_values_N` (N counts layers from 0),
    `prefix_mask` (bool), `prefix_positions` (integers), `action_cos`, `action_sin`, `action_mask` (added to
    logits), `prefix_state` for anything else; with `_0`, `_1`, ... where several would share a name, and the names
    of outputs of the graph stay.

    Args:
        groups: neighbouring parts in order of execution, each part once. Nodes of a part that is not named, such as
            the masks in a graph of the denoising alone, go with the first group.
        recompute: False: what comes from the inputs crosses as the last group reads it, so that this group, which
            may run many times, does not compute it again.

    Raises:
        Pi05cError: a part reads what a later one makes.
    """
    cut = _Cut(graph, groups)
    found: dict[int, tuple[gs.Tensor, int, set[int]]] = {}
    for index in range(1, len(groups)):
        for tensor in cut.needed(index, recompute or index + 1 < len(groups)):
            maker = cut.owner(tensor)
            found.setdefault(id(tensor), (tensor, maker, set()))[2].add(index)
    names = _names(graph, [tensor for tensor, *_ in found.values()])
    return [
        Crossing(tensor, names[key], maker, frozenset(readers))
        for key, (tensor, maker, readers) in found.items()
    ]


def present_parts(graph: gs.Graph) -> list[Part]:
    """The parts that a graph has: those that a weighted node belongs to, in order of execution."""
    parts = parts_of(graph)
    found = {parts[id(node)] for _, node in each_node(graph) if node.op in _WEIGHTED}
    return [part for part in PARTS if part in found]


class _Cut:
    """One way to group a graph's parts."""

    def __init__(self, graph: gs.Graph, groups: Sequence[Sequence[Part]]) -> None:
        self._graph = graph
        self._names = ["+".join(group) for group in groups]
        parts = parts_of(graph)
        place = {part: index for index, group in enumerate(groups) for part in group}
        self._group = {id(node): place.get(parts[id(node)], 0) for node in graph.nodes}
        self._runtime = runtime_tensors(graph)
        self._inputs = {id(tensor) for tensor in graph.inputs}
        self._weighted: set[int] = set()
        for node in graph.nodes:
            if _is_weighted(node) or any(id(tensor) in self._weighted for tensor in reads(node)):
                self._weighted.update(id(tensor) for tensor in node.outputs)

    def owner(self, tensor: gs.Tensor) -> int:
        """Index of the group that makes a tensor."""
        node = producer(tensor)
        assert node is not None, "a crossing tensor is made by a node"
        return self._group[id(node)]

    def needed(self, index: int, recompute: bool) -> list[gs.Tensor]:
        """What group `index` is handed from earlier ones."""
        entering = self._entering(index)
        heavy = [tensor for tensor in entering if id(tensor) in self._weighted]
        light = [tensor for tensor in entering if id(tensor) not in self._weighted]
        if recompute:
            light = _fewest(light, self._inputs)
        handed = {id(tensor): tensor for tensor in (*map(self._unrepeated, heavy), *light)}
        for tensor in heavy:
            if self.owner(tensor) > index:
                raise Pi05cError(
                    f"the graph cannot be split: {self._names[index]} reads {tensor.name!r}, which only "
                    f"{self._names[self.owner(tensor)]} makes; compile it in one piece"
                )
        return [
            tensor
            for tensor in handed.values()
            if id(tensor) not in self._inputs and self.owner(tensor) < index
        ]

    def _entering(self, index: int) -> list[gs.Tensor]:
        """Tensors that only a run knows and that nodes of group `index` read from other groups."""
        found = {}
        for node in self._graph.nodes:
            if self._group[id(node)] != index:
                continue
            for tensor in reads(node):
                made = producer(tensor)
                inside = made is not None and self._group.get(id(made)) == index
                if (
                    id(tensor) in self._runtime
                    and made is not None
                    and id(made) in self._group
                    and not inside
                ):
                    found[id(tensor)] = tensor
        return list(found.values())

    def _unrepeated(self, tensor: gs.Tensor) -> gs.Tensor:
        """The smallest tensor that `tensor` is a rearrangement of."""
        best = tensor
        while (node := producer(tensor)) is not None and node.op in _REPEATING:
            if any(id(other) in self._runtime for other in node.inputs[1:]):
                break
            tensor = node.inputs[0]
            if id(tensor) in self._weighted and _size(tensor) < _size(best):
                best = tensor
        return best


def _is_weighted(node: gs.Node) -> bool:
    """Whether a node is a linear, a convolution, an attention, a norm or the embedding of tokens."""
    if node.op == "Gather":
        table = node.inputs[0]
        while (made := producer(table)) is not None and made.op in MOVING:
            table = made.inputs[0]
        return isinstance(table, gs.Constant) and is_float(table.dtype)
    return node.op in _WEIGHTED


def _size(tensor: gs.Tensor) -> float:
    shape = static_shape(tensor)
    return math.inf if shape is None else math.prod(shape)


def _fewest(wanted: Sequence[gs.Tensor], inputs: set[int]) -> list[gs.Tensor]:
    """The fewest tensors that determine all of `wanted`, those nearest to the model's inputs of equal sets.

    A minimum vertex cut: tensors that share no other tensor on their ways from the inputs are counted by augmenting
    paths (Ford and Fulkerson, 1956; Menger's theorem), each tensor having an entry and an exit of capacity one.
    """
    above: dict[int, list[gs.Tensor]] = {}
    known: dict[int, gs.Tensor] = {}
    stack = list(wanted)
    while stack:
        tensor = stack.pop()
        if id(tensor) in known or isinstance(tensor, gs.Constant):
            continue
        known[id(tensor)] = tensor
        node = None if id(tensor) in inputs else producer(tensor)
        above[id(tensor)] = [] if node is None else [t for t in reads(node) if not isinstance(t, gs.Constant)]
        stack.extend(above[id(tensor)])
    network = _Network()
    for key, sources in above.items():
        network.add((key, _IN), (key, _OUT), 1)
        for source in sources:
            network.add((id(source), _OUT), (key, _IN), len(known))
        if key in inputs:
            network.add(_SOURCE, (key, _IN), len(known))
    for tensor in wanted:
        network.add((id(tensor), _OUT), _SINK, len(known))
    reached = network.saturate()
    return [known[key] for key in known if (key, _IN) in reached and (key, _OUT) not in reached]


_Vertex = tuple[int, int]
_IN, _OUT = 0, 1
_SOURCE, _SINK = (0, 2), (0, 3)
"""Vertices of a flow network: entry and exit of a tensor by its id, and the two ends."""


class _Network:
    """A flow network with whole capacities."""

    def __init__(self) -> None:
        self._capacity: dict[_Vertex, dict[_Vertex, int]] = {}

    def add(self, start: _Vertex, end: _Vertex, capacity: int) -> None:
        """Add an edge, and its reverse without capacity."""
        self._capacity.setdefault(start, {})[end] = capacity
        self._capacity.setdefault(end, {}).setdefault(start, 0)

    def saturate(self) -> set[_Vertex]:
        """Push one unit after the other from source to sink; what the source still reaches in the end."""
        while True:
            before: dict[_Vertex, _Vertex] = {}
            queue = [_SOURCE]
            for vertex in queue:
                for other, capacity in self._capacity.get(vertex, {}).items():
                    if capacity and other not in before and other != _SOURCE:
                        before[other] = vertex
                        queue.append(other)
            if _SINK not in before:
                return {_SOURCE, *before}
            vertex = _SINK
            while vertex != _SOURCE:
                self._capacity[before[vertex]][vertex] -= 1
                self._capacity[vertex][before[vertex]] += 1
                vertex = before[vertex]


def _names(graph: gs.Graph, tensors: Sequence[gs.Tensor]) -> dict[int, str]:
    """What each tensor is called between parts, by id; see `find_crossings`."""
    outputs = {id(tensor) for tensor in graph.outputs}
    parts = parts_of(graph)
    roles = _attention_roles(graph, {id(tensor) for tensor in tensors}, parts)
    named: dict[str, list[gs.Tensor]] = {}
    names: dict[int, str] = {}
    for tensor in tensors:
        node = producer(tensor)
        if id(tensor) in outputs:
            names[id(tensor)] = tensor.name
        elif (role := roles.get(id(tensor))) is not None and role[-1].isdigit():
            names[id(tensor)] = role
        else:
            seen = node is not None and parts[id(node)] == "vision"
            named.setdefault("image_features" if seen else role or _role(tensor), []).append(tensor)
    for role, members in named.items():
        for index, tensor in enumerate(members):
            names[id(tensor)] = role if len(members) == 1 else f"{role}_{index}"
    return names


def _attention_roles(graph: gs.Graph, wanted: set[int], parts: Mapping[int, Part]) -> dict[int, str]:
    """Keys and values by the attention of the denoising that reads them, and masks that are added to logits."""
    roles: dict[int, str] = {}
    layer = 0
    ends = [
        (attention.qk.inputs[1], attention.av.inputs[1], attention.between, attention.qk)
        for attention in find_attention(graph)[0]
    ]
    ends += [(node.inputs[1], node.inputs[2], (node,), node) for node in attention_operators(graph)]
    for keys, values, masking, place in ends:
        if parts.get(id(place)) != "denoise":
            continue
        found = [next(_moved(tensor, wanted), None) for tensor in (keys, values)]
        for kind, tensor in zip(("keys", "values"), found, strict=True):
            if tensor is not None and id(tensor) not in roles:
                roles[id(tensor)] = f"prefix_{kind}_{layer}"
        layer += any(tensor is not None and roles[id(tensor)].endswith(f"_{layer}") for tensor in found)
        for node in masking:
            for tensor in node.inputs:
                if id(tensor) in wanted and is_float(tensor.dtype):
                    roles.setdefault(id(tensor), "action_mask")
    return roles


def _moved(tensor: gs.Tensor, wanted: set[int]) -> Iterator[gs.Tensor]:
    """The tensors of `wanted` that `tensor` holds the values of, joined with others, moved or repeated."""
    stack = [tensor]
    while stack:
        tensor = stack.pop()
        node = producer(tensor)
        if id(tensor) in wanted:
            yield tensor
        elif node is not None and node.op == "Concat":
            stack.extend(reversed(node.inputs))
        elif (node is not None and node.op in _REPEATING) or (node is not None and node.op in ("Mul", "Div")):
            stack.append(node.inputs[0])


def _role(tensor: gs.Tensor) -> str:
    """What a tensor is by its type, or by the operator that made it."""
    if to_numpy(tensor.dtype) == BOOL:
        return "prefix_mask"
    if not is_float(tensor.dtype):
        return "prefix_positions"
    node = producer(tensor)
    while node is not None and (node.op in MOVING or node.op == "Concat"):
        node = producer(node.inputs[0])
    return {"Cos": "action_cos", "Sin": "action_sin"}.get("" if node is None else node.op, "prefix_state")
