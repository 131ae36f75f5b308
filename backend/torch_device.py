"""Memory, one stream and CUDA graphs by torch, and the same calls for the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pi05c.backend.signature import TensorSpec
from pi05c.backend.torch_operators import TORCH_DTYPES, to_numpy, to_torch
from pi05c.graph.errors import Pi05cError

T = TypeVar("T")


def empty(spec: TensorSpec, device: str | torch.device) -> Tensor:
    """Memory for a tensor.

    Raises:
        Pi05cError: a dimension is not fixed.
    """
    if spec.is_dynamic:
        raise Pi05cError(f"{spec} has a dimension that is not fixed: export the model with fixed sizes")
    shape = [int(dim) for dim in spec.shape if isinstance(dim, int)]
    return torch.zeros(shape, dtype=TORCH_DTYPES[spec.dtype.name], device=device)


class TorchCpu:
    """The CPU. What is captured runs again at each launch."""

    device = torch.device("cpu")
    name, on_gpu = "the CPU", False

    def activate(self) -> None:
        """Nothing to do."""

    def allocate(self, spec: TensorSpec) -> Tensor:
        """Memory for a tensor."""
        return empty(spec, self.device)

    def copy_in(self, buffer: Tensor, value: Any) -> None:
        """Fill a buffer from a numpy array or a torch tensor."""
        buffer.copy_(_tensor(value))

    def copy_out(self, buffer: Tensor, like: Any = None) -> Any:
        """The contents of a buffer: a tensor on the device of `like`, a numpy array where that is None."""
        return to_numpy(buffer.clone()) if like is None else buffer.to(like.device, copy=True)

    def capture(self, work: Callable[[], Mapping[str, Any]]) -> Callable[[], None]:
        """What does `work` again."""

        def launch() -> None:
            work()

        return launch

    def seconds(self, work: Callable[[], None]) -> float:
        """How long something takes."""
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def run(self, work: Callable[[], T]) -> T:
        """Do something."""
        with torch.no_grad():
            return work()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to give back."""


class TorchCuda:
    """A CUDA device with a stream of its own."""

    on_gpu = True

    def __init__(self, ordinal: int = 0) -> None:
        self.device = torch.device("cuda", ordinal)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @property
    def name(self) -> str:
        """The product's name."""
        return torch.cuda.get_device_name(self.device)

    def activate(self) -> None:
        """Make it the device of the calling thread."""
        torch.cuda.set_device(self.device)

    def allocate(self, spec: TensorSpec) -> Tensor:
        """Memory for a tensor."""
        return empty(spec, self.device)

    def copy_in(self, buffer: Tensor, value: Any) -> None:
        """Fill a buffer from a numpy array, or from a torch tensor once its device's current stream has come to it."""
        tensor = _tensor(value)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(tensor)

    def copy_out(self, buffer: Tensor, like: Any = None) -> Any:
        """The contents of a buffer: a tensor on the device of `like`, a numpy array where that is None.

        A tensor on a GPU is ready for what its current stream does next.
        """
        if like is None or not like.is_cuda:
            with torch.cuda.stream(self._stream):
                host = buffer.cpu()
            return to_numpy(host) if like is None else host
        with torch.cuda.stream(self._stream):
            result = buffer.clone()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        result.record_stream(current)
        return result

    def capture(self, work: Callable[[], Mapping[str, Any]]) -> Callable[[], None]:
        """Record what `work` puts on the stream; what is returned launches it again as one graph.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()

        def launch() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return launch

    def seconds(self, work: Callable[[], None]) -> float:
        """How long what `work` puts on the stream takes there, by events before and behind it."""
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        start.record(self._stream)
        with torch.cuda.stream(self._stream):
            work()
        end.record(self._stream)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def run(self, work: Callable[[], T]) -> T:
        """Do something on the stream."""
        with torch.no_grad(), torch.cuda.stream(self._stream):
            return work()

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def close(self) -> None:
        """Give back what torch keeps in reserve."""
        torch.cuda.empty_cache()


def _tensor(value: Any) -> Any:
    return to_torch(value) if isinstance(value, np.ndarray) else value


__all__ = ["TorchCpu", "TorchCuda", "empty"]
