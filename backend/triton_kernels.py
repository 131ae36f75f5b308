"""Triton kernels of `torch_kernels`, registered as operators that torch.export and AOTInductor see through.

At the few rows of a denoising step a kernel takes as long as its launch and its latency, whatever it computes. So each
program repeats the norm of all rows for its own columns, instead of a kernel of its own doing it once. Products run in
float16 on the FP8 codes, which is exact, since reading the weight bounds them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_MIN_ROWS = 16
"""Rows of the smallest tensor core tile."""


@triton.jit
def _quantized(x, scale):
    """The FP8 codes of x, as float16."""
    scaled = tl.clamp(x.to(tl.float32) / scale, -448.0, 448.0)
    return scaled.to(tl.float8e4nv).to(tl.float16)


@triton.jit
def _row_linear_kernel(
    x,
    weight,
    weight_scale,
    scale,
    norm_scale,
    norm_shift,
    bias,
    residual,
    gate,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    EPSILON: tl.constexpr,
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    valid = (rows < M)[:, None]
    if NORM:
        total = tl.zeros([BLOCK_M], tl.float32)
        for k in tl.static_range(0, K, BLOCK_K):
            part = tl.load(x + rows[:, None] * K + (k + inner)[None, :], mask=valid, other=0.0).to(tl.float32)
            total += tl.sum(part * part, 1)
        inverse = 1.0 / tl.sqrt(total / K + EPSILON)
    if QUANTIZE:
        step = tl.load(scale)
    first = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        weights = tl.load(weight + columns[:, None] * K + (k + inner)[None, :])
        if GATED:
            more = tl.load(weight + (N + columns)[:, None] * K + (k + inner)[None, :])
        values = tl.load(x + rows[:, None] * K + (k + inner)[None, :], mask=valid, other=0.0)
        if NORM:
            wide = values.to(tl.float32) * inverse[:, None] * tl.load(norm_scale + k + inner)[None, :]
            if SHIFT:
                wide += tl.load(norm_shift + k + inner)[None, :]
            values = wide.to(tl.float16)
        if QUANTIZE:
            values = _quantized(values, step)
        first = tl.dot(values, tl.trans(weights.to(tl.float16)), first)
        if GATED:
            second = tl.dot(values, tl.trans(more.to(tl.float16)), second)
    if QUANTIZE:
        first *= step
        second *= step
    y = (first * tl.load(weight_scale + columns)[None, :]).to(tl.float16)
    if BIAS:
        y += tl.load(bias + columns)[None, :]
    if GATED:
        up = (second * tl.load(weight_scale + N + columns)[None, :]).to(tl.float16)
        if BIAS:
            up += tl.load(bias + N + columns)[None, :]
        z = y.to(tl.float32)
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)  # sqrt(2 / pi), the tanh form of GELU
        y = (z / (1.0 + tl.exp(-2.0 * u))).to(tl.float16) * up
    place = rows[:, None] * N + columns[None, :]
    if GATE:
        y = y * tl.load(gate + columns)[None, :]
    if RESIDUAL:
        y = tl.load(residual + place, mask=valid, other=0.0) + y
    tl.store(out + place, y, mask=valid)


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
    epsilon: float,
    gated: bool,
) -> Tensor:
    """See `torch_kernels.row_linear`."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    outer, inner = weight.shape
    columns = outer // 2 if gated else outer
    rows = x.numel() // inner
    out = torch.empty([*x.shape[:-1], columns], dtype=torch.float16, device=x.device)
    block_n, block_k, warps, stages = configuration(columns, inner, weight.element_size(), gated)
    wrap_triton(_row_linear_kernel)[(columns // block_n,)](
        x,
        weight,
        weight_scale,
        x if scale is None else scale,
        x if norm_scale is None else norm_scale,
        x if norm_shift is None else norm_shift,
        x if bias is None else bias,
        x if residual is None else residual,
        x if gate is None else gate,
        out,
        M=rows,
        N=columns,
        K=inner,
        EPSILON=epsilon,
        NORM=norm_scale is not None,
        SHIFT=norm_shift is not None,
        QUANTIZE=scale is not None,
        BIAS=bias is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        GATE=gate is not None,
        BLOCK_M=max(_MIN_ROWS, triton.next_power_of_2(rows)),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        STAGES=stages,
        num_warps=warps,
    )
    return out


def configuration(columns: int, inner: int, itemsize: int, gated: bool) -> tuple[int, int, int, int]:
    """Columns and inner size of a program's tile, warps, stages: enough programs to fill the GPU."""
    block_n = 32 if columns % 32 == 0 and columns >= 4096 else 16
    block_k = 256 if itemsize == 1 else 128
    while inner % block_k:
        block_k //= 2
    return block_n, block_k, 4, 4


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
def _logits_kernel(
    query,
    key,
    cached_keys,
    cos,
    sin,
    mask,
    scales,
    logits,
    query_stride,
    key_stride,
    QUERY_START: tl.constexpr,
    KEY_START: tl.constexpr,
    KEYS_D: tl.constexpr,
    KEYS_N: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    DIM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = (r < ROWS)[:, None]
    row = (r % H)[:, None]
    base = query + row * query_stride + QUERY_START + (r // H)[:, None] * DIM
    q = _rotated(base, row, cos, sin, DIM, valid)
    if tl.program_id(0) * BLOCK_N < P:
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tl.arange(0, DIM)
        k = tl.load(cached_keys + d[:, None] * KEYS_D + n[None, :] * KEYS_N, mask=(n < P)[None, :], other=0.0)
        if QUANTIZE:
            q_scale = tl.load(scales)
            product = tl.dot(_quantized(q, q_scale), k.to(tl.float16)) * (q_scale * tl.load(scales + 1))
        else:
            product = tl.dot(q, k)
        value = product.to(tl.float16).to(tl.float32) + tl.load(mask + n, mask=n < P, other=0.0)[None, :]
        tl.store(logits + r[:, None] * (P + H) + n[None, :], value, mask=valid & (n < P)[None, :])
    else:
        own = tl.arange(0, BLOCK_H)
        own_keys = _rotated(
            key + own[:, None] * key_stride + KEY_START, own[:, None], cos, sin, DIM, (own < H)[:, None]
        )
        own_product = tl.dot(q, tl.trans(own_keys)).to(tl.float16).to(tl.float32)
        own_logits = own_product + tl.load(mask + P + own, mask=own < H, other=0.0)[None, :]
        place = logits + r[:, None] * (P + H) + P + own[None, :]
        tl.store(place, own_logits, mask=valid & (own < H)[None, :])


@triton.jit
def _mix_kernel(
    logits,
    value,
    cached_values,
    scales,
    out,
    value_stride,
    VALUE_START: tl.constexpr,
    VALUES_N: tl.constexpr,
    VALUES_D: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    DIM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = (r < ROWS)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    places = logits + r[:, None] * (P + H)
    every = tl.arange(0, BLOCK_ALL)[None, :]
    whole = tl.load(places + every, mask=valid & (every < P + H), other=float("-inf"))
    largest = tl.max(whole, 1)
    largest = tl.where(r < ROWS, largest, 0.0)
    total = tl.sum(tl.exp(whole - largest[:, None]), 1)
    total = tl.where(r < ROWS, total, 1.0)
    if QUANTIZE:
        p_scale = tl.load(scales + 2)
    mixed = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in tl.range(0, P, BLOCK_N, num_stages=3):
        n = start + tl.arange(0, BLOCK_N)
        part = tl.load(places + n[None, :], mask=valid & (n < P)[None, :], other=float("-inf"))
        p = (tl.exp(part - largest[:, None]) / total[:, None]).to(tl.float16)
        v = tl.load(
            cached_values + n[:, None] * VALUES_N + d[None, :] * VALUES_D, mask=(n < P)[:, None], other=0.0
        )
        if QUANTIZE:
            p = _quantized(p, p_scale)
        mixed = tl.dot(p, v.to(tl.float16), mixed)
    if QUANTIZE:
        mixed *= p_scale * tl.load(scales + 3)
    own = tl.arange(0, BLOCK_H)
    part = tl.load(places + P + own[None, :], mask=valid & (own < H)[None, :], other=float("-inf"))
    p = (tl.exp(part - largest[:, None]) / total[:, None]).to(tl.float16)
    v = tl.load(
        value + own[:, None] * value_stride + VALUE_START + d[None, :], mask=(own < H)[:, None], other=0.0
    )
    result = mixed.to(tl.float16) + tl.dot(p, v).to(tl.float16)
    place = (r % H)[:, None] * (HEADS * DIM) + (r // H)[:, None] * DIM + d[None, :]
    tl.store(out + place, result, mask=valid)


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
    starts: list[int],
    heads: int,
) -> Tensor:
    """See `torch_kernels.row_attention`."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    cos, sin, mask = cos.contiguous(), sin.contiguous(), mask.contiguous()
    dim, length = cached_keys.shape[-2], cached_keys.shape[-1]
    horizon = query.shape[1]
    rows = heads * horizon
    logits = torch.empty([rows, length + horizon], dtype=torch.float32, device=query.device)
    out = torch.empty([1, horizon, heads * dim], dtype=torch.float16, device=query.device)
    block_h = max(_MIN_ROWS, triton.next_power_of_2(horizon))
    block_n, block_d = 32, min(32, dim)
    wrap_triton(_logits_kernel)[(triton.cdiv(length, block_n) + 1, triton.cdiv(rows, _MIN_ROWS))](
        query,
        key,
        cached_keys,
        cos,
        sin,
        mask,
        cos if scales is None else scales,
        logits,
        query.shape[2],
        key.shape[2],
        QUERY_START=starts[0],
        KEY_START=starts[1],
        KEYS_D=cached_keys.stride(-2),
        KEYS_N=cached_keys.stride(-1),
        H=horizon,
        ROWS=rows,
        P=length,
        DIM=dim,
        QUANTIZE=scales is not None,
        BLOCK_R=_MIN_ROWS,
        BLOCK_N=block_n,
        BLOCK_H=block_h,
        num_warps=4,
    )
    wrap_triton(_mix_kernel)[(triton.cdiv(rows, _MIN_ROWS), dim // block_d)](
        logits,
        value,
        cached_values,
        cos if scales is None else scales,
        out,
        value.shape[2],
        VALUE_START=starts[2],
        VALUES_N=cached_values.stride(-2),
        VALUES_D=cached_values.stride(-1),
        H=horizon,
        ROWS=rows,
        HEADS=heads,
        P=length,
        DIM=dim,
        QUANTIZE=scales is not None,
        BLOCK_R=_MIN_ROWS,
        BLOCK_D=block_d,
        BLOCK_N=128,
        BLOCK_H=block_h,
        BLOCK_ALL=triton.next_power_of_2(length + horizon),
        num_warps=4,
    )
    return out


__all__ = ["configuration", "row_attention", "row_linear"]
