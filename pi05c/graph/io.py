"""The one loader and the one saver. Weights are mapped on the way in and streamed on the way out.

`load` leaves every weight on disk (`Stored`), sorts what an exporter left unsorted, infers missing types, and
turns Constant nodes into initializers. `save` copies bytes that nobody changed from file to file, evaluates the
others in chunks, writes each weight once however many nodes share it, and records a SHA-256 beside each.
What onnx-graphsurgeon 0.6 drops (metadata of model and nodes, doc strings, domain) is kept here.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.logger import G_LOGGER

from pi05c.graph import carried
from pi05c.graph.dtypes import to_numpy
from pi05c.graph.errors import Pi05cError
from pi05c.graph.files import replacing
from pi05c.graph.inference import with_types
from pi05c.graph.read import about, read_proto, refuse_overlaps, weight_of_tensor
from pi05c.graph.scopes import scopes
from pi05c.graph.sort import sort_proto
from pi05c.graph.spelling import awaits_fp4, spell_as_onnx, state_opset
from pi05c.graph.walk import graphs_in
from pi05c.graph.weights import PENDING, InMemory, Stored, Weight, stored_bytes, weight_of
from pi05c.graph.wellformed import refuse_misused_operators

G_LOGGER.severity = G_LOGGER.ERROR

INLINE_BYTES = 1024
"""Tensors up to this size stay inside the .onnx file, so that tools can read shapes and scalars without data."""

ALIGNMENT = 64
"""Offset alignment of external tensors, in bytes: one cache line, enough for every vector load."""

_CONSTANTS_FROM_IR = 4
"""IR version from which an initializer need not be an input as well (ONNX 1.4); here none is, whatever the file says."""

_COPY_BYTES = 2**26

_EVALUATED_BYTES = 2**22
"""What a thread evaluates at a time, in bytes of the result: small enough that a single weight keeps all of them busy."""


@dataclass
class Model:
    """A graph with what belongs to the file around it.

    Attributes:
        graph: the graph that passes edit in place.
        metadata: the model's metadata_props.
        path: the file it was loaded from, if any.
    """

    graph: gs.Graph
    metadata: dict[str, str] = field(default_factory=dict)
    doc_string: str = ""
    domain: str = ""
    model_version: int = 0
    path: Path | None = None


def load(path: Path | str) -> Model:
    """Read an ONNX model; external data is mapped, not read.

    Raises:
        Pi05cError: no such file, not an ONNX model, or external data that is missing, truncated, or outside the
            model's folder.
    """
    path = Path(path)
    proto = read_proto(path)
    with about(path):
        refuse_misused_operators(proto)
    if not proto.graph.node and not proto.graph.output:
        raise Pi05cError(f"{path} holds no graph: is it an ONNX model?")
    model = model_from_proto(proto, path.parent)
    model.path = path
    return model


def model_from_proto(
    proto: onnx.ModelProto, base: Path | None = None, weights: Mapping[str, Weight] | None = None
) -> Model:
    """Make an editable model of a proto, which is consumed.

    Args:
        proto: a model whose weights may be external.
        base: folder of the external data.
        weights: values by initializer name, which take the place of what the proto holds for them.

    Raises:
        Pi05cError: as `load`; or two tensors of one graph share a name.
    """
    carried.refuse_unknown(proto)
    state_opset(proto)
    spell_as_onnx(proto)
    marked = awaits_fp4(proto)
    for graph in graphs_in(proto.graph):
        sort_proto(graph)
        _refuse_duplicates(graph)
    proto = with_types(proto)
    carried.refuse_unknown(proto)
    taken = carried.take(proto)
    graph = gs.import_onnx(proto)
    carried.attach(proto, graph, taken)
    for constant in _constants(graph):
        constant._values = (weights or {}).get(constant.name) or weight_of_tensor(
            constant._values.tensor, base
        )
        constant.data_location = None
    refuse_overlaps((constant.name, constant._values) for constant in _constants(graph))
    for scope in scopes(graph):
        _inline_constant_nodes(scope)
    _link_returned_captures(graph, {})
    model = Model(
        graph,
        metadata={prop.key: prop.value for prop in proto.metadata_props},
        doc_string=proto.doc_string,
        domain=proto.domain,
        model_version=proto.model_version,
    )
    if marked:
        from pi05c.graph.fp4_weights import store_in_fp4  # which raises the opset, which makes models

        store_in_fp4(model)
    return model


def to_proto(model: Model) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    """The model as a proto whose larger weights are references, and those weights by their pending location."""
    pending: dict[str, Weight] = {}
    for constant in _constants(model.graph):
        weight = weight_of(constant)
        pending[f"{PENDING}{id(weight)}"] = weight
    with carried.set_aside(model.graph):
        proto = gs.export_onnx(model.graph, do_type_check=False)
    _store_shared_constants_once(model.graph, proto.graph)
    if not all(value.type.tensor_type.elem_type for value in proto.graph.output):
        proto = with_types(proto)
    carried.restore(model.graph, proto)
    if proto.ir_version < _CONSTANTS_FROM_IR and any(graph.initializer for graph in graphs_in(proto.graph)):
        proto.ir_version = _CONSTANTS_FROM_IR
    for key, value in model.metadata.items():
        proto.metadata_props.add(key=key, value=value)
    proto.doc_string = model.doc_string
    proto.domain = model.domain
    proto.model_version = model.model_version
    for tensor in tensors(proto):
        location = location_of(tensor)
        if location in pending and (pending[location].nbytes <= INLINE_BYTES or _is_text(pending[location])):
            make_inline(tensor, pending[location])
    return proto, pending


def to_whole_proto(model: Model) -> onnx.ModelProto:
    """The model as a proto that holds all its weights, in memory."""
    proto, pending = to_proto(model)
    for tensor in tensors(proto):
        if weight := pending.get(location_of(tensor) or ""):
            make_inline(tensor, weight)
    return proto


def infer_types(model: Model) -> None:
    """Give the tensors that have no type or no static shape what onnx's inference finds, in place, without weights."""
    _fill_types(model.graph, with_types(to_proto(model)[0]).graph)


def _fill_types(graph: gs.Graph, proto: onnx.GraphProto) -> None:
    found = {value.name: value.type.tensor_type for value in (*proto.value_info, *proto.output)}
    for node, typed in zip(graph.nodes, proto.node, strict=True):
        for tensor in node.outputs:
            type_ = found.get(tensor.name)
            if type_ is None or not type_.elem_type or isinstance(tensor, gs.Constant):
                continue
            if to_numpy(tensor.dtype) is None:
                tensor.dtype = type_.elem_type
            static = tensor.shape is not None and all(isinstance(dim, int) for dim in tensor.shape)
            dims = [dim.dim_value for dim in type_.shape.dim if dim.HasField("dim_value")]
            if not static and type_.HasField("shape") and len(dims) == len(type_.shape.dim):
                tensor.shape = dims
        bodies = [a.g for a in typed.attribute if a.HasField("g")]
        for inner, body in zip(
            (v for v in node.attrs.values() if isinstance(v, gs.Graph)), bodies, strict=True
        ):
            _fill_types(inner, body)


class DataFolder:
    """Which weights the data files of a folder hold, for models that are saved in it one after the other.

    Such models share their data: `save` writes what no file of the folder holds yet. Weights that several models derive
    alike from alike ones are one (`Weight.fingerprint`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._places: dict[object, tuple[Weight, _Place]] = {}

    def place(self, weight: Weight) -> _Place | None:
        """Where a file of the folder holds `weight`."""
        if isinstance(weight, Stored) and weight.path.parent.resolve() == self.folder:
            return _Place(weight.path.name, weight.offset, weight.checksum())
        known = self._places.get(weight.fingerprint())
        return None if known is None else known[1]

    def add(self, weight: Weight, place: _Place) -> None:
        """Remember where `weight` is; it is kept alive, so that no other takes its identity."""
        self._places[weight.fingerprint()] = weight, place


@dataclass(frozen=True)
class _Place:
    """Name of a data file, offset in bytes, and the SHA-256 of what lies there."""

    location: str
    offset: int
    checksum: str


def _identity(weight: Weight) -> object:
    return (weight.path, weight.offset, weight.nbytes) if isinstance(weight, Stored) else id(weight)


def save(
    model: Model,
    path: Path | str,
    *,
    shared: DataFolder | None = None,
    update: Callable[[float | None, str], None] | None = None,
) -> None:
    """Write `path` and, where weights are larger than `INLINE_BYTES`, `path` + `.data` beside it.

    Both are written under other names first and renamed when they are whole, the data first. The model may have been loaded from
    the same path.

    Args:
        shared: of the folder of `path`, to refer to weights that its files hold already.
        update: told which part is written, and in words how many weights, how fast, and what time is left.

    Raises:
        Pi05cError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    proto, pending = to_proto(model)
    data_path = path.with_name(path.name + ".data")
    with (
        replacing(path, through_link=False) as partial_model,  # the data lies beside the link
        replacing(data_path, through_link=False) as partial_data,
    ):
        with partial_data.open("wb") as file, _DataWriter(file, data_path.name, shared) as writer:
            stored = [tensor for tensor in tensors(proto) if location_of(tensor) in pending]
            weights = [pending[location_of(tensor) or ""] for tensor in stored]
            told = _Told(update, weights)
            for tensor, weight in zip(stored, weights, strict=True):
                writer.write(tensor, weight)
                told.done(weight)
        partial_model.write_bytes(proto.SerializeToString())
        if not partial_data.stat().st_size:
            partial_data.unlink()
        elif data_path.exists():
            path.unlink(
                missing_ok=True
            )  # a process that is killed here leaves no graph rather than one with other data


class _Told:
    """Tells how many weights are done, how fast, and how long the others will take."""

    def __init__(self, update: Callable[[float | None, str], None] | None, weights: Sequence[Weight]) -> None:
        self._update = update
        self._sizes = {_identity(weight): weight.nbytes for weight in weights}
        self._count, self._bytes = len(self._sizes), sum(self._sizes.values())
        self._start = time.monotonic()

    def done(self, weight: Weight) -> None:
        """A weight is written, perhaps not for the first time."""
        if self._sizes.pop(_identity(weight), None) is None or self._update is None:
            return
        left = sum(self._sizes.values())
        seconds = max(time.monotonic() - self._start, 1e-6)
        rate = (self._bytes - left) / seconds
        self._update(
            1 - left / self._bytes if self._bytes else None,
            f"{self._count - len(self._sizes):,} of {self._count:,} weights, {rate / 1e6:,.0f} MB/s, "
            f"{left / rate if rate else 0:.0f} s left",
        )


class _DataWriter:
    """Appends weights to an external-data file, each once, and points tensors at them. Threads evaluate their chunks."""

    def __init__(self, file: Any, name: str, shared: DataFolder | None) -> None:
        self.file = file
        self.name = name
        self.offset = 0
        self.shared = shared
        self.written: dict[object, _Place] = {}
        self._threads = ThreadPoolExecutor(_processors())

    def __enter__(self) -> _DataWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def write(self, tensor: onnx.TensorProto, weight: Weight) -> None:
        place = self.written.get(_identity(weight))
        if place is None and self.shared is not None:
            place = self.shared.place(weight)
        if place is None:
            self.offset += -self.offset % ALIGNMENT
            self.file.seek(self.offset)
            place = self.written[_identity(weight)] = _Place(self.name, self.offset, self._append(weight))
            self.offset += weight.nbytes
            if self.shared is not None:
                self.shared.add(weight, place)
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for name, value in (
            ("location", place.location),
            ("offset", str(place.offset)),
            ("length", str(weight.nbytes)),
            ("checksum", place.checksum),
        ):
            tensor.external_data.add(key=name, value=value)

    def _append(self, weight: Weight) -> str:
        if isinstance(weight, Stored):
            checksum = weight.checksum()
            self.file.flush()
            _copy(weight.fileno(), weight.offset, self.file.fileno(), self.offset, weight.nbytes)
            return checksum
        digest = hashlib.sha256()
        for raw in self._evaluated(weight):
            digest.update(raw)
            self.file.write(raw)
        weight._checksum = digest.hexdigest()
        return weight._checksum

    def _evaluated(self, weight: Weight) -> Iterator[bytes | memoryview]:
        """The bytes of a weight in chunks, of which as many are in memory as there are threads, and one."""
        ahead: deque[Future[bytes | memoryview]] = deque()
        for region in weight.regions(_EVALUATED_BYTES):
            ahead.append(self._threads.submit(lambda part: stored_bytes(weight.read(part)), region))
            if len(ahead) > _processors():
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _processors() -> int:
    """Processors that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _copy(source: int, source_offset: int, target: int, target_offset: int, length: int) -> None:
    """Copy bytes between two files inside the kernel where the platform can."""
    while length:
        size = min(length, _COPY_BYTES)
        try:
            done = os.copy_file_range(source, target, size, source_offset, target_offset)
        except (AttributeError, OSError):
            done = os.pwrite(target, os.pread(source, size, source_offset), target_offset)
        if not done:
            raise Pi05cError(
                "a data file of the model ended early: start again when nothing writes it any more"
            )
        source_offset, target_offset, length = source_offset + done, target_offset + done, length - done


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in a model: initializers and attributes, in subgraphs and functions too."""
    for graph in graphs_in(proto.graph):
        yield from graph.initializer
        for node in graph.node:
            yield from _attribute_tensors(node)
    for function in proto.functions:
        for node in function.node:
            yield from _attribute_tensors(node)


def _attribute_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    seen: set[int] = set()
    for scope in (*scopes(graph), *(scope for function in graph.functions for scope in scopes(function))):
        used = [tensor for node in scope.nodes for tensor in node.inputs]
        attributes = [value for node in scope.nodes for value in node.attrs.values()]
        for tensor in (*used, *scope.outputs, *attributes):
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _store_shared_constants_once(graph: gs.Graph, proto: onnx.GraphProto) -> None:
    """Keep what several scopes read in the outermost graph; onnx-graphsurgeon exports it into each of them.

    Left so, it would come back as several initializers. A name that several tensors have stays where it is.
    """
    _, *bodies = scopes(graph)
    if not bodies:
        return
    owners: dict[str, set[int]] = {}
    readers: dict[int, int] = {}
    constants: dict[int, gs.Constant] = {}
    for scope in scopes(graph):
        read = [*scope.inputs, *scope.outputs, *(t for n in scope.nodes for t in (*n.inputs, *n.outputs))]
        for key, tensor in {id(tensor): tensor for tensor in read}.items():
            owners.setdefault(tensor.name, set()).add(key)
            if isinstance(tensor, gs.Constant):
                constants[key] = tensor
                readers[key] = readers.get(key, 0) + 1
    shared = {
        constant.name: constant
        for key, constant in constants.items()
        if readers[key] > 1 and len(owners[constant.name]) == 1
    }
    if not shared:
        return
    for body in list(graphs_in(proto))[1:]:
        kept = [tensor for tensor in body.initializer if tensor.name not in shared]
        if len(kept) < len(body.initializer):
            del body.initializer[:]
            body.initializer.extend(kept)
    stored = {tensor.name for tensor in proto.initializer}
    missing = [constant for name, constant in shared.items() if name not in stored]
    proto.initializer.extend(OnnxExporter.export_tensor_proto(constant) for constant in missing)


def _link_returned_captures(graph: gs.Graph, outer: Mapping[str, gs.Tensor]) -> None:
    """Let a body that returns a tensor from outside return that tensor, not one of its own of the same name.

    onnx-graphsurgeon looks for outputs in the body alone.
    """
    known = dict(outer)
    known.update((tensor.name, tensor) for tensor in graph.inputs)
    for node in graph.nodes:
        known.update((tensor.name, tensor) for tensor in (*node.inputs, *node.outputs) if tensor.name)
    for node in graph.nodes:
        for body in node.attrs.values():
            if isinstance(body, gs.Graph):
                own = {id(tensor) for tensor in body.inputs}
                body.outputs = [
                    tensor
                    if tensor.inputs or isinstance(tensor, gs.Constant) or id(tensor) in own
                    else known.get(tensor.name, tensor)
                    for tensor in body.outputs
                ]
                _link_returned_captures(body, known)


def _inline_constant_nodes(graph: gs.Graph) -> None:
    """Turn the outputs of Constant nodes into initializers, each with the type its attribute states."""
    kept = []
    for node in graph.nodes:
        value = _constant_value(node) if node.op == "Constant" and not node.domain else None
        if value is None:
            kept.append(node)
            continue
        output = node.outputs[0]
        node.outputs.clear()
        output.to_constant(value)
        carried.describe(output, node)
    graph.nodes = kept


def _constant_value(node: gs.Node) -> Weight | None:
    """The tensor of a Constant node; `value_float` is FLOAT by the operator's specification."""
    if len(node.attrs) != 1 or len(node.outputs) != 1:
        return None
    ((key, value),) = node.attrs.items()
    if key == "value":
        return weight_of(value) if isinstance(value, gs.Constant) else None
    kinds = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}
    if key not in kinds:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(number, (int, float)) for number in numbers):
        return None
    return InMemory(np.asarray(value, kinds[key]))


def make_inline(tensor: onnx.TensorProto, weight: Weight) -> None:
    """Put the values of a weight into a tensor that referred to them."""
    del tensor.external_data[:]
    tensor.ClearField("data_location")
    if _is_text(weight):
        tensor.string_data.extend(str(value).encode() for value in weight.load().reshape(-1))
    else:
        tensor.raw_data = bytes(stored_bytes(weight.load()))


def _is_text(weight: Weight) -> bool:
    """Whether it holds strings, which ONNX stores in a field of their own and never in another file."""
    return weight.dtype == np.dtype(object)


def point_to_file(tensor: onnx.TensorProto, weight: Weight, base: Path | None) -> bool:
    """Let a tensor refer to the file of its weight, where that lies in `base`; whether it does."""
    if base is None or not isinstance(weight, Stored) or not weight.path.absolute().is_relative_to(base):
        return False
    del tensor.external_data[:]
    location = weight.path.absolute().relative_to(base).as_posix()
    for key, value in (("location", location), ("offset", weight.offset), ("length", weight.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return True


def referring_proto(model: Model, base: Path) -> onnx.ModelProto:
    """The model as a proto that reads its weights from the files of `base`; what lies in none of them is inside it."""
    proto, pending = to_proto(model)
    for tensor in tensors(proto):
        weight = pending.get(location_of(tensor) or "")
        if weight is not None and not point_to_file(tensor, weight, base):
            make_inline(tensor, weight)
    return proto


def location_of(tensor: onnx.TensorProto) -> str | None:
    """Where the bytes of an external tensor lie: a file, or the key of a pending weight; None of an inline one."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), None)


def _refuse_duplicates(graph: onnx.GraphProto) -> None:
    seen = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        for output in node.output:
            if output and output in seen:
                raise Pi05cError(
                    f"tensor {output!r} is produced twice (second by node {node.name!r}): names must be unique"
                )
            seen.add(output)


__all__ = [
    "DataFolder",
    "Model",
    "infer_types",
    "load",
    "location_of",
    "make_inline",
    "model_from_proto",
    "point_to_file",
    "referring_proto",
    "save",
    "scopes",
    "tensors",
    "to_proto",
    "to_whole_proto",
]
