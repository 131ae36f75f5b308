"""Single edits of seeded graphs with what a diff must say, and changes that are no difference."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx
from onnx import helper, numpy_helper
from random_graphs import BINARY, UNARY, distinct_values


@dataclass(frozen=True)
class Edited:
    """A graph with one edit: the things that differ, as (thing, kind, name in the edited graph)."""

    proto: onnx.ModelProto
    expected: frozenset[tuple[str, str, str]]


def _nodes_of(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes_of(list(attribute.g.node))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def renamed(proto: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """With the names of all nodes and tensors dealt out anew: each then belongs to something else of the graph.

    Inputs and outputs get new ones: an input that has the name of another is another, as far as a caller can tell.
    """
    copy = copied(proto)
    rng = random.Random(seed)
    graphs = list(_graphs(copy.graph))
    tensors = {t.name for g in graphs for t in (*g.initializer, *g.input)}
    tensors |= {name for node in _nodes_of(list(copy.graph.node)) for name in node.output}
    new = dict(zip(sorted(tensors), rng.sample(sorted(tensors), len(tensors)), strict=True))
    new.update((value.name, f"new {value.name}") for value in (*proto.graph.input, *proto.graph.output))
    nodes = list(_nodes_of(list(copy.graph.node)))
    node_names = rng.sample([node.name for node in nodes], len(nodes))
    for node, name in zip([n for g in graphs for n in g.node], node_names, strict=True):
        node.name = name
    for graph in graphs:
        del graph.value_info[:]
        for tensor in (*graph.initializer, *graph.input, *graph.output):
            tensor.name = new[tensor.name]
        for node in graph.node:
            node.input[:] = [new[name] if name else name for name in node.input]
            node.output[:] = [new[name] for name in node.output]
    return copy


def resorted(proto: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """In another topological order, bodies and lists of initializers too."""
    copy = copied(proto)
    rng = random.Random(seed)
    for graph in _graphs(copy.graph):
        left = list(graph.node)
        waiting = {name for node in left for name in node.output}
        order: list[onnx.NodeProto] = []
        while left:
            ready = [n for n in left if not waiting & set(_read(n))]
            node = rng.choice(ready)
            left.remove(node)
            waiting -= set(node.output)
            order.append(onnx.NodeProto.FromString(node.SerializeToString()))
        weights = rng.sample(list(graph.initializer), len(graph.initializer))
        weights = [onnx.TensorProto.FromString(weight.SerializeToString()) for weight in weights]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(order)
        graph.initializer.extend(weights)
    return copy


def _read(node: onnx.NodeProto) -> list[str]:
    return [name for inner in _nodes_of([node]) for name in inner.input]


def _pick(proto: onnx.ModelProto, rng: random.Random, *ops: str) -> tuple[onnx.GraphProto, int]:
    places = [
        (graph, index)
        for graph in _graphs(proto.graph)
        for index, node in enumerate(graph.node)
        if node.op_type in ops
    ]
    return rng.choice(places)


def _insert(proto: onnx.ModelProto, rng: random.Random) -> Edited:
    graph, index = _pick(proto, rng, *UNARY, *BINARY)
    node = graph.node[index]
    added = helper.make_node("Softsign", [node.input[0]], ["added"], "added.node")
    node.input[0] = "added"
    graph.node.insert(index, added)
    return Edited(proto, frozenset({("node", "added", "added.node")}))


def _remove(proto: onnx.ModelProto, rng: random.Random) -> Edited:
    graph, index = _pick(proto, rng, *UNARY)
    node = graph.node[index]
    gone, source = node.output[0], node.input[0]
    for other in _nodes_of(list(graph.node)):
        other.input[:] = [source if name == gone else name for name in other.input]
    for output in graph.output:
        output.name = source if output.name == gone else output.name
    name = node.name
    del graph.node[index]
    return Edited(proto, frozenset({("node", "removed", name)}))


def _operator(proto: onnx.ModelProto, rng: random.Random) -> Edited:
    graph, index = _pick(proto, rng, *UNARY)
    graph.node[index].op_type = "Softplus"
    return Edited(proto, frozenset({("node", "changed", graph.node[index].name)}))


def _attribute(proto: onnx.ModelProto, rng: random.Random) -> Edited:
    graph, index = _pick(proto, rng, *UNARY, *BINARY)
    node = graph.node[index]
    node.attribute.append(helper.make_attribute(f"extra_{len(node.attribute)}", 1))
    return Edited(proto, frozenset({("node", "changed", node.name)}))


def _rewire(proto: onnx.ModelProto, rng: random.Random) -> Edited:
    """A MatMul, Add, ... reads an input of the graph that it did not read."""
    places = [
        (node, place)
        for node in proto.graph.node
        for place, name in enumerate(node.input)
        if node.op_type in BINARY
        and not {"x", "z"} & set(node.input)
        and not name.startswith(("w", "s0", "s1"))
        if _readers(proto, name) > 1
    ]
    if not places:
        return _operator(proto, rng)
    node, place = rng.choice(places)
    node.input[place] = rng.choice(("x", "z"))
    return Edited(proto, frozenset({("node", "rewired", node.name)}))


def _readers(proto: onnx.ModelProto, name: str) -> int:
    return sum(list(node.input).count(name) for node in _nodes_of(list(proto.graph.node)))


def _values_of_weight(proto: onnx.ModelProto, rng: random.Random) -> Edited:
    weights = [weight for weight in proto.graph.initializer if weight.name[0] in "ws"]
    if not weights:
        return _operator(proto, rng)
    weight = rng.choice(weights)
    weight.CopyFrom(numpy_helper.from_array(distinct_values(rng.randrange(10**6) + 10**6), weight.name))
    return Edited(proto, frozenset({("initializer", "changed", weight.name)}))


EDITS: dict[str, Callable[[onnx.ModelProto, random.Random], Edited]] = {
    "insert": _insert,
    "remove": _remove,
    "operator": _operator,
    "attribute": _attribute,
    "rewire": _rewire,
    "weight": _values_of_weight,
}


def edited(proto: onnx.ModelProto, edit: str, seed: int) -> Edited:
    """A copy with one seeded edit. Attributes need not be those of the operator: nothing here is run."""
    return EDITS[edit](copied(proto), random.Random(seed))
