"""The pipeline: its text, its order, its ranges, its checks and its record."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from pass_graphs import editable, graph_text, normal, ranges_of, text_of

from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.io import Model
from pi05c.graph.ranges import Ranges, Wanted
from pi05c.passes import BY_REQUEST, PRESETS, REGISTRY
from pi05c.passes.contract import Pass, PassContext, graph_pass
from pi05c.passes.pipeline import Step, StepResult, named, parse, run


def _names(text: str) -> list[str]:
    return [step.text for step in parse(text, PRESETS)]


# Text


def test_a_preset_is_its_passes() -> None:
    for name, members in PRESETS.items():
        assert _names(name) == list(members)
    assert _names("none") == []


def test_taking_one_out() -> None:
    assert "pin_fp32" not in _names("default,-pin_fp32")
    assert len(_names("default,-pin_fp32")) == len(PRESETS["default"]) - 1


def test_taking_out_what_is_there_twice() -> None:
    assert PRESETS["default"].count("canonicalize") == 2
    assert "canonicalize" not in _names("default,-canonicalize")


def test_options_go_to_the_one_that_is_there() -> None:
    text = "default,insert_attention_qdq{vision=true,min_keys=8}"
    steps = parse(text, PRESETS)
    assert [step.spec.name for step in steps] == list(PRESETS["default"])
    (step,) = (step for step in steps if step.options)
    assert step.options == {"vision": True, "min_keys": 8}
    assert step.text == "insert_attention_qdq{vision=true,min_keys=8}"


def test_a_name_that_is_not_there_is_appended() -> None:
    assert _names("exact,lower_precision{to=bfloat16}") == [*PRESETS["exact"], "lower_precision{to=bfloat16}"]


@pytest.mark.parametrize("keep", ["a", "a,b", "*.gate_proj,lm_head*"])
def test_a_list_as_an_option(keep: str) -> None:
    (step,) = parse(f"quantize_linears{{keep={keep}}}", PRESETS)
    assert list(step.options["keep"]) == keep.split(",")


@pytest.mark.parametrize(
    "text",
    ["none", "default", "fp16,-pin_fp32", "quantize_linears{keep=a,b},insert_attention_qdq{vision=true}"],
)
def test_text_of_the_steps_means_the_same(text: str) -> None:
    steps = parse(text, PRESETS)
    assert parse(",".join(step.text for step in steps) or "none", PRESETS) == steps


def test_space_around_commas() -> None:
    assert _names(" canonicalize , dedupe ") == ["canonicalize", "dedupe"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("defualt", "defualt"),
        ("canonicalise", "canonicalise"),
        ("default,-no_such", "no_such"),
        ("-pin_fp32", "pin_fp32"),
        ("pin_fp32,-pin_fp32,-pin_fp32", "pin_fp32"),
        ("", "malformed"),
        ("canonicalize,", "malformed"),
        ("canonicalize,,dedupe", "malformed"),
        ("canonicalize{", "malformed"),
        ("canonicalize}", "malformed"),
        ("lower_precision{float16}", "malformed"),
        ("lower_precision{to=float16}x", "malformed"),
        ("lower_precision{too=float16}", "too"),
        ("lower_precision{to=int8}", "int8"),
        ("lower_precision{headroom=much}", "much"),
        ("insert_attention_qdq{vision=perhaps}", "perhaps"),
        ("canonicalize{x=1}", "none"),
        ("pin_fp32,lower_precision", "lower_precision"),
        ("quantize_linears,pin_fp32", "pin_fp32"),
        ("dedupe,canonicalize", "canonicalize"),
    ],
)
def test_text_that_is_wrong_is_named(text: str, named: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(text, PRESETS)
    assert named in str(error.value)


def test_a_second_run_of_an_earlier_pass_is_no_wrong_order() -> None:
    assert _names("canonicalize,dedupe,canonicalize") == ["canonicalize", "dedupe", "canonicalize"]


# What a pass declares


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)
def test_contract(spec: Pass) -> None:
    module = inspect.getmodule(spec.function)
    assert module is not None
    assert module.__name__.rsplit(".", 1)[1] == spec.name, "its name is its file's name"
    assert spec.summary.endswith((".", ":")), "the first line of the docstring is its help"
    assert set(spec.after) <= set(REGISTRY)
    for option in spec.options.values():
        assert option.default is not inspect.Parameter.empty
        assert option.name in (inspect.getdoc(spec.function) or ""), f"option {option.name} is explained"


def test_the_list_holds_every_pass() -> None:
    assert set(BY_REQUEST).union(*(named(",".join(items)) for items in PRESETS.values() if items)) == set(
        REGISTRY
    )


def test_presets_obey_the_order() -> None:
    for name in PRESETS:
        parse(name, PRESETS)


# Running


LINEARS = """
    g (float[4,32] x) => (float[4,32] y) {
      h = MatMul(x, w1)
      a = Relu(h)
      y = MatMul(a, w2)
    }"""


def _linears(opset: int = 21) -> Model:
    weights = {"w1": normal(1, 32, 32), "w2": normal(2, 32, 32)}
    return editable(graph_text(LINEARS, weights, opset=opset))


KNOWN = ranges_of({"x": (-3, 3), "h": (-9, 9), "a": (0, 9), "y": (-20, 20)})


def test_ranges_are_measured_once_for_all_that_ask() -> None:
    asked: list[list[str]] = []
    seen: list[str] = []

    def calibrate(model: Model, wanted: Wanted) -> Ranges:
        asked.append(list(wanted.tensors))
        seen.append(text_of(model))
        return KNOWN

    model = _linears()
    run(model, parse("canonicalize,lower_precision", PRESETS))
    before = text_of(_linears())
    model = _linears()
    steps = parse("canonicalize,lower_precision,pin_fp32,quantize_linears,insert_attention_qdq", PRESETS)
    run(model, steps, calibrate=calibrate)
    assert seen == [before], "on the float32 graph, before the first pass that asks"
    (names,) = asked
    assert {"x", "h"} <= set(names)
    assert len(set(names)) == len(names)


def test_nothing_is_measured_where_nobody_asks() -> None:
    def calibrate(model: Model, wanted: Wanted) -> Ranges:
        raise AssertionError

    run(_linears(), parse("exact,pin_fp32", PRESETS), calibrate=calibrate)


def test_without_ranges_fp8_is_refused_and_float16_is_not() -> None:
    model = _linears()
    before = text_of(model)
    with pytest.raises(Pi05cError, match="--calibration"):
        run(model, parse("quantize_linears", PRESETS))
    assert text_of(model) == before
    (result,) = run(model, parse("lower_precision", PRESETS))
    assert result.changes
    assert any("no ranges" in note for note in result.notes)


def test_without_anything_to_quantize_no_ranges_are_needed() -> None:
    model = editable(graph_text("g (float[4] x) => (float[4] y) { y = Relu(x) }"))
    (result,) = run(model, parse("quantize_linears", PRESETS))
    assert result.changes == ()


def test_opset_and_formats_follow_from_options() -> None:
    texts = ("quantize_linears", "quantize_linears{llm=nvfp4}", "quantize_linears{nvfp4=*mlp*}")
    plain, llm, some = (parse(text, PRESETS)[0] for text in texts)
    assert plain.formats == ("float8e4m3fn",)
    assert llm.formats == some.formats == ("float8e4m3fn", "float4e2m1")
    assert [step.spec.opset_for(**step.options) for step in (plain, llm, some)] == [19, 23, 23]


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_opset_is_raised_where_a_pass_needs_it(opset: int) -> None:
    model = _linears(opset)
    run(model, parse("canonicalize", PRESETS))
    assert model.graph.opset == opset
    run(model, parse("quantize_linears", PRESETS), calibrate=lambda _, names: KNOWN)
    assert model.graph.opset == REGISTRY["quantize_linears"].opset_for() == 19


def test_record_of_a_step() -> None:
    results = run(
        _linears(), parse("lower_precision,quantize_linears", PRESETS), calibrate=lambda _, names: KNOWN
    )
    lower, quantize = results
    assert lower.changes == ("h.MatMul", "a.Relu", "y.MatMul")
    assert quantize.changes == ("h.MatMul", "y.MatMul")
    assert lower.nodes_before == 3
    assert quantize.nodes_before == lower.nodes_after
    assert lower.seconds >= 0


def test_callbacks_see_each_step() -> None:
    order: list[str] = []

    def after(model: Model, result: StepResult) -> None:
        order.append(f"after {result.step.text}: {len(model.graph.nodes)}")

    run(
        _linears(),
        parse("canonicalize,dedupe", PRESETS),
        before_step=lambda step: order.append(f"before {step.text}"),
        after_step=after,
    )
    assert order == ["before canonicalize", "after canonicalize: 3", "before dedupe", "after dedupe: 3"]


@pytest.fixture
def collecting_pass() -> Iterator[tuple[Step, list[bool]]]:
    """A pass that breaks down, and whether garbage was collected in it."""
    found: list[bool] = []

    @graph_pass(exact=True)
    def breaks_down(graph: gs.Graph, ctx: PassContext) -> None:
        """Raise."""
        found.append(gc.isenabled())
        raise Pi05cError("it breaks down")

    yield Step(REGISTRY["breaks_down"]), found
    del REGISTRY["breaks_down"]


def test_garbage_is_collected_between_passes_and_not_in_them(
    collecting_pass: tuple[Step, list[bool]],
) -> None:
    """In a pass it would walk the whole graph again and again; between them a user's code may run for long."""
    step, found = collecting_pass
    assert gc.isenabled()
    with pytest.raises(Pi05cError, match="it breaks down"):
        run(
            _linears(),
            [*parse("canonicalize", PRESETS), step],
            after_step=lambda model, result: found.append(gc.isenabled()),
        )
    assert found == [True, False]
    assert gc.isenabled()
    assert gc.get_freeze_count() < 1000  # Python 3.12 itself sets 375 objects aside when it starts


@pytest.fixture
def broken_pass() -> Iterator[Step]:
    """A pass that declares a wrong type."""

    @graph_pass(exact=True)
    def breaks_the_graph(graph: gs.Graph, ctx: PassContext) -> None:
        """Call a float32 output float16."""
        graph.outputs[0].dtype = np.float16
        ctx.changed(graph.outputs[0])

    yield Step(REGISTRY["breaks_the_graph"])
    del REGISTRY["breaks_the_graph"]


def test_a_pass_that_breaks_the_graph_is_named(broken_pass: Step) -> None:
    with pytest.raises(Pi05cError, match="pass breaks_the_graph left a graph that is not valid"):
        run(_linears(), [broken_pass])


def test_what_was_wrong_before_is_blamed_on_no_pass() -> None:
    """Two nodes of one name are legal, and a pass that looks elsewhere need not repair them."""
    proto = graph_text("g (float[4] x) => (float[4] y) { a = Neg(x)\n y = Exp(a) }")
    proto.graph.node[0].name = proto.graph.node[1].name = "n"
    model = editable(proto)
    run(model, parse("lower_precision", PRESETS))
    assert [node.name for node in model.graph.nodes].count("n") == 2


def test_two_passes_of_one_name() -> None:
    def canonicalize(graph: gs.Graph, ctx: PassContext) -> None:
        """Another one."""

    with pytest.raises(Pi05cError, match="canonicalize"):
        graph_pass(exact=True)(canonicalize)
