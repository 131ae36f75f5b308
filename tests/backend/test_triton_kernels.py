"""The Triton kernels on a GPU against what they compute in plain torch on the CPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the torch backend needs the extra [torch]")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("this machine has no NVIDIA GPU with FP8 (SM89 or later)", allow_module_level=True)

from pi05c.backend.torch_kernels import row_attention, row_linear  # noqa: E402

HALF, CODES = torch.float16, torch.float8_e4m3fn


def random(*shape: int, dtype: torch.dtype = HALF, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def distance(function: object, *tensors: object, **options: object) -> float:
    """Relative L2 distance of the result on the GPU from that on the CPU."""
    expected = function(*tensors, **options).float()  # type: ignore[operator]
    moved = [item.cuda() if isinstance(item, torch.Tensor) else item for item in tensors]
    named = {name: item.cuda() if isinstance(item, torch.Tensor) else item for name, item in options.items()}
    found = function(*moved, **named).cpu().float()  # type: ignore[operator]
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [1, 10, 50])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_linear_of_few_rows(rows: int, gated: bool, fp8: bool) -> None:
    torch.manual_seed(0)
    inner, outer = 256, 192
    columns = outer // 2 if gated else outer
    error = distance(
        row_linear,
        random(1, rows, inner),
        random(outer, inner, dtype=CODES if fp8 else HALF),
        torch.rand(outer) * 0.05 + 0.01,
        torch.tensor([0.02]) if fp8 else None,
        torch.rand(inner) + 0.5,
        torch.randn(inner),
        bias=random(outer),
        residual=random(1, rows, columns),
        gate=random(columns),
        epsilon=1e-6,
        gated=gated,
    )
    assert error < (5e-3 if fp8 else 1e-3)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("length", [64, 968])
def test_attention_of_few_rows(length: int, fp8: bool) -> None:
    torch.manual_seed(0)
    heads, rows, dim = 8, 10, 64
    joined = random(1, rows, (heads + 2) * dim)
    dtype = CODES if fp8 else HALF
    angles = torch.rand(rows, dim) * 6
    mask = torch.zeros(1, 1, 1, length + rows)
    mask[..., 5:20] = -2.3819763e38
    error = distance(
        row_attention,
        joined,
        joined,
        joined,
        random(1, 1, dim, length, dtype=dtype, scale=0.1),
        random(1, 1, length, dim, dtype=dtype),
        angles.cos(),
        angles.sin(),
        mask,
        torch.tensor([0.02, 0.5, 1 / 448, 0.1]) if fp8 else None,
        starts=(0, heads * dim, (heads + 1) * dim),
        heads=heads,
    )
    assert error < (2e-2 if fp8 else 2e-3)
