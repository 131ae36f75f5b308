"""`pi05c.graph.text`: the text that goldens, diffs and people read."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from models import small_model

from pi05c.graph.io import Model
from pi05c.graph.text import canonical_text

TEXT = """
    attention (float[1,2,4] q, bool c) => (float[1,2,4] y) <float[3] few = {1, 2.5, 3}> {
      logits = MatMul(q, w)
      probs = Softmax<axis = -1>(logits)
      y = If(c) <
        then_branch = t () => (float[1,2,4] a) { a = Identity(probs) },
        else_branch = e () => (float[1,2,4] b) { b = Neg(probs) }
      >
    }"""
W = np.eye(4, dtype=np.float32)


def _model() -> Model:
    return small_model(TEXT, {"w": W})


def test_a_line_a_tensor() -> None:
    lines = canonical_text(_model().graph).splitlines()
    assert lines[0] == "inputs: %q: float32[1,2,4], %c: bool[]"
    assert lines[1].startswith("%w: float32[4,4] = initializer sha256:")
    assert lines[2] == "%logits: float32[1,2,4] = MatMul(%q, %w)"
    assert lines[3] == "%probs: float32[1,2,4] = Softmax(%logits) {axis=-1}"
    assert lines[4] == "%y: float32[1,2,4] = If(%c)"
    assert lines[5].strip() == "else_branch:"
    assert lines[7] == "    %b: float32[1,2,4] = Neg(%probs)"
    assert lines[-1] == "outputs: %y: float32[1,2,4]"


def test_the_hash_is_of_the_values() -> None:
    one, same = (canonical_text(_model().graph) for _ in range(2))
    other = canonical_text(small_model(TEXT, {"w": W * 2}).graph)
    assert one == same
    assert one != other


def test_small_constants_are_shown_with_six_digits_whatever_the_processor_rounded() -> None:
    text = "c (float[3] x) => (float[3] y) { y = Mul(x, few) }"
    close = np.array([0.1, np.nextafter(np.float32(0.1), np.float32(1)), 1], np.float32)
    shown = canonical_text(small_model(text, {"few": close}).graph)
    assert "%few: float32[3] = [0.1, 0.1, 1]" in shown


def test_types_have_names_in_attributes_and_tensors() -> None:
    text = "c (float[2] x) => (bfloat16[2] y) { y = Cast<to = 16>(x) }"
    assert "%y: bfloat16[2] = Cast(%x) {to=bfloat16}" in canonical_text(small_model(text).graph)
    fp8 = np.array([1, 2], np.float32).astype(ml_dtypes.float8_e4m3fn)
    shown = canonical_text(small_model("c () => (float8e4m3fn[2] y) { y = Identity(w) }", {"w": fp8}).graph)
    assert "%w: float8e4m3fn[2] = [1, 2]" in shown


def test_left_out_inputs_and_unknown_shapes() -> None:
    text = "c (float[N,2] x) => (float[N,2] y) { y = Clip(x, , top) }"
    shown = canonical_text(small_model(text, {"top": np.array(1, np.float32)}).graph)
    assert "%y: float32[N,2] = Clip(%x, _, %top)" in shown


def test_custom_operators_show_their_domain() -> None:
    model = _model()
    model.graph.nodes[1].domain = "trt"
    assert "= trt::Softmax(%logits)" in canonical_text(model.graph)
