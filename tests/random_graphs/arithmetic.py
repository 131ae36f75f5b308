"""Elementwise arithmetic, quantizers, functions, and the detours that exporters take."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from random_graphs.core import (
    FLOAT,
    FLOAT8,
    INT8,
    UINT8,
    WORKING,
    Core,
    T,
    numpy_type,
)


class Arithmetic(Core):
    def elementwise(self, x: T) -> T:
        for _ in range(self.rng.randint(1, 3)):
            kind = self.rng.choice(("unary", "number", "vector", "tensor", "clip", "where", "unit"))
            if kind == "unary":
                x = self.wide(
                    self.rng.choice(("Relu", "Tanh", "Neg", "Sigmoid", "Abs", "Sin", "Softplus")), x
                )
            elif kind == "number":
                op = self.rng.choice(("Mul", "Add", "Sub", "Div"))
                value = self.rng.choice((1.0, 0.5, 2.0, -1.0, *((0.0,) if op in ("Add", "Sub") else ())))
                number = self.scalar(value, ndim=self.rng.choice((0, 0, 1, 3)))
                sides = [x, number] if op == "Div" else self.rng.sample([x, number], 2)
                x = self.binary(op, *sides)
            elif kind == "vector":
                x = self.binary(self.rng.choice(("Mul", "Add", "Sub")), x, self.weight(x.width, scale=1.0))
            elif kind == "tensor":
                others = [t for t in self.visible() if t.shape == x.shape and t.dtype == x.dtype]
                x = self.binary(self.rng.choice(("Mul", "Add", "Sub")), x, self.rng.choice([*others, x]))
            elif kind == "clip":
                low = self.scalar(-1.0) if self.chance(0.5) else None
                x = self.same(
                    "Clip", x, low, *([self.scalar(2.0)] if low is None or self.chance(0.5) else [])
                )
            elif kind == "unit":
                x = self.unit(x)
            else:
                flag = self.store(self.values.random(x.width) < 0.5)
                x = self.node("Where", [flag, x, self.scalar(0.0)], (x.dtype, x.shape))
        return x

    def unit(self, x: T) -> T:
        """Rows divided by their length, which a constant that float16 does not hold keeps from zero."""
        if x.dtype != FLOAT:
            return x
        if self.chance(0.5):
            x = self.binary("Mul", x, self.store(np.zeros(x.width, np.float32)))
        axes = {"axes": [-1]} if self.opset < 18 else {}
        inputs = [x] if axes else [x, self.ints(-1)]
        size = self.node("ReduceL2", inputs, (x.dtype, (*x.shape[:-1], 1)), keepdims=1, **axes)
        op = self.rng.choice(("Clip", "Max", "Add"))
        return self.binary("Div", x, self.same(op, size, self.scalar(1e-12)))

    def detour(self, x: T) -> T:
        """Something that gives back what it was given, or the like."""
        kind = self.rng.choice(
            (
                "identity",
                "cast",
                "transpose",
                "reshape",
                "split",
                "squeeze",
                "expand",
                "dropout",
                "sequence",
                "slice",
            )
        )
        if kind == "cast":
            other = self.rng.choice([dtype for dtype in (*WORKING, TensorProto.DOUBLE) if dtype != x.dtype])
            return self.cast(self.cast(x, other), x.dtype)
        if kind == "transpose":
            return self.transpose(self.transpose(x, 0, 2, 1), 0, 2, 1)
        if kind == "reshape":
            return self.reshape(self.reshape(x, *x.shape[:2], x.width // 2, 2), *x.shape)
        if kind == "split":
            sizes = [x.width // 2, x.width - x.width // 2]
            parts = self.node(
                "Split", [x, self.ints(*sizes)], *((x.dtype, (*x.shape[:2], size)) for size in sizes), axis=2
            )
            return self.concat(self.rng.choice((2, -1)), *parts)
        if kind == "squeeze":
            raised = self.node("Unsqueeze", [x, self.ints(1)], (x.dtype, (x.shape[0], 1, *x.shape[1:])))
            made: T = self.node("Squeeze", [raised, self.ints(1)], (x.dtype, x.shape))
            return made
        if kind == "expand" and not (self.dynamic_batch or self.dynamic_rows):
            return self.node("Expand", [x, self.ints(*x.shape)], (x.dtype, x.shape))  # type: ignore[no-any-return]
        if kind == "dropout" and self.takes("Dropout", x.dtype):
            return self.same("Dropout", x)
        if kind == "sequence" and self.takes("SplitToSequence", x.dtype):
            return self.through_sequence(x)
        if kind == "slice":
            return self.slice(x, 2, 0, x.width)
        return self.same("Identity", x)

    def through_sequence(self, x: T) -> T:
        """torch's `chunk` as older exporters write it."""
        name = self.new_name()
        if self.chance(0.3):
            empty, full = self.new_name(), self.new_name()
            self.scope.nodes += [
                helper.make_node("SequenceEmpty", [], [empty], f"empty {name}", dtype=x.dtype),
                helper.make_node("SequenceInsert", [empty, x.name], [full], f"insert {name}"),
            ]
            made: T = self.node("SequenceAt", [T(full, 0, ()), self.store(np.int64(0))], (x.dtype, x.shape))
            return made
        half = self.store(np.int64(x.width // 2))
        self.scope.nodes.append(
            helper.make_node("SplitToSequence", [x.name, half.name], [name], f"split {name}", axis=2)
        )
        piece = (x.dtype, (*x.shape[:2], x.width // 2))
        sequence = T(name, 0, ())
        parts = [self.node("SequenceAt", [sequence, self.store(np.int64(i))], piece) for i in (0, 1)]
        return self.concat(2, *parts)

    def quantized(self, x: T) -> T:
        """Rounded to codes and back."""
        if self.opset < 19 and x.dtype != FLOAT:
            return self.detour(x)
        kind = self.rng.choice((INT8, UINT8) if self.opset < 19 else (INT8, UINT8, FLOAT8))
        channels = self.chance(0.2) and kind == INT8
        scale = self.store(np.full(x.width if channels else (), 2.0**-5, numpy_type(x.dtype)))
        point = self.store(np.full(scale.shape, 128 if kind == UINT8 else 0, numpy_type(kind)))
        attrs = {"axis": 2} if channels else {}
        codes = self.node("QuantizeLinear", [x, scale, point], (kind, x.shape), **attrs)
        if self.opset > 22 and self.chance(0.3):
            attrs["output_dtype"] = x.dtype
        return self.node("DequantizeLinear", [codes, scale, point], (x.dtype, x.shape), **attrs)  # type: ignore[no-any-return]

    def function(self, x: T) -> T:
        """A call of a function of the model."""
        if not self.functions:
            nodes = [helper.make_node("Relu", ["a"], ["r"]), helper.make_node("Add", ["r", "a"], ["b"])]
            self.functions.append(
                helper.make_function(
                    "local", "Doubled", ["a"], ["b"], nodes, [helper.make_opsetid("", self.opset)]
                )
            )
        return self.same("Doubled", x, domain="local")
