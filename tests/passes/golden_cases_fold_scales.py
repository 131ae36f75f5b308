"""The golden cases of `fold_scales`."""

from __future__ import annotations

import numpy as np
import onnx
from golden_cases import bfloat16, case
from pass_graphs import graph_text, normal


@case(
    "fold_scales",
    "1/sqrt(d) goes back through RoPE into the columns that make Q: a power of two, so they stay bfloat16.",
)
def fold_scales__attention() -> onnx.ModelProto:
    return graph_text(
        """
        attention (float[1,6,32] x, float[1,1,6,16] cos, float[1,1,6,16] sin) => (float[1,6,32] y)
          <int64[3] sizes = {32, 16, 16}, int64[4] split = {1, 6, -1, 16}, int64[3] merged = {1, 6, 32}, float scale = {0.25},
           int64[1] zero = {0}, int64[1] half = {8}, int64[1] end = {16}, int64[1] last = {3}> {
          w = Cast<to = 1>(w_qkv)
          qkv = MatMul(x, w)
          q0, k0, v0 = Split<axis = 2>(qkv, sizes)
          q1 = Reshape(q0, split)
          q2 = Transpose<perm = [0, 2, 1, 3]>(q1)
          low = Slice(q2, zero, half, last)
          high = Slice(q2, half, end, last)
          negative = Neg(high)
          turned = Concat<axis = -1>(negative, low)
          straight = Mul(q2, cos)
          crossed = Mul(turned, sin)
          q = Add(straight, crossed)
          k1 = Reshape(k0, split)
          kt = Transpose<perm = [0, 2, 3, 1]>(k1)
          v1 = Reshape(v0, split)
          v = Transpose<perm = [0, 2, 1, 3]>(v1)
          logits = MatMul(q, kt)
          scaled = Mul(logits, scale)
          probs = Softmax<axis = -1>(scaled)
          mixed = MatMul(probs, v)
          rows = Transpose<perm = [0, 2, 1, 3]>(mixed)
          y = Reshape(rows, merged)
        }""",
        {"w_qkv": bfloat16(1, 32, 64)},
    )


@case(
    "fold_scales",
    "dt goes into the weight and the bias that make v, once for both steps; no power of two, so in float32.",
)
def fold_scales__flow() -> onnx.ModelProto:
    step = """
          h{n} = MatMul(x{n}, w_in)
          a{n} = Relu(h{n})
          o{n} = MatMul(a{n}, w)
          v{n} = Add(o{n}, bias)
          d{n} = Mul(v{n}, dt)
          x{m} = Add(x{n}, d{n})"""
    return graph_text(
        f"""
        steps (float[1,4,16] x0) => (float[1,4,16] x2) <float dt = {{-0.1}}> {{
          w = Cast<to = 1>(w_out){step.format(n=0, m=1)}{step.format(n=1, m=2)}
        }}""",
        {"w_in": normal(1, 16, 24), "w_out": bfloat16(2, 24, 16), "bias": normal(3, 16)},
    )


@case("fold_scales", "The embedding's sqrt(width) goes into the table, whose rows then need no cast.")
def fold_scales__embedding() -> onnx.ModelProto:
    return graph_text(
        """
        text (int64[1,4] tokens) => (float[1,4,32] y) <float root = {5.6568542}> {
          rows = Gather(table, tokens)
          wide = Cast<to = 1>(rows)
          embedded = Mul(wide, root)
          y = Relu(embedded)
        }""",
        {"table": bfloat16(1, 16, 32)},
    )


@case("fold_scales", "A layer scale goes into the linear in front of it; a divisor into those behind it.")
def fold_scales__channels() -> onnx.ModelProto:
    return graph_text(
        """
        block (float[2,4,16] x) => (float[2,4,16] y, float[2,4,8] z) <float two = {2}> {
          half = Div(x, two)
          a = MatMul(half, w_a)
          b = Relu(a)
          c = MatMul(b, w_b)
          biased = Add(c, bias)
          scaled = Mul(biased, layer_scale)
          y = Add(x, scaled)
          z = MatMul(half, w_z)
        }""",
        {
            "w_a": normal(1, 16, 24),
            "w_b": normal(2, 24, 16),
            "bias": normal(3, 16),
            "layer_scale": np.linspace(0.5, 2, 16, dtype=np.float32),
            "w_z": normal(4, 16, 8),
        },
    )


@case("fold_scales", "A gate of each step: the steps share the weight in front and cannot share the factor.")
def fold_scales__refused() -> onnx.ModelProto:
    return graph_text(
        """
        steps (float[4,16] x) => (float[4,16] z) {
          a = MatMul(x, w)
          b = Mul(a, gate_0)
          y = Relu(b)
          c = MatMul(y, w)
          d = Mul(c, gate_1)
          z = Relu(d)
        }""",
        {
            "w": normal(1, 16, 16),
            "gate_0": np.linspace(0.5, 1, 16, dtype=np.float32),
            "gate_1": np.linspace(1, 2, 16, dtype=np.float32),
        },
    )


@case("fold_scales", "The language head reads the embedding's table too, and wants it as it is.")
def fold_scales__tied() -> onnx.ModelProto:
    return graph_text(
        """
        text (int64[1,4] tokens) => (float[1,4,16] logits) <float root = {4}> {
          rows = Gather(table, tokens)
          embedded = Mul(rows, root)
          hidden = Relu(embedded)
          head = Transpose<perm = [1, 0]>(table)
          logits = MatMul(hidden, head)
        }""",
        {"table": normal(1, 16, 16)},
    )
