"""What is known of masks, held against what the graph computes for every value of its inputs."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from pass_graphs import editable, graph_text, outputs_of_each

from pi05c.passes.patterns.known import NO_CONDITION, Known

TOKENS, CAMERAS = 3, 2
HEADER = f"""
    g (bool[1,{TOKENS}] tokens, bool[1,{CAMERAS}] cameras, float x) => (OUTPUT y)
      <int64[1] one = {{1}}, int64[1] two = {{2}}, int64[3] wide = {{1, {CAMERAS}, 2}}, int64[2] flat = {{1, {2 * CAMERAS}}},
       bool[1,1] no = {{0}}, bool[1,1] yes = {{1}}, float open = {{0}}, float closed = {{-1e30}}, float unit = {{1}}> {{
      raised = Unsqueeze(cameras, two)
      patches = Expand(raised, wide)
      seen = Reshape(patches, flat)
      valid = Concat<axis = 1>(seen, tokens, no, yes)
      row = Unsqueeze(valid, one)
      column = Transpose<perm = [0, 2, 1]>(row)
      pairs = And(row, column)
      BODY
    }}"""

LENGTH = 2 * CAMERAS + TOKENS + 2
SQUARE, ROW = f"1,{LENGTH},{LENGTH}", f"1,1,{LENGTH}"

EXPRESSIONS: dict[str, tuple[str, str, float]] = {
    "a pair of tokens": (f"bool[{SQUARE}]", "y = Identity(pairs)", 1.0),
    "additive mask": (f"float[{SQUARE}]", "y = Where(pairs, open, closed)", 1.0),
    "additive mask of transformers": (
        f"float[{ROW}]",
        "f = Cast<to = 1>(row)\n n = Sub(unit, f)\n y = Mul(n, closed)",
        1.0,
    ),
    "negated": (f"bool[{SQUARE}]", "y = Not(pairs)", 1.0),
    "negated, then selected": (
        f"float[{ROW}]",
        "n = Not(row)\n y = Where(n, closed, open)",
        # of a negation, what is not constant is no condition
        2 / LENGTH,
    ),
    "three conditions": (
        f"bool[{SQUARE}]",
        "third = Slice(valid, one, two, one)\n both = And(row, third)\n y = And(both, column)",
        0.4,
    ),
    "a part of it": (f"bool[{ROW.replace(str(LENGTH), '2')}]", "y = Slice(row, s, e, two)", 1.0),
    "scaled": (f"float[{SQUARE}]", "m = Where(pairs, open, closed)\n y = Mul(m, unit)", 1.0),
    "times what a run knows": (f"float[{SQUARE}]", "m = Where(pairs, open, closed)\n y = Mul(m, x)", 0.0),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_assignment_agrees(name: str) -> None:
    output, body, share = EXPRESSIONS[name]
    proto = graph_text(HEADER.replace("OUTPUT", output).replace("BODY", body))
    for key, value in (("s", 3), ("e", 5)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), key))
    model = editable(proto)
    found = Known(model.graph).of(model.graph.outputs[0])
    if found is None:
        assert share == 0
        return
    assert found.known.mean() >= share > 0
    assignments = list(itertools.product([False, True], repeat=TOKENS + CAMERAS))
    samples = [
        {
            "tokens": np.array([values[:TOKENS]]),
            "cameras": np.array([values[TOKENS:]]),
            "x": np.array(3, np.float32),
        }
        for values in assignments
    ]
    for values, outputs in zip(assignments, outputs_of_each(proto, samples), strict=True):
        conditions = np.array([*values, True])  # the last stands for NO_CONDITION
        assert NO_CONDITION == -1
        holds = conditions[found.first] & conditions[found.second]
        expected = np.where(holds, found.high, found.low)
        np.testing.assert_array_equal(expected[found.known], outputs["y"][found.known])
        assert (outputs["y"][found.zero] == 0).all()
