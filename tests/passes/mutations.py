"""Golden cases with something changed that leaves them valid: what their pass took for granted may no longer hold."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


class Mutant:
    """A model that is being changed in place; the mutations are its methods that begin with `_to_`."""

    def __init__(self, proto: onnx.ModelProto, rng: random.Random) -> None:
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(proto)
        del self.proto.metadata_props[:]
        self.graph, self.rng = self.proto.graph, rng
        self._names: Iterator[str] = (f"mutated {number}" for number in itertools.count())

    def mutate(self) -> str:
        """Change something; what it was."""
        name = self.rng.choice(sorted(name for name in dir(self) if name.startswith("_to_")))
        mutation: Callable[[], None] = getattr(self, name)
        mutation()
        return name

    def _typed(self) -> dict[str, onnx.ValueInfoProto]:
        graph = onnx.shape_inference.infer_shapes(self.proto, data_prop=True).graph
        return {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}

    def _stored(self, array: np.ndarray) -> str:
        self.graph.initializer.append(numpy_helper.from_array(array, next(self._names)))
        return self.graph.initializer[-1].name

    def _replace_nodes(self, nodes: Sequence[onnx.NodeProto]) -> None:
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(kept)

    def _numbers(self) -> list[onnx.TensorProto]:
        return [
            t for t in self.graph.initializer if t.data_type in FLOATS and np.prod(t.dims, dtype=int) == 1
        ]

    def _to_another_output(self) -> None:
        known = self._typed()
        made = [name for node in self.graph.node for name in node.output if name in known]
        returned = {value.name for value in self.graph.output}
        if inner := [name for name in made if name not in returned]:
            self.graph.output.append(known[self.rng.choice(inner)])

    def _to_a_returned_weight(self) -> None:
        weights = [t for t in self.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2]
        if weights:
            weight, name = self.rng.choice(weights), next(self._names)
            self.graph.node.append(helper.make_node("Transpose", [weight.name], [name], name))
            shape = list(weight.dims)[::-1]
            self.graph.output.append(helper.make_tensor_value_info(name, weight.data_type, shape))

    def _to_numbers_of_other_rank(self) -> None:
        if numbers := self._numbers():
            number = self.rng.choice(numbers)
            array = numpy_helper.to_array(number).reshape((1,) * self.rng.randint(0, 4))
            number.CopyFrom(numpy_helper.from_array(array, number.name))

    def _to_vectors_of_one_number(self) -> None:
        if numbers := self._numbers():
            number = self.rng.choice(numbers)
            array = np.repeat(numpy_helper.to_array(number).reshape(-1), self.rng.choice((2, 4, 8, 16)))
            number.CopyFrom(numpy_helper.from_array(array, number.name))

    def _to_swapped_operands(self) -> None:
        if nodes := [node for node in self.graph.node if node.op_type in ("Add", "Mul")]:
            node = self.rng.choice(nodes)
            node.input[:] = node.input[::-1]

    def _to_a_detour(self) -> None:
        """Something that changes nothing, or rounds to float64, between a tensor and one reader."""
        known = self._typed()
        edges = [
            (place, index, known[name])
            for place, node in enumerate(self.graph.node)
            for index, name in enumerate(node.input)
            if name in known and known[name].type.tensor_type.elem_type in FLOATS
        ]
        if not edges:
            return
        place, index, value = self.rng.choice(edges)
        dtype, rank = value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim)
        first, last = next(self._names), next(self._names)
        perm = self.rng.sample(range(rank), rank)
        axis = self._stored(np.array([self.rng.randint(0, rank)]))
        there, back = self.rng.choice(
            [
                (("Identity", [], {}), ("Identity", [], {})),
                (("Cast", [], {"to": TensorProto.DOUBLE}), ("Cast", [], {"to": dtype})),
                (
                    ("Transpose", [], {"perm": perm}),
                    ("Transpose", [], {"perm": [perm.index(i) for i in range(rank)]}),
                ),
                (("Unsqueeze", [axis], {}), ("Squeeze", [axis], {})),
            ]
        )
        nodes = [
            helper.make_node(op, [source, *more], [made], made, **attrs)
            for (op, more, attrs), source, made in ((there, value.name, first), (back, first, last))
        ]
        self.graph.node[place].input[index] = last
        self._replace_nodes([*self.graph.node[:place], *nodes, *self.graph.node[place:]])

    def _to_a_reader_in_a_body(self) -> None:
        """An If whose branches read a tensor or a weight."""
        values = [v for v in self._typed().values() if v.type.tensor_type.elem_type == TensorProto.FLOAT]
        shapes = {v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim] for v in values}
        shapes |= {t.name: list(t.dims) for t in self.graph.initializer if t.data_type == TensorProto.FLOAT}
        if not shapes:
            return
        read = self.rng.choice(sorted(shapes))
        bodies, names = [], [next(self._names) for _ in range(4)]
        for op, made in zip(("Neg", "Tanh"), names, strict=False):
            value = helper.make_tensor_value_info(made, TensorProto.FLOAT, shapes[read])
            bodies.append(helper.make_graph([helper.make_node(op, [read], [made], made)], made, [], [value]))
        flag, result = names[2:]
        self.graph.input.append(helper.make_tensor_value_info(flag, TensorProto.BOOL, []))
        branches = dict(zip(("then_branch", "else_branch"), bodies, strict=True))
        self.graph.node.append(helper.make_node("If", [flag], [result], result, **branches))
        self.graph.output.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, shapes[read]))

    def _to_a_second_half_in_bodies(self) -> None:
        """The last nodes in a branch of an If, and the same in the other, with another sign."""
        known, nodes = self._typed(), list(self.graph.node)
        cut = self.rng.randint(1, max(len(nodes) - 1, 1))
        made = {name for node in nodes[cut:] for name in node.output if name}
        moved = [value.name for value in self.graph.output if value.name in made]
        bodies = any(attribute.HasField("g") for node in nodes for attribute in node.attribute)
        if not moved or bodies or any(name not in known for name in moved):
            return
        branches = [
            self._branch(nodes[cut:], made, [known[name] for name in moved], negated) for negated in (0, 1)
        ]
        flag = next(self._names)
        self.graph.input.append(helper.make_tensor_value_info(flag, TensorProto.BOOL, []))
        both = dict(zip(("then_branch", "else_branch"), branches, strict=True))
        self._replace_nodes([*nodes[:cut], helper.make_node("If", [flag], moved, next(self._names), **both)])

    def _branch(
        self,
        nodes: Sequence[onnx.NodeProto],
        made: set[str],
        outputs: Sequence[onnx.ValueInfoProto],
        negated: int,
    ) -> onnx.GraphProto:
        names = {name: next(self._names) for name in sorted(made)}
        copies, results = [], []
        for node in nodes:
            copy = onnx.NodeProto.FromString(node.SerializeToString())
            copy.name = next(self._names)
            copy.input[:] = [names.get(name, name) for name in node.input]
            copy.output[:] = [names.get(name, name) for name in node.output]
            copies.append(copy)
        for value in outputs:
            result = onnx.ValueInfoProto.FromString(value.SerializeToString())
            result.name = names[value.name]
            if negated and value.type.tensor_type.elem_type in FLOATS:
                result.name = next(self._names)
                copies.append(helper.make_node("Neg", [names[value.name]], [result.name], result.name))
            results.append(result)
        return helper.make_graph(copies, f"branch {negated}", [], results)

    def _to_a_repeated_node(self) -> None:
        known = self._typed()
        nodes = [node for node in self.graph.node if all(name in known for name in node.output)]
        if nodes:
            node = onnx.NodeProto.FromString(self.rng.choice(nodes).SerializeToString())
            value = onnx.ValueInfoProto.FromString(known[node.output[0]].SerializeToString())
            node.name, node.output[:] = next(self._names), [next(self._names) for _ in node.output]
            value.name = node.output[0]
            self.graph.node.append(node)
            self.graph.output.append(value)

    def _to_one_weight_for_two(self) -> None:
        weights = [t for t in self.graph.initializer if t.data_type == TensorProto.FLOAT]
        pairs = [(a, b) for a, b in itertools.combinations(weights, 2) if list(a.dims) == list(b.dims)]
        if pairs:
            kept, gone = self.rng.choice(pairs)
            for node in self.graph.node:
                node.input[:] = [kept.name if name == gone.name else name for name in node.input]

    def _to_a_larger_batch(self) -> None:
        """Of one input, to which others broadcast."""
        dims = [
            dim
            for value in self.graph.input
            for dim in value.type.tensor_type.shape.dim
            if dim.dim_value == 1
        ]
        if dims:
            self.rng.choice(dims).dim_value = 2
            del self.graph.value_info[:]
            for value in self.graph.output:
                value.type.tensor_type.ClearField("shape")
            self.proto.CopyFrom(
                onnx.shape_inference.infer_shapes(self.proto, strict_mode=True, data_prop=True)
            )

    def _to_an_unknown_size(self) -> None:
        place = self.rng.randint(0, 2)
        for value in self.graph.input:
            if len(dims := value.type.tensor_type.shape.dim) > place:
                dims[place].dim_param = f"size {place} of {dims[place].dim_value}"
        for value in self.graph.output:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                dim.dim_param = f"axis {axis}"
        del self.graph.value_info[:]


__all__ = ["Mutant"]
