"""The plain policy with random weights, in float32 and in BF16."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the plain model needs the extra [torch]")

from pi05c.frontend.config import CONFIGS  # noqa: E402
from pi05c.frontend.plain import half_precision, random_policy  # noqa: E402
from pi05c.frontend.samples import synthetic_samples  # noqa: E402


def test_bf16_departs_from_float32_by_its_rounding_alone() -> None:
    config = CONFIGS["pi05_tiny"]
    inputs = {name: torch.from_numpy(array[0]) for name, array in synthetic_samples(config, 0, 1).items()}
    policy = random_policy(config, "cpu", seed=0)
    with torch.no_grad():
        wide = policy(**inputs)
        assert torch.equal(wide, random_policy(config, "cpu", seed=0)(**inputs))
        assert not torch.equal(wide, random_policy(config, "cpu", seed=1)(**inputs))
        half = half_precision(policy)(**inputs)
    assert half.dtype == torch.float32
    assert 1e-4 < (half - wide).norm() / wide.norm() < 0.02
