"""What became of each node that a pass names: two looks at one graph that was edited in place, compared.

A node is the same one as long as it is the same object. What a pass put beside the nodes that it names belongs to the
rewrite whose nodes are nearest, counted in nodes along tensors that are computed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx_graphsurgeon as gs

from pi05c.graph.io import scopes
from pi05c.graph.text import attribute_text, declared, node_line
from pi05c.graph.weights import Weight, weight_of
from pi05c.passes.patterns.parts import parts_of


@dataclass(frozen=True)
class Place:
    """A node, or an input or initializer, that a pass changed or left alone.

    Attributes:
        name: as the pass named it.
        operator: of the node before the pass; `initializer`, `input` or `` where it is no node.
        scope: the body that it lies in, by the names of the nodes around it; empty for the graph itself.
        part: vision, prefix or denoise; empty where it is not known.
    """

    name: str
    operator: str
    scope: str
    part: str


@dataclass(frozen=True)
class Changed:
    """A place that a rewrite names, and what becomes of it, in one phrase."""

    place: Place
    becomes: str


@dataclass(frozen=True)
class Rewrite:
    """One rewrite, as `--rewrite-limit` counts them.

    Attributes:
        number: from 1.
        changed: what it names.
        removed, added: canonical text of each node that it removes or edits, and adds or leaves edited.
        beside: the same in words, of nodes that it does not name: `adds 2 Cast, removes 1 Mul`.
    """

    number: int
    changed: tuple[Changed, ...]
    removed: tuple[str, ...]
    added: tuple[str, ...]
    beside: str


@dataclass(frozen=True)
class _Node:
    """A node as it stood; `node` is the object that the pass may edit, `read` and `made` the names of
    its inputs and outputs."""

    node: gs.Node
    name: str
    operator: str
    scope: str
    text: str
    attributes: dict[str, Any]
    inputs: tuple[gs.Tensor, ...]
    read: tuple[str, ...]
    outputs: tuple[gs.Tensor, ...]
    made: tuple[str, ...]
    declared: tuple[str, ...]
    weights: tuple[Weight | None, ...]

    def differs(self, other: _Node) -> bool:
        return (
            self.text != other.text
            or any(a is not b for a, b in zip(self.inputs, other.inputs, strict=False))
            or any(a is not b for a, b in zip(self.weights, other.weights, strict=False))
        )


class Snapshot:
    """A graph with its bodies at one moment.

    Attributes:
        nodes: by id.
        readers: ids of the nodes that read a tensor, by its id.
        makers: id of the node that makes a tensor, by its id.
        parts: part of a node, by its id.
        inside: ids of the nodes in the bodies of a node, by its id.
        constants: declaration and values of an initializer, by its id.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.inputs = list(graph.inputs)
        self.nodes: dict[int, _Node] = {}
        self.readers: dict[int, list[int]] = {}
        self.makers: dict[int, int] = {}
        self.parts: dict[int, Any] = dict(parts_of(graph))
        self.inside: dict[int, list[int]] = {}
        self.constants: dict[int, tuple[str, Weight]] = {}
        self._add(graph, "")

    def _add(self, graph: gs.Graph, scope: str) -> None:
        for node in graph.nodes:
            inputs, outputs = tuple(node.inputs), tuple(node.outputs)
            self.nodes[id(node)] = _Node(
                node,
                node.name,
                node.op,
                scope,
                node_line(node),
                dict(node.attrs),
                inputs,
                tuple(tensor.name for tensor in inputs),
                outputs,
                tuple(tensor.name for tensor in outputs),
                tuple(map(declared, outputs)),
                tuple(weight_of(each) if isinstance(each, gs.Constant) else None for each in inputs),
            )
            for tensor in inputs:
                self.readers.setdefault(id(tensor), []).append(id(node))
                if isinstance(tensor, gs.Constant):
                    self.constants[id(tensor)] = declared(tensor), weight_of(tensor)
            for tensor in outputs:
                self.makers[id(tensor)] = id(node)
            for key, value in node.attrs.items():
                if isinstance(value, gs.Graph):
                    inside = f"{node.name or node.op}/{key}"
                    self._add(value, f"{scope}/{inside}" if scope else inside)
                    nested = [id(each) for body in scopes(value) for each in body.nodes]
                    self.inside.setdefault(id(node), []).extend(nested)

    @cached_property
    def _named(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for key, seen in self.nodes.items():
            found.setdefault(seen.name, key)
        return found

    @cached_property
    def tensors(self) -> dict[str, gs.Tensor]:
        """The first tensor of each name."""
        found: dict[str, gs.Tensor] = {tensor.name: tensor for tensor in self.inputs}
        for seen in self.nodes.values():
            for name, tensor in (
                *zip(seen.read, seen.inputs, strict=True),
                *zip(seen.made, seen.outputs, strict=True),
            ):
                found.setdefault(name, tensor)
        return found

    def find(self, name: str) -> int | None:
        """The node of that name, or of its last word where that is a phrase: `softmax NODE`."""
        return self._named.get(name, self._named.get(name.rpartition(" ")[2]))

    def neighbours(self, key: int) -> Iterator[int]:
        """Nodes that hand a computed tensor to a node, or take one from it."""
        seen = self.nodes.get(key)
        if seen is None:
            return
        for tensor in seen.inputs:
            if id(tensor) in self.makers:
                yield self.makers[id(tensor)]
        for tensor in seen.outputs:
            yield from self.readers.get(id(tensor), ())


class Told:
    """Says what became of the places that a pass named.

    Attributes:
        before, after: the graph in front of the pass and behind it.
    """

    def __init__(self, before: Snapshot, after: Snapshot) -> None:
        self.before, self.after = before, after

    def place(self, name: str) -> Place:
        """Where a name that a pass reported belongs: a node, a tensor, or `softmax NODE`."""
        for side in (self.before, self.after):
            if (key := side.find(name)) is not None:
                seen = side.nodes[key]
                return Place(name, seen.operator, seen.scope, side.parts.get(key, ""))
            if (tensor := side.tensors.get(name)) is not None:
                maker = side.makers.get(id(tensor))
                reader = next(iter(side.readers.get(id(tensor), ())), None)
                key = reader if maker is None else maker
                kind = "initializer" if isinstance(tensor, gs.Constant) else "input"
                if key is None:
                    return Place(name, kind, "", "")
                seen = side.nodes[key]
                return Place(
                    name, kind if maker is None else seen.operator, seen.scope, side.parts.get(key, "")
                )
        return Place(name, "", "", "")

    def rewrites(self, named: Sequence[Sequence[str]]) -> tuple[Rewrite, ...]:
        """One `Rewrite` for each tuple of names."""
        touched = self._shared_out([self._nodes_of(names) for names in named])
        found = []
        for number, names in enumerate(named, 1):
            changed = tuple(Changed(self.place(name), self._becomes(name)) for name in names)
            own = set(self._nodes_of(names))
            nodes = touched.get(number - 1, [])
            found.append(
                Rewrite(
                    number,
                    changed,
                    tuple(self.before.nodes[key].text for key in nodes if key in self.before.nodes),
                    tuple(self.after.nodes[key].text for key in nodes if key in self.after.nodes),
                    self._beside([key for key in nodes if key not in own]),
                )
            )
        return tuple(found)

    def _nodes_of(self, names: Sequence[str]) -> list[int]:
        """The nodes that names stand for: the node itself, the maker of a tensor, or the readers of one that has none."""
        found: dict[int, None] = {}
        for name in names:
            for side in (self.before, self.after):
                if (key := side.find(name)) is not None:
                    found[key] = None
                elif (tensor := side.tensors.get(name)) is not None:
                    maker = side.makers.get(id(tensor))
                    found.update(
                        dict.fromkeys(side.readers.get(id(tensor), ()) if maker is None else [maker])
                    )
        return list(found)

    @cached_property
    def _touched(self) -> list[int]:
        """Nodes that were removed, added or edited, in the order of the graphs."""
        before, after = self.before.nodes, self.after.nodes
        gone = [key for key in before if key not in after]
        return gone + [key for key in after if key not in before or before[key].differs(after[key])]

    def _shared_out(self, seeds: Sequence[Sequence[int]]) -> dict[int, list[int]]:
        """The touched nodes by the rewrite that is nearest; the first of several."""
        owner: dict[int, int] = {}
        for index, keys in enumerate(seeds):
            for key in keys:
                for own in (key, *self.before.inside.get(key, ())):
                    owner.setdefault(own, index)
        queue = deque(owner)
        while queue:
            key = queue.popleft()
            for side in (self.before, self.after):
                for other in side.neighbours(key):
                    if other not in owner:
                        owner[other] = owner[key]
                        queue.append(other)
        shared: dict[int, list[int]] = {}
        for key in self._touched:
            if key in owner:
                shared.setdefault(owner[key], []).append(key)
        return shared

    def _beside(self, keys: Sequence[int]) -> str:
        before, after = self.before.nodes, self.after.nodes
        groups = {
            "adds": Counter(after[key].operator for key in keys if key not in before),
            "removes": Counter(before[key].operator for key in keys if key not in after),
            "edits": Counter(after[key].operator for key in keys if key in before and key in after),
        }
        return "; ".join(
            f"{verb} {', '.join(f'{count} {operator}' for operator, count in counts.most_common())}"
            for verb, counts in groups.items()
            if counts
        )

    # One place

    def _becomes(self, name: str) -> str:
        key = self.before.find(name)
        if key is not None and key in self.after.nodes:
            return "; ".join(_edits(self.before.nodes[key], self.after.nodes[key])) or "stays"
        if key is not None:
            return self._replacement(list(self.before.nodes[key].outputs)) or "removed"
        tensor = self.before.tensors.get(name)
        if tensor is None:
            return "new"
        maker = self.before.makers.get(id(tensor))
        if maker is not None:
            return self._becomes_of_made(maker, tensor)
        if (old := self.before.constants.get(id(tensor))) and (new := self.after.constants.get(id(tensor))):
            if old[0] != new[0]:
                return f"{_typed(old[0])} -> {_typed(new[0])}"
            return "stays" if old[1] is new[1] else "has other values"
        if self.after.tensors.get(name) is tensor:
            return "stays"
        return self._replacement([tensor]) or "removed"

    def _becomes_of_made(self, maker: int, tensor: gs.Tensor) -> str:
        if maker in self.after.nodes:
            return "; ".join(_edits(self.before.nodes[maker], self.after.nodes[maker])) or "stays"
        return self._replacement([tensor]) or "removed"

    def _replacement(self, outputs: Sequence[gs.Tensor]) -> str:
        """What stands where tensors of a removed node, or removed tensors, stood."""
        for tensor in outputs:
            if (maker := self.after.makers.get(id(tensor))) is not None:
                return f"removed: {self.after.nodes[maker].operator} makes %{tensor.name}"
        for tensor in outputs:
            for reader in self.before.readers.get(id(tensor), ()):
                if reader in self.after.nodes:
                    old, new = self.before.nodes[reader].inputs, self.after.nodes[reader].inputs
                    place = next(index for index, read in enumerate(old) if read is tensor)
                    if place < len(new) and new[place] is not tensor:
                        return f"removed: {self._described(new[place])} takes its place"
        return ""

    def _described(self, tensor: gs.Tensor) -> str:
        maker = self.after.makers.get(id(tensor))
        operator = "" if maker is None else f" of {self.after.nodes[maker].operator}"
        return f"%{tensor.name}{operator}"


def _edits(before: _Node, after: _Node) -> Iterator[str]:
    """What differs between two looks at one node."""
    if before.operator != after.operator:
        yield f"{before.operator} -> {after.operator}"
        return
    if before.name != after.name:
        yield f"renamed {after.name}"
    for old, new in zip(before.declared, after.declared, strict=False):
        if _typed(old) != _typed(new):
            yield f"{_typed(old)} -> {_typed(new)}"
    for key in sorted({*before.attributes, *after.attributes}):
        texts = [
            attribute_text(key, side.attributes[key]) if key in side.attributes else "none"
            for side in (before, after)
            if not isinstance(side.attributes.get(key), gs.Graph)
        ]
        if len(texts) == 2 and texts[0] != texts[1]:
            yield f"{key} {texts[0]} -> {texts[1]}"
    if len(before.inputs) != len(after.inputs):
        yield f"{len(before.inputs)} inputs -> {len(after.inputs)}"
    for index, (old, new) in enumerate(zip(before.inputs, after.inputs, strict=False)):
        if old is not new:
            name = before.read[index]
            yield f"reads %{new.name}" + ("" if new.name.startswith(name) else f" for %{name}")
        elif before.weights[index] is not after.weights[index]:
            yield f"%{new.name} has other values"


def _typed(declaration: str) -> str:
    """Type and shape of `%x: float32[4]`."""
    return declaration.rpartition(": ")[2]


__all__ = ["Changed", "Place", "Rewrite", "Snapshot", "Told"]
