"""The properties of `generated_properties` on graphs that Hypothesis makes."""

from __future__ import annotations

import generated_properties as properties
import pytest
from hypothesis import given
from random_graphs import Generated, examples, generated

ATTENTION = ("attention", "norm", "mlp", "flow")
"""What a policy is made of, where most passes have something to do."""


@examples(150)
@given(generated())
def test_exact_passes_keep_outputs(graph: Generated) -> None:
    properties.exact_passes_keep_outputs(graph)


@examples(60)
@given(generated(blocks=ATTENTION, most=3))
def test_exact_passes_keep_outputs_of_policies(graph: Generated) -> None:
    properties.exact_passes_keep_outputs(graph)


@pytest.mark.parametrize("pipeline", ["exact", "fp16"])
@examples(70)
@given(generated())
def test_twice_is_once(pipeline: str, graph: Generated) -> None:
    properties.twice_is_once(pipeline, graph)


@examples(500)
@given(generated())
def test_finders_claim_no_node_twice(graph: Generated) -> None:
    properties.finders_claim_once(graph)


@pytest.mark.parametrize("pipeline", ["fp16", "default", "nvfp4"])
@examples(60)
@given(generated())
def test_pipelines_leave_a_valid_graph(pipeline: str, graph: Generated) -> None:
    properties.is_valid_after(pipeline, graph)
