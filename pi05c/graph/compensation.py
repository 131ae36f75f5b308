"""Rounding of weights that keeps what a linear computes: later weights make up for the rounding errors of earlier ones.

This is GPTQ (Frantar et al., 2022, arXiv:2210.17323) from few rows. Of a weight W [K, N] and rows F [S, K] that it is
multiplied by, codes Q are chosen so that E = W - Q makes the columns of |F E|^2 + E' D E small; the diagonal D holds
back what S rows say nothing of. The K rows of W are rounded one after the other, those first that F multiplies by most,
each after it has taken up the errors before it as far as those that follow will not.

K is up to 16384, so F'F + D is never formed. Let P be the inverse of I + sum of f f' / d over the rows of W that follow
a block B, an S x S matrix. What is left to minimise once they have done their best is (R + F_B E)' P (R + F_B E) +
E' D_B E, where R = F E of the rows before: plain GPTQ with the Hessian F_B' P F_B + D_B, of weights moved by
(F_B' P F_B + D_B)^-1 F_B' P R.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi05c.graph.dtypes import LARGEST
from pi05c.graph.runner import Array
from pi05c.graph.weights import CHUNK_BYTES, InMemory, Region, Weight, whole

DAMPING = 0.1
"""D is this part of each diagonal element of F'F, and of their mean."""

SWEEPS = 1
"""How often all rows are rounded once more, given the codes of all the others."""

_BLOCK = 64
"""Rows of a weight that are rounded before the error of the others is brought up to date."""

_CHUNK_ELEMENTS = 2**24
"""Elements of a weight that are rounded at a time; a few float32 arrays of that size are held."""


class Compensated(Weight):
    """`base` [K, N] rounded to codes of a float `dtype` that change its products with `rows` least.

    Attributes:
        base: what is rounded.
        scale: positive numbers, as the graph stores them, one or [K, N]; the codes times them stand for `base`.
        rows: what multiplies the weight, each [any number, K].
    """

    def __init__(self, base: Weight, scale: Array | Weight, dtype: Any, rows: Sequence[Weight]) -> None:
        super().__init__(base.shape, dtype)
        self.base = base
        self.scale = scale if isinstance(scale, Weight) else InMemory(np.asarray(scale).reshape(()))
        self.rows = tuple(rows)

    def read(self, region: Region) -> Array:
        start, stop, _ = region[1].indices(self.shape[1])
        codes = np.empty((self.shape[0], stop - start), self.dtype)
        plan = _Plan.of(np.concatenate([each.load().astype(np.float32) for each in self.rows]))
        step = max(1, _CHUNK_ELEMENTS // self.shape[0])
        for first in range(start, stop, step):
            last = min(first + step, stop)
            columns = (slice(0, self.shape[0]), slice(first, last))
            scale = self.scale.read(columns) if self.scale.shape else self.scale.load()
            codes[:, first - start : last - start] = plan.round(
                self.base.read(columns).astype(np.float32), scale.astype(np.float32), self.dtype
            )
        return codes[region[0]]

    def chunks(self) -> Iterator[Array]:
        """As of any weight; all codes are made first, since those of one column depend on one another."""
        codes = self.read(whole(self.shape))
        step = max(1, CHUNK_BYTES // self.shape[1])
        yield from (codes[start : start + step] for start in range(0, self.shape[0], step))

    def fingerprint(self) -> object:
        rows = tuple(each.fingerprint() for each in self.rows)
        return ("compensated", str(self.dtype), self.scale.fingerprint(), rows, self.base.fingerprint())


@dataclass(frozen=True)
class _Block:
    """Some rows of a weight, B of them, in the order in which they are rounded.

    Attributes:
        indices: which rows.
        features: the columns of F that multiply them, [S, B].
        pull: what R moves them by, [B, S].
        coupling: what the error of each moves the ones behind it by, [B, B] with zeros on and above the diagonal.
        hessian: F_B' F_B + D_B, [B, B].
        damping: D_B, [B, 1].
    """

    indices: Array
    features: Array
    pull: Array
    coupling: Array
    hessian: Array
    damping: Array


@dataclass(frozen=True)
class _Plan:
    """What rounding a weight takes from the rows, whatever the weight holds; float32, made in float64."""

    blocks: tuple[_Block, ...]

    @classmethod
    def of(cls, rows: Array) -> _Plan:
        """The plan of rows [S, K]; those with values that are not finite are left out."""
        features = rows[np.isfinite(rows).all(axis=1)].astype(np.float64)
        features /= max(float(np.abs(features).max(initial=0.0)), np.finfo(np.float32).tiny)
        power = np.einsum("sk,sk->k", features, features)
        damping = DAMPING * (power + power.mean())
        if not damping.any():
            damping[:] = 1.0  # rows of zeros say nothing: each weight is rounded by itself
        order = np.argsort(-power, kind="stable")
        inverse = np.eye(len(features))
        blocks: list[_Block] = []
        for start in reversed(range(0, len(order), _BLOCK)):
            indices = order[start : start + _BLOCK]
            part, weight = features[:, indices], np.diag(damping[indices])
            moved = part.T @ inverse
            hessian = moved @ part + weight
            pull = np.linalg.solve(hessian, moved)
            inverse -= moved.T @ pull
            factor = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]  # upper: H = U U'
            coupling = np.tril((factor / np.diag(factor)).T, -1)
            plain = part.T @ part + weight
            narrow = (part, pull, coupling, plain, damping[indices, None])
            blocks.append(_Block(indices, *(array.astype(np.float32) for array in narrow)))
        return cls(tuple(reversed(blocks)))

    def round(self, values: Array, scale: Array, dtype: np.dtype[Any]) -> Array:
        """The codes of weights [K, N] in float32 under scales that broadcast to them."""
        scales = np.broadcast_to(scale, values.shape)
        codes, errors = np.empty(values.shape, dtype), np.empty_like(values)
        response = np.zeros((self.blocks[0].features.shape[0], values.shape[1]), np.float32)
        for block in self.blocks:
            wanted = values[block.indices] + block.pull @ response
            codes[block.indices], moved = _settle(
                wanted, wanted, block.coupling, scales[block.indices], dtype
            )
            errors[block.indices] = values[block.indices] - (wanted - moved)
            response += block.features @ errors[block.indices]
        for _ in range(SWEEPS):
            for block in self.blocks:
                error = errors[block.indices]
                slope = block.features.T @ response + block.damping * error
                diagonal = np.diag(block.hessian)[:, None]
                rounded = values[block.indices] - error
                coupling = np.tril(block.hessian / diagonal, -1)
                codes[block.indices], moved = _settle(
                    rounded + slope / diagonal, rounded, coupling, scales[block.indices], dtype
                )
                errors[block.indices] = error + moved
                response += block.features @ moved
        return codes


def _settle(
    wanted: Array, origin: Array, coupling: Array, scales: Array, dtype: np.dtype[Any]
) -> tuple[Array, Array]:
    """Round rows one after the other, each moved by what the ones before it departed from `origin`.

    Returns:
        The codes, and `origin` less what they stand for.
    """
    largest = np.float32(LARGEST[dtype])
    codes, departed = np.empty(wanted.shape, dtype), np.empty_like(wanted)
    for row, along in enumerate(coupling):
        target = (wanted[row] + along[:row] @ departed[:row]) / scales[row]
        codes[row] = np.clip(target, -largest, largest)
        departed[row] = origin[row] - codes[row].astype(np.float32) * scales[row]
    return codes, departed


__all__ = ["DAMPING", "SWEEPS", "Compensated"]
