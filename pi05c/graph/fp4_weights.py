"""Weights that an exporter marked for FP4 and left as they were, as codes and scales.

ModelOpt's torch exporter puts `trt::TRT_FP4QDQ(weight) {block_size}` behind each weight that is to be NVFP4
(modelopt/torch/quantization/export_onnx.py); its `NVFP4QuantExporter` replaces that by FP4 codes, FP8 block scales and two
DequantizeLinear, which TensorRT reads. The same is done here, with the same bits, which are made when they are read.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.domains import FP4_PLACEHOLDER
from pi05c.graph.dtypes import BFLOAT16, FLOAT16, FLOAT32, WORKING_PRECISIONS, to_numpy, to_onnx
from pi05c.graph.edit import Editor, Names, detach, producer, remove_dead
from pi05c.graph.errors import Pi05cError, shortened
from pi05c.graph.io import Model, infer_types
from pi05c.graph.nvfp4 import BLOCK, BlockCodes, BlockScales, dequantized, global_scale
from pi05c.graph.opset import raise_opset
from pi05c.graph.scopes import scopes
from pi05c.graph.sort import sort_graph
from pi05c.graph.weights import weight_of

_OPSET = 23
"""The first opset whose DequantizeLinear takes FLOAT4E2M1 (ONNX operator changelog)."""


def store_in_fp4(model: Model) -> None:
    """Replace the placeholders of a model in place, bodies included, and raise its opset to one that has FP4.

    A weight of float16 or bfloat16 is dequantized in float32 and cast to what it was, behind a Transpose of it; the other
    factor of its MatMul is cast too where it comes dequantized in another type, as ModelOpt's exporter does.

    Raises:
        Pi05cError: a placeholder does not stand behind a stored weight, or NVFP4 cannot hold that.
    """
    found = [
        (scope, node) for scope in scopes(model.graph) for node in scope.nodes if node.op == FP4_PLACEHOLDER
    ]
    for _, node in found:
        _refuse(node)
    raise_opset(model, _OPSET)
    names = Names(model.graph)
    editors = {id(scope): Editor(scope, names) for scope in scopes(model.graph)}
    stored: dict[int, tuple[gs.Constant, gs.Constant, gs.Constant]] = {}
    for scope, node in found:
        weight, marked, editor = node.inputs[0], node.outputs[0], editors[id(scope)]
        if id(weight) not in stored:
            stored[id(weight)] = _codes_and_scales(weight, editor)
        detach(node)
        scope.nodes = [other for other in scope.nodes if other is not node]
        wide = dequantized(editor, *stored[id(weight)], weight.name)
        for factor in _become(marked, wide, weight_of(weight).dtype, editor):
            _cast_others(factor, editor)
    sort_graph(model.graph)
    remove_dead(model.graph)
    _infer_again(model)


def _infer_again(model: Model) -> None:
    """Find the types of what nodes make anew, which the factors of MatMuls have changed."""
    declared = [
        (tensor, tensor.dtype)
        for scope in scopes(model.graph)
        for node in scope.nodes
        for tensor in node.outputs
        if tensor.name and not any(tensor is output for output in scope.outputs)
    ]
    for tensor, _ in declared:
        tensor.dtype = None
    infer_types(model)
    for tensor, dtype in declared:
        if tensor.dtype is None:
            tensor.dtype = dtype


def _refuse(node: gs.Node) -> None:
    what = f"{node.op} {shortened(node.name)}"
    if len(node.inputs) != 1 or len(node.outputs) != 1 or not isinstance(node.inputs[0], gs.Constant):
        raise Pi05cError(
            f"{what} does not stand behind a stored weight, which alone becomes FP4 before the engine runs: quantize what "
            "it reads by TRT_FP4DynamicQuantize, or fold the constants of the model"
        )
    weight, block = weight_of(node.inputs[0]), node.attrs.get("block_size")
    if block != BLOCK or not weight.shape or weight.shape[-1] % BLOCK:
        raise Pi05cError(
            f"{what} asks for blocks of {block} in a weight of shape {list(weight.shape)}: export it with blocks of "
            f"{BLOCK}, as NVFP4 has them, along a last axis that they divide"
        )
    if weight.dtype not in (FLOAT32, FLOAT16, BFLOAT16) or not np.isfinite(weight.amax()):
        raise Pi05cError(
            f"{what} stands behind a weight in {weight.dtype} that is no finite float of 16 or 32 bits: export the model "
            "again"
        )


def _codes_and_scales(weight: gs.Constant, editor: Editor) -> tuple[gs.Constant, gs.Constant, gs.Constant]:
    """Codes, block scales and global scale of a weight; that of zeros is 1, as of ModelOpt."""
    values, name = weight_of(weight), weight.name
    amax = values.amax()
    scale = global_scale(amax) if amax else np.ones((), np.float32)
    scales = BlockScales(values, scale)
    return (
        editor.constant(f"{name}.fp4", BlockCodes(values, scales, scale)),
        editor.constant(f"{name}.block_scales", scales),
        editor.constant(f"{name}.scale", scale),
    )


def _become(
    marked: gs.Variable, wide: gs.Variable, dtype: np.dtype[np.generic], editor: Editor
) -> list[gs.Tensor]:
    """Make `marked`, which lost its producer, and Transposes of it what `wide` is in `dtype`; those tensors."""
    marked.dtype = dtype
    if dtype == FLOAT32:
        wide.inputs[0].outputs = [marked]
        return [marked, *(node.outputs[0] for node in marked.outputs if node.op == "Transpose")]
    found = [marked]
    transposes = [node for node in editor.scope.nodes if node.op == "Transpose" and node.inputs[0] is marked]
    for node in transposes:
        turned = node.outputs[0]
        across = gs.Variable(editor.names.unique(f"{turned.name}.float32"), FLOAT32, turned.shape)
        node.inputs[0], node.outputs[0] = wide, across
        _cast(across, turned, dtype, editor)
        found.append(turned)
    _cast(wide, marked, dtype, editor)
    return found


def _cast(source: gs.Variable, target: gs.Variable, dtype: np.dtype[np.generic], editor: Editor) -> None:
    name = editor.names.unique(f"{target.name}.Cast")
    target.dtype = dtype
    editor.scope.nodes.append(gs.Node("Cast", name, {"to": to_onnx(dtype)}, [source], [target]))


def _cast_others(factor: gs.Tensor, editor: Editor) -> None:
    """Cast what is multiplied with a weight to its type, where it is dequantized to another one."""
    for node in list(factor.outputs):
        for index, other in enumerate(node.inputs[:2] if node.op == "MatMul" else ()):
            made = _type_of(other)
            if other is not factor and made != factor.dtype and made in WORKING_PRECISIONS:
                other.dtype = made
                node.inputs[index] = editor.cast(other, factor.dtype)


def _type_of(tensor: gs.Tensor) -> np.dtype[np.generic] | None:
    """The type that a tensor has: what is dequantized has that of its scale, whatever the exporter declared."""
    node = producer(tensor)
    if node is not None and node.op == "DequantizeLinear":
        return _type_of(node.inputs[1])
    return to_numpy(tensor.dtype)


__all__ = ["store_in_fp4"]
