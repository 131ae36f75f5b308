"""Ranges by ModelOpt's calibrators, taken in torch, on a GPU where there is one, and kept where compiling finds them.

The graph is the one that `pi05c compile` calibrates, as a torch module (`pi05c.backend.torch_graph`), so that tensors have
its names. What float16 must hold is measured in torch itself; what is quantized goes through ModelOpt's calibrators.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi05c.calibration import keep_ranges
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.io import Model, load
from pi05c.graph.ranges import Ranges, Wanted
from pi05c.graph.requirements import refuse_unsupported
from pi05c.graph.runner import Array
from pi05c.passes.pipeline import run as run_steps
from pi05c.passrun import RunOptions, plan, samples_for
from pi05c.progress import Progress
from pi05c.samples import WAYS_TO_GIVE_SAMPLES, Samples
from pi05c.thresholds import Method, parse_method

if TYPE_CHECKING:
    from torch import Tensor

BINS = 2048
"""Of ModelOpt's histogram, which are of equal width."""


@dataclass(frozen=True)
class ModelOptCalibration:
    """What was measured.

    Attributes:
        ranges: by the names of the graph's tensors.
        file: where they are kept.
        samples: how many there were.
        device: that ran them.
    """

    ranges: Ranges
    file: Path
    samples: int
    device: str


def calibrate_with_modelopt(
    path: Path | str,
    passes: str | None = None,
    *,
    calibration: Sequence[str | Path] = (),
    calibration_method: str = "max",
    cache: Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> ModelOptCalibration:
    """Measure what the passes of a pipeline ask for, and keep it for `pi05c compile` with the same passes and samples.

    Args:
        path: the plain graph.
        passes: pipeline text; None for `default`.
        calibration: as `pi05c.samples.find_samples` takes it.
        calibration_method: `max` or `percentile{percent=99.99}`.
        cache: folder of measured ranges; None for the user's.
        device: of torch; None: `cuda` where there is one, else `cpu`.

    Raises:
        UsageError: another method.
        Pi05cError: torch or ModelOpt is not installed, or not of a supported version; there are no samples; no pass asks for ranges, or one asks for rows; a
            tensor holds NaN, or infinity where it is quantized; torch has no such operator as the graph.
    """
    progress = progress or Progress()
    method = parse_method(calibration_method)
    if method.kind not in ("max", "percentile") or method.joint:
        raise UsageError(
            f"--calibration-method {method} is not one of those that ModelOpt's calibrators give here: max, percentile"
        )
    refuse_unsupported("pi05c[torch,modelopt]")
    try:
        import modelopt.torch.quantization  # noqa: F401
        import torch
    except ImportError as error:
        raise Pi05cError(
            "ModelOpt's calibrators need the extras [torch] and [modelopt]: pip install 'pi05c[torch,modelopt]' "
            f"({error})"
        ) from error
    chosen = plan(passes, RunOptions())
    plain = load(path)
    found = samples_for(plain, chosen.steps, calibration, progress)
    if found is None:
        raise Pi05cError(f"there is no sample to calibrate with: {WAYS_TO_GIVE_SAMPLES}")
    samples = found.measured
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    done: list[ModelOptCalibration] = []

    def calibrate(model: Model, wanted: Wanted) -> Ranges:
        if wanted.rows:
            raise Pi05cError(
                "the passes ask for sampled rows, which ModelOpt's calibrators do not take: leave out rounding=compensated, "
                "or calibrate with pi05c compile"
            )
        with progress.stage(f"calibrate in torch on {place}") as update:
            fed = samples.only(tensor.name for tensor in model.graph.inputs)
            ranges = _measure(model, wanted, fed, method, place, update)
            file = keep_ranges(
                model, wanted.tensors, fed, ranges, cache, quantized=wanted.quantized, method=method
            )
        done.append(ModelOptCalibration(ranges, file, len(fed), place))
        raise _MeasuredError

    try:
        run_steps(plain, chosen.ahead, calibrate=calibrate)
    except _MeasuredError:
        return done[0]
    raise Pi05cError(f"no pass of {chosen.text} asks for ranges: name passes that quantize")


class _MeasuredError(Exception):
    """Ends a run of passes that was for its graph alone."""


def _measure(
    model: Model, wanted: Wanted, samples: Samples, method: Method, device: str, update: Any
) -> Ranges:
    import torch

    from pi05c.backend.torch_graph import TorchGraph

    tensors = {name for name in wanted.tensors if name}
    module = TorchGraph(model.graph.copy(), device, fuse=False)
    collected = _Collected(wanted.quantized, samples.source)
    rounds = 2 if method.counts else 1
    with torch.no_grad():
        for counting in range(rounds):
            for index in range(len(samples)):

                def see(name: str, value: Tensor, index: int = index, counting: bool = counting > 0) -> None:
                    if name in tensors and value.is_floating_point() and value.numel():
                        collected.take(name, value.float(), index, counting)

                module.observe(_on(samples[index], device), see)
                done = counting * len(samples) + index + 1
                update(done / (rounds * len(samples)), f"sample {index + 1} of {len(samples)}")
    return collected.ranges(method)


def _on(sample: Mapping[str, Array], device: str) -> dict[str, Tensor]:
    from pi05c.backend.torch_operators import to_torch

    return {name: to_torch(array).to(device) for name, array in sample.items()}


class _Collected:
    """Ranges so far, and ModelOpt's calibrators by tensor."""

    def __init__(self, quantized: Collection[str], source: str) -> None:
        self._quantized = quantized
        self._source = source
        self._low: dict[str, float] = {}
        self._high: dict[str, float] = {}
        self._largest: dict[str, Any] = {}
        self._histograms: dict[str, Any] = {}

    def take(self, name: str, value: Tensor, sample: int, counting: bool) -> None:
        """Take the values of a tensor, float32; `counting` is a second round, with histograms."""
        from modelopt.torch.quantization.calib import HistogramCalibrator, MaxCalibrator

        if counting:
            amax = max(-self._low[name], self._high[name])
            if name not in self._quantized or amax == 0:
                return
            if name not in self._histograms:
                calibrator = HistogramCalibrator(num_bins=BINS, skip_zeros=True)
                # What is collected first sets the width of all bins, of which there are too many if that is small.
                calibrator.collect(value.new_tensor([amax]))
                calibrator._calib_hist.zero_()
                self._histograms[name] = calibrator
            if value.any():
                self._histograms[name].collect(value)
            return
        low, high = (float(bound) for bound in value.aminmax())
        if math.isnan(low) or math.isnan(high):
            raise Pi05cError(
                f"tensor {name!r} holds NaN on sample {sample} of {self._source}, and is the first that does: take the "
                "sample out, or find what the model divides by zero or overflows there"
            )
        self._low[name] = min(low, self._low.get(name, math.inf))
        self._high[name] = max(high, self._high.get(name, -math.inf))
        if name in self._quantized:
            if math.inf in (-low, high):
                raise Pi05cError(
                    f"tensor {name!r}, which is to be quantized, holds infinity on sample {sample} of {self._source}, and "
                    "is the first that does: take the sample out"
                )
            self._largest.setdefault(name, MaxCalibrator()).collect(value)

    def ranges(self, method: Method) -> Ranges:
        """What was collected."""
        thresholds = {name: float(each.compute_amax()) for name, each in self._largest.items()}
        for name, each in self._histograms.items():
            clipped = float(each.compute_amax("percentile", percentile=method.percent))
            thresholds[name] = min(clipped, thresholds[name])
        return Ranges(self._low, self._high, self._source, thresholds=thresholds)


__all__ = ["ModelOptCalibration", "calibrate_with_modelopt"]
