"""The golden cases: for each pass the smallest graphs that show its point, a variant, and a refusal.

Each case becomes `golden/PASS/NAME.onnx`, with what the case needs in the model's metadata, and two texts, which
`pytest --update-golden` writes and a reviewer reads as the explanation of the pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx
from pass_graphs import Array, graph_text, normal

from pi05c.golden import METADATA_KEY

EXACT = 1e-6
"""Relative error that float32 rounding explains in graphs of this size."""

Range = tuple[float, float]


@dataclass(frozen=True)
class GoldenCase:
    """One case.

    Attributes:
        graph_pass: the pass that runs, and the folder.
        name: the file's name.
        shows: one sentence.
        build: makes the graph.
        options: of the pass, as text.
        ranges: measured ranges by tensor name, and the range that the inputs are drawn from; None for no calibration.
        rows: sampled rows by tensor name.
        limit: relative L2 error of the outputs that the case allows.
        why: where the error comes from.
    """

    graph_pass: str
    name: str
    shows: str
    build: Callable[[], onnx.ModelProto]
    options: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, Range] | None = None
    rows: Mapping[str, Array] = field(default_factory=dict)
    limit: float = EXACT
    why: str = "float32 rounding"

    def model(self) -> onnx.ModelProto:
        """The graph, with what the case needs in its metadata."""
        model = self.build()
        ranges = self.ranges
        entry = {
            "shows": self.shows,
            "options": dict(self.options),
            "low": None if ranges is None else {name: low for name, (low, _) in ranges.items()},
            "high": None if ranges is None else {name: high for name, (_, high) in ranges.items()},
            "limit": self.limit,
            "why": self.why,
        }
        if self.rows:
            entry["rows"] = {name: values.tolist() for name, values in self.rows.items()}
        model.metadata_props.add(key=METADATA_KEY, value=json.dumps(entry, sort_keys=True))
        return model


CASES: list[GoldenCase] = []

Build = Callable[[], onnx.ModelProto]


def case(
    graph_pass: str,
    shows: str,
    *,
    options: Mapping[str, str] | None = None,
    ranges: Mapping[str, Range] | None = None,
    rows: Mapping[str, Array] | None = None,
    limit: float = EXACT,
    why: str = "float32 rounding",
) -> Callable[[Build], Build]:
    """Register a builder, called `PASS__NAME`, as a case."""

    def register(build: Build) -> Build:
        prefix, name = build.__name__.split("__")
        assert prefix == graph_pass
        CASES.append(
            GoldenCase(graph_pass, name, shows, build, options or {}, ranges, rows or {}, limit, why)
        )
        return build

    return register


def bfloat16(seed: int, *shape: int) -> Array:
    """A weight as checkpoints store it."""
    return normal(seed, *shape, dtype=ml_dtypes.bfloat16)


FLOAT16_ROUNDING = "float16 keeps 11 bits: 2^-11 = 4.9e-4 for each rounding"
BFLOAT16_ROUNDING = "bfloat16 keeps 8 bits: 2^-8 = 3.9e-3 for each rounding"
FP8_ROUNDING = "E4M3 keeps 4 bits: half a step is 2^-4 of a value, averaged over the products of a row"


# canonicalize


@case("canonicalize", "A weight is stored as its MatMul reads it, in the type of the checkpoint.")
def canonicalize__weight_as_read() -> onnx.ModelProto:
    return graph_text(
        """
        linear (float[2,4,32] x) => (float[2,4,48] y) {
          w.float32 = Cast<to = 1>(w)
          w.t = Transpose<perm = [1, 0]>(w.float32)
          y = MatMul(x, w.t)
        }""".replace("w.", "w_"),
        {"w": bfloat16(1, 48, 32)},
    )


@case("canonicalize", "A Gemm of a TorchScript export becomes MatMul and Add, its weight transposed once.")
def canonicalize__gemm() -> onnx.ModelProto:
    model = graph_text(
        """
        torch_jit (float[4,32] input) => (float[4,16] output) {
          hidden = Gemm<transB = 1>(input, fc1_weight, fc1_bias)
          act = Relu(hidden)
          output = Gemm<alpha = 1.0, beta = 1.0>(act, fc2_weight, fc2_bias)
        }""",
        {
            "fc1_weight": normal(1, 24, 32),
            "fc1_bias": normal(2, 24),
            "fc2_weight": normal(3, 24, 16),
            "fc2_bias": normal(4, 16),
        },
    )
    names = {name: name.replace("_", ".", 1) for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")}
    names |= {"hidden": "/fc1/Gemm_output_0", "act": "/act/Relu_output_0"}
    return _renamed(model, names)


def _renamed(model: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """With names that ONNX's text form cannot spell."""
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        node.name = node.output[0].replace("_output_0", "")
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    return model


@case("canonicalize", "A Gemm with a transposed left factor, or with alpha other than 1, stays a Gemm.")
def canonicalize__gemm_refused() -> onnx.ModelProto:
    return graph_text(
        """
        gemms (float[32,4] x) => (float[4,16] y, float[32,8] z) {
          y = Gemm<transA = 1>(x, w)
          z = Gemm<alpha = 0.5>(x, v)
        }""",
        {"w": normal(1, 32, 16), "v": normal(2, 4, 8)},
    )


@case(
    "canonicalize",
    "A shape computed from a static shape becomes a constant, and what then does nothing goes.",
)
def canonicalize__static_shape() -> onnx.ModelProto:
    return graph_text(
        """
        heads (float[2,6,32] x) => (float[2,4,6,8] q)
          <int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[2] tail = {4, 8}, int64[3] same = {2, 6, 32}> {
          shape = Shape(x)
          batch = Gather<axis = 0>(shape, zero)
          rows = Gather<axis = 0>(shape, one)
          batch1 = Unsqueeze(batch, first)
          rows1 = Unsqueeze(rows, first)
          target = Concat<axis = 0>(batch1, rows1, tail)
          copied = Identity(x)
          same_type = Cast<to = 1>(copied)
          unmoved = Reshape(same_type, same)
          split = Reshape(unmoved, target)
          q = Transpose<perm = [0, 2, 1, 3]>(split)
        }"""
    )


@case("canonicalize", "Folding stops where it would make the file larger: a mask of [64, 64] stays computed.")
def canonicalize__no_growth() -> onnx.ModelProto:
    return graph_text(
        """
        causal (float[1,64,64] logits) => (float[1,64,64] masked)
          <float lowest = {-1e9}, float zero = {0}, int64 start = {0}, int64 end = {64}, int64 step = {1}, int64[1] row = {1}> {
          positions = Range(start, end, step)
          column = Unsqueeze(positions, row)
          allowed = LessOrEqual(positions, column)
          mask = Where(allowed, zero, lowest)
          masked = Add(logits, mask)
        }"""
    )


@case(
    "canonicalize",
    "Nodes without a name get one; so does the second of two tensors of one name in two scopes.",
)
def canonicalize__names() -> onnx.ModelProto:
    return graph_text(
        """
        scopes (float[4] x, bool c) => (float[4] y) {
          left = Neg(x)
          y = If(c) <
            then_branch = yes () => (float[4] out) { t = Relu(left)  out = Exp(t) },
            else_branch = no () => (float[4] out) { t = Abs(left)  out = Neg(t) }>
        }""".replace("  out", "\nout"),
        named=False,
    )


@case(
    "canonicalize",
    "Bodies count: what is constant in a loop's body folds, and a no-op on a captured tensor goes.",
)
def canonicalize__loop_body() -> onnx.ModelProto:
    return graph_text(
        """
        steps (float[1,4] noise, float[1,4] bias) => (float[1,4] x)
          <int64 trip = {3}, bool go = {1}, float minus_one = {-1}, float count = {3}> {
          copy = Identity(bias)
          x = Loop(trip, go, noise) <
            body = step (int64 i, bool again, float[1,4] x_in) => (bool keep, float[1,4] x_out) {
              keep = Identity(again)
              dt = Div(minus_one, count)
              v = Add(x_in, copy)
              scaled = Mul(v, dt)
              x_out = Add(x_in, scaled)
            }>
        }"""
    )


# lower_precision


@case(
    "lower_precision",
    "Weights stay as stored with a Cast behind each; inputs and outputs stay float32.",
    ranges={"x": (-3, 3), "up": (-4, 4), "down": (-4, 4), "y": (-5, 5)},
    limit=1e-3,
    why=FLOAT16_ROUNDING,
)
def lower_precision__mlp() -> onnx.ModelProto:
    return graph_text(
        """
        mlp (float[4,32] x) => (float[4,32] y) {
          w1f = Cast<to = 1>(w1)
          up = MatMul(x, w1f)
          act = Relu(up)
          w2f = Cast<to = 1>(w2)
          down = MatMul(act, w2f)
          y = Add(x, down)
        }""",
        {"w1": bfloat16(1, 32, 48), "w2": bfloat16(2, 48, 32)},
    )


@case(
    "lower_precision",
    "to=bfloat16: a weight stored in bfloat16 is read without a Cast.",
    options={"to": "bfloat16"},
    ranges={"x": (-3, 3), "y": (-4, 4)},
    limit=8e-3,
    why="bfloat16 keeps 8 bits: 2^-8 = 3.9e-3 for each rounding",
)
def lower_precision__bfloat16() -> onnx.ModelProto:
    return graph_text(
        """
        linear (float[4,32] x) => (float[4,16] y) {
          wf = Cast<to = 1>(w)
          product = MatMul(x, wf)
          y = Add(product, b)
        }""",
        {"w": bfloat16(1, 32, 16), "b": normal(2, 16)},
    )


@case(
    "lower_precision",
    "What reaches beyond 65504, or stays below the smallest normal number, computes in float32.",
    ranges={"x": (-300, 300), "square": (0, 90000), "mean": (0, 30000), "tiny": (-3e-5, 3e-5), "y": (-3, 3)},
    limit=2e-3,
    why=FLOAT16_ROUNDING,
)
def lower_precision__guarded() -> onnx.ModelProto:
    return graph_text(
        """
        statistics (float[4,32] x) => (float[4,32] y, float[4,32] t)
          <float inverse = {1e-7}, int64[1] last = {-1}, float hundred = {100}> {
          square = Mul(x, x)
          mean = ReduceMean<keepdims = 1>(square, last)
          root = Sqrt(mean)
          y = Div(x, root)
          tiny = Mul(x, inverse)
          t = Mul(tiny, hundred)
        }"""
    )


@case(
    "lower_precision",
    "Without ranges constants still guard: a mask of -2.38e38 would become -inf, so it is added in float32.",
    limit=1e-3,
    why=FLOAT16_ROUNDING,
)
def lower_precision__constants_guard() -> onnx.ModelProto:
    return graph_text(
        """
        masked (float[1,4,32] q, float[1,32,6] k, bool[1,1,6] valid) => (float[1,4,6] probs)
          <float zero = {0}, float lowest = {-2.3819763e38}> {
          logits = MatMul(q, k)
          mask = Where(valid, zero, lowest)
          masked = Add(logits, mask)
          probs = Softmax<axis = -1>(masked)
        }"""
    )


@case(
    "lower_precision",
    "A Cast to float32 inside the region follows it; one from integers makes float16 at once.",
    ranges={"x": (-3, 3), "scaled": (-40, 40), "y": (-40, 40)},
    limit=1e-3,
    why=FLOAT16_ROUNDING,
)
def lower_precision__existing_cast() -> onnx.ModelProto:
    return graph_text(
        """
        casts (float[4,32] x, int64[4,1] n) => (float[4,32] y) {
          half = Cast<to = 10>(x)
          again = Cast<to = 1>(half)
          count = Cast<to = 1>(n)
          scaled = Mul(again, count)
          y = Relu(scaled)
        }"""
    )


@case(
    "lower_precision",
    "In the branches of an If each node has one precision, captures are cast, and a Resize keeps float32 scales.",
    ranges={"x": (-4, 4), "hidden": (-4, 4), "y": (-8, 8), "small": (-8, 8), "large": (-8, 8)},
    limit=1e-3,
    why=FLOAT16_ROUNDING,
)
def lower_precision__if_branch() -> onnx.ModelProto:
    return graph_text(
        """
        branches (float[4,32] x, bool c) => (float[1,1,8,64] y) {
          hidden = Relu(x)
          y = If(c) <
            then_branch = yes () => (float[1,1,8,64] large) {
              product = Gemm(hidden, w)
              image = Constant<value_ints = [1, 1, 4, 32]>()
              picture = Reshape(product, image)
              twice = Constant<value_floats = [1.0, 1.0, 2.0, 2.0]>()
              large = Resize<mode = "nearest">(picture, , twice)
            },
            else_branch = no () => (float[1,1,8,64] flat) {
              size = Constant<value_ints = [1, 1, 4, 32]>()
              small = Reshape(hidden, size)
              double = Constant<value_floats = [1.0, 1.0, 2.0, 2.0]>()
              flat = Resize<mode = "nearest">(small, , double)
            }>
        }""",
        {"w": normal(1, 32, 32)},
    )


@case(
    "lower_precision",
    "A loop carries float32; what its body computes is float16.",
    ranges={"noise": (-3, 3)},
    limit=2e-3,
    why=FLOAT16_ROUNDING,
)
def lower_precision__loop() -> onnx.ModelProto:
    return graph_text(
        """
        steps (float[4,32] noise) => (float[4,32] x)
          <int64 trip = {3}, bool go = {1}, float dt = {-0.1}> {
          x = Loop(trip, go, noise) <
            body = step (int64 i, bool again, float[4,32] x_in) => (bool keep, float[4,32] x_out) {
              keep = Identity(again)
              v = MatMul(x_in, w)
              scaled = Mul(v, dt)
              x_out = Add(x_in, scaled)
            }>
        }""",
        {"w": normal(1, 32, 32)},
    )


@case(
    "lower_precision",
    "Where every value is out of range nothing changes.",
    ranges={"x": (-1e5, 1e5), "energy": (0, 1e12)},
    limit=0.0,
    why="nothing changes",
)
def lower_precision__refused() -> onnx.ModelProto:
    return graph_text(
        """
        energy (float[4,32] x) => (float[4,1] energy) <int64[1] last = {-1}> {
          size = Abs(x)
          square = Mul(size, size)
          energy = ReduceSum<keepdims = 1>(square, last)
        }"""
    )


# pin_fp32


@case(
    "pin_fp32",
    "The scale and the mask between QK^T and softmax run in float32 with it, cast once on the way in and out.",
    limit=2e-3,
    why=FLOAT16_ROUNDING,
)
def pin_fp32__softmax() -> onnx.ModelProto:
    return graph_text(
        """
        attention (float16[1,2,4,8] q, float16[1,2,8,6] k, float16[1,2,6,8] v, float16[1,1,4,6] mask) => (float16[1,2,4,8] y)
          <float16 scale = {0.35355338}> {
          logits = MatMul(q, k)
          scaled = Mul(logits, scale)
          masked = Add(scaled, mask)
          probs = Softmax<axis = -1>(masked)
          y = MatMul(probs, v)
        }"""
    )


@case(
    "pin_fp32",
    "A norm that lower_precision made float16 reads its weight and epsilon again as they are stored.",
    limit=2e-3,
    why=FLOAT16_ROUNDING,
)
def pin_fp32__rms_norm() -> onnx.ModelProto:
    return graph_text(
        """
        norm (float16[1,4,32] x) => (float16[1,4,16] y)
          <float eps = {1e-6}, float one = {1}, int64[1] last = {-1}, float two = {2}> {
          exponent = Cast<to = 10>(two)
          square = Pow(x, exponent)
          mean = ReduceMean<keepdims = 1>(square, last)
          eps16 = Cast<to = 10>(eps)
          shifted = Add(mean, eps16)
          root = Sqrt(shifted)
          inverse = Reciprocal(root)
          unit = Mul(x, inverse)
          w16 = Cast<to = 10>(w)
          one16 = Cast<to = 10>(one)
          gain = Add(w16, one16)
          normed = Mul(unit, gain)
          p16 = Cast<to = 10>(p)
          y = MatMul(normed, p16)
        }""",
        {"w": bfloat16(1, 32), "p": bfloat16(2, 32, 16)},
    )


@case(
    "pin_fp32",
    "adaRMS: the step's scale and shift belong to the norm; the gate and the branch behind it do not.",
    limit=2e-3,
    why=FLOAT16_ROUNDING,
)
def pin_fp32__ada_rms() -> onnx.ModelProto:
    return graph_text(
        """
        norm (float16[1,4,32] x, float16[1,1,96] modulation) => (float16[1,4,32] y)
          <float16 eps = {1e-5}, float16 one = {1}, int64[1] last = {-1}, int64[3] sizes = {32, 32, 32}> {
          scale, shift, gate = Split<axis = -1>(modulation, sizes)
          square = Mul(x, x)
          mean = ReduceMean<keepdims = 1>(square, last)
          shifted = Add(mean, eps)
          root = Sqrt(shifted)
          unit = Div(x, root)
          gain = Add(scale, one)
          scaled = Mul(unit, gain)
          normed = Add(scaled, shift)
          branch = MatMul(normed, w)
          gated = Mul(branch, gate)
          y = Add(x, gated)
        }""",
        {"w": normal(1, 32, 32, dtype=np.float16)},
    )


@case(
    "pin_fp32",
    "The unrolled accumulation x + dt * v runs in float32 from step to step, without rounding x in between.",
    limit=2e-3,
    why=FLOAT16_ROUNDING,
)
def pin_fp32__flow() -> onnx.ModelProto:
    return graph_text(
        """
        steps (float16[1,4,32] noise) => (float16[1,4,32] actions) <float16 dt = {-0.5}> {
          v0 = MatMul(noise, w)
          d0 = Mul(v0, dt)
          x1 = Add(noise, d0)
          v1 = MatMul(x1, w)
          d1 = Mul(v1, dt)
          actions = Add(x1, d1)
        }""",
        {"w": normal(1, 32, 32, dtype=np.float16)},
    )


@case(
    "pin_fp32",
    "RoPE and the angles behind its cosine and sine run in float32: at position 967 a float16 angle is off by 0.25.",
    limit=2e-3,
    why=FLOAT16_ROUNDING,
)
def pin_fp32__rope() -> onnx.ModelProto:
    return graph_text(
        """
        rotate (float16[1,1,4,8] q, int64[4,1] position) => (float16[1,1,4,8] y)
          <float16[4] frequency = {1, 0.1, 0.01, 0.001}, int64[1] zero = {0}, int64[1] half = {4}, int64[1] end = {8}, int64[1] last = {-1}> {
          p = Cast<to = 10>(position)
          angle = Mul(p, frequency)
          both = Concat<axis = -1>(angle, angle)
          cos = Cos(both)
          sin = Sin(both)
          x1 = Slice(q, zero, half, last)
          x2 = Slice(q, half, end, last)
          minus = Neg(x2)
          turned = Concat<axis = -1>(minus, x1)
          straight = Mul(q, cos)
          crossed = Mul(turned, sin)
          y = Add(straight, crossed)
        }"""
    )


@case(
    "pin_fp32",
    "Between two regions a Cast to fewer bits is bypassed: the rotation reads cosine and sine in float32.",
    limit=4e-3,
    why=BFLOAT16_ROUNDING,
)
def pin_fp32__rounded_tables() -> onnx.ModelProto:
    return graph_text(
        """
        rotate (float16[1,1,4,8] q, float16[4,1] position) => (float16[1,1,4,8] y)
          <float16[4] frequency = {1, 0.1, 0.01, 0.001}> {
          angle = Mul(position, frequency)
          cos16 = Cos(angle)
          sin16 = Sin(angle)
          cos = Cast<to = 16>(cos16)
          sin = Cast<to = 16>(sin16)
          rounded = Cast<to = 16>(q)
          x1, x2 = Split<axis = -1, num_outputs = 2>(rounded)
          a = Mul(x1, cos)
          b = Mul(x2, sin)
          real = Sub(a, b)
          c = Mul(x2, cos)
          d = Mul(x1, sin)
          imaginary = Add(c, d)
          rotated = Concat<axis = -1>(real, imaginary)
          y = Cast<to = 10>(rotated)
        }"""
    )


@case(
    "pin_fp32",
    "Time and x of a loop run and are carried in float32, up to Casts behind which the layers stay in float16.",
    limit=2e-3,
    why=FLOAT16_ROUNDING,
)
def pin_fp32__time() -> onnx.ModelProto:
    return graph_text(
        """
        steps (float16[1,4,32] noise) => (float16[1,4,32] actions)
          <float16 start = {1}, float16 dt = {-0.5}, int64 trip = {2}, bool go = {1}> {
          actions, late = Loop(trip, go, noise, start) <
            body = step (int64 i, bool again, float16[1,4,32] x, float16 t) => (bool keep, float16[1,4,32] next, float16 after) {
              keep = Identity(again)
              wave = Mul(t, w)
              phase = Sin(wave)
              known = Add(x, phase)
              v = MatMul(known, m)
              d = Mul(v, dt)
              next = Add(x, d)
              after = Add(t, dt)
            }>
        }""",
        {"w": normal(1, 32, dtype=np.float16), "m": normal(2, 32, 32, dtype=np.float16)},
    )


@case("pin_fp32", "An MLP alone has nothing that needs float32.", limit=0.0, why="nothing changes")
def pin_fp32__refused() -> onnx.ModelProto:
    return graph_text(
        """
        mlp (float16[4,32] x) => (float16[4,32] y) {
          up = MatMul(x, w)
          y = Relu(up)
        }""",
        {"w": normal(1, 32, 32, dtype=np.float16)},
    )


# quantize_linears


@case(
    "quantize_linears",
    "Q and K read one quantized activation; each weight is stored in FP8 as its MatMul reads it.",
    ranges={"x": (-3.5, 3.5)},
    limit=0.05,
    why=FP8_ROUNDING,
)
def quantize_linears__shared_activation() -> onnx.ModelProto:
    return graph_text(
        """
        projections (float16[4,32] x) => (float16[4,32] q, float16[4,16] k) {
          wq16 = Cast<to = 10>(wq)
          q = MatMul(x, wq16)
          wk16 = Cast<to = 10>(wk)
          wkt = Transpose<perm = [1, 0]>(wk16)
          k = MatMul(x, wkt)
        }""",
        {"wq": bfloat16(1, 32, 32), "wk": bfloat16(2, 16, 32)},
    )


@case(
    "quantize_linears",
    "A Gemm keeps its bias in the working precision and loses transB, for the weight is stored transposed.",
    ranges={"x": (-3.5, 3.5)},
    limit=0.05,
    why=FP8_ROUNDING,
)
def quantize_linears__gemm() -> onnx.ModelProto:
    return graph_text(
        """
        linear (float16[4,32] x) => (float16[4,16] y) {
          y = Gemm<transB = 1>(x, w, b)
        }""",
        {"w": normal(1, 16, 32, dtype=np.float16), "b": normal(2, 16, dtype=np.float16)},
    )


@case(
    "quantize_linears",
    "Two steps share one weight: it is stored once, dequantized once, and each step has its own activation scale.",
    ranges={"x": (-3.5, 3.5), "act": (0, 9)},
    limit=0.09,
    why=f"{FP8_ROUNDING}; twice",
)
def quantize_linears__shared_weight() -> onnx.ModelProto:
    return graph_text(
        """
        steps (float16[4,32] x) => (float16[4,32] y) {
          first = MatMul(x, w)
          act = Relu(first)
          y = MatMul(act, w)
        }""",
        {"w": normal(1, 32, 32, dtype=np.float16)},
    )


@case(
    "quantize_linears",
    "The language model in NVFP4: blocks along what is summed, activations quantized as they come; the rest in FP8.",
    options={"nvfp4": "*gate"},
    ranges={"x": (-3.5, 3.5), "gate": (-20, 20)},
    limit=0.2,
    why="FP4 rounds each factor to 2 significant bits",
)
def quantize_linears__nvfp4() -> onnx.ModelProto:
    return graph_text(
        """
        mlp (float16[1,4,32] x) => (float16[1,4,16] y) {
          gate = MatMul(x, mlp_gate)
          y = MatMul(gate, mlp_down)
        }""",
        {"mlp_gate": normal(1, 32, 32, dtype=np.float16), "mlp_down": normal(2, 32, 16, dtype=np.float16)},
    )


@case(
    "quantize_linears",
    "Rows of the activation were sampled: the codes of the weight make up for one another's rounding errors on them.",
    options={"rounding": "compensated"},
    ranges={"x": (-3.5, 3.5)},
    rows={"x": np.round(normal(3, 8, 32, scale=1.0), 2)},
    limit=0.05,
    why=FP8_ROUNDING,
)
def quantize_linears__sampled_rows() -> onnx.ModelProto:
    return graph_text(
        """
        linear (float16[4,32] x) => (float16[4,16] y) {
          y = MatMul(x, w)
        }""",
        {"w": normal(1, 32, 16, dtype=np.float16)},
    )


@case(
    "quantize_linears",
    "The activation in two terms: what its rounding left is quantized too, and multiplied as further rows.",
    options={"two_terms": "w"},
    ranges={"x": (-3.5, 3.5)},
    limit=0.035,
    why=f"{FP8_ROUNDING}, of the weight alone",
)
def quantize_linears__two_terms() -> onnx.ModelProto:
    return graph_text(
        """
        linear (float16[4,32] x) => (float16[4,16] y) {
          product = MatMul(x, w)
          y = Add(product, b)
        }""",
        {"w": normal(1, 32, 16, dtype=np.float16), "b": normal(2, 16, dtype=np.float16)},
    )


@case(
    "quantize_linears",
    "The two ends of the flow stay in the working precision, and so does what keep names.",
    options={"keep": "*gate,lm_head*"},
    ranges={"hidden": (-4, 4), "gate": (-4, 4)},
    limit=0.05,
    why=FP8_ROUNDING,
)
def quantize_linears__kept() -> onnx.ModelProto:
    return graph_text(
        """
        step (float16[4,32] x) => (float16[4,32] actions) <float16 dt = {-0.1}> {
          hidden = MatMul(x, action_in)
          gate = MatMul(hidden, mlp_gate)
          down = MatMul(gate, mlp_down)
          v = MatMul(down, action_out)
          scaled = Mul(v, dt)
          actions = Add(x, scaled)
        }""",
        {
            name: normal(seed, 32, 32, dtype=np.float16)
            for seed, name in enumerate(["action_in", "mlp_gate", "mlp_down", "action_out"])
        },
    )


@case(
    "quantize_linears",
    "Left alone: an inner size of 24, a single row, a range that is not finite, one that is zero.",
    ranges={"x": (-3, 3), "row": (-3, 3), "wild": (-np.inf, 3), "nothing": (0, 0)},
    limit=0.0,
    why="nothing changes",
)
def quantize_linears__refused() -> onnx.ModelProto:
    return graph_text(
        """
        linears (float16[4,24] x, float16[1,32] row, float16[4,32] wild, float16[4,32] nothing)
            => (float16[4,32] a, float16[1,32] b, float16[4,32] c, float16[4,32] d) {
          a = MatMul(x, narrow)
          b = MatMul(row, w)
          c = MatMul(wild, w)
          d = MatMul(nothing, w)
        }""",
        {"narrow": normal(1, 24, 32, dtype=np.float16), "w": normal(2, 32, 32, dtype=np.float16)},
    )


# insert_attention_qdq


@case(
    "insert_attention_qdq",
    "Q, K, V and the probabilities are quantized; 1/sqrt(d) moves above Q's quantize, K's transpose stays above K's.",
    ranges={"q": (-1.5, 1.5), "k": (-1.5, 1.5), "v": (-4, 4)},
    limit=0.08,
    why=f"{FP8_ROUNDING}; in logits and in the product with V",
)
def insert_attention_qdq__attention() -> onnx.ModelProto:
    return graph_text(
        """
        attention (float16[1,2,4,16] q, float16[1,2,6,16] k, float16[1,2,6,16] v, float[1,1,4,6] mask) => (float16[1,2,4,16] y)
          <float scale = {0.25}> {
          kt = Transpose<perm = [0, 1, 3, 2]>(k)
          logits = MatMul(q, kt)
          wide = Cast<to = 1>(logits)
          scaled = Mul(wide, scale)
          masked = Add(scaled, mask)
          probs = Softmax<axis = -1>(masked)
          narrow = Cast<to = 10>(probs)
          y = MatMul(narrow, v)
        }"""
    )


@case(
    "insert_attention_qdq",
    "Another exporter's spelling: Div by sqrt(d), Where for the mask, keys and values expanded over the query heads.",
    ranges={"q": (-1.5, 1.5), "k": (-1.5, 1.5), "v": (-4, 4)},
    limit=0.08,
    why=f"{FP8_ROUNDING}; in logits and in the product with V",
)
def insert_attention_qdq__other_spelling() -> onnx.ModelProto:
    return graph_text(
        """
        attention (float16[1,2,4,16] q, float16[1,1,6,16] k, float16[1,1,6,16] v, bool[1,1,4,6] allowed) => (float16[1,2,4,16] y)
          <float16 root = {4}, float16 lowest = {-65504}, int64[4] heads = {1, 2, 6, 16}> {
          keys = Expand(k, heads)
          values = Expand(v, heads)
          kt = Transpose<perm = [0, 1, 3, 2]>(keys)
          logits = MatMul(q, kt)
          scaled = Div(logits, root)
          masked = Where(allowed, scaled, lowest)
          probs = Softmax<axis = -1>(masked)
          y = MatMul(probs, values)
        }"""
    )


@case(
    "insert_attention_qdq",
    "Split attention: the prefix's chunk of 64 keys is quantized, the suffix's of 4 keeps the working precision.",
    ranges={"q": (-1.5, 1.5), "kp": (-1.5, 1.5), "ks": (-1.5, 1.5), "vp": (-4, 4), "vs": (-4, 4)},
    limit=0.08,
    why=f"{FP8_ROUNDING}; in logits and in the product with V",
)
def insert_attention_qdq__chunks() -> onnx.ModelProto:
    return graph_text(
        """
        attention (float16[1,1,4,16] q, float16[1,1,16,64] kp, float16[1,1,16,4] ks, float16[1,1,64,16] vp, float16[1,1,4,16] vs)
            => (float16[1,1,4,16] y)
          <float16 scale = {0.25}, int64[2] sizes = {64, 4}> {
          prefix = MatMul(q, kp)
          suffix = MatMul(q, ks)
          logits = Concat<axis = -1>(prefix, suffix)
          scaled = Mul(logits, scale)
          probs = Softmax<axis = -1>(scaled)
          pp, ps = Split<axis = -1>(probs, sizes)
          yp = MatMul(pp, vp)
          ys = MatMul(ps, vs)
          y = Add(yp, ys)
        }"""
    )


@case(
    "insert_attention_qdq",
    "The attention of a part that an option keeps is left alone; without camera and flow everything is prefix.",
    ranges={"q": (-1.5, 1.5), "k": (-1.5, 1.5), "v": (-4, 4)},
    options={"keep": "prefix"},
    limit=0.0,
    why="nothing changes",
)
def insert_attention_qdq__kept() -> onnx.ModelProto:
    return graph_text(
        """
        attention (float16[1,2,4,16] q, float16[1,2,16,6] k, float16[1,2,6,16] v) => (float16[1,2,4,16] y) {
          logits = MatMul(q, k)
          probs = Softmax<axis = -1>(logits)
          y = MatMul(probs, v)
        }"""
    )


@case(
    "insert_attention_qdq",
    "All or none: V has no range, so Q, K and the probabilities are not quantized either.",
    ranges={"q": (-1.5, 1.5), "k": (-1.5, 1.5)},
    limit=0.0,
    why="nothing changes",
)
def insert_attention_qdq__all_or_none() -> onnx.ModelProto:
    return graph_text(
        """
        attention (float16[1,2,4,16] q, float16[1,2,16,6] k, float16[1,2,6,16] v) => (float16[1,2,4,16] y)
          <float16 scale = {0.25}> {
          logits = MatMul(q, k)
          scaled = Mul(logits, scale)
          probs = Softmax<axis = -1>(scaled)
          doubled = Add(v, v)
          y = MatMul(probs, doubled)
        }"""
    )


@case(
    "insert_attention_qdq",
    "Probabilities that something else reads too, here as an output, are no attention to rewrite.",
    ranges={"q": (-1.5, 1.5), "k": (-1.5, 1.5), "v": (-4, 4)},
    limit=0.0,
    why="nothing changes",
)
def insert_attention_qdq__probabilities_read() -> onnx.ModelProto:
    return graph_text(
        """
        attention (float16[1,2,4,16] q, float16[1,2,16,6] k, float16[1,2,6,16] v)
            => (float16[1,2,4,16] y, float16[1,2,4,6] probs) {
          logits = MatMul(q, k)
          probs = Softmax<axis = -1>(logits)
          y = MatMul(probs, v)
        }"""
    )


# disable_conv2d_quant


def _fp8(array: Array, scale: float) -> Array:
    return np.clip(array / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)


_PATCHES = normal(1, 8, 3, 4, 4, scale=0.2)
_FP8_ZERO = np.zeros((), ml_dtypes.float8_e4m3fn)


@case(
    "disable_conv2d_quant",
    "The patch embedding loses the Q/DQ on its input, weight and output.",
    limit=0.2,
    why="the graph before rounds pixels, weights and result to FP8, the one after does not",
)
def disable_conv2d_quant__patch_embedding() -> onnx.ModelProto:
    return graph_text(
        """
        patches (float[1,3,8,8] image) => (float[1,8,2,2] y)
          <float image_scale = {0.01}, float weight_scale = {0.002}, float out_scale = {0.02}> {
          image_codes = QuantizeLinear(image, image_scale, zero)
          image_dq = DequantizeLinear(image_codes, image_scale, zero)
          weight_codes = QuantizeLinear(weight, weight_scale, zero)
          weight_dq = DequantizeLinear(weight_codes, weight_scale, zero)
          conv = Conv<strides = [4, 4]>(image_dq, weight_dq)
          conv_codes = QuantizeLinear(conv, out_scale, zero)
          conv_dq = DequantizeLinear(conv_codes, out_scale, zero)
          y = Relu(conv_dq)
        }""",
        {"zero": _FP8_ZERO, "weight": _PATCHES},
    )


@case(
    "disable_conv2d_quant",
    "A weight that is stored in INT8, with a scale for each output channel, is dequantized at compile time.",
    limit=0.02,
    why="the graph before rounds the pixels to INT8, the one after does not",
)
def disable_conv2d_quant__stored_weight() -> onnx.ModelProto:
    scale = (np.abs(_PATCHES).max(axis=(1, 2, 3)) / 127).astype(np.float32)
    codes = np.round(_PATCHES / scale.reshape(8, 1, 1, 1)).astype(np.int8)
    return graph_text(
        """
        patches (float[1,3,8,8] image) => (float[1,8,2,2] y) <float image_scale = {0.03}, int8 zero = {0}> {
          image_codes = QuantizeLinear(image, image_scale, zero)
          image_dq = DequantizeLinear(image_codes, image_scale, zero)
          weight_dq = DequantizeLinear<axis = 0>(weight, weight_scale)
          y = Conv<strides = [4, 4]>(image_dq, weight_dq)
        }""",
        {"weight": codes, "weight_scale": scale},
    )


@case(
    "disable_conv2d_quant",
    "Q/DQ that another node reads too stay for that node.",
    limit=0.1,
    why="the graph before rounds the pixels to FP8 for the Conv, the one after does not",
)
def disable_conv2d_quant__other_reader() -> onnx.ModelProto:
    return graph_text(
        """
        patches (float[1,3,8,8] image) => (float[1,8,2,2] y, float[1,3,8,8] z) <float image_scale = {0.01}> {
          image_codes = QuantizeLinear(image, image_scale, zero)
          image_dq = DequantizeLinear(image_codes, image_scale, zero)
          y = Conv<strides = [4, 4]>(image_dq, weight)
          z = Relu(image_dq)
        }""",
        {"zero": _FP8_ZERO, "weight": _PATCHES},
    )


@case(
    "disable_conv2d_quant", "A Conv that is not quantized is left as it is.", limit=0.0, why="nothing changes"
)
def disable_conv2d_quant__refused() -> onnx.ModelProto:
    return graph_text(
        """
        patches (float[1,3,8,8] image) => (float[1,8,2,2] y) {
          y = Conv<strides = [4, 4]>(image, weight)
        }""",
        {"weight": _PATCHES},
    )
