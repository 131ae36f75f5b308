"""Values of tensors that depend on nothing but constants and given arrays, computed by onnxruntime."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import to_numpy
from pi05c.graph.edit import producer
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model, save
from pi05c.graph.runner import Array
from pi05c.graph.session import open_session, session_options
from pi05c.graph.sort import captured_by, sort_graph
from pi05c.graph.weights import array_of, from_stored_bytes


class Evaluator:
    """A part of a graph, cut out once and run as often as needed.

    Args:
        graph: the graph, whose opset and functions apply.
        outputs: the tensors to compute; constants are allowed.
        inputs: tensors that get their value at each call; everything else must come from constants.

    Raises:
        Pi05cError: an output needs something that is neither constant nor an input, or onnxruntime lacks an operator.
    """

    def __init__(
        self, graph: gs.Graph, outputs: Sequence[gs.Tensor], inputs: Sequence[gs.Variable] = ()
    ) -> None:

        computed = [tensor for tensor in outputs if isinstance(tensor, gs.Variable)]
        self._outputs = list(outputs)
        self._names = list(dict.fromkeys(tensor.name for tensor in computed))
        self._inputs = [tensor.name for tensor in inputs]
        if not computed:
            return
        nodes = slice_of(computed, inputs)
        part = gs.Graph(
            nodes=nodes,
            inputs=list(inputs),
            outputs=list({tensor.name: tensor for tensor in computed}.values()),
            opset=graph.opset,
            import_domains=graph.import_domains,
            functions=graph.functions,
            ir_version=graph.ir_version,
        )
        sort_graph(part)
        options = session_options()
        options.log_severity_level = 4
        with tempfile.TemporaryDirectory(prefix="pi05c-") as folder:
            path = Path(folder) / "part.onnx"
            try:
                save(Model(part), path)
                self._session: Any = open_session(str(path), options, ["ConstantFolding"])
            except Exception as error:
                if isinstance(error, Pi05cError):
                    raise
                raise self._failure(error) from error

    def __call__(self, feeds: Mapping[str, Array] | None = None) -> list[Array]:
        """The values of `outputs`, in their order, for the given input values by name.

        Raises:
            Pi05cError: onnxruntime fails.
        """
        values: dict[str, Any] = {}
        if self._names:
            from onnxruntime import OrtValue

            given = {name: OrtValue.ortvalue_from_numpy((feeds or {})[name]) for name in self._inputs}
            try:
                results = self._session.run_with_ort_values(self._names, given)
            except Exception as error:  # onnxruntime raises a class of its own for each status code
                raise self._failure(error) from error
            values = dict(zip(self._names, results, strict=True))
        return [
            _array(values[tensor.name], tensor) if isinstance(tensor, gs.Variable) else array_of(tensor)
            for tensor in self._outputs
        ]

    def _failure(self, error: Exception) -> Pi05cError:
        reason = " ".join(str(error).split())
        return Pi05cError(f"{self._names[0]!r} cannot be evaluated at compile time: {reason}")


def _array(value: Any, tensor: gs.Variable) -> Array:
    """A result as an array in the tensor's type; onnxruntime's own arrays know no bfloat16 and take FP8 for uint8."""
    dtype = to_numpy(tensor.dtype)
    array: Array
    if dtype is None or dtype.type.__module__ == "numpy":
        array = value.numpy()
    else:
        raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
        array = from_stored_bytes(raw, dtype, value.shape())
    return array


def slice_of(outputs: Sequence[gs.Tensor], inputs: Sequence[gs.Tensor] = ()) -> list[gs.Node]:
    """The nodes that `outputs` need, back to constants and `inputs`, in no particular order.

    Raises:
        Pi05cError: something that is needed is a graph input or is not known here.
    """
    given = {id(tensor) for tensor in inputs}
    found: dict[int, gs.Node] = {}
    stack = [tensor for tensor in outputs if isinstance(tensor, gs.Variable)]
    while stack:
        tensor = stack.pop()
        if id(tensor) in given or not tensor.name or isinstance(tensor, gs.Constant):
            continue
        node = producer(tensor)
        if node is None:
            raise Pi05cError(f"tensor {tensor.name!r} is not known at compile time")
        if id(node) not in found:
            found[id(node)] = node
            inner = {id(t) for sub in node.subgraphs(recursive=True) for n in sub.nodes for t in n.outputs}
            inner |= {id(t) for sub in node.subgraphs(recursive=True) for t in sub.inputs}
            stack.extend(node.inputs)
            stack.extend(tensor for tensor in captured_by(node) if id(tensor) not in inner)
    return list(found.values())
