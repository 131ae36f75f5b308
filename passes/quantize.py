"""Quantize-dequantize pairs in FP8 (E4M3), as TensorRT wants them: nothing between DQ and its MatMul."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.compensation import Compensated
from pi05c.graph.dtypes import BFLOAT16, FLOAT8E4M3FN, FLOAT16, FLOAT32, LARGEST, name_of, to_numpy
from pi05c.graph.edit import Editor, producer
from pi05c.graph.weights import Quantized, Transposed, Weight, weight_of
from pi05c.passes.patterns.linear import Linear
from pi05c.passes.patterns.walk import origin

E4M3_MAX = LARGEST[FLOAT8E4M3FN]


WEIGHT_SCALES = 8
"""Scales tried for a weight: amax / 448 times 2^(k/8), one octave, after which the rounding repeats."""


def activation_scale(amax: float, dtype: np.dtype[np.generic]) -> np.ndarray | None:
    """The power of two from which on `amax` fits E4M3; None where `dtype` has no such positive number.

    A power of two scales exactly, so calibration data that differ a little give the same engine; of E4M3's 15
    binades it costs less than one.
    """
    if not math.isfinite(amax) or amax <= 0:
        return None
    return _stored(2.0 ** math.ceil(math.log2(amax / E4M3_MAX)), dtype)


def weight_scale(weight: Weight, dtype: np.dtype[np.generic], *, fitted: bool = True) -> np.ndarray | None:
    """Of `WEIGHT_SCALES` scales that lose nothing to saturation, the one with the least squared rounding error.

    None where the weight is zero, not finite, or too small for a scale in `dtype`. Without `fitted` the first of them,
    which takes less reading.
    """
    amax = weight.amax()
    if not math.isfinite(amax) or amax <= 0:
        return None
    wanted = [amax / E4M3_MAX * 2 ** (step / WEIGHT_SCALES) for step in range(WEIGHT_SCALES)]
    scales = [scale for value in wanted if (scale := _stored(value, dtype)) is not None]
    if not fitted:
        return scales[0] if scales else None
    values, counts = weight.histogram()
    return min(scales, key=lambda scale: _rounding_error(values, counts, float(scale)), default=None)


def _stored(scale: float, dtype: np.dtype[np.generic]) -> np.ndarray | None:
    """A scale as the graph stores it, None where that is zero or infinite."""
    with np.errstate(over="ignore", under="ignore"):
        stored = np.asarray(scale).astype(dtype)
    value = float(stored)
    return stored if math.isfinite(value) and value > 0 else None


def _rounding_error(values: np.ndarray, counts: np.ndarray, scale: float) -> float:
    codes = np.clip(values / np.float32(scale), -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    error = codes.astype(np.float64) * scale - values
    return float(np.dot(error * error, counts))


class Quantizer:
    """Adds Q/DQ in one scope; a tensor gets one pair and a weight one DQ, however many readers they have."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._pairs: dict[tuple[int, float], gs.Variable] = {}
        self._weights: dict[int, gs.Variable] = {}
        self._zero: gs.Constant | None = next(filter(None, map(_zero_point, editor.scope.nodes)), None)

    def activation(self, tensor: gs.Tensor, scale: np.ndarray) -> gs.Variable:
        """`tensor` through Quantize and Dequantize with `scale`, in the tensor's precision."""
        key = (id(tensor), float(scale))
        if key not in self._pairs:
            name = origin(tensor).name
            stored = self.editor.constant(f"{name}.scale", scale)
            codes = self.editor.add(
                "QuantizeLinear",
                [tensor, stored, self._zero_point()],
                f"{name}.fp8",
                dtype=FLOAT8E4M3FN,
                shape=tensor.shape,
            )
            self._pairs[key] = self.editor.add(
                "DequantizeLinear",
                [codes, stored, self._zero_point()],
                f"{name}.dequantized",
                dtype=scale.dtype,
                shape=tensor.shape,
            )
        return self._pairs[key]

    def weight(self, linear: Linear, scale: np.ndarray, rows: Sequence[Weight] = ()) -> gs.Variable:
        """The linear's weight stored in FP8 as its MatMul reads it, through Dequantize.

        Args:
            rows: that its activation is made of, to make up for rounding errors on; none: each weight is rounded to
                the nearest.
        """
        key = id(linear.weight)
        if key not in self._weights:
            values = weight_of(linear.weight)
            if linear.transposed:
                values = Transposed(values, [1, 0])
            name = linear.weight.name
            rounded: Weight = Quantized(values, scale, FLOAT8E4M3FN)
            if rows:
                rounded = Compensated(values, scale, FLOAT8E4M3FN, rows)
            codes = self.editor.constant(f"{name}.fp8", rounded)
            stored = self.editor.constant(f"{name}.scale", scale)
            self._weights[key] = self.editor.add(
                "DequantizeLinear",
                [codes, stored, self._zero_point()],
                f"{name}.dequantized",
                dtype=scale.dtype,
                shape=codes.shape,
            )
        return self._weights[key]

    def _zero_point(self) -> gs.Constant:
        if self._zero is None:
            self._zero = self.editor.constant("fp8.zero_point", np.zeros((), ml_dtypes.float8_e4m3fn))
        return self._zero


def is_quantized(tensor: gs.Tensor) -> bool:
    """Whether a tensor comes from a DequantizeLinear, straight or through casts."""
    node = producer(tensor)
    while node is not None and node.op == "Cast":
        node = producer(node.inputs[0])
    return node is not None and node.op == "DequantizeLinear"


def precision_obstacle(node: gs.Node) -> str:
    """Why what a MatMul or Gemm reads cannot be quantized, empty where nothing speaks against it."""
    dtype = working_precision(node)
    return "" if dtype in (FLOAT32, FLOAT16, BFLOAT16) else f"it computes in {name_of(dtype)}"


def working_precision(node: gs.Node) -> np.dtype[np.generic] | None:
    """The type in which a MatMul or Gemm computes."""
    return to_numpy(node.outputs[0].dtype)


def _zero_point(node: gs.Node) -> gs.Constant | None:
    """The FP8 zero point that a node of an earlier pass reads."""
    if node.op in ("QuantizeLinear", "DequantizeLinear") and len(node.inputs) > 2:
        zero = node.inputs[2]
        if isinstance(zero, gs.Constant) and to_numpy(zero.dtype) == FLOAT8E4M3FN and tuple(zero.shape) == ():
            return zero
    return None
