"""batch_views: which operators may stand in a tower, where copies may begin and end, and what is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from foreign_policy import VIEWS, Style, policy
from golden_cases_batch_views import PATCHES, SHAPES, WIDTH, tower, towers, weights
from pass_graphs import (
    editable,
    graph_text,
    normal,
    outputs_of,
    relative_error,
    run_pass,
    run_passes,
    seeded_inputs,
    text_of,
)

from pi05c.graph.io import Model, scopes
from pi05c.passes.pipeline import StepResult

EXACT = 1e-6


def operators(model: Model | onnx.ModelProto) -> Counter[str]:
    """How many nodes of each operator there are, bodies included."""
    graph = model.graph if isinstance(model, Model) else editable(model).graph
    return Counter(node.op for scope in scopes(graph) for node in scope.nodes)


def batched(proto: onnx.ModelProto) -> tuple[Model, StepResult]:
    """The model after the pass, with the numbers that it had before and nothing left for a second run."""
    model = editable(proto)
    result = run_pass(model, "batch_views")
    once = text_of(model)
    assert run_pass(model, "batch_views").changes == ()
    assert text_of(model) == once
    for seed in range(2):
        inputs = seeded_inputs(proto, seed)
        assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) <= EXACT
    return model, result


def refused(proto: onnx.ModelProto) -> list[str]:
    """The reasons, of a pass that leaves the model as it is."""
    model = editable(proto)
    before = text_of(model)
    result = run_pass(model, "batch_views")
    assert (text_of(model), result.changes) == (before, ())
    return [skip.reason for skip in result.skips]


# Operators


def with_operator(lines: str, batch: int) -> onnx.ModelProto:
    """Two copies of a Conv, `lines` from `x` [batch, 4, 6] to `y`, and two MatMuls on pairs of `y`'s elements.

    `@` in the lines stands for the number of the copy.
    """
    body = "".join(
        f"""
          conv@ = Conv(image@, kernel)
          x@ = Reshape(conv@, rows)
          {lines}
          pairs@ = Reshape(y@, pairs)
          hidden@ = MatMul(pairs@, w1)
          end@ = MatMul(hidden@, w2)""".replace("@", str(copy))
        for copy in range(2)
    )
    integers = {
        "rows": [batch, 4, 6],
        "pairs": [-1, 2],
        "zero": [0],
        "one": [1],
        "two": [2],
        "last": [-1],
        "sizes": [2, 4],
        "heads": [batch, 4, 3, 2],
        "wide": [batch, 5, 4, 6],
        "once": [1, 1, 1],
        "one_sample": [1, batch * 4, 6],
        "one_row": [batch * 4 * 6, 1],
    }
    floats = {
        "kernel": normal(1, 6, 3, 3, 2),
        "w1": normal(2, 2, 4),
        "w2": normal(3, 4, 4),
        "gain": normal(4, 6),
        "square": normal(5, 6, 6),
        "stack_of_one": normal(6, 1, 6, 6),
        "for_each": normal(7, batch, 6, 6),
        "one_each": normal(8, batch * 4 * 6, 1),
        "floor": np.float32(-0.5),
        "ceiling": np.float32(0.5),
    }
    return graph_text(
        f"""
        g (float[{batch},3,4,3] image0, float[{batch},3,4,3] image1, float[1,4,6] same, float[{batch},4,6] each)
          => (float[rows,4] y) {{
          {body}
          y = Concat<axis = 0>(end0, end1)
        }}""",
        {**{name: np.array(values) for name, values in integers.items()}, **floats},
    )


KEEPS = {
    "elementwise": "y@ = Tanh(x@)",
    "Clip": "y@ = Clip(x@, floor, ceiling)",
    "constant vector": "y@ = Mul(x@, gain)",
    "same for all": "y@ = Add(x@, same)",
    "by itself": "y@ = Mul(x@, x@)",
    "linear": "y@ = MatMul(x@, square)",
    "constant left factor": "t@ = Transpose<perm = [0, 2, 1]>(x@)\n y@ = MatMul(square, t@)",
    "constant stack of one": "y@ = MatMul(x@, stack_of_one)",
    "attention": "t@ = Transpose<perm = [0, 2, 1]>(x@)\n l@ = MatMul(x@, t@)\n p@ = Softmax(l@)\n y@ = MatMul(p@, x@)",
    "LayerNormalization": "y@ = LayerNormalization<axis = -1>(x@, gain)",
    "mean": "y@ = ReduceMean(x@, last)",
    "mean without its axis": "y@ = ReduceMean<keepdims = 0>(x@, last)",
    "Slice": "y@ = Slice(x@, zero, two, last)",
    "Split and Concat": "a@, b@ = Split<axis = -1>(x@, sizes)\n y@ = Concat<axis = 2>(b@, a@)",
    "Gather": "g@ = Gather<axis = 2>(x@, two)\n y@ = Mul(g@, x@)",
    "heads": "h@ = Reshape(x@, heads)\n y@ = Transpose<perm = [0, 2, 1, 3]>(h@)",
    "Expand": "u@ = Unsqueeze(x@, one)\n y@ = Expand(u@, wide)",
    "an axis before the batch": "y@ = Unsqueeze(x@, zero)",
    "one thing twice": "a@ = Tanh(x@)\n b@ = Tanh(x@)\n c@ = Neg(b@)\n y@ = Mul(a@, c@)",
}

MIXES = {
    "Transpose": "y@ = Transpose<perm = [1, 0, 2]>(x@)",
    "Softmax": "y@ = Softmax<axis = 0>(x@)",
    "mean": "y@ = ReduceMean(x@, zero)",
    "LayerNormalization": "y@ = LayerNormalization<axis = 0>(x@, each)",
    "Slice": "y@ = Slice(x@, zero, one, zero)",
    "Gather": "y@ = Gather(x@, zero)",
    "Concat": "y@ = Concat<axis = 0>(x@, x@)",
    "Split": "y@ = Split<axis = 0, num_outputs = 1>(x@)",
    "entry for each": "y@ = Add(x@, each)",
    "matrix for each": "y@ = MatMul(x@, for_each)",
    "broadcast along the batch": "s@ = Reshape(x@, one_sample)\n m@ = ReduceMean(s@, one)\n y@ = Mul(x@, m@)",
    "broadcast of a lower rank": "s@ = Reshape(x@, one_row)\n y@ = Add(s@, one_each)",
    "unknown": "y@ = Tile(x@, once)",
}
"""The last operator of each mixes."""


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", KEEPS)
def test_operators_that_keep_the_batch(name: str, batch: int) -> None:
    proto = with_operator(KEEPS[name], batch)
    model, result = batched(proto)
    assert len(result.changes) == 1
    before, after = operators(proto), operators(model)
    assert (after["Conv"], after["MatMul"]) == (1, before["MatMul"] // 2)


@pytest.mark.parametrize("name", MIXES)
def test_operators_that_mix_the_batch(name: str) -> None:
    reasons = refused(with_operator(MIXES[name], 2))
    assert len(reasons) == 1
    last = MIXES[name].rsplit("y@ = ", 1)[1]
    assert reasons[0].startswith(f"{last[: last.index('(')].split('<')[0]} 'y0.")


def test_an_older_opset_is_raised_to_the_one_of_what_is_put_in() -> None:
    """Split takes its sizes as an input from opset 13 on."""
    proto = with_operator("y@ = Tanh(x@)", 1)
    last = proto.graph.node[-1]
    last.op_type = "Sub"
    del last.attribute[:]
    proto.opset_import[0].version = 11
    model, result = batched(proto)
    assert len(result.changes) == 1
    assert operators(model)["Split"] == 1
    assert model.graph.opset == 13


def test_a_mean_of_all_mixes_the_batch() -> None:
    (reason,) = refused(with_operator("m@ = ReduceMean(x@)\n y@ = Mul(x@, m@)", 2))
    assert reason.startswith("ReduceMean 'm0.")


# Where the copies begin


IMAGES = "float[1,3,8,8] image0, float[1,3,8,8] image1"
PREFIX = f"float[1,{2 * PATCHES},{WIDTH}] prefix"
JOINED = "prefix = Concat<axis = 1>(seen0, seen1)"


def test_preprocessing_of_each_camera_is_batched_too() -> None:
    """Bytes of [height, width, channels] become numbers from -1 to 1 of [channels, height, width]."""
    proto = graph_text(
        f"""
        policy (uint8[2,8,8,3] images) => ({PREFIX})
          <{
            SHAPES
        }, int64 i0 = {{0}}, int64 i1 = {{1}}, int64[1] zero = {{0}}, float scale = {{0.0078431}}, float one = {{1}}> {{
          {
            "".join(
                f'''
          picked{v} = Gather(images, i{v})
          sample{v} = Unsqueeze(picked{v}, zero)
          turned_{v} = Transpose<perm = [0, 3, 1, 2]>(sample{v})
          wide{v} = Cast<to = 1>(turned_{v})
          scaled{v} = Mul(wide{v}, scale)
          image{v} = Sub(scaled{v}, one)'''
                for v in range(2)
            )
        }
          {towers(("image0", "image1"))}
          {JOINED}
        }}""",
        weights(),
    )
    model, _ = batched(proto)
    after = operators(model)
    assert (after["Cast"], after["Sub"], after["Gather"], after["Concat"]) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("starts", "size", "stacked"),
    [((0, 1), 2, True), ((1, 0), 2, False), ((0, 1), 3, False), ((1, 2), 3, False)],
)
def test_slices_of_one_tensor(starts: tuple[int, int], size: int, stacked: bool) -> None:
    """Only slices that cover it in their order are the tensor itself."""
    cuts = "".join(f"\n          image{v} = Slice(images, from{v}, to{v}, zero)" for v in range(2))
    proto = graph_text(
        f"""
        policy (float[{size},3,8,8] images) => ({PREFIX}) <{SHAPES}, int64[1] zero = {{0}},
            int64[1] from0 = {{{starts[0]}}}, int64[1] to0 = {{{starts[0] + 1}}},
            int64[1] from1 = {{{starts[1]}}}, int64[1] to1 = {{{starts[1] + 1}}}> {{{cuts}
          {towers(("image0", "image1"))}
          {JOINED}
        }}""",
        weights(),
    )
    model, _ = batched(proto)
    assert operators(model)["Slice"] == (0 if stacked else 2)
    assert operators(model)["Concat"] == (0 if stacked else 1)


def test_outputs_of_one_split() -> None:
    proto = graph_text(
        f"""
        policy (float[1,6,8,8] images) => ({PREFIX}) <{SHAPES}> {{
          image0, image1 = Split<axis = 1, num_outputs = 2>(images)
          {towers(("image0", "image1"))}
          {JOINED}
        }}""",
        weights(),
    )
    model, _ = batched(proto)
    assert operators(model)["Split"] == 0


def test_a_camera_that_is_absent() -> None:
    """Its image is a constant, as LeRobot fills it in."""
    proto = graph_text(
        f"policy (float[1,3,8,8] image0) => ({PREFIX}) <{SHAPES}> {{ {towers(('image0', 'absent'))}\n {JOINED} }}",
        {**weights(), "absent": np.full((1, 3, 8, 8), -1, np.float32)},
    )
    model, _ = batched(proto)
    assert operators(model)["Conv"] == 1


def test_equal_weights_that_are_stored_for_each_view() -> None:
    second = {f"{name}_1": values for name, values in weights().items()}
    body = tower(0, "image0")
    own = tower(1, "image1", linear="w_1")
    for name in ("kernel", "position", "gain", "shift"):
        own = own.replace(name, f"{name}_1")
    proto = graph_text(
        f"policy ({IMAGES}) => ({PREFIX}) <{SHAPES}> {{ {body}\n {own}\n {JOINED} }}", {**weights(), **second}
    )
    model, _ = batched(proto)
    assert operators(model)["Conv"] == 1


def test_casts_of_weights_for_each_view() -> None:
    body = "".join(
        f"\n          cast{v} = Cast<to = 1>(stored)" + tower(v, f"image{v}", linear=f"cast{v}")
        for v in range(2)
    )
    proto = graph_text(
        f"policy ({IMAGES}) => ({PREFIX}) <{SHAPES}> {{ {body}\n {JOINED} }}",
        {**weights(), "stored": normal(9, WIDTH, WIDTH, dtype=np.float16)},
    )
    model, _ = batched(proto)
    assert operators(model)["MatMul"] == 3


def test_one_image_seen_twice() -> None:
    text = f"policy (float[1,3,8,8] image) => ({PREFIX}) <{SHAPES}> {{ {towers(('image', 'image'))}\n {JOINED} }}"
    (reason,) = refused(graph_text(text, weights()))
    assert reason.startswith("no two of its Convs apply one weight to different tensors")


def test_a_view_that_depends_on_another() -> None:
    reasons = refused(
        graph_text(
            f"""
            policy (float[1,3,8,8] image0) => ({PREFIX}, float[1,3,8,8] image1) <{SHAPES}> {{
              image1 = Tanh(image0)
              {towers(("image0", "image1"))}
              {JOINED}
            }}""",
            weights(),
        )
    )
    assert reasons == ["the view 'image1' depends on another view"]


def test_a_network_that_uses_one_weight_at_two_depths() -> None:
    """The Convs of a copy follow from each other: the copies are found by the first of each."""
    body = "".join(
        f"\n first{v} = Conv<pads = [1, 1, 1, 1]>(image{v}, k)\n act{v} = Relu(first{v})\n second{v} = Conv(act{v}, k)"
        for v in range(2)
    )
    weight = {"k": normal(1, 3, 3, 3, 3)}
    text = f"g ({IMAGES}) => (float[1,6,6,6] y) {{ {body}\n y = Concat<axis = 1>(second0, second1) }}"
    model, _ = batched(graph_text(text, weight))
    assert operators(model)["Conv"] == 2
    single = (
        "g (float[1,3,8,8] x) => (float[1,3,6,6] y) { a = Conv<pads = [1, 1, 1, 1]>(x, k)\n y = Conv(a, k) }"
    )
    assert len(refused(graph_text(single, weight))) == 1


def test_a_size_that_only_a_run_knows() -> None:
    reasons = refused(
        graph_text(
            f"""
            policy (float[n,3,8,8] image0, float[n,3,8,8] image1) => (float[n,{2 * PATCHES},{WIDTH}] prefix)
              <int64[3] to_rows = {{-1, {WIDTH}, {PATCHES}}}> {{
              {towers(("image0", "image1"))}
              {JOINED}
            }}""",
            weights(),
        )
    )
    assert reasons == [f"the shape of 'image{view}' is not static" for view in range(2)]


# Where the copies end


def test_a_reader_in_a_body_gets_the_result_of_its_view() -> None:
    proto = graph_text(
        f"""
        policy ({IMAGES}, bool which) => ({PREFIX}, float[1,{PATCHES},{WIDTH}] chosen) <{SHAPES}> {{
          {towers(("image0", "image1"))}
          chosen = If(which) <
            then_branch = yes () => (float[1,{PATCHES},{WIDTH}] a) {{ a = Tanh(normed0) }},
            else_branch = no () => (float[1,{PATCHES},{WIDTH}] b) {{ b = Neg(normed1) }}>
          {JOINED}
        }}""",
        weights(),
    )
    model, _ = batched(proto)
    inputs = {**seeded_inputs(proto), "which": np.array(False)}
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) <= EXACT


def test_towers_inside_a_body() -> None:
    proto = graph_text(
        f"""
        policy ({IMAGES}, bool which) => ({PREFIX}) <{SHAPES}> {{
          prefix = If(which) <
            then_branch = yes () => ({PREFIX.replace("prefix", "a")}) {{
              {towers(("image0", "image1"))}
              a = Concat<axis = 1>(seen0, seen1)
            }},
            else_branch = no () => ({PREFIX.replace("prefix", "b")}) {{ b = Identity(otherwise) }}>
        }}""",
        {**weights(), "otherwise": np.zeros((1, 2 * PATCHES, WIDTH), np.float32)},
    )
    model, result = batched(proto)
    assert len(result.changes) == 1
    assert operators(model)["Conv"] == 1


@pytest.mark.parametrize("order", ["seen1, seen0", "seen0, text, seen1", "seen0, seen1, seen0, seen1"])
def test_results_that_do_not_stand_in_their_order(order: str) -> None:
    proto = graph_text(
        f"""
        policy ({IMAGES}, float[1,{PATCHES},{WIDTH}] text) => (float[1,positions,{WIDTH}] prefix) <{SHAPES}> {{
          {towers(("image0", "image1"))}
          prefix = Concat<axis = 1>({order})
        }}""",
        weights(),
    )
    model, _ = batched(proto)
    assert (operators(model)["Conv"], operators(model)["Split"]) == (1, 1)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_results_that_stand_side_by_side_along_any_axis(axis: int) -> None:
    shape = [2, PATCHES, WIDTH]
    shape[axis] *= 2
    proto = graph_text(
        f"""
        policy (float[2,3,8,8] image0, float[2,3,8,8] image1) => (float[{",".join(map(str, shape))}] prefix)
          <int64[3] to_rows = {{2, {WIDTH}, {PATCHES}}}> {{
          {towers(("image0", "image1"))}
          prefix = Concat<axis = {axis}>(seen0, seen1)
        }}""",
        weights(),
    )
    model, _ = batched(proto)
    assert operators(model)["Split"] == 0


# Whole policies


@pytest.mark.parametrize("views", ["index", "inputs"])
@pytest.mark.parametrize("linear", ["transposed", "gemm"])
def test_matmuls_of_a_policy(views: str, linear: str) -> None:
    """After the exact passes there are as many as where the exporter ran one tower over a batch."""
    counts = {}
    for form in ("batch", views):
        proto = policy(Style(steps=2, views=form, linear=linear))  # type: ignore[arg-type]
        model = editable(proto)
        run_passes(model, "exact")
        counts[form] = (operators(model)["MatMul"], operators(model)["Conv"])
        before = operators(proto)["Conv"]
        assert before == (1 if form == "batch" else VIEWS)
    assert counts["batch"] == counts[views]


def test_a_policy_that_is_batched_already() -> None:
    model = editable(policy(Style(steps=1)))
    run_pass(model, "canonicalize")
    result = run_pass(model, "batch_views")
    assert result.changes == ()
    assert [skip.reason.split(":")[0] for skip in result.skips] == [
        "no two of its Convs apply one weight to different tensors"
    ]
