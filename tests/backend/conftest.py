"""A CUDA device on a driver that records what it is asked for."""

from __future__ import annotations

import pytest
from fake_driver import Driver

from pi05c.backend.cuda import CudaDevice


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def device(driver: Driver) -> CudaDevice:
    return CudaDevice(library=driver)
