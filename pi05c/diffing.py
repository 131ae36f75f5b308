"""`pi05c diff`: two files compared, and each difference traced to the pass that made it.

Two stages of one run lie in one folder as `NN-name.onnx`, their number and pass in the metadata (`STAGE_KEY`). The
stages between them are compared pair by pair; a difference belongs to the passes in whose step its node or
initializer differs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from pi05c.folder import GRAPH
from pi05c.graph.align import Alignment
from pi05c.graph.diff import KINDS, Change, GraphDiff, Kind, Thing, diff_graphs
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model, load, scopes
from pi05c.graph.weights import Stored, weight_of

STAGE_KEY = "pi05c.stage"
"""Metadata of a dumped stage: its number and the pass that made it, `03-lower_precision`."""

_STAGE = re.compile(r"\W*(?P<number>\d+)\W+(?P<name>\w+)")
_STAGE_FILES = "[0-9]*-*.onnx"


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
    before, after = _load(a), _load(b)
    hashed = _unhashed(before, after)
    graphs = diff_graphs(before.graph, after.graph, names=names)
    steps = _steps(before, after) if graphs.changes else []
    trace = _Trace(steps, graphs.alignment)
    changes = tuple(Attributed(change, trace.passes(change)) for change in graphs.changes)
    return ModelDiff(a, b, graphs, changes, tuple(step.name for step in steps), hashed)


def counted(changes: tuple[Attributed, ...]) -> dict[tuple[Thing, Kind], int]:
    """How many changes there are of each thing and kind, in the order in which they are shown."""
    counts = Counter((found.change.thing, kind) for found in changes for kind in found.change.kinds)
    things: tuple[Thing, ...] = ("model", "input", "output", "initializer", "node")
    return {(thing, kind): counts[thing, kind] for thing in things for kind in KINDS if counts[thing, kind]}


def _load(path: Path) -> Model:
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
    """What one pass did: the differences of the stage before it and the stage after it."""

    name: str
    diff: GraphDiff


def stage_of(model: Model) -> tuple[int, str] | None:
    """Number and pass of a dumped stage; None of any other file."""
    match = _STAGE.match(model.metadata.get(STAGE_KEY, ""))
    return None if match is None else (int(match["number"]), match["name"])


def _steps(a: Model, b: Model) -> list[_Step]:
    """The passes between two stages, whichever comes first; none where they are not stages of one run."""
    ends = stage_of(a), stage_of(b)
    if a.path is None or b.path is None or ends[0] is None or ends[1] is None:
        return []
    if a.path.parent.resolve() != b.path.parent.resolve() or ends[0][0] == ends[1][0]:
        return []
    low, high = sorted((ends[0][0], ends[1][0]))
    known = {ends[0][0]: a, ends[1][0]: b}
    for path in sorted(a.path.parent.glob(_STAGE_FILES)):
        number = int(path.name.split("-", 1)[0])
        if low < number < high:
            model = load(path)
            stage = stage_of(model)
            if stage is not None and stage[0] == number:
                known[number] = model
    if sorted(known) != list(range(low, high + 1)):
        return []
    order = sorted(known, reverse=ends[0][0] > ends[1][0])
    steps = []
    for number, following in pairwise(order):
        later = stage_of(known[max(number, following)])
        assert later is not None
        diff = diff_graphs(known[number].graph, known[following].graph)
        steps.append(_Step(f"{later[0]:02d}-{later[1]}", diff))
    return steps


class _Trace:
    """Follows nodes and initializers through the steps between two stages."""

    def __init__(self, steps: list[_Step], alignment: Alignment) -> None:
        self.steps = steps
        self.alignment = alignment
        self.back: list[dict[str, dict[int, int]]] = []
        self.changed: list[dict[tuple[str, int | str], set[Kind]]] = []
        for step in steps:
            pairs = step.diff.alignment
            self.back.append(
                {
                    "node": {y: x for x, y in pairs.nodes.items()},
                    "initializer": {t: s for s, t in pairs.tensors.items()},
                }
            )
            self.changed.append(
                {
                    (change.thing, change.name if change.b is None else change.b): set(change.kinds)
                    for change in step.diff.changes
                }
            )

    def passes(self, change: Change) -> tuple[str, ...]:
        """The passes that made a difference, in order."""
        if change.kinds == ("removed",) and change.a is not None:
            return tuple(self._gone(change.thing, change.a))
        if change.b is None:
            return tuple(
                step.name
                for step, changed in zip(self.steps, self.changed, strict=True)
                if changed.get((change.thing, change.name), set()) & set(change.kinds)
            )
        return tuple(reversed(list(self._made(change, change.b))))

    def _gone(self, thing: Thing, number: int) -> Iterator[str]:
        for step in self.steps:
            pairs = step.diff.alignment
            following = (pairs.nodes if thing == "node" else pairs.tensors).get(number)
            if following is None:
                yield step.name
                return
            number = following

    def _made(self, change: Change, number: int) -> Iterator[str]:
        for step, back, changed in reversed(list(zip(self.steps, self.back, self.changed, strict=True))):
            before = back[change.thing].get(number)
            if before is None:
                yield step.name
                return
            if changed.get((change.thing, number), set()) & set(change.kinds):
                yield step.name
            number = before
