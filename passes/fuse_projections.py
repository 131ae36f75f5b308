"""fuse_projections: linears that read one tensor become one."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import holds, to_numpy
from pi05c.graph.edit import Editor, producer
from pi05c.graph.io import scopes
from pi05c.graph.weights import Joined, Transposed, Weight, weight_of
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.identity import ValueNumbers
from pi05c.passes.patterns.linear import Bias, Linear, bias_of, find_linears, readers_of
from pi05c.passes.patterns.walk import each_node, output_ids, static_shape


@dataclass(frozen=True)
class _Group:
    """Linears over one activation, and the bias additions that follow them: all of them, or none."""

    linears: tuple[Linear, ...]
    biases: tuple[Bias, ...]

    @property
    def key(self) -> tuple[int, ...]:
        """The weights, which tell the groups of different steps that share them."""
        return tuple(id(linear.weight) for linear in self.linears)


@graph_pass(exact=True, after=("canonicalize", "fuse_denoise_loop"), min_opset=13)
def fuse_projections(graph: gs.Graph, ctx: PassContext, *, max_scale_ratio: float = 2.0) -> None:
    """Join the weights of linears that read one tensor (q/k/v, gate/up) and split the result.

    Tensors that the same operators make of the same tensors count as one. One scale will serve all of a joined weight
    when it is quantized, so linears whose largest weights differ by more than `max_scale_ratio` stay apart. Weights
    that anything else reads stay as they are; groups of several steps that share their weights share the joined one.
    """
    editors = {id(scope): ctx.editor(scope) for scope in scopes(graph)}
    groups = _groups(graph)
    uses: dict[tuple[int, ...], int] = defaultdict(int)
    for group in groups:
        uses[group.key] += 1
    joined: dict[tuple[int, ...], gs.Constant] = {}
    outputs = output_ids(graph)
    for group in groups:
        reason = _obstacle(group, uses[group.key], outputs, max_scale_ratio)
        if reason:
            ctx.skip(group.linears[0].node, reason)
            continue
        editor = editors[id(group.linears[0].scope)]
        if group.key not in joined:
            joined[group.key] = editor.constant(
                _common([linear.weight.name for linear in group.linears]),
                Joined([_as_read(linear) for linear in group.linears], axis=1),
            )
        _fuse(group, joined[group.key], editor)
        ctx.changed(group.linears[0].node)
    if not groups:
        ctx.skip("graph", "no two linears in it read one tensor")


def _groups(graph: gs.Graph) -> list[_Group]:
    """Linears over activations of one value, which exporters that flatten for each Gemm compute several times."""
    numbers = {id(scope): ValueNumbers(scope) for scope in scopes(graph)}
    homes = {id(node): scope for scope, node in each_node(graph)}
    by_activation: dict[tuple[int, int, int], list[Linear]] = defaultdict(list)
    for linear in find_linears(graph):
        scope = id(linear.scope)
        by_activation[scope, numbers[scope].of(linear.activation), linear.rows].append(linear)
    found = []
    for linears in by_activation.values():
        if len(linears) > 1:
            biases = [bias_of(linear) for linear in linears]
            all_biases = tuple(
                bias
                for bias in biases
                if bias and homes[id(bias.node)] is linears[0].scope and not _is_rounded(bias)
            )
            found.append(_Group(tuple(linears), all_biases if len(all_biases) == len(linears) else ()))
    return found


def _obstacle(group: _Group, uses: int, outputs: set[int], max_scale_ratio: float) -> str:
    first = group.linears[0]
    for linear in group.linears:
        if linear.node.op != "MatMul":
            return f"{linear.node.name!r} is a Gemm"
        if any(node.op not in ("Cast", "Transpose", "Identity") for node in linear.path):
            return f"the weight of {linear.node.name!r} is quantized"
        if any(_rounds(above, linear.node.inputs[1]) for above in linear.path):
            return f"the weight of {linear.node.name!r} is rounded before it is read"
        if to_numpy(linear.weight.dtype) != to_numpy(first.weight.dtype):
            return "their weights have different types"
        if to_numpy(linear.node.inputs[1].dtype) != to_numpy(first.node.inputs[1].dtype):
            return "they compute in different types"
        if id(linear.node.outputs[0]) in outputs:
            return f"the output of {linear.node.name!r} is an output of the graph"
        if len(readers_of(linear.weight)) != uses:
            return f"the weight {linear.weight.name!r} has another reader"
    if static_shape(first.node.outputs[0]) is None:
        return f"the shape of {first.node.outputs[0].name!r} is not static"
    amax = [weight_of(linear.weight).amax() for linear in group.linears]
    if not max(amax) <= max_scale_ratio * min(amax):
        return f"their largest weights differ {max(amax) / max(min(amax), 1e-45):.3g}-fold, more than {max_scale_ratio:g}"
    return ""


def _is_rounded(bias: Bias) -> bool:
    read = tensor = bias.node.inputs[bias.index]
    while (node := producer(tensor)) is not None:
        if _rounds(node, read):
            return True
        tensor = node.inputs[0]
    return False


def _rounds(cast: gs.Node, read: gs.Tensor) -> bool:
    """Whether a node between what is stored and what is read is a Cast to a type that lacks values of the latter's."""
    return cast.op == "Cast" and not holds(cast.attrs["to"], read.dtype)


def _as_read(linear: Linear) -> Weight:
    weight = weight_of(linear.weight)
    return Transposed(weight, [1, 0]) if linear.transposed else weight


def _fuse(group: _Group, weight: gs.Constant, editor: Editor) -> None:
    nodes = [linear.node for linear in group.linears]
    additions = [bias.node for bias in group.biases]
    ends = additions or nodes
    sizes = [linear.columns for linear in group.linears]
    results = [node.outputs[0] for node in ends]
    dtype = nodes[0].outputs[0].dtype
    name = _common([result.name for result in results])
    shape = [*(static_shape(nodes[0].outputs[0]) or ())[:-1], sum(sizes)]
    activation = group.linears[0].activation
    product = editor.add("MatMul", [activation, editor.cast(weight, dtype)], name, dtype=dtype, shape=shape)
    if group.biases:
        product = editor.add(
            "Add", [product, _joined_bias(group, editor)], f"{name}.biased", dtype=dtype, shape=shape
        )
    for node in (*nodes, *additions):
        node.outputs.clear()
    split_sizes = editor.constant(f"{name}.sizes", np.asarray(sizes, np.int64))
    split = gs.Node(
        "Split",
        editor.names.unique(f"{name}.Split"),
        {"axis": len(shape) - 1},
        [product, split_sizes],
        results,
    )
    editor.scope.nodes.append(split)


def _joined_bias(group: _Group, editor: Editor) -> gs.Tensor:
    vectors = [(bias.stored, bias.node.inputs[bias.index]) for bias in group.biases]
    dtypes = {to_numpy(found.dtype) for found, _ in vectors}
    dtype = to_numpy(vectors[0][1].dtype)
    if len(dtypes) == 1:
        weights = [weight_of(found) for found, _ in vectors]
        joined = editor.constant(_common([found.name for found, _ in vectors]), Joined(weights, axis=0))
        return editor.cast(joined, dtype)
    shape = [sum(linear.columns for linear in group.linears)]
    name = _common([side.name for _, side in vectors])
    return editor.add(
        "Concat", [side for _, side in vectors], name, dtype=dtype, shape=shape, attrs={"axis": 0}
    )


def _common(names: list[str]) -> str:
    """`a.q_proj.MatMul`, `a.k_proj.MatMul` -> `a.q_proj+k_proj.MatMul`."""
    parts = [name.split(".") for name in names]
    head = os.path.commonprefix(parts)  # noqa: RUF071 - lists of parts, not strings
    tail = os.path.commonprefix([part[len(head) :][::-1] for part in parts])[::-1]  # noqa: RUF071
    middle = "+".join(".".join(part[len(head) : len(part) - len(tail)]) for part in parts)
    return ".".join([*head, *([middle] if middle.strip("+") else []), *tail])
