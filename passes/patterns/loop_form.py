"""One description of ONNX's two loops, so that whoever works on their steps need not tell them apart.

`Loop` runs until a trip count M is reached or a condition turns false; `Scan` runs once for each slice of its
scanned inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer


@dataclass(frozen=True)
class Carried:
    """A value that one step hands to the next.

    Attributes:
        initial: what the first step gets, a tensor outside the body.
        entering: the body's input.
        leaving: the body's output; `entering` itself, or a tensor outside the body, is possible.
        result: the loop's output: what left the last step, or `initial` where there was none.
    """

    initial: gs.Tensor
    entering: gs.Variable
    leaving: gs.Tensor
    result: gs.Variable


@dataclass(frozen=True)
class Scanned:
    """A tensor of which each step gets one slice along `axis`, without that axis, from the end if `reverse`."""

    source: gs.Tensor
    element: gs.Variable
    axis: int
    reverse: bool


@dataclass(frozen=True)
class Collected:
    """A body output whose values are stacked along a new `axis` of the loop's output, from the end if `reverse`."""

    element: gs.Tensor
    result: gs.Variable
    axis: int
    reverse: bool


@dataclass(frozen=True)
class LoopForm:
    """A Loop or Scan.

    Attributes:
        node: the Loop or Scan.
        scope: the graph or body that holds `node`.
        body: its body.
        iteration: the body input that counts steps from 0; None for a Scan.
        condition: the body input that holds the condition; None for a Scan.
    """

    node: gs.Node
    scope: gs.Graph
    body: gs.Graph
    iteration: gs.Variable | None
    condition: gs.Variable | None
    carried: tuple[Carried, ...]
    scanned: tuple[Scanned, ...]
    collected: tuple[Collected, ...]

    @property
    def unchanged(self) -> list[Carried]:
        """Carried values that every step hands on as it got them: they are `initial` throughout."""
        return [c for c in self.carried if same_value(c.leaving) is c.entering]


def loop_form(scope: gs.Graph, node: gs.Node) -> LoopForm | str:
    """Describe the Loop or Scan `node` of `scope`, or say in a phrase what cannot be described."""
    return _of_scan(scope, node) if node.op == "Scan" else _of_loop(scope, node)


def same_value(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor that `tensor` is another name of: what it was before Identity."""
    while (node := producer(tensor)) is not None and node.op == "Identity" and not node.domain:
        tensor = node.inputs[0]
    return tensor


def position(part: Scanned | Collected, step: int, steps: int) -> int:
    """Where along its axis a step reads or writes."""
    return steps - 1 - step if part.reverse else step


def _of_loop(scope: gs.Graph, node: gs.Node) -> LoopForm:
    body = node.attrs["body"]
    iteration, condition, *entering = body.inputs
    leaving = body.outputs[1 : 1 + len(entering)]
    carried = _carried(node.inputs[2:], entering, leaving, node.outputs)
    elements = body.outputs[1 + len(entering) :]
    results = _padded(node.outputs[len(entering) :], len(elements))
    collected = tuple(Collected(e, r, 0, False) for e, r in zip(elements, results, strict=True))
    return LoopForm(node, scope, body, iteration, condition, carried, (), collected)


def _of_scan(scope: gs.Graph, node: gs.Node) -> LoopForm | str:
    body, attrs = node.attrs["body"], node.attrs
    scans = int(attrs["num_scan_inputs"])
    states = len(node.inputs) - scans
    carried = _carried(node.inputs[:states], body.inputs[:states], body.outputs[:states], node.outputs)
    scanned, collected = [], []
    sources, elements = node.inputs[states:], body.inputs[states:]
    axes, back = _per_part(attrs, "scan_input", scans)
    for source, element, axis, reverse in zip(sources, elements, axes, back, strict=True):
        if source.shape is None:
            return f"the shape of its scanned input {source.name!r} is not known"
        scanned.append(Scanned(source, element, axis % len(source.shape), bool(reverse)))
    outputs = body.outputs[states:]
    results = _padded(node.outputs[states:], len(outputs))
    axes, back = _per_part(attrs, "scan_output", len(outputs))
    for output, result, axis, reverse in zip(outputs, results, axes, back, strict=True):
        collected.append(Collected(output, result, axis, bool(reverse)))
    return LoopForm(node, scope, body, None, None, carried, tuple(scanned), tuple(collected))


def _per_part(attrs: dict[str, list[int]], kind: str, count: int) -> tuple[list[int], list[int]]:
    return attrs.get(f"{kind}_axes") or [0] * count, attrs.get(f"{kind}_directions") or [0] * count


def _carried(
    initial: Sequence[gs.Tensor],
    entering: Sequence[gs.Variable],
    leaving: Sequence[gs.Tensor],
    results: Sequence[gs.Variable],
) -> tuple[Carried, ...]:
    parts = zip(initial, entering, leaving, _padded(results, len(entering)), strict=True)
    return tuple(Carried(*part) for part in parts)


def _padded(results: Sequence[gs.Variable], length: int) -> list[gs.Variable]:
    """The first `length` outputs; those that nobody wants may be left out at the end."""
    return [*results[:length], *(gs.Variable.empty() for _ in range(length - len(results)))]
