"""The kernels that a graph becomes on a GPU under a simple model of fusion, and what each computes and moves.

The model:

- What depends on constants alone is computed when the engine is built. A constant that is cast, transposed, reshaped
  or dequantized on its way to a reader is read as it is stored.
- Pointwise operators join the kernel that makes the last of their inputs; the operators of one norm, softmax or RoPE
  are one kernel. A value that only its own kernel reads moves nothing.
- Any other value is written once and read once by each kernel that reads it, in the narrowest type on the way (a
  Cast or DequantizeLinear happens while reading). Reshapes cost nothing, and who reads a Slice or Split reads that
  part of what was cut; Transpose, Concat, Expand and the like move their values. A Gather reads what it returns.
- Every reading comes from memory, in every step of a loop: caches are not modelled.

Attention is not fused: its logits and probabilities are written and read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import bits, name_of, to_numpy
from pi05c.graph.edit import producer
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model, infer_types, scopes
from pi05c.graph.weights import weight_of
from pi05c.passes.patterns.attention import attention_operators, find_attention
from pi05c.passes.patterns.dependence import NONDETERMINISTIC, reads
from pi05c.passes.patterns.linear import find_linears
from pi05c.passes.patterns.loops import find_static_loop
from pi05c.passes.patterns.norm import find_norms
from pi05c.passes.patterns.parts import parts_of
from pi05c.passes.patterns.rope import find_rope
from pi05c.passes.patterns.softmax import find_softmaxes
from pi05c.passes.patterns.walk import each_node
from pi05c.precision import arithmetic_dtype, product_dtype

KINDS = (
    *("linear", "attention", "matmul", "convolution", "softmax", "norm", "RoPE", "reduction"),
    *("elementwise", "data movement", "other"),
)
"""Kinds of kernels, in the order in which they are shown. `attention` stands for its two products, `matmul` for
products that belong to neither a linear layer nor an attention."""

MAX_STEPS = 1000
"""Largest trip count that is looked for."""

VIEWS = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators that give the same bytes another shape: no kernel."""

CUTS = frozenset({"Slice", "Split"})

READ_THROUGH = VIEWS | CUTS | {"Cast", "DequantizeLinear"}
"""Operators that happen while a kernel reads."""

DATA_MOVEMENT = frozenset(
    {"Transpose", "Concat", "Expand", "Tile", "Pad", "Gather", "GatherElements", "GatherND"}
    | {"ScatterElements", "ScatterND", "ConstantOfShape", "Range", "EyeLike", "DepthToSpace", "SpaceToDepth"}
)

GATHERS = frozenset({"Gather", "GatherElements", "GatherND"})
"""Operators that read as much of their first input as they return."""

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Einsum"})

REDUCTIONS = frozenset(
    {
        "ReduceMean",
        "ReduceSum",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceL1",
        "ReduceL2",
        "ReduceSumSquare",
    }
    | {"ReduceLogSum", "ReduceLogSumExp", "CumSum", "ArgMax", "ArgMin", "TopK", "GlobalAveragePool"}
)

POINTWISE = frozenset(
    {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Neg",
        "Abs",
        "Sqrt",
        "Reciprocal",
        "Exp",
        "Log",
        "Sin",
        "Cos",
        "Tanh",
    }
    | {
        "Sigmoid",
        "Erf",
        "Gelu",
        "Relu",
        "LeakyRelu",
        "Softplus",
        "Swish",
        "Clip",
        "Floor",
        "Ceil",
        "Round",
        "Mod",
    }
    | {"Min", "Max", "Where", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not"}
    | {"Xor", "IsNaN", "IsInf", "Sign", "QuantizeLinear", "DynamicQuantizeLinear", "TRT_FP4DynamicQuantize"}
    | {"Trilu"}
)

_ARGUMENTS = frozenset({"Expand", "Tile", "Pad", "QuantizeLinear", "ConstantOfShape"}) | REDUCTIONS
"""Operators whose further inputs are sizes, axes or one scale: nothing that counts as read."""

_COMPOSITE_FLOPS = 5
"""Operations an element of one operator that is a whole softmax or norm: about five passes over its values (largest
or mean, difference, exponential or square, sum, quotient)."""

_COMPOSITES = frozenset(
    {"Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
    | {"GroupNormalization", "InstanceNormalization", "BatchNormalization", "RotaryEmbedding"}
)


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: of the operator that it is built around.
        part: `vision`, `prefix` or `denoise`.
        kind: one of `KINDS`.
        dtype: ONNX's name of the type in which its product is computed, or in which it makes values.
        flops: of products, two for each multiplication and addition.
        vector_flops: of everything else, one for each element an operator makes.
        weight_bytes: constants read.
        activation_bytes: other values read and written.
        operators: operators that move or compute, which is what would be launched if nothing were fused.
        times: how often it runs; all other figures are those of one run.
    """

    name: str
    part: str
    kind: str
    dtype: str
    flops: int = 0
    vector_flops: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    operators: int = 1
    times: int = 1


def kernels_of(model: Model) -> tuple[Kernel, ...]:
    """The kernels of a graph in execution order, bodies of loops counted as often as they run. Weights are not read.

    Both branches of an If count. The model's types are inferred where a pass left them open.

    Raises:
        Pi05cError: a shape is not static, or a loop's number of steps is not known before it runs.
    """
    _refuse_dynamic(model.graph)
    if any(_shape(tensor) is None for tensor in _computed(model.graph)):
        infer_types(model)
    return _Fusion(model.graph).kernels()


@dataclass(eq=False)
class _Group:
    """A kernel that is being put together; `read` holds bytes and whether they are weights, by id."""

    head: gs.Node
    part: str
    kind: str
    dtype: str
    times: int
    flops: int = 0
    vector_flops: int = 0
    operators: int = 0
    written: int = 0
    read: dict[int, tuple[int, bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reading:
    """A value as somebody reads it.

    Attributes:
        source: what is stored.
        piece: what is read of it: the source, or what a Slice or Split cuts out.
        bits: of an element, the fewest on the way.
        through: the nodes on the way.
        scales: the scales that they read.
    """

    source: gs.Tensor
    piece: gs.Tensor
    bits: int
    through: tuple[gs.Node, ...]
    scales: tuple[gs.Tensor, ...]


class _Fusion:
    """Walks a graph in execution order and puts operators into groups."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._parts = parts_of(graph)
        self._kinds, self._regions = _classified(graph)
        self._runtime = _runtime(graph)
        self._groups: list[_Group] = []
        self._owner: dict[int, _Group] = {}
        self._position: dict[int, int] = {}
        self._scope_of: dict[int, int] = {}
        self._region_group: dict[int, _Group] = {}
        self._stored: dict[int, tuple[gs.Tensor, int]] = {}
        self._counted: set[int] = set()

    def kernels(self) -> tuple[Kernel, ...]:
        self._visit(self._graph, 1)
        for source, width in self._stored.values():
            maker = producer(source)
            if maker is not None and id(maker) in self._owner:
                self._owner[id(maker)].written += _bytes(_static(source), width)
        return tuple(_finished(group) for group in self._groups)

    def _visit(self, scope: gs.Graph, times: int) -> None:
        for node in scope.nodes:
            if not any(id(tensor) in self._runtime for tensor in node.outputs):
                continue
            bodies = list(node.subgraphs())
            if bodies:
                for tensor in node.inputs:
                    self._store(tensor)
                steps = self._steps(scope, node)
                for body in bodies:
                    self._visit(body, times * steps)
            elif node.op not in READ_THROUGH and node.op not in ("Shape", "Size"):
                self._position[id(node)] = len(self._position)
                self._scope_of[id(node)] = id(scope)
                self._add(scope, node, times)
        for output in scope.outputs:
            self._store(output)

    def _steps(self, scope: gs.Graph, node: gs.Node) -> int:
        if node.op not in ("Loop", "Scan"):
            return 1
        loop = find_static_loop(self._graph, scope, node, MAX_STEPS)
        if isinstance(loop, str):
            raise Pi05cError(
                f"how often {node.op} {node.name!r} runs is not known before it does ({loop}): give it a constant "
                "trip count"
            )
        return loop.steps

    def _add(self, scope: gs.Graph, node: gs.Node, times: int) -> None:
        readings = [self._reading(tensor) for tensor in _data_inputs(node)]
        group = self._group(scope, node, readings, times)
        self._owner[id(node)] = group
        group.operators += 1
        for index, (tensor, reading) in enumerate(zip(_data_inputs(node), readings, strict=True)):
            for passed in reading.through:
                if passed.op not in VIEWS and id(passed) not in self._counted:
                    self._counted.add(id(passed))
                    group.operators += id(reading.source) in self._runtime
            counted = node.outputs[0] if index == 0 and node.op in GATHERS else tensor
            self._read(group, reading, math.prod(_static(counted)))
            for scale in reading.scales:
                inner = self._reading(scale)
                self._read(group, inner, math.prod(_static(scale)))
        if node.op in PRODUCTS:
            group.flops += _product_flops(node)
        elif node.op in _FUSED_ATTENTION:
            group.flops += _attention_flops(node)
        elif node.op in _COMPOSITES:
            group.vector_flops += _COMPOSITE_FLOPS * math.prod(_static(node.outputs[0]))
        elif node.op in REDUCTIONS:
            group.vector_flops += math.prod(_static(node.inputs[0]))
        elif node.op not in DATA_MOVEMENT:
            group.vector_flops += math.prod(_static(node.outputs[0]))

    def _group(self, scope: gs.Graph, node: gs.Node, readings: list[_Reading], times: int) -> _Group:
        """The group that a node joins: its region's, that of the last of its inputs, or a new one."""
        region = self._regions.get(id(node))
        if region is not None and (found := self._region_group.get(region)) is not None:
            return found
        if region is None and node.op in POINTWISE:
            makers = [producer(reading.source) for reading in readings]
            local = [
                maker
                for maker in makers
                if maker is not None
                and self._scope_of.get(id(maker)) == id(scope)
                and id(maker) in self._owner
            ]
            if local:
                return self._owner[id(max(local, key=lambda maker: self._position[id(maker)]))]
        kind, dtype = self._kinds.get(id(node), (_kind(node), ""))
        dtype = dtype or (product_dtype(node) if node.op in PRODUCTS else name_of(node.outputs[0].dtype))
        group = _Group(node, self._parts[id(node)], kind, dtype, times)
        self._groups.append(group)
        if region is not None:
            self._region_group[region] = group
        return group

    def _reading(self, tensor: gs.Tensor) -> _Reading:
        """Where a value is stored, as it is read: back through what happens while reading."""
        width, through, scales = _width(tensor), [], []
        piece: gs.Tensor | None = None
        while (node := producer(tensor)) is not None:
            folded = id(tensor) not in self._runtime
            if node.op not in READ_THROUGH and not (folded and node.op == "Transpose"):
                break
            through.append(node)
            if node.op == "DequantizeLinear":
                scales.append(node.inputs[1])
            if node.op in CUTS and piece is None:
                piece = tensor
            tensor = node.inputs[0]
            width = min(width, _width(tensor))
        return _Reading(tensor, tensor if piece is None else piece, width, tuple(through), tuple(scales))

    def _read(self, group: _Group, reading: _Reading, elements: int) -> None:
        maker = producer(reading.source)
        if maker is not None and self._owner.get(id(maker)) is group:
            return
        weight = id(reading.source) not in self._runtime
        if not weight:
            self._keep(reading)
        size = _bytes((elements,), reading.bits)
        before, _ = group.read.get(id(reading.piece), (0, weight))
        group.read[id(reading.piece)] = (max(before, size), weight)

    def _store(self, tensor: gs.Tensor) -> None:
        """Note that a value leaves its kernel."""
        if tensor.name and id(tensor) in self._runtime:
            self._keep(self._reading(tensor))

    def _keep(self, reading: _Reading) -> None:
        _, before = self._stored.get(id(reading.source), (reading.source, 0))
        self._stored[id(reading.source)] = (reading.source, max(before, reading.bits))


_FUSED_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})


def _classified(graph: gs.Graph) -> tuple[dict[int, tuple[str, str]], dict[int, int]]:
    """Kind and type of the nodes that finders know, by id, and the region that a node belongs to, by its first node."""
    kinds: dict[int, tuple[str, str]] = {}
    regions: dict[int, int] = {}
    for linear in find_linears(graph):
        kinds[id(linear.node)] = ("linear", product_dtype(linear.node))
    for attention in find_attention(graph)[0]:
        for chunk in attention.chunks:
            for node in (chunk.qk, chunk.av):
                kinds[id(node)] = ("attention", product_dtype(node))
    for node in attention_operators(graph):
        kinds[id(node)] = ("attention", name_of(node.outputs[0].dtype))
    for kind, found in (("softmax", find_softmaxes), ("norm", find_norms), ("RoPE", find_rope)):
        for region in found(graph):
            dtype = arithmetic_dtype(region.nodes)
            for node in region.nodes:
                kinds[id(node)] = (kind, dtype)
                regions[id(node)] = id(region.nodes[0])
    return kinds, regions


def _kind(node: gs.Node) -> str:
    if node.op == "Conv":
        return "convolution"
    if node.op in PRODUCTS:
        return "matmul"
    if node.op in POINTWISE:
        return "elementwise"
    if node.op in REDUCTIONS:
        return "reduction"
    if node.op in _COMPOSITES:
        return "norm" if "Norm" in node.op else "RoPE" if "Rotary" in node.op else "softmax"
    return "data movement" if node.op in DATA_MOVEMENT else "other"


def _runtime(graph: gs.Graph) -> frozenset[int]:
    """Ids of the tensors that are not known before a run; sizes of static shapes are."""
    runtime = {id(tensor) for scope in scopes(graph) for tensor in scope.inputs}
    for scope in scopes(graph):
        for node in scope.nodes:
            varies = node.op in NONDETERMINISTIC or any(id(tensor) in runtime for tensor in reads(node))
            if varies and node.op not in ("Shape", "Size"):
                runtime.update(id(tensor) for tensor in node.outputs if tensor.name)
    return frozenset(runtime)


def _finished(group: _Group) -> Kernel:
    weights = sum(size for size, weight in group.read.values() if weight)
    activations = sum(size for size, weight in group.read.values() if not weight)
    return Kernel(
        name=group.head.name,
        part=group.part,
        kind=group.kind,
        dtype=group.dtype,
        flops=group.flops,
        vector_flops=group.vector_flops,
        weight_bytes=weights,
        activation_bytes=activations + group.written,
        operators=group.operators,
        times=group.times,
    )


def _data_inputs(node: gs.Node) -> list[gs.Tensor]:
    """The inputs whose values a node works on."""
    inputs = node.inputs[:1] if node.op in _ARGUMENTS else node.inputs
    return [tensor for tensor in inputs if tensor.name]


def _product_flops(node: gs.Node) -> int:
    """Two operations for each pair of numbers that a MatMul, Gemm, Conv or Einsum multiplies and adds."""
    left, right = (_static(tensor) for tensor in node.inputs[:2])
    made = math.prod(_static(node.outputs[0]))
    if node.op == "MatMul":
        return 2 * made * left[-1]
    if node.op == "Gemm":
        return 2 * made * left[0 if node.attrs.get("transA") else 1]
    if node.op == "Conv":
        return 2 * made * math.prod(right[1:])
    return 2 * math.prod(_einsum_sizes(node).values())


def _einsum_sizes(node: gs.Node) -> dict[str, int]:
    """The size of each index of an Einsum without ellipsis."""
    terms = node.attrs["equation"].replace(" ", "").split("->")[0].split(",")
    if any("." in term for term in terms):
        raise Pi05cError(
            f"Einsum {node.name!r} has an ellipsis, whose work is not counted: spell its axes out"
        )
    shapes = [_static(tensor) for tensor in node.inputs]
    return {
        index: size
        for term, shape in zip(terms, shapes, strict=True)
        for index, size in zip(term, shape, strict=True)
    }


def _attention_flops(node: gs.Node) -> int:
    """Both products of an attention that is one operator, on [batch, heads, tokens, head size] without a cache.

    Raises:
        Pi05cError: its operands have another form.
    """
    query, key, value = (_static(tensor) for tensor in node.inputs[:3])
    if not len(query) == len(key) == len(value) == 4:
        raise Pi05cError(
            f"{node.op} {node.name!r} has operands of another form than [batch, heads, tokens, size]"
        )
    batch, heads, rows, size = query
    return 2 * batch * heads * rows * key[2] * (size + value[3])


def _refuse_dynamic(graph: gs.Graph) -> None:
    for tensor in graph.inputs:
        if _shape(tensor) is None:
            shape = "unknown" if tensor.shape is None else str(list(tensor.shape))
            raise Pi05cError(
                f"input {tensor.name!r} has the shape {shape}, but cost is that of fixed sizes: export the model with "
                "fixed sizes, or set them with python -m onnxruntime.tools.make_dynamic_shape_fixed"
            )


def _computed(graph: gs.Graph) -> Iterator[gs.Tensor]:
    return (tensor for _, node in each_node(graph) for tensor in node.outputs if tensor.name)


def _shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """The shape, where every dimension is a number and the type is known."""
    if isinstance(tensor, gs.Constant):
        return weight_of(tensor).shape
    shape = tensor.shape
    if shape is None or not all(isinstance(dim, int) for dim in shape) or to_numpy(tensor.dtype) is None:
        return None
    return tuple(shape)


def _static(tensor: gs.Tensor) -> tuple[int, ...]:
    shape = _shape(tensor)
    if shape is None:
        node = producer(tensor)
        by = "" if node is None else f", which {node.op} {node.name!r} makes"
        raise Pi05cError(
            f"the shape of {tensor.name!r}{by} is not known before the model runs: cost needs fixed shapes throughout"
        )
    return shape


def _width(tensor: gs.Tensor) -> int:
    """Bits of an element in storage."""
    _static(tensor)
    return bits(weight_of(tensor).dtype if isinstance(tensor, gs.Constant) else tensor.dtype)


def _bytes(shape: tuple[int, ...], width: int) -> int:
    return (math.prod(shape) * width + 7) // 8


__all__ = ["KINDS", "Kernel", "kernels_of"]
