"""What must hold for every valid graph, whoever made it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from pass_graphs import editable, outputs_of, relative_error, text_of
from random_graphs import Generated

from pi05c.calibration import measure_ranges
from pi05c.graph.check import problems
from pi05c.graph.io import Model
from pi05c.graph.ranges import Ranges
from pi05c.passes import PRESETS
from pi05c.passes.patterns.attention import find_attention
from pi05c.passes.patterns.factor import find_factors
from pi05c.passes.patterns.flow import find_flow
from pi05c.passes.patterns.linear import find_linears
from pi05c.passes.patterns.norm import find_norms
from pi05c.passes.patterns.rope import find_rope
from pi05c.passes.patterns.softmax import find_softmaxes
from pi05c.passes.patterns.views import find_twins
from pi05c.passes.pipeline import StepResult, parse, run, wanted
from pi05c.samples import Samples

FINDERS: dict[str, Callable[[gs.Graph], Iterable[Any]]] = {
    "linears": find_linears,
    "norms": find_norms,
    "softmaxes": find_softmaxes,
    "rope": find_rope,
    "attention": lambda graph: find_attention(graph)[0],
    "flow": find_flow,
    "factors": lambda graph: [factor.node for factor in find_factors(graph)[0]],
    "twins": lambda graph: find_twins(graph)[0],
}
"""Finders by what they find; what two of them find may overlap, as an attention holds a softmax."""


def exact_passes_keep_outputs(graph: Generated) -> None:
    """After each pass of `exact`, up to what another order of the arithmetic makes of the types of the graph."""
    expected = outputs_of(graph.proto, graph.inputs)
    model = editable(graph.proto)

    def check(current: Model, result: StepResult) -> None:
        if result.rewrites:
            error = relative_error(outputs_of(current, graph.inputs), expected)
            assert error <= graph.tolerance, f"{result.step.spec.name} moved the outputs by {error}"

    run(model, parse("exact", PRESETS), after_step=check)


def is_valid_after(pipeline: str, graph: Generated) -> None:
    """The graph is valid and runs, finite where it was; none is refused."""
    model = editable(graph.proto)
    run_measured(model, pipeline, Samples.of([graph.inputs]))
    assert problems(model) == []
    outputs = outputs_of(model, graph.inputs)
    for name, values in outputs_of(graph.proto, graph.inputs).items():
        if np.isfinite(values.astype(np.float64)).all():
            assert np.isfinite(outputs[name].astype(np.float64)).all(), f"{name} is not finite"


def run_measured(model: Model, pipeline: str, samples: Samples) -> None:
    """Run a pipeline, with the ranges that its passes ask for where there are samples."""
    steps = parse(pipeline, PRESETS)
    ranges: Ranges | None = None
    for index, step in enumerate(steps):
        if step.spec.ranges is not None and ranges is None and samples:
            only = samples.only(tensor.name for tensor in model.graph.inputs)
            needed = wanted(model, steps[index:])
            ranges = measure_ranges(model, needed.tensors, only, rows=needed.rows, threads=1)
        run(model, [step], calibrate=lambda *_, known=ranges: known)


def twice_is_once(pipeline: str, graph: Generated) -> None:
    """Each pass of a pipeline that needs no ranges, run again, changes nothing."""
    model = editable(graph.proto)
    for step in parse(pipeline, PRESETS):
        run(model, [step])
        before = text_of(model)
        again = run(model, [step])[0]
        assert again.changes == (), f"{step.spec.name} rewrites {again.changes} again"
        assert text_of(model) == before, step.spec.name


def finders_claim_once(graph: Generated) -> None:
    """No finder gives a node to two of what it finds."""
    model = editable(graph.proto)
    for pipeline in ("none", "canonicalize"):
        run(model, parse(pipeline, PRESETS))
        for name, find in FINDERS.items():
            claimed: dict[int, int] = {}
            for index, found in enumerate(find(model.graph)):
                for node in nodes_of(found):
                    other = claimed.setdefault(id(node), index)
                    assert other == index, f"two {name} hold {node.op} {node.name!r}"


def nodes_of(found: Any) -> Iterator[gs.Node]:
    """The nodes that a finder's dataclass names, in its fields too."""
    if isinstance(found, gs.Node):
        yield found
    elif isinstance(found, (list, tuple)):
        for item in found:
            yield from nodes_of(item)
    elif dataclasses.is_dataclass(found):
        for part in dataclasses.fields(found):
            yield from nodes_of(getattr(found, part.name))


__all__ = [
    "exact_passes_keep_outputs",
    "finders_claim_once",
    "is_valid_after",
    "run_measured",
    "twice_is_once",
]
