"""The type in which a tensor goes from one part's engine to the next."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import BFLOAT16, FLOAT16, to_numpy
from pi05c.graph.edit import Editor, Names, producer, remove_dead, replace_input
from pi05c.graph.io import Model
from pi05c.graph.sort import sort_graph

_NARROW = (FLOAT16, BFLOAT16)


def narrow_borders(models: Sequence[Model], keep: Collection[str]) -> None:
    """Let parts hand over 16-bit tensors where that changes no number. Edits the models in place.

    A tensor that its maker widens at its end crosses as it was before, and one that all its readers narrow to one
    type first crosses in that type: the Cast moves to the other side of the border. Where the parts do not agree it
    stays as wide as it is in the plain graph.

    Args:
        models: parts in order of execution; an output of one and an input of a later one are the same tensor where
            they have one name.
        keep: outputs of the policy, which keep their type whoever else reads them.
    """
    for index, maker in enumerate(models):
        for name in [tensor.name for tensor in maker.graph.outputs if tensor.name not in keep]:
            readers = [
                (model.graph, tensor)
                for model in models[index + 1 :]
                for tensor in model.graph.inputs
                if tensor.name == name
            ]
            output = next(tensor for tensor in maker.graph.outputs if tensor.name == name)
            dtype = _agreed(output, readers) if readers else None
            if dtype is not None:
                _narrow_output(maker.graph, output, dtype)
                for graph, tensor in readers:
                    _narrow_input(graph, tensor, dtype)
    for model in models:
        sort_graph(model.graph)
        remove_dead(model.graph)


def _agreed(output: gs.Tensor, readers: Sequence[tuple[gs.Graph, gs.Tensor]]) -> object:
    """The narrow type in which a tensor may cross; None where it may not."""
    made = producer(output)
    if made is not None and made.op == "Cast" and to_numpy(made.inputs[0].dtype) in _NARROW:
        return to_numpy(made.inputs[0].dtype)
    wanted = {
        to_numpy(node.outputs[0].dtype) if node.op == "Cast" else None
        for _, tensor in readers
        for node in tensor.outputs
    }
    returned = any(tensor is other for graph, tensor in readers for other in graph.outputs)
    if len(wanted) != 1 or returned:
        return None
    dtype = wanted.pop()
    return dtype if dtype in _NARROW else None


def _narrow_output(graph: gs.Graph, output: gs.Tensor, dtype: object) -> None:
    """Return `output` in `dtype` under its name."""
    editor = Editor(graph, Names(graph))
    name = output.name
    made = producer(output)
    narrow = output
    if made is not None and made.op == "Cast" and to_numpy(made.inputs[0].dtype) == dtype:
        narrow = made.inputs[0]
    else:
        narrow = editor.cast(output, dtype)
    if any(narrow is tensor for tensor in (*graph.inputs, *graph.outputs)):
        narrow = editor.add("Identity", [narrow], f"{name}.copy", dtype=dtype, shape=narrow.shape)
    output.name = editor.names.unique(f"{name}.wide")
    narrow.name = name
    graph.outputs = [narrow if tensor is output else tensor for tensor in graph.outputs]


def _narrow_input(graph: gs.Graph, tensor: gs.Tensor, dtype: object) -> None:
    """Take `tensor` in `dtype`; who reads it as it was gets a Cast."""
    wide = to_numpy(tensor.dtype)
    editor = Editor(graph, Names(graph))
    readers = list(tensor.outputs)
    tensor.dtype = dtype
    widened: gs.Tensor | None = None
    for node in readers:
        if node.op == "Cast" and to_numpy(node.outputs[0].dtype) == dtype:
            editor.replace_uses(node.outputs[0], tensor)
        else:
            widened = widened or editor.cast(tensor, wide)
            replace_input(node, tensor, widened)
