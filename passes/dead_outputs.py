"""Takes off Loop, Scan and If what they hand out and nobody reads."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.passes.loop_edit import drop_parts
from pi05c.passes.patterns.dependence import reads
from pi05c.passes.patterns.loop_form import LoopForm, loop_form
from pi05c.passes.patterns.walk import each_node, output_ids


def drop_dead_outputs(graph: gs.Graph) -> list[str]:
    """Drop carried values and collected outputs of loops, and outputs of If, that nothing needs; what was dropped.

    A carried value is needed if the loop's output is read, or if another value that is needed, or the condition,
    depends on it. The trip count of a Loop and the scanned inputs of a Scan stay.
    """
    returned = output_ids(graph)
    dropped = []
    for scope, node in list(each_node(graph, "Loop", "Scan", "If")):
        if node.domain:
            continue
        if node.op == "If":
            dropped += _shorten_if(node, returned)
            continue
        form = loop_form(scope, node)
        if isinstance(form, str):
            continue
        carried = _dead_carried(form, returned)
        collected = [part for part in form.collected if _is_read(part.result, returned)]
        names = [c.entering.name for c in form.carried if id(c.entering) in carried]
        names += [part.element.name for part in form.collected if part not in collected]
        if names:
            drop_parts(form, carried, collected)
            dropped += [f"{node.name}: {name}" for name in names]
    return dropped


def _is_read(tensor: gs.Tensor, returned: set[int]) -> bool:
    return bool(tensor.outputs) or id(tensor) in returned


def _dead_carried(form: LoopForm, returned: set[int]) -> set[int]:
    """The carried values, by the ids of their `entering`, that no output and no condition needs."""
    entering = {id(c.entering): c for c in form.carried}
    stack = [form.body.outputs[0]] if form.condition is not None else []
    stack += [part.element for part in form.collected if _is_read(part.result, returned)]
    stack += [c.leaving for c in form.carried if _is_read(c.result, returned)]
    seen: set[int] = set()
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if id(tensor) in entering:
            stack.append(entering[id(tensor)].leaving)
        elif (node := producer(tensor)) is not None:
            stack.extend(reads(node))
    needed = {id(c.entering) for c in form.carried if _is_read(c.result, returned)} | seen
    return set(entering) - needed


def _shorten_if(node: gs.Node, returned: set[int]) -> list[str]:
    kept = [index for index, tensor in enumerate(node.outputs) if _is_read(tensor, returned)]
    if len(kept) == len(node.outputs) or not kept:
        return []
    dropped = [f"{node.name}: {t.name}" for index, t in enumerate(node.outputs) if index not in kept]
    node.outputs = [node.outputs[index] for index in kept]
    for body in node.subgraphs():
        body.outputs = [body.outputs[index] for index in kept]
    return dropped
