"""The golden cases of fold_norms: norms in each spelling, and what reads them."""

from __future__ import annotations

import onnx
from golden_cases import bfloat16, case
from pass_graphs import Array, graph_text, normal

WIDTH = 16

SCALARS = "float two = {2}, float eps = {1e-6}, float one = {1}, int64[1] last = {-1}"


def gain(seed: int, size: int = WIDTH) -> Array:
    """A norm's weight around 1, as LayerNorm and plain RMSNorm store it."""
    return 1 + normal(seed, size, scale=0.3)


def unit(source: str, made: str) -> str:
    """RMSNorm's arithmetic up to the weight."""
    return f"""
          {made}_square = Pow({source}, two)
          {made}_mean = ReduceMean<keepdims = 1>({made}_square, last)
          {made}_shifted = Add({made}_mean, eps)
          {made}_root = Sqrt({made}_shifted)
          {made}_inverse = Reciprocal({made}_root)
          {made} = Mul({source}, {made}_inverse)"""


@case(
    "fold_norms",
    "Gemma's 1 + w goes into the weights of gate and up, behind a Reshape: one Mul a channel less at run time.",
)
def fold_norms__one_plus_weight() -> onnx.ModelProto:
    return graph_text(
        f"""
        gemma (float[2,4,{WIDTH}] x) => (float[8,24] gate, float[8,24] up)
          <{SCALARS}, int64[2] rows = {{8, {WIDTH}}}> {{
          {unit("x", "unit")}
          norm_weight_float = Cast<to = 1>(norm_weight)
          norm_gain = Add(norm_weight_float, one)
          normed = Mul(unit, norm_gain)
          flat = Reshape(normed, rows)
          gate_weight = Cast<to = 1>(w_gate)
          gate = MatMul(flat, gate_weight)
          up_weight_t = Transpose<perm = [1, 0]>(w_up)
          up_weight = Cast<to = 1>(up_weight_t)
          up = MatMul(flat, up_weight)
        }}""",
        {
            "norm_weight": bfloat16(1, WIDTH),
            "w_gate": bfloat16(2, WIDTH, 24),
            "w_up": bfloat16(3, 24, WIDTH),
        },
    )


@case("fold_norms", "LayerNorm's bias, times the linear's weight, joins the linear's own bias.")
def fold_norms__bias() -> onnx.ModelProto:
    return graph_text(
        f"""
        siglip (float[2,4,{WIDTH}] x) => (float[2,4,24] y) {{
          normed = LayerNormalization<axis = -1, epsilon = 1e-6>(x, weight, bias)
          w_float = Cast<to = 1>(w)
          product = MatMul(normed, w_float)
          w_bias_float = Cast<to = 1>(w_bias)
          y = Add(product, w_bias_float)
        }}""",
        {
            "weight": gain(1),
            "bias": normal(2, WIDTH),
            "w": bfloat16(3, WIDTH, 24),
            "w_bias": bfloat16(4, 24),
        },
    )


def _opset_23() -> onnx.ModelProto:
    return graph_text(
        f"""
        operator (float[2,4,{WIDTH}] x) => (float[2,4,24] y) {{
          normed = RMSNormalization<axis = -1, epsilon = 1e-6>(x, weight)
          y = MatMul(normed, w)
        }}""",
        {"weight": gain(1), "w": normal(2, WIDTH, 24)},
        opset=23,
    )


@case("fold_norms", "The RMSNormalization of opset 23 must have a weight: ones are left.")
def fold_norms__operator() -> onnx.ModelProto:
    return _opset_23()


def steps(scales: tuple[str, str]) -> onnx.ModelProto:
    """Two denoising steps as unrolled: one weight, scales and shifts of each step, one bias at the end."""
    body = "".join(
        f"""
          {unit(source, f"unit{step}")}
          scaled{step} = Mul(unit{step}, {scales[step]})
          normed{step} = Add(scaled{step}, shift{step})
          product{step} = MatMul(normed{step}, w_out)
          v{step} = Add(product{step}, out_bias)"""
        for step, source in enumerate(("noise", "v0"))
    )
    return graph_text(
        f"""
        unrolled (float[1,4,{WIDTH}] noise) => (float[1,4,{WIDTH}] v1) <{SCALARS}> {{
          {body}
        }}""",
        {
            "scale0": gain(1)[None, None],
            "scale1": gain(2)[None, None],
            "shift0": normal(3, 1, 1, WIDTH),
            "shift1": normal(4, 1, 1, WIDTH),
            "w_out": normal(5, WIDTH, WIDTH),
            "out_bias": normal(6, WIDTH),
        },
    )


@case(
    "fold_norms",
    "adaRMS of two steps: each shift joins the bias behind it; scales that differ stay, as the steps share a weight.",
)
def fold_norms__ada_rms() -> onnx.ModelProto:
    return steps(("scale0", "scale1"))


@case("fold_norms", "Steps that share the norm and the weight: the weight is multiplied once.")
def fold_norms__shared_by_steps() -> onnx.ModelProto:
    return steps(("scale0", "scale0"))


@case(
    "fold_norms", "Something other than a linear reads what the norm makes, or what scales it is no constant."
)
def fold_norms__refused() -> onnx.ModelProto:
    return graph_text(
        f"""
        refused (float[2,4,{WIDTH}] x, float[2,1,{WIDTH}] scale) => (float[2,4,24] y, float[2,4,24] z, float[2,4,{WIDTH}] act) <{SCALARS}> {{
          normed = LayerNormalization<axis = -1>(x, weight)
          y = MatMul(normed, w)
          act = Sigmoid(normed)
          {unit("x", "unit")}
          scale_one = Add(scale, one)
          modulated = Mul(unit, scale_one)
          z = MatMul(modulated, w_z)
        }}""",
        {"weight": gain(1), "w": normal(2, WIDTH, 24), "w_z": normal(3, WIDTH, 24)},
    )
