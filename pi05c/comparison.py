"""How far one set of results is from another: the one comparison of outputs.

Every sum runs in float64, whatever the arrays hold. A result with a NaN, or with an infinity where the reference
has a number, is infinitely wrong and passes no limit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi05c.graph.errors import Pi05cError
from pi05c.graph.runner import Array


@dataclass(frozen=True)
class Error:
    """Departure of a result x from its reference r.

    Attributes:
        cosine: x . r / (|x| |r|): 1 where both are zero, 0 where one is, -1 where x is not finite.
        relative_l2: |x - r| / |r|: where r is zero, 0 if x is too, else inf.
        sqnr_db: 20 log10(|r| / |x - r|), the signal-to-quantization-noise ratio in decibels: inf where x equals r.
        max_abs: the largest |x - r|, in the units of the output.
    """

    cosine: float
    relative_l2: float
    sqnr_db: float
    max_abs: float


@dataclass(frozen=True)
class OutputError(Error):
    """An `Error` with the sample, counted from 0, and the output that it belongs to."""

    sample: int
    output: str


@dataclass(frozen=True)
class Comparison:
    """Errors of every output of every sample, sample by sample."""

    errors: tuple[OutputError, ...]

    @property
    def worst(self) -> OutputError:
        """The one with the largest relative L2 error, the first of equals: what a limit holds for."""
        return max(self.errors, key=lambda error: error.relative_l2)

    def worst_by_output(self) -> dict[str, Error]:
        """For each output the worst of each figure over all samples; the figures may stem from several samples."""
        outputs = dict.fromkeys(error.output for error in self.errors)
        return {output: _worst([e for e in self.errors if e.output == output]) for output in outputs}

    def passes(self, max_relative_l2: float) -> bool:
        """Whether the relative L2 error of every output of every sample is within a limit."""
        return all(error.relative_l2 <= max_relative_l2 for error in self.errors)

    def as_json(self) -> dict[str, Any]:
        """What `json.dumps(..., allow_nan=False)` takes: infinite figures become the texts `inf` and `-inf`."""
        by_output = {output: _plain(error) for output, error in self.worst_by_output().items()}
        return {
            "worst": _plain(self.worst),
            "worst_by_output": by_output,
            "errors": [_plain(error) for error in self.errors],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Comparison:
        """The inverse of `as_json`."""
        types = {"sample": int, "output": str}
        return cls(
            tuple(
                OutputError(**{key: types.get(key, float)(value) for key, value in error.items()})
                for error in record["errors"]
            )
        )


def compare(reference: Sequence[Mapping[str, Array]], result: Sequence[Mapping[str, Array]]) -> Comparison:
    """Compare results with references, sample by sample and output by output.

    Args:
        reference: outputs by name, one mapping a sample.
        result: as many samples; outputs that the reference lacks are ignored.

    Raises:
        Pi05cError: there is nothing to compare, the numbers of samples differ, a result lacks an output of the
            reference or has another shape, or a reference holds NaN or infinity.
    """
    if len(reference) != len(result):
        raise Pi05cError(
            f"{len(result)} results cannot be compared with {len(reference)} references: run both on the same samples"
        )
    errors = []
    for sample, (expected, actual) in enumerate(zip(reference, result, strict=True)):
        for output, values in expected.items():
            if output not in actual:
                raise Pi05cError(
                    f"the result of sample {sample} lacks output {output!r}: it has {', '.join(actual) or 'none'}"
                )
            error = error_of(values, actual[output], f"output {output!r} of sample {sample}")
            errors.append(OutputError(**dataclasses.asdict(error), sample=sample, output=output))
    if not errors:
        raise Pi05cError("there is nothing to compare: give at least one sample with at least one output")
    return Comparison(tuple(errors))


def drift(reference: Sequence[Array] | Array, result: Sequence[Array] | Array) -> tuple[float, ...]:
    """Relative L2 error of each denoising step.

    Args:
        reference, result: x_t or v_t, one array a step (a list, or one array with a leading axis of steps).

    Raises:
        Pi05cError: the numbers of steps or the shapes differ, or the reference is not finite.
    """
    if len(reference) != len(result):
        raise Pi05cError(
            f"a run of {len(result)} denoising steps cannot be compared with one of {len(reference)}: export or unroll "
            "both with the same number"
        )
    steps = enumerate(zip(reference, result, strict=True))
    return tuple(error_of(r, x, f"denoising step {step}").relative_l2 for step, (r, x) in steps)


def error_of(reference: Array, result: Array, what: str = "a result") -> Error:
    """Compare two arrays of one shape and of any types that hold numbers; `what` names them in error messages.

    Raises:
        Pi05cError: the shapes differ, or the reference holds NaN or infinity.
    """
    if np.shape(reference) != np.shape(result):
        raise Pi05cError(
            f"{what} has shape {list(np.shape(result))} but its reference {list(np.shape(reference))}: both must "
            "come from graphs of the same sizes"
        )
    r = np.asarray(reference).astype(np.float64).reshape(-1)
    x = np.asarray(result).astype(np.float64).reshape(-1)
    if not np.isfinite(r).all():
        raise Pi05cError(
            f"the reference of {what} holds NaN or infinity, so nothing can be measured against it: check the plain "
            "graph on this sample"
        )
    if not np.isfinite(x).all():
        return Error(cosine=-1.0, relative_l2=math.inf, sqnr_db=-math.inf, max_abs=math.inf)
    difference = _norm(x - r)
    relative = _ratio(difference, _norm(r))
    return Error(
        cosine=_cosine(r, x),
        relative_l2=relative,
        sqnr_db=math.inf if relative == 0 else -20 * math.log10(relative),
        max_abs=float(np.abs(x - r).max(initial=0.0)),
    )


def _norm(values: Array) -> float:
    """The L2 norm, scaled so that the squares of the largest float32 values and of tiny ones stay in range."""
    largest = float(np.abs(values).max(initial=0.0))
    return largest * float(np.sqrt(np.square(values / largest).sum())) if largest else 0.0


def _ratio(difference: float, norm: float) -> float:
    if norm:
        return difference / norm
    return math.inf if difference else 0.0


def _cosine(r: Array, x: Array) -> float:
    norms = _norm(r), _norm(x)
    if not all(norms):
        return 0.0 if any(norms) else 1.0
    return float(np.clip(np.dot(r / norms[0], x / norms[1]), -1.0, 1.0))


def _worst(errors: Sequence[Error]) -> Error:
    return Error(
        cosine=min(error.cosine for error in errors),
        relative_l2=max(error.relative_l2 for error in errors),
        sqnr_db=min(error.sqnr_db for error in errors),
        max_abs=max(error.max_abs for error in errors),
    )


def _plain(error: Error) -> dict[str, Any]:
    return {
        key: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        for key, value in dataclasses.asdict(error).items()
    }


__all__ = ["Comparison", "Error", "OutputError", "compare", "drift", "error_of"]
