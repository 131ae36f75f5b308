"""The runtime of both flavours against TensorRT-RTX's own classes, and the driver API against a library that records."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import ml_dtypes
import numpy as np
import pytest

from pi05c.backend.cuda import Buffer, CudaDevice
from pi05c.backend.gpu import compute_capabilities
from pi05c.backend.signature import TensorSpec
from pi05c.backend.targets import Flavour
from pi05c.backend.tensorrt_engine import RUNTIME_CACHE, TensorRTEngine
from pi05c.graph.errors import Pi05cError

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

RUNTIME = trt.Runtime

TENSORS = {
    "x": (trt.TensorIOMode.INPUT, trt.DataType.FLOAT, (2, 3)),
    "keys": (trt.TensorIOMode.OUTPUT, trt.DataType.BF16, (4,)),
    "actions": (trt.TensorIOMode.OUTPUT, trt.DataType.FLOAT, (2, 3)),
}


class Driver:
    """A CUDA driver whose device memory is host memory."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}
        self.recording = False
        self.refused: str | None = None

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


def make_engine(**attributes: Any) -> Any:
    """What `deserialize_cuda_engine` would give, with the names of the real class alone."""
    engine = create_autospec(trt.ICudaEngine, instance=True, **attributes)
    engine.num_io_tensors = len(TENSORS)
    engine.get_tensor_name.side_effect = list(TENSORS).__getitem__
    engine.get_tensor_mode.side_effect = lambda name: TENSORS[name][0]
    engine.get_tensor_dtype.side_effect = lambda name: TENSORS[name][1]
    engine.get_tensor_shape.side_effect = lambda name: TENSORS[name][2]
    config = create_autospec(trt.IRuntimeConfig, instance=True)
    config.create_runtime_cache.return_value = cache = create_autospec(trt.IRuntimeCache, instance=True)
    cache.serialize.return_value = b"kernels"
    engine.create_runtime_config.return_value = config
    engine.create_execution_context.return_value = create_autospec(trt.IExecutionContext, instance=True)
    return engine


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def device(driver: Driver) -> CudaDevice:
    return CudaDevice(library=driver)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    return path


def load(plan: Path, device: CudaDevice, monkeypatch: pytest.MonkeyPatch, engine: Any) -> TensorRTEngine:
    """Load a plan of which the real runtime would make `engine`."""
    runtime = create_autospec(RUNTIME, instance=True)
    runtime.deserialize_cuda_engine.return_value = engine
    monkeypatch.setattr(trt, "Runtime", lambda log: runtime)
    return TensorRTEngine(plan, Flavour.TENSORRT_RTX, device)


def test_an_engine_runs_on_the_stream_of_its_device(
    plan: Path, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    loaded = load(plan, device, monkeypatch, engine)
    assert [str(spec) for spec in (*loaded.inputs, *loaded.outputs)] == [
        "x: float32[2,3]",
        "keys: bfloat16[4]",
        "actions: float32[2,3]",
    ]
    x = device.allocate(loaded.inputs[0])
    results = loaded.run({"x": x})
    context = engine.create_execution_context.return_value
    context.execute_async_v3.assert_called_once_with(device.stream)
    addresses = {call.args[0]: call.args[1] for call in context.set_tensor_address.call_args_list}
    assert addresses == {"x": x.pointer, **{name: buffer.pointer for name, buffer in results.items()}}
    again = loaded.run({"x": results["actions"]})
    assert again["actions"].pointer != results["actions"].pointer, "a step must not overwrite its own input"
    loaded.begin()
    assert loaded.run({"x": x})["actions"].pointer == results["actions"].pointer


def test_the_runtime_cache_of_rtx_is_kept_beside_the_plan(
    plan: Path, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = plan.with_name(plan.name + RUNTIME_CACHE)
    load(plan, device, monkeypatch, make_engine()).save_cache()
    assert kept.read_bytes() == b"kernels"
    engine = make_engine()
    load(plan, device, monkeypatch, engine)
    config = engine.create_runtime_config.return_value
    config.create_runtime_cache.return_value.deserialize.assert_called_once_with(b"kernels")
    config.set_runtime_cache.assert_called_once_with(config.create_runtime_cache.return_value)


def test_an_engine_without_a_runtime_cache_is_tensorrts(
    plan: Path, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    engine.create_runtime_config.return_value = object()
    loaded = load(plan, device, monkeypatch, engine)
    loaded.save_cache()
    assert not plan.with_name(plan.name + RUNTIME_CACHE).exists()


def test_a_plan_that_does_not_load_says_what_to_do(
    plan: Path, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Pi05cError, match=r"does not load on .*build it here with `pi05c build`"):
        load(plan, device, monkeypatch, None)
    engine = make_engine()
    engine.create_execution_context.return_value.execute_async_v3.return_value = False
    loaded = load(plan, device, monkeypatch, engine)
    with pytest.raises(Pi05cError, match="TensorRT did not run"):
        loaded.run({"x": device.allocate(loaded.inputs[0])})


def test_buffers_come_back_as_they_went_in(device: CudaDevice, driver: Driver) -> None:
    value = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
    buffer = device.allocate(TensorSpec("x", value.dtype, (2, 3)))
    device.copy_in(buffer, value.T.copy().T)  # not contiguous
    np.testing.assert_array_equal(device.copy_out(buffer), value)
    assert isinstance(buffer, Buffer)
    with pytest.raises(Pi05cError, match="not fixed"):
        device.allocate(TensorSpec("x", value.dtype, (None, 3)))
    device.close()
    assert not driver.memory


def test_a_captured_graph_is_launched_on_the_stream(device: CudaDevice, driver: Driver) -> None:
    launch = device.capture(dict)
    driver.calls.clear()
    launch()
    assert driver.calls == ["cuGraphLaunch"]
    driver.refused = "cuGraphLaunch"
    with pytest.raises(Pi05cError, match="refused cuGraphLaunch: out of memory"):
        launch()


def test_work_is_timed_by_events_around_it(device: CudaDevice, driver: Driver) -> None:
    driver.calls.clear()
    assert device.seconds(lambda: driver.calls.append("work")) == 0.0025
    recorded = [name for name in driver.calls if name in ("cuEventRecord", "work", "cuEventSynchronize")]
    assert recorded == ["cuEventRecord", "work", "cuEventRecord", "cuEventSynchronize"]
    assert driver.calls.count("cuEventCreate") == driver.calls.count("cuEventDestroy_v2") == 2


@pytest.mark.skipif(not compute_capabilities(), reason="this machine has no NVIDIA GPU")
def test_a_copy_is_captured_and_replayed_on_a_real_device() -> None:
    device = CudaDevice()
    spec = TensorSpec("x", np.dtype(np.float32), (1000,))
    source, target = device.allocate(spec), device.allocate(spec)
    first, second = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
    device.copy_in(source, first)

    def work() -> dict[str, Any]:
        device._copy("cuMemcpyDtoDAsync_v2", target.pointer, source.pointer, source.nbytes)
        return {"x": target}

    launch = device.capture(work)
    device.copy_in(source, second)
    launch()
    np.testing.assert_array_equal(device.copy_out(target), second)
    assert device.memory() > 0
    device.close()
