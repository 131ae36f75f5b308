"""The CUDA driver API: against a library that records, and on a real device where there is one."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_driver import Driver

from pi05c.backend.cuda import Buffer, CudaDevice
from pi05c.backend.gpu import compute_capabilities
from pi05c.backend.signature import TensorSpec
from pi05c.graph.errors import Pi05cError


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


@pytest.mark.gpu
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
