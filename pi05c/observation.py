"""What verification sees inside the graphs: the flow by step, the output of each layer, what FP8 clips and flushes.

The plain graph gives its layers' outputs, which go to a file; the rewritten graph takes them as inputs and reduces
the differences to one number each while it runs (`pi05c.reductions`), as it counts what its quantizers meet. So no
inner tensor of the rewritten graph is kept, and of the plain graph only what lies on the disk.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from pi05c.backend.onnxruntime import load_runner
from pi05c.backend.signature import TensorSpec
from pi05c.comparison import error_of
from pi05c.graph.dtypes import FLOAT8E4M3FN, FLOAT32, to_numpy, to_onnx
from pi05c.graph.edit import Editor, Names, producer
from pi05c.graph.io import load, referring_proto, scopes
from pi05c.graph.runner import Array
from pi05c.graph.sort import sort_graph
from pi05c.graph.weights import array_of
from pi05c.manifest import DriftRecord, LayerErrorRecord, QuantizerRecord
from pi05c.passes.patterns.flow import FlowStep
from pi05c.passes.patterns.layers import HALVES, LayerOutput, Layers, Place
from pi05c.passes.patterns.parts import PARTS
from pi05c.passes.patterns.walk import static_shape
from pi05c.reductions import CLIPPED, FLUSHED, HIGH, LOW, SQUARES, Probe, add_reductions

MOST_BYTES = 2**30
"""Layer outputs of so many held-back samples are kept on disk as fit in this, at least those of one. At full size one
sample takes about 0.3 GB."""

_PROBES = (LOW, HIGH, CLIPPED, FLUSHED, SQUARES)
_QUANTIZED = frozenset({LOW, HIGH, CLIPPED, FLUSHED})
_NAME = "observed"


@dataclass(frozen=True)
class _Point:
    """A layer's output, or (`half` is `x` or `v`) a tensor of the flow."""

    part: str
    step: int | None
    layer: int | None
    half: str


@dataclass(frozen=True)
class _Kept:
    """Where a float32 tensor lies in the file of its sample, and the sum of its squares."""

    offset: int
    size: int
    squares: float


class Observation:
    """Observes one compilation; use `beside`.

    Attributes:
        samples: on how many samples layers are compared.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.samples = 0
        self._kept: list[dict[_Point, _Kept]] = []
        self._flow: list[dict[_Point, Array]] = []
        self._layer_errors: dict[_Point, tuple[float, str]] = {}
        self._drift: dict[int, dict[str, tuple[float, str]]] = {}
        self._quantizers: dict[str, _Counted] = {}
        self.steps = 0

    @classmethod
    @contextmanager
    def beside(cls, folder: Path) -> Iterator[Observation]:
        """Observe, with a folder for what is kept that `end` deletes, or the end of this."""
        observation = cls(Path(tempfile.mkdtemp(prefix="pi05c-", dir=folder)))
        try:
            yield observation
        finally:
            observation.end()

    def plain(self, path: Path) -> PlainObserver:
        """Observes the plain graph, which comes first."""
        return PlainObserver(path, self)

    def rewritten(self, path: Path, *, runs: int = 1, place: str = "") -> ObservedRunner:
        """A runner of a rewritten graph, to be run once a sample, or `runs` times, in the order of the samples."""
        return ObservedRunner(path, self, runs, place)

    def end(self) -> None:
        """Delete what is kept."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def drift(self) -> list[DriftRecord]:
        """By denoising step."""
        return [
            DriftRecord(
                step=step, x=found["x"][0], v=found["v"][0], x_node=found["x"][1], v_node=found["v"][1]
            )
            for step, found in sorted(self._drift.items())
            if len(found) == 2
        ]

    def layers(self) -> list[LayerErrorRecord]:
        """In order of execution."""
        order = {name: index for index, name in enumerate((*PARTS, *HALVES))}
        found = sorted(
            self._layer_errors.items(),
            key=lambda item: (order[item[0].part], item[0].step or 0, item[0].layer, order[item[0].half]),
        )
        return [
            LayerErrorRecord(
                part=point.part,
                layer=point.layer or 0,
                step=point.step,
                half=point.half,
                relative_l2=error,
                node=node,
            )
            for point, (error, node) in found
        ]

    def quantizers(self) -> list[QuantizerRecord]:
        """In order of execution."""
        return [counted.record() for counted in self._quantizers.values()]

    def keep(self, sample: int, tensors: Mapping[_Point, Array]) -> None:
        """Keep what the plain graph gave for a sample."""
        self._flow.append({point: values for point, values in tensors.items() if point.layer is None})
        self.steps = max(self.steps, *(1 + (point.step or 0) for point in self._flow[-1]), 0)
        layers = {point: values for point, values in tensors.items() if point.layer is not None}
        needed = sum(values.nbytes for values in layers.values())
        if not layers or (sample and (sample + 1) * needed > MOST_BYTES):
            return
        kept = {}
        with self._file(sample).open("wb") as file:
            for point, values in layers.items():
                flat = values.astype(np.float64, copy=False).reshape(-1)
                kept[point] = _Kept(file.tell(), values.size, float(np.dot(flat, flat)))
                values.astype(FLOAT32).tofile(file)
        self._kept.append(kept)
        self.samples = len(self._kept)

    def size_of(self, point: _Point) -> int | None:
        """Elements of a layer's output in the plain graph; None where it has no such layer."""
        found = self._kept[0].get(point) if self._kept else None
        return None if found is None else found.size

    def reference(self, sample: int, point: _Point, shape: Sequence[int]) -> Array:
        """A layer's output in the plain graph, float32, mapped; zeros for a sample that is not kept."""
        if sample >= len(self._kept) or point not in self._kept[sample]:
            return np.zeros(shape, FLOAT32)
        kept = self._kept[sample][point]
        return np.memmap(self._file(sample), FLOAT32, "r", kept.offset, tuple(shape))

    def compare_flow(self, sample: int, point: _Point, result: Array, node: str) -> None:
        """Hold a tensor of the flow against the plain graph's."""
        expected = self._flow[sample].get(point) if sample < len(self._flow) else None
        if expected is None or expected.size != result.size:
            return
        error = error_of(expected.reshape(-1), result.reshape(-1), f"step {point.step}").relative_l2
        worst = self._drift.setdefault(point.step or 0, {})
        worst[point.half] = max(worst.get(point.half, (0.0, node)), (error, node))

    def compare_layer(self, sample: int, point: _Point, squares: float, node: str) -> None:
        """Take the sum of squared differences of a layer's output."""
        if sample >= len(self._kept) or point not in self._kept[sample]:
            return
        expected = self._kept[sample][point].squares
        error = math.sqrt(squares / expected) if expected else (math.inf if squares else 0.0)
        error = math.inf if math.isnan(error) else error
        self._layer_errors[point] = max(self._layer_errors.get(point, (0.0, node)), (error, node))

    def count(self, quantizer: _Quantizer, numbers: Mapping[Probe, float], loops: int) -> None:
        """Add what a quantizer met in one run."""
        name = quantizer.node
        self._quantizers.setdefault(name, _Counted(quantizer)).add(numbers, loops)

    def _file(self, sample: int) -> Path:
        return self._folder / f"{sample}.bin"


class PlainObserver:
    """The plain graph, with the flow and the outputs of layers as further outputs.

    Attributes:
        proto: to be run in its place, on the weights beside it.
    """

    def __init__(self, path: Path, observation: Observation) -> None:
        model = load(path)
        graph = model.graph
        layers = Layers(graph)
        taps = _Taps(graph)
        self._observation = observation
        self._sample = 0
        self._points: dict[str, tuple[_Point, bool]] = {}
        for step in layers.flow:
            number = layers.step_of(step)
            for half, tensor in _flow_tensors(step):
                self._tap(taps, _Point("denoise", number, None, half), step.scope, tensor)
        for output in _single(layers.outputs):
            if static_shape(output.tensor) is not None:
                self._tap(taps, _point(output), output.scope, output.tensor)
        sort_graph(graph)
        self.proto = referring_proto(model, path.absolute().parent)

    def _tap(self, taps: _Taps, point: _Point, scope: gs.Graph, tensor: gs.Tensor) -> None:
        name, stacked = taps.add(scope, tensor)
        if name is not None:
            self._points[name] = point, stacked

    def edit(self, proto: onnx.ModelProto) -> None:
        """Make a proto of the graph the observed one; an `edit` of `load_runner`."""
        proto.CopyFrom(self.proto)

    def take(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """Keep what was observed of the next sample; the outputs of the graph remain."""
        found: dict[_Point, Array] = {}
        for name, (point, stacked) in self._points.items():
            if stacked:
                for step, values in enumerate(given[name]):
                    found[_at(point, step)] = values
            else:
                found[_with_step(point)] = given[name]
        self._observation.keep(self._sample, found)
        self._sample += 1
        return {name: values for name, values in given.items() if name not in self._points}


class ObservedRunner:
    """A rewritten graph that is observed while it runs; a `pi05c.chain.StageRunner`.

    Attributes:
        inputs: those of the graph; what the plain graph gave is fed beside them.
    """

    def __init__(self, path: Path, observation: Observation, runs: int, place: str) -> None:
        self._observation, self._runs, self._count = observation, runs, 0
        model = load(path)
        graph = model.graph
        layers = Layers(graph)
        names = Names(graph)
        self._flow: dict[str, tuple[_Point, bool, str]] = {}
        taps = _Taps(graph, names)
        for step in layers.flow:
            for half, tensor in _flow_tensors(step):
                name, stacked = taps.add(step.scope, tensor)
                if name is not None:
                    point = _Point("denoise", layers.step_of(step), None, half)
                    self._flow[name] = point, stacked, str(_maker(tensor, step).name)
        self._references: dict[str, tuple[_Point, tuple[int, ...]]] = {}
        self._differences: dict[str, tuple[_Point, str]] = {}
        editor = Editor(graph, names)
        for output in _single(layers.outputs):
            self._subtract(editor, output)
        self._quantizers = {
            ratio: found
            for scope in scopes(graph)
            for ratio, found in _ratios(scope, graph, names, layers, place)
        }
        sort_graph(graph)
        proto = referring_proto(model, path.absolute().parent)
        wanted = {name: frozenset({SQUARES}) for name in self._differences} | dict.fromkeys(
            self._quantizers, _QUANTIZED
        )
        self._reduced = add_reductions(model, proto, wanted, _PROBES, keep_outputs=True)
        self._runner = load_runner(path, edit=lambda original: original.CopyFrom(proto))
        self.inputs: tuple[TensorSpec, ...] = tuple(
            spec for spec in self._runner.inputs if spec.name not in self._references
        )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see `pi05c.graph.runner.Runner`."""
        sample, run = divmod(self._count, self._runs)
        self._count += 1
        step = run if self._runs > 1 else None
        feeds = {
            name: self._observation.reference(sample, _with_step(_at(point, step)), shape)
            for name, (point, shape) in self._references.items()
        }
        given = self._runner.run({**inputs, **feeds})
        self._take_flow(sample, step, given)
        if self._reduced.outputs:
            numbers = [given.pop(name) for name in self._reduced.outputs]
            self._take_numbers(sample, step, np.concatenate(numbers, axis=1))
        return {name: values for name, values in given.items() if name not in self._flow}

    def _take_flow(self, sample: int, step: int | None, given: Mapping[str, Array]) -> None:
        for name, (point, stacked, node) in self._flow.items():
            every = given[name] if stacked else [given[name]]
            for number, values in enumerate(every):
                at = _at(point, number) if stacked else _with_step(_at(point, step))
                self._observation.compare_flow(sample, at, values, node)

    def _take_numbers(self, sample: int, step: int | None, numbers: Array) -> None:
        columns = dict(zip(self._reduced.names, numbers.T.tolist(), strict=True))
        for name, (point, node) in self._differences.items():
            if name in columns:
                squares = columns[name][_PROBES.index(SQUARES)]
                self._observation.compare_layer(sample, _with_step(_at(point, step)), squares, node)
        for name, quantizer in self._quantizers.items():
            if name in columns:
                loops = self._observation.steps if quantizer.inside else 1
                self._observation.count(quantizer, dict(zip(_PROBES, columns[name], strict=True)), loops)

    def _subtract(self, editor: Editor, output: LayerOutput) -> None:
        """Add the difference of a layer's output and what the plain graph gave, where both have one size."""
        shape = static_shape(output.tensor)
        point = _point(output)
        kept = _with_step(point)
        if (
            shape is None
            or output.scope is not editor.scope
            or self._observation.size_of(kept) != math.prod(shape)
        ):
            return
        reference = gs.Variable(editor.names.unique(f"{_NAME}.plain"), FLOAT32, list(shape))
        editor.scope.inputs.append(reference)
        wide = editor.cast(output.tensor, FLOAT32)
        difference = editor.add("Sub", [wide, reference], f"{_NAME}.difference", dtype=FLOAT32, shape=shape)
        self._references[reference.name] = point, shape
        node = producer(output.tensor)
        self._differences[difference.name] = point, "" if node is None else str(node.name)


@dataclass(frozen=True)
class _Quantizer:
    """An FP8 QuantizeLinear. `inside` says that it lies in a loop's body."""

    node: str
    tensor: str
    place: Place | None
    operator: str | None
    scale: float
    elements: int | None
    inside: bool


@dataclass
class _Counted:
    quantizer: _Quantizer
    low: float = math.inf
    high: float = -math.inf
    elements: int = 0
    clipped: int = 0
    flushed: int = 0

    def add(self, numbers: Mapping[Probe, float], loops: int) -> None:
        self.low, self.high = min(self.low, numbers[LOW]), max(self.high, numbers[HIGH])
        self.elements += (self.quantizer.elements or 0) * loops
        self.clipped += round(numbers[CLIPPED])
        self.flushed += round(numbers[FLUSHED])

    def record(self) -> QuantizerRecord:
        found = self.quantizer
        return QuantizerRecord(
            node=found.node,
            tensor=found.tensor,
            part=None if found.place is None else found.place.part,
            layer=None if found.place is None else found.place.layer,
            step=None if found.place is None else found.place.step,
            operator=found.operator,
            scale=found.scale,
            low=self.low * found.scale,
            high=self.high * found.scale,
            elements=None if found.elements is None else self.elements,
            clipped=self.clipped,
            flushed=self.flushed,
        )


class _Taps:
    """Makes inner tensors outputs of a graph, as float32; those of a loop's body with an axis of steps in front."""

    def __init__(self, graph: gs.Graph, names: Names | None = None) -> None:
        self._graph, self._names = graph, names or Names(graph)
        self._loops = {
            id(body): node
            for node in graph.nodes
            if node.op == "Loop" and isinstance(body := node.attrs.get("body"), gs.Graph)
        }

    def add(self, scope: gs.Graph, tensor: gs.Tensor) -> tuple[str | None, bool]:
        """Name of the output and whether it is stacked; no name where the tensor lies deeper than in one loop."""
        inside = scope is not self._graph
        loop = self._loops.get(id(scope))
        if inside and loop is None:
            return None, False
        tapped = Editor(scope, self._names).add(
            "Cast", [tensor], _NAME, dtype=FLOAT32, shape=tensor.shape, attrs={"to": to_onnx(FLOAT32)}
        )
        scope.outputs.append(tapped)
        if loop is None:
            return str(tapped.name), False
        shape = None if tensor.shape is None else ["steps", *tensor.shape]
        stacked = gs.Variable(self._names.unique(f"{_NAME}.steps"), FLOAT32, shape)
        loop.outputs.append(stacked)
        self._graph.outputs.append(stacked)
        return str(stacked.name), True


def _flow_tensors(step: FlowStep) -> list[tuple[str, gs.Tensor]]:
    """x after a step, and what was added to or subtracted from it."""
    moved = next(tensor for tensor in step.add.inputs if tensor is not step.state)
    return [("x", step.add.outputs[0]), ("v", moved)]


def _maker(tensor: gs.Tensor, step: FlowStep) -> gs.Node:
    return producer(tensor) or step.add


def _single(outputs: Sequence[LayerOutput]) -> list[LayerOutput]:
    """The outputs that are alone at their place: of towers side by side none is that of the whole."""
    places: dict[_Point, list[LayerOutput]] = {}
    for output in outputs:
        places.setdefault(_point(output), []).append(output)
    return [found[0] for found in places.values() if len(found) == 1]


def _point(output: LayerOutput) -> _Point:
    return _Point(output.place.part, output.place.step, output.place.layer, output.half)


def _at(point: _Point, step: int | None) -> _Point:
    """A point of a graph that is one step, in a certain step."""
    if step is None or point.part != "denoise":
        return point
    return _Point(point.part, step, point.layer, point.half)


def _with_step(point: _Point) -> _Point:
    """A point that lies in no loop: of a denoising without numbered steps there is one, the first."""
    return _at(point, point.step or 0)


def _ratios(
    scope: gs.Graph, graph: gs.Graph, names: Names, layers: Layers, place: str
) -> Iterator[tuple[str, _Quantizer]]:
    """Add what each FP8 quantizer of a scope divides by its scale; the name of that, and the quantizer."""
    editor = Editor(scope, names)
    for node in [node for node in scope.nodes if node.op == "QuantizeLinear"]:
        read, scale = node.inputs[:2]
        if to_numpy(node.outputs[0].dtype) != FLOAT8E4M3FN or isinstance(read, gs.Constant):
            continue
        values = array_of(scale).astype(FLOAT32) if isinstance(scale, gs.Constant) else np.zeros(0)
        if values.size != 1:
            continue
        divisor = editor.constant(f"{_NAME}.scale", values.reshape(()))
        ratio = editor.add(
            "Div",
            [editor.cast(read, FLOAT32), divisor],
            f"{_NAME}.ratio",
            dtype=FLOAT32,
            shape=read.shape,
        )
        shape = static_shape(read)
        where, operator = layers.reader(node.outputs[0]) or (None, None)
        yield (
            str(ratio.name),
            _Quantizer(
                f"{place}/{node.name}" if place else str(node.name),
                str(read.name),
                where,
                operator,
                float(values.reshape(-1)[0]),
                None if shape is None else math.prod(shape),
                scope is not graph,
            ),
        )


__all__ = ["MOST_BYTES", "Observation", "ObservedRunner", "PlainObserver"]
