"""What two graphs differ in: nodes added, removed, changed, retyped, rewired, and initializers likewise.

Names, the order of nodes, metadata and doc strings are no difference. Neither is an edge that a node was put into or
taken out of: the node itself is reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from pi05c.graph.align import Alignment, align, same_shape
from pi05c.graph.domains import full_name
from pi05c.graph.dtypes import to_numpy
from pi05c.graph.text import declared, initializer_line, initializer_text, node_line
from pi05c.graph.wiring import MISSING, Wiring

Kind = Literal["added", "removed", "changed", "retyped", "rewired", "renamed"]
"""changed: operator, attributes or values; retyped: type or shape; rewired: an input comes from elsewhere."""

KINDS: tuple[Kind, ...] = ("removed", "added", "changed", "retyped", "rewired", "renamed")

Thing = Literal["model", "input", "output", "initializer", "node"]

_MAX_REGION = 64
"""How many added or removed nodes are followed from an edge to the tensor that it came from before."""


@dataclass(frozen=True)
class Change:
    """One thing that differs.

    Attributes:
        thing: what kind of thing it is.
        kinds: how it differs; `added` and `removed` stand alone.
        scope: the body that it lies in, by the names of the nodes around it; empty for the graph itself.
        name: what it is called, in the second graph where it is in both.
        before, after: canonical text; None in the graph that lacks it.
        details: each difference in words.
        a, b: number of the node, or of the tensor of an initializer, in the wiring of each graph; None where there is none.
    """

    thing: Thing
    kinds: tuple[Kind, ...]
    scope: str
    name: str
    before: str | None
    after: str | None
    details: tuple[str, ...] = ()
    a: int | None = None
    b: int | None = None

    def mirrored(self) -> Change:
        """The same, seen from the other graph; without the words, which have a direction."""
        other: dict[Kind, Kind] = {"added": "removed", "removed": "added"}
        kinds = tuple(other.get(kind, kind) for kind in self.kinds)
        return Change(self.thing, kinds, self.scope, self.name, self.after, self.before, (), self.b, self.a)


@dataclass(frozen=True)
class GraphDiff:
    """The differences of two graphs, in the order of execution, and the pairs that they rest on."""

    changes: tuple[Change, ...]
    alignment: Alignment

    def counts(self) -> dict[tuple[Thing, Kind], int]:
        """How many changes of each kind there are; one that is retyped and rewired counts as both."""
        return dict(Counter((change.thing, kind) for change in self.changes for kind in change.kinds))


def diff_graphs(a: gs.Graph, b: gs.Graph, *, names: bool = False) -> GraphDiff:
    """Compare two graphs; `names` reports what has another name as well."""
    comparison = _Comparison(align(a, b), names)
    found = [*comparison.model(), *comparison.interface(), *comparison.initializers(), *comparison.nodes()]
    return GraphDiff(tuple(found), comparison.pairs)


class _Comparison:
    def __init__(self, pairs: Alignment, names: bool) -> None:
        self.pairs = pairs
        self.names = names
        self.a, self.b = pairs.a, pairs.b
        self.made = {y: x for x, y in pairs.nodes.items()}

    def model(self) -> Iterator[Change]:
        before, after = (side.scopes[0].graph.opset for side in (self.a, self.b))
        if before != after:
            yield Change(
                "model", ("changed",), "", "opset", str(before), str(after), (f"opset: {before} -> {after}",)
            )

    def interface(self) -> Iterator[Change]:
        """Inputs and outputs of the graph itself."""
        mine, theirs = self.a.entries[0], self.b.entries[0]
        pairs = {
            place: theirs.index(self.pairs.tensors[s])
            for place, s in enumerate(mine)
            if s in self.pairs.tensors
        }
        yield from self._ends("input", mine, theirs, pairs)
        yield from self._ends("output", self.a.results[0], self.b.results[0], self.pairs.outputs)

    def _ends(
        self, thing: Literal["input", "output"], mine: list[int], theirs: list[int], pairs: dict[int, int]
    ) -> Iterator[Change]:
        for i, s in enumerate(mine):
            old = self.a.tensors[s]
            if i not in pairs:
                yield Change(thing, ("removed",), "", old.name, declared(old), None)
                continue
            t = theirs[pairs[i]]
            new = self.b.tensors[t]
            kinds: list[Kind] = []
            details = []
            if detail := _retyped(old, new):
                kinds.append("retyped")
                details.append(detail)
            if thing == "output" and not self._same_source(s, t):
                kinds.append("rewired")
                details.append(f"%{old.name} -> %{new.name}")
            if i != pairs[i]:
                kinds.append("changed")
                details.append(f"place {i} -> {pairs[i]}")
            if self.names and old.name != new.name:
                kinds.append("renamed")
            if kinds:
                yield Change(thing, tuple(kinds), "", new.name, declared(old), declared(new), tuple(details))
        for j, t in enumerate(theirs):
            if j not in pairs.values():
                new = self.b.tensors[t]
                yield Change(thing, ("added",), "", new.name, None, declared(new))

    def initializers(self) -> Iterator[Change]:
        other = {t: s for s, t in self.pairs.tensors.items()}
        for s in _read_constants(self.a):
            t = self.pairs.tensors.get(s)
            if t is None:
                constant = self.a.tensors[s]
                yield Change(
                    "initializer", ("removed",), "", constant.name, initializer_line(constant), None, a=s
                )
        for t in _read_constants(self.b):
            new = self.b.tensors[t]
            if t not in other:
                yield Change("initializer", ("added",), "", new.name, None, initializer_line(new), b=t)
                continue
            s = other[t]
            old = self.a.tensors[s]
            kinds: list[Kind] = []
            details = []
            if _type_of(old) != _type_of(new):
                kinds.append("retyped")
                details.append(f"{_type_of(old)} -> {_type_of(new)}")
            elif self.a.content[s] != self.b.content[t]:
                kinds.append("changed")
                details.append(f"{initializer_text(old)} -> {initializer_text(new)}")
            if self.names and old.name != new.name:
                kinds.append("renamed")
            if kinds:
                lines = initializer_line(old), initializer_line(new)
                yield Change("initializer", tuple(kinds), "", new.name, *lines, tuple(details), s, t)

    def nodes(self) -> Iterator[Change]:
        """Nodes in the order of `b`; those that `a` alone has stand before the next that both have."""
        removed = [x for x in range(len(self.a.nodes)) if x not in self.pairs.nodes]
        shown = 0
        for y, new in enumerate(self.b.nodes):
            x = self.made.get(y)
            if x is None:
                path = self.b.path(self.b.scope[y])
                yield Change("node", ("added",), path, _called(new), None, node_line(new), b=y)
                continue
            while shown < len(removed) and removed[shown] < x:
                yield self._removed(removed[shown])
                shown += 1
            change = self._compared(x, y)
            if change is not None:
                yield change
        for x in removed[shown:]:
            yield self._removed(x)

    def _removed(self, x: int) -> Change:
        old = self.a.nodes[x]
        return Change(
            "node", ("removed",), self.a.path(self.a.scope[x]), _called(old), node_line(old), None, a=x
        )

    def _compared(self, x: int, y: int) -> Change | None:
        old, new = self.a.nodes[x], self.b.nodes[y]
        kinds: list[Kind] = []
        details: list[str] = []
        if (old.op, old.domain or "") != (new.op, new.domain or ""):
            kinds.append("changed")
            details.append(f"operator: {full_name(old)} -> {full_name(new)}")
        before, after = self.a.attributes[x], self.b.attributes[y]
        if before != after:
            kinds += ["changed"] if "changed" not in kinds else []
            details += [
                f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
                for key in sorted(before.keys() | after.keys())
                if before.get(key) != after.get(key)
            ]
        retyped = [
            detail
            for s, t in zip(old.outputs, new.outputs, strict=False)
            if s.name and t.name and (detail := _retyped(s, t))
        ]
        rewired = [*self._rewired_inputs(x, y), *self._rewired_bodies(x, y)]
        if len(old.outputs) != len(new.outputs):
            rewired.append(f"{len(old.outputs)} -> {len(new.outputs)} outputs")
        for kind, found in (("retyped", retyped), ("rewired", rewired)):
            if found:
                kinds.append(kind)  # type: ignore[arg-type]
                details += found
        if self.names:
            called = [(f"%{s.name}", f"%{t.name}") for s, t in zip(old.outputs, new.outputs, strict=False)]
            renamed = [f"{p} -> {q}" for p, q in ((old.name, new.name), *called) if p != q]
            if renamed:
                kinds.append("renamed")
                details += renamed
        if not kinds:
            return None
        path = self.b.path(self.b.scope[y])
        return Change(
            "node", tuple(kinds), path, _called(new), node_line(old), node_line(new), tuple(details), x, y
        )

    def _rewired_inputs(self, x: int, y: int) -> Iterator[str]:
        mine, theirs = self.a.ins[x], self.b.ins[y]
        for place in range(max(len(mine), len(theirs))):
            s = mine[place] if place < len(mine) else MISSING
            t = theirs[place] if place < len(theirs) else MISSING
            if not self._same_source(s, t):
                yield f"input {place}: {_reads(self.a, s)} -> {_reads(self.b, t)}"

    def _rewired_bodies(self, x: int, y: int) -> Iterator[str]:
        """Results of the bodies of a node that come from elsewhere, and bodies that have others."""
        theirs = {self.b.scopes[scope].key: scope for scope in self.b.bodies.get(y, ())}
        for scope in self.a.bodies.get(x, ()):
            key = self.a.scopes[scope].key
            if key not in theirs:
                continue
            for what, mine, others in (
                ("input", self.a.entries[scope], self.b.entries[theirs[key]]),
                ("output", self.a.results[scope], self.b.results[theirs[key]]),
            ):
                if len(mine) != len(others):
                    yield f"{key}: {len(mine)} -> {len(others)} {what}s"
                elif what == "output":
                    for place, (s, t) in enumerate(zip(mine, others, strict=True)):
                        if not self._same_source(s, t):
                            yield f"{key} output {place}: {_reads(self.a, s)} -> {_reads(self.b, t)}"

    def _same_source(self, s: int, t: int) -> bool:
        """Whether an edge comes from the same tensor, or from it through nodes that were added or removed."""
        if MISSING in (s, t):
            return s == t
        if self.pairs.tensors.get(s) == t:
            return True
        held, other = self.a.content[s], self.b.content[t]
        if held is not None and held == other:
            return True
        gone = self._is_unmatched(self.a, s, self.pairs.nodes)
        new = self._is_unmatched(self.b, t, self.made)
        if gone and new:
            return True
        if gone or new:
            before = _reached(self.a, s, self.pairs.nodes)
            after = _reached(self.b, t, self.made)
            return any(self.pairs.tensors.get(tensor) in after for tensor in before)
        return False

    def _is_unmatched(self, side: Wiring, tensor: int, matched: dict[int, int]) -> bool:
        made = side.maker[tensor]
        return made is not None and made[0] not in matched


def _reached(side: Wiring, tensor: int, matched: dict[int, int]) -> set[int]:
    """The tensors that lead to `tensor` through nodes that are not matched."""
    found: set[int] = set()
    nodes: set[int] = set()
    open_ends = [tensor]
    while open_ends and len(nodes) < _MAX_REGION:
        made = side.maker[end] if (end := open_ends.pop()) != MISSING else None
        if made is None or made[0] in matched:
            found.add(end)
        elif made[0] not in nodes:
            nodes.add(made[0])
            open_ends += side.ins[made[0]]
    return found


def _read_constants(side: Wiring) -> Iterator[int]:
    for tensor, content in enumerate(side.content):
        if content is not None and (side.uses[tensor] or side.returned[tensor]):
            yield tensor


def _retyped(old: gs.Tensor, new: gs.Tensor) -> str:
    """How a tensor's type or shape differs, as far as both are known; empty where it does not."""
    types = to_numpy(old.dtype), to_numpy(new.dtype)
    same_type = types[0] == types[1] or None in types
    if same_type and same_shape(old.shape, new.shape):
        return ""
    return f"{_type_of(old)} -> {_type_of(new)}"


def _type_of(tensor: gs.Tensor) -> str:
    return declared(tensor).removeprefix(f"%{tensor.name}: ")


def _reads(side: Wiring, tensor: int) -> str:
    return "nothing" if tensor == MISSING else f"%{side.tensors[tensor].name}"


def _called(node: gs.Node) -> str:
    return str(node.name or next((tensor.name for tensor in node.outputs if tensor.name), node.op))


__all__ = ["KINDS", "Change", "GraphDiff", "Kind", "Thing", "diff_graphs"]
