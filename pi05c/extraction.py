"""The plain graph of one part of a policy, or of one denoising step, cut out of the whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from pi05c.backend.onnxruntime import load_runner
from pi05c.backend.signature import TensorSpec
from pi05c.graph.check import load_valid, problems
from pi05c.graph.dtypes import FLOAT32, to_numpy, to_onnx
from pi05c.graph.edit import Editor, Names, detach, keep_between, producer
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.files import refuse_replacing
from pi05c.graph.io import Model, load, save
from pi05c.graph.runner import Array
from pi05c.inspection import data_files, tensor_records
from pi05c.manifest import TensorRecord
from pi05c.passes.patterns.borders import Crossing, find_crossings, present_parts
from pi05c.passes.patterns.flow_loop import FlowLoop, find_flow_loop
from pi05c.passes.patterns.parts import PARTS, Part, parts_of
from pi05c.passes.patterns.walk import origin, static_shape
from pi05c.progress import Progress
from pi05c.samples import SIDECAR_SUFFIX, SYNTHETIC, find_samples, save_samples

STEP = "step"
"""What stands for the denoising where one step is a graph of its own."""

STATE, NEXT_STATE, ROW, TIME, FACTOR = "x", "next_x", "step_row", "time", "factor"
"""Inputs and output of a step, `next_x = x + factor * v(x, step_row)`, and of the table that makes its rows."""

PART_KEY = "pi05c.part"
STEP_KEY = "pi05c.step"
"""Metadata entries: which part a graph is; of a table, what makes the rows of any number of steps (JSON)."""

Grouping = tuple[tuple[str, ...], ...]
"""Parts that become one graph each, in order of execution; `step` may stand for `denoise` as a group of its own."""


@dataclass(frozen=True)
class PartGraph:
    """One group of parts as a graph.

    Attributes:
        name: its parts, joined by `+`.
        sources: names of the tensors of the whole graph that enter it from earlier parts, by the name of its input.
        results: names of the tensors of the whole graph that it makes, by the name of its output.
        step: of a step, what makes its inputs.
    """

    name: str
    model: Model
    sources: dict[str, str]
    results: dict[str, str]
    step: StepSource | None = None

    def takes(self) -> list[str]:
        """Names of its inputs."""
        return [tensor.name for tensor in self.model.graph.inputs]


@dataclass(frozen=True)
class StepSource:
    """What a step that was taken out of a loop reads.

    Attributes:
        table: the graph from time and factor to `step_row`, for `StepTable`.
        loop: name of the Loop in the whole graph.
        state: name of x in the loop's body.
    """

    table: Model
    loop: str
    state: str


def parse_grouping(text: str) -> Grouping:
    """Read `vision,prefix+denoise`.

    Raises:
        UsageError: an unknown part, one that is named twice, or an order in which no policy runs.
    """
    groups = tuple(tuple(part.strip() for part in item.split("+")) for item in text.split(","))
    named = [part for group in groups for part in group]
    for part in named:
        if part not in (*PARTS, STEP):
            raise UsageError(f"unknown part {part!r} in {text!r}: choose among {', '.join((*PARTS, STEP))}")
    order = [PARTS.index("denoise" if part == STEP else _part(part)) for part in named]
    if order != sorted(set(order)):
        raise UsageError(f"{text!r} is out of order or names a part twice: the order is {', '.join(PARTS)}")
    if order != list(range(order[0], order[-1] + 1)):
        raise UsageError(f"{text!r} leaves out a part between two others: the order is {', '.join(PARTS)}")
    if any(STEP in group and len(group) > 1 for group in groups):
        raise UsageError(
            f"{STEP} cannot be joined with another part in {text!r}: it is run once a step by itself"
        )
    return groups


def complete_grouping(path: Path, wanted: Grouping) -> Grouping:
    """`wanted` with the parts before and after it that the model at `path` has.

    Raises:
        Pi05cError: the model lacks a part that is wanted.
    """
    graph = load_valid(path).graph
    present = present_parts(graph)
    named = {"denoise" if part == STEP else _part(part) for group in wanted for part in group}
    for part in PARTS:
        if part in named and part not in present:
            raise Pi05cError(
                f"{path} has no part {part}: {_SIGNS[part]}; it has {', '.join(present) or 'none'}"
            )
    before = tuple(part for part in present if PARTS.index(part) < min(map(PARTS.index, named)))
    after = tuple(part for part in present if PARTS.index(part) > max(map(PARTS.index, named)))
    return tuple(group for group in (before, *wanted, after) if group)


_SIGNS: dict[Part, str] = {
    "vision": "nothing in it is computed from a Conv alone",
    "prefix": "no linear in it is neither of the camera nor of the flow",
    "denoise": "nothing in it accumulates x + dt * v from an input to an output",
}
"""What a part that is not found lacks."""


def extract(path: Path, grouping: Grouping, index: int) -> PartGraph:
    """The plain graph of one group of parts.

    Its inputs are those inputs of the model that it reads, and what earlier groups hand over, under the names of
    `pi05c.passes.patterns.borders.find_crossings`; its outputs what later groups read, and the model's own. Types
    are those of the plain graph. Of a step they are `x`, `step_row` and what does not change from step to step,
    and `next_x`. Weights stay on disk.

    Args:
        path: the plain graph.
        grouping: every part that the model has; see `complete_grouping`.

    Raises:
        Pi05cError: the graph cannot be cut there.
    """
    model = load_valid(path)
    graph = model.graph
    group = grouping[index]
    by_step = grouping[-1] == (STEP,)
    groups = [[_part("denoise" if part == STEP else part) for part in parts] for parts in grouping]
    crossings = find_crossings(graph, groups, recompute=not by_step)
    entering = [crossing for crossing in crossings if index in crossing.readers]
    leaving = [crossing for crossing in crossings if crossing.maker == index]
    sources = {crossing.name: crossing.tensor.name for crossing in entering}
    results = {crossing.name: crossing.tensor.name for crossing in leaving}
    if group == (STEP,):
        loop = _flow_loop(path, graph)
        step = StepSource(_step_table(path), loop.loop.form.node.name, loop.state.entering.name)
        _take_step(model, loop, entering)
    else:
        step = None
        own = _own_outputs(graph, groups, index)
        results |= {tensor.name: tensor.name for tensor in own}
        _rename(graph, crossings)
        outputs = {id(tensor): tensor for tensor in (*(c.tensor for c in leaving), *own)}
        keep_between(graph, [*graph.inputs, *(c.tensor for c in entering)], list(outputs.values()))
    name = "+".join(group)
    model.metadata[PART_KEY] = name
    for found in problems(model):
        raise Pi05cError(f"the part {name} of {path} is not a valid graph: {found}")
    return PartGraph(name, model, sources, results, step)


class StepTable:
    """Makes the rows of a denoising loop of any number of steps, by the graph that `extract` gives as `table`.

    Attributes:
        steps: how many steps the policy was exported with.
        state: the input of the policy that x starts as.
        result: the output of the policy that x ends as.
    """

    def __init__(self, path: Path) -> None:
        record = json.loads(load(path).metadata[STEP_KEY])
        self.steps = int(record["steps"])
        self.state, self.result = str(record["state"]), str(record["result"])
        self._start, self._span, self._reach = (float(record[key]) for key in ("start", "span", "reach"))
        self._runner = load_runner(path)
        self._time: TensorSpec = next(spec for spec in self._runner.inputs if spec.name == TIME)

    def rows(self, steps: int | None = None) -> list[Array]:
        """The row of each step, first to last; `steps` is the policy's own number where it is None.

        The time is accumulated as the loop does, in its type.

        Raises:
            UsageError: `steps` is not positive.
        """
        count = self.steps if steps is None else steps
        if count < 1:
            raise UsageError(f"--steps {count} takes no step: give a number from 1 on")
        dtype, shape = self._time.dtype, [1] * len(self._time.shape)
        time, dt = np.full(shape, self._start, dtype), dtype.type(self._span / count)
        factor = np.array([self._reach / count], FLOAT32)
        rows = []
        for _ in range(count):
            rows.append(self._runner.run({TIME: time, FACTOR: factor})[ROW])
            time = time + dt
        return rows


class PlainBorders:
    """Runs the whole plain graph and gives, beside its outputs, what crosses the borders of parts.

    Args:
        path: the plain graph.
        parts: what `extract` made of it.
        edit: makes further tensors outputs, which `run` then gives too.
    """

    def __init__(
        self,
        path: Path,
        parts: Sequence[PartGraph],
        edit: Callable[[onnx.ModelProto], None] | None = None,
    ) -> None:
        self._edit = edit
        self._inner = {name: inner for part in parts for name, inner in part.sources.items()}
        self._step = next((part.step for part in parts if part.step is not None), None)
        specs = {
            inner: tensor
            for part in parts
            for tensor in (*part.model.graph.inputs, *part.model.graph.outputs)
            if (inner := {**part.sources, **part.results}.get(tensor.name)) is not None
        }
        self._values = [
            onnx.helper.make_tensor_value_info(inner, to_onnx(specs[inner].dtype), specs[inner].shape)
            for inner in dict.fromkeys(self._inner.values())
        ]
        self._runner = load_runner(path, edit=self._tap)

    def run(self, sample: Mapping[str, Array]) -> dict[str, Array]:
        """The sample, the outputs, and the crossing tensors by their names; x before each step, stacked, as `x`."""
        given = self._runner.run({spec.name: sample[spec.name] for spec in self._runner.inputs})
        outer = {name: value for name, value in given.items() if name not in self._inner.values()}
        crossing = {name: given[inner] for name, inner in self._inner.items()}
        return {**sample, **outer, **crossing}

    def _tap(self, proto: onnx.ModelProto) -> None:
        """Make the crossing tensors outputs, and let the loop collect x."""
        if self._edit is not None:
            self._edit(proto)
        known = {value.name for value in proto.graph.output}
        proto.graph.output.extend(value for value in self._values if value.name not in known)
        if self._step is None:
            return
        loop = next(node for node in proto.graph.node if node.name == self._step.loop)
        body = next(attribute.g for attribute in loop.attribute if attribute.name == "body")
        entering = next(value for value in body.input if value.name == self._step.state)
        body.node.append(onnx.helper.make_node("Identity", [entering.name], [_COLLECTED], name=_COLLECTED))
        body.output.add().CopyFrom(entering)
        body.output[-1].name = _COLLECTED
        loop.output.append(STATE)
        kind = entering.type.tensor_type
        shape = [None, *(dim.dim_value for dim in kind.shape.dim)]
        proto.graph.output.append(onnx.helper.make_tensor_value_info(STATE, kind.elem_type, shape))


_COLLECTED = "pi05c.x"
"""Name in the loop's body of what it collects."""


def part_samples(
    part: PartGraph, space: Mapping[str, Array], rows: Sequence[Array]
) -> list[dict[str, Array]]:
    """What a part is fed for one sample, of which `space` holds what `PlainBorders` gives.

    Args:
        rows: of a step, those of its table: it is fed once for each.
    """
    fixed = {name: space[name] for name in part.takes() if name not in (STATE, ROW)}
    if part.step is None:
        return [fixed]
    return [{**fixed, STATE: x, ROW: row} for x, row in zip(space[STATE], rows, strict=True)]


@dataclass(frozen=True)
class ExtractResult:
    """What `pi05c extract` wrote.

    Attributes:
        table: of a step, the graph that makes `step_row`.
        calibration: samples for the part; None where the whole model had none.
    """

    model: Path
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    table: Path | None
    calibration: Path | None


def extract_part(
    model: Path | str,
    part: str,
    output: Path | str,
    *,
    calibration: Sequence[Path | str] = (),
    progress: Progress | None = None,
) -> ExtractResult:
    """Write the plain graph of one part, and samples for it beside it where the whole model has some.

    The samples are what the parts before it hand over in the plain graph; those of a step are one step of each
    sample, spread over the loop. The table of a step is written as `OUTPUT.table.onnx`.

    Args:
        part: `denoise`, `prefix+denoise`, `step`.
        output: the ONNX file to write.
        calibration: samples of the whole model, as `find_samples` takes them; those beside it where none are named.

    Raises:
        UsageError: there is no such part.
        Pi05cError: the model cannot be read or cut there, or the output cannot be written.
    """
    path, output = Path(model), Path(output)
    progress = progress or Progress()
    wanted = parse_grouping(part)
    if len(wanted) > 1:
        raise UsageError(
            f"--part {part} names several graphs: join parts with +, or extract one after the other"
        )
    grouping = complete_grouping(path, wanted)
    refuse_replacing(output, [path])
    table_path = output.with_name(f"{output.stem}.table{output.suffix}")
    sidecar = output.with_name(output.stem + SIDECAR_SUFFIX)
    with progress.stage("cut"):
        found = extract(path, grouping, grouping.index(wanted[0]))
        beside = path.with_name(path.stem + SIDECAR_SUFFIX).is_file()
        plain = load_valid(path)
        samples = find_samples(plain, calibration or ([SYNTHETIC] if beside else []))
        reads = [path, *data_files(plain), *(samples.files if samples is not None else ())]
        for graph in (output, *([table_path] if found.step is not None else [])):
            refuse_replacing(graph, reads)
            refuse_replacing(graph.with_name(f"{graph.name}.data"), reads)
        refuse_replacing(sidecar, reads if samples is not None else ())
    with progress.stage("write the graph"):
        save(found.model, output)
        if found.step is not None:
            save(found.step.table, table_path)
    if samples is not None:
        with progress.stage("run the plain graph"):
            table = None if found.step is None else StepTable(table_path)
            borders = PlainBorders(path, [found])
            feeds, rows = [], [] if table is None else table.rows()
            for index, sample in enumerate(samples):
                steps = part_samples(found, borders.run(sample), rows)
                feeds.append(steps[index * (len(steps) - 1) // max(1, len(samples) - 1)])
            save_samples(sidecar, feeds, synthetic=samples.synthetic)
    return ExtractResult(
        output,
        tensor_records(found.model.graph.inputs),
        tensor_records(found.model.graph.outputs),
        None if found.step is None else table_path,
        None if samples is None else sidecar,
    )


def _flow_loop(path: Path, graph: gs.Graph) -> FlowLoop:
    loop = find_flow_loop(graph)
    if isinstance(loop, str):
        raise Pi05cError(f"{path} has no single step to take out, since {loop}: split off denoise as a whole")
    for value in loop.rows:
        if static_shape(value) is None:
            raise Pi05cError(
                f"{value.name!r} of a step has a dynamic shape: export the model with fixed sizes"
            )
    return loop


def _take_step(model: Model, loop: FlowLoop, entering: Sequence[Crossing]) -> None:
    """Make the body of the loop the graph."""
    graph = model.graph
    editor = _open_body(graph, loop)
    state = loop.state.entering
    names = editor.names
    row = gs.Variable(names.unique(ROW), FLOAT32, [sum(_sizes(loop))])
    pieces = [
        gs.Variable(names.unique(f"{ROW}.{value.name}"), FLOAT32, [size])
        for value, size in zip((*loop.rows, loop.factor), _sizes(loop), strict=True)
    ]
    sizes = editor.constant(f"{ROW}.sizes", np.array(_sizes(loop), np.int64))
    graph.nodes.insert(0, gs.Node("Split", names.unique(f"{ROW}.Split"), {"axis": 0}, [row, sizes], pieces))
    for value, piece in zip(loop.rows, pieces, strict=False):
        editor.replace_uses(value, _shaped(editor, piece, value))
    index = next(i for i, tensor in enumerate(loop.scaled.inputs) if tensor is loop.factor)
    loop.scaled.inputs[index] = _shaped(editor, pieces[-1], loop.factor)
    result = loop.flow.add.outputs[0]
    _rename(graph, entering, {id(state): STATE, id(result): NEXT_STATE})
    own = [tensor for tensor in graph.inputs if tensor is not origin(loop.state.initial)]
    keep_between(graph, [state, row, *own, *(crossing.tensor for crossing in entering)], [result])


def _step_table(path: Path) -> Model:
    """The graph from time and factor to `step_row`."""
    model = load_valid(path)
    graph = model.graph
    loop = _flow_loop(path, graph)
    state, result = origin(loop.state.initial).name, loop.state.result.name
    editor = _open_body(graph, loop)
    time = loop.time.entering
    factor = gs.Variable(editor.names.unique(FACTOR), FLOAT32, [1])
    flat = editor.constant(f"{ROW}.flat", np.array([-1], np.int64))
    values: list[gs.Tensor] = [
        editor.add(
            "Reshape",
            [editor.cast(value, FLOAT32), flat],
            f"{ROW}.{value.name}",
            dtype=FLOAT32,
            shape=[size],
        )
        for value, size in zip(loop.rows, _sizes(loop), strict=False)
    ]
    row = editor.add(
        "Concat", [*values, factor], ROW, dtype=FLOAT32, shape=[sum(_sizes(loop))], attrs={"axis": 0}
    )
    _rename(graph, [], {id(time): TIME, id(factor): FACTOR, id(row): ROW})
    keep_between(graph, [time, factor], [row])
    steps = loop.loop.steps
    record: dict[str, Any] = {
        "steps": steps,
        "state": state,
        "result": result,
        "start": float(loop.start.reshape(-1)[0]),
        "span": float(np.float32(steps * loop.dt)),
        "reach": float(np.float32(steps * loop.scale)),
        "layout": [[value.name, list(static_shape(value) or ())] for value in loop.rows] + [[FACTOR, [1]]],
    }
    model.metadata[PART_KEY], model.metadata[STEP_KEY] = f"{STEP} table", json.dumps(record)
    return model


def _open_body(graph: gs.Graph, loop: FlowLoop) -> Editor:
    """Put the nodes of the loop's body in its place."""
    form = loop.loop.form
    nodes = list(form.body.nodes)
    form.node.attrs.clear()
    detach(form.node)
    place = next(index for index, node in enumerate(graph.nodes) if node is form.node)
    graph.nodes[place : place + 1] = nodes
    editor = Editor(graph, Names(graph))
    for carried in form.unchanged:
        editor.replace_uses(carried.entering, carried.initial)
    return editor


def _sizes(loop: FlowLoop) -> list[int]:
    """Numbers that each part of a row holds; the last is the factor."""
    return [int(np.prod(static_shape(value) or (), dtype=int)) for value in loop.rows] + [1]


def _shaped(editor: Editor, piece: gs.Tensor, value: gs.Tensor) -> gs.Tensor:
    """A piece of the row in the shape and type of the value that it stands for."""
    sizes = list(static_shape(value) or ())
    shape = editor.constant(f"{piece.name}.shape", np.array(sizes, np.int64))
    reshaped = editor.add("Reshape", [piece, shape], f"{piece.name}.value", dtype=FLOAT32, shape=sizes)
    return editor.cast(reshaped, to_numpy(value.dtype))


def _own_outputs(graph: gs.Graph, groups: Sequence[Sequence[Part]], index: int) -> list[gs.Tensor]:
    """The outputs of the whole graph that a group makes."""
    parts = parts_of(graph)
    found = []
    for tensor in graph.outputs:
        node = producer(tensor)
        if node is not None and parts[id(node)] in groups[index]:
            found.append(tensor)
    return found


def _rename(graph: gs.Graph, crossings: Sequence[Crossing], more: dict[int, str] | None = None) -> None:
    """Give tensors their names between parts; another tensor that has one of those gets out of the way."""
    names = {id(crossing.tensor): crossing.name for crossing in crossings} | (more or {})
    used = Names(graph)
    taken = set(names.values())
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if id(tensor) in names:
                tensor.name = names[id(tensor)]
            elif tensor.name in taken and tensor not in graph.outputs:
                tensor.name = used.unique(f"{tensor.name}.inner")


def _part(name: str) -> Part:
    return next(part for part in PARTS if part == name)


__all__ = [
    "NEXT_STATE",
    "PART_KEY",
    "ROW",
    "STATE",
    "STEP",
    "ExtractResult",
    "Grouping",
    "PartGraph",
    "PlainBorders",
    "StepSource",
    "StepTable",
    "complete_grouping",
    "extract",
    "extract_part",
    "parse_grouping",
    "part_samples",
]
