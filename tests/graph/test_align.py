"""Alignment and differences of two graphs: what must be no difference is none, one edit is one difference."""

from __future__ import annotations

import onnx
from graph_edits import EDITS, copied, edited, renamed, resorted
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import distinct_model

from pi05c.graph.diff import Change, GraphDiff, diff_graphs
from pi05c.graph.io import model_from_proto

SEEDS = st.integers(0, 10**6)
FORMS = st.sampled_from([{}, {"steps": 10}, {"loop": True}, {"steps": 3, "loop": True}])


def made_once(graph: onnx.GraphProto) -> bool:
    """Whether no two edits used one name, bodies included."""
    outputs = [name for node in graph.node for name in node.output]
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return len(set(outputs)) == len(outputs) and all(map(made_once, bodies))


def compare(a: onnx.ModelProto, b: onnx.ModelProto, *, names: bool = False) -> GraphDiff:
    models = [model_from_proto(copied(proto)) for proto in (a, b)]
    return diff_graphs(models[0].graph, models[1].graph, names=names)


def facts(changes: tuple[Change, ...]) -> set[tuple[str, str, str]]:
    return {(change.thing, kind, change.name) for change in changes for kind in change.kinds}


@settings(max_examples=30, deadline=None)
@given(SEEDS, SEEDS, FORMS)
def test_names_and_order_are_no_difference(seed: int, other: int, form: dict[str, object]) -> None:
    proto = distinct_model(seed, **form)  # type: ignore[arg-type]
    assert compare(proto, renamed(proto, other)).changes == ()
    assert compare(proto, resorted(proto, other)).changes == ()
    assert compare(proto, renamed(resorted(proto, other), other)).changes == ()


@settings(max_examples=60, deadline=None)
@given(SEEDS, SEEDS, FORMS, st.sampled_from(sorted(EDITS)))
def test_one_edit_is_one_difference(seed: int, other: int, form: dict[str, object], edit: str) -> None:
    proto = distinct_model(seed, **form)  # type: ignore[arg-type]
    after = edited(proto, edit, other)
    found = compare(proto, resorted(after.proto, other))
    assert facts(found.changes) == after.expected


@settings(max_examples=30, deadline=None)
@given(SEEDS, SEEDS, FORMS, st.sampled_from(sorted(EDITS)))
def test_one_edit_under_other_names_is_one_difference(
    seed: int, other: int, form: dict[str, object], edit: str
) -> None:
    proto = distinct_model(seed, **form)  # type: ignore[arg-type]
    after = edited(proto, edit, other)
    found = compare(proto, renamed(after.proto, other))
    expected = sorted((thing, kind) for thing, kind, _ in after.expected)
    assert sorted((thing, kind) for thing, kind, _ in facts(found.changes)) == expected


@settings(max_examples=30, deadline=None)
@given(SEEDS, SEEDS, FORMS, st.lists(st.sampled_from(sorted(EDITS)), min_size=1, max_size=6))
def test_mirrored_it_is_the_diff_of_the_other_direction(
    seed: int, other: int, form: dict[str, object], edits: list[str]
) -> None:
    before = after = distinct_model(seed, **form)  # type: ignore[arg-type]
    for number, edit in enumerate(edits):
        made = edited(after, edit, other + number)
        if made_once(made.proto.graph):
            after = made.proto
    there, back = compare(before, after), compare(after, before)
    assert there.alignment.nodes == {x: y for y, x in back.alignment.nodes.items()}

    def key(change: Change) -> tuple[str, tuple[str, ...], str, str]:
        return (change.thing, change.kinds, change.before or "", change.after or "")

    assert sorted(map(key, there.changes)) == sorted(key(change.mirrored()) for change in back.changes)


@settings(max_examples=15, deadline=None)
@given(SEEDS, SEEDS)
def test_equal_steps_stay_in_order_when_each_is_changed(seed: int, other: int) -> None:
    """Another operator in each of ten equal steps, and other names: each step is still itself."""
    proto = distinct_model(seed, steps=10)
    after = copied(proto)
    for node in list(after.graph.node):
        if node.op_type == "MatMul" and node.name.startswith("step"):
            source = node.input[0]
            node.input[0] = f"{source} halved"
            at = list(after.graph.node).index(node)
            halved = onnx.helper.make_node("Softsign", [source], [f"{source} halved"], f"{node.name} halved")
            after.graph.node.insert(at, halved)
    found = compare(proto, renamed(resorted(after, other), other))
    assert sorted((change.thing, change.kinds) for change in found.changes) == [("node", ("added",))] * 20
