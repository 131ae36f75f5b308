"""Repeated key and value heads of grouped-query attention."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.passes.patterns.walk import static_shape


@dataclass(frozen=True)
class Repeat:
    """K or V heads, each repeated for the query heads of its group.

    Attributes:
        source: [B, K, C, d] (or [B, K, d, C]), before the repetition.
        groups: how often each head is repeated; head h of the result is head h // groups of `source`.
        moved: the Transpose of the last two axes that stands between the repetition and its reader, if any.
    """

    source: gs.Tensor
    groups: int
    moved: gs.Node | None


def find_repeat(tensor: gs.Tensor) -> Repeat | None:
    """The repetition that `tensor`, a factor of an attention MatMul of rank 4, comes from.

    Spellings: `Reshape(Expand(Unsqueeze(x, 2)))`, the same with Tile or with Reshape in place of Unsqueeze, and
    Expand or Tile of one head.
    """
    moved = None
    node = producer(tensor)
    if node is not None and node.op == "Transpose" and list(node.attrs.get("perm", ())) == [0, 1, 3, 2]:
        moved, tensor = node, node.inputs[0]
        node = producer(tensor)
    if node is None:
        return None
    result = static_shape(tensor)
    if result is None or len(result) != 4:
        return None
    if node.op in ("Expand", "Tile"):
        source = static_shape(node.inputs[0])
        if (
            source is not None
            and len(source) == 4
            and source[1] == 1 < result[1]
            and _only(source, result, 1)
        ):
            return Repeat(node.inputs[0], result[1], moved)
        return None
    if node.op != "Reshape":
        return None
    widened = producer(node.inputs[0])
    if widened is None or widened.op not in ("Expand", "Tile"):
        return None
    raised = producer(widened.inputs[0])
    if raised is None or raised.op not in ("Unsqueeze", "Reshape"):
        return None
    source, before, after = (
        static_shape(t) for t in (raised.inputs[0], raised.outputs[0], widened.outputs[0])
    )
    if source is None or before is None or after is None or len(source) != 4 or len(after) != 5:
        return None
    groups = after[2]
    if before != (*source[:2], 1, *source[2:]) or after != (*source[:2], groups, *source[2:]):
        return None
    if result != (source[0], source[1] * groups, *source[2:]) or groups == 1:
        return None
    return Repeat(raised.inputs[0], groups, moved)


def _only(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> bool:
    """Whether two shapes differ in one axis alone."""
    return before[:axis] + before[axis + 1 :] == after[:axis] + after[axis + 1 :]
