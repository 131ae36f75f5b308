"""disable_conv2d_quant: no convolution runs quantized."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import to_numpy
from pi05c.graph.edit import Editor, producer, replace_input
from pi05c.graph.runner import Array
from pi05c.graph.weights import array_of
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.walk import constant, each_node, output_ids


@graph_pass(exact=False, min_opset=13)
def disable_conv2d_quant(graph: gs.Graph, ctx: PassContext) -> None:
    """Take the Q/DQ off the inputs and output of each Conv and ConvTranspose, and give weights back in the working precision.

    A patch embedding has three input channels, gains nothing from 8 bits and loses much. Q/DQ that other nodes
    read too stay for those. A weight stored quantized is dequantized at compile time. Where Q rounds to integers a Clip
    to what these stand for takes its place: onnxruntime's quantizer leaves out a Relu or Clip that the codes imply. Q of
    several or of computed scales stays.
    """
    outputs = output_ids(graph)
    convolutions = list(each_node(graph, "Conv", "ConvTranspose"))
    if not convolutions:
        ctx.skip("graph", "it has no Conv")
    clipped: dict[int, gs.Tensor] = {}
    for scope, conv in convolutions:
        changed, editor = False, ctx.editor(scope)
        for index, tensor in enumerate(list(conv.inputs)):
            unquantized = _unquantized(tensor, editor, clipped)
            if unquantized is not None:
                conv.inputs[index] = editor.cast(unquantized, tensor.dtype)
                changed = True
        for quantize in list(conv.outputs[0].outputs):
            if quantize.op != "QuantizeLinear" or id(quantize.outputs[0]) in outputs:
                continue
            for dequantize in list(quantize.outputs[0].outputs):
                if dequantize.op != "DequantizeLinear" or id(dequantize.outputs[0]) in outputs:
                    continue
                if (before := _before(quantize, editor, clipped)) is not None:
                    result = editor.cast(before, dequantize.outputs[0].dtype)
                    for user in list(dequantize.outputs[0].outputs):
                        replace_input(user, dequantize.outputs[0], result)
                    changed = True
        if changed:
            ctx.changed(conv)
        else:
            ctx.skip(conv, "it is not quantized")


def _unquantized(tensor: gs.Tensor, editor: Editor, clipped: dict[int, gs.Tensor]) -> gs.Tensor | None:
    """What a tensor was before Q/DQ, None where it is not dequantized."""
    dequantize = producer(tensor)
    if dequantize is None or dequantize.op != "DequantizeLinear":
        return None
    quantize = producer(dequantize.inputs[0])
    if quantize is not None and quantize.op == "QuantizeLinear":
        return _before(quantize, editor, clipped)
    codes, scale = dequantize.inputs[0], constant(dequantize.inputs[1])
    zeros = [point for point in dequantize.inputs[2:] if point.name]
    if not isinstance(codes, gs.Constant) or scale is None:
        return None
    if not all(isinstance(point, gs.Constant) for point in zeros):
        return None
    values = array_of(codes).astype(np.float32)
    factor, *offsets = (
        _spread(array_of(part).astype(np.float32), values.shape, dequantize) for part in (scale, *zeros)
    )
    weight = ((values - sum(offsets)) * factor).astype(to_numpy(tensor.dtype))
    return editor.constant(f"{codes.name}.dequantized", weight)


def _before(quantize: gs.Node, editor: Editor, clipped: dict[int, gs.Tensor]) -> gs.Tensor | None:
    """What is quantized, without what no integer code stands for; None where that is not known.

    Args:
        clipped: by the id of each QuantizeLinear what this gave for it before.
    """
    codes = to_numpy(quantize.outputs[0].dtype)
    if codes is None or codes.kind not in "iu":
        return None if codes is None else quantize.inputs[0]
    if id(quantize) not in clipped:
        scale, *zeros = (constant(part) for part in quantize.inputs[1:] if part.name)
        if scale is None or any(zero is None for zero in zeros):
            return None
        values = [array_of(part) for part in (scale, *zeros) if part is not None]
        if any(value.size != 1 for value in values):
            return None
        factor, zero = float(values[0].item()), float(values[1].item()) if zeros else 0.0
        x, limits = quantize.inputs[0], np.iinfo(codes)
        bounds = [
            editor.constant(f"{x.name}.{which}", np.asarray((code - zero) * factor).astype(to_numpy(x.dtype)))
            for which, code in (("lowest", limits.min), ("highest", limits.max))
        ]
        clipped[id(quantize)] = editor.add(
            "Clip", [x, *bounds], f"{x.name}.clipped", dtype=x.dtype, shape=x.shape
        )
    return clipped[id(quantize)]


def _spread(part: Array, shape: tuple[int, ...], dequantize: gs.Node) -> Array:
    """A scale or zero point of a tensor, of its channels or of blocks of them, so that it broadcasts to all values."""
    axis = int(dequantize.attrs.get("axis", 1))
    if size := int(dequantize.attrs.get("block_size", 0)):
        blocks: Array = np.repeat(part, size, axis)
        return blocks[tuple(map(slice, shape))]
    if part.size == 1:
        return part.reshape(())
    channels = [1] * len(shape)
    channels[axis] = -1
    return part.reshape(channels)
