"""ONNX operators in torch: one table, each entry a function of the node and the values of its inputs.

An entry computes in the types that the graph states: what an operator gives in float16 is rounded to float16 there,
whatever it is computed in. Sizes, axes and other arguments that ONNX passes as tensors must be constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pi05c.graph import dtypes
from pi05c.graph.dtypes import BFLOAT16, FLOAT8E4M3FN, LARGEST
from pi05c.graph.errors import Pi05cError
from pi05c.graph.weights import array_of

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""By the name of the numpy dtype."""

FLOAT8_MAX = LARGEST[FLOAT8E4M3FN]


@dataclass(frozen=True)
class Call:
    """A node as an entry of the table sees it: its attributes, and its constant inputs as arrays."""

    node: gs.Node

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, or what ONNX says that it is by default."""
        value = self.node.attrs.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def constant(self, index: int, default: Any = None) -> Any:
        """A constant input as an array; `default` where the input is absent.

        Raises:
            Pi05cError: it is computed.
        """
        if len(self.node.inputs) <= index or not self.node.inputs[index].name:
            return default
        tensor = self.node.inputs[index]
        if not isinstance(tensor, gs.Constant):
            raise Pi05cError(
                f"input {index} of {self.node.op} {self.node.name!r} is computed, and torch takes it as a constant: "
                "compile with the pass canonicalize"
            )
        return array_of(tensor)

    def integers(self, index: int, default: Any = None) -> list[int] | None:
        """A constant input as a list of integers, or an attribute of older opsets by the name `default`."""
        value = self.constant(index)
        if value is None:
            value = self.attribute(default) if default is not None else None
        return None if value is None else [int(item) for item in np.ravel(value)]


Entry = Callable[..., Any]


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of a type in any spelling.

    Raises:
        Pi05cError: torch has none.
    """
    found = dtypes.to_numpy(dtype)
    name = "?" if found is None else found.name
    if name not in TORCH_DTYPES:
        raise Pi05cError(f"torch has no type {name}: compile for TensorRT")
    return TORCH_DTYPES[name]


def to_torch(values: Any) -> Tensor:
    """An array as a tensor, without a copy where numpy knows the type."""
    name = values.dtype.name
    values = np.array(values) if not values.flags.writeable else values
    if name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    if name == "float8_e4m3fn":
        return torch.from_numpy(np.asarray(values, order="C").view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(values)


def to_numpy(tensor: Tensor) -> Any:
    """A tensor on the CPU as an array of numpy or, of types that numpy lacks, `ml_dtypes`; without a copy."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(FLOAT8E4M3FN)
    return tensor.numpy()


def quantize(x: Tensor, scale: Tensor | float) -> Tensor:
    """QuantizeLinear to FP8 E4M3: round to nearest even, saturate."""
    scaled = x.to(torch.float32) / (scale if isinstance(scale, float) else scale.to(torch.float32))
    return scaled.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)


def _quantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    if zero is None or zero.dtype != torch.float8_e4m3fn or scale.numel() != 1:
        raise Pi05cError(f"{call.node.name!r} quantizes to another type than FP8 by one scale: use TensorRT")
    return quantize(x, scale)


def _dequantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    if x.dtype != torch.float8_e4m3fn:
        raise Pi05cError(f"{call.node.name!r} dequantizes another type than FP8: use TensorRT")
    if scale.numel() != 1:
        shape = [1] * x.dim()
        shape[call.attribute("axis", 1)] = -1
        scale = scale.reshape(shape)
    return (x.to(torch.float32) * scale.to(torch.float32)).to(scale.dtype)


def _matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.t() if call.attribute("transA", 0) else a
    b = b.t() if call.attribute("transB", 0) else b
    product = torch.matmul(a, b) * call.attribute("alpha", 1.0)
    return product if c is None else product + call.attribute("beta", 1.0) * c  # type: ignore[no-any-return]


def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    pads = call.attribute("pads") or [0] * (2 * (x.dim() - 2))
    half = len(pads) // 2
    if (
        pads[:half] != pads[half:]
        or call.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        or half != 2
    ):
        raise Pi05cError(f"{call.node.name!r} is no two-dimensional Conv with equal padding on both sides")
    ones = [1] * half
    strides, dilations = call.attribute("strides") or ones, call.attribute("dilations") or ones
    return F.conv2d(x, weight, bias, strides, pads[:half], dilations, call.attribute("group", 1))


def _pow(call: Call, x: Tensor, exponent: Tensor) -> Tensor:
    value = call.constant(1) if isinstance(call.node.inputs[1], gs.Constant) else None
    if value is not None and value.size == 1:
        return x.square() if float(value.item()) == 2.0 else x.pow(float(value.item()))
    return torch.pow(x, exponent.to(x.dtype))


def _cast(call: Call, x: Tensor) -> Tensor:
    dtype = torch_dtype(call.attribute("to"))
    if dtype == torch.float8_e4m3fn:
        x = x.to(torch.float32).clamp(-FLOAT8_MAX, FLOAT8_MAX)
    return x.to(dtype)


def _reshape(call: Call, x: Tensor, _: Any = None) -> Tensor:
    shape = call.integers(1, "shape") or []
    if not call.attribute("allowzero", 0):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return x.reshape(shape)


def _split(call: Call, x: Tensor, _: Any = None) -> tuple[Tensor, ...]:
    axis = call.attribute("axis", 0)
    sizes = call.integers(1, "split")
    if sizes is None:
        return torch.tensor_split(x, len(call.node.outputs), axis)
    return torch.split(x, sizes, axis)


def _slice(call: Call, x: Tensor, *_: Any) -> Tensor:
    starts, ends = call.integers(1, "starts") or [], call.integers(2, "ends") or []
    axes = call.integers(3, "axes") or list(range(len(starts)))
    steps = call.integers(4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise Pi05cError(f"{call.node.name!r} slices backwards, which torch does not")
        index = [slice(None)] * x.dim()
        index[axis] = slice(start, min(end, np.iinfo(np.int64).max), step)
        x = x[tuple(index)]
    return x


def _unsqueeze(call: Call, x: Tensor, _: Any = None) -> Tensor:
    axes = call.integers(1, "axes") or []
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(call: Call, x: Tensor, _: Any = None) -> Tensor:
    axes = call.integers(1, "axes")
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _expand(call: Call, x: Tensor, _: Any = None) -> Tensor:
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(call.integers(1) or [])))


def _gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.attribute("axis", 0) % x.dim()
    if axis == 0 and x.dim() == 2:
        return F.embedding(indices, x)
    shape = [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]
    return x.index_select(axis, indices.reshape(-1)).reshape(shape)


def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.attribute("approximate", "none"))


def _layer_norm(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = call.attribute("axis", -1) % x.dim()
    return F.layer_norm(x, x.shape[axis:], weight, bias, call.attribute("epsilon", 1e-5))


def _rms_norm(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    axis = call.attribute("axis", -1) % x.dim()
    wide = x.to(torch.float32)
    mean = wide.square().mean(tuple(range(axis, x.dim())), keepdim=True)
    return (wide * torch.rsqrt(mean + call.attribute("epsilon", 1e-5))).to(x.dtype) * weight


def _reduce(function: Callable[..., Tensor]) -> Entry:
    def reduce(call: Call, x: Tensor, _: Any = None) -> Tensor:
        axes = call.integers(1, "axes")
        if axes is None and call.attribute("noop_with_empty_axes", 0):
            return x
        keep = bool(call.attribute("keepdims", 1))
        return function(x, tuple(range(x.dim())) if axes is None else tuple(axes), keep)

    return reduce


def _sum(x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
    return torch.sum(x, list(axes), keep, dtype=x.dtype)


def _cumsum(call: Call, x: Tensor, _: Any = None) -> Tensor:
    if call.attribute("exclusive", 0) or call.attribute("reverse", 0):
        raise Pi05cError(f"{call.node.name!r} is an exclusive or reversed CumSum, which torch has not")
    return torch.cumsum(x, int(call.constant(1)), dtype=x.dtype)


def _clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return torch.clamp(x, low, high)


def _div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


def _chain(function: Callable[[Tensor, Tensor], Tensor]) -> Entry:
    def chain(call: Call, *values: Tensor) -> Tensor:
        result = values[0]
        for value in values[1:]:
            result = function(result, value)
        return result

    return chain


def _plain(function: Callable[..., Any]) -> Entry:
    return lambda call, *values: function(*values)


OPERATORS: dict[str, Entry] = {
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda call, *values: torch.cat(values, call.attribute("axis")),
    "Conv": _conv,
    "Cos": _plain(torch.cos),
    "CumSum": _cumsum,
    "DequantizeLinear": _dequantize,
    "Div": _div,
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": _expand,
    "Flatten": lambda call, x: x.reshape(math.prod(x.shape[: call.attribute("axis", 1)]), -1),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": _plain(torch.gt),
    "Identity": _plain(lambda x: x),
    "LayerNormalization": _layer_norm,
    "Less": _plain(torch.lt),
    "MatMul": _matmul,
    "Max": _chain(torch.maximum),
    "Min": _chain(torch.minimum),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "Pow": _pow,
    "QuantizeLinear": _quantize,
    "RMSNormalization": _rms_norm,
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(_sum),
    "Reshape": _reshape,
    "Sigmoid": _plain(torch.sigmoid),
    "Sin": _plain(torch.sin),
    "Slice": _slice,
    "Softmax": lambda call, x: torch.softmax(x, call.attribute("axis", -1)),
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(torch.sub),
    "Tanh": _plain(torch.tanh),
    "Tile": lambda call, x, _=None: x.repeat(call.integers(1)),
    "Transpose": lambda call, x: x.permute(call.attribute("perm") or list(range(x.dim()))[::-1]),
    "Unsqueeze": _unsqueeze,
    "Where": _plain(torch.where),
}
"""By ONNX name, domain `ai.onnx`."""

CONSTANT_ARGUMENTS: dict[str, tuple[int, ...]] = {
    "CumSum": (1,),
    "Expand": (1,),
    "ReduceMean": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "Unsqueeze": (1,),
}
"""Inputs that an entry takes by `Call.constant` and not as a value."""

__all__ = [
    "CONSTANT_ARGUMENTS",
    "OPERATORS",
    "TORCH_DTYPES",
    "Call",
    "Entry",
    "quantize",
    "to_numpy",
    "to_torch",
    "torch_dtype",
]
