"""One spelling of element types: numpy dtypes, `ml_dtypes` for what numpy lacks.

onnx-graphsurgeon reports the type of a tensor as a numpy dtype, a numpy scalar class or an integer of
`onnx.TensorProto.DataType`, depending on how the tensor came about; everything here speaks `np.dtype`.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx

FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)
FLOAT64 = np.dtype(np.float64)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8E4M3FN = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT4E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
INT64 = np.dtype(np.int64)
BOOL = np.dtype(np.bool_)

WORKING_PRECISIONS = (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)
"""Types that ordinary float operators compute in; the 8-bit and 4-bit ones exist between Q and DQ only."""

LARGEST = {FLOAT16: 65504.0, BFLOAT16: 3.3895313892515355e38, FLOAT8E4M3FN: 448.0, FLOAT4E2M1: 6.0}
"""Largest finite value of each narrow type (IEEE 754 binary16; bfloat16; OCP FP8 E4M3; OCP MX FP4 E2M1)."""

_FROM_ONNX: dict[int, np.dtype[Any]] = {
    value: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value))
    for value in onnx.helper.get_all_tensor_dtypes()
    if value not in (onnx.TensorProto.UNDEFINED,)
}
_PACKED_BITS = {"float4_e2m1fn": 4, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}
_TO_ONNX = {dtype: value for value, dtype in _FROM_ONNX.items()}


def to_numpy(dtype: Any) -> np.dtype[Any] | None:
    """The numpy dtype of whatever onnx-graphsurgeon or ONNX calls a type; None stays None."""
    if dtype is None:
        return None
    if isinstance(dtype, (int, np.integer)) and not isinstance(dtype, bool):
        return _FROM_ONNX.get(int(dtype))
    result: np.dtype[Any] = np.dtype(dtype)
    return result


def to_onnx(dtype: Any) -> int:
    """The `onnx.TensorProto.DataType` number of a type in any spelling."""
    if isinstance(dtype, (int, np.integer)):
        return int(dtype)
    return _TO_ONNX[np.dtype(dtype)]


def name_of(dtype: Any) -> str:
    """ONNX's name in lower case, as canonical text shows it: `float32`, `float8e4m3fn`; `?` if unknown.

    A number that is of no type becomes `type99`.
    """
    if dtype is None or dtype == onnx.TensorProto.UNDEFINED:
        return "?"
    number = to_onnx(dtype)
    if number not in onnx.TensorProto.DataType.values():
        return f"type{number}"
    name = str(onnx.TensorProto.DataType.Name(number)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def bits(dtype: Any) -> int:
    """Bits of one element in storage, where a byte holds several of FP4, INT4 and INT2."""
    numpy_dtype = to_numpy(dtype)
    assert numpy_dtype is not None
    return _PACKED_BITS.get(numpy_dtype.name, numpy_dtype.itemsize * 8)


def holds(wide: Any, narrow: Any) -> bool:
    """Whether every value of one type is a value of the other."""
    to, given = to_numpy(wide), to_numpy(narrow)
    return to is not None and given is not None and bool(np.can_cast(given, to))


def is_float(dtype: Any) -> bool:
    """Whether it is a working precision (float16, bfloat16, float32, float64)."""
    found = to_numpy(dtype)
    return found is not None and found in WORKING_PRECISIONS  # numpy takes None for float64
