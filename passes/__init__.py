"""The passes, in the order in which the default pipeline runs them. This list is the product."""

from __future__ import annotations

# from pi05c.passes.fuse_denoise_loop import fuse_denoise_loop

from pi05c.passes.canonicalize import canonicalize
from pi05c.passes.contract import REGISTRY, Pass, PassContext, Skip, graph_pass
from pi05c.passes.disable_conv2d_quant import disable_conv2d_quant
from pi05c.passes.insert_attention_qdq import insert_attention_qdq
from pi05c.passes.lower_precision import lower_precision
from pi05c.passes.pin_fp32 import pin_fp32
from pi05c.passes.quantize_linears import quantize_linears

_DEFAULT = (
    canonicalize,  # one spelling, so that the finders below see one
    # fuse_denoise_loop,  # the steps become one straight graph; what depends on the step alone becomes constants
    lower_precision,  # float16 wherever values fit: half the bytes, twice the tensor-core rate
    pin_fp32,  # except where a robot's accuracy hangs on it
    quantize_linears,  # FP8 where most of the bytes and FLOPs are
    insert_attention_qdq,  # FP8 in attention, which TensorRT then fuses
    disable_conv2d_quant,  # the patch embedding stays as it is
    canonicalize,  # bakes the casts behind constants that are left
)

PRESETS: dict[str, tuple[str, ...]] = {
    "default": tuple(function.__name__ for function in _DEFAULT),
    "fp16": ("canonicalize", "lower_precision", "pin_fp32", "canonicalize"),
    "exact": ("canonicalize",),
    "none": (),
}
"""What each word in `--passes` stands for: FP8, float16, nothing that changes numbers, nothing at all."""

__all__ = ["PRESETS", "REGISTRY", "Pass", "PassContext", "Skip", "graph_pass"]
