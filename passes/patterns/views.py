"""Twins: copies of one subgraph that differ in nothing but their input, as a loop over cameras exports them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import to_numpy
from pi05c.graph.edit import producer
from pi05c.graph.io import scopes
from pi05c.passes.patterns.batch import batch_obstacle
from pi05c.passes.patterns.dependence import reads
from pi05c.passes.patterns.identity import ValueNumbers, is_function, operation
from pi05c.passes.patterns.stack import Stack, find_stack
from pi05c.passes.patterns.walk import output_ids, static_shape

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "Attention"})
"""Operators that do most of the work: by them it is judged whether a batch is worth its while."""


@dataclass(frozen=True)
class Apart:
    """Convs that share their weight and do not run as one batch, or what of the twins does not.

    Attributes:
        node: the first Conv; of twins, the first node that stays one a view.
        reason: a phrase that completes "left alone: ".
    """

    node: gs.Node
    reason: str


@dataclass(frozen=True)
class Join:
    """A Concat that reads the same result of all views, one beside the other in their order."""

    concat: gs.Node
    axis: int


@dataclass(frozen=True)
class Border:
    """A result of the twins that something outside reads.

    Attributes:
        results: one of each view.
        row, output: the index in `Twins.rows`, and which output of its nodes it is.
        joins: Concats of the results of all views.
        single: whether anything else reads one view's result.
    """

    results: tuple[gs.Tensor, ...]
    row: int
    output: int
    joins: tuple[Join, ...]
    single: bool


@dataclass(frozen=True)
class Twins:
    """Copies of one subgraph, in each of which axis 0 is a batch axis from the views to the borders.

    Attributes:
        scope: the graph that holds all of them.
        views: the input of each copy; static shape and type, alike.
        rows: one node of each copy, in the order of the views, the rows in execution order.
        borders: where the copies end.
        stack: what the views are parts of, if they are.
        rest: why the copies end before they meet, if they do.
    """

    scope: gs.Graph
    views: tuple[gs.Tensor, ...]
    rows: tuple[tuple[gs.Node, ...], ...]
    borders: tuple[Border, ...]
    stack: Stack | None
    rest: Apart | None


def find_twins(graph: gs.Graph) -> tuple[list[Twins], list[Apart]]:
    """Twins that grow from Convs with one weight, and Convs with one weight that are no twins. Nodes must be sorted.

    From the inputs of the Convs they grow up, as long as the producers are alike and keep the batch, and down, node
    by node in lockstep, until the copies meet or differ. Time is linear in the number of nodes for each Conv of a
    tower that repeats.
    """
    found: list[Twins] = []
    apart: list[Apart] = []
    outputs = output_ids(graph)
    for scope in scopes(graph):
        convs = [node for node in scope.nodes if node.op == "Conv" and is_function(node)]
        if len(convs) < 2:
            continue
        numbers = ValueNumbers(scope)
        claimed: set[int] = set()
        for group in _same_weight(convs, numbers):
            alike, different = _same_shape([conv for conv in group if id(conv) not in claimed])
            apart += different
            for members in alike:
                result = _grow(scope, members, numbers, claimed, outputs)
                if isinstance(result, Twins):
                    claimed.update(id(node) for row in result.rows for node in row)
                    found.append(result)
                elif result is not None:
                    apart.append(result)
    return found, apart


def _same_weight(convs: list[gs.Node], numbers: ValueNumbers) -> Iterable[list[gs.Node]]:
    groups: dict[Hashable, list[gs.Node]] = defaultdict(list)
    for conv in convs:
        groups[operation(conv), tuple(map(numbers.of, conv.inputs[1:]))].append(conv)
    return [group for group in groups.values() if len(group) > 1]


def _same_shape(convs: list[gs.Node]) -> tuple[list[list[gs.Node]], list[Apart]]:
    """Groups of Convs whose inputs have one static shape and type, and what does not fit into one."""
    groups: dict[_Form, list[gs.Node]] = defaultdict(list)
    for conv in convs:
        groups[_form(conv.inputs[0])].append(conv)
    apart = []
    for (shape, _), group in list(groups.items()):
        if shape is None:
            apart += [Apart(conv, f"the shape of {conv.inputs[0].name!r} is not static") for conv in group]
        elif len(group) == 1 and len(convs) > 1:
            other = next(conv for conv in convs if conv is not group[0])
            apart.append(
                Apart(group[0], f"its input has another static shape or type than that of {other.name!r}")
            )
    return [group for (shape, _), group in groups.items() if shape is not None and len(group) > 1], apart


_Form = tuple[tuple[int, ...] | None, Hashable]


def _form(tensor: gs.Tensor) -> _Form:
    return static_shape(tensor), to_numpy(tensor.dtype)


def _grow(
    scope: gs.Graph, convs: list[gs.Node], numbers: ValueNumbers, claimed: set[int], outputs: set[int]
) -> Twins | Apart | None:
    """Twins of Convs with one weight and one shape; None where those that follow from no other read one tensor."""
    seeds = list({id(conv.inputs[0]): conv for conv in _first(scope, convs)[::-1]}.values())[::-1]
    if len(seeds) < 2:
        return None
    views = _climb(scope, tuple(conv.inputs[0] for conv in seeds), numbers, claimed)
    copies = _Copies(views, numbers)
    for node in scope.nodes:
        if id(node) not in claimed:
            copies.add(node)
    if copies.chained is not None:
        return Apart(seeds[0], f"the view {copies.chained.name!r} depends on another view")
    rows, rest = copies.common()
    batched, single = _work(rows), copies.work_left(rows)
    if rest is not None and single >= batched:
        return Apart(seeds[0], f"{rest.node.op} {rest.node.name!r} {rest.reason}")
    return Twins(scope, views, tuple(rows), tuple(_borders(rows, outputs)), find_stack(views), rest)


def _first(scope: gs.Graph, convs: list[gs.Node]) -> list[gs.Node]:
    """The Convs that depend on no other of them."""
    members = {id(conv) for conv in convs}
    below: set[int] = set()
    first = []
    for node in scope.nodes:
        depends = any(id(tensor) in below for tensor in reads(node))
        if id(node) in members and not depends:
            first.append(node)
        if id(node) in members or depends:
            below.update(id(tensor) for tensor in node.outputs)
    return first


def _climb(
    scope: gs.Graph, views: tuple[gs.Tensor, ...], numbers: ValueNumbers, claimed: set[int]
) -> tuple[gs.Tensor, ...]:
    """The tensors above `views` from which nodes that are alike, and keep the batch, lead to them."""
    own = {id(node) for node in scope.nodes} - claimed
    while True:
        nodes = [node for view in views if (node := producer(view)) is not None and id(node) in own]
        if len({id(node) for node in nodes}) < len(views) or not is_function(nodes[0]):
            return views
        first = nodes[0]
        if any(
            operation(node) != operation(first) or len(node.inputs) != len(first.inputs) for node in nodes
        ):
            return views
        if len(first.outputs) != 1:
            return views
        differing = [
            index
            for index in range(len(first.inputs))
            if len({numbers.of(node.inputs[index]) for node in nodes}) > 1
        ]
        if len(differing) != 1:
            return views
        above = tuple(node.inputs[differing[0]] for node in nodes)
        if (
            any(isinstance(tensor, gs.Constant) or _form(tensor) != _form(above[0]) for tensor in above)
            or len({id(tensor) for tensor in above}) < len(above)
            or batch_obstacle(first, frozenset(differing))
        ):
            return views
        views = above


@dataclass(frozen=True)
class _Row:
    """Nodes that do the same with the same places of their copy: None where a copy has none.

    Attributes:
        above: the rows that made what they read of their copy.
        batched: at which inputs they read it.
    """

    nodes: list[gs.Node | None]
    above: tuple[int, ...]
    batched: frozenset[int]


@dataclass
class _Place:
    """Where a tensor is: in which copy, and what it is there, by a number that it shares with its twins."""

    copy: int
    number: Hashable
    row: int


@dataclass
class _Copies:
    """Grows the copies of one subgraph together, one pass over the nodes in execution order.

    Attributes:
        chained: a view that depends on another, which makes a batch impossible.
    """

    views: tuple[gs.Tensor, ...]
    numbers: ValueNumbers
    chained: gs.Tensor | None = None
    _places: dict[int, _Place] = field(default_factory=dict)
    _below: set[int] = field(default_factory=set)
    _rows: dict[Hashable, int] = field(default_factory=dict)
    _ordered: list[_Row] = field(default_factory=list)
    _repeats: Counter[Hashable] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for index, view in enumerate(self.views):
            self._places[id(view)] = _Place(index, "view", -1)
            self._below.add(id(view))
        self._tops = {id(view) for view in self.views}

    def add(self, node: gs.Node) -> None:
        """Take the next node of the scope, which belongs to a copy if all that it reads below the views is in it."""
        below = [tensor for tensor in reads(node) if id(tensor) in self._below]
        if not below:
            return
        self._below.update(id(tensor) for tensor in node.outputs)
        self.chained = next((tensor for tensor in node.outputs if id(tensor) in self._tops), self.chained)
        places = [self._places.get(id(tensor)) for tensor in below]
        inside = [place for place in places if place is not None]
        copies = {place.copy for place in inside}
        if len(inside) < len(places) or len(copies) != 1 or not is_function(node):
            return
        copy = copies.pop()
        here = {
            index: self._places[id(tensor)]
            for index, tensor in enumerate(node.inputs)
            if id(tensor) in self._places
        }
        inputs = tuple(
            ("copy", here[index].number) if index in here else ("all", self.numbers.of(tensor))
            for index, tensor in enumerate(node.inputs)
        )
        key = self.numbers.number((operation(node), inputs))
        # Nodes of one copy that do the same are twins of those of the other copies in their order.
        self._repeats[copy, key] += 1
        key = self.numbers.number((key, self._repeats[copy, key]))
        row = self._rows.setdefault(key, len(self._ordered))
        if row == len(self._ordered):
            above = tuple(place.row for place in here.values())
            self._ordered.append(_Row([None] * len(self.views), above, frozenset(here)))
        self._ordered[row].nodes[copy] = node
        for index, tensor in enumerate(node.outputs):
            self._places[id(tensor)] = _Place(copy, (key, index), row)

    def common(self) -> tuple[list[tuple[gs.Node, ...]], Apart | None]:
        """The rows that can be one node over a batch, and the first place where most copies go on without one."""
        accepted: set[int] = {-1}
        rows = []
        ends: list[tuple[int, Apart]] = []
        for index, row in enumerate(self._ordered):
            if not accepted.issuperset(row.above):
                continue
            nodes = tuple(node for node in row.nodes if node is not None)
            if len(nodes) < len(self.views):
                reason = "has no twin with the same weights and sizes in each view"
            else:
                reason = batch_obstacle(nodes[0], row.batched)
            if not reason:
                accepted.add(index)
                rows.append(nodes)
            else:
                ends.append((len(nodes), Apart(nodes[0], reason)))
        return rows, max(ends, key=lambda end: end[0], default=(0, None))[1]

    def work_left(self, rows: Iterable[tuple[gs.Node, ...]]) -> int:
        """The number of products that each copy has outside `rows`: of the copy that has fewest."""
        batched = {id(node) for row in rows for node in row}
        left = Counter(
            copy
            for row in self._ordered
            for copy, node in enumerate(row.nodes)
            if node is not None and node.op in _PRODUCTS and id(node) not in batched
        )
        return min(left[copy] for copy in range(len(self.views)))


def _work(rows: Iterable[tuple[gs.Node, ...]]) -> int:
    return sum(row[0].op in _PRODUCTS for row in rows)


def _borders(rows: list[tuple[gs.Node, ...]], outputs: set[int]) -> Iterator[Border]:
    inside = {id(node) for row in rows for node in row}
    for index, row in enumerate(rows):
        for output in range(len(row[0].outputs)):
            results = tuple(node.outputs[output] for node in row)
            outside = {
                id(node): node for tensor in results for node in tensor.outputs if id(node) not in inside
            }
            joins = tuple(join for node in outside.values() if (join := _join(node, results)) is not None)
            returned = any(id(tensor) in outputs for tensor in results)
            if outside or returned:
                yield Border(results, index, output, joins, returned or len(joins) < len(outside))


def _join(node: gs.Node, results: tuple[gs.Tensor, ...]) -> Join | None:
    if node.op != "Concat":
        return None
    read = [id(tensor) for tensor in node.inputs]
    wanted = [id(tensor) for tensor in results]
    places = [index for index, tensor in enumerate(read) if tensor in wanted]
    axis = int(node.attrs["axis"]) % len(static_shape(results[0]) or (0,))
    if [read[index] for index in places] != wanted or places[-1] - places[0] >= len(places):
        return None
    return Join(node, axis)
