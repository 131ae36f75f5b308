"""What one choice of `pi05c tune` costs: its error, its bytes, and the floor of its time. One task of a map.

Tasks share a folder with the graph before `quantize_linears`, the ranges and the samples, so that what all choices have
in common is done once. Results are kept in a file beside the recipe, under a hash of all that they depend on: a run that
was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pi05c.backend.devices import DEVICES
from pi05c.backend.onnxruntime import OnnxRuntimeRunner
from pi05c.comparison import OutputError, compare
from pi05c.cost import total
from pi05c.graph.errors import Pi05cError
from pi05c.graph.files import read_text, write_text
from pi05c.graph.io import DataFolder, load, save
from pi05c.graph.runner import Array
from pi05c.inspection import weight_totals
from pi05c.kernels import kernels_of
from pi05c.passes.pipeline import run
from pi05c.plugins import parse_passes
from pi05c.samples import save_samples
from pi05c.stages import recorded_ranges

FORMAT = 1
"""Raised whenever choices must be measured again though none of what their keys cover changed."""

TIME = "time"
COSTS = (TIME, "read", "stored")
"""What a choice can be cheap in: the floor of its time, bytes of weights that one run reads, or bytes of weights."""

STAGE = "stage.onnx"
"""The graph that all choices start from."""


_MOST = 2.0**63
"""What is beyond it is no number of bytes, and no number of seconds."""


@dataclass(frozen=True)
class Task:
    """One choice on some samples.

    Attributes:
        folder: see above; the machine that runs the task must see it.
        passes: those behind the stage, as pipeline text.
        samples: which ones.
        threads: for the operators; None for all processors.
    """

    folder: Path
    passes: str
    plugins: tuple[str, ...]
    samples: tuple[int, ...]
    threads: int | None = None


@dataclass(frozen=True)
class Measured:
    """What a choice costs.

    Attributes:
        errors: relative L2 of the worst output of each sample, against the plain graph.
        cosines: the smallest of each sample.
        stored: bytes of all weights, each once.
        read: bytes of weights that the kernels of one run read.
        floors: seconds, by the name of the GPU: the sum of each kernel's roofline time.
    """

    errors: tuple[float, ...]
    cosines: tuple[float, ...]
    stored: int
    read: int
    floors: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(self.errors)

    @property
    def mean_square(self) -> float:
        """The mean of the squared errors."""
        return math.fsum(error * error for error in self.errors) / len(self.errors)

    def cost(self, what: str, device: str) -> float:
        """What is to be small: one of `COSTS`."""
        return {TIME: self.floors[device], "read": self.read, "stored": self.stored}[what]

    def at(self, places: Sequence[int]) -> Measured:
        """The outcome on some of the samples, counted from 0."""
        return replace(
            self, errors=tuple(self.errors[i] for i in places), cosines=tuple(self.cosines[i] for i in places)
        )

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Measured:
        """The inverse of `dataclasses.asdict`.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, OverflowError: it is no such record.
        """
        found = cls(
            tuple(map(float, record["errors"])),
            tuple(map(float, record["cosines"])),
            int(record["stored"]),
            int(record["read"]),
            {str(name): float(value) for name, value in record["floors"].items()},
        )
        costs = (found.stored, found.read, *found.floors.values())
        if not (
            len(found.errors) == len(found.cosines) > 0
            and all(error >= 0 for error in found.errors)
            and all(0 <= cost < _MOST for cost in costs)
        ):
            raise ValueError("these are no results of a measurement")
        return found


def write_sample(folder: Path, index: int, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Put a sample with its reference outputs where tasks find it.

    Raises:
        Pi05cError: the file cannot be written.
    """
    save_samples(folder / f"inputs{index}.npz", [inputs])
    save_samples(folder / f"outputs{index}.npz", [outputs])


def measure(task: Task) -> Measured:
    """Rewrite the stage, run it, and count what it costs.

    Raises:
        Pi05cError: a pass fails, or the graph cannot be written or run.
    """
    steps = parse_passes(task.passes, task.plugins)
    model = load(task.folder / STAGE)
    ranges = recorded_ranges(task.folder)
    run(model, steps, calibrate=lambda _model, _wanted: ranges)
    path = task.folder / f"{hashlib.sha256(f'{task.passes} {task.samples}'.encode()).hexdigest()[:16]}.onnx"
    try:
        save(model, path, shared=DataFolder(task.folder))
        runner = OnnxRuntimeRunner(path, threads=task.threads)
        errors = [_errors(runner, task.folder, index) for index in task.samples]
    finally:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    kernels = kernels_of(model)
    floors = {device.name: total(kernels, device).seconds or 0.0 for device in DEVICES}
    return Measured(
        tuple(max(error.relative_l2 for error in found) for found in errors),
        tuple(min(error.cosine for error in found) for found in errors),
        sum(weights.bytes for weights in weight_totals(model.graph)),
        total(kernels).weight_bytes,
        floors,
    )


def _errors(runner: OnnxRuntimeRunner, folder: Path, index: int) -> Sequence[OutputError]:
    with np.load(folder / f"inputs{index}.npz") as inputs, np.load(folder / f"outputs{index}.npz") as outputs:
        result = runner.run({spec.name: inputs[spec.name] for spec in runner.inputs})
        return compare([dict(outputs)], [result]).errors


class Store:
    """Results by key, in a JSON file that is written after each."""

    def __init__(self, path: Path, context: Iterable[str]) -> None:
        """Read what is there; a file that cannot be read as results counts as none.

        Args:
            context: what all keys depend on, such as hashes of graph and samples.
        """
        self._path = path
        self._context = [str(FORMAT), *context]
        self._found: dict[str, Measured] = {}
        try:
            records = json.loads(read_text(path))["measurements"]
            self._found = {key: Measured.from_json(record) for key, record in records.items()}
        except (Pi05cError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            pass

    def get(self, task: Task, samples: Sequence[str]) -> Measured | None:
        """What was measured of a task before.

        Args:
            samples: hashes of those of the task.
        """
        return self._found.get(self._key(task, samples))

    def put(self, task: Task, samples: Sequence[str], measured: Measured) -> None:
        """Keep a result.

        Raises:
            Pi05cError: the file cannot be written.
        """
        self._found[self._key(task, samples)] = measured
        found = {key: asdict(found) for key, found in self._found.items()}
        write_text(self._path, json.dumps({"measurements": found}))

    def _key(self, task: Task, samples: Sequence[str]) -> str:
        parts = [*self._context, task.passes, *samples]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


__all__ = ["COSTS", "STAGE", "TIME", "Measured", "Store", "Task", "measure", "write_sample"]
