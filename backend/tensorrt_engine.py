"""A plan on the GPU, by TensorRT's or TensorRT-RTX's own runtime: the same calls for both."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pi05c.backend.cuda import Buffer, CudaDevice
from pi05c.backend.signature import TensorSpec
from pi05c.backend.targets import Flavour
from pi05c.backend.tensorrt_library import load_library
from pi05c.graph.errors import Pi05cError

RUNTIME_CACHE = ".cache"
"""Suffix of the file beside a plan in which TensorRT-RTX keeps the kernels that it compiled for this GPU."""

_DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "FP8": ml_dtypes.float8_e4m3fn,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
"""Names of `DataType`, which the two flavours share."""


class TensorRTEngine:
    """A loaded plan; its tensors are buffers of `device`.

    Attributes:
        inputs: what `run` takes.
        outputs: what `run` gives.
    """

    def __init__(self, plan: Path, flavour: Flavour, device: CudaDevice) -> None:
        """Load `plan`.

        Raises:
            Pi05cError: the flavour is not installed, not of a supported version, or does not load; or the plan does
                not load on this GPU.
        """
        try:
            trt = load_library(flavour)
        except Pi05cError as error:
            raise Pi05cError(f"{plan} cannot run: {error}") from error
        self._device = device
        self._log = _log(trt)
        self._runtime = trt.Runtime(self._log)
        engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise Pi05cError(
                f"{plan} does not load on {device.name} with {flavour.product} {trt.__version__}"
                f"{self._log.reason()}: build it here with `pi05c build`"
            )
        self._take(trt, engine, plan.with_name(plan.name + RUNTIME_CACHE))

    def _take(self, trt: Any, engine: Any, cache_path: Path) -> None:
        self._engine, self._cache_path = engine, cache_path
        self._cache: Any = None
        config = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        if config is not None and hasattr(config, "create_runtime_cache"):
            self._cache = config.create_runtime_cache()
            if cache_path.is_file():
                self._cache.deserialize(cache_path.read_bytes())
            config.set_runtime_cache(self._cache)
        self._context = (
            engine.create_execution_context() if config is None else engine.create_execution_context(config)
        )
        if self._context is None:
            raise Pi05cError(f"{cache_path.with_suffix('')} has no execution context{self._log.reason()}")
        self.inputs, self.outputs = (
            tuple(
                _spec(engine, name)
                for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
                if engine.get_tensor_mode(name) == mode
            )
            for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
        )
        self._calls = 0
        self._results: list[dict[str, Buffer]] = []

    def begin(self) -> None:
        """Start a run of the policy: its n-th call of this engine writes where that of the last run did."""
        self._calls = 0

    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """Put one execution on the device's stream.

        Raises:
            Pi05cError: TensorRT refuses.
        """
        if self._calls == len(self._results):
            self._results.append({spec.name: self._device.allocate(spec) for spec in self.outputs})
        results = self._results[self._calls]
        self._calls += 1
        for spec in self.inputs:
            self._context.set_tensor_address(spec.name, inputs[spec.name].pointer)
        for name, buffer in results.items():
            self._context.set_tensor_address(name, buffer.pointer)
        if not self._context.execute_async_v3(self._device.stream):
            raise Pi05cError(f"TensorRT did not run {self._cache_path.with_suffix('')}{self._log.reason()}")
        return results

    def save_cache(self) -> None:
        """Keep the compiled kernels beside the plan, where TensorRT-RTX made some and the folder can be written."""
        if self._cache is None:
            return
        data = bytes(memoryview(self._cache.serialize()))
        with contextlib.suppress(OSError):
            if not self._cache_path.is_file() or self._cache_path.read_bytes() != data:
                partial = self._cache_path.with_name(f".{self._cache_path.name}.partial")
                partial.write_bytes(data)
                partial.replace(self._cache_path)

    def close(self) -> None:
        """Release context, engine and runtime, in the order that TensorRT asks for."""
        self._context = self._engine = self._runtime = self._cache = None


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what TensorRT calls errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self._errors.append(" ".join(message.split()))

        def reason(self) -> str:
            """The last error in brackets, or nothing."""
            return f" ({self._errors[-1]})" if self._errors else ""

    return Log()


def _spec(engine: Any, name: str) -> TensorSpec:
    kind = engine.get_tensor_dtype(name)
    dtype = _DTYPES.get(kind.name)
    if dtype is None:
        raise Pi05cError(
            f"tensor {name!r} of the plan is of type {kind.name}, which the runtime does not hand over"
        )
    return TensorSpec(
        name, np.dtype(dtype), tuple(dim if dim >= 0 else None for dim in engine.get_tensor_shape(name))
    )


__all__ = ["RUNTIME_CACHE", "TensorRTEngine"]
