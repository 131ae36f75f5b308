"""Which rows of each tensor something that is returned depends on: a backward walk over the graph.

Rows are indices along any axis: tokens, images of a batch, keys of an attention. What a tensor must hold is the union
of what its readers need; operators that work row by row pass it on, others need all rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.runner import Array
from pi05c.passes.patterns.attention import Attention, find_attention
from pi05c.passes.patterns.known import Known
from pi05c.passes.patterns.masked_keys import ALL_SEEN, ALWAYS, DEAD, Mask, find_mask, live_keys
from pi05c.passes.patterns.row_flow import (
    Axis,
    Flow,
    Need,
    everything,
    flow,
    is_dead,
    is_shrunk,
    matmul,
    nothing,
    reduced_axes,
    shape_of,
    simple,
    union,
)
from pi05c.passes.patterns.walk import static_shape

_WORK = frozenset({"MatMul", "Gemm", "Conv", "Attention"})
"""Operators that are worth making smaller; a few elementwise ones are not worth the Slice that it takes."""


@dataclass(frozen=True)
class NodeRows:
    """What one node needs and makes, where that is not everything.

    Attributes:
        reads: for each input, which rows it needs; the tensor may have more.
        makes: for each output, which rows it is to have.
        outputs: those that the node had.
    """

    node: gs.Node
    scope: gs.Graph
    reads: tuple[Need, ...]
    makes: tuple[Need, ...]
    outputs: tuple[gs.Tensor, ...]

    @property
    def shrinks(self) -> bool:
        """Whether an output is to have fewer rows than it has."""
        return any(is_shrunk(need) for need in self.makes)


class Liveness:
    """The rows that are needed, in a graph whose nodes are sorted and whose shapes are static where it matters.

    Attributes:
        skips: for each mask, by the tensor's name, why it leaves out no key.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._known = Known(graph)
        attentions, _ = find_attention(graph)
        self._by_product = {id(chunk.av): attention for attention in attentions for chunk in attention.chunks}
        self._by_softmax = {
            id(node): attention for attention in attentions for node in attention.softmax.nodes
        }
        self._masks = {id(attention.softmax): find_mask(attention, self._known) for attention in attentions}
        self._mask_nodes = {id(mask.node): mask for mask in self._masks.values() if isinstance(mask, Mask)}
        self._found: dict[tuple[object, ...], Array | str] = {}
        self._all_rows: set[int] = set()
        self._walk()
        while idle := self._idle():
            self._all_rows |= idle
            self._walk()

    def rows(self) -> Iterator[NodeRows]:
        """The nodes for which something is to change."""
        for entry in self._rows.values():
            if entry.shrinks or any(
                self.is_shrunk(tensor) or (is_shrunk(need) and entry.node.op in _WORK)
                for tensor, need in zip(entry.node.inputs, entry.reads, strict=True)
            ):
                yield entry

    def made(self, tensor: gs.Tensor) -> Need:
        """The rows that a tensor is to have."""
        return self._made.get(id(tensor)) or everything(len(shape_of(tensor)))

    def is_shrunk(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is to have fewer rows than it has."""
        return id(tensor) in self._made

    def _walk(self) -> None:
        self._needs: dict[int, Need | None] = {}
        self._made: dict[int, Need] = {}
        self._rows: dict[int, NodeRows] = {}
        self._keys: dict[int, Axis] = {}
        self.skips: dict[str, str] = {}
        self._visit(self._graph)

    def _visit(self, scope: gs.Graph) -> None:
        for tensor in scope.outputs:
            self._needs[id(tensor)] = None
        for node in reversed(scope.nodes):
            needs = [self._needed(tensor) for tensor in node.outputs]
            if all(need is _NOTHING for need in needs):
                continue  # dead, or about to be
            for body in node.subgraphs():
                self._visit(body)
            if node.op == "Split":
                pairs = zip(node.outputs, needs, strict=True)
                needs = [self._unread_part(tensor) if need is _NOTHING else need for tensor, need in pairs]
            flowing = self._flow(node, [need for need in needs if isinstance(need, tuple)])
            if flowing is None:
                for tensor in node.inputs:
                    self._needs[id(tensor)] = None
                continue
            for tensor, read in zip(node.inputs, flowing.reads, strict=True):
                self._add(tensor, read)
            for tensor, made in zip(node.outputs, flowing.makes, strict=True):
                if is_shrunk(made):
                    self._made[id(tensor)] = made
            self._rows[id(node)] = NodeRows(
                node, scope, tuple(flowing.reads), tuple(flowing.makes), tuple(node.outputs)
            )

    def _needed(self, tensor: gs.Tensor) -> Need | object:
        """What is needed of a tensor of known rank; `_NOTHING` where it is not needed at all."""
        if id(tensor) not in self._needs:
            return _NOTHING
        need = self._needs[id(tensor)]
        return everything(len(shape_of(tensor))) if need is None or id(tensor) in self._all_rows else need

    def _unread_part(self, tensor: gs.Tensor) -> Need:
        shape = shape_of(tensor)
        return everything(len(shape)) if id(tensor) in self._all_rows else nothing(shape)

    def _add(self, tensor: gs.Tensor, read: Need) -> None:
        if not tensor.name or any(is_dead(axis) for axis in read):
            return
        if id(tensor) in self._needs:
            old = self._needs[id(tensor)]
            if old is None:
                return
            read = tuple(union(left, right) for left, right in zip(old, read, strict=True))
        self._needs[id(tensor)] = None if all(axis is None for axis in read) else read

    def _flow(self, node: gs.Node, needs: list[Need]) -> Flow | None:
        """What a node reads; the operators of an attention, and sums of what is zero, need less than others."""
        if len(needs) < len(node.outputs) or any(static_shape(tensor) is None for tensor in node.outputs):
            return None
        if attention := self._by_product.get(id(node)):
            keys = self._live_keys(attention, needs[0])
            if keys is not None:
                return matmul(node, needs[0], keys)
        found = flow(node, needs)
        if found is None:
            return None
        if (attention := self._by_softmax.get(id(node))) and id(attention.softmax) in self._keys:
            return _along_keys(node, found, self._keys[id(attention.softmax)], needs[0])
        if mask := self._mask_nodes.get(id(node)):  # the mask itself counts where it says that a key does not
            reads = [
                read if index == mask.logits else tuple(_without_conditions(axis) for axis in read)
                for index, read in enumerate(found.reads)
            ]
            return Flow(reads, found.makes)
        if node.op in ("ReduceSum", "CumSum"):
            return self._without_zeros(node, found)
        return found

    def _live_keys(self, attention: Attention, need: Need) -> Axis:
        mask = self._masks[id(attention.softmax)]
        keys = mask if isinstance(mask, str) else self._keys_of(attention, mask, need[-2])
        if isinstance(keys, str):
            if attention.masked and keys != ALL_SEEN:
                self.skips.setdefault(_mask_name(attention), keys)
            return None
        self._keys[id(attention.softmax)] = keys
        return keys

    def _keys_of(self, attention: Attention, mask: Mask, queries: Axis) -> Array | str:
        """`live_keys`, found once for all layers that share a mask."""
        shapes = (static_shape(attention.qk.outputs[0]), static_shape(attention.av.inputs[0]))
        rows = None if queries is None else queries.tobytes()
        key = (id(mask.elements), len(attention.chunks), shapes, rows)
        if key not in self._found:
            self._found[key] = live_keys(attention, mask, queries)
        return self._found[key]

    def _without_zeros(self, node: gs.Node, found: Flow) -> Flow:
        """A sum needs no rows that are zero in any run."""
        known = self._known.of(node.inputs[0])
        axes = reduced_axes(node)
        if known is None or not axes or len(axes) > 1:
            return found
        axis = axes[0]
        others = tuple(other for other in range(known.zero.ndim) if other != axis)
        counts = ~known.zero.all(axis=others)
        if node.op == "CumSum" and (need := self._needed(node.outputs[0])) is not _NOTHING:
            assert isinstance(need, tuple)
            rows = need[axis]
            counts |= True if rows is None else rows != DEAD
        if not counts.any() or counts.all():
            return found
        kept = np.where(counts, ALWAYS, DEAD)
        reads = [(*found.reads[0][:axis], kept, *found.reads[0][axis + 1 :]), *found.reads[1:]]
        makes = found.makes
        if node.op == "CumSum":
            makes = [(*found.makes[0][:axis], kept, *found.makes[0][axis + 1 :])]
        return Flow(reads, makes)

    def _idle(self) -> set[int]:
        """Tensors that would shrink without making any real work smaller."""
        regions = _Regions()
        for entry in self._rows.values():
            tensors = [
                id(tensor) for tensor in (*entry.node.inputs, *entry.node.outputs) if self.is_shrunk(tensor)
            ]
            inner = any(is_shrunk(read) for read in entry.reads)
            regions.join(tensors, works=entry.node.op in _WORK and (entry.shrinks or inner))
        return regions.idle()


_NOTHING = object()
"""The need of a tensor that nobody reads."""


class _Regions:
    """Tensors that shrink together."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}
        self._works: set[int] = set()

    def join(self, tensors: Collection[int], *, works: bool) -> None:
        roots = {self._root(tensor) for tensor in tensors}
        if not roots:
            return
        first, *rest = roots
        for root in rest:
            self._parent[root] = first
        if works or roots & self._works:
            self._works.add(first)

    def idle(self) -> set[int]:
        return {tensor for tensor in self._parent if self._root(tensor) not in self._works}

    def _root(self, tensor: int) -> int:
        self._parent.setdefault(tensor, tensor)
        while self._parent[tensor] != tensor:
            self._parent[tensor] = self._parent[self._parent[tensor]]
            tensor = self._parent[tensor]
        return tensor


def _along_keys(node: gs.Node, found: Flow, keys: Axis, need: Need) -> Flow:
    """A node of a softmax of which only some columns count."""
    if keys is None:
        return found
    if shape_of(node.outputs[0])[-1] == len(keys) and not np.array_equal(_dead(need[-1], keys), keys == DEAD):
        return found  # another reader wants the probabilities of keys without weight
    reads = [
        (*read[:-1], keys) if read and shape_of(tensor)[-1] == len(keys) else read
        for tensor, read in zip(node.inputs, found.reads, strict=True)
    ]
    makes = [(*made[:-1], need[-1]) for made in found.makes]
    return Flow(reads, makes)


def _dead(axis: Axis, like: Array) -> Array:
    return np.zeros(len(like), np.bool_) if axis is None else axis == DEAD


def _without_conditions(axis: Axis) -> Axis:
    return None if axis is None else simple(np.where(axis == DEAD, DEAD, ALWAYS))


def _mask_name(attention: Attention) -> str:
    node = next(node for node in attention.between if node.op in ("Add", "Sub", "Where"))
    inner = {id(attention.qk.outputs[0]), *(id(other.outputs[0]) for other in attention.between)}
    mask = next((tensor for tensor in node.inputs if id(tensor) not in inner), node.outputs[0])
    return str(mask.name)


__all__ = ["Liveness", "NodeRows"]
