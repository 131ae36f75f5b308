"""Makes tensors smaller by the rows that `Liveness` found dead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.edit import Editor
from pi05c.graph.io import scopes
from pi05c.graph.runner import Array
from pi05c.graph.weights import Selected, weight_of
from pi05c.passes.contract import PassContext
from pi05c.passes.patterns.liveness import Liveness, NodeRows
from pi05c.passes.patterns.row_flow import Need, indices, is_dead, selected_by, shape_of
from pi05c.passes.patterns.walk import output_ids


class Shrinker:
    """Rewrites the nodes of a graph one by one; each is right as soon as all are.

    A tensor keeps its name and holds the rows that some reader needs. A reader that needs fewer gets them by a Slice or
    Gather, made once for all readers in the scope of the tensor; of a constant it gets another constant.
    """

    def __init__(self, graph: gs.Graph, ctx: PassContext, live: Liveness) -> None:
        self._live = live
        self._editors = {id(scope): ctx.editor(scope) for scope in scopes(graph)}
        self._homes = {
            id(tensor): scope
            for scope in scopes(graph)
            for tensor in (*scope.inputs, *(t for node in scope.nodes for t in node.outputs))
        }
        self._returned = output_ids(graph)
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._selected: dict[tuple[object, ...], gs.Tensor] = {}
        self._names_only: list[tuple[gs.Node, Editor]] = []

    def run(self) -> list[str]:
        """Shrink everything; the names of the nodes of which an output has become smaller, in order."""
        entries = list(self._live.rows())[::-1]
        for entry in entries:
            for tensor in (*entry.node.inputs, *entry.node.outputs):
                self._shapes.setdefault(id(tensor), shape_of(tensor))
        for entry in entries:
            self._rewrite(entry)
        for entry in entries:
            for tensor, need in zip(entry.outputs, entry.makes, strict=True):
                tensor.shape = self._sizes(tensor, need)
        shrunk = [entry.node.name for entry in entries if entry.shrinks]
        for node, editor in self._names_only:
            if id(node.outputs[0]) not in self._returned:
                editor.replace_uses(node.outputs[0], node.inputs[0])
        return shrunk

    def _rewrite(self, entry: NodeRows) -> None:
        node = entry.node
        source = self._shapes[id(node.inputs[0])]
        taken = selected_by(node) if node.op in ("Slice", "Gather") else None
        if taken is not None and self._selects_as_before(entry, taken):
            whole = tuple(None if axis in taken else need for axis, need in enumerate(entry.reads[0]))
            node.inputs[0] = self._select(node.inputs[0], whole)
            return
        reads = [
            (index, need)
            for index, need in enumerate(entry.reads)
            if node.inputs[index].name and not any(is_dead(axis) for axis in need)
        ]
        for index, need in reads:
            node.inputs[index] = self._select(node.inputs[index], need)
        sizes = [self._sizes(tensor, need) for tensor, need in zip(node.outputs, entry.makes, strict=True)]
        if node.op == "Squeeze" and not any(tensor.name for tensor in node.inputs[1:]):
            node.op, node.attrs = "Reshape", {}  # it would squeeze an axis that has shrunk to one row as well
        if node.op in ("Reshape", "Expand"):
            node.attrs.pop("allowzero", None)
            self._give(entry, sizes[0])
        elif node.op == "Tile":
            read = [len(indices(axis, size)) for axis, size in zip(entry.reads[0], source, strict=True)]
            self._give(entry, [new // old for new, old in zip(sizes[0], read, strict=True)])
        elif node.op == "Split":
            self._shorten(entry, sizes)
        elif node.op == "Concat":
            node.inputs = [node.inputs[index] for index, _ in reads]
            if len(reads) == 1:
                self._rename(entry)
        elif node.op == "Slice":
            self._rename(entry)
        elif taken is not None:
            self._renumber(entry, taken, source)

    def _selects_as_before(self, entry: NodeRows, taken: dict[int, Array]) -> bool:
        """Whether a Slice or Gather takes the same indices of an axis that keeps its size."""
        source, node = self._shapes[id(entry.node.inputs[0])], entry.node
        has = self._sizes(node.inputs[0], self._live.made(node.inputs[0]))
        gives = self._sizes(node.outputs[0], entry.makes[0])
        full = self._shapes[id(node.outputs[0])]
        return all(
            has[axis] == source[axis] and (taken[axis].ndim == 0 or gives[axis] == full[axis])
            for axis in taken
        )

    def _select(self, tensor: gs.Tensor, need: Need) -> gs.Tensor:
        """The rows of a tensor, as it will be, that a reader needs."""
        shape = self._shapes[id(tensor)]
        places: dict[int, Array] = {}
        for axis, (made, wanted) in enumerate(zip(self._live.made(tensor), need, strict=True)):
            has, wants = indices(made, shape[axis]), indices(wanted, shape[axis])
            if len(has) != len(wants):
                places[axis] = np.searchsorted(has, wants)
        if not places:
            return tensor
        key = (id(tensor), *((axis, place.tobytes()) for axis, place in places.items()))
        if key not in self._selected:
            self._selected[key] = self._selection(tensor, places, self._sizes(tensor, need))
        return self._selected[key]

    def _selection(self, tensor: gs.Tensor, places: dict[int, Array], sizes: list[int]) -> gs.Tensor:
        name = f"{tensor.name}.rows"
        if isinstance(tensor, gs.Constant):
            weight = weight_of(tensor)
            for axis, place in places.items():
                weight = Selected(weight, axis, place.tolist())
            return next(iter(self._editors.values())).constant(name, weight)
        editor = self._editors[id(self._homes[id(tensor)])]
        size = self._sizes(tensor, self._live.made(tensor))
        runs = {axis: place for axis, place in places.items() if place[-1] - place[0] == len(place) - 1}
        for axis, place in places.items():
            if axis not in runs:
                size[axis] = sizes[axis]
                index = editor.constant(f"{name}.indices", place.astype(np.int64))
                tensor = editor.add(
                    "Gather", [tensor, index], name, dtype=tensor.dtype, shape=size, attrs={"axis": axis}
                )
        if runs:
            bounds = [
                [place[0] for place in runs.values()],
                [place[-1] + 1 for place in runs.values()],
                list(runs),
            ]
            constants = [
                editor.constant(f"{name}.{part}", np.array(values, np.int64))
                for part, values in zip(("start", "end", "axes"), bounds, strict=True)
            ]
            tensor = editor.add("Slice", [tensor, *constants], name, dtype=tensor.dtype, shape=sizes)
        return tensor

    def _rename(self, entry: NodeRows) -> None:
        """What is selected already is what the node made."""
        node = entry.node
        node.op, node.attrs, node.inputs = "Identity", {}, node.inputs[:1]
        self._names_only.append((node, self._editors[id(entry.scope)]))

    def _renumber(self, entry: NodeRows, taken: dict[int, Array], source: tuple[int, ...]) -> None:
        """Let a Gather by constant indices count the rows that are left."""
        ((axis, chosen),) = taken.items()
        wanted = chosen if chosen.ndim == 0 else chosen[indices(entry.makes[0][axis], len(chosen))]
        places = np.searchsorted(indices(entry.reads[0][axis], source[axis]), wanted)
        constant = self._editors[id(entry.scope)].constant(
            f"{entry.node.outputs[0].name}.indices", np.asarray(places, np.int64)
        )
        entry.node.inputs[1] = constant

    def _shorten(self, entry: NodeRows, sizes: Sequence[Sequence[int]]) -> None:
        """Let a Split make what is left, without parts that are empty."""
        node = entry.node
        node.attrs.pop("num_outputs", None)
        kept = [(tensor, size) for tensor, size in zip(entry.outputs, sizes, strict=True) if 0 not in size]
        node.outputs = [tensor for tensor, _ in kept]
        if len(kept) == 1:
            self._rename(entry)
        else:
            self._give(entry, [size[node.attrs.get("axis", 0)] for _, size in kept])

    def _give(self, entry: NodeRows, values: Sequence[int]) -> None:
        """Replace the constant second input of a node: a shape, repeats, sizes."""
        node = entry.node
        name = f"{node.outputs[0].name}.{node.op.lower()}"
        constant = self._editors[id(entry.scope)].constant(name, np.asarray(values, np.int64))
        node.inputs = [node.inputs[0], constant]

    def _sizes(self, tensor: gs.Tensor, need: Need) -> list[int]:
        return [len(indices(axis, size)) for axis, size in zip(need, self._shapes[id(tensor)], strict=True)]
