"""Which node of one graph is which node of another, by what they compute and where they stand, whatever their names.

In order, each step for the nodes that are left:

1. The same computation: everything upstream is equal, or everything downstream is. Hashes of both are built up node by
   node (Merkle), constants by what they hold, so that one edit leaves every other node with at least one of them.
   Downstream, each node that reaches an output has a hash of its own: ten identical steps are not confused.
2. The same place in the skeleton: the graph without `TRANSPARENT` operators and without the values of constants.
   A change of precision leaves it whole.
3. The same neighbours: from matched nodes along their edges, the pair that most neighbours speak for first; names and
   order decide between equals. Then pairs that no neighbour reaches, by name, and from those along their edges again.
4. The same readers and sources under another operator, or with results of another shape.

Linear in the size of the graphs but for sorting. The two graphs play the same part: aligned the other way round, they
give the same pairs.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from pi05c.graph.clone import collection_paused
from pi05c.graph.wiring import MISSING, Content, Wiring, is_unknown_dim, wiring

MAX_CROWD = 16
"""Readers of one tensor that look alike are paired in their order where both graphs have as many, else each with each up
to this number, so that a constant with thousands of readers takes no quadratic time."""

_LARGE_ELEMENTS = 8
"""A constant of more elements than this speaks for the nodes that read it; smaller ones are everywhere."""


@dataclass(frozen=True)
class Alignment:
    """Pairs between the graph `a` and the graph `b`.

    Attributes:
        nodes: node of `b` by node of `a`.
        tensors: the same of tensors; constants by the places where they are read.
        scopes: the same of the graph and its bodies.
        outputs: the same of the places of the outputs of the graph.
    """

    a: Wiring
    b: Wiring
    nodes: dict[int, int]
    tensors: dict[int, int]
    scopes: dict[int, int]
    outputs: dict[int, int]

    def mirrored(self) -> Alignment:
        """The alignment of `b` with `a`."""
        pairs = (self.nodes, self.tensors, self.scopes, self.outputs)
        return Alignment(self.b, self.a, *({y: x for x, y in each.items()} for each in pairs))


def align(a: gs.Graph, b: gs.Graph) -> Alignment:
    """Pair the nodes, tensors and bodies of two graphs. External weights with a recorded checksum are not read."""
    with collection_paused():
        wired_a, wired_b = wiring(a), wiring(b)
        if _goes_first(wired_b, wired_a):
            return _Aligner(wired_b, wired_a).run().mirrored()
        return _Aligner(wired_a, wired_b).run()


def _goes_first(a: Wiring, b: Wiring) -> bool:
    """An order of graphs, so that the same one is `a` while they are aligned, whichever the caller names first."""
    sizes = (len(a.nodes), len(a.tensors)), (len(b.nodes), len(b.tensors))
    return sizes[0] < sizes[1] if sizes[0] != sizes[1] else _identity(a) < _identity(b)


def _identity(graph: Wiring) -> str:
    """A hash in which graphs of one size differ, names included."""
    digest = hashlib.sha256()
    for index, node in enumerate(graph.nodes):
        read = [(graph.tensors[t].name, graph.content[t]) for t in graph.ins[index] if t != MISSING]
        made = [tensor.name for tensor in node.outputs]
        digest.update(repr((node.op, node.name, graph.attributes[index], read, made)).encode())
    for tensor in graph.tensors:
        digest.update(repr((tensor.name, str(tensor.dtype), tensor.shape)).encode())
    digest.update(repr((graph.entries, graph.results)).encode())
    return digest.hexdigest()


class _Hashes:
    """Small numbers for hashable values, the same number for the same value in both graphs: no collisions."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def of(self, value: Hashable) -> int:
        return self._numbers.setdefault(value, len(self._numbers))


@dataclass
class _Side:
    """One of the two graphs, with what its nodes are called while they are aligned.

    Attributes:
        kind: operator of each node with its domain.
        attributes: of each node, as one value.
        label: kind, attributes, and what the constants that the node reads hold.
        skeleton_uses: readers of a tensor, those behind `TRANSPARENT` nodes included and these left out.
        partner: the matched node of the other side, None where there is none.
        tensor_partner: the matched tensor, constants left out.
    """

    graph: Wiring
    kind: list[int]
    attributes: list[int]
    label: list[int]
    skeleton_uses: list[list[tuple[int, int]]]
    partner: list[int | None]
    tensor_partner: dict[int, int]

    @classmethod
    def of(cls, graph: Wiring, hashes: _Hashes) -> _Side:
        kind, attributes, label = [], [], []
        skeleton_uses: list[list[tuple[int, int]]] = [[] for _ in graph.tensors]
        for index, node in enumerate(graph.nodes):
            kind.append(hashes.of(("kind", node.op, node.domain or "")))
            attributes.append(hashes.of(("attributes", *graph.attributes[index].items())))
            held = tuple(None if t == MISSING else graph.content[t] for t in graph.ins[index])
            label.append(hashes.of(("label", kind[-1], attributes[-1], held)))
            if not graph.transparent[index]:
                for place, tensor in enumerate(graph.ins[index]):
                    if tensor != MISSING:
                        skeleton_uses[graph.source(tensor)].append((index, place))
        return cls(graph, kind, attributes, label, skeleton_uses, [None] * len(graph.nodes), {})

    def readers(self, tensor: int) -> list[tuple[int, int]]:
        """Nodes that read a tensor, directly or behind `TRANSPARENT` nodes, with the input places."""
        return list(dict.fromkeys((*self.graph.uses[tensor], *self.skeleton_uses[tensor])))

    def makers(self, node: int) -> list[tuple[int, int]]:
        """What makes the inputs of a node, directly or behind `TRANSPARENT` nodes: (input place, tensor)."""
        found = [(place, tensor) for place, tensor in enumerate(self.graph.ins[node]) if tensor != MISSING]
        return list(dict.fromkeys((*found, *((place, self.graph.source(tensor)) for place, tensor in found))))


class _Aligner:
    def __init__(self, a: Wiring, b: Wiring) -> None:
        self.hashes = _Hashes()
        self.a, self.b = _Side.of(a, self.hashes), _Side.of(b, self.hashes)
        self.scopes: dict[int, int] = {}
        self.outputs = _output_pairs(a, b)
        self.output_keys = [
            [self._output_keys(number, scope) for scope in range(len(graph.scopes))]
            for number, graph in enumerate((a, b))
        ]
        self.down: tuple[list[int | None], list[int | None]] = ([None] * len(a.nodes), [None] * len(b.nodes))
        for number, graph in enumerate((a, b)):
            self._downstream(graph, number)
        self.votes: Counter[tuple[int, int]] = Counter()
        self.heap: list[tuple[Any, ...]] = []
        self.held_on_both: frozenset[Content] = frozenset(_large(a) & _large(b))

    def run(self) -> Alignment:
        self.scopes[0] = 0
        self._match_inputs()
        self._match_same_computation()
        if None in self.a.partner and None in self.b.partner:
            self._match_what_differs()
        return Alignment(
            self.a.graph,
            self.b.graph,
            {node: partner for node, partner in enumerate(self.a.partner) if partner is not None},
            {**self.a.tensor_partner, **_matched_constants(self.a, self.b)},
            self.scopes,
            dict(self.outputs),
        )

    def _match_what_differs(self) -> None:
        self._match_skeleton()
        self._seed()
        self._follow_edges()
        self._match_names()
        self._follow_edges()
        if self._match_places():
            self._follow_edges()

    # Pairs

    def _may_match(self, x: int, y: int) -> bool:
        return (
            self.a.partner[x] is None
            and self.b.partner[y] is None
            and self.scopes.get(self.a.graph.scope[x]) == self.b.graph.scope[y]
        )

    def _match(self, x: int, y: int) -> None:
        a, b = self.a.graph, self.b.graph
        self.a.partner[x], self.b.partner[y] = y, x
        for s, t in zip(a.outs[x], b.outs[y], strict=False):
            self._match_tensors(s, t)
        bodies = {b.scopes[scope].key: scope for scope in b.bodies.get(y, ())}
        for scope in a.bodies.get(x, ()):
            if a.scopes[scope].key in bodies:
                self._match_scope(scope, bodies[a.scopes[scope].key])

    def _match_tensors(self, s: int, t: int) -> None:
        a, b = self.a, self.b
        if MISSING not in (s, t) and a.graph.content[s] is None and b.graph.content[t] is None:
            a.tensor_partner[s], b.tensor_partner[t] = t, s

    def _match_scope(self, x: int, y: int) -> None:
        """Pair a body and its inputs: in their order, by name only where one has more."""
        self.scopes[x] = y
        a, b = self.a.graph, self.b.graph
        mine, theirs = a.entries[x], b.entries[y]
        if len(mine) == len(theirs):
            pairs = [(place, place) for place in range(len(mine))]
        else:
            pairs = _named_pairs(a, mine, b, theirs)
        for i, j in pairs:
            self._match_tensors(mine[i], theirs[j])

    def _match_inputs(self) -> None:
        """Pair the inputs of the graph: what feeds the same computation, then by name, then in order."""
        a, b = self.a.graph, self.b.graph
        at = {self._fed(1, t): t for t in b.entries[0]}
        for s in a.entries[0]:
            t = at.pop(self._fed(0, s), None)
            if t is not None:
                self._match_tensors(s, t)
        left = [s for s in a.entries[0] if s not in self.a.tensor_partner]
        free = [t for t in b.entries[0] if t not in self.b.tensor_partner]
        for i, j in _named_pairs(a, left, b, free):
            self._match_tensors(left[i], free[j])

    # 1. The same computation

    def _match_same_computation(self) -> None:
        """Pair what has everything downstream, or everything upstream, in common.

        Where a block of several equal ones was taken out, both say something and contradict each other. Names decide,
        if most of them mean something: pairs of one name go first.
        """
        down, up = self.down, (self._upstream(self.a.graph, 0), self._upstream(self.b.graph, 1))
        pairs = _unique_pairs(*down)
        named = [pair for pair in pairs if self._same_name(*pair)]
        if 2 * len(named) >= len(pairs):
            upstream = [pair for pair in _unique_pairs(*up) if self._same_name(*pair)]
            pairs = [*sorted({*named, *upstream}, reverse=True), *pairs]
        for x, y in pairs:
            self._match_if_possible(x, y)
        self._match_upstream(*up)

    def _same_name(self, x: int, y: int) -> bool:
        return bool(self.a.graph.nodes[x].name == self.b.graph.nodes[y].name)

    def _output_keys(self, side: int, scope: int) -> dict[int, int]:
        """What the output places of a scope are called in hashes: the same for both of a pair."""
        if scope == 0:
            return {pair[side]: number for number, pair in enumerate(self.outputs)}
        graph = (self.a, self.b)[side].graph
        return {place: place for place in range(len(graph.results[scope]))}

    def _downstream(self, graph: Wiring, side: int) -> None:
        """A hash of everything that follows from a node; None of one that no output needs."""
        down = self.down[side]
        label = (self.a, self.b)[side].label
        for node in range(len(graph.nodes) - 1, -1, -1):
            ends = [
                (place, *end)
                for place, tensor in enumerate(graph.outs[node])
                if tensor != MISSING
                for end in self._fed(side, tensor)
            ]
            if ends:
                down[node] = self.hashes.of(("down", label[node], *ends))

    def _fed(self, side: int, tensor: int) -> tuple[tuple[int, ...], ...]:
        """What reads or returns a tensor, as far as outputs need it; after `_downstream` of the readers."""
        graph, down = (self.a, self.b)[side].graph, self.down[side]
        ends: list[tuple[int, ...]] = []
        for reader, slot in graph.uses[tensor]:
            if (key := down[reader]) is not None:
                ends.append((0, key, slot))
        for scope, place in graph.returned[tensor]:
            owner = graph.scopes[scope].owner
            number = self.output_keys[side][scope].get(place, -1 - side)  # an output that one graph alone has
            holder = -1 if owner == MISSING else down[owner]
            if holder is not None:
                ends.append((1, holder, self.hashes.of(graph.scopes[scope].key), number))
        return tuple(sorted(ends))

    def _upstream(self, graph: Wiring, side: int) -> list[int]:
        """A hash of everything that leads to a node."""
        of = self.hashes.of
        own = self.a if side == 0 else self.b
        up: list[int] = []
        value: list[int | None] = [None if held is None else of(("held", held)) for held in graph.content]
        partners = own.tensor_partner if side == 0 else {t: t for t in own.tensor_partner}

        def hash_of(tensor: int) -> int:
            if tensor == MISSING:
                return of("missing")
            known = value[tensor]
            if known is None:
                if tensor in graph.entry:
                    scope, place = graph.entry[tensor]
                    owner = graph.scopes[scope].owner
                    if owner == MISSING:
                        # the number that the pair of inputs has in `b`; an input that one graph alone has: by its side
                        known = of(
                            ("input", partners[tensor]) if tensor in partners else ("own", side, place)
                        )
                    else:
                        fed = tuple(hash_of(t) for t in graph.ins[owner])
                        known = of(("entry", graph.scopes[scope].key, place, own.label[owner], fed))
                else:
                    known = of(("unmade", side, tensor))
                value[tensor] = known
            return known

        for node in range(len(graph.nodes)):
            bodies = tuple(
                (graph.scopes[scope].key, tuple(hash_of(t) for t in graph.results[scope]))
                for scope in graph.bodies.get(node, ())
            )
            fed = tuple(hash_of(t) for t in graph.ins[node])
            up.append(of(("up", own.label[node], fed, bodies)))
            for place, tensor in enumerate(graph.outs[node]):
                if tensor != MISSING:
                    value[tensor] = of(("made", up[node], place))
        return up

    def _match_upstream(self, up_a: list[int], up_b: list[int]) -> None:
        """Pair nodes of equal upstream: first as their readers are paired, then alone, then by name and order."""
        alike: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for side, up in enumerate((up_a, up_b)):
            for node, key in enumerate(up):
                if (self.a, self.b)[side].partner[node] is None:
                    alike[key][side].append(node)

        def follow(node: int) -> None:
            partner = self.a.partner[node]
            if partner is None:
                return
            for s, t in zip(self.a.graph.ins[node], self.b.graph.ins[partner], strict=False):
                made = _maker(self.a.graph, s), _maker(self.b.graph, t)
                if made[0] is not None and made[1] is not None and up_a[made[0]] == up_b[made[1]]:
                    self._match_if_possible(made[0], made[1])

        for node in range(len(up_a) - 1, -1, -1):
            mine, theirs = alike[up_a[node]]
            if self.a.partner[node] is None and len(mine) == len(theirs) == 1:
                self._match_if_possible(node, theirs[0])
            follow(node)
        for node in range(len(up_a) - 1, -1, -1):
            if self.a.partner[node] is None:
                mine, theirs = alike[up_a[node]]
                left = [y for y in theirs if self._may_match(node, y)]
                if left and sum(self.a.partner[x] is None for x in mine) == len(left):
                    self._match(node, left[-1])
                elif left:
                    name = self.a.graph.nodes[node].name
                    same = [y for y in left if self.b.graph.nodes[y].name == name]
                    self._match(node, (same or left)[-1])
            follow(node)

    def _match_if_possible(self, x: int, y: int) -> None:
        if self._may_match(x, y):
            self._match(x, y)

    # 2. The same place in the skeleton

    def _match_skeleton(self) -> None:
        at = {key: node for node, key in enumerate(self._skeleton(self.b, 1)) if key is not None}
        for node, key in reversed(list(enumerate(self._skeleton(self.a, 0)))):
            if key is not None and key in at:
                self._match_if_possible(node, at[key])

    def _skeleton(self, own: _Side, side: int) -> list[int | None]:
        """A hash of what leads to a node and of what follows from it, in the skeleton."""
        graph, of = own.graph, self.hashes.of
        plain = [node for node in range(len(graph.nodes)) if not graph.transparent[node]]
        label = {node: of(("plain", own.kind[node], own.attributes[node])) for node in plain}
        partners = own.tensor_partner if side == 0 else {t: t for t in own.tensor_partner}
        up: dict[int, int] = {}

        def hash_of(tensor: int) -> Hashable:
            source = graph.source(tensor)
            if source == MISSING:
                return None
            if graph.content[source] is not None:
                return "held"
            if (made := graph.maker[source]) is not None:
                return (up[made[0]], made[1])
            scope, place = graph.entry.get(source, (MISSING, source))
            return ("input", partners.get(source)) if scope == 0 else ("entry", place)

        for node in plain:
            up[node] = of(("up", label[node], *(hash_of(t) for t in graph.ins[node])))
        returned: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for scope, results in enumerate(graph.results):
            for place, tensor in enumerate(results):
                returned[graph.source(tensor)].append((scope, place))
        keys = self.output_keys[side]
        found: list[int | None] = [None] * len(graph.nodes)
        down: dict[int, int] = {}
        for node in reversed(plain):
            ends: list[tuple[int, ...]] = []
            for place, tensor in enumerate(graph.outs[node]):
                if tensor == MISSING:
                    continue
                ends += [
                    (place, 0, down[reader], slot)
                    for reader, slot in own.skeleton_uses[tensor]
                    if reader in down
                ]
                for scope, end in returned[tensor]:
                    holder = down.get(graph.scopes[scope].owner, -1)
                    ends.append((place, 1, holder, keys[scope].get(end, -1 - side)))
            if ends:
                down[node] = of(("down", label[node], *sorted(ends)))
                found[node] = of(("both", up[node], down[node]))
        return found

    # 3. The same neighbours

    def _seed(self) -> None:
        a, b = self.a, self.b
        for x, y in enumerate(a.partner):
            if y is not None:
                self._ask_neighbours(x, y)
        for scope, other in self.scopes.items():
            self._ask_scope(scope, other)
        large: tuple[dict[Content, list[int]], dict[Content, list[int]]] = (
            defaultdict(list),
            defaultdict(list),
        )
        for places, side in zip(large, (a, b), strict=True):
            for tensor, held in enumerate(side.graph.content):
                if held in self.held_on_both:
                    places[held].append(tensor)
        for held, mine in large[0].items():
            if len(mine) == len(large[1][held]) == 1:
                self._ask_readers(mine[0], large[1][held][0])

    def _ask_scope(self, scope: int, other: int) -> None:
        a, b = self.a.graph, self.b.graph
        for s in a.entries[scope]:
            if s in self.a.tensor_partner:
                self._ask_readers(s, self.a.tensor_partner[s])
        for i, j in _output_pairs(a, b, scope, other):
            self._ask_makers(a.results[scope][i], b.results[other][j])

    def _ask_neighbours(self, x: int, y: int) -> None:
        a, b = self.a, self.b
        for s, t in zip(a.graph.outs[x], b.graph.outs[y], strict=False):
            if MISSING not in (s, t):
                self._ask_readers(s, t)
        theirs: dict[int, list[int]] = defaultdict(list)
        for place, tensor in b.makers(y):
            theirs[place].append(tensor)
        for place, tensor in a.makers(x):
            for other in theirs.get(place, ()):
                self._vote(_maker(a.graph, tensor), _maker(b.graph, other))

    def _ask_makers(self, s: int, t: int) -> None:
        a, b = self.a.graph, self.b.graph
        for x, y in {(s, t), (a.source(s), b.source(t))}:
            self._vote(_maker(a, x), _maker(b, y))

    def _ask_readers(self, s: int, t: int) -> None:
        """Readers of two tensors that are one speak for each other where they are of one kind at one place."""
        groups: dict[tuple[int, int], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for number, (side, tensor) in enumerate(((self.a, s), (self.b, t))):
            for node, place in side.readers(tensor):
                if side.partner[node] is None:
                    groups[side.kind[node], place][number].append(node)
        for mine, theirs in groups.values():
            mine.sort()
            theirs.sort()
            if len(mine) == len(theirs):
                for x, y in zip(mine, theirs, strict=True):
                    self._vote(x, y)
            elif len(mine) <= MAX_CROWD and len(theirs) <= MAX_CROWD:
                for x in mine:
                    for y in theirs:
                        self._vote(x, y)

    def _vote(self, x: int | None, y: int | None) -> None:
        if x is None or y is None or not self._may_be_one(x, y):
            return
        self.votes[x, y] += 1
        same_name = self._same_name(x, y)
        same_label = self.a.label[x] == self.b.label[y]
        same_attributes = self.a.attributes[x] == self.b.attributes[y]
        # what decides between equals comes after the votes; the distance keeps the order of what looks alike
        entry = (-self.votes[x, y], not same_label, not same_attributes, not same_name, abs(x - y), x, y)
        heapq.heappush(self.heap, entry)

    def _may_be_one(self, x: int, y: int) -> bool:
        return (
            self.a.kind[x] == self.b.kind[y]
            and self._may_match(x, y)
            and _similar(self.a.graph, x, self.b.graph, y)
            and self._same_large_constants(x, y)
        )

    def _same_large_constants(self, x: int, y: int) -> bool:
        """Whether nothing says that two nodes read different ones of the weights that both graphs have."""
        held = [
            {
                content
                for tensor in side.graph.ins[node]
                if tensor != MISSING
                and (content := side.graph.content[side.graph.source(tensor)]) in self.held_on_both
            }
            for side, node in ((self.a, x), (self.b, y))
        ]
        return not (held[0] and held[1]) or held[0] == held[1]

    def _follow_edges(self) -> None:
        while self.heap:
            *_, x, y = heapq.heappop(self.heap)
            if self._may_match(x, y):
                self._match_and_ask(x, y)

    def _match_and_ask(self, x: int, y: int) -> None:
        self._match(x, y)
        self._ask_neighbours(x, y)
        for scope in self.a.graph.bodies.get(x, ()):
            if scope in self.scopes:
                self._ask_scope(scope, self.scopes[scope])

    def _match_names(self) -> None:
        """Pair what no neighbour reaches where name, operator and shapes agree."""
        named = _by_name(self.b)
        for name, x in _by_name(self.a).items():
            y = named.get(name)
            if y is not None and self._may_be_one(x, y):
                self._match_and_ask(x, y)

    # 4. The same readers and sources

    def _match_places(self) -> bool:
        mine, theirs = self._places(self.a, 0), self._places(self.b, 1)
        pairs = [(x, theirs[place]) for place, x in mine.items() if place in theirs]
        for x, y in pairs:
            if self._may_match(x, y):
                self._match_and_ask(x, y)
        return bool(pairs)

    def _places(self, own: _Side, side: int) -> dict[Hashable, int]:
        """Unmatched nodes by the matched tensors that they read and the matched nodes that read them."""
        graph = own.graph
        result_keys = self.output_keys[side]
        found: dict[Hashable, list[int]] = defaultdict(list)
        for node, partner in enumerate(own.partner):
            if partner is not None:
                continue
            sources: list[Hashable] = []
            for tensor in graph.ins[node]:
                if tensor == MISSING or graph.content[tensor] is not None:
                    sources.append("held" if tensor != MISSING else None)
                elif tensor in own.tensor_partner:
                    sources.append(tensor if side == 1 else own.tensor_partner[tensor])
            ends: list[Hashable] = []
            for output, tensor in enumerate(graph.outs[node]):
                for reader, place in graph.uses[tensor] if tensor != MISSING else ():
                    if (other := own.partner[reader]) is not None:
                        ends.append((output, reader if side == 1 else other, place))
                for scope, place in graph.returned[tensor] if tensor != MISSING else ():
                    key = scope if side == 1 else self.scopes.get(scope)
                    ends.append((output, "returned", key, result_keys[scope].get(place)))
            reads = any(source not in ("held", None) for source in sources)
            if ends and (reads or not graph.ins[node]):
                found[tuple(sources), frozenset(ends)].append(node)
        return {place: nodes[0] for place, nodes in found.items() if len(nodes) == 1}


def _matched_constants(a: _Side, b: _Side) -> dict[int, int]:
    """Pair constants: where matched nodes read them at one place, equal ones first, then equal ones anywhere."""
    votes: Counter[tuple[int, int]] = Counter()

    def is_held(graph: Wiring, tensor: int) -> bool:
        return tensor != MISSING and graph.content[tensor] is not None

    for x, y in enumerate(a.partner):
        if y is None:
            continue
        for s, t in zip(a.graph.ins[x], b.graph.ins[y], strict=False):
            if is_held(a.graph, s) and is_held(b.graph, t):
                votes[s, t] += 2
            elif is_held(a.graph, s := a.graph.source(s)) and is_held(b.graph, t := b.graph.source(t)):
                votes[s, t] += 1
    pairs: dict[int, int] = {}
    taken: set[int] = set()

    def rank(pair: tuple[int, int]) -> tuple[Any, ...]:
        s, t = pair
        same_name = a.graph.tensors[s].name == b.graph.tensors[t].name
        return (a.graph.content[s] != b.graph.content[t], -votes[pair], not same_name, s, t)

    def take(candidates: Iterable[tuple[int, int]]) -> None:
        for s, t in candidates:
            if s not in pairs and t not in taken:
                pairs[s] = t
                taken.add(t)

    take(sorted((pair for pair in votes if a.graph.content[pair[0]] == b.graph.content[pair[1]]), key=rank))
    left: dict[Content, list[int]] = defaultdict(list)
    for t, held in enumerate(b.graph.content):
        if held is not None and t not in taken:
            left[held].append(t)
    for s, held in enumerate(a.graph.content):
        if held is not None and s not in pairs and left.get(held):
            name = a.graph.tensors[s].name
            same = [t for t in left[held] if b.graph.tensors[t].name == name]
            t = (same or left[held])[0]
            left[held].remove(t)
            take([(s, t)])
    take(sorted(votes, key=rank))
    return pairs


def _output_pairs(a: Wiring, b: Wiring, x: int = 0, y: int = 0) -> list[tuple[int, int]]:
    """Which output of a scope is which: see `_named_pairs`, but in their order where names cannot tell."""
    mine, theirs = a.results[x], b.results[y]
    names = [sorted(side.tensors[t].name for t in tensors) for side, tensors in ((a, mine), (b, theirs))]
    if len(mine) == len(theirs) and (x > 0 or names[0] != names[1]):
        return [(place, place) for place in range(len(mine))]
    return _named_pairs(a, mine, b, theirs)


def _named_pairs(a: Wiring, mine: Sequence[int], b: Wiring, theirs: Sequence[int]) -> list[tuple[int, int]]:
    """Places of two lists of tensors by name where both have it, the others in their order."""
    places = {b.tensors[t].name: place for place, t in enumerate(theirs) if t != MISSING}
    pairs = [
        (place, places[a.tensors[s].name])
        for place, s in enumerate(mine)
        if s != MISSING and a.tensors[s].name in places
    ]
    left = [place for place in range(len(mine)) if place not in {i for i, _ in pairs}]
    free = [place for place in range(len(theirs)) if place not in {j for _, j in pairs}]
    return sorted([*pairs, *zip(left, free, strict=False)])


def _unique_pairs(mine: Sequence[int | None], theirs: Sequence[int | None]) -> list[tuple[int, int]]:
    """Nodes of equal hash that no other node of either graph has; what holds a body before the body."""
    counts = Counter(mine), Counter(theirs)
    at = {key: node for node, key in enumerate(theirs) if key is not None and counts[1][key] == 1}
    last_first = reversed(list(enumerate(mine)))
    return [(node, at[key]) for node, key in last_first if key in at and counts[0][key] == 1]


def _maker(graph: Wiring, tensor: int) -> int | None:
    made = None if tensor == MISSING else graph.maker[tensor]
    return None if made is None else made[0]


def _similar(a: Wiring, x: int, b: Wiring, y: int) -> bool:
    """Whether the results of two nodes have the same shapes, as far as they are known."""
    outputs = len(a.outs[x]) == len(b.outs[y])
    return outputs and all(
        same_shape(a.tensors[s].shape, b.tensors[t].shape)
        for s, t in zip(a.outs[x], b.outs[y], strict=True)
        if MISSING not in (s, t)
    )


def same_shape(mine: Sequence[Any] | None, theirs: Sequence[Any] | None) -> bool:
    """Whether two shapes agree as far as both are known; two dimensions that vary agree whatever they are called."""
    if mine is None or theirs is None:
        return True
    return len(mine) == len(theirs) and all(
        p == q or is_unknown_dim(p) or is_unknown_dim(q) or (isinstance(p, str) and isinstance(q, str))
        for p, q in zip(mine, theirs, strict=True)
    )


def _large(graph: Wiring) -> set[Content]:
    def size(content: Content) -> int:
        elements = 1
        for dim in content[1]:
            elements *= dim
        return elements

    return {held for held in graph.content if held is not None and size(held) > _LARGE_ELEMENTS}


def _by_name(side: _Side) -> dict[str, int]:
    """Unmatched nodes by name, those whose name another has left out."""
    found: dict[str, list[int]] = defaultdict(list)
    for node, partner in enumerate(side.partner):
        if partner is None and side.graph.nodes[node].name:
            found[side.graph.nodes[node].name].append(node)
    return {name: nodes[0] for name, nodes in found.items() if len(nodes) == 1}
