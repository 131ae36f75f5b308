"""A CUDA driver that needs no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any


class Driver:
    """A CUDA driver whose device memory is host memory.

    Attributes:
        calls: the functions that were called, in order.
        memory: what is allocated, by address.
        refused: the function that fails.
        graph: what a launched graph does.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}
        self.refused: str | None = None
        self.graph: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.refused:
                return 2
            getattr(type(self), f"_{name}", lambda *_: None)(self, *arguments)
            return 0

        return call

    def _cuMemAlloc_v2(self, pointer: Any, size: Any) -> None:  # noqa: N802
        block = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(block)
        self.memory[pointer._obj.value] = block

    def _cuGraphLaunch(self, graph: Any, stream: Any) -> None:  # noqa: N802
        assert stream.value == 77
        self.graph()

    def _cuEventElapsedTime(self, milliseconds: Any, start: Any, end: Any) -> None:  # noqa: N802
        milliseconds._obj.value = 2.5

    def _cuMemFree_v2(self, pointer: Any) -> None:  # noqa: N802
        del self.memory[pointer.value]

    def _cuStreamCreate(self, stream: Any, flags: int) -> None:  # noqa: N802
        assert flags == 1
        stream._obj.value = 77

    def _copy(self, to: Any, source: Any, size: Any, stream: Any) -> None:
        assert stream.value == 77
        ctypes.memmove(to.value, source.value, size.value)

    _cuMemcpyHtoDAsync_v2 = _cuMemcpyDtoHAsync_v2 = _cuMemcpyDtoDAsync_v2 = _copy  # noqa: N815

    def _cuGetErrorString(self, code: int, text: Any) -> None:  # noqa: N802
        text._obj.value = b"out of memory"
