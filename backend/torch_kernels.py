"""What the nodes of `torch_fusion` compute, in plain torch on a CPU and by one or two Triton kernels on a GPU.

Roundings are those of the nodes that were fused: what the graph has in float16 is rounded to float16 here too, except
that a dequantized weight is not, and that a GPU rounds probabilities before they are divided by their sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pi05c.backend.torch_operators import quantize


def row_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    scale: Tensor | None = None,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    out_scale: Tensor | None = None,
    epsilon: float = 0.0,
    gated: bool = False,
    constant: bool = False,
) -> Tensor:
    """A linear of few rows with what surrounds it.

    Args:
        x: [..., K] float16, or its FP8 codes by `scale` where there is no norm.
        weight: [N, K], float16 or FP8.
        weight_scale: [N] float32, which the columns of the product are multiplied with.
        scale: [1] float32, by which x is quantized before the product; None for a product in float16.
        norm_scale: [K] float32: x is replaced by RMSNorm(x) * norm_scale [+ norm_shift], in float32; None: it is not.
        norm_shift: [K] float32.
        bias: [N] float16.
        residual: [..., columns] float16, added to the result.
        gate: [columns] float16, which the result is multiplied with before `residual` is added.
        out_scale: [1] float32, by which the result is quantized; None: it is not.
        epsilon: of the norm.
        gated: the result is GELU(first half of the columns) * second half.
        constant: `norm_scale`, `norm_shift` and `gate` are constants, as the weight, its scale and the bias are.

    Returns:
        [..., columns] float16 or FP8, columns being N, or N / 2 where `gated`.
    """
    if x.is_cuda:
        from pi05c.backend import triton_kernels

        return triton_kernels.row_linear(  # type: ignore[no-any-return]
            x,
            weight,
            weight_scale,
            scale,
            norm_scale,
            norm_shift,
            bias,
            residual,
            gate,
            out_scale,
            epsilon,
            gated,
            constant,
        )
    if norm_scale is not None:
        wide = x.to(torch.float32)
        wide = (
            wide * torch.reciprocal(torch.sqrt(wide.square().mean(-1, keepdim=True) + epsilon)) * norm_scale
        )
        x = (wide if norm_shift is None else wide + norm_shift).to(torch.float16)
    codes = x if scale is None or x.dtype == torch.float8_e4m3fn else quantize(x, scale)
    factor = codes.to(torch.float32) if scale is None else codes.to(torch.float32) * scale
    y = (torch.matmul(factor, weight.to(torch.float32).t()) * weight_scale).to(torch.float16)
    y = y if bias is None else y + bias
    if gated:
        first, second = y.chunk(2, -1)
        y = F.gelu(first, approximate="tanh") * second
    y = y if gate is None else y * gate
    y = y if residual is None else residual + y
    return y if out_scale is None else quantize(y, out_scale)


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
    starts: tuple[int, int, int],
    heads: int,
    out_scale: Tensor | None = None,
) -> Tensor:
    """Attention of H rows over P cached keys and their own, with one key/value head.

    Args:
        query, key, value: [1, H, any] float16; heads of d numbers lie from `starts` on, before rotary positions.
        cached_keys: [1, 1, d, P], float16 or FP8, rotated.
        cached_values: [1, 1, P, d].
        cos, sin: [..., H, d] float32.
        mask: [..., P + H] float32, additive.
        scales: [4] float32: of the query, the cached keys, the probabilities of cached keys, and the cached values,
            which then are FP8; None for float16.
        heads: of the query.
        out_scale: [1] float32, by which the result is quantized; None: it is not.

    Returns:
        [1, H, heads * d] float16 or FP8.
    """
    if query.is_cuda:
        from pi05c.backend import triton_kernels

        return triton_kernels.row_attention(  # type: ignore[no-any-return]
            query,
            key,
            value,
            cached_keys,
            cached_values,
            cos,
            sin,
            mask,
            scales,
            out_scale,
            list(starts),
            heads,
        )
    dim, length = cached_keys.shape[-2:]
    rows = query.shape[1]
    cos, sin = cos.reshape(rows, dim), sin.reshape(rows, dim)
    q, k, v = (
        tensor[0, :, start : start + count * dim].reshape(rows, count, dim).transpose(0, 1)
        for tensor, start, count in zip((query, key, value), starts, (heads, 1, 1), strict=True)
    )
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    own = torch.matmul(q, k.transpose(1, 2))
    keys, values = cached_keys.reshape(dim, length), cached_values.reshape(length, dim)
    if scales is None:
        cached = torch.matmul(q, keys)
    else:
        codes = quantize(q, scales[0]).to(torch.float32)
        cached = (torch.matmul(codes, keys.to(torch.float32)) * (scales[0] * scales[1])).to(torch.float16)
    logits = torch.cat([cached, own], -1).to(torch.float32) + mask.reshape(-1)
    probabilities = torch.softmax(logits, -1).to(torch.float16)
    first, second = probabilities[..., :length], probabilities[..., length:]
    if scales is None:
        mixed = torch.matmul(first, values)
    else:
        codes = quantize(first, scales[2]).to(torch.float32)
        mixed = (torch.matmul(codes, values.to(torch.float32)) * (scales[2] * scales[3])).to(torch.float16)
    mixed = mixed + torch.matmul(second, v)
    mixed = mixed.transpose(0, 1).reshape(1, rows, heads * dim)
    return mixed if out_scale is None else quantize(mixed, out_scale)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    half = wide.shape[-1] // 2
    turned = torch.cat([-wide[..., half:], wide[..., :half]], -1)
    return (wide * cos + turned * sin).to(torch.float16)


def scaled_matmul(codes: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor) -> Tensor:
    """FP8 product with one scale a factor: codes [..., K] FP8, weight [N, K] FP8, scales [] float32 -> float16."""
    flat = codes.reshape(-1, codes.shape[-1])
    if codes.is_cuda:
        product = torch._scaled_mm(
            flat, weight.t(), scale, weight_scale, out_dtype=torch.float16, use_fast_accum=True
        )
    else:
        wide = torch.matmul(flat.to(torch.float32), weight.to(torch.float32).t())
        product = (wide * (scale * weight_scale)).to(torch.float16)
    return product.reshape(*codes.shape[:-1], weight.shape[0])


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T) V of [B, heads, S, d] float16, logits and probabilities in float32 inside the kernel."""
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)


__all__ = ["attention", "row_attention", "row_linear", "scaled_matmul"]
