"""fold_norms: what is multiplied where, once, and what keeps a norm as it is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from golden_cases_fold_norms import SCALARS, WIDTH, gain, steps, unit
from pass_graphs import (
    Array,
    editable,
    graph_text,
    make_output,
    node_of,
    normal,
    outputs_of,
    relative_error,
    run_pass,
    run_passes,
    seeded_inputs,
)

from pi05c.graph.io import Model, scopes
from pi05c.graph.weights import array_of
from pi05c.passes.pipeline import StepResult

ROUNDING = 1e-6
"""Relative error of float32 arithmetic in graphs of this size."""

W = {"w": normal(1, WIDTH, 24), "v": normal(2, WIDTH, 24), "g": gain(3), "other_g": gain(4)}
BIASES = {"s": normal(5, WIDTH), "b": normal(6, 24), "c": normal(7, 24)}


def _norm(source: str, made: str, weight: str = "g") -> str:
    return f"{unit(source, f'{made}_unit')}\n          {made} = Mul({made}_unit, {weight})"


def _graph(body: str, outputs: str = "float[2,4,24] y", **weights: Array) -> onnx.ModelProto:
    text = (
        f"g (float[2,4,{WIDTH}] x, float[2,4,{WIDTH}] z, bool flag) => ({outputs}) <{SCALARS}> {{\n{body}\n}}"
    )
    names = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return graph_text(text, {k: v for k, v in (W | BIASES | weights).items() if k in names})


def _folded(proto: onnx.ModelProto) -> tuple[Model, StepResult]:
    """The graph after the pass, which must compute the same."""
    model = editable(proto)
    result = run_pass(model, "fold_norms")
    inputs = seeded_inputs(proto, 11)
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) <= ROUNDING
    return model, result


def _multiplications(model: Model) -> int:
    """Muls by a stored vector."""
    return sum(
        node.op == "Mul" and any(tensor.shape == (WIDTH,) for tensor in node.inputs)
        for scope in scopes(model.graph)
        for node in scope.nodes
    )


def _reason(proto: onnx.ModelProto) -> str:
    """Why the only norm of a graph was left alone."""
    _, result = _folded(proto)
    assert result.changes == ()
    (skip,) = result.skips
    return skip.reason


def test_the_product_is_stored_in_float32() -> None:
    low = normal(8, WIDTH, 24, dtype=ml_dtypes.bfloat16)
    model, _ = _folded(_graph(f"{_norm('x', 'n')}\n f = Cast<to = 1>(low)\n y = MatMul(n, f)", low=low))
    weight = node_of(model, "y").inputs[1]
    assert (weight.name, weight.dtype) == ("low", np.float32)
    np.testing.assert_array_equal(array_of(weight), low.astype(np.float32) * W["g"][:, None])


def test_q_k_v_are_still_joined_afterwards() -> None:
    proto = _graph(f"{_norm('x', 'n')}\n q = MatMul(n, w)\n k = MatMul(n, v)\n y = Mul(q, k)")
    model = editable(proto)
    run_passes(model, "fold_norms,fuse_projections")
    assert [node.op for node in model.graph.nodes][-3:] == ["MatMul", "Split", "Mul"]
    joined = np.concatenate([W["w"], W["v"]], 1) * W["g"][:, None]
    np.testing.assert_array_equal(array_of(model.graph.nodes[-3].inputs[1]), joined)
    inputs = seeded_inputs(proto)
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) <= ROUNDING


def test_joining_compares_what_will_be_stored() -> None:
    """k has its largest weights where the norm's weight is small: as stored they differ tenfold, folded not."""
    scale = np.ones(WIDTH, np.float32)
    scale[0] = 0.1
    small, large = W["w"].clip(-0.5, 0.5), W["w"].clip(-0.5, 0.5)
    large[0] *= 10
    proto = _graph(
        f"{_norm('x', 'n', 'scale')}\n q = MatMul(n, small)\n k = MatMul(n, large)\n y = Mul(q, k)",
        scale=scale,
        small=small,
        large=large,
    )
    alone, folded = editable(proto), editable(proto)
    assert not run_passes(alone, "fuse_projections")[0].changes
    assert run_passes(folded, "fold_norms,fuse_projections")[1].changes


def test_steps_that_share_norm_and_weight_multiply_it_once() -> None:
    proto = steps(("scale0", "scale0"))
    model, _ = _folded(proto)
    first, second = (node_of(model, f"product{step}").inputs[1] for step in (0, 1))
    assert first is second
    before = editable(proto)
    scale = array_of(node_of(before, "scaled0").inputs[1]).reshape(-1)
    w_out = array_of(node_of(before, "product0").inputs[1])
    np.testing.assert_array_equal(array_of(first), w_out * scale[:, None])


def test_equal_norm_weights_under_two_names_are_one() -> None:
    body = f"{_norm('x', 'n')}\n{_norm('z', 'm', 'twin')}\n a = MatMul(n, w)\n b_ = MatMul(m, w)\n y = Add(a, b_)"
    model, result = _folded(_graph(body, twin=W["g"].copy()))
    assert len(result.changes) == 2
    assert _multiplications(model) == 0


def test_a_weight_behind_two_norms_stays() -> None:
    body = f"{_norm('x', 'n')}\n{_norm('z', 'm', 'other_g')}\n a = MatMul(n, w)\n b_ = MatMul(m, w)\n y = Add(a, b_)"
    assert "'w' has a reader that needs it as it is" in _reason(_graph(body))


def test_a_weight_that_also_reads_something_unnormalized_stays() -> None:
    body = f"{_norm('x', 'n')}\n a = MatMul(n, w)\n b_ = MatMul(z, w)\n y = Add(a, b_)"
    assert "'w' has a reader that needs it as it is" in _reason(_graph(body))


def test_one_shared_weight_keeps_the_norm_and_so_all_norms_that_share_with_it() -> None:
    """n feeds w and v, m feeds v, and w has another reader: none of the three can change."""
    body = f"""{_norm("x", "n")}\n{_norm("z", "m")}
        a = MatMul(n, w)\n b_ = MatMul(n, v)\n c_ = MatMul(m, v)\n d = MatMul(z, w)
        ab = Add(a, b_)\n cd = Add(c_, d)\n y = Add(ab, cd)"""
    _, result = _folded(_graph(body))
    assert result.changes == ()
    assert len(result.skips) == 2


def test_a_square_weight_read_both_ways_stays() -> None:
    body = f"""{_norm("x", "n")}\n turned = Transpose<perm = [1, 0]>(square)
        a = MatMul(n, square)\n b_ = MatMul(n, turned)\n y = Add(a, b_)"""
    proto = _graph(body, f"float[2,4,{WIDTH}] y", square=normal(9, WIDTH, WIDTH))
    assert "'square' has a reader that needs it as it is" in _reason(proto)


def _branches(then: str, other: str) -> str:
    return f"""y = If(flag) <
        then_branch = yes () => (float[2,4,24] out_a) {{ {then} }},
        else_branch = no () => (float[2,4,24] out_b) {{ {other} }}>"""


def test_linears_in_bodies_count() -> None:
    branches = _branches("out_a = MatMul(n, w)", "out_b = MatMul(n, v)")
    model, result = _folded(_graph(f"{_norm('x', 'n')}\n{branches}"))
    assert result.changes
    assert _multiplications(model) == 0


def test_another_reader_in_a_body_counts() -> None:
    branches = _branches("out_a = MatMul(n, w)", "t = Relu(n)\n out_b = MatMul(t, v)")
    assert _reason(_graph(f"{_norm('x', 'n')}\n{branches}")) == "'t.Relu' reads it too"


@pytest.mark.parametrize(
    ("move", "linear", "shape"),
    [
        ("m = Transpose<perm = [1, 0, 2]>(n)", "y = MatMul(m, w)", "4,2,24"),
        ("m = Reshape(n, to_rows)\n k = Unsqueeze(m, first)", "y = MatMul(k, w)", "1,8,24"),
    ],
    ids=["transpose", "reshape and unsqueeze"],
)
def test_moved_rows_are_followed(move: str, linear: str, shape: str) -> None:
    proto = _graph(
        f"{_norm('x', 'n')}\n{move}\n{linear}",
        f"float[{shape}] y",
        to_rows=np.array([8, WIDTH]),
        first=np.array([0]),
    )
    model, _ = _folded(proto)
    assert _multiplications(model) == 0


def test_a_moved_last_axis_is_not() -> None:
    body = f"{_norm('x', 'n')}\n m = Transpose<perm = [0, 2, 1]>(n)\n y = MatMul(m, short)"
    assert "reads it too" in _reason(_graph(body, f"float[2,{WIDTH},24] y", short=normal(1, 4, 24)))


def test_rounding_behind_the_norm_stays_where_it_is() -> None:
    body = f"{_norm('x', 'n')}\n low = Cast<to = 10>(n)\n y = MatMul(low, half)"
    proto = _graph(body, "float16[2,4,24] y", half=normal(1, WIDTH, 24, dtype=np.float16))
    assert _reason(proto) == "'low.Cast' reads it too"


def test_a_norm_that_rounds_its_weight_is_left() -> None:
    body = f"{_norm('x', 'n', 'rounded')}\n y = MatMul(n, w)"
    proto = _graph(f"low = Cast<to = 10>(g)\n rounded = Cast<to = 1>(low)\n{body}")
    assert _reason(proto) == "what it multiplies by is not a stored vector"


LAYER_NORM = "n = LayerNormalization<axis = -1, epsilon = 1e-6>(x, g, s)"


def test_a_bias_goes_where_each_linear_has_one() -> None:
    body = (
        f"{LAYER_NORM}\n p = MatMul(n, w)\n a = Add(p, b)\n q = MatMul(n, v)\n d = Add(c, q)\n y = Add(a, d)"
    )
    model, _ = _folded(_graph(body))
    assert len(node_of(model, "n").inputs) == 2
    expected = W["v"].T.astype(np.float64) @ BIASES["s"] + BIASES["c"]
    np.testing.assert_allclose(array_of(node_of(model, "d").inputs[0]), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        "y = MatMul(n, w)",
        "p = MatMul(n, w)\n a = Add(p, b)\n q = MatMul(n, v)\n y = Add(a, q)",
        "p = MatMul(n, w)\n a = Add(p, b)\n r = Relu(p)\n y = Add(a, r)",
    ],
    ids=["no bias", "one of two", "the product has another reader"],
)
def test_a_bias_without_a_place_keeps_the_weight_too(body: str) -> None:
    assert "has no bias of its own" in _reason(_graph(f"{LAYER_NORM}\n{body}"))


def test_a_product_that_is_an_output_takes_no_bias() -> None:
    proto = make_output(_graph(f"{LAYER_NORM}\n p = MatMul(n, w)\n y = Add(p, b)"), "p")
    assert "has no bias of its own" in _reason(proto)


def test_a_bias_of_zeros_is_none() -> None:
    model, _ = _folded(_graph(f"{LAYER_NORM}\n y = MatMul(n, w)", s=np.zeros(WIDTH, np.float32)))
    np.testing.assert_array_equal(array_of(node_of(model, "n").inputs[1]), np.ones(WIDTH))


@pytest.mark.parametrize("body", [f"{unit('x', 'n')}\n y = MatMul(n, w)", "y = MatMul(x, w)"])
def test_graph_without_anything_to_fold(body: str) -> None:
    assert _reason(_graph(body)) == "no norm in it has a weight or a bias"
