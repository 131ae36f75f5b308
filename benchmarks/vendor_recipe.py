"""The recipe of NVIDIA's export script for pi0.5 on Jetson Thor, as a pass: what pi05c is held against.

Source: `pytorch_to_onnx.py` of that script (openpi patched in torch, quantized by ModelOpt), with its flags
`--precision fp8 --quantize_attention_matmul` and, for NVFP4, `--enable_llm_nvfp4`. What it does:

- ModelOpt's `FP8_DEFAULT_CFG` over the whole policy: every `nn.Linear`, both ends of the flow and the projector
  included, gets one E4M3 scale for its weight and one for its input, each the largest magnitude / 448 (the `max`
  calibration). Convolutions are left out.
- A quantizer belongs to a module, so one scale serves all denoising steps.
- q/k/v and gate/up of the action expert are joined before they are quantized: one scale for the joined weight. Those of
  the language model and of the vision tower are not.
- With NVFP4 the linears in `language_model.layers` have E2M1 weights with an E4M3 scale for each 16, that of the largest
  magnitude, and inputs quantized in such blocks at run time.
- Both MatMuls of attention in both Gemmas are FP8, each factor with its largest magnitude / 448, probabilities too;
  the suffix chunk of the denoising attention and the vision tower stay in float16.
- Weights and arithmetic are float16, softmax float32.

Two things are kinder to it here: RMSNorm, RoPE and the flow run in float32 (`pin_fp32`), where the script runs RoPE and
the flow in float16; and calibration is never replaced by random inputs, as the script does where loading data fails.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.domains import TENSORRT_DOMAIN
from pi05c.graph.edit import Editor, declare_domain
from pi05c.graph.io import scopes
from pi05c.graph.nvfp4 import BLOCK, BlockCodes, BlockScales, global_scale
from pi05c.graph.ranges import Ranges
from pi05c.graph.weights import Transposed, weight_of
from pi05c.passes import PassContext, graph_pass
from pi05c.passes.blocks import BlockQuantizer
from pi05c.passes.patterns.attention import Attention, Chunk, find_attention
from pi05c.passes.patterns.layers import Layers
from pi05c.passes.patterns.linear import Linear, find_linears
from pi05c.passes.patterns.parts import parts_of
from pi05c.passes.patterns.walk import static_shape
from pi05c.passes.quantize import E4M3_MAX, Quantizer, is_quantized, working_precision

FEW_KEYS = 64
"""A chunk of a split attention with fewer keys is the suffix, as for `insert_attention_qdq`."""

PIPELINE = (
    "canonicalize,batch_views,drop_dead_prefix,fuse_denoise_loop,fold_gqa,split_prefix_attention,dedupe,"
    "lower_precision,pin_fp32,vendor_recipe{{nvfp4={nvfp4}}},canonicalize"
)
"""The passes around it: the script's own rewrites, which are exact, and float16. `nvfp4`: true or false."""


def _ranged(graph: gs.Graph, **options: object) -> Iterator[gs.Tensor]:
    yield from (linear.activation for linear in find_linears(graph))
    for attention in find_attention(graph)[0]:
        for chunk in attention.chunks:
            yield from (*chunk.qk.inputs, *chunk.av.inputs)


@graph_pass(
    exact=False,
    after=("lower_precision", "pin_fp32"),
    min_opset=23,
    ranges=_ranged,
    formats=("float8e4m3fn",),
)
def vendor_recipe(graph: gs.Graph, ctx: PassContext, *, nvfp4: bool = False) -> None:
    """Quantize as the vendor's script does: FP8 everywhere, or NVFP4 in the linears of the language model."""
    assert ctx.ranges is not None
    parts = parts_of(graph)
    linears = [linear for linear in find_linears(graph) if not is_quantized(linear.node.inputs[0])]
    language = {
        id(linear.node)
        for linear in linears
        if nvfp4 and parts[id(linear.node)] == "prefix" and ".layers." in linear.weight.name
    }
    activations = _by_weight(linears, ctx.ranges)
    weights = _of_joined(linears, parts)
    fp8 = {id(scope): Quantizer(ctx.editor(scope)) for scope in scopes(graph)}
    fp4 = {id(scope): BlockQuantizer(ctx.editor(scope)) for scope in scopes(graph)}
    attentions = list(_attention_scales(graph, ctx.ranges, parts))
    for linear in linears:
        amax, dtype = activations[id(linear.weight)], working_precision(linear.node)
        assert dtype is not None
        if id(linear.node) in language:
            linear.node.inputs[0] = fp4[id(linear.scope)].activation(linear.activation, amax, dtype)
            linear.node.inputs[1] = _block_weight(linear, ctx.editor(linear.scope), dtype)
            declare_domain(graph, TENSORRT_DOMAIN, 1)
        else:
            pair = fp8[id(linear.scope)]
            linear.node.inputs[0] = pair.activation(linear.activation, _scale(amax, dtype))
            linear.node.inputs[1] = pair.weight(linear, _scale(weights[id(linear.weight)], dtype))
        linear.node.attrs.pop("transB", None)
        ctx.changed(linear.node)
    for attention, chunk, scales in attentions:
        pair = fp8[id(attention.scope)]
        for node, first in ((chunk.qk, 0), (chunk.av, 2)):
            for index in (0, 1):
                node.inputs[index] = pair.activation(node.inputs[index], scales[first + index])
        ctx.changed(chunk.qk, chunk.av)


def _block_weight(linear: Linear, editor: Editor, dtype: np.dtype[np.generic]) -> gs.Tensor:
    """An NVFP4 weight whose block scales are those of the largest magnitudes, as its MatMul reads it."""
    values = weight_of(linear.weight)
    if not linear.transposed:
        values = Transposed(values, [1, 0])
    name, scale = linear.weight.name, global_scale(values.amax())
    scales = BlockScales(values, scale)
    stored = editor.constant(f"{name}.block_scales", scales), editor.constant(f"{name}.scale", scale)
    wide = editor.add("DequantizeLinear", stored, f"{name}.scales", dtype=np.float32, shape=scales.shape)
    codes = editor.constant(f"{name}.fp4", BlockCodes(values, scales, scale))
    attributes = {"axis": 1, "block_size": BLOCK}
    weight = editor.add(
        "DequantizeLinear", [codes, wide], name, dtype=np.float32, shape=codes.shape, attrs=attributes
    )
    turned = editor.add(
        "Transpose", [weight], name, dtype=np.float32, shape=codes.shape[::-1], attrs={"perm": [1, 0]}
    )
    return editor.cast(turned, dtype)


def _scale(amax: float, dtype: np.dtype[np.generic]) -> np.ndarray:
    return np.asarray(amax / E4M3_MAX).astype(dtype)


def _by_weight(linears: Sequence[Linear], ranges: Ranges) -> dict[int, float]:
    """The largest magnitude that a module's input reaches in any step, by `id` of its weight."""
    found: dict[int, float] = defaultdict(float)
    for linear in linears:
        amax = ranges.amax(linear.activation)
        assert amax is not None
        found[id(linear.weight)] = max(found[id(linear.weight)], amax)
    return found


def _of_joined(linears: Sequence[Linear], parts: Mapping[int, str]) -> dict[int, float]:
    """The largest magnitude of each weight; of those of the expert that read one tensor, of all of them."""
    beside: dict[int, set[int]] = defaultdict(set)
    amax = {}
    for linear in linears:
        amax[id(linear.weight)] = weight_of(linear.weight).amax()
        if parts[id(linear.node)] == "denoise":
            beside[id(linear.activation)].add(id(linear.weight))
    for group in beside.values():
        largest = max(amax[key] for key in group)
        amax |= dict.fromkeys(group, largest)
    return amax


def _attention_scales(
    graph: gs.Graph, ranges: Ranges, parts: Mapping[int, str]
) -> Iterator[tuple[Attention, Chunk, list[np.ndarray]]]:
    """The chunks to quantize with the scales of Q, K, probabilities and V, each that of its module over all steps."""
    layers = Layers(graph)
    chosen: list[tuple[Attention, Chunk, tuple[object, ...], list[float]]] = []
    for attention in find_attention(graph)[0]:
        part = parts[id(attention.qk)]
        if part == "vision":
            continue
        for chunk in attention.chunks:
            keys = static_shape(chunk.qk.inputs[1])
            if len(attention.chunks) > 1 and keys is not None and keys[-1] < FEW_KEYS:
                continue
            found = [ranges.amax(tensor) or 0.0 for tensor in (*chunk.qk.inputs, *chunk.av.inputs)]
            reader = layers.reader(chunk.qk.inputs[0])
            assert reader is not None
            chosen.append((attention, chunk, (part, reader[0].layer), found))
    largest: dict[tuple[object, ...], list[float]] = {}
    for _, _, module, found in chosen:
        largest[module] = [max(pair) for pair in zip(found, largest.get(module, found), strict=True)]
    for attention, chunk, module, _ in chosen:
        dtype = working_precision(chunk.qk)
        assert dtype is not None
        yield attention, chunk, [_scale(amax, dtype) for amax in largest[module]]
