"""Calibration methods: at which magnitude a quantizer clips, chosen on the histogram of what it quantizes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import ml_dtypes
import numpy as np

from pi05c.graph.errors import UsageError
from pi05c.graph.runner import Array
from pi05c.passes.quantize import E4M3_MAX
from pi05c.reductions import BINS, BINS_AN_OCTAVE, LEAST_EXPONENT, OCTAVES

Kind = Literal["max", "percentile", "mse", "entropy"]

PERCENT = 99.99
"""What `percentile` takes without an option, as ModelOpt's calibrator does."""

_SCALES = 16
"""Scales tried, that of the largest magnitude first, each half the one before: most of what E4M3 spans."""

_METHOD = re.compile(r"(?P<kind>\w+)(?:\{(?P<options>[^{}]*)\})?\Z")


@dataclass(frozen=True)
class Method:
    """How the range of what is quantized is chosen.

    Attributes:
        kind: `max`, the largest magnitude; `percentile`, what `percent` of the elements other than zero do not exceed; `mse`, the scale with
            the least squared rounding error; `entropy`, the scale with the least Kullback-Leibler divergence of the
            quantized distribution from the original one.
        percent: of `percentile`.
        joint: one range for the copies of a tensor in all unrolled denoising steps.
    """

    kind: Kind = "max"
    percent: float = PERCENT
    joint: bool = False

    @property
    def counts(self) -> bool:
        """Whether it needs histograms."""
        return self.kind != "max"

    def __str__(self) -> str:
        options = []
        if self.kind == "percentile":
            options.append(f"percent={self.percent:g}")
        if self.joint:
            options.append("steps=joint")
        return f"{self.kind}{{{','.join(options)}}}" if options else self.kind


MAX = Method()


def parse_method(text: str) -> Method:
    """`max`, `percentile{percent=99.9}`, `mse{steps=joint}`.

    Raises:
        UsageError: an unknown method or option, or a value that it does not take.
    """
    known = ", ".join(get_args(Kind))
    match = _METHOD.match(text.strip())
    if match is None or match["kind"] not in get_args(Kind):
        raise UsageError(
            f"--calibration-method {text} is not known: give one of {known}, with options as in percentile{{percent=99.9}}"
        )
    kind: Kind = match["kind"]  # type: ignore[assignment]
    percent, joint = PERCENT, False
    for item in filter(None, (match["options"] or "").split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if key == "percent" and kind == "percentile":
            percent = _percent(value)
        elif key == "steps" and value in ("each", "joint"):
            joint = value == "joint"
        else:
            raise UsageError(
                f"option {item.strip()!r} of --calibration-method {kind} is not usable: known are steps=each, steps=joint "
                "and, of percentile, percent=99.99"
            )
    return Method(kind, percent, joint)


def _percent(text: str) -> float:
    try:
        percent = float(text)
    except ValueError:
        percent = math.nan
    if not 0 < percent <= 100:
        raise UsageError(
            f"percent={text} of --calibration-method percentile is not usable: give a number up to 100"
        )
    return percent


@dataclass(frozen=True)
class Histogram:
    """How many elements have which magnitude, in bins of equal ratio.

    Attributes:
        counts: int64 [BINS]; the first bin holds zeros and whatever is too small for the second.
        exponent: the last bin ends at 2 to this power.
    """

    counts: Array
    exponent: int

    @classmethod
    def of_output(cls, row: Array) -> Histogram:
        """Of what the graph gave for one tensor, int32 [1 + BINS]; see `pi05c.reductions.HistogramOutput`."""
        return cls(row[1:].astype(np.int64), int(row[0]) + LEAST_EXPONENT)

    def __add__(self, other: Histogram) -> Histogram:
        """Both together, up to where the larger one ends; in whatever order histograms are added, the sum is the same."""
        exponent = max(self.exponent, other.exponent)
        return Histogram(self._up_to(exponent) + other._up_to(exponent), exponent)

    def _up_to(self, exponent: int) -> Array:
        shift = min((exponent - self.exponent) * BINS_AN_OCTAVE, BINS - 1)
        moved = np.zeros_like(self.counts)
        moved[0] = self.counts[: shift + 1].sum()
        moved[1 : BINS - shift] = self.counts[shift + 1 :]
        return moved

    @property
    def edges(self) -> Array:
        """Where each bin ends, float64 [BINS]."""
        edges: Array = 2.0 ** (self.exponent - OCTAVES + np.arange(1, BINS + 1) / BINS_AN_OCTAVE)
        return edges

    @property
    def centers(self) -> Array:
        """The middle of each bin, float64 [BINS]; the first stands for zero."""
        centers: Array = self.edges * 2.0 ** (-0.5 / BINS_AN_OCTAVE)
        centers[0] = 0.0
        return centers


def threshold(histogram: Histogram, amax: float, method: Method) -> float:
    """The magnitude that a quantizer should reach, at most `amax`; `amax` itself where that is zero.

    `mse` and `entropy` choose among the scales that FP8 quantizers use here, powers of two
    (`pi05c.passes.quantize.activation_scale`), by what E4M3 makes of the middles of the bins.

    Args:
        amax: the largest magnitude, finite.
    """
    if amax <= 0 or not method.counts:
        return amax
    if method.kind == "percentile":
        return min(amax, _percentile(histogram, method.percent))
    largest = math.ceil(math.log2(amax / E4M3_MAX))
    scales = [2.0 ** (largest - octave) for octave in range(_SCALES)]
    loss = _squared_error if method.kind == "mse" else _divergence
    losses = [loss(histogram, scale) for scale in scales]
    return min(amax, E4M3_MAX * scales[int(np.argmin(losses))])


def _percentile(histogram: Histogram, percent: float) -> float:
    """The end of the first bin up to which `percent` of the elements that are not zero lie; infinite without any."""
    below = np.cumsum(histogram.counts[1:])
    if below[-1] == 0:
        return math.inf
    index = int(np.searchsorted(below, below[-1] * (percent / 100)))
    return float(histogram.edges[1 + min(index, BINS - 2)])


def _rounded(values: Array, scale: float) -> Array:
    """What E4M3 makes of magnitudes, saturated."""
    codes = np.minimum(values / scale, E4M3_MAX).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float64) * scale


def _squared_error(histogram: Histogram, scale: float) -> float:
    error = _rounded(histogram.centers, scale) - histogram.centers
    return float(np.dot(error * error, histogram.counts))


def _divergence(histogram: Histogram, scale: float) -> float:
    """Kullback-Leibler divergence in nats, each quantized value spread over the bins that are rounded to it.

    As in TensorRT's calibration (S. Migacz, 8-bit Inference with TensorRT, GTC 2017): what lies beyond the last bin that
    is not clipped counts there in the reference, and does not take part in what is spread. Zeros are left out.
    """
    counts = histogram.counts[1:].astype(np.float64)
    centers = histogram.centers[1:]
    inside = centers <= E4M3_MAX * scale
    if not inside.any() or not counts.any():
        return math.inf
    reference, kept = counts[inside].copy(), counts[inside]
    reference[-1] += counts[~inside].sum()
    _, groups = np.unique(_rounded(centers[inside], scale), return_inverse=True)
    filled = (kept > 0).astype(np.float64)
    totals, bins = np.bincount(groups, kept), np.bincount(groups, filled)
    spread = np.where(kept > 0, totals[groups] / np.maximum(bins[groups], 1), 0.0)
    if not spread.any():
        return math.inf
    p, q = reference / reference.sum(), spread / spread.sum()
    smallest = np.finfo(np.float64).tiny
    taken = p > 0
    return float(np.sum(p[taken] * np.log(p[taken] / np.maximum(q[taken], smallest))))


_STEP = re.compile(r"(?:(?<=/)|\A)step_\d+/")
"""What `pi05c.passes.unroll` puts in front of the names of a step's copies."""


@dataclass
class Thresholds:
    """Collects histograms, and chooses thresholds."""

    method: Method
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def add(self, name: str, histogram: Histogram) -> None:
        """Count more elements of a tensor."""
        known = self.histograms.get(name)
        self.histograms[name] = histogram if known is None else known + histogram

    def choose(self, amax: Mapping[str, float]) -> dict[str, float]:
        """The threshold of each tensor that `amax` names."""
        groups: dict[str, list[str]] = {}
        for name in amax:
            groups.setdefault(_STEP.sub("", name) if self.method.joint else name, []).append(name)
        chosen = {}
        for names in groups.values():
            largest = max(amax[name] for name in names)
            counted = [self.histograms[name] for name in names if name in self.histograms]
            value = threshold(sum(counted[1:], counted[0]), largest, self.method) if counted else largest
            chosen.update(dict.fromkeys(names, value))
        return chosen


__all__ = ["MAX", "Histogram", "Method", "Thresholds", "parse_method", "threshold"]
