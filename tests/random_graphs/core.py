"""Tensors, nodes and constants of the graph that is being made, and the model around its blocks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]

FLOAT, HALF, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
FLOAT8, FLOAT4 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1
INT8, UINT8, INT64, BOOL = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT64, TensorProto.BOOL

OPSETS = range(17, 24)
WORKING = (FLOAT, HALF, BFLOAT16)

EPSILON = 1e-6
MASKED = -2.3819763e38
"""What openpi adds to logits of masked keys; the lowest finite bfloat16 but one."""

DEEPEST = 2
"""Bodies inside bodies."""

NAMES: dict[str, Callable[[int], str]] = {
    "plain": lambda index: f"t{index}",
    "numbers": str,
    "scoped": lambda index: f"/model/layers.{index}/self_attn/q_proj/MatMul_output_0",
    "unicode": lambda index: f"層 {index} · η̂",
    "long": lambda index: f"{'model.' * 80}{index}",
    "markup": lambda index: f"<b>{index}</b>\x1b[31m\n../'\"",
    "like ours": lambda index: ("w", "w.T", "w_1", "w.float16", "x.product")[index % 5] + "_1" * (index // 5),
}
"""How tensors are called, by style: the last one takes names that passes would give."""


@dataclass(frozen=True)
class T:
    """A tensor of the graph that is being made; shapes are those of the samples, whatever is declared."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    constant: bool = False

    @property
    def width(self) -> int:
        return self.shape[-1]


@dataclass
class Scope:
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    tensors: list[T] = field(default_factory=list)


@dataclass(frozen=True)
class Generated:
    """A model with the inputs of one run.

    Attributes:
        blocks: what the graph was made of, in order.
    """

    proto: onnx.ModelProto
    inputs: dict[str, Array]
    blocks: tuple[str, ...]

    @property
    def tolerance(self) -> float:
        """The relative L2 error that another order of the same arithmetic may make."""
        types = {tensor.data_type for tensor in all_tensors(self.proto.graph)}
        types |= {value.type.tensor_type.elem_type for value in self.proto.graph.input}
        types |= {int(a.i) for node in all_nodes(self.proto.graph) for a in node.attribute if a.name == "to"}
        if any(
            node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear")
            for node in all_nodes(self.proto.graph)
        ):
            return 0.3  # one code more or less
        return 0.1 if BFLOAT16 in types else 0.02 if HALF in types else 1e-4


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of bodies too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)


def all_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from all_tensors(attribute.g)


NESTING = ("if_", "loop", "scan", "flow")


TYPE_NAMES = {
    FLOAT: "float",
    HALF: "float16",
    BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "double",
}


def numpy_type(dtype: int) -> Any:
    return helper.tensor_dtype_to_np_dtype(dtype)


class Core:
    """The graph that is being made; the blocks are methods of the classes derived from it."""

    def __init__(
        self, rng: random.Random, opset: int, dtype: int, blocks: tuple[str, ...], most: int
    ) -> None:
        self.rng, self.opset, self.dtype, self.kinds, self.most = rng, opset, dtype, blocks, most
        self.style = rng.choice(list(NAMES))
        self.node_names = rng.choice(("unique", "empty", "tensor", "one"))
        self.dynamic_batch, self.dynamic_rows = rng.random() < 0.2, rng.random() < 0.15
        self.constants_are_nodes = rng.random() < 0.3
        self.batch, self.rows = rng.choice((1, 2)), rng.choice((1, 2, 3, 5))
        self.scopes = [Scope()]
        self.count = 0
        self.used: set[str] = set()
        self.seed = rng.randrange(2**16)
        self.values = np.random.default_rng(self.seed)
        self.inputs: list[tuple[onnx.ValueInfoProto, Array]] = []
        self.functions: list[onnx.FunctionProto] = []
        self.log: list[str] = []
        self.prefixes: list[tuple[T, T]] = []
        self.steps: T | None = None
        self.batch_first = rng.random() < 0.5

    # What graphs are made of

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    @property
    def scope(self) -> Scope:
        return self.scopes[-1]

    def new_name(self) -> str:
        while True:
            self.count += 1
            name = NAMES[self.style](self.count)
            if name not in self.used:
                self.used.add(name)
                return name

    def node(
        self,
        op: str,
        inputs: Sequence[T | None],
        *made: tuple[int, tuple[int, ...]],
        domain: str = "",
        **attrs: Any,
    ) -> Any:
        """Append a node; its output as a `T`, or the list of them where it makes several."""
        outputs = [T(self.new_name(), dtype, shape) for dtype, shape in made]
        self.count += 1
        name = {
            "unique": f"node {self.count}",
            "empty": "",
            "tensor": outputs[0].name,
            "one": "n",
        }[self.node_names]
        names = ["" if tensor is None else tensor.name for tensor in inputs]
        self.scope.nodes.append(
            helper.make_node(op, names, [tensor.name for tensor in outputs], name, domain=domain, **attrs)
        )
        self.scope.tensors += outputs
        return outputs[0] if len(outputs) == 1 else outputs

    def same(self, op: str, x: T, *others: T | None, **attrs: Any) -> T:
        """A node whose output has type and shape of its first input."""
        made: T = self.node(op, [x, *others], (x.dtype, x.shape), **attrs)
        return made

    def wide(self, op: str, x: T, *others: T, **attrs: Any) -> T:
        """The same for an operator that may lack the type of `x`, which then runs in float32 between casts."""
        if self.takes(op, x.dtype):
            return self.same(op, x, *others, **attrs)
        inner = self.same(op, self.cast(x, FLOAT), *(self.cast(other, FLOAT) for other in others), **attrs)
        return self.cast(inner, x.dtype)

    def takes(self, op: str, dtype: int) -> bool:
        """Whether an operator has a type at this opset."""
        schema = onnx.defs.get_schema(op, self.opset)
        kind = schema.inputs[0].type_str
        allowed = next(
            (c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == kind), [kind]
        )
        return f"tensor({TYPE_NAMES[dtype]})" in allowed

    def has(self, op: str) -> bool:
        """Whether an operator exists at this opset."""
        return bool(onnx.defs.has(op, self.opset))

    def cast(self, x: T, dtype: int) -> T:
        if x.dtype == dtype:
            return x
        made: T = self.node("Cast", [x], (dtype, x.shape), to=dtype)
        return made

    def store(self, values: Array, *, shareable: bool = False) -> T:
        """A constant: an initializer of this graph or of one around it, or a Constant node."""
        array = np.asarray(values)
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = T(self.new_name(), dtype, array.shape, constant=shareable)
        if self.constants_are_nodes and self.chance(0.7):
            scope = self.scope
            attributes = {"value": numpy_helper.from_array(array)}
            if dtype == FLOAT and array.ndim == 0:
                attributes = self.rng.choice((attributes, {"value_float": float(array)}))
            elif dtype == INT64 and array.ndim == 1 and array.size:
                attributes = self.rng.choice((attributes, {"value_ints": array.tolist()}))
            scope.nodes.append(helper.make_node("Constant", [], [tensor.name], "", **attributes))
        else:
            scope = self.rng.choice(self.scopes)
            scope.initializers.append(numpy_helper.from_array(array, tensor.name))
        scope.tensors.append(tensor)
        return tensor

    def weight(self, *shape: int, dtype: int | None = None, scale: float | None = None) -> T:
        """A weight of this shape and type, now and then one that the graph has already."""
        dtype = self.dtype if dtype is None else dtype
        known = [t for t in self.visible() if t.constant and t.shape == shape and t.dtype == dtype]
        if known and self.chance(0.3):
            return self.rng.choice(known)
        size = shape[0] ** -0.5 if scale is None and shape else scale or 1.0
        values = (self.values.standard_normal(shape) * size).astype(numpy_type(dtype))
        return self.store(values, shareable=True)

    def ints(self, *values: int) -> T:
        return self.store(np.asarray(values, np.int64))

    def scalar(self, value: float, dtype: int | None = None, *, ndim: int = 0) -> T:
        return self.store(np.full((1,) * ndim, value, numpy_type(self.dtype if dtype is None else dtype)))

    def visible(self) -> list[T]:
        return [tensor for scope in self.scopes for tensor in scope.tensors]

    def input(self, name: str, dtype: int, declared: Sequence[int | str], values: Array) -> T:
        """A further input of the whole graph."""
        taken = {value.name for value, _ in self.inputs}
        while name in taken:
            name += "'"
        self.inputs.append((helper.make_tensor_value_info(name, dtype, declared), values))
        tensor = T(name, dtype, values.shape)
        self.scopes[0].tensors.append(tensor)
        return tensor

    def batch_dim(self) -> int | str:
        return "batch" if self.dynamic_batch else self.batch

    def row_dim(self) -> int | str:
        return "rows" if self.dynamic_rows else self.rows

    def reshape(self, x: T, *shape: int, static: bool = False) -> T:
        """To a shape whose first two dimensions may be those of a stream, in one of the ways of exporters."""
        head = min(2, len(shape), len(x.shape))
        kept = 0
        while kept < head and shape[kept] == x.shape[kept]:
            kept += 1
        spellings: list[Sequence[int]] = []
        if not (self.dynamic_batch or self.dynamic_rows) or static:
            spellings.append(shape)
        if kept == head or static:
            spellings.append((*(0,) * kept, *shape[kept:]))
            if len(shape) > kept:
                spellings.append((*(0,) * kept, -1, *shape[kept + 1 :]))
        if not spellings:
            spellings.append((-1, *shape[1:]))
        made = (x.dtype, tuple(shape))
        if kept == head == 2 and self.chance(0.2):
            sizes = self.node("Shape", [x], (INT64, (len(x.shape),)))
            parts = [self.node("Gather", [sizes, self.ints(axis)], (INT64, (1,)), axis=0) for axis in (0, 1)]
            rest = self.ints(*shape[2:])
            joined = self.node("Concat", [*parts, rest], (INT64, (len(shape),)), axis=0)
            result: T = self.node("Reshape", [x, joined], made)
            return result
        chosen = self.rng.choice(spellings)
        result = self.node("Reshape", [x, self.ints(*chosen)], made)
        return result

    def transpose(self, x: T, *perm: int) -> T:
        made: T = self.node(
            "Transpose", [x], (x.dtype, tuple(x.shape[axis] for axis in perm)), perm=list(perm)
        )
        return made

    def matmul(self, a: T, b: T) -> T:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        made: T = self.node("MatMul", [a, b], (a.dtype, (*batch, a.shape[-2], b.shape[-1])))
        return made

    def binary(self, op: str, a: T, b: T) -> T:
        made: T = self.node(op, [a, b], (a.dtype, tuple(np.broadcast_shapes(a.shape, b.shape))))
        return made

    def slice(self, x: T, axis: int, start: int, end: int) -> T:
        shape = list(x.shape)
        shape[axis] = end - start
        last = end if self.chance(0.7) else 2**63 - 1 if end == x.shape[axis] else end
        inputs = [self.ints(start), self.ints(last), self.ints(axis)]
        made: T = self.node("Slice", [x, *inputs], (x.dtype, tuple(shape)))
        return made

    def concat(self, axis: int, *parts: T) -> T:
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        made: T = self.node("Concat", parts, (parts[0].dtype, tuple(shape)), axis=axis)
        return made

    # The model around the blocks

    def model(self) -> Generated:
        width = self.rng.choice((2, 4, 8, 16))
        values = self.values.standard_normal((self.batch, self.rows, width)).astype(numpy_type(self.dtype))
        x = self.input(
            "x" if self.chance(0.8) else "вход 1",
            self.dtype,
            [self.batch_dim(), self.row_dim(), width],
            values,
        )
        if self.chance(0.15):
            x = self.embedded(x)
        for _ in range(self.rng.randint(1, self.most)):
            x = self.block(x)
        outputs = [x]
        if self.chance(0.2):
            inner = [
                t
                for t in self.scopes[0].tensors
                if not t.constant and t.dtype in WORKING and t.name != x.name
            ]
            made = {
                name for node in self.scopes[0].nodes if node.op_type != "Constant" for name in node.output
            }
            inner = [t for t in inner if t.name in made]
            outputs += self.rng.sample(inner, min(len(inner), 2))
        if self.chance(0.05):
            stored = [t for t in self.scopes[0].tensors if t.constant]
            outputs += self.rng.sample(stored, min(len(stored), 1))
        if x.name in {value.name for value, _ in self.inputs}:
            outputs[0] = self.same("Identity", x)
        scope = self.scopes[0]
        graph = helper.make_graph(
            scope.nodes,
            self.rng.choice(("main", "g", "граф")),
            [value for value, _ in self.inputs],
            [self.declared(tensor) for tensor in outputs],
            scope.initializers,
        )
        proto = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset), *self.domains()],
            functions=self.functions,
            ir_version=11 if self.opset > 22 else 10,
        )
        return Generated(proto, {value.name: values for value, values in self.inputs}, tuple(self.log))

    def domains(self) -> list[onnx.OperatorSetIdProto]:
        return [helper.make_opsetid("local", 1)] if self.functions else []

    def declared(self, tensor: T) -> onnx.ValueInfoProto:
        free = not tensor.constant and (self.dynamic_batch or self.dynamic_rows)
        return helper.make_tensor_value_info(
            tensor.name,
            tensor.dtype,
            [f"{tensor.name}.{i}" for i in range(len(tensor.shape))] if free else tensor.shape,
        )

    def embedded(self, x: T) -> T:
        """Rows of a table instead of the input, which is added."""
        tokens = self.values.integers(0, 7, (self.batch, self.rows))
        ids = self.input("tokens", INT64, [self.batch_dim(), self.row_dim()], tokens)
        table = self.weight(7, x.width, scale=1.0)
        rows = self.node("Gather", [table, ids], (x.dtype, x.shape))
        if self.chance(0.3) and x.dtype == FLOAT:  # numbers beyond float16
            counts = self.values.integers(0, 2**20, (self.batch, self.rows, 1))
            numbers = self.input("counts", INT64, [self.batch_dim(), self.row_dim(), 1], counts)
            rows = self.binary(
                "Add", rows, self.binary("Mul", self.cast(numbers, FLOAT), self.scalar(2.0**-10))
            )
        return self.binary("Add", rows, x)

    def block(self, x: T, depth: int = 0) -> T:
        kinds = [
            kind for kind in self.kinds if depth < DEEPEST or kind not in ("if_", "loop", "scan", "flow")
        ]
        kind = self.rng.choice(kinds or ["elementwise"])
        self.log.append("  " * depth + kind)
        with self.typed(x):
            made: T = getattr(self, kind)(x, depth) if kind in NESTING else getattr(self, kind)(x)
        if self.chance(0.2) and made.shape == x.shape and made.dtype == x.dtype:
            made = self.binary("Add", *self.rng.sample([x, made], 2))
        return made

    @contextmanager
    def typed(self, x: T) -> Iterator[None]:
        """Weights of the type of the stream."""
        before, self.dtype = self.dtype, x.dtype
        yield
        self.dtype = before
