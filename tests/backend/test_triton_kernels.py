"""The Triton kernels against what they compute in plain torch: on a GPU, or without one by Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch backend needs the extra [torch]")
pytestmark = pytest.mark.gpu
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
INTERPRET = {} if GPU else {"TRITON_INTERPRET": "1"}
with pytest.MonkeyPatch.context() as patch:
    for variable, value in INTERPRET.items():
        patch.setenv(variable, value)
    pytest.importorskip("triton", reason="torch brings Triton only where it is built for a GPU")
    import triton.language as tl

    from pi05c.backend import torch_kernels, triton_kernels


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asks both when it is imported and when a kernel runs. It rounds to FP8 by truncating, a GPU does not."""
    if GPU:
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: np.ndarray, old: Any, new: Any, mode: Any) -> np.ndarray:
        if new == tl.float8e4nv:
            return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        return convert(values, old, new, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    for variable, value in INTERPRET.items():
        monkeypatch.setenv(variable, value)


HALF, CODES = torch.float16, torch.float8_e4m3fn


def random(*shape: int, dtype: torch.dtype = HALF, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def distance(name: str, **given: object) -> float:
    """Relative L2 distance of what a kernel gives from what plain torch gives on the CPU."""
    function = getattr(torch_kernels, name)
    expected = function(**given)
    if GPU:
        moved = {key: item.cuda() if isinstance(item, torch.Tensor) else item for key, item in given.items()}
        found = function(**moved).cpu()
    else:
        found = getattr(triton_kernels, name)(**given)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def linear(rows: int, inner: int, outer: int, fp8: bool, gated: bool, **changed: object) -> float:
    """`distance` of a linear with everything around it, of seed 0."""
    torch.manual_seed(0)
    columns = outer // 2 if gated else outer
    given = {
        "x": random(1, rows, inner),
        "weight": random(outer, inner, dtype=CODES if fp8 else HALF),
        "weight_scale": torch.rand(outer) * 0.05 + 0.01,
        "scale": torch.tensor([0.02]) if fp8 else None,
        "norm_scale": torch.rand(inner) + 0.5,
        "norm_shift": torch.randn(inner),
        "bias": random(outer),
        "residual": random(1, rows, columns),
        "gate": random(columns),
        "out_scale": None,
        "epsilon": 1e-6,
        "gated": gated,
        "constant": True,
    }
    return distance("row_linear", **given | changed)


@pytest.mark.parametrize("rows", [1, 10, 50])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_linear_of_few_rows(rows: int, gated: bool, fp8: bool) -> None:
    assert linear(rows, 256, 192, fp8, gated) < (5e-3 if fp8 else 1e-3)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("shape", [(1024, 2048), (32, 1024), (48, 16), (4096, 16)])
def test_a_linear_whose_inner_size_takes_one_tile_or_several(
    shape: tuple[int, int], constant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, outer = shape
    monkeypatch.setattr(triton_kernels, "_TILE", 1 << 15)
    assert linear(10, inner, outer, True, False, constant=constant) < 5e-3


def test_a_linear_takes_codes_and_gives_codes() -> None:
    assert linear(
        10, 512, 64, True, True, x=random(1, 10, 512, dtype=CODES), norm_scale=None, norm_shift=None,
        out_scale=torch.tensor([0.5]),
    ) < 5e-3  # fmt: skip


def attention(length: int, fp8: bool, out_scale: torch.Tensor | None = None) -> float:
    torch.manual_seed(0)
    heads, rows, dim = 8, 10, 64
    joined = random(1, rows, (heads + 2) * dim)
    dtype = CODES if fp8 else HALF
    angles = torch.rand(rows, dim) * 6
    mask = torch.zeros(1, 1, 1, length + rows)
    mask[..., 5:20] = -2.3819763e38
    return distance(
        "row_attention",
        query=joined,
        key=joined,
        value=joined,
        cached_keys=random(1, 1, dim, length, dtype=dtype, scale=0.1),
        cached_values=random(1, 1, length, dim, dtype=dtype),
        cos=angles.cos(),
        sin=angles.sin(),
        mask=mask,
        scales=torch.tensor([0.02, 0.5, 1 / 448, 0.1]) if fp8 else None,
        out_scale=out_scale,
        starts=[0, heads * dim, (heads + 1) * dim],
        heads=heads,
    )


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("length", [64, 968])
def test_attention_of_few_rows(length: int, fp8: bool) -> None:
    assert attention(length, fp8) < (2e-2 if fp8 else 2e-3)


def test_attention_gives_codes() -> None:
    assert attention(64, False, torch.tensor([0.01])) < 2e-2


def test_tiles_divide_what_they_cut() -> None:
    for rows in (16, 32, 64):
        for inner in (16, 32, 48, 1024, 1152, 2048, 4096, 4304):
            for columns in (16, 32, 48, 1024, 2560, 4096):
                for itemsize, gated in ((1, False), (1, True), (2, False), (2, True)):
                    tiles = triton_kernels.configuration(rows, columns, inner, itemsize, gated)
                    assert columns % tiles.columns == 0
                    assert inner % (tiles.warps * tiles.inner) == 0
                    assert all(math.log2(size) % 1 == 0 for size in (tiles.columns, tiles.inner, tiles.warps))
