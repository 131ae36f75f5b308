"""What crosses the borders between parts, in graphs of several exporters."""

from __future__ import annotations

import onnx_graphsurgeon as gs
import pytest
from foreign_policy import Style, policy
from pass_graphs import editable

from pi05c.passes.patterns.borders import find_crossings, present_parts
from pi05c.passes.patterns.flow_loop import FlowLoop, find_flow_loop
from pi05c.passes.patterns.parts import Part

THREE: list[list[Part]] = [["vision"], ["prefix"], ["denoise"]]


def crossing(graph: gs.Graph, groups: list[list[Part]], *, recompute: bool = True) -> dict[str, list[int]]:
    """Name and shape of what crosses."""
    return {c.name: list(c.tensor.shape) for c in find_crossings(graph, groups, recompute=recompute)}


@pytest.mark.parametrize(
    "style",
    [
        Style(steps=2),
        Style(steps=2, linear="gemm", slashes=True, mask="where", repeat="broadcast"),
        Style(steps=2, loop=True, heads=4, kv_heads=2, repeat="tile"),
        Style(steps=2, loop=True, opset=23, operators=True),
    ],
    ids=["unrolled", "TorchScript", "loop, two KV heads", "operators"],
)
def test_keys_and_values_cross_once_and_before_they_are_repeated(style: Style) -> None:
    graph = editable(policy(style)).graph
    found = crossing(graph, THREE)
    cached = [1, style.kv_heads, style.prefix, 16]
    assert found == {
        "image_features": [1, 8, style.width],
        **{f"prefix_{kind}_{layer}": cached for layer in range(2) for kind in ("keys", "values")},
    }, "the mask and the positions are inputs of the model already"
    assert present_parts(graph) == ["vision", "prefix", "denoise"]


def test_what_follows_from_the_inputs_crosses_where_it_must_not_be_computed_again() -> None:
    graph = editable(policy(Style(steps=2, loop=True))).graph
    before = set(crossing(graph, [["vision", "prefix"], ["denoise"]]))
    after = set(crossing(graph, [["vision", "prefix"], ["denoise"]], recompute=False))
    assert before < after
    assert {"action_cos", "action_sin"} <= after - before


def test_a_joined_group_has_no_border_inside() -> None:
    graph = editable(policy(Style(steps=2))).graph
    assert set(crossing(graph, [["vision"], ["prefix", "denoise"]])) == {"image_features"}
    assert crossing(graph, [["vision", "prefix", "denoise"]]) == {}


def test_a_flow_loop_names_what_follows_from_its_time() -> None:
    loop = find_flow_loop(editable(policy(Style(steps=4, loop=True))).graph)
    assert isinstance(loop, FlowLoop)
    assert loop.loop.steps == 4
    assert (loop.start.item(), loop.dt, loop.scale) == (1.0, -0.25, -0.25)
    assert loop.rows


def test_an_unrolled_graph_has_no_flow_loop() -> None:
    assert find_flow_loop(editable(policy(Style(steps=2))).graph) == "no Loop in it accumulates the flow"
