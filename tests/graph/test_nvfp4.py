"""NVFP4, bit for bit."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pi05c.graph.nvfp4 import BLOCK, BlockCodes, BlockScales, global_scale
from pi05c.graph.runner import Array
from pi05c.graph.weights import InMemory, Joined, Transposed, stored_bytes

VECTORS = Path(__file__).parents[1] / "data" / "nvfp4.npz"
"""What ModelOpt 0.47 makes of two weights: ties, zeros and tiny blocks; and normal values of many sizes."""


def quantized(values: Array) -> tuple[BlockCodes, BlockScales, Array]:
    weight = InMemory(values)
    scale = global_scale(weight.amax())
    scales = BlockScales(weight, scale)
    return BlockCodes(weight, scales, scale), scales, scale


def dequantized(codes: Array, scales: Array, scale: Array) -> Array:
    wide = np.repeat(scales.astype(np.float32) * scale, BLOCK, axis=-1)
    result: Array = codes.astype(np.float32) * wide
    return result


def same_bits(weight: Array, codes: Array, scales: Array, scale: Array) -> None:
    ours, our_scales, our_scale = quantized(weight)
    assert our_scale.tobytes() == np.asarray(scale, np.float32).tobytes()
    np.testing.assert_array_equal(our_scales.load().view(np.uint8), scales)
    packed = np.frombuffer(stored_bytes(ours.load()), np.uint8)
    np.testing.assert_array_equal(packed, codes.reshape(-1))


@pytest.mark.parametrize("number", [0, 1])
def test_codes_and_scales_are_modelopts(number: int) -> None:
    stored = np.load(VECTORS)
    same_bits(*(stored[f"{name}_{number}"] for name in ("weight", "codes", "scales", "global")))


def test_codes_and_scales_are_those_of_the_installed_modelopt() -> None:
    pytest.importorskip("modelopt", reason="comparing with ModelOpt needs the extra [modelopt]")
    torch = pytest.importorskip("torch")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = np.random.default_rng(5).standard_normal((48, 160)).astype(np.float32) ** 3
    codes, scales, scale = NVFP4QTensor.quantize(torch.from_numpy(weight.copy()), BLOCK)
    same_bits(weight, codes._quantized_data.numpy(), scales.view(torch.uint8).numpy(), scale.numpy())


def test_any_region_is_what_the_whole_holds() -> None:
    halves = [InMemory(np.random.default_rng(seed).standard_normal((24, 64))) for seed in (0, 1)]
    base = Transposed(Joined(halves, axis=1), [1, 0])
    scale = global_scale(base.amax())
    wide = InMemory(np.random.default_rng(2).standard_normal((24, 64)).astype(ml_dtypes.bfloat16))
    for weight in (Transposed(base, [1, 0]), wide):
        scales = BlockScales(weight, scale, (0, -1, 4))
        codes = BlockCodes(weight, scales, scale)
        whole_codes, whole_scales = codes.load(), scales.load()
        np.testing.assert_array_equal(
            codes.read((slice(3, 20), slice(5, 39))).view(np.uint8), whole_codes[3:20, 5:39].view(np.uint8)
        )
        np.testing.assert_array_equal(
            scales.read((slice(3, 20), slice(1, 3))).view(np.uint8), whole_scales[3:20, 1:3].view(np.uint8)
        )


def test_scales_that_are_tried_lower_the_error_of_every_block() -> None:
    weight = np.random.default_rng(3).standard_normal((64, 256)).astype(np.float32)
    base, scale = InMemory(weight), global_scale(float(np.abs(weight).max()))

    def errors(steps: tuple[int, ...]) -> Array:
        scales = BlockScales(base, scale, steps)
        result = dequantized(BlockCodes(base, scales, scale).load(), scales.load(), scale)
        squared: Array = np.square(result - weight).reshape(-1, BLOCK).sum(axis=1)
        return squared

    first, best = errors((0,)), errors((0, -1, 1, 4, 5))
    assert (best <= first * (1 + 1e-6)).all()
    assert best.sum() < 0.8 * first.sum()


def test_a_weight_with_an_outlier_saturates_nothing() -> None:
    weight = np.full((1, 32), 1e-4, np.float32)
    weight[0, 0] = 1000
    codes, scales, scale = quantized(weight)
    result = dequantized(codes.load(), scales.load(), scale)
    assert result[0, 0] == 1000
    assert np.isfinite(result).all()


def test_a_zero_has_no_sign_and_what_is_rounded_to_it_keeps_its_own() -> None:
    weight = np.array([[0.0, -0.0, -1e-6, 1e-6, -1.0, 1.0] + [0.0] * 10], np.float32)
    codes, *_ = quantized(weight)
    assert codes.load().view(np.uint8)[0, :6].tolist() == [0, 0, 8, 0, 15, 7]


def test_fingerprints_tell_scales_apart() -> None:
    base = InMemory(np.ones((1, 16), np.float32))
    scale = global_scale(1.0)
    one, other = BlockScales(base, scale), BlockScales(base, scale, (0, 1))
    assert one.fingerprint() != other.fingerprint()
    assert BlockCodes(base, one, scale).fingerprint() != BlockCodes(base, other, scale).fingerprint()
    assert BlockCodes(base, one, scale).fingerprint() == BlockCodes(base, one, scale).fingerprint()
