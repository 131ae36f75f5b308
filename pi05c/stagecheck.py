"""`--verify-each`: what each pass left, against the rules that a graph must obey and against the graph before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_graphsurgeon as gs

from pi05c.backend.onnxruntime import load_runner
from pi05c.backend.targets import Target, unsupported
from pi05c.comparison import Comparison, compare
from pi05c.graph.check import problems, unseen_problems
from pi05c.graph.errors import VerificationError
from pi05c.graph.io import Model
from pi05c.graph.runner import Array
from pi05c.passes.pipeline import StepResult
from pi05c.precision import LIMITS, dtypes_of, narrowest, precision_of
from pi05c.samples import Samples

VerifyEach = Literal["structure", "numbers"]

Outputs = list[dict[str, Array]]
"""Outputs by name, one mapping a sample."""


@dataclass(frozen=True)
class StageError:
    """How far the outputs of a graph moved by one pass.

    Attributes:
        name: of the pass.
        comparison: with the graph before the pass.
        limit: the relative L2 error that an exact pass may make of it; None for a pass that is not exact.
    """

    name: str
    comparison: Comparison
    limit: float | None


class StageChecker:
    """Checks a graph before the first pass, then after each.

    Attributes:
        errors: of each pass so far; empty where only the structure is checked.
    """

    def __init__(self, targets: Sequence[Target], samples: Samples | None) -> None:
        """Make a checker.

        Args:
            targets: GPUs whose number formats the graph may use; none for all formats.
            samples: inputs to run each graph on; None to check the structure alone.
        """
        self._targets = targets
        self._samples = samples
        self._known: set[str] = set()
        self._outputs: Outputs = []
        self._limit = LIMITS["float32"]
        self.errors: list[StageError] = []

    def start(self, model: Model, path: Path | None) -> None:
        """Take the graph before the first pass as it is: what is wrong with it already is blamed on no pass.

        Args:
            path: where it is stored; needed where there are samples.
        """
        self._known = set(graph_problems(model, self._targets))
        self._measure(model.graph, path)

    def check(self, model: Model, path: Path | None, result: StepResult) -> None:
        """Check what a pass left.

        Raises:
            VerificationError: it is not valid, or an exact pass changed the outputs by more than rounding.
        """
        found = graph_problems(model, self._targets)
        fresh = [problem for problem in found if problem not in self._known]
        spec = result.step.spec
        if fresh:
            raise VerificationError(f"pass {spec.name} left a graph that is not valid: {fresh[0]}")
        self._known = set(found)
        if self._samples is None:
            return
        before, limit = self._outputs, self._limit
        self._measure(model.graph, path)
        comparison = compare(before, self._outputs)
        self.errors.append(StageError(spec.name, comparison, limit if spec.exact else None))
        if spec.exact and not comparison.passes(limit):
            worst = comparison.worst
            raise VerificationError(
                f"pass {spec.name} is said to be exact, but moved {worst.output} of sample {worst.sample} by a relative "
                f"L2 error of {worst.relative_l2:.4g}, more than {limit:g}: leave it out with -{spec.name}, or let "
                "pi05c bisect find the rewrite"
            )

    def _measure(self, graph: gs.Graph, path: Path | None) -> None:
        if self._samples is not None:
            assert path is not None
            self._outputs = outputs_of(path, self._samples)
            self._limit = LIMITS[narrowest(precision_of(graph))]


def graph_problems(model: Model, targets: Sequence[Target] = ()) -> list[str]:
    """What is wrong with a graph, whatever it computes; each a sentence. Number formats that a target lacks count."""
    formats = dtypes_of(model.graph)
    lacking = [reason for target in targets if (reason := unsupported(target, formats))]
    return [*problems(model), *unseen_problems(model), *lacking]


def outputs_of(path: Path, samples: Sequence[Mapping[str, Array]]) -> Outputs:
    """What onnxruntime makes of each sample, in the types of the graph; inputs that it does not have are left out."""
    runner = load_runner(path)
    names = [spec.name for spec in runner.inputs]
    return [runner.run({name: sample[name] for name in names if name in sample}) for sample in samples]


__all__ = ["Outputs", "StageChecker", "StageError", "VerifyEach", "graph_problems", "outputs_of"]
