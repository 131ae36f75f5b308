"""The denoising loop as a step that can be taken by itself: x, and one row that follows from the time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import is_float
from pi05c.graph.edit import producer
from pi05c.graph.errors import Pi05cError
from pi05c.graph.evaluate import Evaluator
from pi05c.graph.runner import Array
from pi05c.passes.patterns.dependence import Dependence, reads
from pi05c.passes.patterns.flow import FlowStep, find_flow
from pi05c.passes.patterns.loop_form import Carried
from pi05c.passes.patterns.loops import StaticLoop, each_loop, find_static_loop
from pi05c.passes.patterns.walk import origin, scalar

MAX_STEPS = 1000
"""More denoising steps than anybody takes; a loop of more is taken for another kind of loop."""


@dataclass(frozen=True)
class FlowLoop:
    """A loop over denoising steps of equal length.

    Attributes:
        loop: the loop, in the outermost graph.
        flow: x + factor * v in its body.
        state: x, which starts as an input of the graph and ends as an output.
        time: the carried value that everything about the step follows from.
        rows: the values that follow from the time alone and meet x, in the order of the body.
        scaled: the product of `factor` and v.
        factor: the constant tensor by which v is multiplied.
        start: the time before the first step.
        dt: what a step adds to the time.
        scale: the value of `factor`.
    """

    loop: StaticLoop
    flow: FlowStep
    state: Carried
    time: Carried
    rows: tuple[gs.Tensor, ...]
    scaled: gs.Node
    factor: gs.Tensor
    start: Array
    dt: float
    scale: float


def find_flow_loop(graph: gs.Graph) -> FlowLoop | str:
    """The denoising loop of a graph, or a phrase that says why no step can be taken out of it.

    Nodes must be sorted. Nothing is edited.
    """
    bodies = {id(step.scope): step for step in find_flow(graph) if step.scope is not graph}
    places = [(scope, node) for scope, node in each_loop(graph) if id(node.attrs["body"]) in bodies]
    if not places:
        return "no Loop in it accumulates the flow"
    scope, node = places[0]
    if len(places) > 1 or scope is not graph:
        return f"its Loop {node.name!r} is not the only one, or lies inside another"
    loop = find_static_loop(graph, scope, node, MAX_STEPS)
    if isinstance(loop, str):
        return f"of its Loop {node.name!r} {loop}"
    flow = bodies[id(loop.form.body)]
    state = next((c for c in loop.form.carried if c.entering is origin(flow.state)), None)
    if state is None or origin(state.leaving) is not flow.add.outputs[0]:
        return f"its Loop {node.name!r} does not carry x from step to step"
    if not any(origin(state.initial) is tensor for tensor in graph.inputs) or not any(
        origin(tensor) is state.result for tensor in graph.outputs
    ):
        return "x does not go from an input of the graph straight into the Loop, and from there straight to an output"
    return _described(graph, loop, flow, state)


def _described(graph: gs.Graph, loop: StaticLoop, flow: FlowStep, state: Carried) -> FlowLoop | str:
    name = loop.form.node.name
    classification = loop.classify()
    known = {id(c.entering) for c in (*classification.stepwise, *loop.form.unchanged, state)}
    if strange := [c.entering.name for c in loop.form.carried if id(c.entering) not in known]:
        return f"its Loop {name!r} carries {strange[0]!r} beside x and the time"
    if loop.form.collected or loop.form.scanned:
        return f"its Loop {name!r} reads or stacks one slice a step"
    rows = tuple(tensor for tensor in classification.frontier() if tensor is not loop.form.iteration)
    times = [c for c in classification.stepwise if _follows(rows, c.entering)]
    if len(times) != 1 or not all(is_float(tensor.dtype) for tensor in (*rows, times[0].entering)):
        return f"what a step of its Loop {name!r} needs does not follow from one carried time"
    if any(classification[tensor] is not Dependence.STEP for tensor in rows):
        return f"what a step of its Loop {name!r} needs follows from more than the time"
    time = times[0]
    if flow.scaled is None:
        return f"the length of a step of its Loop {name!r} is part of a weight"
    factor = next(tensor for tensor in flow.scaled.inputs if tensor is not flow.velocity)
    scale = scalar(factor)
    if scale is None:
        return f"the length of a step of its Loop {name!r} is not a constant"
    start = loop.known[id(time.entering)]
    try:
        Evaluator(graph, list(rows), [time.entering])
        after = Evaluator(graph, [time.leaving], [time.entering])({time.entering.name: start})[0]
    except Pi05cError as error:
        return f"what a step of its Loop {name!r} needs does not follow from the time alone ({error})"
    dt = float(after.reshape(-1)[0].astype(np.float64) - start.reshape(-1)[0].astype(np.float64))
    if start.size != 1 or not np.isclose(abs(dt), abs(scale), rtol=1e-3):
        return f"the time of its Loop {name!r} does not advance by the length of a step"
    dt = float(np.copysign(scale, dt))
    return FlowLoop(loop, flow, state, time, rows, flow.scaled, factor, start, dt, scale)


def _follows(tensors: tuple[gs.Tensor, ...], source: gs.Tensor) -> bool:
    """Whether any of `tensors` is computed from `source`."""
    stack, seen = list(tensors), set[int]()
    while stack:
        tensor = stack.pop()
        if tensor is source:
            return True
        node = producer(tensor)
        if id(tensor) not in seen and node is not None:
            stack.extend(reads(node))
        seen.add(id(tensor))
    return False
