"""Which keys of an attention no query ever sees, and which it sees only where an input says so."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.runner import Array
from pi05c.passes.patterns.attention import Attention
from pi05c.passes.patterns.known import NO_CONDITION, Elements, Known, choose, constant_elements
from pi05c.passes.patterns.walk import ROUNDING, static_shape

DEAD, ALWAYS = -2, -1
"""What liveness says of an index along an axis: nobody needs it; it is always needed. A number from 0 on is a
condition: it is needed only where that element of the model's boolean inputs is true."""

BEYOND_LOGITS = 1e9
"""How far below the highest mask of its row a mask lies whose key has a probability of exactly 0 in float32: exp(-104)
is 0 (IEEE 754 binary32), and no logits of a model that works are 1e8 apart."""

ALL_SEEN = "every key may be seen by every row"
"""Why a mask leaves out no key where there is nothing wrong with that."""


@dataclass(frozen=True)
class Mask:
    """The mask of an attention.

    Attributes:
        node: the Add or Where.
        elements: what is known of what it adds to the logits, 0 where it lets them through.
        logits: which of the node's inputs the logits are.
    """

    node: gs.Node
    elements: Elements
    logits: int

    @property
    def lets_all_through(self) -> bool:
        """Whether it changes nothing in any run."""
        return bool(self.elements.zero.all())


def find_mask(attention: Attention, known: Known) -> Mask | str:
    """The one mask of an attention, or a phrase that says why nothing is known of it."""
    masks = [node for node in attention.between if node.op in ("Add", "Sub", "Where")]
    if not masks:
        return "it has no mask"
    if len(masks) > 1:
        return "it has several masks"
    node = masks[0]
    after = attention.between[[id(other) for other in attention.between].index(id(node)) + 1 :]
    if any(other.op not in ROUNDING for other in after):
        return "its mask is scaled or reshaped with the logits"
    inner = {id(attention.qk.outputs[0]), *(id(other.outputs[0]) for other in attention.between)}
    logits = next((index for index, tensor in enumerate(node.inputs) if id(tensor) in inner), None)
    if node.op == "Sub" or logits is None:
        return f"its mask is spelled as {node.op} {node.name!r}"
    if node.op == "Add":
        elements = known.of(node.inputs[1 - logits])
    else:
        zero = constant_elements(np.zeros((), np.float32))
        parts = [zero if index == logits else known.of(t) for index, t in enumerate(node.inputs)]
        condition, yes, no = parts
        fill = parts[3 - logits] if logits else None
        if fill is not None and (fill.known & ((fill.high == 0) | (fill.low == 0))).any():
            return f"its mask sets logits to 0 in {node.name!r}"  # as if it let them through
        elements = None if condition is None or yes is None or no is None else choose(condition, yes, no)
    if elements is None or not elements.known.any():
        return "its mask is known only when the model runs (specialize fixes what is known before)"
    return Mask(node, elements, logits)


def live_keys(attention: Attention, mask: Mask, queries: Array | None) -> Array | str:
    """For each key when it is needed, or a phrase that says why all are.

    A key is dead if its mask lies `BEYOND_LOGITS` below another of the row that is sure to be let through, in every
    row that is needed. A row that is needed on a condition is looked at under that condition: what it gives
    otherwise, nobody reads. A key that is let through on one condition is needed on that condition alone.

    Args:
        queries: for each query row when it is needed; None for always.
    """
    shape = static_shape(attention.qk.outputs[0]) or ()
    if len(attention.chunks) > 1:
        return "its keys come in several chunks"
    if static_shape(attention.av.inputs[0]) != shape or len(shape) < 2:
        return "its rows are grouped"
    if mask.elements.high.ndim == 0 or mask.elements.high.shape[-1] != shape[-1]:
        return "its mask is the same for all keys"
    rows = _Rows.of(mask.elements, queries)
    gone = rows.dead.all(axis=0)
    if not gone.any():
        closed = rows.closed
        if closed.all(axis=0).any():
            return "a row of its mask may leave out every key"
        return "its mask leaves out other keys for each head or row" if closed.any() else ALL_SEEN
    result = np.full(shape[-1], ALWAYS, np.int64)
    for candidates in rows.candidates:
        result = np.where((result == ALWAYS) & rows.needed_on(candidates), candidates, result)
    return np.where(gone, DEAD, result)


@dataclass(frozen=True)
class _Rows:
    """The needed rows of a mask, all batches and heads one after the other: [rows, keys]."""

    certain: Array
    known: Array
    high: Array
    low: Array
    first: Array
    second: Array
    assumed: Array
    """[rows, 1]: the condition on which the row is needed, or `NO_CONDITION`."""
    candidates: tuple[Array, Array]
    """[keys] each: the conditions that a key has in one of the rows."""

    @classmethod
    def of(cls, elements: Elements, queries: Array | None) -> _Rows:
        names = ("known", "high", "low", "first", "second")
        known, high, low, first, second = (np.atleast_2d(getattr(elements, name)) for name in names)
        *outer, count, keys = known.shape
        needed = np.full(count, ALWAYS, np.int64)
        if queries is not None and count == len(queries):
            needed = queries
        needed = np.tile(needed, int(np.prod(outer, dtype=int)))
        kept = needed != DEAD
        assumed = np.where(needed == ALWAYS, NO_CONDITION, needed)[kept][:, None]
        known, high, low, first, second = (
            part.reshape(-1, keys)[kept] for part in (known, high, low, first, second)
        )
        high, low = high.astype(np.float64), low.astype(np.float64)
        candidates = (first[0], second[0])
        first, second = (
            np.where((part == assumed) & (assumed != NO_CONDITION), NO_CONDITION, part)
            for part in (first, second)
        )
        unconditional = (first == NO_CONDITION) & (second == NO_CONDITION)
        certain = known & (unconditional | (high == low))
        return cls(certain, known, high, low, first, second, assumed, candidates)

    @property
    def highest(self) -> Array:
        """[rows, 1]: the highest mask that is sure to be there, -inf where none is."""
        sure: Array = np.where(self.certain, self.high, -np.inf)
        return np.asarray(np.max(sure, axis=1, keepdims=True))

    @property
    def dead(self) -> Array:
        """[rows, keys]: whether a key has no weight in a row, since another is sure to be let through."""
        return self._below(self.highest)

    @property
    def closed(self) -> Array:
        """[rows, keys]: whether a key is left out in any run, though its row may leave out all."""
        return self._below(self.high.max(initial=-np.inf))

    def _below(self, reference: Array) -> Array:
        worst = np.where(self.certain, self.high, np.maximum(self.high, self.low))
        with np.errstate(invalid="ignore"):
            beyond: Array = reference - worst >= BEYOND_LOGITS
        return self.known & beyond

    def needed_on(self, conditions: Array) -> Array:
        """[keys]: whether, where a key's condition is false, it has no weight in any row that is then needed."""
        with np.errstate(invalid="ignore"):
            low = self.highest - self.low >= BEYOND_LOGITS
        conditional = self.known & low & ((self.first == conditions) | (self.second == conditions))
        fine = self.dead | conditional | (self.assumed == conditions)
        found: Array = (conditions != NO_CONDITION) & fine.all(axis=0)
        return found


__all__ = ["ALWAYS", "DEAD", "Mask", "find_mask", "live_keys"]
