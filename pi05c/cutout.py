"""The nodes in which two graphs differ, as two graphs that are as small as that, with inputs that show the difference.

A node is cut out if the other graph has no such node, or if the two differ in operator, attributes, types or in what
they read. All others compute the same from the same, so that the two cut-outs take the same tensors and give the same
tensors: what the whole graphs differ by first shows in what the cut-outs give.

Tools cut a graph, not the body of a Loop. Where all that differs lies in the body of one Loop, the body is written as a
graph of its own, whose inputs are those of the body and what it captures, and cut there; the values that the cut-outs
take are those of the first iteration. Where it lies deeper, or in several bodies, the node that holds it is cut out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from pi05c.backend.onnxruntime import load_runner
from pi05c.comparison import Error, error_of
from pi05c.graph.align import Alignment, same_shape
from pi05c.graph.dtypes import to_numpy, to_onnx
from pi05c.graph.edit import keep_between
from pi05c.graph.errors import MachineError, Pi05cError, unwritable
from pi05c.graph.io import DataFolder, Model, load, save, scopes
from pi05c.graph.runner import Array
from pi05c.graph.wiring import MISSING, Wiring

_COLLECTED = "pi05c.collected."
"""Begins the names of what a Loop is made to return of its body."""


@dataclass(frozen=True)
class Border:
    """Where one of two graphs is cut, by names of tensors.

    Attributes:
        loop: the Loop whose body is cut; None of the graph itself.
        nodes: what is cut out.
        inputs: what the cut-out reads.
        outputs: what it gives.
    """

    loop: str | None
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """Where two graphs are cut.

    Attributes:
        before, after: in each of them.
        inputs: the tensor of the first graph for each input of either cut-out, by its name in the second.
        outputs: name in the first graph and in the second of what both cut-outs give.
    """

    before: Border
    after: Border
    inputs: Mapping[str, str]
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Cutout:
    """Two cut-outs that were written.

    Attributes:
        cut: where.
        before, after: the two graphs.
        extracted_from: the graphs that they can be extracted from, those of the body where a body was cut.
        errors: of what the second gives against the first, on the same inputs, by output of the second.
        trouble: why there are none; empty where there are.
    """

    cut: Cut
    before: Path
    after: Path
    extracted_from: tuple[Path, Path]
    errors: Mapping[str, Error] = field(default_factory=dict)
    trouble: str = ""

    @property
    def worst(self) -> tuple[str, Error] | None:
        """The output that differs most, with its error; None where nothing was measured."""
        return max(self.errors.items(), key=lambda item: item[1].relative_l2, default=None)


def cut_out(before: Path, after: Path, alignment: Alignment, sample: Mapping[str, Array] | None) -> Cutout:
    """Write the two cut-outs beside two graphs, with what they take as .npz.

    `a.onnx` is cut to `a.min.onnx`, which `a.min.npz` feeds; `a.body.onnx` is the body where one was cut.

    Args:
        alignment: of the two graphs.
        sample: inputs of the graphs to record values with; None where there are none.

    Raises:
        Pi05cError: nothing differs that could be cut out, or a file cannot be written.
    """
    cut = find_cut(alignment)
    paths = []
    sources = []
    for whole, border in ((before, cut.before), (after, cut.after)):
        sources.append(whole if border.loop is None else _write_body(whole, border.loop))
        paths.append(whole.with_suffix(".min.onnx"))
        _write_between(sources[-1], border, paths[-1])
    written = (cut, paths[0], paths[1], (sources[0], sources[1]))
    if sample is None:
        return Cutout(*written, trouble="there are no samples to record its inputs with")
    try:
        values = _recorded(before, cut, sample)
        _save(paths[0], {name: values[name] for name in cut.before.inputs})
        _save(paths[1], {name: values[cut.inputs[name]] for name in cut.after.inputs})
        given = run_cutout(paths[0]), run_cutout(paths[1])
        errors = {
            new: error_of(given[0][old], given[1][new], f"{new!r} of {paths[1].name}")
            for old, new in cut.outputs
        }
    except Pi05cError as error:
        return Cutout(*written, trouble=str(error))
    return Cutout(*written, errors)


def run_cutout(path: Path) -> dict[str, Array]:
    """What a cut-out gives on the values beside it.

    Raises:
        Pi05cError: there are none, or it cannot be run.
    """
    runner = load_runner(path)
    try:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
            values = {spec.name: stored[spec.name].astype(spec.dtype) for spec in runner.inputs}
    except (OSError, ValueError, KeyError) as error:
        raise Pi05cError(f"{path.with_suffix('.npz')} cannot be read: {error}") from error
    return runner.run(values)


# Where to cut


def find_cut(alignment: Alignment) -> Cut:
    """Where two graphs are cut so that nothing is left but what differs.

    Raises:
        Pi05cError: no node differs.
    """
    return _Cutter(alignment).cut()


class _Side:
    """One of the two graphs.

    Attributes:
        region: the nodes that are cut out.
        scope: the scope in which they lie.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.region: set[int] = set()
        self.scope = 0

    def outermost(self, scope: int) -> int:
        """The body in the graph itself that a scope is or lies in; 0 of the graph itself."""
        while scope != 0 and (outer := self.wiring.scope[self.wiring.scopes[scope].owner]) != 0:
            scope = outer
        return scope

    def lifted(self, node: int) -> int:
        """The node of the scope that is cut which is or holds `node`."""
        while self.wiring.scope[node] != self.scope:
            node = self.wiring.scopes[self.wiring.scope[node]].owner
        return node

    def reads(self, node: int) -> list[int]:
        """The variables that a node reads, by its bodies too, in order."""
        wiring = self.wiring
        found, made, nodes = [], set(), [node]
        while nodes:
            current = nodes.pop()
            found += wiring.ins[current]
            if current != node:
                made.update(wiring.outs[current])
            for body in wiring.bodies.get(current, ()):
                made.update(wiring.entries[body])
                found += wiring.results[body]
                nodes += [inner for inner, scope in enumerate(wiring.scope) if scope == body]
        return [tensor for tensor in dict.fromkeys(found) if self.is_variable(tensor) and tensor not in made]

    def is_variable(self, tensor: int) -> bool:
        return tensor != MISSING and self.wiring.content[tensor] is None

    def maker(self, tensor: int) -> int | None:
        """The node of the scope that is cut which makes a tensor; None of an input and of what comes from outside."""
        made = self.wiring.maker[tensor] if tensor != MISSING else None
        return made[0] if made is not None and self.wiring.scope[made[0]] == self.scope else None

    def is_inside(self, tensor: int) -> bool:
        return self.maker(tensor) in self.region

    def inputs(self) -> list[int]:
        """What the region reads and does not make."""
        read = [tensor for node in sorted(self.region) for tensor in self.reads(node)]
        return [tensor for tensor in dict.fromkeys(read) if not self.is_inside(tensor)]

    def outputs(self) -> list[int]:
        """What the region makes and others read."""
        wiring = self.wiring
        made = [t for node in sorted(self.region) for t in wiring.outs[node] if self.is_variable(t)]
        return [tensor for tensor in made if self._is_read_outside(tensor)]

    def _is_read_outside(self, tensor: int) -> bool:
        readers = {self.lifted(node) for node, _ in self.wiring.uses[tensor]}
        for scope, _ in self.wiring.returned[tensor]:
            if scope == self.scope:
                return True
            readers.add(self.lifted(self.wiring.scopes[scope].owner))
        return not readers <= self.region

    def border(self, inputs: Iterable[int], outputs: Iterable[int]) -> Border:
        loop = None
        if self.scope:
            loop = str(self.wiring.nodes[self.wiring.scopes[self.scope].owner].name)
        nodes = tuple(str(self.wiring.nodes[node].name) for node in sorted(self.region))
        return Border(loop, nodes, self.names(inputs), self.names(outputs))

    def names(self, tensors: Iterable[int]) -> tuple[str, ...]:
        return tuple(str(self.wiring.tensors[tensor].name) for tensor in tensors)


class _Cutter:
    def __init__(self, alignment: Alignment) -> None:
        self.pairs = alignment
        self.a, self.b = _Side(alignment.a), _Side(alignment.b)
        self.back = {y: x for x, y in alignment.nodes.items()}
        self.tensors = {t: s for s, t in alignment.tensors.items()}

    def cut(self) -> Cut:
        same = {(x, y) for x, y in self.pairs.nodes.items() if self._is_same(x, y)}
        a = set(range(len(self.a.wiring.nodes))) - {x for x, _ in same}
        b = set(range(len(self.b.wiring.nodes))) - {y for _, y in same}
        returned = self._returned()
        self._choose_scope(a, b, returned)
        self.a.region = {self.a.lifted(x) for x in a}
        self.b.region = {self.b.lifted(y) for y in b}
        ends = []
        for scope, pairs in returned.items():
            if scope == self.a.scope:
                ends += pairs
            else:
                self.a.region.add(self.a.lifted(self.a.wiring.scopes[scope].owner))
        for s, t in ends:
            self.a.region |= {maker for maker in [self.a.maker(s)] if maker is not None}
            self.b.region |= {maker for maker in [self.b.maker(t)] if maker is not None}
        self._close()
        if not self.a.region and not self.b.region:
            raise Pi05cError("no node differs, so there is nothing to cut out")
        return self._cut(ends)

    def _is_same(self, x: int, y: int) -> bool:
        """Whether two nodes compute the same from the same, their bodies left out."""
        a, b = self.a.wiring, self.b.wiring
        old, new = a.nodes[x], b.nodes[y]
        if (old.op, old.domain or "", a.attributes[x]) != (new.op, new.domain or "", b.attributes[y]):
            return False
        if len(a.ins[x]) != len(b.ins[y]) or len(a.outs[x]) != len(b.outs[y]):
            return False
        if not all(self._is_same_tensor(s, t) for s, t in zip(a.ins[x], b.ins[y], strict=True)):
            return False
        made = [
            (a.tensors[s], b.tensors[t])
            for s, t in zip(a.outs[x], b.outs[y], strict=True)
            if MISSING not in (s, t)
        ]
        bodies = [
            [(side.scopes[body].key, len(side.entries[body]), len(side.results[body])) for body in found]
            for side, found in ((a, a.bodies.get(x, ())), (b, b.bodies.get(y, ())))
        ]
        return bodies[0] == bodies[1] and all(
            to_numpy(s.dtype) == to_numpy(t.dtype) and same_shape(s.shape, t.shape) for s, t in made
        )

    def _is_same_tensor(self, s: int, t: int) -> bool:
        if MISSING in (s, t):
            return s == t
        held, other = self.a.wiring.content[s], self.b.wiring.content[t]
        if held is not None or other is not None:
            return held == other
        return self.pairs.tensors.get(s) == t

    def _returned(self) -> dict[int, list[tuple[int, int]]]:
        """By scope of the first graph, the results that come from elsewhere in the second."""
        found: dict[int, list[tuple[int, int]]] = {}
        for scope, other in self.pairs.scopes.items():
            mine, theirs = self.a.wiring.results[scope], self.b.wiring.results[other]
            places = self.pairs.outputs if scope == 0 else {i: i for i in range(min(len(mine), len(theirs)))}
            pairs = [(mine[i], theirs[j]) for i, j in places.items()]
            if moved := [(s, t) for s, t in pairs if not self._is_same_tensor(s, t)]:
                found[scope] = moved
        return found

    def _choose_scope(self, a: set[int], b: set[int], returned: Iterable[int]) -> None:
        """Cut in the body of a Loop where everything that differs lies in it, else in the graph itself."""
        mine = {self.a.outermost(self.a.wiring.scope[x]) for x in a} | {
            self.a.outermost(scope) for scope in returned
        }
        theirs = {self.b.outermost(self.b.wiring.scope[y]) for y in b}
        scope = next(iter(mine)) if len(mine) == 1 else 0
        other = self.pairs.scopes.get(scope)
        if scope and theirs <= {other} and self._is_loop(self.a, scope) and other is not None:
            self.a.scope, self.b.scope = scope, other

    def _is_loop(self, side: _Side, scope: int) -> bool:
        return bool(side.wiring.nodes[side.wiring.scopes[scope].owner].op == "Loop")

    def _close(self) -> None:
        """Take the partner of each node along."""
        self.b.region |= {self.pairs.nodes[x] for x in self.a.region if x in self.pairs.nodes}
        self.a.region |= {self.back[y] for y in self.b.region if y in self.back}

    def _cut(self, ends: Sequence[tuple[int, int]]) -> Cut:
        given = list(dict.fromkeys((*self._given(), *ends)))
        given = [(s, t) for s, t in given if self.a.is_inside(s) and self.b.is_inside(t)]
        if not given:
            raise Pi05cError(
                "what differs makes no tensor that both graphs have, so there is nothing to cut out"
            )
        inputs_a, inputs_b = self.a.inputs(), self.b.inputs()
        sources = {t: self.tensors[t] for t in inputs_b if t in self.tensors}
        names = {
            str(self.b.wiring.tensors[t].name): str(self.a.wiring.tensors[s].name) for t, s in sources.items()
        }
        return Cut(
            self.a.border(inputs_a, dict.fromkeys(s for s, _ in given)),
            self.b.border(inputs_b, dict.fromkeys(t for _, t in given)),
            names,
            tuple((self.a.names([s])[0], self.b.names([t])[0]) for s, t in given),
        )

    def _given(self) -> list[tuple[int, int]]:
        pairs = [(s, self.pairs.tensors[s]) for s in self.a.outputs() if s in self.pairs.tensors]
        return pairs + [(self.tensors[t], t) for t in self.b.outputs() if t in self.tensors]


# The files


def _write_body(whole: Path, loop: str) -> Path:
    """Write the body of a Loop as a graph of its own, beside the whole."""
    model = load(whole)
    body = next(node for node in model.graph.nodes if node.name == loop).attrs["body"]
    inside = {
        id(tensor): tensor
        for scope in scopes(body)
        for tensor in (*scope.inputs, *(made for node in scope.nodes for made in node.outputs))
    }
    read = {
        id(tensor): tensor
        for scope in scopes(body)
        for tensor in (*(read for node in scope.nodes for read in node.inputs), *scope.outputs)
    }
    captured = [
        tensor
        for key, tensor in read.items()
        if key not in inside and isinstance(tensor, gs.Variable) and tensor.name
    ]
    made = {id(tensor): tensor for tensor in body.outputs if tensor.inputs and id(tensor) in inside}
    graph = gs.Graph(
        nodes=list(body.nodes),
        name=body.name,
        opset=model.graph.opset,
        import_domains=model.graph.import_domains,
        ir_version=model.graph.ir_version,
    )
    keep_between(graph, [*body.inputs, *captured], list(made.values()))
    path = whole.with_suffix(".body.onnx")
    save(Model(graph), path, shared=DataFolder(path.parent))
    return path


def _write_between(source: Path, border: Border, path: Path) -> None:
    """Write what lies between the tensors of a border."""
    model = load(source)
    known = _variables(model.graph)
    if unmade := [name for name in (*border.inputs, *border.outputs) if name not in known]:
        raise Pi05cError(f"nothing can be cut out of {source.name}, where no node makes {unmade[0]!r}")
    keep_between(
        model.graph, [known[name] for name in border.inputs], [known[name] for name in border.outputs]
    )
    model.metadata.clear()
    save(model, path, shared=DataFolder(path.parent))


def _variables(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """What the nodes of a graph make, and its inputs, by name."""
    made = (tensor for node in graph.nodes for tensor in node.outputs)
    return {tensor.name: tensor for tensor in (*graph.inputs, *made) if tensor.name}


def _save(path: Path, values: Mapping[str, Array]) -> None:
    """Write what a cut-out takes beside it; types that numpy lacks are widened to float32, which changes no value."""
    widened = {
        name: value if value.dtype.isbuiltin == 1 else value.astype(np.float32)
        for name, value in values.items()
    }
    try:
        np.savez(path.with_suffix(".npz"), **widened)  # type: ignore[arg-type]
    except OSError as error:
        raise MachineError(f"{path.with_suffix('.npz')} cannot be written: {unwritable(error)}") from error


def _recorded(before: Path, cut: Cut, sample: Mapping[str, Array]) -> dict[str, Array]:
    """The value of each tensor that a cut-out takes, by its name in the first graph.

    Raises:
        Pi05cError: the graph cannot be run, or does not have what the second cut-out takes.
    """
    if missing := [name for name in cut.after.inputs if name not in cut.inputs]:
        raise Pi05cError(
            f"the graph before the rewrite has nothing like {missing[0]!r}, which is read behind it"
        )
    wanted = dict.fromkeys((*cut.before.inputs, *(cut.inputs[name] for name in cut.after.inputs)))
    graph = load(before).graph
    outer = _variables(graph)
    inner: dict[str, gs.Tensor] = {}
    if cut.before.loop is not None:
        loop = next(node for node in graph.nodes if node.name == cut.before.loop)
        inner = _variables(loop.attrs["body"])
    given = {tensor.name for tensor in graph.inputs}
    collected = [inner[name] for name in wanted if name in inner]
    tapped = [outer[name] for name in wanted if name not in inner and name not in given]

    def tap(proto: onnx.ModelProto) -> None:
        known = {value.name for value in proto.graph.output}
        proto.graph.output.extend(_declared(t.name, t) for t in tapped if t.name not in known)
        if collected:
            loop = next(node for node in proto.graph.node if node.name == cut.before.loop)
            _collect(proto.graph, loop, collected)

    names = [*(t.name for t in tapped), *(f"{_COLLECTED}{t.name}" for t in collected)]
    values = {name: sample[name] for name in wanted if name in given and name not in inner}
    if names:
        runner = load_runner(before, outputs=names, edit=tap)
        ran = runner.run({spec.name: sample[spec.name] for spec in runner.inputs})
        values |= {tensor.name: ran[tensor.name] for tensor in tapped}
        for tensor in collected:
            steps = ran[f"{_COLLECTED}{tensor.name}"]
            if not len(steps):
                raise Pi05cError(f"{cut.before.loop!r} runs no step on this sample")
            values[tensor.name] = steps[0]
    return values


def _collect(graph: onnx.GraphProto, loop: onnx.NodeProto, tensors: Sequence[gs.Tensor]) -> None:
    """Let a Loop return tensors of its body, stacked."""
    body = next(attribute.g for attribute in loop.attribute if attribute.name == "body")
    for tensor in tensors:
        name = f"{_COLLECTED}{tensor.name}"
        body.node.append(onnx.helper.make_node("Identity", [tensor.name], [f"{name}.step"], name=name))
        body.output.append(_declared(f"{name}.step", tensor))
        loop.output.append(name)
        graph.output.append(_declared(name, tensor, stacked=True))


def _declared(name: str, tensor: gs.Tensor, *, stacked: bool = False) -> onnx.ValueInfoProto:
    shape = None if tensor.shape is None else [*([None] if stacked else []), *tensor.shape]
    return onnx.helper.make_tensor_value_info(name, to_onnx(tensor.dtype), shape)


__all__ = ["Border", "Cut", "Cutout", "cut_out", "find_cut", "run_cutout"]
