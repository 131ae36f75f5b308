"""RMSNorm, adaRMS and LayerNorm in each of their spellings."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from pass_graphs import editable, graph_text, normal

from pi05c.passes.patterns.norm import Norm, find_norms

WIDTH = 16

POWER = """
    square = Pow(x, two)
    mean = ReduceMean<keepdims = 1>(square, last)
    shifted = Add(mean, eps)
    root = Sqrt(shifted)
    inverse = Reciprocal(root)
    unit = Mul(x, inverse)"""
PRODUCT_AND_DIV = """
    square = Mul(x, x)
    mean = ReduceMean<keepdims = 1>(square, last)
    shifted = Add(eps, mean)
    root = Sqrt(shifted)
    unit = Div(x, root)"""
DIVIDED_ONE = """
    square = Mul(x, x)
    mean = ReduceMean<keepdims = 1>(square, last)
    shifted = Add(mean, eps)
    root = Sqrt(shifted)
    inverse = Div(one, root)
    unit = Mul(inverse, x)"""
NEGATIVE_POWER = """
    square = Pow(x, two)
    mean = ReduceMean<keepdims = 1>(square, last)
    shifted = Add(mean, eps)
    inverse = Pow(shifted, minus_half)
    unit = Mul(x, inverse)"""
WITH_CASTS = """
    wide = Cast<to = 1>(x)
    square = Pow(wide, two)
    mean = ReduceMean<keepdims = 1>(square, last)
    shifted = Add(mean, eps)
    root = Sqrt(shifted)
    inverse = Reciprocal(root)
    unit = Mul(wide, inverse)"""

UNWEIGHTED = "y = Identity(unit)"
WEIGHTED = "y = Mul(unit, weight)"
GEMMA = "gain = Add(weight, one)\n y = Mul(unit, gain)"
GEMMA_BFLOAT16 = "stored = Cast<to = 1>(low)\n gain = Add(one, stored)\n y = Mul(gain, unit)"
SCALED = "gain = Add(scale, one)\n y = Mul(unit, gain)"
MODULATED = "gain = Add(scale, one)\n scaled = Mul(unit, gain)\n y = Add(scaled, shift)"

STATISTICS = {
    "power": POWER,
    "product and div": PRODUCT_AND_DIV,
    "one over root": DIVIDED_ONE,
    "power -0.5": NEGATIVE_POWER,
    "casts": WITH_CASTS,
}
AFFINE = {
    "unweighted": (UNWEIGHTED, "RMSNorm", "unit"),
    "weight": (WEIGHTED, "RMSNorm", "y"),
    "1 + weight": (GEMMA, "RMSNorm", "y"),
    "1 + bfloat16 weight": (GEMMA_BFLOAT16, "RMSNorm", "y"),
    "scale": (SCALED, "adaRMS", "y"),
    "scale and shift": (MODULATED, "adaRMS", "y"),
}


def _find(body: str, opset: int = 21) -> list[Norm]:
    text = f"""
    g (float[2,4,{WIDTH}] x, float[2,1,{WIDTH}] scale, float[2,1,{WIDTH}] shift) => (float[2,4,{WIDTH}] y)
      <float eps = {{1e-6}}, float one = {{1}}, float two = {{2}}, float minus_half = {{-0.5}}, int64[1] last = {{-1}}> {{
      {body}
    }}"""
    weights = {
        "weight": normal(1, WIDTH),
        "bias": normal(2, WIDTH),
        "low": normal(3, WIDTH, dtype=ml_dtypes.bfloat16),
    }
    return find_norms(editable(graph_text(text, weights, opset=opset)).graph)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("affine", AFFINE)
def test_rms_norm(statistics: str, affine: str) -> None:
    body, kind, made = AFFINE[affine]
    (found,) = _find(f"{STATISTICS[statistics]}\n{body}")
    assert found.kind == kind
    assert found.input.name == "x"
    assert found.output.name == made
    ops = [node.op for node in found.nodes]
    assert ops[:2] in (["Pow", "ReduceMean"], ["Mul", "ReduceMean"])
    assert found.nodes[-1].outputs[0].name == made
    if affine in ("1 + weight", "1 + bfloat16 weight", "scale", "scale and shift"):
        assert any(node.outputs[0].name == "gain" for node in found.nodes), "1 + w is part of the norm"


def _weights() -> dict[str, npt.NDArray[np.float32]]:
    low = normal(3, WIDTH, dtype=ml_dtypes.bfloat16).astype(np.float32)
    return {"weight": normal(1, WIDTH), "low": low}


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize(
    ("affine", "stored", "plus_one"),
    [
        ("weight", "weight", False),
        ("1 + weight", "weight", True),
        ("1 + bfloat16 weight", "low", True),
    ],
)
def test_weight_as_the_norm_reads_it(statistics: str, affine: str, stored: str, plus_one: bool) -> None:
    (found,) = _find(f"{STATISTICS[statistics]}\n{AFFINE[affine][0]}")
    assert found.bias is None
    assert found.weight is not None
    assert found.weight.node.outputs[0].name == "y"
    assert found.weight.stored is not None
    assert (found.weight.stored.name, found.weight.plus_one) == (stored, plus_one)
    np.testing.assert_array_equal(found.weight.values, _weights()[stored] + plus_one)


def test_scale_and_shift_of_a_run_are_not_stored() -> None:
    (found,) = _find(f"{POWER}\n{MODULATED}")
    for part, slot in ((found.weight, "unit"), (found.bias, "scaled")):
        assert part is not None
        assert part.node.inputs[1 - part.index].name == slot
        assert (part.stored, part.values) == (None, None)


@pytest.mark.parametrize(
    ("body", "values"),
    [
        ("low_gain = Cast<to = 10>(weight)\n gain = Cast<to = 1>(low_gain)\n y = Mul(unit, gain)", None),
        ("gain = Cast<to = 1>(low)\n y = Mul(gain, unit)", "low"),
    ],
    ids=["rounded to float16", "widened from bfloat16"],
)
def test_a_weight_behind_casts(body: str, values: str | None) -> None:
    (found,) = _find(f"{POWER}\n{body}")
    assert found.weight is not None
    if values is None:
        assert found.weight.values is None
    else:
        np.testing.assert_array_equal(found.weight.values, _weights()[values])


@pytest.mark.parametrize(("cast", "rounds"), [("1", False), ("10", True)])
def test_rounding_inside(cast: str, rounds: bool) -> None:
    body = f"low_unit = Cast<to = {cast}>(unit)\n wide = Cast<to = 1>(low_unit)\n y = Mul(wide, weight)"
    (found,) = _find(f"{POWER}\n{body}")
    assert found.output.name == "y"
    assert found.rounds is rounds


def test_parts_of_an_operator() -> None:
    (found,) = _find("y = LayerNormalization<axis = -1, epsilon = 1e-6>(x, weight, bias)")
    for part, index, seed in ((found.weight, 1, 1), (found.bias, 2, 2)):
        assert part is not None
        assert (part.node, part.index) == (found.nodes[0], index)
        np.testing.assert_array_equal(part.values, normal(seed, WIDTH))


def test_nodes_have_no_duplicates() -> None:
    (found,) = _find(f"{POWER}\n{MODULATED}")
    assert len({id(node) for node in found.nodes}) == len(found.nodes) == 9


@pytest.mark.parametrize(
    "root",
    [
        "root = Sqrt(shifted)\n unit = Div(centred, root)",
        "inverse = Pow(shifted, minus_half)\n unit = Mul(centred, inverse)",
    ],
)
@pytest.mark.parametrize(
    "centre", ["centred = Sub(x, average)", "same = Identity(average)\n centred = Sub(x, same)"]
)
def test_layer_norm_decomposed(root: str, centre: str) -> None:
    (found,) = _find(
        f"""
        average = ReduceMean<keepdims = 1>(x, last)
        {centre}
        square = Pow(centred, two)
        variance = ReduceMean<keepdims = 1>(square, last)
        shifted = Add(variance, eps)
        {root}
        scaled = Mul(unit, weight)
        y = Add(scaled, bias)"""
    )
    assert found.kind == "LayerNorm"
    assert found.input.name == "x"
    assert found.output.name == "y"
    assert [node.op for node in found.nodes][:4] == ["ReduceMean", "Sub", "Pow", "ReduceMean"]


@pytest.mark.parametrize(
    ("body", "kind", "opset"),
    [
        ("y = LayerNormalization<axis = -1, epsilon = 1e-6>(x, weight, bias)", "LayerNorm", 17),
        ("y = RMSNormalization<axis = -1, epsilon = 1e-6>(x, weight)", "RMSNorm", 23),
    ],
)
def test_operators(body: str, kind: str, opset: int) -> None:
    (found,) = _find(body, opset)
    assert found.kind == kind
    assert [node.op for node in found.nodes] == [body.split("= ")[1].split("<")[0]]
    assert (found.input.name, found.output.name) == ("x", "y")


@pytest.mark.parametrize(
    "body",
    [
        "mean = ReduceMean<keepdims = 1>(x, last)\n y = Sub(x, mean)",
        POWER.replace("Pow(x, two)", "Pow(x, one)") + "\n" + UNWEIGHTED,
        POWER.replace("unit = Mul(x, inverse)", "unit = Mul(scale, inverse)") + "\n" + UNWEIGHTED,
        POWER.replace("Add(mean, eps)", "Add(mean, one)") + "\n" + UNWEIGHTED,
        POWER.replace("Add(mean, eps)", "Mul(mean, eps)") + "\n" + UNWEIGHTED,
    ],
    ids=["mean alone", "first power", "another tensor divided", "epsilon of 1", "no epsilon"],
)
def test_no_norm(body: str) -> None:
    assert _find(body) == []


def test_residual_is_not_a_shift() -> None:
    """A residual addition has a value for each row, a shift has one for each channel."""
    (found,) = _find(f"{POWER}\n scaled = Mul(unit, weight)\n y = Add(scaled, x)")
    assert found.output.name == "scaled"


def test_second_reader_of_the_unit_ends_the_norm() -> None:
    (found,) = _find(f"{POWER}\n scaled = Mul(unit, weight)\n y = Add(scaled, unit)")
    assert found.output.name == "unit"


def test_an_output_ends_the_norm_read_through_a_cast_or_not() -> None:
    casts = "half = Cast<to = 10>(unit)\n back = Cast<to = 1>(half)"
    for body in (f"{POWER}\n y = Mul({{}}, weight)", f"{POWER}\n {casts}\n y = Mul({{}}, weight)"):
        read = "back" if "back" in body else "unit"
        text = f"""
        g (float[2,4,{WIDTH}] x) => (float[2,4,{WIDTH}] y, float[2,4,{WIDTH}] unit)
          <float eps = {{1e-6}}, float two = {{2}}, int64[1] last = {{-1}}> {{
          {body.format(read)}
        }}"""
        (found,) = find_norms(editable(graph_text(text, {"weight": normal(1, WIDTH)})).graph)
        assert found.output.name == "unit"


def test_names_a_norm_by_its_last_node() -> None:
    (found,) = _find(f"{POWER}\n{WEIGHTED}")
    assert found.name == "y.Mul"


def test_computes_what_it_claims() -> None:
    """The spellings above are one function, so that a finder test with a wrong spelling cannot pass."""
    from pass_graphs import outputs_of, seeded_inputs

    results = []
    for body in STATISTICS.values():
        text = f"""
        g (float[2,4,{WIDTH}] x) => (float[2,4,{WIDTH}] unit)
          <float eps = {{1e-6}}, float one = {{1}}, float two = {{2}}, float minus_half = {{-0.5}}, int64[1] last = {{-1}}> {{
          {body}
        }}"""
        proto = graph_text(text)
        inputs = seeded_inputs(proto)
        results.append(outputs_of(proto, inputs)["unit"])
        reference = inputs["x"] / np.sqrt((inputs["x"] ** 2).mean(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(results[-1], reference, rtol=1e-5)
