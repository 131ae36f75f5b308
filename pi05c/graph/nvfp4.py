"""NVFP4: FP4 (E2M1) codes, one FP8 (E4M3) scale for each block of 16, one float32 scale for the whole tensor.

An element is `code * block scale * global scale`. The arithmetic below is that of ModelOpt's `NVFP4QTensor` (0.47), in
float32 and in its order, so that the same weights give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import FLOAT4E2M1, FLOAT8E4M3FN, FLOAT32, LARGEST
from pi05c.graph.edit import Editor
from pi05c.graph.runner import Array
from pi05c.graph.weights import Region, Weight

BLOCK = 16
"""Elements that share an FP8 scale."""

SMALLEST_SCALE = 2.0**-9
"""The smallest positive E4M3 number (OCP FP8): what a block's scale is at least, so that nothing is divided by zero."""


_LARGEST_CODE = int(np.asarray(LARGEST[FLOAT8E4M3FN], FLOAT8E4M3FN).view(np.uint8))


def _codes(values: Array, scale: Array) -> Array:
    quotient = values / scale + np.float32(0)  # which makes -0 the zero without a sign, as ModelOpt does
    codes: Array = np.clip(quotient, -LARGEST[FLOAT4E2M1], LARGEST[FLOAT4E2M1]).astype(FLOAT4E2M1)
    return codes


def global_scale(amax: float) -> Array:
    """The float32 scalar that maps the largest block scale to 448: amax / (6 * 448)."""
    return np.asarray(np.float32(amax) / np.float32(LARGEST[FLOAT4E2M1] * LARGEST[FLOAT8E4M3FN]))


class BlockScales(Weight):
    """The FP8 scales of `base` in blocks along its last axis: amax of the block / (6 * global scale), in E4M3.

    A block of zeros gets 1. Shape: that of `base`, the last axis divided by 16.

    Attributes:
        steps: E4M3 numbers to try, counted from that one: of each block the scale with the least squared rounding
            error is taken, of equal ones the first.
    """

    def __init__(self, base: Weight, scale: Array, steps: Sequence[int] = (0,)) -> None:
        super().__init__([*base.shape[:-1], base.shape[-1] // BLOCK], FLOAT8E4M3FN)
        self.base = base
        self.scale = np.float32(scale)
        self.steps = tuple(steps)

    def read(self, region: Region) -> Array:
        start, stop, _ = region[-1].indices(self.shape[-1])
        values = self.base.read((*region[:-1], slice(start * BLOCK, stop * BLOCK))).astype(np.float32)
        blocks = values.reshape(*values.shape[:-1], stop - start, BLOCK)
        wanted = np.abs(blocks).max(axis=-1) / (np.float32(LARGEST[FLOAT4E2M1]) * self.scale)
        wanted[wanted == 0] = 1
        found: Array = np.clip(wanted, SMALLEST_SCALE, LARGEST[FLOAT8E4M3FN]).astype(FLOAT8E4M3FN)
        return found if self.steps == (0,) else self._best(blocks, found)

    def _best(self, blocks: Array, around: Array) -> Array:
        codes = around.view(np.uint8).astype(np.int16)
        best, least = around, np.full(around.shape, np.inf, np.float32)
        for step in self.steps:
            tried = np.clip(codes + step, 1, _LARGEST_CODE).astype(np.uint8).view(FLOAT8E4M3FN)
            scale = (tried.astype(np.float32) * self.scale)[..., np.newaxis]
            error = np.square(_codes(blocks, scale).astype(np.float32) * scale - blocks).sum(axis=-1)
            better = error < least
            best, least = np.where(better, tried, best), np.where(better, error, least)
        return best

    def fingerprint(self) -> object:
        return ("block scales", float(self.scale), self.steps, self.base.fingerprint())


class BlockCodes(Weight):
    """The FP4 codes of `base` under the block scales `scales` and the global scale: to the nearest, ties to even."""

    def __init__(self, base: Weight, scales: Weight, scale: Array) -> None:
        super().__init__(base.shape, FLOAT4E2M1)
        self.base = base
        self.scales = scales
        self.scale = np.float32(scale)

    def read(self, region: Region) -> Array:
        start, stop, _ = region[-1].indices(self.shape[-1])
        first, last = start // BLOCK, -(-stop // BLOCK)
        values = self.base.read((*region[:-1], slice(first * BLOCK, last * BLOCK))).astype(np.float32)
        scales = self.scales.read((*region[:-1], slice(first, last))).astype(np.float32) * self.scale
        codes = _codes(values.reshape(*scales.shape, BLOCK), scales[..., np.newaxis])
        wanted: Array = codes.reshape(values.shape)[..., start - first * BLOCK : stop - first * BLOCK]
        return wanted

    def fingerprint(self) -> object:
        return ("block codes", float(self.scale), self.scales.fingerprint(), self.base.fingerprint())


class ElementScales(Weight):
    """What the codes under block scales `scales` and the global scale are multiplied by, one float32 for each.

    Shape: that of `scales`, the last axis times 16.
    """

    def __init__(self, scales: Weight, scale: Array) -> None:
        super().__init__([*scales.shape[:-1], scales.shape[-1] * BLOCK], np.float32)
        self.scales = scales
        self.scale = np.float32(scale)

    def read(self, region: Region) -> Array:
        start, stop, _ = region[-1].indices(self.shape[-1])
        first, last = start // BLOCK, -(-stop // BLOCK)
        scales = self.scales.read((*region[:-1], slice(first, last))).astype(np.float32) * self.scale
        wanted: Array = np.repeat(scales, BLOCK, axis=-1)[..., start - first * BLOCK : stop - first * BLOCK]
        return wanted

    def fingerprint(self) -> object:
        return ("element scales", float(self.scale), self.scales.fingerprint())


def dequantized(
    editor: Editor, codes: gs.Tensor, scales: gs.Tensor, scale: gs.Tensor, name: str
) -> gs.Variable:
    """codes * (scales * scale) in float32, spelled as ModelOpt's exporter does: two DequantizeLinear."""
    wide = editor.add(
        "DequantizeLinear",
        [scales, scale],
        f"{name}.block_scales.dequantized",
        dtype=FLOAT32,
        shape=scales.shape,
    )
    return editor.add(
        "DequantizeLinear",
        [codes, wide],
        f"{name}.dequantized",
        dtype=FLOAT32,
        shape=codes.shape,
        attrs={"axis": len(codes.shape) - 1, "block_size": BLOCK},
    )
