"""Gives a set of nodes another working precision, with casts at the border of the set and none inside."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from pi05c.graph.domains import STANDARD_DOMAINS
from pi05c.graph.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, is_float, to_numpy, to_onnx
from pi05c.graph.edit import Editor, Names, producer, replace_input
from pi05c.graph.io import scopes
from pi05c.graph.weights import array_of, weight_of
from pi05c.passes.patterns.loop_form import LoopForm, same_value
from pi05c.passes.patterns.walk import output_ids

FIXED_INPUTS = {"BitCast": {0}, "If": {0}, "Loop": {0, 1}, "Range": {0, 1, 2}, "Resize": {1, 2, 3}}
"""Inputs whose type an operator fixes whatever its data's type is (operator specifications)."""

_TYPE_FOLLOWS_RETYPING = frozenset({"Cast", "DequantizeLinear"})
"""Operators that get their type from an attribute, which is retyped, or from their scale."""

_FLOAT32_INSIDE = frozenset({"MeanVarianceNormalization"})
"""Operators that ONNX defines by others with a constant in float32, whatever types it says that they take (opset 13)."""

CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""Operators that pass values into bodies: their own inputs and outputs keep their type."""


class Retyper:
    """Changes the working precision of nodes anywhere in a graph."""

    def __init__(self, graph: gs.Graph, names: Names) -> None:
        self._names = names
        self._editors: dict[int, Editor] = {}
        self._scope_of: dict[int, gs.Graph] = {}
        self._outputs: set[int] = set()
        for scope in scopes(graph):
            self._editors[id(scope)] = Editor(scope, names)
            self._outputs.update(id(tensor) for tensor in scope.outputs)
            for tensor in scope.inputs:
                self._scope_of[id(tensor)] = scope
            for node in scope.nodes:
                self._scope_of[id(node)] = scope
                for tensor in node.outputs:
                    self._scope_of[id(tensor)] = scope

    def run_in(
        self,
        nodes: Iterable[gs.Node],
        dtype: Any,
        loops: Iterable[LoopForm] = (),
        steps: Collection[int] = (),
    ) -> None:
        """Make `nodes` compute in `dtype`.

        A float input from outside is cast at the border, or taken from before a Cast that stands there: a constant
        is always read as it is stored. A float output keeps its type for readers outside by a Cast. A Cast of
        `nodes` that none of them reads stands at the border already, and stays.

        Args:
            loops: those that hand on in `dtype`, from one step to the next, what `steps` compute.
            steps: ids of some of `nodes`.
        """
        nodes = _without_borders(nodes)
        inside = {id(node) for node in nodes}
        dtype = to_numpy(dtype)
        for node in nodes:
            self._retype_outputs(node, inside, dtype)
        for form in loops:
            for index, node in self.narrowed(form, dtype).items():
                if id(node) in steps:
                    self._carry(form, index, dtype)
        for node in nodes:  # behind a Cast may be what has the type only now
            self._retype_inputs(node, inside, dtype)

    def narrowed(self, form: LoopForm, dtype: Any) -> dict[int, gs.Node]:
        """Which values a loop computes in `dtype` and rounds to another float type only to hand them on.

        Returns:
            By the place among the carried values, the node that computes it.
        """
        found = {}
        for index, (entering, leaving) in enumerate((c.entering, c.leaving) for c in form.carried):
            cast = producer(same_value(leaving))
            if cast is None or cast.op != "Cast" or not is_float(entering.dtype):
                continue
            made = producer(cast.inputs[0])
            if made is None or to_numpy(cast.inputs[0].dtype) != dtype or to_numpy(entering.dtype) == dtype:
                continue
            if self._scope_of.get(id(made)) is form.body:
                found[index] = made
        return found

    def _carry(self, form: LoopForm, index: int, dtype: Any) -> None:
        """Hand a value that `narrowed` names from step to step in `dtype`."""
        node, carried = form.node, form.carried[index]
        counted = node.op == "Loop"
        cast = producer(same_value(carried.leaving))
        assert cast is not None
        form.body.outputs[index + counted] = cast.inputs[0]
        self._outputs.add(id(cast.inputs[0]))
        before = carried.entering.dtype
        self._retype(carried.entering, set(), dtype)
        for scope in scopes(form.body):
            for place, tensor in enumerate(scope.outputs):
                if tensor is carried.entering:
                    scope.outputs[place] = self._cast(tensor, before, scope)
                    self._outputs.add(id(scope.outputs[place]))
        start = index + 2 * counted
        node.inputs[start] = self._in_type(carried.initial, dtype, form.scope)
        if carried.result.name and id(carried.result) in self._outputs:
            self._keep_output(node, index, carried.result, set(), dtype)
        else:
            self._retype(carried.result, set(), dtype)

    def _in_type(self, tensor: gs.Tensor, dtype: Any, scope: gs.Graph) -> gs.Tensor:
        """`tensor` as `dtype`: a number as a constant, as which it is known at compile time, else by a Cast."""
        if isinstance(tensor, gs.Constant) and math.prod(weight_of(tensor).shape) == 1:
            name = f"{tensor.name}.{dtype.name}"
            return self._editors[id(scope)].constant(name, array_of(tensor).astype(dtype))
        return self._cast(tensor, dtype, self._scope_of.get(id(tensor), scope))

    def _retype_inputs(self, node: gs.Node, inside: set[int], dtype: Any) -> None:
        for index, tensor in _entering(node, inside):
            source = self._before_casts(tensor, dtype)
            if to_numpy(source.dtype) != dtype:
                scope = self._scope_of.get(id(source), self._scope_of[id(node)])
                source = self._cast(source, dtype, scope)
            if source is not tensor:
                node.inputs[index] = source

    def _retype_outputs(self, node: gs.Node, inside: set[int], dtype: Any) -> None:
        for index, tensor in enumerate(list(node.outputs)):
            if not tensor.name or not is_float(tensor.dtype) or to_numpy(tensor.dtype) == dtype:
                continue
            if node.op == "Cast":
                node.attrs["to"] = to_onnx(dtype)
            elif node.op == "DequantizeLinear" and node.attrs.get("output_dtype"):
                node.attrs["output_dtype"] = to_onnx(dtype)
            if id(tensor) in self._outputs:
                self._keep_output(node, index, tensor, inside, dtype)
            else:
                self._retype(tensor, inside, dtype)

    def _retype(self, tensor: gs.Tensor, inside: set[int], dtype: Any) -> None:
        """Let a tensor have another type, and its readers outside read what a Cast makes of it."""
        before = tensor.dtype
        outside = [
            user
            for user in tensor.outputs
            if (id(user) not in inside and user.op != "Cast") or _reads_fixed(user, tensor)
        ]
        tensor.dtype = dtype
        if outside:
            cast = self._cast(tensor, before, self._scope_of[id(tensor)])
            for user in outside:
                replace_input(user, tensor, cast)

    def _keep_output(
        self, node: gs.Node, index: int, tensor: gs.Variable, inside: set[int], dtype: Any
    ) -> None:
        """Put a Cast between `node` and an output of its graph, which keeps name and type."""
        inner = gs.Variable(
            self._names.unique(f"{tensor.name}.{dtype.name}"), dtype=dtype, shape=tensor.shape
        )
        users = [user for user in tensor.outputs if id(user) in inside]
        node.outputs[index] = inner
        self._scope_of[id(inner)] = self._scope_of[id(node)]
        for user in users:
            replace_input(user, tensor, inner)
        attrs = {"to": to_onnx(tensor.dtype)}
        name = self._names.unique(f"{tensor.name}.Cast")
        self._scope_of[id(node)].nodes.append(gs.Node("Cast", name, attrs, [inner], [tensor]))

    def _before_casts(self, tensor: gs.Tensor, dtype: Any) -> gs.Tensor:
        """The tensor before float-to-float casts: a constant as stored, or a value that has `dtype` already."""
        best = tensor
        while (node := producer(tensor)) is not None and node.op == "Cast" and is_float(node.inputs[0].dtype):
            tensor = node.inputs[0]
            if isinstance(tensor, gs.Constant) or to_numpy(tensor.dtype) == dtype:
                best = tensor
        return best

    def _cast(self, tensor: gs.Tensor, dtype: Any, scope: gs.Graph) -> gs.Tensor:
        cast = self._editors[id(scope)].cast(tensor, dtype)
        self._scope_of[id(cast)] = scope
        made = producer(cast)
        assert made is not None
        self._scope_of[id(made)] = scope
        return cast


def takes(node: gs.Node, dtype: Any, opset: int) -> bool:
    """Whether an operator's version at `opset` allows `dtype` wherever the node reads or makes floats.

    Conv and Sin, for example, know bfloat16 from opset 22 on. An operator that ONNX does not define is taken to.
    """
    try:
        schema = onnx.defs.get_schema(node.op, opset, node.domain or "")
    except onnx.defs.SchemaError:
        return True
    if node.op in _FLOAT32_INSIDE:
        return bool(to_numpy(dtype) == FLOAT32)
    if node.op == "LayerNormalization" and any(tensor.name for tensor in node.outputs[1:]):
        return False  # the type of its statistics is that of `stash_type`
    allowed = {entry.type_param_str: entry.allowed_type_strs for entry in schema.type_constraints}
    wanted = f"tensor({to_numpy(dtype)})"
    fixed = FIXED_INPUTS.get(node.op, ())
    for formal, tensors, skipped in ((schema.inputs, node.inputs, fixed), (schema.outputs, node.outputs, ())):
        for index, tensor in enumerate(tensors):
            if index in skipped or not tensor.name or not is_float(tensor.dtype):
                continue
            kind = formal[min(index, len(formal) - 1)].type_str
            if wanted not in allowed.get(kind, [kind]):
                return False
    return True


def states_type(node: gs.Node) -> bool:
    """Whether a node makes floats whose type follows from none of its inputs that are retyped.

    An attribute states it (`ConstantOfShape`, `HannWindow`, `BitCast`), or an input that is left alone (`Range`).
    """
    if node.op in _TYPE_FOLLOWS_RETYPING:
        return False
    try:
        schema = onnx.defs.get_schema(node.op, node.domain or "")
    except onnx.defs.SchemaError:
        return False
    fixed = FIXED_INPUTS.get(node.op, ())
    inputs = {formal.type_str for index, formal in enumerate(schema.inputs) if index not in fixed}
    return any(
        schema.outputs[min(index, len(schema.outputs) - 1)].type_str not in inputs
        for index, tensor in enumerate(node.outputs)
        if tensor.name and is_float(tensor.dtype)
    )


def others_than(nodes: Iterable[gs.Node], dtype: Any) -> list[gs.Node]:
    """Those of `nodes` that `Retyper.run_in` would change, if it made all of them compute in `dtype`."""
    nodes = _without_borders(nodes)
    inside = {id(node) for node in nodes}
    dtype = to_numpy(dtype)
    return [
        node
        for node in nodes
        if any(to_numpy(tensor.dtype) != dtype for _, tensor in _entering(node, inside))
        or any(
            tensor.name and is_float(tensor.dtype) and to_numpy(tensor.dtype) != dtype
            for tensor in node.outputs
        )
    ]


def _entering(node: gs.Node, inside: set[int]) -> list[tuple[int, gs.Tensor]]:
    """The float inputs that a node of a set reads from outside the set, where its operator leaves their type open."""
    if node.op == "Cast":
        return []
    fixed = FIXED_INPUTS.get(node.op, ())
    return [
        (index, tensor)
        for index, tensor in enumerate(node.inputs)
        if index not in fixed
        and tensor.name
        and is_float(tensor.dtype)
        and id(producer(tensor)) not in inside
    ]


def _without_borders(nodes: Iterable[gs.Node]) -> list[gs.Node]:
    """`nodes` without control flow and what states its own type, and without the Casts whose readers are all elsewhere."""
    nodes = [node for node in nodes if node.op not in CONTROL_FLOW and not states_type(node)]
    inside = {id(node) for node in nodes}
    for node in reversed(nodes):
        if node.op == "Cast" and not any(id(user) in inside for user in node.outputs[0].outputs):
            inside.discard(id(node))
    return [node for node in nodes if id(node) in inside]


def _reads_fixed(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether a node reads a tensor as an input whose type its operator fixes."""
    return any(
        node.inputs[index] is tensor for index in FIXED_INPUTS.get(node.op, ()) if index < len(node.inputs)
    )


def remove_redundant_casts(graph: gs.Graph) -> None:
    """Bypass Casts that change nothing, and pairs of which the second undoes an exact first.

    float16 -> float32 -> float16 is exact; float32 -> float16 -> float32 rounds and stays.
    """
    for _ in each_redundant_cast(graph):
        pass


def each_redundant_cast(graph: gs.Graph) -> Iterator[gs.Node]:
    """As `remove_redundant_casts`; each Cast is given as soon as it is bypassed."""
    returned = output_ids(graph)
    for scope in scopes(graph):
        outputs = {id(tensor) for tensor in scope.outputs}
        made = {id(tensor) for node in scope.nodes for tensor in node.outputs}
        for node in scope.nodes:
            if node.op != "Cast" or node.domain not in STANDARD_DOMAINS or not node.inputs:
                continue
            target, source = to_numpy(node.attrs["to"]), node.inputs[0]
            above = producer(source)
            if above is not None and above.op == "Cast" and _widens(above.inputs[0].dtype, source.dtype):
                source = above.inputs[0]
            if to_numpy(source.dtype) == target and id(node.outputs[0]) in outputs:
                if id(source) in made and id(source) not in returned:
                    _make_output(node, source)
                    yield node
            elif to_numpy(source.dtype) == target:
                for user in list(node.outputs[0].outputs):
                    replace_input(user, node.outputs[0], source)
                yield node
            elif source is not node.inputs[0]:
                node.inputs[0] = source
                yield node


def _make_output(cast: gs.Node, source: gs.Tensor) -> None:
    """Let the producer of `source` make the output of its scope that a Cast without effect makes of it."""
    above, output = producer(source), cast.outputs[0]
    assert above is not None
    cast.inputs.clear()
    cast.outputs.clear()
    above.outputs = [output if tensor is source else tensor for tensor in above.outputs]
    for user in list(source.outputs):
        replace_input(user, source, output)


def _widens(narrow: Any, wide: Any) -> bool:
    """Whether every value of one float type is a value of the other: float16 and bfloat16 in wider ones."""
    return to_numpy(narrow) in (FLOAT16, BFLOAT16) and to_numpy(wide) in (FLOAT32, FLOAT64)
