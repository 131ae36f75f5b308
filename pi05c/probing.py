"""A graph with reductions, loaded in onnxruntime: what calibration runs once a sample, in this process or another.

The model itself is never changed or copied: its export gets reductions (`pi05c.reductions`), its weights stay in the
files that they are in. Weights that derive from such are computed in the graph while it runs; those that cannot be are
evaluated once, into a scratch file that is mapped.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import uuid
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnx

from pi05c.backend.lowering import KEPT, lower
from pi05c.graph.dtypes import FLOAT32, bits, to_onnx
from pi05c.graph.edit import Names
from pi05c.graph.io import Model, location_of, make_inline, point_to_file, to_proto
from pi05c.graph.io import tensors as stored_tensors
from pi05c.graph.runner import Array
from pi05c.graph.session import error_kind, open_session, read_weights_from, session_options
from pi05c.graph.sort import constants_first
from pi05c.graph.walk import graphs_in
from pi05c.graph.weight_nodes import WeightNodes, widen_for_each_reader
from pi05c.graph.weights import InMemory, Stored, Weight, stored_bytes
from pi05c.reductions import Probe, Reductions, add_reductions

_NO_QUANTIZED_KERNELS = "session.disable_quant_qdq"
"""Session entry of onnxruntime that keeps it from replacing Q/DQ by integer kernels, which round otherwise."""

_DISABLED = ["ConstantFolding", "CommonSubexpressionElimination", KEPT]
"""Optimizers of onnxruntime: the first would widen all weights and keep them, the second those that are read again."""

_SMALL_BYTES = 2**20
_FATAL_ONLY = 4
_MESSAGE_CHARACTERS = 600


@dataclass(frozen=True)
class _Fed:
    """Where a weight that is fed lies, and its onnx type."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Probed:
    """What a graph gave for one sample.

    Attributes:
        numbers: float64 [probes, tensors].
        rows: float32 [places, size] by tensor.
        histograms: as `HistogramOutput` says, in the order of `Reductions.histograms`.
    """

    numbers: Array
    rows: dict[str, Array]
    histograms: list[Array]


@dataclass(frozen=True)
class ProbedGraph:
    """A graph that gives numbers of tensors, to be run anywhere where the files of its weights are; can be pickled.

    Attributes:
        reductions: what it gives.
        probes: the numbers of each tensor.
        key: its own; the same graph on the same path may have other weights the next time.
        threads: of each operator. The order in which a sum is made hangs on it, and with it the last bit.
    """

    reductions: Reductions
    probes: tuple[Probe, ...]
    key: str
    threads: int
    _packed: bytes = field(repr=False)
    _base: Path | None
    _renamed: Mapping[str, str]
    _fed: Mapping[str, _Fed]

    @classmethod
    @contextlib.contextmanager
    def of(
        cls,
        model: Model,
        wanted: Sequence[str],
        probes: tuple[Probe, ...],
        *,
        rows: Collection[str] = (),
        histograms: Collection[str] = (),
        threads: int | None = None,
        scratch: Path | None = None,
    ) -> Iterator[ProbedGraph]:
        """A model with reductions, for the time of the block.

        Args:
            wanted, rows, histograms: as `add_reductions` takes them.
            threads: None: one for each processor that this process may use.
            scratch: folder for weights that have to be evaluated; None: the system's.
        """
        from pi05c.backend.onnxruntime import processors

        proto, pending = to_proto(model)
        added = add_reductions(model, proto, wanted, probes, rows, histograms=histograms)
        packed, renamed, fed, base = b"", {}, {}, None
        with tempfile.TemporaryDirectory(prefix="pi05c-", dir=scratch) as folder:
            if added.outputs or added.rows:
                lowered = lower(proto)
                renamed = lowered.feeds
                base = _data_folder(model, pending)
                fed = _bind(
                    lowered.model, pending, base, Names(model.graph), Path(folder).absolute() / "weights"
                )
                packed = zlib.compress(lowered.model.SerializeToString(), level=1)
                del proto, lowered  # as large as what onnxruntime makes of them
            graph = cls(
                added,
                probes,
                uuid.uuid4().hex,
                threads or processors(),
                packed,
                base,
                renamed,
                fed,
            )
            try:
                yield graph
            finally:
                _forget(graph)

    def run(self, sample: Mapping[str, Array], places: Mapping[str, Array] | None = None) -> Probed:
        """What the graph gives for one sample.

        The first run in a process loads the graph, which stays loaded until the next graph is.

        Args:
            places: indices of rows by tensor.

        Raises:
            Pi05cError: onnxruntime fails.
        """
        found = self.reductions
        if not self._packed:
            return Probed(np.zeros((len(self.probes), 0)), {}, [])
        import onnxruntime

        session, weights = _loaded(self)
        arrays = {
            self._renamed.get(name, name): array.astype(np.float32) if name in self._renamed else array
            for name, array in sample.items()
        }
        arrays.update((each.indices, (places or {})[each.tensor]) for each in found.rows)
        outputs = [
            *found.outputs,
            *(each.output for each in found.rows),
            *(each.output for each in found.histograms),
        ]
        try:
            feeds = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
                for name, array in arrays.items()
            }
            values = session.run_with_ort_values(outputs, {**weights, **feeds})
        except Exception as error:  # onnxruntime raises a class of its own for each status code
            raise error_kind(error)(f"the model cannot be run for calibration: {_short(error)}") from error
        results = iter([value.numpy() for value in values])
        numbers = [np.zeros((len(self.probes), 0)), *itertools.islice(results, len(found.outputs))]
        return Probed(
            np.concatenate(numbers, axis=1),
            {each.tensor: next(results) for each in found.rows},
            [next(results) for _ in found.histograms],
        )

    def _session(self) -> tuple[Any, dict[str, Any]]:
        """A session, and what is to be fed beside samples: `OrtValue`s on mapped memory, none a copy."""

        options = session_options()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = _FATAL_ONLY
        options.enable_cpu_mem_arena = False  # it keeps what one run took
        options.enable_mem_pattern = False  # the second run would ask for as much memory again, in one piece
        options.add_session_config_entry(_NO_QUANTIZED_KERNELS, "1")
        if self._base is not None:
            read_weights_from(options, self._base)
        try:
            session = open_session(zlib.decompress(self._packed), options, _DISABLED)
        except Exception as error:  # onnxruntime raises a class of its own for each status code
            raise error_kind(error)(f"the model cannot be loaded for calibration: {_short(error)}") from error
        return session, {name: _ort_value(fed) for name, fed in self._fed.items()}


_LOCK = Lock()
_LOADED: dict[str, tuple[Any, dict[str, Any]]] = {}
"""What this process has loaded, by the key of the graph: the one that samples run through, and one that looks for NaN."""

_MOST_LOADED = 2


def _loaded(graph: ProbedGraph) -> tuple[Any, dict[str, Any]]:
    with _LOCK:
        if graph.key not in _LOADED:
            while len(_LOADED) >= _MOST_LOADED:
                del _LOADED[next(iter(_LOADED))]
            _LOADED[graph.key] = graph._session()
        return _LOADED[graph.key]


def _forget(graph: ProbedGraph) -> None:
    with _LOCK:
        _LOADED.pop(graph.key, None)


def _data_folder(model: Model, pending: Mapping[str, Weight]) -> Path | None:
    """The folder whose files onnxruntime may map itself; it takes one alone."""
    if model.path is not None:
        return model.path.absolute().parent
    stored = (weight for weight in pending.values() if isinstance(weight, Stored))
    return next((weight.path.absolute().parent for weight in stored), None)


def _bind(
    proto: onnx.ModelProto, pending: Mapping[str, Weight], base: Path | None, names: Names, scratch: Path
) -> dict[str, _Fed]:
    """Point initializers at the files of their weights; compute in the graph what derives from such.

    Returns:
        The inputs that take the place of the others, and where what is fed to them lies.
    """
    graph = proto.graph
    taken = {value.name for value in graph.input}
    fed: dict[str, Weight] = {}
    placed: dict[str, Weight] = {}

    def new_name(what: str) -> str:
        return names.unique(f"calibration.{what}")

    nodes = WeightNodes(new_name)
    for body in graphs_in(graph):
        kept = []
        for tensor in body.initializer:
            weight = pending.get(location_of(tensor) or "")
            if weight is None or point_to_file(tensor, weight, base):
                kept.append(tensor)
            elif _is_small(weight) or (tensor.name in taken and placed.get(tensor.name) is not weight):
                make_inline(tensor, weight)  # bodies side by side may use one name for two weights
                kept.append(tensor)
            elif tensor.name not in placed:
                placed[tensor.name] = weight
                taken.add(tensor.name)
                if not nodes.add(weight, tensor.name):
                    fed[tensor.name] = weight
        del body.initializer[:]
        body.initializer.extend(kept)
    for name, weight in nodes.leaves.items():
        tensor = weight.tensor
        tensor.name = name
        if point_to_file(tensor, weight, base):
            graph.initializer.append(tensor)
        elif _is_small(weight):
            make_inline(tensor, weight)
            graph.initializer.append(tensor)
        else:
            fed[name] = weight
    for tensor in stored_tensors(proto):
        if weight := pending.get(location_of(tensor) or ""):
            make_inline(tensor, weight)
    nodes.widen_before_transposing(graph)
    widen_for_each_reader(graph, new_name, least=_SMALL_BYTES // FLOAT32.itemsize)
    for body in list(graphs_in(graph))[1:]:
        constants_first(body)
    constants_first(graph, nodes.nodes)
    for name, weight in fed.items():
        graph.input.append(onnx.helper.make_tensor_value_info(name, to_onnx(weight.dtype), weight.shape))
    return _evaluate(fed, scratch)


def _is_small(weight: Weight) -> bool:
    """Whether a weight is better inside the graph than in a file; what is packed cannot be fed from one."""
    return bits(weight.dtype) < 8 or (isinstance(weight, InMemory) and weight.nbytes <= _SMALL_BYTES)


def _evaluate(weights: Mapping[str, Weight], path: Path) -> dict[str, _Fed]:
    """Write weights to a file, in chunks, each once."""
    placed: dict[int, _Fed] = {}
    if weights:
        with path.open("wb") as file:
            for weight in {id(weight): weight for weight in weights.values()}.values():
                if isinstance(weight, Stored):
                    place = _Fed(weight.path.absolute(), weight.offset, weight.shape, weight.dtype)
                else:
                    file.seek(-file.tell() % weight.dtype.itemsize, os.SEEK_CUR)
                    place = _Fed(path, file.tell(), weight.shape, weight.dtype)
                    for chunk in weight.chunks():
                        file.write(stored_bytes(chunk))
                placed[id(weight)] = place
    return {name: placed[id(weight)] for name, weight in weights.items()}


def _ort_value(fed: _Fed) -> Any:
    import onnxruntime

    kind = np.dtype(f"u{fed.dtype.itemsize}")  # onnxruntime takes types that numpy lacks by their bits
    values = np.memmap(fed.path, kind, "r", fed.offset, fed.shape or (1,)).reshape(fed.shape)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values, to_onnx(fed.dtype))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:_MESSAGE_CHARACTERS]


__all__ = ["Probed", "ProbedGraph"]
