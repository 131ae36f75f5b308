"""Ranges of tensors, measured by running a model in onnxruntime on samples.

The model itself is never changed or copied: its export gets reductions (`pi05c.reductions`), its weights stay in
the files that they are in. Weights that exist only as a computation are evaluated once, into a scratch file that is
mapped. Of some tensors a few rows are kept too, chosen by hashes of sample and tensor, so that the order of the samples
does not matter. Results are kept under a hash of the graph, its weights, the data and onnxruntime's version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pi05c.backend.lowering import graphs_in, lower
from pi05c.graph.dtypes import BFLOAT16, to_onnx
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model, location_of, make_inline, point_to_file, to_proto
from pi05c.graph.io import tensors as stored_tensors
from pi05c.graph.ranges import Ranges
from pi05c.graph.runner import Array
from pi05c.graph.text import canonical_text
from pi05c.graph.weights import InMemory, Stored, Weight, stored_bytes
from pi05c.reductions import HAS_NAN, HIGH, LOW, TOTAL, Probe, RowOutput, add_reductions
from pi05c.samples import Samples

CACHE_VARIABLE = "PI05C_CACHE"
"""Environment variable that names the folder of measured ranges."""

FORMAT = 2
"""Raised whenever ranges must be measured again though neither the graph nor the data changed."""

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_NO_QUANTIZED_KERNELS = "session.disable_quant_qdq"
"""onnxruntime's session entries; the second keeps it from replacing Q/DQ by integer kernels that round otherwise."""

_FATAL_ONLY = 4
_MESSAGE_CHARACTERS = 600
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
    threads: int | None = None,
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> MeasuredRanges:
    """Smallest and largest value of tensors over all samples, and over all steps of the bodies that they lie in.

    Args:
        model: runs in float32 or, with the bits of its types, in whatever the onnxruntime backend lowers.
        tensors: names of graph inputs and of tensors that nodes compute, in bodies of Loop and Scan too. Those that
            are not of a floating type are passed over.
        rows: how many rows of which tensors to keep, rounded to bfloat16; none of those inside bodies.
        threads: for operators; None: onnxruntime's choice.
        scratch: folder for weights that have to be evaluated; None: the system's folder for temporary files.

    Raises:
        Pi05cError: there are no samples, a tensor holds NaN, or onnxruntime cannot run the graph.
    """
    return _measure(model, tensors, rows or {}, samples, graph_sha256(model), threads, progress, scratch)


def _measure(
    model: Model,
    tensors: Sequence[str],
    rows: Mapping[str, int],
    samples: Samples,
    graph_hash: str,
    threads: int | None,
    progress: Progress | None,
    scratch: Path | None,
) -> MeasuredRanges:
    if not samples:
        raise Pi05cError("there is no sample to calibrate with: give --calibration FILE.npz")
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    taken: dict[str, list[Array]] = {}
    with contextlib.ExitStack() as stack:
        probed = stack.enter_context(_Probed.of(model, tensors, _PROBES, threads, scratch, rows))
        chosen = {each.tensor: _chosen(each, rows[each.tensor], samples) for each in probed.rows}
        exact: dict[tuple[str, ...], _Probed] = {}
        for index, sample in enumerate(samples):
            numbers, kept = probed.run(sample, {name: places[index] for name, places in chosen.items()})
            lows, highs, totals = numbers
            suspects = tuple(
                name for name, total in zip(probed.names, totals, strict=True) if np.isnan(total)
            )
            if suspects:
                if suspects not in exact:
                    counted = _Probed.of(model, suspects, (HAS_NAN,), threads, scratch)
                    exact[suspects] = stack.enter_context(counted)
                _refuse_nan(exact[suspects], sample, index, samples)
            for name, smallest, largest in zip(probed.names, lows.tolist(), highs.tolist(), strict=True):
                low[name] = min(low.get(name, math.inf), smallest)
                high[name] = max(high.get(name, -math.inf), largest)
            for name, values in kept.items():
                taken.setdefault(name, []).append(values.astype(BFLOAT16))
            if progress is not None:
                progress(index + 1, len(samples))
    left_out = dict(probed.left_out)
    measured = {}
    for name, root in probed.measured_as.items():
        if low[root] <= high[root]:
            measured[name] = root
        else:
            left_out[name] = "it was never computed: the body that it lies in runs no step on these samples"
    return MeasuredRanges(
        {name: low[root] for name, root in measured.items()},
        {name: high[root] for name, root in measured.items()},
        samples.source,
        samples.synthetic,
        {name: InMemory(np.concatenate(parts)) for name, parts in taken.items()},
        left_out,
        graph_hash,
        samples.sha256,
        len(samples),
    )


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
    threads: int | None = None,
    progress: Progress | None = None,
    scratch: Path | None = None,
    fresh: bool = False,
) -> MeasuredRanges:
    """As `measure_ranges`, unless the same was measured before.

    The key covers the graph, its weights, the values of the samples, the tensors asked for and onnxruntime's
    version. An entry that cannot be read is measured again; a folder that cannot be written costs the next run.

    Args:
        cache_dir: None: `default_cache_dir()`.
        fresh: measure though it was.
    """
    graph_hash = graph_sha256(model)
    rows = rows or {}
    path = (cache_dir or default_cache_dir()) / "ranges" / f"{_key(graph_hash, tensors, rows, samples)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, Pi05cError):
        ranges = _read(path)
        if not fresh and _answers(ranges, graph_hash, [*tensors, *rows], samples):
            return dataclasses.replace(ranges, source=samples.source, cached=True)
    ranges = _measure(model, tensors, rows, samples, graph_hash, threads, progress, scratch)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, ranges)
    return ranges


def save_ranges(path: Path, ranges: MeasuredRanges) -> None:
    """Write ranges as JSON that a person can read: `[low, high]` by tensor name. Rows lie beside it (`rows_path`).

    Raises:
        Pi05cError: the file cannot be written.
    """
    try:
        _write(path, ranges)
    except OSError as error:
        raise Pi05cError(f"{path} cannot be written: {error.strerror or error}") from error


def read_ranges(path: Path) -> MeasuredRanges:
    """Read what `save_ranges` wrote. Later passes keep the names that ranges refer to.

    Raises:
        Pi05cError: the file cannot be read.
    """
    try:
        return _read(path)
    except OSError as error:
        raise Pi05cError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Pi05cError(f"{path} holds no ranges that this version reads: measure them again") from error


def default_cache_dir() -> Path:
    """`$PI05C_CACHE`, else `pi05c` in `$XDG_CACHE_HOME`, else `~/.cache/pi05c`."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pi05c"


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


@dataclass
class _Probed:
    """A model that is loaded to return the numbers of `probes` for each of `names`."""

    names: tuple[str, ...]
    measured_as: Mapping[str, str]
    left_out: Mapping[str, str]
    probes: tuple[Probe, ...]
    outputs: tuple[str, ...]
    session: Any
    renamed: Mapping[str, str]
    weights: Mapping[str, Any]
    rows: tuple[RowOutput, ...] = ()

    @classmethod
    @contextlib.contextmanager
    def of(
        cls,
        model: Model,
        wanted: Sequence[str],
        probes: tuple[Probe, ...],
        threads: int | None,
        scratch: Path | None,
        rows: Collection[str] = (),
    ) -> Iterator[_Probed]:
        """Load a model with reductions; what was evaluated for it is deleted at the end."""
        proto, pending = to_proto(model)
        added = add_reductions(model, proto, wanted, probes, rows)
        session, renamed, weights = None, {}, {}
        with tempfile.TemporaryDirectory(prefix="pi05c-", dir=scratch) as folder:
            if added.outputs or added.rows:
                lowered = lower(proto)
                renamed = lowered.feeds
                base = _data_folder(model, pending)
                weights = _bind(lowered.model, pending, base, Path(folder) / "weights")
                session = _session(lowered.model, base, threads)
            yield cls(
                added.names,
                added.measured_as,
                added.left_out,
                probes,
                added.outputs,
                session,
                renamed,
                weights,
                added.rows,
            )

    def run(
        self, sample: Mapping[str, Array], places: Mapping[str, Array] | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """The numbers for one sample, float64 [probes, tensors], and rows by tensor, float32.

        Args:
            places: indices of rows by tensor.

        Raises:
            Pi05cError: onnxruntime fails.
        """
        if self.session is None:
            return np.zeros((len(self.probes), 0)), {}
        import onnxruntime

        feeds = dict(self.weights)
        for name, array in sample.items():
            fed = np.ascontiguousarray(array.astype(np.float32) if name in self.renamed else array)
            feeds[self.renamed.get(name, name)] = onnxruntime.OrtValue.ortvalue_from_numpy(fed)
        for rows in self.rows:
            feeds[rows.indices] = onnxruntime.OrtValue.ortvalue_from_numpy((places or {})[rows.tensor])
        try:
            values = self.session.run_with_ort_values(
                [*self.outputs, *(rows.output for rows in self.rows)], feeds
            )
        except Exception as error:  # onnxruntime raises a class of its own for each status code
            raise Pi05cError(f"the model cannot be run for calibration: {_short(error)}") from error
        arrays = [value.numpy() for value in values]
        numbers = [np.zeros((len(self.probes), 0)), *arrays[: len(self.outputs)]]
        taken = zip(self.rows, arrays[len(self.outputs) :], strict=True)
        return np.concatenate(numbers, axis=1), {rows.tensor: values for rows, values in taken}


def _refuse_nan(counted: _Probed, sample: Mapping[str, Array], index: int, samples: Samples) -> None:
    """Raise where a tensor holds NaN; a sum may be NaN without, as of infinities of both signs."""
    (flags,) = counted.run(sample)[0]
    for name, flag in zip(counted.names, flags, strict=True):
        if flag:
            raise Pi05cError(
                f"tensor {name!r} holds NaN on sample {index} of {samples.source}, and is the first that does: take "
                "the sample out, or find what the model divides by zero or overflows there"
            )


def _session(proto: onnx.ModelProto, base: Path | None, threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry(_NO_QUANTIZED_KERNELS, "1")
    if base is not None:
        options.add_session_config_entry(_DATA_FOLDER, str(base))
    try:
        return onnxruntime.InferenceSession(
            proto.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"],  # else bfloat16 weights are widened and kept
        )
    except Exception as error:  # onnxruntime raises a class of its own for each status code
        raise Pi05cError(f"the model cannot be loaded for calibration: {_short(error)}") from error


def _data_folder(model: Model, pending: Mapping[str, Weight]) -> Path | None:
    """The folder whose files onnxruntime may map itself; it takes one alone."""
    if model.path is not None:
        return model.path.absolute().parent
    stored = (weight for weight in pending.values() if isinstance(weight, Stored))
    return next((weight.path.absolute().parent for weight in stored), None)


def _bind(
    proto: onnx.ModelProto, pending: Mapping[str, Weight], base: Path | None, scratch: Path
) -> dict[str, Any]:
    """Point initializers at the files of their weights; those without one become inputs of the graph.

    Returns:
        What to feed to those inputs: `OrtValue`s on mapped or existing memory, none a copy.
    """
    declared = {value.name for value in proto.graph.input}
    fed: dict[str, Weight] = {}
    for graph in graphs_in(proto.graph):
        kept = []
        for tensor in graph.initializer:
            weight = pending.get(location_of(tensor) or "")
            if weight is None or point_to_file(tensor, weight, base):
                kept.append(tensor)
            elif tensor.name in declared and fed.get(tensor.name) is not weight:
                make_inline(tensor, weight)  # bodies side by side may use one name for two weights
                kept.append(tensor)
            else:
                fed[tensor.name] = weight
                declared.add(tensor.name)
        del graph.initializer[:]
        graph.initializer.extend(kept)
    for tensor in stored_tensors(proto):
        if weight := pending.get(location_of(tensor) or ""):
            make_inline(tensor, weight)
    for name, weight in fed.items():
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info(name, to_onnx(weight.dtype), weight.shape)
        )
    return dict(_ort_values(fed, scratch))


def _ort_values(fed: Mapping[str, Weight], scratch: Path) -> Iterator[tuple[str, Any]]:
    import onnxruntime

    computed = {id(weight): weight for weight in fed.values() if not isinstance(weight, (InMemory, Stored))}
    mapped = _evaluate(computed, scratch)
    for name, weight in fed.items():
        array = mapped[id(weight)] if id(weight) in mapped else np.ascontiguousarray(weight.load())
        kind = np.dtype(f"u{array.dtype.itemsize}")  # onnxruntime takes types that numpy lacks by their bits
        values = array.reshape(-1).view(kind).reshape(weight.shape)
        yield (
            name,
            onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values, to_onnx(weight.dtype)),
        )


def _evaluate(weights: Mapping[int, Weight], path: Path) -> dict[int, Array]:
    """Write weights to a file, in chunks, and map it."""
    if not weights:
        return {}
    offsets = {}
    with path.open("wb") as file:
        for key, weight in weights.items():
            file.seek(-file.tell() % weight.dtype.itemsize, os.SEEK_CUR)
            offsets[key] = file.tell()
            for chunk in weight.chunks():
                file.write(stored_bytes(chunk))
    return {
        key: np.memmap(path, weight.dtype, "r", offsets[key], weight.shape or (1,))
        for key, weight in weights.items()
    }


def _key(graph_hash: str, wanted: Sequence[str], rows: Mapping[str, int], samples: Samples) -> str:
    import onnxruntime

    asked = [*sorted(set(wanted)), sorted(rows.items())]
    parts = [FORMAT, onnxruntime.__version__, graph_hash, samples.sha256, *asked]
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
        "left_out": dict(ranges.left_out),
        "rows": _write_rows(rows_path(path), ranges.rows),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def rows_path(path: Path) -> Path:
    """The file of the rows beside a file of ranges: bfloat16, one tensor after the other."""
    return path.with_suffix(".rows")


def _write_rows(path: Path, rows: Mapping[str, Weight]) -> dict[str, dict[str, Any]]:
    """Write rows to `path`; where each tensor's lie in it. Without rows there is no file."""
    places: dict[str, dict[str, Any]] = {}
    if not rows:
        path.unlink(missing_ok=True)
        return places
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for name, values in rows.items():
                place = {"offset": file.tell(), "shape": list(values.shape), "sha256": values.checksum()}
                places[name] = place
                for chunk in values.chunks():
                    file.write(stored_bytes(chunk))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return places


def _read(path: Path) -> MeasuredRanges:
    record = json.loads(path.read_text(encoding="utf-8"))
    return _from_json(record, rows_path(path))


def _from_json(record: Mapping[str, Any], rows: Path) -> MeasuredRanges:
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']}")
    pairs = {str(name): (float(low), float(high)) for name, (low, high) in record["ranges"].items()}
    return MeasuredRanges(
        {name: low for name, (low, _) in pairs.items()},
        {name: high for name, (_, high) in pairs.items()},
        str(record["source"]),
        bool(record["synthetic"]),
        {
            str(name): Stored(rows, int(place["offset"]), place["shape"], BFLOAT16, str(place["sha256"]))
            for name, place in record["rows"].items()
        },
        {str(name): str(reason) for name, reason in record["left_out"].items()},
        str(record["graph"]),
        str(record["data"]),
        int(record["samples"]),
    )


def _spell(value: float) -> float | str:
    """JSON has no infinity: `inf` and `-inf` as text."""
    return value if math.isfinite(value) else str(value)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:_MESSAGE_CHARACTERS]


__all__ = [
    "MeasuredRanges",
    "cached_ranges",
    "default_cache_dir",
    "graph_sha256",
    "measure_ranges",
    "rows_path",
    "save_ranges",
]
