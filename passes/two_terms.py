"""Products of activations in two terms: what the first quantization leaves is quantized too, and multiplied beside it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import to_numpy
from pi05c.graph.edit import Editor
from pi05c.passes.patterns.linear import Linear
from pi05c.passes.patterns.walk import origin, static_shape


class TwoTerms:
    """Lets linears multiply q(x) and q(x - q(x)) in one MatMul, and adds the products; an activation is split once.

    The terms follow each other as rows, so that the weight is read once. Of x [..., M, K] the MatMul makes
    [..., 2 M, N]; the tensor that the linear computed becomes the sum, in the shape and type that it had.
    """

    def __init__(self) -> None:
        self._terms: dict[int, gs.Tensor] = {}

    def multiply(self, linear: Linear, quantized: Callable[[gs.Tensor], gs.Tensor], editor: Editor) -> None:
        """Give the MatMul of a linear both terms.

        Args:
            quantized: gives a tensor of x's shape, or of twice its rows, through Quantize and Dequantize.
        """
        x, node = linear.activation, linear.node
        shape = static_shape(x)
        assert shape is not None
        axis, total = len(shape) - 2, node.outputs[0]
        doubled = (*shape[:axis], 2 * shape[axis])
        if id(x) not in self._terms:
            name = origin(x).name
            left = editor.add("Sub", [x, quantized(x)], f"{name}.left", dtype=x.dtype, shape=shape)
            size = [*doubled, linear.rows]
            both = editor.add(
                "Concat", [x, left], f"{name}.terms", dtype=x.dtype, shape=size, attrs={"axis": axis}
            )
            self._terms[id(x)] = quantized(both)
        node.inputs[0] = self._terms[id(x)]
        dtype, unique = to_numpy(total.dtype), editor.names.unique
        products = gs.Variable(unique(f"{total.name}.terms"), dtype, [*doubled, linear.columns])
        node.outputs[0] = products
        rows = editor.constant(f"{total.name}.rows", np.full(2, shape[axis], np.int64))
        split = [
            gs.Variable(unique(f"{total.name}.{place}"), dtype, [*shape[:-1], linear.columns])
            for place in ("first", "second")
        ]
        editor.scope.nodes += [
            gs.Node("Split", unique(f"{total.name}.Split"), {"axis": axis}, [products, rows], split),
            gs.Node("Add", unique(f"{total.name}.Add"), {}, split, [total]),
        ]
