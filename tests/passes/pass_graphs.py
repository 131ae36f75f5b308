"""Small graphs as text, and what the tests of passes do with them: run a pass, run a graph, compare numbers."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
from kernels import skip_without_kernels
from onnx import numpy_helper

from pi05c.backend.onnxruntime import OnnxRuntimeRunner
from pi05c.graph.io import Model, model_from_proto, save, scopes
from pi05c.graph.ranges import Ranges
from pi05c.graph.specialization import fixed_inputs
from pi05c.graph.text import canonical_text
from pi05c.passes import PRESETS, REGISTRY
from pi05c.passes.pipeline import Step, StepResult, parse, run

Array = npt.NDArray[Any]

IR_VERSION = 10
"""ONNX 1.16, the first with 4-bit types; what opset 21 needs."""


def graph_text(
    text: str, weights: Mapping[str, Array] | None = None, *, opset: int = 21, named: bool = True
) -> onnx.ModelProto:
    """A model of ONNX's own text form, without its header.

    Args:
        weights: initializers by name, in the order in which the file holds them.
        named: each node is called after its first output, `probs.Softmax`; otherwise nodes have no names.
    """
    text = _FLOAT16_VALUES.sub(_as_bits, text)
    model = onnx.parser.parse_model(f'<ir_version: {IR_VERSION}, opset_import: ["": {opset}]>\n{text}')
    for name, array in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    for node in _nodes(model.graph) if named else ():
        node.name = node.name or f"{node.output[0]}.{node.op_type}"
    return model


_FLOAT16_VALUES = re.compile(r"(float16(?:\[\d+\])? \w+ = )\{([^}]*)\}")


def _as_bits(match: re.Match[str]) -> str:
    """ONNX's text form takes the bits of a float16 where it takes the value of a float."""
    bits = np.array([float(value) for value in match[2].split(",")], np.float16).view(np.uint16)
    return f"{match[1]}{{{', '.join(map(str, bits))}}}"


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def normal(seed: int, *shape: int, dtype: Any = np.float32, scale: float | None = None) -> Array:
    """Seeded normal numbers, by default of the size that keeps a product's variance: 1 / sqrt(last dimension)."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return (values * (shape[-1] ** -0.5 if scale is None else scale)).astype(dtype)


def editable(proto: onnx.ModelProto) -> Model:
    """The model as passes edit it; the proto stays as it is."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return model_from_proto(copy)


def ranges_of(pairs: Mapping[str, tuple[float, float]]) -> Ranges:
    """Ranges by tensor name, low before high."""
    return Ranges(
        {name: low for name, (low, _) in pairs.items()}, {n: high for n, (_, high) in pairs.items()}
    )


def run_pass(model: Model, name: str, ranges: Ranges | None = None, **options: str) -> StepResult:
    """Run one pass as the pipeline does, with option values as text; the result is checked for structure."""
    step = Step(REGISTRY[name], REGISTRY[name].parse_options(options))
    return run(model, [step], calibrate=lambda _, names: ranges)[0]


def run_passes(
    model: Model, text: str, samples: Sequence[Mapping[str, Array]] | None = None
) -> list[StepResult]:
    """Run a pipeline; its ranges are those of `samples`, measured on the graph as it then stands."""
    calibrate = None if samples is None else lambda model, wanted: measured(model, wanted.tensors, samples)
    return run(model, parse(text, PRESETS), calibrate=calibrate)


def measured(model: Model, names: Sequence[str], samples: Sequence[Mapping[str, Array]]) -> Ranges:
    """Smallest and largest value of the named tensors over all samples; those inside bodies are not measured."""
    found: dict[str, list[Array]] = {name: [] for name in names}
    for sample, outputs in zip(samples, outputs_of_each(model, samples, also=names), strict=True):
        values = {**sample, **outputs}
        for name in names:
            if name in values:
                found[name].append(values[name])
    low = {
        name: float(np.min([np.min(value) for value in values])) for name, values in found.items() if values
    }
    high = {
        name: float(np.max([np.max(value) for value in values])) for name, values in found.items() if values
    }
    return Ranges(low, high, "tests")


def outputs_of(model: Model | onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What onnxruntime makes of the inputs."""
    return outputs_of_each(model, [inputs])[0]


def outputs_of_each(
    model: Model | onnx.ModelProto, samples: Sequence[Mapping[str, Array]], *, also: Sequence[str] = ()
) -> list[dict[str, Array]]:
    """What onnxruntime makes of each sample: the outputs, and the tensors of the main graph named in `also`."""
    if isinstance(model, onnx.ModelProto):
        model = editable(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        if also:
            _expose(path, also)
        skip_without_kernels(onnx.load(path, load_external_data=False))
        runner = OnnxRuntimeRunner(path, threads=1)
        unfed = {fixed.name for fixed in fixed_inputs(model.metadata) if fixed.is_whole}
        return [
            runner.run({name: array for name, array in sample.items() if name not in unfed})
            for sample in samples
        ]


def fitted(model: Model, sample: Mapping[str, Array]) -> dict[str, Array]:
    """The sample with the values for which a model was specialized."""
    changed = dict(sample)
    for fixed in fixed_inputs(model.metadata):
        decided = np.array([value is not None for value in fixed.values]).reshape(fixed.shape)
        changed[fixed.name] = np.where(decided, fixed.array, sample[fixed.name])
    return changed


def _expose(path: Path, names: Sequence[str]) -> None:
    proto = onnx.load(path, load_external_data=False)
    typed = {value.name: value for value in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    has = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    proto.graph.output.extend(typed[name] for name in names if name not in has and name in typed)
    path.write_bytes(proto.SerializeToString())


def seeded_inputs(
    model: Model | onnx.ModelProto, seed: int = 0, within: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, Array]:
    """Inputs for a graph: uniform in the range that `within` names, else normal; 0 to 15; mostly true."""
    if isinstance(model, onnx.ModelProto):
        model = editable(model)
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for tensor in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else 2 for dim in tensor.shape]
        dtype = np.dtype(tensor.dtype)
        if dtype == np.bool_:
            values = np.asarray(rng.random(shape) < 0.75)
            if values.ndim:
                values[..., 0] = True  # a row of which nothing is valid has no softmax
        elif dtype.kind in "iu":
            values = rng.integers(0, 16, shape)
        elif tensor.name in (within or {}):
            values = rng.uniform(*(within or {})[tensor.name], shape)
        else:
            values = rng.standard_normal(shape)
        feeds[tensor.name] = values.astype(dtype)
    return feeds


def relative_error(actual: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """The largest L2 error of an output relative to that output's size; infinite where one is not finite."""
    assert actual.keys() == expected.keys()
    worst = 0.0
    for name, reference in expected.items():
        wide = reference.astype(np.float64)
        size = float(np.linalg.norm(wide)) or 1.0
        error = float(np.linalg.norm(actual[name].astype(np.float64) - wide)) / size
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst


def text_of(model: Model) -> str:
    """The canonical text of a model."""
    return canonical_text(model.graph)


def node_of(model: Model, output: str) -> gs.Node:
    """The node that makes the tensor of this name, in any scope."""
    for scope in scopes(model.graph):
        for node in scope.nodes:
            if any(tensor.name == output for tensor in node.outputs):
                return node
    raise AssertionError(f"no node makes {output!r}")


def make_output(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The same model with one more output, a tensor that it computes and whose type can be inferred."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    copy.graph.output.append(known[name])
    return copy


def renamed(proto: onnx.ModelProto, rename: Callable[[str], str]) -> onnx.ModelProto:
    """The same model with other names for what its nodes make, its inputs and outputs excepted."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    kept = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    made = [output for node in proto.graph.node for output in node.output if output not in kept]
    names = {name: rename(name) for name in made}
    for graph in _graphs(copy.graph):
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
            node.name = rename(node.name)
    return copy


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
