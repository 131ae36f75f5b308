"""Linears in many spellings, activations and norms."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from random_graphs.core import (
    BFLOAT16,
    EPSILON,
    FLOAT,
    FLOAT8,
    HALF,
    INT8,
    INT64,
    Core,
    T,
    numpy_type,
)

_LINEARS = (
    *("by_matmul", "by_matmul", "by_gemm", "by_left_factor", "by_einsum", "by_batched_weight", "by_conv"),
    *("by_quantized_weight", "by_fp4_weight"),
)


class Linears(Core):
    def linear(self, x: T, columns: int | None = None) -> T:
        columns = self.rng.choice((2, 4, 8, 16)) if columns is None else columns
        spelling = self.rng.choice(_LINEARS)
        made: T = getattr(self, spelling)(x, columns)
        return self.biased(made) if self.chance(0.3) else made

    def biased(self, x: T) -> T:
        bias = self.weight(x.width, scale=0.1)
        return self.binary("Add", *self.rng.sample([x, bias], 2))

    def stored(self, rows: int, columns: int) -> T:
        """A weight as a checkpoint holds it: maybe narrower, maybe transposed, with what undoes that behind it."""
        narrow = self.rng.choice((self.dtype, self.dtype, BFLOAT16, HALF))
        turned = self.chance(0.4)
        weight = self.weight(
            *((columns, rows) if turned else (rows, columns)), dtype=narrow, scale=rows**-0.5
        )
        steps = ["cast"] if narrow != self.dtype else []
        steps += ["turn"] if turned else []
        for step in self.rng.sample(steps, len(steps)):
            weight = self.cast(weight, self.dtype) if step == "cast" else self.transpose(weight, 1, 0)
        return self.same("Identity", weight) if self.chance(0.1) else weight

    def by_matmul(self, x: T, columns: int) -> T:
        return self.matmul(x, self.stored(x.width, columns))

    def by_left_factor(self, x: T, columns: int) -> T:
        weight = self.weight(columns, x.width, scale=x.width**-0.5)
        return self.transpose(self.matmul(weight, self.transpose(x, 0, 2, 1)), 0, 2, 1)

    def by_gemm(self, x: T, columns: int) -> T:
        flat = self.reshape(x, self.batch * self.rows, x.width)
        turned, left = self.chance(0.5), self.chance(0.1)
        weight = self.weight(*((columns, x.width) if turned else (x.width, columns)), scale=x.width**-0.5)
        inputs = [self.transpose(flat, 1, 0) if left else flat, weight]
        attrs: dict[str, Any] = {}
        if turned or self.chance(0.2):
            attrs["transB"] = int(turned)
        if left:
            attrs["transA"] = 1
        if self.chance(0.2):
            attrs["alpha"] = 0.5
        if self.chance(0.5):
            inputs.append(self.weight(*self.rng.choice(((columns,), (1, columns), ())), scale=0.1))
            if self.chance(0.3):
                attrs["beta"] = 2.0
        made = self.node("Gemm", inputs, (x.dtype, (self.batch * self.rows, columns)), **attrs)
        return self.unflatten(made, x)

    def unflatten(self, flat: T, like: T) -> T:
        shape = (self.batch, self.rows, flat.width)
        if not (self.dynamic_batch or self.dynamic_rows):
            return self.reshape(flat, *shape, static=False)
        sizes = self.node("Shape", [like], (INT64, (2,)), end=2)
        joined = self.node("Concat", [sizes, self.ints(-1)], (INT64, (3,)), axis=0)
        made: T = self.node("Reshape", [flat, joined], (flat.dtype, shape))
        return made

    def by_einsum(self, x: T, columns: int) -> T:
        if not self.takes("Einsum", x.dtype):
            return self.by_matmul(x, columns)
        turned = self.chance(0.5)
        weight = self.weight(*((columns, x.width) if turned else (x.width, columns)), scale=x.width**-0.5)
        made = (x.dtype, (*x.shape[:2], columns))
        result: T = self.node(
            "Einsum", [x, weight], made, equation="bsd,ed->bse" if turned else "bsd,de->bse"
        )
        return result

    def by_batched_weight(self, x: T, columns: int) -> T:
        return self.matmul(x, self.weight(1, x.width, columns, scale=x.width**-0.5))

    def by_conv(self, x: T, columns: int) -> T:
        if not self.takes("Conv", x.dtype):
            return self.by_matmul(x, columns)
        turned = self.transpose(x, 0, 2, 1)
        weight = self.weight(columns, x.width, 1, scale=x.width**-0.5)
        made = self.node("Conv", [turned, weight], (x.dtype, (self.batch, columns, self.rows)))
        return self.transpose(made, 0, 2, 1)

    def by_quantized_weight(self, x: T, columns: int) -> T:
        """Codes with their scale, behind a DequantizeLinear."""
        if self.opset < 19 and x.dtype != FLOAT:
            return self.by_matmul(x, columns)
        kind = INT8 if self.opset < 19 else self.rng.choice((INT8, FLOAT8))
        values = self.values.standard_normal((x.width, columns))
        axis = self.rng.choice((None, 0, 1))
        largest = np.abs(values).max() if axis is None else np.abs(values).max(axis=1 - axis)
        scale = (largest / (127 if kind == INT8 else 448)).astype(numpy_type(x.dtype))
        spread = scale if axis is None else np.expand_dims(scale, 1 - axis)
        codes = values / spread.astype(np.float64)
        stored = self.store(
            (np.rint(codes).clip(-127, 127) if kind == INT8 else codes).astype(numpy_type(kind))
        )
        inputs = [stored, self.store(np.asarray(scale))]
        if self.chance(0.5):
            inputs.append(self.store(np.zeros(scale.shape, numpy_type(kind))))
        attrs = {} if axis is None else {"axis": axis}
        weight = self.node("DequantizeLinear", inputs, (x.dtype, (x.width, columns)), **attrs)
        return self.matmul(x, weight)

    def by_fp4_weight(self, x: T, columns: int) -> T:
        """FP4 codes, FP8 scales of blocks and one scale of the whole."""
        if self.opset < 23 or x.width % 16:
            return self.by_quantized_weight(x, columns)
        codes = self.store(self.values.standard_normal((x.width, columns)).astype(ml_dtypes.float4_e2m1fn))
        blocks = (x.width // 16, columns)
        scales = self.store(np.abs(self.values.standard_normal(blocks) + 1).astype(ml_dtypes.float8_e4m3fn))
        whole = self.scalar(0.125, FLOAT)
        attrs = {"axis": 0, "block_size": 16}
        scale = self.cast(self.node("DequantizeLinear", [scales, whole], (FLOAT, blocks)), x.dtype)
        weight = self.node("DequantizeLinear", [codes, scale], (x.dtype, (x.width, columns)), **attrs)
        return self.matmul(x, weight)

    def mlp(self, x: T) -> T:
        hidden = self.rng.choice((4, 8, 16))
        gate, up = self.linear(x, hidden), self.linear(x, hidden)
        return self.linear(self.binary("Mul", self.activation(gate), up), x.width)

    def activation(self, x: T) -> T:
        kind = self.rng.choice(("Relu", "silu", "gelu_tanh", "gelu_erf", "Tanh", "Gelu"))
        if kind == "silu":
            return self.binary("Mul", x, self.wide("Sigmoid", x))
        if kind == "gelu_tanh":
            cube = self.binary("Mul", self.binary("Mul", x, x), x)
            inner = self.binary("Add", x, self.binary("Mul", cube, self.scalar(0.044715)))
            tanh = self.wide("Tanh", self.binary("Mul", inner, self.scalar(0.7978845608)))
            half = self.binary("Mul", x, self.scalar(0.5))
            return self.binary("Mul", half, self.binary("Add", tanh, self.scalar(1.0)))
        if kind == "gelu_erf":
            erf = self.wide("Erf", self.binary("Div", x, self.scalar(2**0.5)))
            return self.binary(
                "Mul", self.binary("Mul", x, self.binary("Add", erf, self.scalar(1.0))), self.scalar(0.5)
            )
        if kind == "Gelu":
            if not self.has("Gelu"):
                return self.wide("Relu", x)
            return self.wide("Gelu", x, approximate=self.rng.choice(("tanh", "none")))
        return self.wide(kind, x)

    # Norms

    def norm(self, x: T) -> T:
        return getattr(self, self.rng.choice(("rms", "layer_norm", "norm_operator")))(x)  # type: ignore[no-any-return]

    def reduce(self, op: str, x: T) -> T:
        """Over the last axis, which is kept."""
        made = (x.dtype, (*x.shape[:-1], 1))
        axis = self.rng.choice((-1, len(x.shape) - 1))
        if self.opset < 18 and op != "ReduceSum":
            result: T = self.node(op, [x], made, axes=[axis], keepdims=1)
        else:
            result = self.node(op, [x, self.ints(axis)], made, keepdims=1)
        return result

    def rms(self, x: T, *, centre: bool = False) -> T:
        dtype = x.dtype
        wide = self.cast(x, FLOAT) if self.chance(0.7) else x
        if centre:
            wide = self.binary("Sub", wide, self.reduce("ReduceMean", wide))
        two = self.scalar(2.0, wide.dtype) if self.chance(0.7) else self.scalar(2.0, FLOAT)
        square = self.same("Pow", wide, two) if self.chance(0.5) else self.binary("Mul", wide, wide)
        variance = self.reduce("ReduceMean", square)
        if wide.dtype == HALF:
            variance = self.binary("Add", variance, self.scalar(1e-4, HALF))
        else:
            variance = self.binary(
                "Add", variance, self.scalar(EPSILON, wide.dtype, ndim=self.rng.choice((0, 1)))
            )
        spelling = self.rng.choice(("reciprocal", "div", "power", "one over"))
        if spelling == "power":
            scaled = self.binary("Mul", wide, self.same("Pow", variance, self.scalar(-0.5, wide.dtype)))
        else:
            root = self.same("Sqrt", variance)
            if spelling == "reciprocal":
                scaled = self.binary("Mul", wide, self.same("Reciprocal", root))
            elif spelling == "one over":
                scaled = self.binary("Mul", wide, self.binary("Div", self.scalar(1.0, wide.dtype), root))
            else:
                scaled = self.binary("Div", wide, root)
        scaled = self.cast(scaled, dtype) if self.chance(0.5) else scaled
        weight = self.rng.choice(("none", "weight", "one plus", "adaptive"))
        if weight != "none":
            if weight == "adaptive":
                first = self.slice(x, 1, 0, 1) if not self.dynamic_rows else self.weight(1, 1, x.width)
                factor = self.cast(first, scaled.dtype)
            else:
                factor = self.cast(self.weight(x.width, scale=0.3), scaled.dtype)
            if weight != "weight":
                factor = self.binary("Add", *self.rng.sample([factor, self.scalar(1.0, scaled.dtype)], 2))
            scaled = self.binary("Mul", *self.rng.sample([scaled, factor], 2))
        return self.cast(scaled, dtype)

    def layer_norm(self, x: T) -> T:
        return self.biased(self.rms(x, centre=True))

    def norm_operator(self, x: T) -> T:
        shapes = [(x.width,)]
        if len(x.shape) == 3 and not (self.dynamic_batch or self.dynamic_rows):  # they broadcast to the data
            shapes += [x.shape[1:], (x.shape[0], 1, x.width)]
        weight = self.weight(*(self.rng.choice(shapes) if self.chance(0.2) else shapes[0]), scale=1.0)
        if self.has("RMSNormalization") and self.chance(0.5):
            return self.same("RMSNormalization", x, weight, axis=-1, epsilon=EPSILON)
        bias = self.weight(x.width, scale=0.1) if self.chance(0.5) else None
        attrs = {"stash_type": 1} if self.chance(0.3) else {}
        return self.same("LayerNormalization", x, weight, *([bias] if bias else []), epsilon=1e-5, **attrs)
