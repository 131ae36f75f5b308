"""The passes, in the order in which the default pipeline runs them. This list is the product."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pi05c.passes.batch_views import batch_views
from pi05c.passes.canonicalize import canonicalize
from pi05c.passes.contract import REGISTRY, Pass, PassContext, Skip, graph_pass
from pi05c.passes.dedupe import dedupe
from pi05c.passes.disable_conv2d_quant import disable_conv2d_quant
from pi05c.passes.drop_dead_prefix import drop_dead_prefix
from pi05c.passes.fold_gqa import fold_gqa
from pi05c.passes.fold_norms import fold_norms
from pi05c.passes.fold_scales import fold_scales
from pi05c.passes.fuse_denoise_loop import fuse_denoise_loop
from pi05c.passes.fuse_projections import fuse_projections
from pi05c.passes.insert_attention_qdq import insert_attention_qdq
from pi05c.passes.lower_precision import lower_precision
from pi05c.passes.pin_fp32 import pin_fp32
from pi05c.passes.quantize_linears import quantize_linears
from pi05c.passes.specialize import specialize
from pi05c.passes.split_prefix_attention import split_prefix_attention

_EXACT = (
    canonicalize,  # one spelling, so that the finders below see one
    batch_views,  # one run of the vision tower over all cameras, before anything is done to each run
    drop_dead_prefix,  # what no output needs is gone before it is copied for each step
    fuse_denoise_loop,  # the steps become one straight graph; what depends on the step alone becomes constants
    fold_norms,  # before linears are joined by their largest weights, which this changes
    fuse_projections,  # q/k/v and gate/up read their input once
    fold_gqa,  # no repeated keys and values: more rows for each MatMul
    split_prefix_attention,  # what the steps ask of the prefix is computed once
    fold_scales,  # after weights are joined by their largest values, which this changes
    dedupe,  # nothing is stored or computed twice
)

_FLOAT16 = (
    lower_precision,  # float16 wherever values fit: half the bytes, twice the tensor-core rate
    pin_fp32,  # except where a robot's accuracy hangs on it
)

_FP8 = (
    quantize_linears,  # FP8 where most of the bytes and FLOPs are
    insert_attention_qdq,  # FP8 in attention, which TensorRT then fuses
    disable_conv2d_quant,  # the patch embedding stays as it is
)

_FINISH = (
    canonicalize,  # again: bakes the casts behind constants that are left
)

_WITHOUT_FP8 = (
    fold_norms,  # folded weights fit E4M3 no better, and are read in float32
)
"""Exact passes that `default` leaves out.

With `fold_norms` the error of FP8 is 1.02 +- 0.03 times as large over 17 small models of redrawn weights, and 1.3 times
on the reference model; fitting scales and codes to folded weights takes 4.3 times the processor time of bfloat16 ones.
"""

_WITHOUT_SCALES = {
    fuse_projections: "max_scale_ratio=1000000",  # a limit is of use only where one FP8 scale serves a joined weight
}
"""Options of passes in pipelines that quantize nothing."""

_WITH_FP4 = {
    quantize_linears: "llm=nvfp4",  # the language model, which most of the bytes and FLOPs belong to
}
"""Options of passes where the target has FP4."""

_ATTENTION_KEPT = "keep=prefix,denoise"

_ACCURATE = {
    quantize_linears: "two_terms=vision.*,prefix.0.*,prefix.*.qkv,prefix.*.out,prefix.*.down,keep=vision.0.*,"
    "rounding=compensated",
    insert_attention_qdq: _ATTENTION_KEPT,
}
"""FP8 whose error is half of what `default` has, for 0.4% more bytes of weights at full size (4% of the small reference
model), 48% more multiplications, those of attention in float16, and minutes of compile time.

Rounding of activations is the larger part of the error, and that of the first layers goes through all others: they are
taken in two terms in the vision tower, the first layer of the language model, and where outliers of trained models lie,
in attention and in front of `down`. Two terms in front of gate/up too would be 46% more multiplications, for 0.032
instead of 0.038 on the wide model of `benchmarks/fidelity.py`.
"""

_ACCURATE_WITH_FP4 = {
    quantize_linears: "llm=nvfp4,fp8=prefix.*.qkv,two_terms=vision.*,prefix.*,keep=vision.0.*,rounding=compensated",
    insert_attention_qdq: _ATTENTION_KEPT,
}
"""The same with NVFP4, for 2% more bytes than `nvfp4` at full size (9%) and 94% more multiplications."""

_DEFAULT = (*(each for each in _EXACT if each not in _WITHOUT_FP8), *_FLOAT16, *_FP8, *_FINISH)


def _items(*functions: Callable[..., None], options: Mapping[Callable[..., None], str]) -> tuple[str, ...]:
    return tuple(
        f"{each.__name__}{{{options[each]}}}" if each in options else each.__name__ for each in functions
    )


PRESETS: dict[str, tuple[str, ...]] = {
    "default": _items(*_DEFAULT, options={}),
    "nvfp4": _items(*_DEFAULT, options=_WITH_FP4),
    "fp8_accurate": _items(*_DEFAULT, options=_ACCURATE),
    "nvfp4_accurate": _items(*_DEFAULT, options=_ACCURATE_WITH_FP4),
    "fp16": _items(*_EXACT, *_FLOAT16, *_FINISH, options=_WITHOUT_SCALES),
    "exact": _items(*_EXACT, options=_WITHOUT_SCALES),
    "none": (),
}
"""What each word in `--passes` stands for: FP8, NVFP4 and FP8, both with less error, float16, nothing that changes numbers,
nothing at all."""

BY_REQUEST: tuple[str, ...] = (
    specialize.__name__,  # it makes an engine for fewer observations: whoever asks for it places it first
)
"""Passes of no preset."""

__all__ = ["BY_REQUEST", "PRESETS", "REGISTRY", "Pass", "PassContext", "Skip", "graph_pass"]
