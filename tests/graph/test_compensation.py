"""Compensated rounding against GPTQ as its paper writes it, with the whole Hessian."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest

from pi05c.graph import compensation
from pi05c.graph.compensation import DAMPING, SWEEPS, Compensated
from pi05c.graph.dtypes import FLOAT4E2M1, FLOAT8E4M3FN
from pi05c.graph.io import Model, load, save
from pi05c.graph.nvfp4 import BlockCodes, BlockScales, ElementScales, global_scale
from pi05c.graph.runner import Array
from pi05c.graph.weights import InMemory, Quantized, Transposed, array_of

SIZES = [(96, 32, 256), (200, 24, 40), (64, 16, 1), (16, 16, 8)]
"""K, N and S: more rows than K and fewer, one block and several."""


def linear(size: tuple[int, int, int], seed: int = 0) -> tuple[Array, Array, np.float32]:
    """A weight, correlated rows that multiply it, and a scale."""
    inner, outer, count = size
    generator = np.random.default_rng(seed)
    weight = 0.05 * generator.standard_normal((inner, outer)).astype(np.float32)
    mixing = np.random.default_rng(99).standard_normal((inner, inner)) * np.exp(-np.arange(inner) / 20)
    rows = (generator.standard_normal((count, inner)) @ mixing.T).astype(np.float32)
    return weight, rows, np.float32(np.abs(weight).max() / 448)


def values(codes: Array, scale: np.float32) -> Array:
    result: Array = codes.astype(np.float32) * scale
    return result


def hessian(rows: Array) -> Array:
    power = (rows.astype(np.float64) ** 2).sum(axis=0)
    plain: Array = rows.T.astype(np.float64) @ rows + np.diag(DAMPING * (power + power.mean()))
    return plain


def plain_gptq(weight: Array, rows: Array, scale: np.float32) -> Array:
    """Codes row by row from the Cholesky factor of the inverse, then swept, in float64."""
    order = np.argsort(-(rows.astype(np.float64) ** 2).sum(axis=0), kind="stable")
    full = hessian(rows)[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(full)).T
    left = weight[order].astype(np.float64)
    codes = np.zeros(weight.shape, FLOAT8E4M3FN)

    def rounded(wanted: Array) -> Array:
        return np.clip(wanted.astype(np.float32) / scale, -448, 448).astype(FLOAT8E4M3FN)

    for row in range(len(left)):
        codes[row] = rounded(left[row])
        error = (left[row] - values(codes[row], scale)) / upper[row, row]
        left[row:] -= np.outer(upper[row, row:], error)
    errors = weight[order] - values(codes, scale).astype(np.float64)
    for _ in range(SWEEPS):
        for row in range(len(left)):
            others = full[row] @ errors - full[row, row] * errors[row]
            codes[row] = rounded(weight[order][row] + others / full[row, row])
            errors[row] = weight[order][row] - values(codes[row], scale)
    result = np.empty_like(codes)
    result[order] = codes
    return result


def damage(weight: Array, codes: Array, scale: np.float32, rows: Array) -> float:
    return float(np.linalg.norm(rows @ (weight - values(codes, scale))))


@pytest.mark.parametrize("size", SIZES)
def test_equals_gptq_with_the_whole_hessian(size: tuple[int, int, int]) -> None:
    weight, rows, scale = linear(size)
    codes = Compensated(InMemory(weight), scale, FLOAT8E4M3FN, [InMemory(rows)]).load()
    expected = plain_gptq(weight, rows, scale)
    assert np.mean(codes.view(np.uint8) == expected.view(np.uint8)) > 0.999
    error = weight - values(codes, scale)
    best = weight - values(expected, scale)
    full = hessian(rows)
    assert np.sum(error * (full @ error)) == pytest.approx(np.sum(best * (full @ best)), rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_products_with_rows_that_were_not_seen_are_kept_better_than_by_rounding_to_nearest(seed: int) -> None:
    weight, rows, scale = linear((96, 64, 512), seed)
    seen, unseen = rows[:256], rows[256:]
    nearest = Quantized(InMemory(weight), scale, FLOAT8E4M3FN).load()
    codes = Compensated(InMemory(weight), scale, FLOAT8E4M3FN, [InMemory(seen)]).load()
    assert damage(weight, codes, scale, seen) < 0.7 * damage(weight, nearest, scale, seen)
    assert damage(weight, codes, scale, unseen) < 0.8 * damage(weight, nearest, scale, unseen)


@pytest.mark.parametrize("seed", range(3))
def test_codes_in_blocks_keep_products_under_the_scales_of_their_blocks(seed: int) -> None:
    weight, rows, _ = linear((96, 64, 512), seed)
    across = InMemory(np.ascontiguousarray(weight.T))
    scale = global_scale(across.amax())
    scales = BlockScales(across, scale)
    each = ElementScales(scales, scale)
    nearest = BlockCodes(across, scales, scale).load().astype(np.float32) * each.load()
    assert (each.read((slice(3, 9), slice(5, 40))) == each.load()[3:9, 5:40]).all()
    codes = Compensated(InMemory(weight), Transposed(each, [1, 0]), FLOAT4E2M1, [InMemory(rows[:256])]).load()
    kept = codes.astype(np.float32) * each.load().T
    for seen in (rows[:256], rows[256:]):
        assert np.linalg.norm(seen @ (weight - kept)) < 0.8 * np.linalg.norm(seen @ (weight - nearest.T))


def test_rows_of_several_tensors_count_together() -> None:
    weight, rows, scale = linear((48, 16, 64))
    parts = [InMemory(rows[:10]), InMemory(rows[10:])]
    joint = Compensated(InMemory(weight), scale, FLOAT8E4M3FN, [InMemory(rows)]).load()
    assert (Compensated(InMemory(weight), scale, FLOAT8E4M3FN, parts).load() == joint).all()


def test_any_region_is_that_part_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows, scale = linear((80, 40, 32))
    base = Transposed(InMemory(np.ascontiguousarray(weight.T.astype(ml_dtypes.bfloat16))), [1, 0])
    compensated = Compensated(base, scale, FLOAT8E4M3FN, [InMemory(rows)])
    codes = compensated.load()
    monkeypatch.setattr(compensation, "_CHUNK_ELEMENTS", 80 * 7)
    monkeypatch.setattr(compensation, "CHUNK_BYTES", 40 * 9)
    chunks = list(compensated.chunks())
    assert len(chunks) == 9
    assert np.mean(np.concatenate(chunks) == codes) > 0.999
    assert np.mean(compensated.read((slice(3, 70), slice(11, 33))) == codes[3:70, 11:33]) > 0.999


def test_rows_of_zeros_round_each_weight_to_the_nearest() -> None:
    weight, rows, scale = linear((48, 16, 8))
    codes = Compensated(InMemory(weight), scale, FLOAT8E4M3FN, [InMemory(0 * rows)]).load()
    assert (codes == Quantized(InMemory(weight), scale, FLOAT8E4M3FN).load()).all()


def test_rows_that_are_not_finite_are_left_out() -> None:
    weight, rows, scale = linear((48, 16, 8))
    wild = rows.copy()
    wild[2, 5], wild[6, 0] = np.inf, np.nan
    some = np.delete(rows, [2, 6], axis=0)
    codes, expected = (
        Compensated(InMemory(weight), scale, FLOAT8E4M3FN, [InMemory(each)]).load() for each in (wild, some)
    )
    assert (codes == expected).all()
    none = np.full_like(rows, np.inf)
    codes = Compensated(InMemory(weight), scale, FLOAT8E4M3FN, [InMemory(none)]).load()
    assert (codes == Quantized(InMemory(weight), scale, FLOAT8E4M3FN).load()).all()


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_rows_of_any_size_work(factor: float) -> None:
    weight, rows, scale = linear((48, 16, 32))
    plain, scaled = (
        Compensated(InMemory(weight), scale, FLOAT8E4M3FN, [InMemory(each)]).load()
        for each in (rows, (rows * factor).astype(np.float32))
    )
    assert np.mean(plain == scaled) > 0.999


def test_no_code_is_beyond_the_largest_number() -> None:
    weight, rows, _ = linear((48, 16, 32))
    scale = np.float32(np.abs(weight).max() / 448)
    rows[:, 1] = rows[:, 0]  # the second takes up all the error of the first
    codes = Compensated(InMemory(weight), scale, FLOAT8E4M3FN, [InMemory(rows)]).load()
    assert np.isfinite(codes.astype(np.float32)).all()


def test_it_is_saved_as_it_reads(tmp_path: Path) -> None:
    weight, rows, scale = linear((96, 32, 64))
    compensated = Compensated(InMemory(weight), scale, FLOAT8E4M3FN, [InMemory(rows)])
    graph = gs.Graph(opset=21)
    constant = gs.Constant("w.fp8", compensated)
    out = gs.Variable("out", FLOAT8E4M3FN, [96, 32])
    graph.nodes.append(gs.Node("Identity", inputs=[constant], outputs=[out]))
    graph.outputs = [out]
    save(Model(graph), tmp_path / "m.onnx")
    (stored,) = (tensor for tensor in load(tmp_path / "m.onnx").graph.nodes[0].inputs)
    assert (array_of(stored) == compensated.load()).all()


def test_its_fingerprint_tells_rows_and_scales_apart() -> None:
    weight, rows, scale = linear((48, 16, 32))

    def of(rows: Array, scale: np.float32) -> object:
        return Compensated(InMemory(weight), scale, FLOAT8E4M3FN, [InMemory(rows)]).fingerprint()

    assert of(rows, scale) == of(rows.copy(), scale)
    assert len({of(rows, scale), of(rows + 1, scale), of(rows, 2 * scale)}) == 3
