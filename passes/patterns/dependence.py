"""What the values inside a loop's body depend on: on nothing that changes, on the step, or on more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

import onnx_graphsurgeon as gs

from pi05c.graph.domains import STANDARD_DOMAINS
from pi05c.graph.io import scopes
from pi05c.graph.sort import captured_by
from pi05c.passes.patterns.loop_form import Carried, LoopForm

NONDETERMINISTIC = frozenset(
    {"Bernoulli", "Dropout", "Multinomial"}
    | {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Operators that may give another result each time they run (ONNX operator specification)."""


class Dependence(Enum):
    """What a value inside a body depends on."""

    INVARIANT = "constants and tensors outside the body: the same in every step"
    STEP = "constants and the number of the step: known at compile time, another in each step"
    VARYING = "what only a run knows, and it changes from step to step"


def evaluable(node: gs.Node) -> bool:
    """Whether a node gives the same tensors whenever it gets the same inputs, by operators of ONNX alone."""
    inner = [other for body in node.subgraphs(recursive=True) for other in body.nodes]
    return all(
        other.op not in NONDETERMINISTIC
        and other.domain in STANDARD_DOMAINS
        and all(getattr(tensor, "type", "tensor_type") == "tensor_type" for tensor in other.outputs)
        for other in (node, *inner)
    )


def reads(node: gs.Node) -> list[gs.Tensor]:
    """The tensors that a node needs from outside itself: its inputs, and what its subgraphs capture."""
    bodies = list(node.subgraphs(recursive=True))
    if not bodies:
        return [tensor for tensor in node.inputs if tensor.name]
    own = {id(tensor) for body in bodies for inner in body.nodes for tensor in inner.outputs}
    own.update(id(tensor) for body in bodies for tensor in body.inputs)
    return [t for t in (*node.inputs, *captured_by(node)) if t.name and id(t) not in own]


def runtime_tensors(graph: gs.Graph) -> frozenset[int]:
    """The ids of tensors, in bodies too, whose value is not known before the model runs. Nodes must be sorted."""
    runtime = {id(tensor) for scope in scopes(graph) for tensor in scope.inputs}
    for scope in scopes(graph):
        for node in scope.nodes:
            if not evaluable(node) or any(id(tensor) in runtime for tensor in reads(node)):
                runtime.update(id(tensor) for tensor in node.outputs)
    return frozenset(runtime)


class Classification:
    """The `Dependence` of every value in a body, whose nodes must be sorted.

    A carried value depends on the step alone if its initial value is known at compile time and what each step
    makes of it depends on the step alone: assumed of all, until those for which it does not hold are gone.

    Args:
        form: the loop.
        runtime: `runtime_tensors` of the whole graph.
        known: the ids of body inputs whose value in the first step (carried) or in all (scanned) is known.
        computed: ids of values to take as varying even if they depend on the step alone.
    """

    def __init__(
        self, form: LoopForm, runtime: frozenset[int], known: Iterable[int], computed: Iterable[int] = ()
    ) -> None:
        self._form = form
        self._known = frozenset(known)
        self._computed = frozenset(computed)
        self._reads = [(node, [id(t) for t in reads(node)], evaluable(node)) for node in form.body.nodes]
        inside = {id(tensor) for node in form.body.nodes for tensor in node.outputs}
        self._outside = runtime - inside - {id(tensor) for tensor in form.body.inputs}
        stepwise = [c for c in form.carried if id(c.entering) in self._known - self._computed]
        while True:
            self._step, self._runtime, self._varying = self._flow(stepwise)
            kept = [c for c in stepwise if self.known_at_compile_time(c.leaving)]
            if len(kept) == len(stepwise):
                break
            stepwise = kept
        self.stepwise: tuple[Carried, ...] = tuple(stepwise)
        """The carried values that depend on the step alone."""

    def __getitem__(self, tensor: gs.Tensor) -> Dependence:
        key = id(tensor)
        if key in self._varying or (key in self._step and key in self._runtime):
            return Dependence.VARYING
        return Dependence.STEP if key in self._step else Dependence.INVARIANT

    def known_at_compile_time(self, tensor: gs.Tensor) -> bool:
        """Whether the value in every step can be computed from constants."""
        return id(tensor) not in self._varying and id(tensor) not in self._runtime

    def nodes(self, dependence: Dependence) -> list[gs.Node]:
        """The nodes of one kind, in order; all outputs of a node are of one kind."""
        return [
            node for node, *_ in self._reads if any(self[t] is dependence for t in node.outputs if t.name)
        ]

    def frontier(self) -> list[gs.Tensor]:
        """The values of kind STEP that something of kind VARYING reads, or that leave the body for it."""
        stepwise = {id(c.entering) for c in self.stepwise}
        wanted = [tensor for node in self.nodes(Dependence.VARYING) for tensor in reads(node)]
        wanted += [c.leaving for c in self._form.carried if id(c.entering) not in stepwise]
        wanted += [c.element for c in self._form.collected]
        unique = {id(tensor): tensor for tensor in wanted}
        return [tensor for tensor in unique.values() if self[tensor] is Dependence.STEP]

    def _flow(self, stepwise: Sequence[Carried]) -> tuple[set[int], set[int], set[int]]:
        """Ids of what depends on the step, on outer tensors that only a run knows, and on varying values."""
        inputs = {id(tensor) for tensor in self._form.body.inputs}
        carried = {id(c.entering) for c in self._form.carried}
        step = {id(c.entering) for c in stepwise} | (self._known - carried)
        if self._form.iteration is not None:
            step.add(id(self._form.iteration))
        step -= self._computed
        runtime = set(self._outside)
        varying = (inputs - step) | self._computed
        for node, read, deterministic in self._reads:
            outputs = [id(tensor) for tensor in node.outputs]
            for kind in (step, runtime, varying):
                if any(key in kind for key in read):
                    kind.update(outputs)
            if not deterministic or any(key in varying for key in outputs):
                varying.update(outputs)
        return step, runtime, varying
