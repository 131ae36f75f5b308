"""Edits on an onnx-graphsurgeon graph: the one place that makes unique names, nodes, constants and casts.

New nodes are appended; `pi05c.graph.sort.sort_graph` then moves each in front of its first consumer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import to_numpy, to_onnx
from pi05c.graph.runner import Array
from pi05c.graph.scopes import scopes, scopes_of
from pi05c.graph.sort import captured_by, sort_graph
from pi05c.graph.weights import InMemory, Weight


def declare_domain(graph: gs.Graph, domain: str, version: int) -> None:
    """State that a graph uses operators of `domain`, unless it does so already."""
    for scope in scopes(graph):
        known = list(scope.import_domains or [onnx.helper.make_opsetid("", scope.opset)])
        if all(entry.domain != domain for entry in known):
            scope.import_domains = [*known, onnx.helper.make_opsetid(domain, version)]


class Names:
    """Names in use anywhere in a graph, subgraphs included."""

    def __init__(self, graph: gs.Graph) -> None:
        self._used: set[str] = set()
        self._next: dict[str, int] = {}
        for scope in scopes(graph):
            self._used.update(tensor.name for tensor in (*scope.inputs, *scope.outputs))
            for node in scope.nodes:
                self._used.add(node.name)
                for tensors in (node.inputs, node.outputs):
                    self._used.update([tensor.name for tensor in tensors])

    def unique(self, wanted: str) -> str:
        """`wanted` if it is free, else `wanted_1`, `wanted_2`, ...; the result counts as used from now on."""
        name = wanted
        while name in self._used or not name:
            self._next[wanted] = self._next.get(wanted, 0) + 1
            name = f"{wanted}_{self._next[wanted]}"
        self._used.add(name)
        return name


class Editor:
    """Edits one scope: a graph, or the body of a Loop, Scan or If."""

    def __init__(self, scope: gs.Graph, names: Names) -> None:
        self.scope = scope
        self.names = names
        self._scopes = list(scopes(scope))
        self._casts = {
            (id(node.inputs[0]), to_numpy(node.attrs["to"])): node.outputs[0]
            for node in scope.nodes
            if node.op == "Cast" and not node.domain
        }

    def add(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        name: str,
        *,
        dtype: Any,
        shape: Sequence[int | str] | None,
        attrs: dict[str, Any] | None = None,
        domain: str | None = None,
    ) -> gs.Variable:
        """Append a node with one output and return that output, both named after `name`."""
        output = gs.Variable(self.names.unique(name), dtype=to_numpy(dtype), shape=_copy(shape))
        node = gs.Node(
            op,
            self.names.unique(f"{name}.{op}"),
            attrs=attrs or {},
            inputs=list(inputs),
            outputs=[output],
            domain=domain,
        )
        self.scope.nodes.append(node)
        return output

    def constant(self, name: str, values: Array | Weight) -> gs.Constant:
        """A new initializer."""
        weight = values if isinstance(values, Weight) else InMemory(np.asarray(values))
        return gs.Constant(self.names.unique(name), weight)

    def cast(self, tensor: gs.Tensor, dtype: Any) -> gs.Tensor:
        """`tensor` in `dtype`: itself, the output of a Cast of it that this scope has, or that of a new one."""
        dtype = to_numpy(dtype)
        if to_numpy(tensor.dtype) == dtype:
            return tensor
        known = self._casts.get((id(tensor), dtype))
        if known is not None and known.inputs and known.inputs[0].inputs[0] is tensor:
            return known
        name = f"{tensor.name}.{np.dtype(dtype).name}"
        result = self.add(
            "Cast", [tensor], name, dtype=dtype, shape=tensor.shape, attrs={"to": to_onnx(dtype)}
        )
        self._casts[id(tensor), dtype] = result
        return result

    def replace_uses(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Make every consumer of `old`, in subgraphs too, read `new`, and return `new` where `old` was returned.

        An output of the whole graph is known by its name: whoever replaces one adds an Identity instead.
        """
        for node in list(old.outputs):
            if node is not producer(new):
                replace_input(node, old, new)
        for scope in self._scopes:
            scope.outputs = [new if tensor is old else tensor for tensor in scope.outputs]

    def remove(self, node: gs.Node) -> None:
        """Detach a node from its tensors and, with its subgraphs, from those that they capture."""
        detach(node)
        self.scope.nodes = [other for other in self.scope.nodes if other is not node]


def detach(node: gs.Node) -> None:
    """Clear a node's inputs and outputs, and those inside its subgraphs; the caller takes it off the node list."""
    for subgraph in scopes_of(node):
        for inner in subgraph.nodes:
            _unlink(inner)
    _unlink(node)


def _unlink(node: gs.Node) -> None:
    """Clear a node's inputs and outputs.

    onnx-graphsurgeon would compare nodes by what they hold, from the first reader of a tensor on, of which a shared
    constant has thousands.
    """
    for tensors, back in ((node.inputs, "outputs"), (node.outputs, "inputs")):
        for tensor in tensors:
            nodes = getattr(tensor, back)
            last = next(index for index in range(len(nodes) - 1, -1, -1) if nodes[index] is node)
            list.pop(nodes, last)
        list.clear(tensors)


def replace_input(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Make `node` read `new` wherever it reads `old`."""
    for index, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[index] = new


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that produces a tensor; None for inputs and initializers."""
    return tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None


def remove_dead(graph: gs.Graph) -> int:
    """Remove nodes that no output needs, in subgraphs too, and return how many.

    Works backward from the last node, so `graph` must be sorted; consumers in subgraphs count. What produced a tensor
    that has become an input of its graph produces it no more.
    """
    removed = 0
    for scope in reversed(list(scopes(graph))):
        for tensor in scope.inputs:
            for node in list(tensor.inputs):
                node.outputs = [
                    gs.Variable.empty() if output is tensor else output for output in node.outputs
                ]
        kept = {id(tensor) for tensor in scope.outputs}
        alive = []
        for node in reversed(scope.nodes):
            if any(id(tensor) in kept or tensor.outputs for tensor in node.outputs):
                alive.append(node)
                kept.update(map(id, captured_by(node)))
            else:
                detach(node)
                removed += 1
        scope.nodes = alive[::-1]
    return removed


def keep_between(graph: gs.Graph, inputs: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor]) -> None:
    """Keep what `outputs` need, back to those of `inputs` that are read."""
    graph.inputs, graph.outputs = list(inputs), list(outputs)
    sort_graph(graph)
    remove_dead(graph)
    graph.inputs = [tensor for tensor in inputs if tensor.outputs]


def _copy(shape: Sequence[int | str] | None) -> list[int | str] | None:
    return None if shape is None else list(shape)
