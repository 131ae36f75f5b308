"""What a graph or an engine folder is: inputs, outputs, precision by part, sizes, pipeline and provenance."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from pi05c.backend.signature import TensorSpec
from pi05c.folder import GRAPH
from pi05c.graph.check import load_valid
from pi05c.graph.dtypes import BOOL, name_of, to_numpy
from pi05c.graph.errors import Pi05cError, shortened
from pi05c.graph.io import Model, scopes
from pi05c.graph.specialization import FixedInput, fixed_inputs
from pi05c.graph.weights import weight_of
from pi05c.manifest import Manifest, PrecisionRecord, SourceRecord, TensorRecord, read_manifest, sha256
from pi05c.precision import precision_of
from pi05c.samples import RANDOM_WEIGHTS, WEIGHTS_KEY

CONFIG_KEY = "pi05c.config"
ROBOT_KEY = "pi05c.robot"
"""Entries of a model's metadata that `pi05c export` writes in JSON."""


@dataclass(frozen=True)
class WeightTotal:
    """How many weights of one type a graph stores, each counted once however often it is used."""

    dtype: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What `pi05c inspect` shows. `manifest` is None for a bare graph."""

    path: Path
    opset: int
    nodes: int
    operators: dict[str, int]
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    weights: list[WeightTotal]
    precision: list[PrecisionRecord]
    source: SourceRecord
    manifest: Manifest | None = None
    files: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`; `manifest` is the folder's manifest as it is on disk."""
        return {
            "path": str(self.path),
            "opset": self.opset,
            "nodes": self.nodes,
            "operators": self.operators,
            "inputs": [record.model_dump(mode="json") for record in self.inputs],
            "outputs": [record.model_dump(mode="json") for record in self.outputs],
            "weights": [vars(total) for total in self.weights],
            "precision": [record.model_dump(mode="json") for record in self.precision],
            "source": self.source.model_dump(mode="json"),
            "files": self.files,
            "manifest": None if self.manifest is None else self.manifest.model_dump(mode="json"),
        }


def inspect(path: Path | str) -> Inspection:
    """Look at an engine folder or an ONNX file. Weights are not read.

    Raises:
        Pi05cError: it is neither.
    """
    path = Path(path)
    manifest = read_manifest(path) if path.is_dir() else None
    places = [""] if manifest is None else manifest.places
    models = [load_valid(path / place / GRAPH if manifest is not None else path) for place in places]
    model = models[0]
    graphs = [model.graph for model in models]
    nodes = [node for graph in graphs for scope in scopes(graph) for node in scope.nodes]
    return Inspection(
        path=path,
        opset=max(int(graph.opset) for graph in graphs),
        nodes=len(nodes),
        operators=dict(Counter(node.op for node in nodes).most_common()),
        inputs=manifest.inputs
        if manifest
        else with_fixed(tensor_records(model.graph.inputs), fixed_inputs(model.metadata)),
        outputs=manifest.outputs if manifest else tensor_records(model.graph.outputs),
        weights=weight_totals(*graphs),
        precision=precision_of(*graphs),
        source=manifest.source if manifest else source_of(model, hashed=False),
        manifest=manifest,
        files=_files(path, model) if manifest is None else _folder_files(path),
    )


def tensor_records(tensors: list[gs.Tensor]) -> list[TensorRecord]:
    """Names, types and shapes of a graph's inputs or outputs; an unnamed dimension that may vary is `?`."""
    return [
        TensorRecord(
            name=tensor.name,
            dtype=name_of(tensor.dtype),
            shape=[dim if isinstance(dim, (int, str)) else "?" for dim in tensor.shape or ()],
        )
        for tensor in tensors
    ]


def spec_of_record(record: TensorRecord) -> TensorSpec:
    """What a manifest says of a tensor, as a specification.

    Raises:
        Pi05cError: there is no such type.
    """
    named = {"float32": "FLOAT", "float64": "DOUBLE"}.get(record.dtype, record.dtype.upper())
    types = onnx.TensorProto.DataType
    dtype = to_numpy(types.Value(named)) if named in types.keys() else None  # noqa: SIM118 - no mapping
    if dtype is None:
        raise Pi05cError(
            f"tensor {shortened(record.name)} is said to hold {shortened(record.dtype)}, which is no element type: compile "
            "the folder again"
        )
    return TensorSpec(
        record.name, dtype, tuple(dim if isinstance(dim, int) else None for dim in record.shape)
    )


def with_fixed(records: Sequence[TensorRecord], fixed: Sequence[FixedInput]) -> list[TensorRecord]:
    """Records of inputs with the values that are fixed, and records of inputs that left the graph for it."""
    values = {entry.name: list(entry.values) for entry in fixed}
    known = {record.name for record in records}
    gone = [
        TensorRecord(name=entry.name, dtype=name_of(BOOL), shape=list(entry.shape))
        for entry in fixed
        if entry.name not in known
    ]
    return [record.model_copy(update={"fixed": values.get(record.name)}) for record in (*records, *gone)]


def weight_totals(*graphs: gs.Graph) -> list[WeightTotal]:
    """Number and size of the stored weights by type, the largest first."""
    constants = {
        id(tensor): tensor
        for graph in graphs
        for scope in scopes(graph)
        for node in scope.nodes
        for tensor in node.inputs
        if isinstance(tensor, gs.Constant)
    }
    weights = {id(weight): weight for weight in map(weight_of, constants.values())}
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for weight in weights.values():
        counts[name_of(weight.dtype)] += 1
        sizes[name_of(weight.dtype)] += weight.nbytes
    return [WeightTotal(dtype, counts[dtype], size) for dtype, size in sizes.most_common()]


def source_of(model: Model, *, hashed: bool = True) -> SourceRecord:
    """Provenance of a graph: its own metadata, and the hash of its file and of its external data if `hashed`."""
    metadata = dict(model.metadata)
    weights = metadata.get(WEIGHTS_KEY)
    digest = ""
    if hashed and model.path is not None:
        digest = sha256([model.path, *data_files(model)])
    return SourceRecord(
        name="" if model.path is None else model.path.name,
        sha256=digest,
        opset=int(model.graph.opset),
        weights_random=None if weights is None else weights == RANDOM_WEIGHTS,
        config=_json(metadata.pop(CONFIG_KEY, None)),
        robot=_json(metadata.pop(ROBOT_KEY, None)),
        metadata=metadata,
    )


def data_files(model: Model) -> list[Path]:
    """The files that hold a loaded model's external weights."""
    from pi05c.graph.weights import Stored

    paths = {
        weight.path
        for scope in scopes(model.graph)
        for node in scope.nodes
        for tensor in node.inputs
        if isinstance(tensor, gs.Constant) and isinstance(weight := weight_of(tensor), Stored)
    }
    return sorted(paths)


def _json(text: str | None) -> Any:
    """A metadata entry that holds JSON; its text where it does not."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _files(path: Path, model: Model) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in (path, *data_files(model))}


def _folder_files(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
