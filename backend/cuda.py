"""Memory, one stream and graphs of a CUDA device, through the driver's C API: neither torch nor a toolkit is needed.

Of the CUDA driver API (`cuda.h`): names with `_v2` are what the header maps the plain names to.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pi05c.backend.signature import TensorSpec
from pi05c.graph.errors import Pi05cError
from pi05c.graph.runner import Array

_CAPTURE_THREAD_LOCAL = 1
"""`CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: other threads may go on using the device."""

_NON_BLOCKING = 1
"""`CU_STREAM_NON_BLOCKING`: the stream does not wait for the legacy default stream."""

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@dataclass
class Buffer:
    """Device memory of one tensor, of fixed shape; freed with the device that allocated it."""

    pointer: int
    spec: TensorSpec
    nbytes: int
    keep: Any = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(int(dim) for dim in self.spec.shape if isinstance(dim, int))


class CudaDevice:
    """One device with a stream of its own.

    Args:
        ordinal: of the device among those that are visible.
        library: the driver; tests put another in its place.

    Raises:
        Pi05cError: there is no driver, or no such device.
    """

    on_gpu = True

    def __init__(self, ordinal: int = 0, library: Any = None) -> None:
        try:
            self._cuda = ctypes.CDLL(LIBRARY) if library is None else library
        except OSError as error:
            raise Pi05cError("this machine has no NVIDIA driver, so no engine runs on it") from error
        self._allocated: list[int] = []
        self._graphs: list[ctypes.c_void_p] = []
        self._device = ctypes.c_int()
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), ordinal)
        # The primary context is the one that TensorRT and torch use.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.activate()
        self._call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)

    @property
    def stream(self) -> int:
        """Handle of the stream, a `cudaStream_t` too."""
        return int(self._stream.value or 0)

    @property
    def name(self) -> str:
        """The product's name."""
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode()

    def activate(self) -> None:
        """Make it the device of the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, spec: TensorSpec) -> Buffer:
        """Memory for a tensor.

        Raises:
            Pi05cError: a dimension of `spec` is not fixed, or there is too little memory.
        """
        if spec.is_dynamic:
            raise Pi05cError(
                f"{spec} has a dimension that is not fixed: compile the model with fixed sizes to run it by load()"
            )
        count = int(np.prod([int(dim) for dim in spec.shape if isinstance(dim, int)], dtype=np.int64))
        nbytes = count * spec.dtype.itemsize
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(nbytes, 1)))
        self._allocated.append(pointer.value)
        return Buffer(pointer.value, spec, nbytes)

    def copy_in(self, buffer: Buffer, value: Any) -> None:
        """Fill a buffer from a numpy array or a torch tensor on the CPU or the device."""
        if isinstance(value, np.ndarray):
            value = buffer.keep = np.ascontiguousarray(value)  # lives until the copy is done
            self._copy("cuMemcpyHtoDAsync_v2", buffer.pointer, value.ctypes.data, buffer.nbytes)
            return
        value = buffer.keep = value.contiguous()
        if value.is_cuda:
            import torch

            torch.cuda.current_stream(value.device).synchronize()
            self._copy("cuMemcpyDtoDAsync_v2", buffer.pointer, value.data_ptr(), buffer.nbytes)
        else:
            self._copy("cuMemcpyHtoDAsync_v2", buffer.pointer, value.data_ptr(), buffer.nbytes)

    def copy_out(self, buffer: Buffer, like: Any = None) -> Any:
        """The contents of a buffer once the stream has come to it.

        Args:
            like: a torch tensor, on whose device the result is to be; None for a numpy array.
        """
        if like is not None and like.is_cuda:
            import torch

            host = torch.from_numpy(np.empty(0, buffer.spec.dtype))  # for its dtype
            result = torch.empty(buffer.shape, dtype=host.dtype, device=like.device)
            self._copy("cuMemcpyDtoDAsync_v2", result.data_ptr(), buffer.pointer, buffer.nbytes)
            self.synchronize()
            return result
        array: Array = np.empty(buffer.shape, buffer.spec.dtype)
        self._copy("cuMemcpyDtoHAsync_v2", array.ctypes.data, buffer.pointer, buffer.nbytes)
        self.synchronize()
        if like is None:
            return array
        import torch

        return torch.from_numpy(array)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], Mapping[str, Any]]) -> Callable[[], None]:
        """Record what `work` puts on the stream; what is returned launches it again as one graph.

        Raises:
            Pi05cError: something in it cannot be captured.
        """
        graph, instance = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, _CAPTURE_THREAD_LOCAL)
        try:
            work()
        finally:
            self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(instance), graph, ctypes.c_uint64(0))
        self._call("cuGraphDestroy", graph)
        self._graphs.append(instance)
        return lambda: self._call("cuGraphLaunch", instance, self._stream)

    def seconds(self, work: Callable[[], None]) -> float:
        """How long what `work` puts on the stream takes there, by events before and behind it."""
        events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in events:
            self._call("cuEventCreate", ctypes.byref(event), 0)
        try:
            self._call("cuEventRecord", events[0], self._stream)
            work()
            self._call("cuEventRecord", events[1], self._stream)
            self._call("cuEventSynchronize", events[1])
            milliseconds = ctypes.c_float()
            self._call("cuEventElapsedTime", ctypes.byref(milliseconds), *events)
        finally:
            for event in events:
                self._call("cuEventDestroy_v2", event)
        return milliseconds.value / 1e3

    def memory(self) -> int:
        """Bytes in use on the device, by all processes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def close(self) -> None:
        """Free the memory, the graphs and the stream."""
        self.activate()
        self.synchronize()
        for instance in self._graphs:
            self._call("cuGraphExecDestroy", instance)
        for pointer in self._allocated:
            self._call("cuMemFree_v2", ctypes.c_uint64(pointer))
        self._call("cuStreamDestroy_v2", self._stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)
        self._graphs.clear()
        self._allocated.clear()

    def _copy(self, function: str, to: int, source: int, nbytes: int) -> None:
        self._call(
            function, ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(nbytes), self._stream
        )

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._cuda, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            reason = text.value.decode() if text.value else "unknown"
            raise Pi05cError(f"the CUDA driver refused {function}: {reason} (error {code})")


__all__ = ["LIBRARY", "Buffer", "CudaDevice"]
