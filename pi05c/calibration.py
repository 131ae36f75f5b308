"""Ranges of tensors, measured by running a model in onnxruntime on samples.

Each sample is run by itself, in this process or another (`pi05c.executors`), and what they give is merged in their order.
Of some tensors a few rows are kept too, chosen by hashes of sample and tensor, so that the order of the samples does not
matter. Results are kept under a hash of the graph, its weights, the data and onnxruntime's version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pi05c.executors import run_tasks
from pi05c.graph.dtypes import BFLOAT16
from pi05c.graph.errors import MachineError, Pi05cError, unreadable, unwritable
from pi05c.graph.files import read_text, replacing, write_text
from pi05c.graph.io import Model, location_of, to_proto
from pi05c.graph.io import tensors as stored_tensors
from pi05c.graph.ranges import Ranges
from pi05c.graph.runner import Array
from pi05c.graph.text import canonical_text
from pi05c.graph.weights import InMemory, Stored, Weight, stored_bytes
from pi05c.probing import Probed, ProbedGraph
from pi05c.reductions import HAS_NAN, HIGH, LOW, TOTAL, RowOutput
from pi05c.samples import Samples
from pi05c.thresholds import MAX, Histogram, Method, Thresholds

CACHE_VARIABLE = "PI05C_CACHE"
"""Environment variable that names the folder of measured ranges."""

FORMAT = 3
"""Raised whenever ranges must be measured again though neither the graph nor the data changed."""

_PROBES = (LOW, HIGH, TOTAL)

Progress = Callable[[int, int], None]
"""Told how many samples of how many are done."""


@dataclass(frozen=True)
class MeasuredRanges(Ranges):
    """Ranges, and what they were measured on.

    An infinite bound is a value that the tensor took: an additive mask may hold -inf.

    Attributes:
        left_out: tensors that were asked for and could not be measured, with the reason.
        graph_sha256: of the graph and its weights (`graph_sha256`).
        data_sha256: of the samples (`Samples.sha256`).
        samples: how many there were.
        cached: whether they were measured by an earlier run.
    """

    left_out: Mapping[str, str] = field(default_factory=dict)
    graph_sha256: str = ""
    data_sha256: str = ""
    samples: int = 0
    cached: bool = field(default=False, compare=False)


def measure_ranges(
    model: Model,
    tensors: Sequence[str],
    samples: Samples,
    *,
    rows: Mapping[str, int] | None = None,
    quantized: Collection[str] = (),
    method: Method = MAX,
    threads: int | None = None,
    progress: Progress | None = None,
    scratch: Path | None = None,
    executor: Executor | None = None,
) -> MeasuredRanges:
    """Smallest and largest value of tensors over all samples, and over all steps of the bodies that they lie in.

    Args:
        model: runs in float32 or, with the bits of its types, in whatever the onnxruntime backend lowers.
        tensors: names of graph inputs and of tensors that nodes compute, in bodies of Loop and Scan too. Those that
            are not of a floating type are passed over.
        rows: how many rows of which tensors to keep, rounded to bfloat16; none of those inside bodies.
        quantized: those of `tensors` for which `method` chooses a threshold.
        threads: for operators; None: one for each processor that this process may use.
        scratch: folder for weights that have to be evaluated; None: the system's folder for temporary files.
        executor: where samples run; None: here, one after the other. The result is the same.

    Raises:
        Pi05cError: there are no samples, a tensor holds NaN, or onnxruntime cannot run the graph.
    """
    asked = _Asked.of(tensors, rows, quantized, method)
    return _measure(model, asked, samples, graph_sha256(model), threads, progress, scratch, executor)


@dataclass(frozen=True)
class _Asked:
    """What is to be measured; see `measure_ranges`."""

    tensors: tuple[str, ...]
    rows: Mapping[str, int]
    quantized: frozenset[str]
    method: Method

    @classmethod
    def of(
        cls,
        tensors: Sequence[str],
        rows: Mapping[str, int] | None,
        quantized: Collection[str],
        method: Method,
    ) -> _Asked:
        return cls(tuple(tensors), rows or {}, frozenset(() if method == MAX else quantized), method)

    @property
    def counted(self) -> frozenset[str]:
        """The tensors of which histograms are taken."""
        return self.quantized if self.method.counts else frozenset()


def _measure(
    model: Model,
    asked: _Asked,
    samples: Samples,
    graph_hash: str,
    threads: int | None,
    progress: Progress | None,
    scratch: Path | None,
    executor: Executor | None,
) -> MeasuredRanges:
    if not samples:
        raise Pi05cError("there is no sample to calibrate with: give --calibration FILE.npz")
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    taken: dict[str, list[Array]] = {}
    with contextlib.ExitStack() as stack:
        probed = stack.enter_context(
            ProbedGraph.of(
                model,
                asked.tensors,
                _PROBES,
                rows=asked.rows,
                histograms=asked.counted,
                threads=threads,
                scratch=scratch,
            )
        )
        found = probed.reductions
        chosen = {each.tensor: _chosen(each, asked.rows[each.tensor], samples) for each in found.rows}
        exact: dict[tuple[str, ...], ProbedGraph] = {}
        tasks = (
            _Task(
                probed,
                samples[index : index + 1],
                {name: places[index] for name, places in chosen.items()},
            )
            for index in range(len(samples))
        )
        thresholds = Thresholds(asked.method)
        for index, result in enumerate(run_tasks(_run, tasks, executor)):
            lows, highs, totals = result.numbers
            suspects = tuple(name for name, total in zip(found.names, totals, strict=True) if np.isnan(total))
            if suspects:
                if suspects not in exact:
                    counted = ProbedGraph.of(model, suspects, (HAS_NAN,), threads=threads, scratch=scratch)
                    exact[suspects] = stack.enter_context(counted)
                _refuse_nan(exact[suspects], index, samples)
            for name, smallest, largest in zip(found.names, lows.tolist(), highs.tolist(), strict=True):
                low[name] = min(low.get(name, math.inf), smallest)
                high[name] = max(high.get(name, -math.inf), largest)
            for output, counts in zip(found.histograms, result.histograms, strict=True):
                for name, of_steps in zip(output.names, _by_tensor(counts), strict=True):
                    if math.inf in (-low[name], high[name]):
                        raise Pi05cError(
                            f"tensor {name!r}, which is to be quantized, holds infinity on sample {index} of "
                            f"{samples.source}, and is the first that does: take the sample out, or --calibration-method max"
                        )
                    for row in of_steps:
                        thresholds.add(name, Histogram.of_output(row))
            for name, values in result.rows.items():
                taken.setdefault(name, []).append(values)
            if progress is not None:
                progress(index + 1, len(samples))
    left_out = dict(found.left_out)
    measured = {}
    for name, root in found.measured_as.items():
        if low[root] <= high[root]:
            measured[name] = root
        else:
            left_out[name] = "it was never computed: the body that it lies in runs no step on these samples"
    largest = {
        root: max(abs(low[root]), abs(high[root]))
        for name, root in measured.items()
        if name in asked.quantized
    }
    clipped = thresholds.choose(largest)
    return MeasuredRanges(
        {name: low[root] for name, root in measured.items()},
        {name: high[root] for name, root in measured.items()},
        samples.source,
        samples.synthetic,
        {name: InMemory(np.concatenate(parts)) for name, parts in taken.items()},
        {name: clipped[root] for name, root in measured.items() if name in asked.quantized},
        left_out,
        graph_hash,
        samples.sha256,
        len(samples),
    )


@dataclass(frozen=True)
class _Task:
    """One sample, and which rows are kept of it."""

    graph: ProbedGraph
    sample: Samples
    places: Mapping[str, Array]


def _run(task: _Task) -> Probed:
    """What the graph gives, rows in bfloat16."""
    found = task.graph.run(task.sample[0], task.places)
    rows = {name: values.astype(BFLOAT16) for name, values in found.rows.items()}
    return Probed(found.numbers, rows, found.histograms)


def _by_tensor(counts: Array) -> Array:
    """Histograms of any number of steps as [tensors, steps, 1 + BINS]."""
    by_tensor: Array = counts.reshape(-1, *counts.shape[-2:]).swapaxes(0, 1)
    return by_tensor


def _chosen(rows: RowOutput, count: int, samples: Samples) -> list[Array]:
    """Which rows of a tensor are kept of each sample: of all samples' rows those with the smallest random numbers."""
    drawn = []
    for hashed in samples.hashes:
        seed = int(hashlib.sha256(f"{hashed} {rows.tensor}".encode()).hexdigest()[:16], 16)
        drawn.append(np.random.Generator(np.random.PCG64(seed)).random(rows.count))
    numbers = np.concatenate(drawn)
    last = np.partition(numbers, count - 1)[count - 1] if count < len(numbers) else np.inf
    return [np.flatnonzero(part <= last) for part in drawn]


def cached_ranges(
    model: Model,
    tensors: Sequence[str],
    samples: Samples,
    cache_dir: Path | None = None,
    *,
    rows: Mapping[str, int] | None = None,
    quantized: Collection[str] = (),
    method: Method = MAX,
    threads: int | None = None,
    progress: Progress | None = None,
    scratch: Path | None = None,
    fresh: bool = False,
    executor: Executor | None = None,
) -> MeasuredRanges:
    """As `measure_ranges`, unless the same was measured before.

    The key covers the graph, its weights, the values of the samples, the tensors asked for, the method and
    onnxruntime's version. An entry that cannot be read is measured again; a folder that cannot be written costs the next run.

    Args:
        cache_dir: None: `default_cache_dir()`.
        fresh: measure though it was.
    """
    graph_hash = graph_sha256(model)
    asked = _Asked.of(tensors, rows, quantized, method)
    path = (cache_dir or default_cache_dir()) / "ranges" / f"{_key(graph_hash, asked, samples)}.json"
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, Pi05cError
    ):
        ranges = _read(path)
        if not fresh and _answers(ranges, graph_hash, [*asked.tensors, *asked.rows], samples):
            return dataclasses.replace(ranges, source=samples.source, cached=True)
    ranges = _measure(model, asked, samples, graph_hash, threads, progress, scratch, executor)
    with contextlib.suppress(OSError, Pi05cError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, ranges)
    return ranges


def keep_ranges(
    model: Model,
    tensors: Sequence[str],
    samples: Samples,
    ranges: Ranges,
    cache_dir: Path | None = None,
    *,
    quantized: Collection[str] = (),
    method: Method = MAX,
) -> Path:
    """Keep ranges that were measured otherwise where `cached_ranges`, asked the same, finds them; the file.

    Raises:
        Pi05cError: the folder cannot be written.
    """
    graph_hash = graph_sha256(model)
    key = _key(graph_hash, _Asked.of(tensors, None, quantized, method), samples)
    path = (cache_dir or default_cache_dir()) / "ranges" / f"{key}.json"
    measured = MeasuredRanges(
        ranges.low,
        ranges.high,
        samples.source,
        samples.synthetic,
        thresholds=ranges.thresholds,
        graph_sha256=graph_hash,
        data_sha256=samples.sha256,
        samples=len(samples),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, measured)
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {unwritable(error)}") from error
    return path


def save_ranges(path: Path, ranges: MeasuredRanges) -> None:
    """Write ranges as JSON that a person can read: `[low, high]` by tensor name. Rows lie beside it (`rows_path`).

    Raises:
        Pi05cError: the file cannot be written.
    """
    _write(path, ranges)


def read_ranges(path: Path) -> MeasuredRanges:
    """Read what `save_ranges` wrote. Later passes keep the names that ranges refer to.

    Raises:
        Pi05cError: the file cannot be read.
    """
    try:
        return _read(path)
    except OSError as error:
        raise Pi05cError(f"{error.filename or path} cannot be read: {unreadable(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Pi05cError(f"{path} holds no ranges that this version reads: measure them again") from error


def default_cache_dir() -> Path:
    """`$PI05C_CACHE`, else `pi05c` in `$XDG_CACHE_HOME`, else `~/.cache/pi05c`; where there is no home, a place that is none."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "pi05c"
    try:
        return Path.home() / ".cache" / "pi05c"
    except RuntimeError:  # as in a container for a user that it does not know
        return Path(os.devnull) / "pi05c"


def graph_sha256(model: Model) -> str:
    """Hash of a graph: its opsets, its canonical text, and the content of every initializer (`Weight.content`).

    Weights are read only where neither their file nor an earlier call recorded their SHA-256. A weight that is computed
    counts as what it is computed from, so that a graph that was saved and loaded has another hash.
    """
    graph = model.graph
    digest = hashlib.sha256(f"{graph.opset}\n{canonical_text(graph, values=False)}".encode())
    for entry in sorted((entry.domain, entry.version) for entry in graph.import_domains or ()):
        digest.update(repr(entry).encode())
    proto, pending = to_proto(model)
    for tensor in stored_tensors(proto):
        weight = pending.get(location_of(tensor) or "")
        digest.update(
            repr(weight.content()).encode() if weight else tensor.SerializeToString(deterministic=True)
        )
    return digest.hexdigest()


def _refuse_nan(counted: ProbedGraph, index: int, samples: Samples) -> None:
    """Raise where a tensor holds NaN; a sum may be NaN without, as of infinities of both signs."""
    (flags,) = counted.run(samples[index]).numbers
    found = {name for name, flag in zip(counted.reductions.names, flags, strict=True) if flag}
    for name in counted.reductions.order:
        if name in found:
            raise Pi05cError(
                f"tensor {name!r} holds NaN on sample {index} of {samples.source}, and is the first that does: take "
                "the sample out, or find what the model divides by zero or overflows there"
            )


def _key(graph_hash: str, asked: _Asked, samples: Samples) -> str:
    import onnxruntime

    wanted = [
        *sorted(set(asked.tensors)),
        sorted(asked.rows.items()),
        sorted(asked.quantized),
        str(asked.method),
    ]
    parts = [FORMAT, onnxruntime.__version__, graph_hash, samples.sha256, *wanted]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _answers(ranges: MeasuredRanges, graph_hash: str, wanted: Sequence[str], samples: Samples) -> bool:
    """Whether an entry is what its key says: a file may have been edited or copied."""
    return (
        ranges.graph_sha256 == graph_hash
        and ranges.data_sha256 == samples.sha256
        and {*ranges.low, *ranges.rows, *ranges.left_out} <= set(wanted)
        and all(ranges.low[name] <= ranges.high[name] for name in ranges.low)
    )


def _write(path: Path, ranges: MeasuredRanges) -> None:
    record = {
        "format": FORMAT,
        "graph": ranges.graph_sha256,
        "data": ranges.data_sha256,
        "source": ranges.source,
        "synthetic": ranges.synthetic,
        "samples": ranges.samples,
        "ranges": {name: [_spell(ranges.low[name]), _spell(ranges.high[name])] for name in ranges.low},
        "thresholds": dict(ranges.thresholds),
        "left_out": dict(ranges.left_out),
        "rows": _write_rows(rows_path(path), ranges.rows),
    }
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def rows_path(path: Path) -> Path:
    """The file of the rows beside a file of ranges: bfloat16, one tensor after the other."""
    return path.with_suffix(".rows")


def _write_rows(path: Path, rows: Mapping[str, Weight]) -> dict[str, dict[str, Any]]:
    """Write rows to `path`; where each tensor's lie in it. Without rows there is no file."""
    places: dict[str, dict[str, Any]] = {}
    if not rows:
        path.unlink(missing_ok=True)
        return places
    with replacing(path) as partial, partial.open("wb") as file:
        for name, values in rows.items():
            place = {"offset": file.tell(), "shape": list(values.shape), "sha256": values.checksum()}
            places[name] = place
            for chunk in values.chunks():
                file.write(stored_bytes(chunk))
    return places


def _read(path: Path) -> MeasuredRanges:
    record = json.loads(read_text(path))
    return _from_json(record, rows_path(path))


def _from_json(record: Mapping[str, Any], rows: Path) -> MeasuredRanges:
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']}")
    pairs = {str(name): (float(low), float(high)) for name, (low, high) in record["ranges"].items()}
    thresholds = {str(name): float(value) for name, value in record["thresholds"].items()}
    if not all(low <= high for low, high in pairs.values()):
        raise ValueError("a range has no width")
    if not all(0 <= value < math.inf for value in thresholds.values()):
        raise ValueError("a threshold is none")
    return MeasuredRanges(
        {name: low for name, (low, _) in pairs.items()},
        {name: high for name, (_, high) in pairs.items()},
        str(record["source"]),
        bool(record["synthetic"]),
        {
            str(name): Stored(rows, int(place["offset"]), place["shape"], BFLOAT16, str(place["sha256"]))
            for name, place in record["rows"].items()
        },
        thresholds,
        {str(name): str(reason) for name, reason in record["left_out"].items()},
        str(record["graph"]),
        str(record["data"]),
        int(record["samples"]),
    )


def _spell(value: float) -> float | str:
    """JSON has no infinity: `inf` and `-inf` as text."""
    return value if math.isfinite(value) else str(value)


__all__ = [
    "MeasuredRanges",
    "cached_ranges",
    "default_cache_dir",
    "graph_sha256",
    "keep_ranges",
    "measure_ranges",
    "rows_path",
    "save_ranges",
]
