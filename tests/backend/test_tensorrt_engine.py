"""The runtime of both flavours against TensorRT-RTX's own classes, on a driver that needs no GPU."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
from fake_driver import Driver

from pi05c.backend.cuda import CudaDevice
from pi05c.backend.targets import Flavour
from pi05c.backend.tensorrt_engine import RUNTIME_CACHE, TensorRTEngine
from pi05c.contract import Contract
from pi05c.graph.errors import Pi05cError
from pi05c.runtime import DeviceSession, Policy

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

RUNTIME = trt.Runtime

TENSORS = {
    "x": (trt.TensorIOMode.INPUT, trt.DataType.FLOAT, (2, 3)),
    "keys": (trt.TensorIOMode.OUTPUT, trt.DataType.BF16, (4,)),
    "actions": (trt.TensorIOMode.OUTPUT, trt.DataType.FLOAT, (2, 3)),
}


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
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    return path


@pytest.fixture(params=Flavour)
def flavour(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flavour:
    """Each flavour, TensorRT-RTX's module in the place of its own."""
    found: Flavour = request.param
    monkeypatch.setitem(sys.modules, found.module, trt)
    return found


Load = Callable[[Any], TensorRTEngine]


@pytest.fixture
def load(plan: Path, device: CudaDevice, flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a plan of which the real runtime would make the engine that is given."""

    def load(engine: Any) -> TensorRTEngine:
        runtime = create_autospec(RUNTIME, instance=True)
        runtime.deserialize_cuda_engine.return_value = engine
        monkeypatch.setattr(trt, "Runtime", lambda log: runtime)
        return TensorRTEngine(plan, flavour, device)

    return load


def test_an_engine_runs_on_the_stream_of_its_device(device: CudaDevice, load: Load) -> None:
    engine = make_engine()
    loaded = load(engine)
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


def test_the_runtime_cache_of_rtx_is_kept_beside_the_plan(plan: Path, load: Load) -> None:
    kept = plan.with_name(plan.name + RUNTIME_CACHE)
    load(make_engine()).save_cache()
    assert kept.read_bytes() == b"kernels"
    engine = make_engine()
    load(engine)
    config = engine.create_runtime_config.return_value
    config.create_runtime_cache.return_value.deserialize.assert_called_once_with(b"kernels")
    config.set_runtime_cache.assert_called_once_with(config.create_runtime_cache.return_value)


def test_an_engine_without_a_runtime_cache_is_tensorrts(plan: Path, load: Load) -> None:
    engine = make_engine()
    engine.create_runtime_config.return_value = object()
    loaded = load(engine)
    loaded.save_cache()
    assert not plan.with_name(plan.name + RUNTIME_CACHE).exists()


def test_a_plan_that_does_not_load_says_what_to_do(device: CudaDevice, load: Load) -> None:
    with pytest.raises(Pi05cError, match=r"does not load on .*build it here with `pi05c build`"):
        load(None)
    engine = make_engine()
    engine.create_execution_context.return_value.execute_async_v3.return_value = False
    loaded = load(engine)
    with pytest.raises(Pi05cError, match="TensorRT did not run"):
        loaded.run({"x": device.allocate(loaded.inputs[0])})


def test_the_first_call_captures_a_graph_and_later_calls_launch_it(
    device: CudaDevice, driver: Driver, load: Load
) -> None:
    engine = make_engine()
    loaded = load(engine)
    context = engine.create_execution_context.return_value
    addresses: dict[str, int] = {}
    context.set_tensor_address.side_effect = addresses.__setitem__

    def execute(stream: int = 0) -> bool:
        ctypes.memmove(addresses["actions"], addresses["x"], 24)
        return True

    context.execute_async_v3.side_effect = driver.graph = execute
    session = DeviceSession(device, [loaded], loaded.run, loaded.inputs)
    policy = Policy(Contract(loaded.inputs), loaded.outputs, "tensorrt", "the engine", session)
    values = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    with policy:
        driver.calls.clear()
        np.testing.assert_array_equal(policy(x=values[0])["actions"], values[0])
        assert context.execute_async_v3.call_count == 2
        captured = [name for name in driver.calls if "Capture" in name or "Graph" in name]
        assert captured == [
            *("cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"),
            *("cuGraphDestroy", "cuGraphLaunch"),
        ]
        driver.calls.clear()
        results: dict[int, Any] = {}
        threads = [
            threading.Thread(target=lambda index=index: results.update({index: policy(x=values[index])}))
            for index in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, result in results.items():
            np.testing.assert_array_equal(result["actions"], values[index])
        assert len(results) == driver.calls.count("cuGraphLaunch") == 4
        assert context.execute_async_v3.call_count == 2
        assert "cuMemAlloc_v2" not in driver.calls
    assert not driver.memory


def test_what_one_engine_gives_another_takes_from_where_it_lies(
    device: CudaDevice, driver: Driver, load: Load
) -> None:
    first, second = make_engine(), make_engine()
    parts = [load(first), load(second)]

    def work(inputs: Any) -> Any:
        return parts[1].run({"x": parts[0].run(inputs)["actions"]})

    session = DeviceSession(device, parts, work, parts[0].inputs)
    driver.calls.clear()
    session.run({"x": np.ones((2, 3), np.float32)}, None)
    sides = [
        {
            call.args[0]: call.args[1]
            for call in engine.create_execution_context.return_value.set_tensor_address.call_args_list
        }
        for engine in (first, second)
    ]
    assert sides[1]["x"] == sides[0]["actions"]
    assert not [name for name in driver.calls if "DtoD" in name]
    assert driver.calls.count("cuMemcpyDtoHAsync_v2") == 2
