"""Attention in the spellings of several exporters: shared heads, masks, scales and casts, in every combination."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from pass_graphs import editable, graph_text, outputs_of, relative_error, seeded_inputs

from pi05c.graph.io import Model
from pi05c.passes.patterns.attention import find_attention
from pi05c.passes.patterns.gqa import find_repeat

HEADS, KV_HEADS, ROWS, KEYS, DEPTH = 4, 2, 3, 5, 16
GROUPS = HEADS // KV_HEADS

REPEATS = {
    "expand": """
      {0}_one = Unsqueeze({0}, two)
      {0}_many = Expand({0}_one, expanded)
      {0}_all = Reshape({0}_many, repeated)""",
    "tile": """
      {0}_one = Unsqueeze({0}, two)
      {0}_many = Tile({0}_one, tiles)
      {0}_all = Reshape({0}_many, repeated)""",
    "reshape and expand": """
      {0}_one = Reshape({0}, raised)
      {0}_many = Expand({0}_one, expanded)
      {0}_all = Reshape({0}_many, repeated)""",
}
"""[B, KV_HEADS, KEYS, DEPTH] -> [B, HEADS, KEYS, DEPTH]."""

SHAPES = f"""
    int64[1] two = {{2}}, int64[5] expanded = {{1, {KV_HEADS}, {GROUPS}, {KEYS}, {DEPTH}}},
    int64[5] tiles = {{1, 1, {GROUPS}, 1, 1}}, int64[4] repeated = {{1, {HEADS}, {KEYS}, {DEPTH}}},
    int64[5] raised = {{1, {KV_HEADS}, 1, {KEYS}, {DEPTH}}}, int64[4] one_head = {{1, {HEADS}, {KEYS}, {DEPTH}}},
    int64[5] query_groups = {{1, {KV_HEADS}, {GROUPS}, {ROWS}, {DEPTH}}},
    int64[4] query_rows = {{1, {KV_HEADS}, {GROUPS * ROWS}, {DEPTH}}}, int64[4] query_heads = {{1, {HEADS}, {ROWS}, {DEPTH}}},
    int64[4] logit_heads = {{1, {HEADS}, {ROWS}, {KEYS}}}, int64[4] logit_rows = {{1, {KV_HEADS}, {GROUPS * ROWS}, {KEYS}}}"""

SCALES = {
    "none": ("", "", 1.0),
    "mul": ("", "scaled = Mul({}, quarter)", 0.25),
    "mul, constant first": ("", "scaled = Mul(quarter, {})", 0.25),
    "div": ("", "scaled = Div({}, four)", 0.25),
    "on q": ("q_scaled = Mul({}, quarter)", "", 1.0),
    "on q and the logits": ("q_scaled = Mul({}, half)", "scaled = Mul({}, half)", 0.5),
}
"""What scales Q, what scales the logits, and the factor that is left for the logits."""

MASKS = {
    "none": "",
    "add": "masked = Add({}, mask)",
    "add, mask first": "masked = Add(mask, {})",
    "add a mask per head": "masked = Add({}, head_mask)",
    "where": "masked = Where(allowed, {}, lowest)",
    "where not": "masked = Where(forbidden, lowest, {})",
}


def attention_text(
    *, repeat: str = "expand", scale: str = "mul", mask: str = "add", casts: bool = False
) -> onnx.ModelProto:
    """A float32 graph from q, k and v to y; `repeat` may also be `one head`, `rows` or `broadcast`."""
    q, k, v = "q", "k", "v"
    lines: list[str] = []
    if repeat in REPEATS:
        lines += [REPEATS[repeat].format("k"), REPEATS[repeat].format("v")]
        k, v = "k_all", "v_all"
    elif repeat == "one head":
        lines += ["k_all = Expand(k1, one_head)", "v_all = Expand(v1, one_head)"]
        k, v = "k_all", "v_all"
    elif repeat == "broadcast":
        k, v = "k1", "v1"
    elif repeat == "rows":
        lines.append("q_rows = Reshape(q, query_rows)")
        q = "q_rows"
    query_scale, logit_scale, _ = SCALES[scale]
    if query_scale:
        lines.append(query_scale.format(q))
        q = "q_scaled"
    lines += [f"kt = Transpose<perm = [0, 1, 3, 2]>({k})", f"logits = MatMul({q}, kt)"]
    last = "logits"
    if repeat == "rows":
        lines.append("logits_heads = Reshape(logits, logit_heads)")
        last = "logits_heads"
    if casts:
        lines += [f"narrow = Cast<to = 10>({last})", "wide = Cast<to = 1>(narrow)"]
        last = "wide"
    if logit_scale:
        lines.append(logit_scale.format(last))
        last = "scaled"
    if MASKS[mask]:
        lines.append(MASKS[mask].format(last))
        last = "masked"
    lines.append(f"probs = Softmax<axis = -1>({last})")
    last = "probs"
    if casts:
        lines += ["p16 = Cast<to = 10>(probs)", "p32 = Cast<to = 1>(p16)"]
        last = "p32"
    if repeat == "rows":
        lines += [
            f"p_rows = Reshape({last}, logit_rows)",
            f"mixed = MatMul(p_rows, {v})",
            "y = Reshape(mixed, query_heads)",
        ]
    else:
        lines.append(f"y = MatMul({last}, {v})")
    body = "\n".join(lines)
    return graph_text(
        f"""
    g (float[1,{HEADS},{ROWS},{DEPTH}] q, float[1,{KV_HEADS},{KEYS},{DEPTH}] k, float[1,{KV_HEADS},{KEYS},{DEPTH}] v,
       float[1,1,{KEYS},{DEPTH}] k1, float[1,1,{KEYS},{DEPTH}] v1, float[1,1,{ROWS},{KEYS}] mask,
       float[1,{HEADS},{ROWS},{KEYS}] head_mask, bool[1,1,{ROWS},{KEYS}] allowed, bool[1,1,{ROWS},{KEYS}] forbidden)
      => (float[1,{HEADS},{ROWS},{DEPTH}] y)
      <float quarter = {{0.25}}, float four = {{4}}, float half = {{0.5}}, float lowest = {{-1e9}}, {SHAPES}> {{
      {body}
    }}"""
    )


def _one(model: Model):  # type: ignore[no-untyped-def]
    found, refused = find_attention(model.graph)
    assert refused == []
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("casts", [False, True], ids=["plain", "casts"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("repeat", [*REPEATS, "one head", "rows", "broadcast"])
def test_found(repeat: str, scale: str, mask: str, casts: bool) -> None:
    attention = _one(editable(attention_text(repeat=repeat, scale=scale, mask=mask, casts=casts)))
    assert attention.qk.outputs[0].name == "logits"
    assert attention.av.outputs[0].name == ("mixed" if repeat == "rows" else "y")
    assert attention.name == "probs.Softmax"
    assert attention.masked is (mask != "none")
    factor = np.prod([value for _, value in attention.scales])
    assert factor == pytest.approx(SCALES[scale][2])
    names = [node.outputs[0].name for node in attention.between]
    expected = ["logits_heads"] * (repeat == "rows") + ["narrow", "wide"] * casts
    expected += ["scaled"] * bool(SCALES[scale][1]) + ["masked"] * bool(MASKS[mask])
    assert names == expected


@pytest.mark.parametrize("repeat", [*REPEATS, "one head"])
def test_repeat(repeat: str) -> None:
    attention = _one(editable(attention_text(repeat=repeat)))
    keys, values = find_repeat(attention.qk.inputs[1]), find_repeat(attention.av.inputs[1])
    one = repeat == "one head"
    assert keys is not None
    assert values is not None
    assert keys.groups == values.groups == (HEADS if one else GROUPS)
    assert keys.source.name == ("k1" if one else "k")
    assert values.source.name == ("v1" if one else "v")
    assert keys.moved is not None
    assert values.moved is None


@pytest.mark.parametrize("repeat", ["rows", "broadcast"])
def test_no_repeat(repeat: str) -> None:
    attention = _one(editable(attention_text(repeat=repeat)))
    assert find_repeat(attention.qk.inputs[1]) is None
    assert find_repeat(attention.av.inputs[1]) is None


def test_repeats_and_scales_are_one_function() -> None:
    """The texts above mean what their names say: one result for one meaning."""
    reference = attention_text(repeat="expand", scale="mul")
    inputs = seeded_inputs(reference)
    expected = outputs_of(reference, inputs)
    for repeat in [*REPEATS, "rows"]:
        for scale in ("mul, constant first", "div", "on q", "on q and the logits"):
            proto = attention_text(repeat=repeat, scale=scale)
            assert relative_error(outputs_of(proto, inputs), expected) < 1e-6, (repeat, scale)


def test_scale_below_the_mask_does_not_move() -> None:
    """softmax((qk + mask) * s) is not softmax(qk * s + mask)."""
    text = """
    g (float[1,2,3,8] q, float[1,2,8,5] k, float[1,2,5,8] v, float[1,1,3,5] mask) => (float[1,2,3,8] y) <float s = {0.5}> {
      logits = MatMul(q, k)
      masked = Add(logits, mask)
      scaled = Mul(masked, s)
      probs = Softmax<axis = -1>(scaled)
      y = MatMul(probs, v)
    }"""
    attention = _one(editable(graph_text(text)))
    assert attention.masked
    assert attention.scales == ()
    assert [node.op for node in attention.between] == ["Add", "Mul"]


def test_split_over_prefix_and_suffix() -> None:
    text = """
    g (float[1,1,3,8] q, float[1,1,8,5] kp, float[1,1,8,2] ks, float[1,1,5,8] vp, float[1,1,2,8] vs) => (float[1,1,3,8] y)
      <int64[2] sizes = {5, 2}> {
      lp = MatMul(q, kp)
      ls = MatMul(q, ks)
      logits = Concat<axis = -1>(lp, ls)
      probs = Softmax<axis = -1>(logits)
      pp, ps = Split<axis = 3>(probs, sizes)
      yp = MatMul(pp, vp)
      ys = MatMul(ps, vs)
      y = Add(yp, ys)
    }"""
    attention = _one(editable(graph_text(text)))
    assert [(chunk.qk.outputs[0].name, chunk.av.outputs[0].name) for chunk in attention.chunks] == [
        ("lp", "yp"),
        ("ls", "ys"),
    ]
    assert attention.join is not None


REFUSED = {
    "another reader of the logits": (
        "probs = Softmax(logits)\n y = MatMul(probs, v)\n z = Relu(logits)",
        "another consumer",
    ),
    "another reader of the probabilities": (
        "probs = Softmax(logits)\n y = MatMul(probs, v)\n z = Relu(probs)",
        "feed MatMul, Relu, not one MatMul",
    ),
    "probabilities are the right factor": (
        "probs = Softmax(logits)\n y = MatMul(w, probs)\n z = Relu(v)",
        "right factor",
    ),
    "no MatMul above": (
        "probs = Softmax(v)\n y = MatMul(probs, k)\n z = Relu(logits)",
        "come from no MatMul",
    ),
    "an activation between": (
        "capped = Tanh(logits)\n probs = Softmax(capped)\n y = MatMul(probs, v)\n z = Relu(v)",
        "pass through Tanh",
    ),
    "a scale that is no number": (
        "scaled = Mul(logits, temperature)\n probs = Softmax(scaled)\n y = MatMul(probs, v)\n z = Relu(v)",
        "pass through Mul",
    ),
    "a sum of two products": (
        "other = MatMul(q, k)\n both = Add(logits, other)\n probs = Softmax(both)\n y = MatMul(probs, v)\n z = Relu(v)",
        "pass through Add",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    body, reason = REFUSED[name]
    text = f"""
    g (float[1,2,4,4] q, float[1,2,4,4] k, float[1,2,4,4] v, float[1,2,4,4] w, float[1,2,4,4] temperature)
      => (float[1,2,4,4] y, float[1,2,4,4] z) {{
      logits = MatMul(q, k)
      {body}
    }}"""
    found, refused = find_attention(editable(graph_text(text)).graph)
    assert found == []
    assert len(refused) == 1
    assert reason in refused[0].reason
    assert refused[0].softmax.name == "probs.Softmax"


@pytest.mark.parametrize("output", ["logits", "scaled", "masked", "probs"])
def test_an_inner_tensor_as_output_is_refused(output: str) -> None:
    from pass_graphs import make_output

    found, refused = find_attention(editable(make_output(attention_text(), output)).graph)
    assert found == []
    assert "output of the graph" in refused[0].reason
