"""`pi05c diff`: two files compared, and each difference traced to the pass that made it.

Two stages of one run lie in one folder (`pi05c.stages`). The stages between them are compared pair by pair; a
difference belongs to the passes in whose step its node or initializer differs.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from pi05c.folder import GRAPH
from pi05c.graph.clone import collection_paused
from pi05c.graph.diff import KINDS, Change, GraphDiff, Kind, Thing, diff_graphs
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model, load, scopes
from pi05c.graph.weights import Stored, weight_of
from pi05c.manifest import read_manifest
from pi05c.stages import Stage, stage_files, stage_of


@dataclass(frozen=True)
class Attributed:
    """A difference and the passes that made it; none where the files are not two stages of one run."""

    change: Change
    passes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hashed:
    """External weights without a recorded checksum, which were read to compare them."""

    tensors: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class ModelDiff:
    """What `pi05c diff` found.

    Attributes:
        a, b: what was compared.
        graphs: the differences and the pairs that they rest on.
        changes: the same differences with their passes.
        passes: the passes between two stages of one run, `03-lower_precision`, in order; empty of other files.
        hashed: weights that had to be read.
    """

    a: Path
    b: Path
    graphs: GraphDiff
    changes: tuple[Attributed, ...]
    passes: tuple[str, ...]
    hashed: Hashed

    @property
    def same(self) -> bool:
        return not self.changes

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        counts: dict[str, dict[str, int]] = {}
        for (thing, kind), count in counted(self.changes).items():
            counts.setdefault(thing, {})[kind] = count
        return {
            "a": str(self.a),
            "b": str(self.b),
            "same": self.same,
            "passes": list(self.passes),
            "counts": counts,
            "weights_read": {"tensors": self.hashed.tensors, "bytes": self.hashed.bytes},
            "changes": [
                {
                    "thing": found.change.thing,
                    "kinds": list(found.change.kinds),
                    "scope": found.change.scope,
                    "name": found.change.name,
                    "before": found.change.before,
                    "after": found.change.after,
                    "details": list(found.change.details),
                    "passes": list(found.passes),
                }
                for found in self.changes
            ],
        }


def diff_files(a: Path, b: Path, *, names: bool = False) -> ModelDiff:
    """Compare two ONNX files or engine folders. Weights that have a recorded checksum are not read.

    Raises:
        Pi05cError: one of them cannot be read, or has functions of its own.
    """
    with collection_paused():
        before, after = _load(a), _load(b)
        hashed = _unhashed(before, after)
        graphs = diff_graphs(before.graph, after.graph, names=names)
        steps = _steps(before, after, graphs) if graphs.changes else []
        trace = _Trace(steps)
        changes = tuple(Attributed(change, trace.passes(change)) for change in graphs.changes)
    return ModelDiff(a, b, graphs, changes, tuple(step.name for step in steps), hashed)


def counted(changes: tuple[Attributed, ...]) -> dict[tuple[Thing, Kind], int]:
    """How many changes there are of each thing and kind, in the order in which they are shown."""
    counts = Counter((found.change.thing, kind) for found in changes for kind in found.change.kinds)
    things: tuple[Thing, ...] = ("model", "input", "output", "initializer", "node")
    return {(thing, kind): counts[thing, kind] for thing in things for kind in KINDS if counts[thing, kind]}


def _load(path: Path) -> Model:
    if path.is_dir() and (parts := read_manifest(path).parts):
        raise Pi05cError(
            f"{path} holds a graph a part: compare them one by one, such as {path / parts[0].name / GRAPH}"
        )
    model = load(path / GRAPH if path.is_dir() else path)
    if model.graph.functions:
        raise Pi05cError(
            f"{path} defines functions of its own ({model.graph.functions[0].name}), which diff does not look into: "
            "inline them first with onnx.inliner.inline_local_functions"
        )
    return model


def _unhashed(*models: Model) -> Hashed:
    weights = {
        (weight.path, weight.offset): weight.nbytes
        for model in models
        for scope in scopes(model.graph)
        for node in scope.nodes
        for tensor in node.inputs
        if isinstance(tensor, gs.Constant)
        if isinstance(weight := weight_of(tensor), Stored) and not weight.has_checksum
    }
    return Hashed(len(weights), sum(weights.values()))


# Stages


@dataclass(frozen=True)
class _Step:
    """What one pass did between two stages, without the graphs.

    Attributes:
        name: number and name of the pass.
        pairs: number of a node or of an initializer's tensor in the second stage by that in the first, by thing.
        kinds: how things differ, by thing and number in the second stage, or name where they have no number.
    """

    name: str
    pairs: dict[Thing, dict[int, int]]
    kinds: dict[tuple[Thing, int | str], set[Kind]]

    @classmethod
    def of(cls, name: str, diff: GraphDiff) -> _Step:
        alignment = diff.alignment
        kinds = {
            (change.thing, change.name if change.b is None else change.b): set(change.kinds)
            for change in diff.changes
        }
        return cls(name, {"node": alignment.nodes, "initializer": alignment.tensors}, kinds)


def _steps(a: Model, b: Model, between: GraphDiff) -> list[_Step]:
    """The passes between two stages, whichever comes first; none where they are not stages of one run."""
    first, last = stage_of(a), stage_of(b)
    if a.path is None or b.path is None or first is None or last is None or first.number == last.number:
        return []
    if a.path.parent.resolve() != b.path.parent.resolve():
        return []
    files = stage_files(a.path.parent)
    way = range(first.number, last.number, 1 if first.number < last.number else -1)[1:]
    if any(number not in files for number in way):
        return []
    if not way:
        return [_Step.of(_later(first, last).title, between)]
    steps = []
    here = a
    for number in (*way, last.number):
        following = b if number == last.number else load(files[number])
        ends = stage_of(here), stage_of(following)
        if ends[0] is None or ends[1] is None or ends[1].number != number:
            return []
        steps.append(_Step.of(_later(ends[0], ends[1]).title, diff_graphs(here.graph, following.graph)))
        here = following
        gc.collect()  # a graph is a web of references to itself: two stages are held at a time
    return steps


def _later(a: Stage, b: Stage) -> Stage:
    return a if a.number > b.number else b


class _Trace:
    """Follows nodes and initializers through the steps between two stages."""

    def __init__(self, steps: list[_Step]) -> None:
        self.steps = steps
        self.back = [
            {thing: {y: x for x, y in pairs.items()} for thing, pairs in step.pairs.items()} for step in steps
        ]

    def passes(self, change: Change) -> tuple[str, ...]:
        """The passes that made a difference, in order."""
        if change.kinds == ("removed",) and change.a is not None:
            return tuple(self._gone(change.thing, change.a))
        if change.b is not None:
            return tuple(reversed(list(self._made(change, change.b))))
        kinds = set(change.kinds)
        place = (change.thing, change.name)
        return tuple(step.name for step in self.steps if step.kinds.get(place, set()) & kinds)

    def _gone(self, thing: Thing, number: int) -> Iterator[str]:
        for step in self.steps:
            following = step.pairs[thing].get(number)
            if following is None:
                yield step.name
                return
            number = following

    def _made(self, change: Change, number: int) -> Iterator[str]:
        for step, back in reversed(list(zip(self.steps, self.back, strict=True))):
            before = back[change.thing].get(number)
            if before is None:
                yield step.name
                return
            if step.kinds.get((change.thing, number), set()) & set(change.kinds):
                yield step.name
            number = before
