"""disable_conv2d_quant: no convolution runs quantized."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import to_numpy
from pi05c.graph.edit import producer, replace_input
from pi05c.graph.weights import InMemory, array_of
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.walk import each_node, output_ids


@graph_pass(exact=False)
def disable_conv2d_quant(graph: gs.Graph, ctx: PassContext) -> None:
    """Take the Q/DQ off the input, weight and output of each Conv, and give weights back in the working precision.

    A patch embedding has three input channels, gains nothing from 8 bits and loses much. Q/DQ that other nodes
    read too stay for those. A weight stored quantized is dequantized at compile time.
    """
    outputs = output_ids(graph)
    convolutions = list(each_node(graph, "Conv", "ConvTranspose"))
    if not convolutions:
        ctx.skip("graph", "it has no Conv")
    for _, conv in convolutions:
        changed = False
        for index, tensor in enumerate(list(conv.inputs)):
            unquantized = _unquantized(tensor, ctx)
            if unquantized is not None:
                conv.inputs[index] = unquantized
                changed = True
        for quantize in list(conv.outputs[0].outputs):
            if quantize.op != "QuantizeLinear" or id(quantize.outputs[0]) in outputs:
                continue
            for dequantize in list(quantize.outputs[0].outputs):
                if dequantize.op == "DequantizeLinear" and id(dequantize.outputs[0]) not in outputs:
                    for user in list(dequantize.outputs[0].outputs):
                        replace_input(user, dequantize.outputs[0], conv.outputs[0])
                    changed = True
        if changed:
            ctx.changed(conv)
        else:
            ctx.skip(conv, "it is not quantized")


def _unquantized(tensor: gs.Tensor, ctx: PassContext) -> gs.Tensor | None:
    """What a tensor was before Q/DQ, None where it is not dequantized."""
    dequantize = producer(tensor)
    if dequantize is None or dequantize.op != "DequantizeLinear":
        return None
    quantize = producer(dequantize.inputs[0])
    if quantize is not None and quantize.op == "QuantizeLinear":
        return quantize.inputs[0]
    codes, scale = dequantize.inputs[:2]
    if not isinstance(codes, gs.Constant) or not isinstance(scale, gs.Constant):
        return None
    zero = array_of(dequantize.inputs[2]).astype(np.float32) if len(dequantize.inputs) > 2 else np.float32(0)
    values, factor = array_of(codes).astype(np.float32), array_of(scale).astype(np.float32)
    if factor.ndim == 1 and factor.size > 1:
        axis = int(dequantize.attrs.get("axis", 1))
        shape = [1] * values.ndim
        shape[axis] = -1
        factor, zero = factor.reshape(shape), np.asarray(zero).reshape(shape) if np.ndim(zero) else zero
    weight = ((values - zero) * factor).astype(to_numpy(scale.dtype))
    return gs.Constant(ctx.names.unique(f"{codes.name}.dequantized"), InMemory(weight))
