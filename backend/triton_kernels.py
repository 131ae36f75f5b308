"""Triton kernels of `torch_kernels`, registered as operators that torch.export and AOTInductor see through.

At the few rows of a denoising step a kernel takes as long as its latency. So a program holds its whole part of a
weight in registers, split along K among its warps, whose sums it adds in a fixed order; and where the GPU has
programmatic dependent launch (Hopper on), a kernel starts while the one before it runs, and reads its weights before it
waits for it. What is read so early must have been complete before the kernel before began: constants, masks, and the
cache of keys and values. The kernel behind is let start at once where this kernel needs little of the GPU, else when
its own wait is over. Products run in float16 on the FP8 codes, which is exact.

Attention splits the cached positions among programs, each of which takes the softmax of its own; a second kernel
weighs the parts. So probabilities are rounded before they are divided by their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled
from torch.library import triton_op, wrap_triton

_MIN_ROWS = 16
"""Rows of the smallest tensor core tile."""

_MIN_INNER = 16
"""Smallest inner size of a product in float16."""

_TILE = 1 << 16
"""Elements of the activations, and bytes of the weight, that a program holds at once."""

_WARP_BYTES = 512
"""Bytes of a column of a weight that one warp takes."""


@cache
def _dependent_launch(device: torch.device) -> bool:
    """Whether a GPU can start a kernel before the one before it ends."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(kernel: Callable[..., Any], grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch eagerly, by programmatic dependent launch where there is one; or have it traced."""
    if is_wrap_triton_enabled():
        wrap_triton(kernel)[grid](*arguments, **options, DEPENDENT=False)
        return
    device = next(item.device for item in arguments if isinstance(item, Tensor))
    early = device.type == "cuda" and _dependent_launch(device)
    launch = {"launch_pdl": True} if early else {}
    kernel[grid](*arguments, **options, DEPENDENT=early, **launch)  # type: ignore[index]


@triton.jit
def _quantized(x, inverse_scale):
    """The FP8 codes of x."""
    return tl.clamp(x.to(tl.float32) * inverse_scale, -448.0, 448.0).to(tl.float8e4nv)


@triton.jit
def _norm_kernel(
    x,
    norm_scale,
    norm_shift,
    scale,
    out,
    K: tl.constexpr,
    EPSILON: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    k = tl.arange(0, BLOCK)
    if DEPENDENT and not EARLY:
        tl.extra.cuda.gdc_wait()
    multiplier = tl.load(norm_scale + k, mask=k < K, other=0.0)
    if SHIFT:
        shift = tl.load(norm_shift + k, mask=k < K, other=0.0)
    if DEPENDENT and EARLY:
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * K + k
    wide = tl.load(x + place, mask=k < K, other=0.0).to(tl.float32)
    wide = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / K + EPSILON)) * multiplier
    if SHIFT:
        wide += shift
    values = wide.to(tl.float16)
    if SCALED:
        values = _quantized(values, 1.0 / tl.load(scale))
    tl.store(out + place, values, mask=k < K)


@triton.jit
def _row_linear_kernel(
    x,
    weight,
    weight_scale,
    scale,
    bias,
    residual,
    gate,
    out_scale,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    OUT_SCALED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT and not GATE:
        tl.extra.cuda.gdc_launch_dependents()
    length: tl.constexpr = K // GROUPS
    rows = tl.arange(0, BLOCK_M)[None, :, None]
    inner = tl.arange(0, GROUPS)[:, None, None] * length + tl.arange(0, BLOCK_K)[None, None, :]
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = columns[None, :, None] * K + inner
    weights = tl.load(weight + places)
    factor = tl.load(weight_scale + columns)[None, :]
    if GATED:
        more = tl.load(weight + N * K + places)
        more_factor = tl.load(weight_scale + N + columns)[None, :]
    if SCALED:
        step = tl.load(scale)
    if GATE and EARLY:
        gates = tl.load(gate + columns)[None, :]
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if DEPENDENT and GATE:
        tl.extra.cuda.gdc_launch_dependents()
    if GATE and not EARLY:
        gates = tl.load(gate + columns)[None, :]
    flat = tl.arange(0, BLOCK_M)[:, None]
    place = flat * N + columns[None, :]
    if RESIDUAL:
        straight = tl.load(residual + place, mask=flat < M, other=0.0)
    first = tl.zeros([GROUPS, BLOCK_M, BLOCK_N], tl.float32)
    second = tl.zeros([GROUPS, BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.static_range(0, length, BLOCK_K):
        if k > 0:
            weights = tl.load(weight + places + k)
            if GATED:
                more = tl.load(weight + N * K + places + k)
        values = tl.load(x + rows * K + inner + k, mask=rows < M, other=0.0)
        if SCALED and values.dtype != tl.float8e4nv:
            values = _quantized(values, 1.0 / step)
        values = values.to(tl.float16)
        first = tl.dot(values, tl.permute(weights, (0, 2, 1)).to(tl.float16), first)
        if GATED:
            second = tl.dot(values, tl.permute(more, (0, 2, 1)).to(tl.float16), second)
    product = tl.sum(first, 0)
    if SCALED:
        product *= step
    y = (product * factor).to(tl.float16)
    if BIAS:
        y += tl.load(bias + columns)[None, :]
    if GATED:
        product = tl.sum(second, 0)
        if SCALED:
            product *= step
        up = (product * more_factor).to(tl.float16)
        if BIAS:
            up += tl.load(bias + N + columns)[None, :]
        z = y.to(tl.float32)
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)  # sqrt(2 / pi), the tanh form of GELU
        y = (z / (1.0 + tl.exp(-2.0 * u))).to(tl.float16) * up
    if GATE:
        y = y * gates
    if RESIDUAL:
        y = straight + y
    if OUT_SCALED:
        y = _quantized(y, 1.0 / tl.load(out_scale))
    tl.store(out + place, y, mask=flat < M)


@dataclass(frozen=True)
class Tiles:
    """How a linear is cut: a program computes `columns`, its `warps` take equal parts of K, by `inner` at once."""

    columns: int
    inner: int
    warps: int


def configuration(rows: int, columns: int, inner: int, itemsize: int, gated: bool) -> Tiles:
    """Tiles of a linear [columns, inner] on padded `rows`: the fastest of those tried on an H100."""
    warps = 16
    while warps > 1 and (inner * itemsize < warps * _WARP_BYTES or inner % (warps * _MIN_INNER)):
        warps //= 2
    block = 8 if itemsize == 2 and columns <= 1024 else 16
    while columns % block:
        block //= 2
    width = min(_TILE // rows, _TILE // (block * itemsize)) // warps
    while (inner // warps) % width:
        width //= 2
    return Tiles(block, width, warps)


@triton_op("pi05c::row_linear", mutates_args={})
def row_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    scale: Tensor | None,
    norm_scale: Tensor | None,
    norm_shift: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    out_scale: Tensor | None,
    epsilon: float,
    gated: bool,
    constant: bool,
) -> Tensor:
    """See `torch_kernels.row_linear`."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    outer, inner = weight.shape
    columns = outer // 2 if gated else outer
    rows = x.numel() // inner
    if norm_scale is not None:
        x = _normed(x, norm_scale, norm_shift, scale, epsilon, constant)
    dtype = torch.float16 if out_scale is None else torch.float8_e4m3fn
    out = torch.empty([*x.shape[:-1], columns], dtype=dtype, device=x.device)
    padded = max(_MIN_ROWS, triton.next_power_of_2(rows))
    tiles = configuration(padded, columns, inner, weight.element_size(), gated)
    _launch(
        _row_linear_kernel,
        (columns // tiles.columns,),
        x,
        weight,
        weight_scale,
        x if scale is None else scale,
        x if bias is None else bias,
        x if residual is None else residual,
        x if gate is None else gate,
        x if out_scale is None else out_scale,
        out,
        M=rows,
        N=columns,
        K=inner,
        SCALED=scale is not None,
        BIAS=bias is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        GATE=gate is not None,
        OUT_SCALED=out_scale is not None,
        EARLY=constant,
        BLOCK_M=padded,
        BLOCK_N=tiles.columns,
        BLOCK_K=tiles.inner,
        GROUPS=tiles.warps,
        num_warps=tiles.warps,
    )
    return out


def _normed(
    x: Tensor,
    norm_scale: Tensor,
    norm_shift: Tensor | None,
    scale: Tensor | None,
    epsilon: float,
    constant: bool,
) -> Tensor:
    """RMSNorm(x) * norm_scale [+ norm_shift] in float16, or its codes by `scale`."""
    inner = x.shape[-1]
    out = torch.empty_like(x) if scale is None else torch.empty_like(x, dtype=torch.float8_e4m3fn)
    _launch(
        _norm_kernel,
        (x.numel() // inner,),
        x,
        norm_scale,
        norm_scale if norm_shift is None else norm_shift,
        norm_scale if scale is None else scale,
        out,
        K=inner,
        EPSILON=epsilon,
        SHIFT=norm_shift is not None,
        SCALED=scale is not None,
        EARLY=constant,
        BLOCK=triton.next_power_of_2(inner),
        num_warps=4,
    )
    return out


@triton.jit
def _rotated(base, place, cos, sin, DIM: tl.constexpr, valid):
    """Rows of heads at `base` [rows, 1], turned by the angles of `place` [rows, 1], in float16."""
    d = tl.arange(0, DIM)[None, :]
    straight = tl.load(base + d, mask=valid, other=0.0).to(tl.float32)
    turned = tl.load(base + (d + DIM // 2) % DIM, mask=valid, other=0.0).to(tl.float32)
    turned = tl.where(d < DIM // 2, -turned, turned)
    c = tl.load(cos + place * DIM + d, mask=valid, other=0.0)
    s = tl.load(sin + place * DIM + d, mask=valid, other=0.0)
    return (straight * c + turned * s).to(tl.float16)


@triton.jit
def _attend_kernel(
    query,
    key,
    value,
    cached_keys,
    cached_values,
    cos,
    sin,
    mask,
    scales,
    parts,
    largest,
    totals,
    QUERY_STRIDE: tl.constexpr,
    QUERY_START: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    KEY_START: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    VALUE_START: tl.constexpr,
    KEYS_D: tl.constexpr,
    KEYS_N: tl.constexpr,
    VALUES_N: tl.constexpr,
    VALUES_D: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    DIM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    block = tl.program_id(0)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = (r < ROWS)[:, None]
    row = (r % H)[:, None]
    d = tl.arange(0, DIM)
    base = query + row * QUERY_STRIDE + QUERY_START + (r // H)[:, None] * DIM
    if block * BLOCK_N < P:
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = tl.load(
            cached_keys + d[:, None] * KEYS_D + n[None, :] * KEYS_N, mask=(n < P)[None, :], other=0.0
        ).to(tl.float16)
        values = tl.load(
            cached_values + n[:, None] * VALUES_N + d[None, :] * VALUES_D, mask=(n < P)[:, None], other=0.0
        ).to(tl.float16)
        masks = tl.load(mask + n, mask=n < P, other=float("-inf"))
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        q = _rotated(base, row, cos, sin, DIM, valid)
        if QUANTIZE:
            q = _quantized(q, 1.0 / tl.load(scales)).to(tl.float16)
        product = tl.dot(q, keys)
        if QUANTIZE:
            product *= tl.load(scales) * tl.load(scales + 1)
        logits = product.to(tl.float16).to(tl.float32) + masks[None, :]
        high = tl.maximum(tl.max(logits, 1), -3.0e38)
        p = tl.exp(logits - high[:, None])
        total = tl.sum(p, 1)
        p = p.to(tl.float16)
        if QUANTIZE:
            p = _quantized(p, 1.0 / tl.load(scales + 2)).to(tl.float16)
        part = tl.dot(p, values)
        if QUANTIZE:
            part *= tl.load(scales + 2) * tl.load(scales + 3)
        tl.store(parts + (block * ROWS + r)[:, None] * DIM + d[None, :], part, mask=valid)
        tl.store(largest + block * ROWS + r, high, mask=r < ROWS)
        tl.store(totals + block * ROWS + r, total, mask=r < ROWS)
    else:
        own = tl.arange(0, BLOCK_H)
        own_masks = tl.load(mask + P + own, mask=own < H, other=float("-inf"))
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        own_values = tl.load(
            value + own[:, None] * VALUE_STRIDE + VALUE_START + d[None, :], mask=(own < H)[:, None], other=0.0
        )
        own_q = _rotated(base, row, cos, sin, DIM, valid)
        own_keys = _rotated(
            key + own[:, None] * KEY_STRIDE + KEY_START, own[:, None], cos, sin, DIM, (own < H)[:, None]
        )
        own_logits = tl.dot(own_q, tl.trans(own_keys)).to(tl.float16).to(tl.float32) + own_masks[None, :]
        own_high = tl.maximum(tl.max(own_logits, 1), -3.0e38)
        own_p = tl.exp(own_logits - own_high[:, None])
        own_part = tl.dot(own_p.to(tl.float16), own_values)
        tl.store(parts + (block * ROWS + r)[:, None] * DIM + d[None, :], own_part, mask=valid)
        tl.store(largest + block * ROWS + r, own_high, mask=r < ROWS)
        tl.store(totals + block * ROWS + r, tl.sum(own_p, 1), mask=r < ROWS)


@triton.jit
def _combine_kernel(
    parts,
    largest,
    totals,
    out_scale,
    out,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    OUT_SCALED: tl.constexpr,
    PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    r = tl.program_id(0)
    block = tl.arange(0, PADDED)
    d = tl.arange(0, DIM)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    high = tl.load(largest + block * ROWS + r, mask=block < BLOCKS, other=-3.0e38)
    total = tl.load(totals + block * ROWS + r, mask=block < BLOCKS, other=0.0)
    places = (block * ROWS + r)[:, None] * DIM + d[None, :]
    part = tl.load(parts + places, mask=(block < BLOCKS)[:, None], other=0.0)
    weight = tl.exp(high - tl.max(high, 0))
    result = (tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)).to(tl.float16)
    if OUT_SCALED:
        result = _quantized(result, 1.0 / tl.load(out_scale))
    tl.store(out + (r % H) * (HEADS * DIM) + (r // H) * DIM + d, result)


@triton_op("pi05c::row_attention", mutates_args={})
def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    scales: Tensor | None,
    out_scale: Tensor | None,
    starts: list[int],
    heads: int,
) -> Tensor:
    """See `torch_kernels.row_attention`."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    cos, sin, mask = cos.contiguous(), sin.contiguous(), mask.contiguous()
    dim, length = cached_keys.shape[-2], cached_keys.shape[-1]
    horizon = query.shape[1]
    rows = heads * horizon
    block_n, warps = attention_configuration(length)
    blocks = triton.cdiv(length, block_n) + 1
    parts = torch.empty([blocks, rows, dim], dtype=torch.float32, device=query.device)
    largest, totals = torch.empty([2, blocks, rows], dtype=torch.float32, device=query.device).unbind()
    dtype = torch.float16 if out_scale is None else torch.float8_e4m3fn
    out = torch.empty([1, horizon, heads * dim], dtype=dtype, device=query.device)
    _launch(
        _attend_kernel,
        (blocks, triton.cdiv(rows, _MIN_ROWS)),
        query,
        key,
        value,
        cached_keys,
        cached_values,
        cos,
        sin,
        mask,
        cos if scales is None else scales,
        parts,
        largest,
        totals,
        QUERY_STRIDE=query.shape[2],
        QUERY_START=starts[0],
        KEY_STRIDE=key.shape[2],
        KEY_START=starts[1],
        VALUE_STRIDE=value.shape[2],
        VALUE_START=starts[2],
        KEYS_D=cached_keys.stride(-2),
        KEYS_N=cached_keys.stride(-1),
        VALUES_N=cached_values.stride(-2),
        VALUES_D=cached_values.stride(-1),
        H=horizon,
        ROWS=rows,
        P=length,
        DIM=dim,
        QUANTIZE=scales is not None,
        BLOCK_R=_MIN_ROWS,
        BLOCK_N=block_n,
        BLOCK_H=max(_MIN_ROWS, triton.next_power_of_2(horizon)),
        num_warps=warps,
    )
    _launch(
        _combine_kernel,
        (rows,),
        parts,
        largest,
        totals,
        largest if out_scale is None else out_scale,
        out,
        H=horizon,
        ROWS=rows,
        HEADS=heads,
        DIM=dim,
        BLOCKS=blocks,
        OUT_SCALED=out_scale is not None,
        PADDED=triton.next_power_of_2(blocks),
        num_warps=4,
    )
    return out


def attention_configuration(length: int) -> tuple[int, int]:
    """Positions and warps of a program of the attention over cached keys: the fastest of those tried on an H100."""
    return 64, 4


__all__ = ["Tiles", "attention_configuration", "configuration", "row_attention", "row_linear"]
