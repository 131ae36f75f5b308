"""Finds loops whose number of steps is known at compile time, and runs what depends on the step alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.graph.errors import Pi05cError
from pi05c.graph.evaluate import Evaluator
from pi05c.graph.io import scopes
from pi05c.graph.runner import Array
from pi05c.passes.patterns.dependence import Classification, reads, runtime_tensors
from pi05c.passes.patterns.loop_form import Carried, LoopForm, loop_form, position, same_value


@dataclass(frozen=True)
class StaticLoop:
    """A Loop or Scan that runs exactly `steps` times.

    Attributes:
        known: what is known at compile time about body inputs, by id: the value in the first step of a carried
            value, the whole tensor of a scanned one.
        runtime: ids of the tensors of the whole graph that only a run knows.
    """

    form: LoopForm
    steps: int
    known: dict[int, Array]
    runtime: frozenset[int]

    def classify(self, computed: Iterable[int] = ()) -> Classification:
        """What each value in the body depends on; see `Classification`."""
        return Classification(self.form, self.runtime, self.known, computed)


def each_loop(graph: gs.Graph) -> Iterator[tuple[gs.Graph, gs.Node]]:
    """Every Loop and Scan with the scope that it is in, outer ones first.

    The caller may edit the loop's place in its scope before it asks for the next: what stands there then is visited.
    """
    stack = [graph]
    while stack:
        scope = stack.pop()
        visited: dict[int, gs.Node] = {}
        index = 0
        while index < len(scope.nodes):
            node = scope.nodes[index]
            if node.op in ("Loop", "Scan") and not node.domain and id(node) not in visited:
                visited[id(node)] = node
                yield scope, node
            else:
                stack.extend(node.subgraphs())
                index += 1


def find_static_loop(graph: gs.Graph, scope: gs.Graph, node: gs.Node, max_steps: int) -> StaticLoop | str:
    """Describe the loop `node` of `scope`, or say in a phrase why its number of steps is not known.

    A trip count that hangs on a condition computed in the body is found by running that computation, which must
    depend on constants and the number of the step alone. Nothing is edited. Nodes must be sorted.

    Args:
        graph: the whole graph.
        max_steps: a loop of more steps is refused.
    """
    form = loop_form(scope, node)
    if isinstance(form, str):
        return form
    if name := _unknown_output(graph, form.body):
        return f"its body returns {name!r}, which nothing produces"
    runtime = runtime_tensors(graph)
    fed = [(c.entering, c.initial) for c in form.carried] + [(s.element, s.source) for s in form.scanned]
    try:
        known = _values_at_compile_time(graph, fed, runtime)
        steps = (
            _scan_length(form) if node.op == "Scan" else _trip_count(graph, form, known, runtime, max_steps)
        )
    except Pi05cError as error:
        return f"its number of steps cannot be computed: {error}"
    if isinstance(steps, str):
        return steps
    if steps > max_steps:
        return f"it runs {steps} steps, more than max_steps={max_steps}"
    return StaticLoop(form, steps, known, runtime)


class StepEvaluator:
    """Runs the part of a body that depends on the step alone, step by step, in the graph's own arithmetic.

    Args:
        graph: the whole graph.
        wanted: values to compute, which `classification` knows at compile time.

    Raises:
        Pi05cError: onnxruntime cannot run it.
    """

    def __init__(
        self,
        graph: gs.Graph,
        form: LoopForm,
        classification: Classification,
        known: dict[int, Array],
        wanted: Sequence[gs.Tensor],
    ) -> None:
        self._form = form
        self._known = known
        self._wanted = list(wanted)
        self._carried = _needed_carried(form, classification, wanted)
        inputs = {id(tensor) for tensor in form.body.inputs}
        computed = [*wanted, *(c.leaving for c in self._carried)]
        self._computed = list({id(t): t for t in computed if id(t) not in inputs}.values())
        self._fed = _inputs_behind(form, self._computed)
        self._run = Evaluator(graph, self._computed, self._fed)
        self._entering = {id(c.entering): known[id(c.entering)] for c in self._carried}
        self._step = 0

    def advance(self) -> list[Array]:
        """The wanted values in the next step.

        Raises:
            Pi05cError: onnxruntime fails.
        """
        values = {**self._entering, **self._iteration(), **self._slices()}
        results = self._run({tensor.name: values[id(tensor)] for tensor in self._fed})
        values.update(zip(map(id, self._computed), results, strict=True))
        self._entering = {id(c.entering): values[id(c.leaving)] for c in self._carried}
        self._step += 1
        return [values[id(tensor)] for tensor in self._wanted]

    def _iteration(self) -> dict[int, Array]:
        iteration = self._form.iteration
        if iteration is None:
            return {}
        shape = (1,) if iteration.shape is not None and len(iteration.shape) == 1 else ()
        return {id(iteration): np.full(shape, self._step, np.int64)}

    def _slices(self) -> dict[int, Array]:
        slices = {}
        for scan in self._form.scanned:
            if (source := self._known.get(id(scan.element))) is not None:
                where = position(scan, self._step, source.shape[scan.axis])
                slices[id(scan.element)] = np.asarray(np.take(source, where, axis=scan.axis))
        return slices


def _scan_length(form: LoopForm) -> int | str:
    for scan in form.scanned:
        size = scan.source.shape[scan.axis]
        if isinstance(size, (int, np.integer)):
            return int(size)
    return "the length of its scanned axis is not static"


def _trip_count(
    graph: gs.Graph, form: LoopForm, known: dict[int, Array], runtime: frozenset[int], max_steps: int
) -> int | str:
    for name, tensor in zip(("trip count", "initial condition"), form.node.inputs, strict=False):
        if id(tensor) in runtime:
            return f"its {name} {tensor.name!r} depends on the model's inputs"
    limit, running = (_scalar(graph, tensor) for tensor in form.node.inputs[:2])
    if (limit is not None and limit <= 0) or (running is not None and not running):
        return 0
    leaving = form.body.outputs[0]
    classification = Classification(form, runtime, known)
    if same_value(leaving) is form.condition:
        return "it has neither a trip count nor a condition that ends it" if limit is None else limit
    if not classification.known_at_compile_time(leaving):
        return f"its condition {leaving.name!r} depends on what only a run knows"
    evaluator = StepEvaluator(graph, form, classification, known, [leaving])
    for steps in range(1, max_steps + 1):
        if not evaluator.advance()[0].item() or steps == limit:
            return steps
    return f"its condition stays true for more than max_steps={max_steps} steps"


def _scalar(graph: gs.Graph, tensor: gs.Tensor) -> int | None:
    """The value of an input of a Loop that is known at compile time, None where it is left out."""
    return int(Evaluator(graph, [tensor])()[0].item()) if tensor.name else None


def _values_at_compile_time(
    graph: gs.Graph, fed: Sequence[tuple[gs.Variable, gs.Tensor]], runtime: Collection[int]
) -> dict[int, Array]:
    """Values of the outer tensors that constants determine, by the id of the body input that they are fed to."""
    known = [(inner, outer) for inner, outer in fed if id(outer) not in runtime]
    values = Evaluator(graph, [outer for _, outer in known])()
    return {id(inner): value for (inner, _), value in zip(known, values, strict=True)}


def _needed_carried(
    form: LoopForm, classification: Classification, wanted: Sequence[gs.Tensor]
) -> list[Carried]:
    """The carried values that `wanted` depends on, through earlier steps too."""
    stepwise = {id(c.entering): c for c in classification.stepwise}
    needed: dict[int, Carried] = {}
    pending = list(wanted)
    while pending:
        keys = [id(tensor) for tensor in _inputs_behind(form, pending)]
        found = {key: stepwise[key] for key in keys if key in stepwise and key not in needed}
        needed.update(found)
        pending = [c.leaving for c in found.values()]
    return list(needed.values())


def _inputs_behind(form: LoopForm, tensors: Sequence[gs.Tensor]) -> list[gs.Variable]:
    """The body inputs that `tensors` depend on."""
    inputs = {id(tensor): tensor for tensor in form.body.inputs}
    found: dict[int, gs.Variable] = {}
    seen: set[int] = set()
    stack = list(tensors)
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if id(tensor) in inputs:
            found[id(tensor)] = inputs[id(tensor)]
        elif (node := producer(tensor)) is not None:
            stack.extend(reads(node))
    return list(found.values())


def _unknown_output(graph: gs.Graph, body: gs.Graph) -> str | None:
    given = {id(tensor) for scope in scopes(graph) for tensor in scope.inputs}
    for tensor in body.outputs:
        if isinstance(tensor, gs.Variable) and producer(tensor) is None and id(tensor) not in given:
            return str(tensor.name)
    return None
