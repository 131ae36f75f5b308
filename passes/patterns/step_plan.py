"""Which values of a loop's body become constants, one for each step, and what they are."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.graph.errors import Pi05cError
from pi05c.graph.runner import Array
from pi05c.graph.weights import weight_of
from pi05c.passes.patterns.dependence import Classification, Dependence, reads
from pi05c.passes.patterns.loops import StaticLoop, StepEvaluator

SMALL_TABLE_BYTES = 2**20
"""A value whose constants of all steps take no more than this becomes constant even if it replaces less."""


@dataclass(frozen=True)
class StepPlan:
    """What to do with a body.

    Attributes:
        classification: of its values.
        tables: the values that become constants with their value in each step, by id. They are the frontier of
            the classification, and what carried values are after the last step.
        obstacle: why what depends on the step stays computed, where onnxruntime cannot run it.
    """

    classification: Classification
    tables: dict[int, tuple[gs.Tensor, list[Array]]]
    obstacle: str = ""


def plan_steps(graph: gs.Graph, loop: StaticLoop, *, stacked: bool = False) -> StepPlan:
    """Compute what depends on the step alone, in every step.

    A value that would take more than `SMALL_TABLE_BYTES` for all steps, and more than the constants that it is
    computed from, stays computed. Nothing is edited.

    Args:
        stacked: the values of all steps are to be one tensor, so that one whose shape changes stays computed too.
    """
    computed: set[int] = set()
    obstacle = ""
    while True:
        classification = loop.classify(computed)
        wanted = classification.frontier() + _results(loop, classification)
        wanted = list({id(tensor): tensor for tensor in wanted}.values())
        try:
            tables, large = _evaluate(graph, loop, classification, wanted)
            if stacked:
                large += [tensor for tensor, values in tables.values() if len({v.shape for v in values}) > 1]
        except Pi05cError as error:
            if obstacle:
                raise
            obstacle = str(error)
            large = [tensor for node in classification.nodes(Dependence.STEP) for tensor in node.outputs]
        if not large:
            return StepPlan(classification, tables, obstacle)
        computed.update(id(tensor) for tensor in large)


def _results(loop: StaticLoop, classification: Classification) -> list[gs.Tensor]:
    """Carried values that depend on the step alone and that somebody reads after the last step."""
    outputs = {id(tensor) for tensor in loop.form.scope.outputs}
    return [c.leaving for c in classification.stepwise if c.result.outputs or id(c.result) in outputs]


def _evaluate(
    graph: gs.Graph, loop: StaticLoop, classification: Classification, wanted: list[gs.Tensor]
) -> tuple[dict[int, tuple[gs.Tensor, list[Array]]], list[gs.Tensor]]:
    """The values of every step, or those tensors that are too large to keep."""
    tables: dict[int, tuple[gs.Tensor, list[Array]]] = {id(tensor): (tensor, []) for tensor in wanted}
    evaluator = StepEvaluator(graph, loop.form, classification, loop.known, wanted)
    for _ in range(loop.steps):
        values = evaluator.advance()
        large = [
            tensor
            for tensor, value in zip(wanted, values, strict=True)
            if loop.steps * value.nbytes > SMALL_TABLE_BYTES and loop.steps * value.nbytes > _replaced(tensor)
        ]
        if large:
            return {}, large
        for tensor, value in zip(wanted, values, strict=True):
            tables[id(tensor)][1].append(value)
    return tables, []


def _replaced(tensor: gs.Tensor) -> int:
    """Bytes of the constants that a value is computed from."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    stack = [tensor]
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if isinstance(tensor, gs.Constant):
            found[id(tensor)] = weight_of(tensor).nbytes
        elif (node := producer(tensor)) is not None:
            stack.extend(reads(node))
    return sum(found.values())
