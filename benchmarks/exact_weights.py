"""A pass that takes rounding of weights back, so that a bench can say what that of activations costs alone."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from pi05c.graph.compensation import Compensated
from pi05c.graph.dtypes import to_numpy
from pi05c.graph.edit import replace_input
from pi05c.graph.io import scopes
from pi05c.graph.nvfp4 import BlockCodes
from pi05c.graph.weights import Cast, Quantized, Transposed, Weight, weight_of
from pi05c.passes import PassContext, graph_pass

PASS = "exact_weights"


@graph_pass(exact=False, after=("quantize_linears",))
def exact_weights(graph: gs.Graph, ctx: PassContext) -> None:
    """Let linears read their weights in the working precision instead of codes; activations stay quantized."""
    for scope in scopes(graph):
        editor = ctx.editor(scope)
        for node in scope.nodes:
            if node.op != "DequantizeLinear" or not isinstance(node.inputs[0], gs.Constant):
                continue
            values = _rounded(weight_of(node.inputs[0]))
            if values is not None:
                result = node.outputs[0]
                exact = editor.constant(f"{result.name}.exact", Cast(values, to_numpy(result.dtype)))
                for reader in list(result.outputs):
                    replace_input(reader, result, exact)
                ctx.changed(node)


def _rounded(codes: Weight) -> Weight | None:
    """What codes of a weight were computed from; None for what is no such codes."""
    if isinstance(codes, (Quantized, Compensated, BlockCodes)):
        return codes.base
    if isinstance(codes, Transposed) and isinstance(codes.base, Compensated):
        return Transposed(codes.base.base, codes.perm)
    return None
