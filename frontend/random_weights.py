"""Seeded weights shaped like a trained model's, generated while they are read.

Each element is a function of seed, parameter name and position alone, so it does not matter in which pieces a
tensor is read. 16 random bits choose one of 65,536 quantiles of a heavy-tailed distribution, scaled to the tensor:
one table look-up an element, fast enough to write the full-size model at the speed of a disk.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from pi05c.graph.dtypes import BFLOAT16
from pi05c.graph.runner import Array
from pi05c.graph.weights import Region, Weight

OUTLIER_FACTOR = 6.0
"""How much larger the weights of an outlier input channel of the language model are than the others."""

OUTLIER_SHARE = 1 / 64
"""Share of the input channels that are outliers."""

TAIL_WEIGHT = 1 / 24
"""A normal quantile z becomes z + TAIL_WEIGHT (z^3 - 3 z), with an excess kurtosis of 1.4 and a largest of 65,536
quantiles at 6.7 standard deviations; trained linear layers lie between a Gaussian and several times that."""

_ROW_SCALES = (0.7, 0.9, 1.0, 1.1, 1.4)
"""Relative scales of the output channels of a matrix."""

_GAIN_SPREAD = 0.25
"""Standard deviation of the logarithm of a matrix's own gain: layers differ."""

_CODES_A_COUNT = 16
"""16-bit numbers that one step of Philox's counter yields (4 words of 64 bits)."""


@dataclass(frozen=True)
class _Shape:
    """How a parameter is distributed: mean, standard deviation, and what varies from channel to channel."""

    mean: float
    deviation: float
    matrix: bool = False
    outliers: bool = False


_KINDS: Sequence[tuple[str, _Shape]] = (
    (r"post_layernorm\.weight$|layer_norm\d\.weight$", _Shape(1.0, 0.2)),
    (r"post_layernorm\.bias$|layer_norm\d\.bias$", _Shape(0.0, 0.1)),
    (r"norm\.weight$", _Shape(0.0, 0.2)),
    (r"norm\.dense\.weight$", _Shape(0.0, 0.5, matrix=True)),
    (r"norm\.dense\.bias$", _Shape(0.0, 0.3)),
    (r"\.bias$", _Shape(0.0, 0.05)),
    (r"position_embedding\.weight$", _Shape(0.0, 0.13)),
    (r"language_model\.layers\..*_proj\.weight$", _Shape(0.0, 1.0, matrix=True, outliers=True)),
    (r"\.weight$", _Shape(0.0, 1.0, matrix=True)),
)
"""The first pattern that a name contains decides. Deviations of matrices are times 1 / sqrt(inputs)."""


class RandomWeight(Weight):
    """The parameter `name` of a random model in bfloat16."""

    def __init__(self, name: str, shape: Sequence[int], seed: int) -> None:
        super().__init__(shape, BFLOAT16)
        self._key = _key(seed, name)
        kind = next(kind for pattern, kind in _KINDS if re.search(pattern, name))
        self._mean, self._deviation = kind.mean, kind.deviation
        self._row_groups: npt.NDArray[np.intp] | None = None
        self._outliers: npt.NDArray[np.intp] | None = None
        if kind.matrix:
            generator = np.random.Generator(np.random.Philox(key=_key(seed, name + " scales")))
            self._deviation *= math.exp(_GAIN_SPREAD * generator.standard_normal()) / math.sqrt(
                math.prod(self.shape[1:])
            )
            self._row_groups = generator.integers(len(_ROW_SCALES), size=self.shape[0])
        if kind.outliers:
            # Linear layers that read the same activations share their outlier channels.
            inputs = name.rpartition(".layers.")[0] + f" {self.shape[-1]} inputs"
            generator = np.random.Generator(np.random.Philox(key=_key(seed, inputs)))
            count = max(1, round(self.shape[-1] * OUTLIER_SHARE))
            self._outliers = np.sort(generator.permutation(self.shape[-1])[:count])

    def read(self, region: Region) -> Array:
        start, stop, _ = region[0].indices(self.shape[0])
        row = math.prod(self.shape[1:])
        codes = self._codes(start * row, stop * row).reshape(stop - start, row)
        if self._row_groups is None:
            values = self._table(1.0)[codes]
        else:
            values = np.empty(codes.shape, self.dtype)
            groups = self._row_groups[start:stop]
            for group, scale in enumerate(_ROW_SCALES):
                rows = np.flatnonzero(groups == group)
                values[rows] = self._table(scale)[codes[rows]]
                if self._outliers is not None:
                    cells = np.ix_(rows, self._outliers)
                    values[cells] = self._table(scale * OUTLIER_FACTOR)[codes[cells]]
        inner: Region = (slice(None), *region[1:])
        return values.reshape(stop - start, *self.shape[1:])[inner]

    def _codes(self, start: int, stop: int) -> npt.NDArray[np.uint16]:
        """The random 16-bit numbers at flat positions start to stop."""
        first = start // _CODES_A_COUNT
        count = -(-stop // _CODES_A_COUNT) - first
        words = np.random.Philox(key=self._key, counter=first).random_raw(4 * count)
        codes = np.asarray(words, "<u8").view("<u2")
        offset = start - first * _CODES_A_COUNT
        return codes[offset : offset + stop - start]

    def _table(self, scale: float) -> Array:
        return (self._mean + self._deviation * scale * _quantiles()).astype(self.dtype)


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Weight]:
    """Weights for parameters of these names and shapes, the same for the same seed.

    Only the seed, the name and the shape matter: a smaller set of parameters gets the same values.
    """
    return {name: RandomWeight(name, shape, seed) for name, shape in shapes.items()}


def _key(seed: int, name: str) -> npt.NDArray[np.uint64]:
    return np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "<u8").astype(np.uint64)


@cache
def _quantiles() -> npt.NDArray[np.float64]:
    """65,536 quantiles of zero mean and unit variance, with heavy tails (see `TAIL_WEIGHT`)."""
    probabilities = (np.arange(2**16) + 0.5) / 2**16
    normal = np.array([NormalDist().inv_cdf(float(value)) for value in probabilities], np.float64)
    heavy = normal + TAIL_WEIGHT * (normal**3 - 3 * normal)
    return np.asarray(heavy / heavy.std(), np.float64)


__all__ = ["OUTLIER_FACTOR", "OUTLIER_SHARE", "TAIL_WEIGHT", "RandomWeight", "random_weights"]
