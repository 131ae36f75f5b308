"""CUDA devices of this machine, asked of the driver itself: neither torch nor a CUDA toolkit is needed."""

from __future__ import annotations

import ctypes
import sys

_CUDA_SUCCESS = 0
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
"""`CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR` of the CUDA driver API."""


def compute_capabilities() -> tuple[tuple[int, int], ...]:
    """Compute capability of each visible CUDA device; empty without a driver or a device."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) != _CUDA_SUCCESS or cuda.cuDeviceGetCount(ctypes.byref(count)) != _CUDA_SUCCESS:
        return ()
    found = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if (
            cuda.cuDeviceGet(ctypes.byref(device), ordinal) == _CUDA_SUCCESS
            and cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
            == _CUDA_SUCCESS
            and cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
            == _CUDA_SUCCESS
        ):
            found.append((major.value, minor.value))
    return tuple(found)


__all__ = ["compute_capabilities"]
