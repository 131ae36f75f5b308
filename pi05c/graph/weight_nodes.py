"""Nodes that compute derived weights from what is stored, so that whoever runs a graph need not evaluate them first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from pi05c.graph.dtypes import BFLOAT16, FLOAT32, to_onnx
from pi05c.graph.walk import graphs_in
from pi05c.graph.weights import (
    Cast,
    InMemory,
    Joined,
    Reshaped,
    Scaled,
    Selected,
    Stored,
    Transposed,
    Weight,
)

_TYPES = (BFLOAT16, FLOAT32)
"""Types whose every operation rounds in onnxruntime as it does here. It computes chains of float16 in float32."""


class WeightNodes:
    """Spells derived weights out as nodes; what several derive from is computed once.

    Attributes:
        nodes: each behind those that it reads.
        leaves: the weights that they start from, by the name of the initializer that is to hold each.
    """

    def __init__(self, new_name: Callable[[str], str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.leaves: dict[str, Weight] = {}
        self._new_name = new_name
        self._names: dict[object, str] = {}
        self._alive: list[Weight] = []

    def add(self, weight: Weight, name: str) -> bool:
        """Compute `weight` as the tensor `name`; False where it cannot be, bit for bit, and then nothing is added."""
        if isinstance(weight, (Stored, InMemory)) or not _can(weight):
            return False
        source = self._tensor(_transposed_last(weight))
        self.nodes.append(helper.make_node("Identity", [source], [name]))
        return True

    def widen_before_transposing(self, graph: onnx.GraphProto) -> None:
        """Move each Transpose that a weight ends with behind the Casts to float32 that read it, in bodies too.

        onnxruntime fuses a Transpose of float32 with the MatMul that reads it, and one of bfloat16 makes a copy of the
        weight, slowly. What nothing reads any more is taken away.
        """
        transposes = {node.output[0]: node for node in self.nodes if node.op_type == "Transpose"}
        ends = {
            node.output[0]: transposes[node.input[0]]
            for node in self.nodes
            if node.op_type == "Identity" and node.input[0] in transposes
        }
        read: set[str] = set()
        for scope in reversed(list(graphs_in(graph))):  # a graph whose nodes are listed anew has new bodies
            nodes: list[onnx.NodeProto] = []
            for node in scope.node:
                nodes.append(node)
                above = ends.get(node.input[0]) if _widens(node) else None
                if above is not None:
                    nodes.append(helper.make_node("Transpose", [self._new_name("weight")], node.output))
                    nodes[-1].attribute.extend(above.attribute)
                    node.input[0], node.output[0] = above.input[0], nodes[-1].input[0]
                read.update(node.input)
            read.update(value.name for value in scope.output)
            if len(nodes) > len(scope.node):
                del scope.node[:]
                scope.node.extend(nodes)
        kept = []
        for node in reversed(self.nodes):
            if node.output[0] in read:
                kept.append(node)
                read.update(node.input)
        self.nodes = kept[::-1]

    def _tensor(self, weight: Weight) -> str:
        key = (
            (weight.path, weight.offset, weight.shape, weight.dtype)
            if isinstance(weight, Stored)
            else id(weight)
        )
        if key not in self._names:
            self._alive.append(weight)
            self._names[key] = self._computed(weight)
        return self._names[key]

    def _computed(self, weight: Weight) -> str:
        if isinstance(weight, Transposed):
            return self._apply("Transpose", self._tensor(weight.base), perm=weight.perm)
        if isinstance(weight, Reshaped):
            return self._apply("Reshape", self._tensor(weight.base), self._leaf(np.array(weight.shape)))
        if isinstance(weight, Joined):
            return self._apply("Concat", *map(self._tensor, weight.parts), axis=weight.axis)
        if isinstance(weight, Selected):
            indices = self._leaf(np.array(weight.indices, np.int64))
            return self._apply("Gather", self._tensor(weight.base), indices, axis=weight.axis)
        if isinstance(weight, Cast):
            return self._cast(self._tensor(weight.base), weight.base.dtype, weight.dtype)
        if isinstance(weight, Scaled):
            base = self._cast(self._tensor(weight.base), weight.base.dtype, FLOAT32)
            scaled = self._apply("Mul", base, self._leaf(weight.factor))
            return self._cast(scaled, FLOAT32, weight.dtype)
        name = self._new_name("weight")
        self.leaves[name] = weight
        return name

    def _leaf(self, values: np.ndarray) -> str:
        return self._tensor(InMemory(values))

    def _cast(self, name: str, dtype: np.dtype[Any], to: np.dtype[Any]) -> str:
        return name if dtype == to else self._apply("Cast", name, to=to_onnx(to))

    def _apply(self, operator: str, *inputs: str, **attributes: Any) -> str:
        output = self._new_name("weight")
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output


def widen_for_each_reader(graph: onnx.GraphProto, new_name: Callable[[str], str], *, least: int) -> None:
    """Give each node that reads a stored weight by a Cast to float32, and perhaps a Transpose, its own two of them.

    Shared by the steps of an unrolled loop, a weight would stay widened through all of them. Readers in bodies share.

    Args:
        least: number of elements of a weight for which that is done.
    """
    stored = {tensor.name for tensor in graph.initializer if math.prod(tensor.dims) >= least}
    chains: dict[str, tuple[onnx.NodeProto, ...]] = {}
    given: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if _widens(node) and node.input[0] in stored:
            chains[node.output[0]] = (node,)
        elif node.op_type == "Transpose" and len(chains.get(node.input[0], ())) == 1:
            chains[node.output[0]] = (*chains[node.input[0]], node)
        else:
            for index, name in enumerate(node.input):
                if name in given:
                    copies = _copied(chains[name], new_name)
                    nodes += copies
                    node.input[index] = copies[-1].output[0]
                elif name in chains:
                    given.add(name)
        nodes.append(node)
    if len(nodes) > len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)


def _copied(chain: Sequence[onnx.NodeProto], new_name: Callable[[str], str]) -> list[onnx.NodeProto]:
    """Nodes of one input and one output each, once more."""
    copies: list[onnx.NodeProto] = []
    for node in chain:
        source = copies[-1].output[0] if copies else node.input[0]
        copies.append(helper.make_node(node.op_type, [source], [new_name("weight")]))
        copies[-1].attribute.extend(node.attribute)
    return copies


def _widens(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and any(
        attribute.name == "to" and attribute.i == to_onnx(FLOAT32) for attribute in node.attribute
    )


def _transposed_last(weight: Weight) -> Weight:
    """The same weight, transposed behind all else, where onnxruntime fuses the transpose with a MatMul."""
    if isinstance(weight, Joined):
        parts = [_transposed_last(part) for part in weight.parts]
        perms = {part.perm for part in parts if isinstance(part, Transposed)}
        if len(perms) == 1 and all(isinstance(part, Transposed) for part in parts):
            (perm,) = perms
            bases = [part.base for part in parts if isinstance(part, Transposed)]
            return Transposed(Joined(bases, perm[weight.axis]), perm)
        return Joined(parts, weight.axis)
    if isinstance(weight, (Scaled, Cast)):
        base = _transposed_last(weight.base)
        if not isinstance(base, Transposed):
            return weight
        if isinstance(weight, Cast):
            return Transposed(Cast(base.base, weight.dtype), base.perm)
        factor = weight.factor.transpose(np.argsort(base.perm))
        return Transposed(Scaled(base.base, factor, weight.dtype), base.perm)
    return weight


def _can(weight: Weight) -> bool:
    """Whether nodes give the same bits."""
    if weight.dtype not in _TYPES:
        return False
    if isinstance(weight, (Stored, InMemory)):
        return True
    if isinstance(weight, Joined):
        return all(map(_can, weight.parts))
    if isinstance(weight, (Transposed, Reshaped, Selected, Cast, Scaled)):
        return _can(weight.base)
    return False


__all__ = ["WeightNodes", "widen_for_each_reader"]
