"""What the exact passes leave of a denoising step: eight MatMuls a layer, and nothing that another step computes too."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import onnx_graphsurgeon as gs
import pytest
from foreign_policy import Style, policy
from pass_graphs import editable, run_passes

from pi05c.graph.io import Model, load
from pi05c.passes.patterns.dependence import reads
from pi05c.passes.patterns.flow import find_flow
from pi05c.passes.patterns.walk import MOVING

MATMULS_A_LAYER = 8
"""qkv; queries by prefix and by suffix keys; probabilities by their values; out; gate and up; down."""

MATMULS_AT_THE_ENDS = 2
"""action_in_proj and action_out_proj."""


@dataclass(frozen=True)
class Denoising:
    """A compiled graph, and how many layers its expert has."""

    graph: gs.Graph
    layers: int

    @cached_property
    def step_of(self) -> dict[int, int]:
        """The step of each tensor that depends on the flow's state, by id: the last whose state it depends on."""
        flow = find_flow(self.graph)
        states = {id(step.state): index for index, step in enumerate(flow)}
        found = {id(flow[0].state): 0}
        for node in self.graph.nodes:
            steps = [found[id(tensor)] for tensor in reads(node) if id(tensor) in found]
            for tensor in node.outputs if steps else ():
                found[id(tensor)] = states.get(id(tensor), max(steps))
        return found

    @cached_property
    def steps(self) -> list[list[gs.Node]]:
        """The nodes of each step, which are those that read what depends on its state and on no later one."""
        found: dict[int, list[gs.Node]] = defaultdict(list)
        for node in self.graph.nodes:
            steps = [self.step_of[id(tensor)] for tensor in reads(node) if id(tensor) in self.step_of]
            if steps:
                found[max(steps)].append(node)
        return list(found.values())


def compiled(model: Model, layers: int) -> Denoising:
    run_passes(model, "exact")
    return Denoising(model.graph, layers)


def _foreign(style: Style) -> Denoising:
    return compiled(editable(policy(style)), style.layers)


def _tiny(request: pytest.FixtureRequest) -> Denoising:
    return compiled(load(request.getfixturevalue("tiny_model")), 3)


def _deep(request: pytest.FixtureRequest) -> Denoising:
    return compiled(load(request.getfixturevalue("deep_model")), 7)


GRAPHS: dict[str, Callable[[pytest.FixtureRequest], Denoising]] = {
    "tiny": _tiny,
    "deep": _deep,
    "foreign": lambda _: _foreign(Style(steps=3, layers=3, heads=4, kv_heads=2, views="inputs")),
    "foreign, Gemm and Loop": lambda _: _foreign(
        Style(
            steps=3, linear="gemm", opset=17, loop=True, batch=2, mask="where", repeat="tile", views="index"
        )
    ),
    "foreign, keys not repeated": lambda _: _foreign(
        Style(steps=2, linear="transposed", repeat="broadcast", scale="query", rope="parts")
    ),
}


@pytest.fixture(scope="module", params=GRAPHS)
def denoising(request: pytest.FixtureRequest) -> Denoising:
    return GRAPHS[request.param](request)


def test_eight_matmuls_a_layer(denoising: Denoising) -> None:
    expected = denoising.layers * MATMULS_A_LAYER + MATMULS_AT_THE_ENDS
    counts = [Counter(node.op for node in step) for step in denoising.steps]
    assert [count["MatMul"] + count["Gemm"] for count in counts] == [expected] * len(
        find_flow(denoising.graph)
    )


def test_steps_are_alike(denoising: Denoising) -> None:
    first, *others = (Counter(node.op for node in step) for step in denoising.steps)
    assert others == [first] * len(others)
    assert len(others) > 0


def test_no_expand(denoising: Denoising) -> None:
    expanded = [node.name for step in denoising.steps for node in step if node.op in ("Expand", "Tile")]
    assert expanded == []


def test_nothing_of_the_prefix_is_moved_in_a_step(denoising: Denoising) -> None:
    """Nor beside: keys and values of the prefix go into MatMuls as they stand."""
    moved = [
        f"{node.name}: {tensor.name}"
        for step in denoising.steps
        for node in step
        if node.op in {*MOVING, "Concat", "Split", "Slice", "Gather"}
        for tensor in node.inputs
        if isinstance(tensor, gs.Variable) and id(tensor) not in denoising.step_of
    ]
    assert moved == []


def test_what_steps_read_from_outside_all_of_them_read(denoising: Denoising) -> None:
    """So that no value of a single step is computed without its x: such values are constants."""
    readers: dict[str, set[int]] = defaultdict(set)
    for index, step in enumerate(denoising.steps):
        for node in step:
            for tensor in reads(node):
                if isinstance(tensor, gs.Variable) and id(tensor) not in denoising.step_of:
                    readers[tensor.name].add(index)
    assert readers
    every = set(range(len(denoising.steps)))
    assert {name: steps for name, steps in readers.items() if steps != every} == {}


def test_more_steps_add_nothing_outside_them() -> None:
    outside = []
    for steps in (2, 4):
        found = _foreign(Style(steps=steps))
        inside = {id(node) for step in found.steps for node in step}
        outside.append(Counter(node.op for node in found.graph.nodes if id(node) not in inside))
    assert outside[0] == outside[1]
