"""Copies of nodes with their subgraphs, under new names and with other inputs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import onnx_graphsurgeon as gs

from pi05c.graph.carried import CARRIED
from pi05c.graph.edit import Names

_FROZEN_BY_PYTHON = 1000
"""More objects than Python itself sets aside when it starts (375 in 3.12, none before)."""


@contextmanager
def collection_paused() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """No garbage collection while a graph of tens of thousands of nodes is worked on.

    Their references form cycles, so that each full collection walks all of them, finds nothing, and makes linear work
    quadratic: 72,000 nodes took 2.9 s with it and 1.3 s without.

    Yields:
        A context for what is long or is not known: in it garbage is collected again, of what is made from there on alone.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield _resumed if enabled else nullcontext
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _resumed() -> Iterator[None]:
    aside = gc.get_freeze_count() < _FROZEN_BY_PYTHON  # else somebody else has, and wants them to stay there
    if aside:
        gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        gc.disable()
        if aside:
            gc.unfreeze()


def clone_node(node: gs.Node, tensors: MutableMapping[int, gs.Tensor], names: Names, prefix: str) -> gs.Node:
    """A copy of `node` whose name and tensors begin with `prefix`.

    Args:
        tensors: what takes the place of a tensor, by the id of the original; all others, initializers among them,
            are shared with the original. The node's outputs, unless they have an entry already, and everything
            inside its subgraphs get an entry.
    """
    attrs = {
        key: _clone_graph(value, tensors, names, prefix) if isinstance(value, gs.Graph) else value
        for key, value in node.attrs.items()
    }
    clone = gs.Node(
        node.op,
        names.unique(f"{prefix}{node.name or node.op}"),
        attrs=attrs,
        inputs=[tensors.get(id(tensor), tensor) for tensor in node.inputs],
        outputs=[_clone_variable(tensor, tensors, names, prefix) for tensor in node.outputs],
        domain=node.domain,
    )
    for kept in CARRIED:
        if hasattr(node, kept):
            setattr(clone, kept, getattr(node, kept))
    return clone


def _clone_graph(
    graph: gs.Graph, tensors: MutableMapping[int, gs.Tensor], names: Names, prefix: str
) -> gs.Graph:
    inputs = [_clone_variable(tensor, tensors, names, prefix) for tensor in graph.inputs]
    nodes = [clone_node(node, tensors, names, prefix) for node in graph.nodes]
    return gs.Graph(
        nodes=nodes,
        inputs=inputs,
        outputs=[tensors.get(id(tensor), tensor) for tensor in graph.outputs],
        name=graph.name,
        doc_string=graph.doc_string,
        opset=graph.opset,
        import_domains=graph.import_domains,
        functions=graph.functions,
        ir_version=graph.ir_version,
    )


def _clone_variable(
    tensor: gs.Variable, tensors: MutableMapping[int, gs.Tensor], names: Names, prefix: str
) -> gs.Tensor:
    if not tensor.name:
        return gs.Variable.empty()
    if id(tensor) not in tensors:
        shape = None if tensor.shape is None else list(tensor.shape)
        tensors[id(tensor)] = gs.Variable(
            names.unique(f"{prefix}{tensor.name}"), tensor.dtype, shape, tensor.type
        )
    return tensors[id(tensor)]
