"""NVFP4 as TensorRT wants it, spelled as ModelOpt's exporter does: codes, block scales and two DequantizeLinear."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.compensation import Compensated
from pi05c.graph.domains import DYNAMIC, TENSORRT_DOMAIN
from pi05c.graph.dtypes import FLOAT4E2M1, FLOAT8E4M3FN, to_onnx
from pi05c.graph.edit import Editor
from pi05c.graph.nvfp4 import (
    BLOCK,
    BlockCodes,
    BlockScales,
    ElementScales,
    dequantized,
    global_scale,
)
from pi05c.graph.weights import Transposed, Weight, weight_of
from pi05c.passes.patterns.linear import Linear
from pi05c.passes.patterns.walk import origin

SCALE_STEPS = (0, -1, 1, 4, 5)
"""Scales tried for a block of a weight, in E4M3 numbers from the one at which its largest element becomes 6: one more or
less, and those at which it becomes 4, where the values of E2M1 lie closer. On Gaussian weights their squared error is
0.0067 of the square of the weights; with the first alone 0.0090, with all from -6 to 8 0.0066 (measured)."""

DYNAMIC_RANKS = (2, 3)
"""Ranks that TensorRT's DynamicQuantize takes (operator reference)."""


class BlockQuantizer:
    """Adds NVFP4 in one scope; a tensor is quantized once however many linears read it, and a weight stored once."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._activations: dict[int, gs.Tensor] = {}
        self._weights: dict[int, gs.Tensor] = {}

    def activation(self, tensor: gs.Tensor, amax: float, dtype: np.dtype[np.generic]) -> gs.Tensor:
        """`tensor`, quantized when the engine runs in blocks along its last axis, and dequantized to `dtype`.

        Args:
            amax: its largest absolute value, which sets the scale of the block scales.
        """
        if id(tensor) not in self._activations:
            name, shape = origin(tensor).name, list(tensor.shape)
            blocks = [*shape[:-1], shape[-1] // BLOCK]
            scale = self.editor.constant(f"{name}.scale", global_scale(amax))
            unique = self.editor.names.unique
            codes = gs.Variable(unique(f"{name}.fp4"), dtype=FLOAT4E2M1, shape=shape)
            scales = gs.Variable(unique(f"{name}.block_scales"), dtype=FLOAT8E4M3FN, shape=blocks)
            attributes = {"axis": -1, "block_size": BLOCK, "scale_type": to_onnx(FLOAT8E4M3FN)}
            self.editor.scope.nodes.append(
                gs.Node(
                    DYNAMIC,
                    unique(f"{name}.{DYNAMIC}"),
                    attributes,
                    [tensor, scale],
                    [codes, scales],
                    domain=TENSORRT_DOMAIN,
                )
            )
            values = dequantized(self.editor, codes, scales, scale, name)
            self._activations[id(tensor)] = self.editor.cast(values, dtype)
        return self._activations[id(tensor)]

    def weight(self, linear: Linear, dtype: np.dtype[np.generic], rows: Sequence[Weight] = ()) -> gs.Tensor:
        """The linear's weight, stored [columns, rows] so that blocks lie along what is summed, as its MatMul reads it.

        Args:
            rows: that its activation is made of, to make up for rounding errors on; none: each weight is rounded to
                the nearest.
        """
        key = id(linear.weight)
        if key not in self._weights:
            values = weight_of(linear.weight)
            if not linear.transposed:
                values = Transposed(values, [1, 0])
            name, scale = linear.weight.name, global_scale(values.amax())
            scales = BlockScales(values, scale, SCALE_STEPS)
            codes: Weight = BlockCodes(values, scales, scale)
            if rows:
                across, each = Transposed(values, [1, 0]), Transposed(ElementScales(scales, scale), [1, 0])
                codes = Transposed(Compensated(across, each, FLOAT4E2M1, rows), [1, 0])
            stored = dequantized(
                self.editor,
                self.editor.constant(f"{name}.fp4", codes),
                self.editor.constant(f"{name}.block_scales", scales),
                self.editor.constant(f"{name}.scale", scale),
                name,
            )
            turned = self.editor.add(
                "Transpose",
                [stored],
                f"{name}.transposed",
                dtype=stored.dtype,
                shape=stored.shape[::-1],
                attrs={"perm": [1, 0]},
            )
            self._weights[key] = self.editor.cast(turned, dtype)
        return self._weights[key]
