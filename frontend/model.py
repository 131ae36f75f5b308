"""pi0.5 in plain torch: float32 arithmetic on weights kept in the checkpoint's type and cast where they are used.

Modules are named so that `state_dict()` has openpi's parameter names. Shapes below use B observations, V views,
T tokens a view, L prompt tokens, P = V * T + L prefix positions, H actions of dimension D, N denoising steps,
and K key/value heads of dimension d.

The denoising step is one function, `Pi05.denoise_step`: `Pi05` runs it in a Python loop, `LoopedPi05` in
`while_loop`, which `torch.onnx.export` turns into an ONNX Loop.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

from pi05c.frontend.config import (
    TIME_MAX_PERIOD,
    TIME_MIN_PERIOD,
    GemmaSizes,
    LanguageSizes,
    Pi05Config,
    VisionSizes,
)
from pi05c.graph.dtypes import BFLOAT16
from pi05c.graph.runner import Array
from pi05c.graph.weights import Weight

NORM_EPSILON = 1e-6
"""Epsilon of every RMSNorm (Gemma) and LayerNorm (SigLIP)."""

ROPE_THETA = 10_000.0
"""Base of Gemma's rotary frequencies."""

MASKED = -2.3819763e38
"""Additive attention mask of openpi: near the lowest float32, finite so that a fully masked row stays finite."""


class Cache(NamedTuple):
    """What the denoising steps read of the prefix, for each layer."""

    keys: tuple[Tensor, ...]
    """[B, K, P, d] each, rotated."""
    values: tuple[Tensor, ...]
    """[B, K, P, d] each."""


class Suffix(NamedTuple):
    """What the denoising steps share: rotary factors of the action positions, and who sees what."""

    cos: Tensor
    """[B, 1, H, d]."""
    sin: Tensor
    """[B, 1, H, d]."""
    mask: Tensor
    """[B, 1, 1, P + H], additive."""


@dataclass(frozen=True)
class Trace:
    """Every tensor that the reference data records, of one run of the Python loop."""

    image_features: Tensor
    """[B, V, T, llm width]."""
    prefix_keys: Tensor
    """[layers, B, K, P, d], rotated."""
    prefix_values: Tensor
    """[layers, B, K, P, d]."""
    time: Tensor
    """[N], flow-matching time of each step, from 1 down."""
    time_cond: Tensor
    """[N, expert width], input of every adaRMS dense layer."""
    x_t: Tensor
    """[N, B, H, D], state that enters each step."""
    v_t: Tensor
    """[N, B, H, D], velocity that each step computes."""
    actions: Tensor
    """[B, H, D]."""


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.bfloat16), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T + b, with W [outputs, inputs] cast to x's type."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = _parameter(outputs, inputs)
        self.bias = _parameter(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = _parameter(width)
        self.bias = _parameter(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), NORM_EPSILON)


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * (1 + w) over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = _parameter(width)

    def forward(self, x: Tensor) -> Tensor:
        return _normalize(x) * (1.0 + self.weight.to(x.dtype))


class AdaptiveRMSNorm(nn.Module):
    """RMSNorm whose scale and shift, and the gate of the branch that follows, are linear in a condition.

    The condition has a leading axis of 1, so the modulation depends on the step alone and can be tabulated.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.dense = Linear(width, 3 * width, bias=True)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, H, W] and condition [1, W] -> normalized and modulated x, gate [1, 1, W]."""
        modulation = self.dense(condition)[:, None, :]
        scale = modulation[..., : self.width]
        shift = modulation[..., self.width : 2 * self.width]
        gate = modulation[..., 2 * self.width :]
        return _normalize(x) * (1.0 + scale) + shift, gate


def _normalize(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON)


class GatedMLP(nn.Module):
    """Gemma's feed-forward: down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, sizes: GemmaSizes) -> None:
        super().__init__()
        self.gate_proj = Linear(sizes.width, sizes.mlp_dim)
        self.up_proj = Linear(sizes.width, sizes.mlp_dim)
        self.down_proj = Linear(sizes.mlp_dim, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))  # type: ignore[no-any-return]


class GemmaAttention(nn.Module):
    """Grouped-query attention with rotary positions; keys and values may come before those of x."""

    def __init__(self, sizes: GemmaSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.q_proj = Linear(sizes.width, sizes.num_heads * sizes.head_dim)
        self.k_proj = Linear(sizes.width, sizes.num_kv_heads * sizes.head_dim)
        self.v_proj = Linear(sizes.width, sizes.num_kv_heads * sizes.head_dim)
        self.o_proj = Linear(sizes.num_heads * sizes.head_dim, sizes.width)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, W] -> rotated keys and values, [B, K, S, d] each."""
        return _rotate(self._heads(self.k_proj(x)), cos, sin), self._heads(self.v_proj(x))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> Tensor:
        """Attend from x [B, S, W] to keys and values [B, K, C, d] under an additive mask [B, 1, S or 1, C]."""
        queries = _rotate(self._heads(self.q_proj(x)), cos, sin)
        groups = self.sizes.num_heads // self.sizes.num_kv_heads
        mixed = _attend(queries, _repeat_heads(keys, groups), _repeat_heads(values, groups), mask)
        return self.o_proj(mixed)  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, self.sizes.head_dim).transpose(1, 2)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V of [B, heads, S or C, d] -> [B, S, heads * d]."""
    scores = torch.matmul(queries, keys.transpose(2, 3)) * queries.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    mixed = torch.matmul(torch.softmax(scores, dim=-1), values)
    return mixed.transpose(1, 2).flatten(2)


def _repeat_heads(x: Tensor, groups: int) -> Tensor:
    """[B, K, C, d] -> [B, K * groups, C, d], each head repeated for the queries of its group."""
    if groups == 1:
        return x
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, dim).reshape(batch, heads * groups, length, dim)


def rotary_frequencies(head_dim: int) -> Tensor:
    """[head_dim / 2] float32, radians a position: 1 / theta^(2 i / head_dim)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return 1.0 / ROPE_THETA**exponents


def _rotary(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, S] -> cos and sin [B, 1, S, d], the second half of the last axis equal to the first."""
    angles = positions.to(torch.float32)[:, None, :, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, half-split: element i turns with element i + d / 2."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


class PrefixLayer(nn.Module):
    """One layer of the Gemma that reads images and prompt."""

    def __init__(self, sizes: GemmaSizes) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(sizes.width)
        self.self_attn = GemmaAttention(sizes)
        self.post_attention_layernorm = RMSNorm(sizes.width)
        self.mlp = GatedMLP(sizes)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, P, W] -> x of the next layer, keys, values; of the last layer nothing but keys and values is read."""
        normalized = self.input_layernorm(x)
        keys, values = self.self_attn.keys_values(normalized, cos, sin)
        if not last:
            x = x + self.self_attn(normalized, keys, values, cos, sin, mask)
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x, keys, values


class ExpertLayer(nn.Module):
    """One layer of the action expert: attends to the prefix and to the actions, modulated by the time."""

    def __init__(self, sizes: GemmaSizes) -> None:
        super().__init__()
        self.input_layernorm = AdaptiveRMSNorm(sizes.width)
        self.self_attn = GemmaAttention(sizes)
        self.post_attention_layernorm = AdaptiveRMSNorm(sizes.width)
        self.mlp = GatedMLP(sizes)

    def forward(
        self, x: Tensor, condition: Tensor, prefix_keys: Tensor, prefix_values: Tensor, suffix: Suffix
    ) -> Tensor:
        """x [B, H, W] -> [B, H, W]."""
        normalized, gate = self.input_layernorm(x, condition)
        keys, values = self.self_attn.keys_values(normalized, suffix.cos, suffix.sin)
        keys = torch.cat([prefix_keys, keys], dim=2)
        values = torch.cat([prefix_values, values], dim=2)
        x = x + self.self_attn(normalized, keys, values, *suffix) * gate
        normalized, gate = self.post_attention_layernorm(x, condition)
        return x + self.mlp(normalized) * gate  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """A table of vectors; only the rows that are looked up are cast."""

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.weight = _parameter(entries, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).to(torch.float32)


class LanguageModel(nn.Module):
    """The Gemma that reads images and prompt. Its final norm is in the checkpoint and has no use here."""

    def __init__(self, sizes: LanguageSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = Embedding(sizes.vocab_size, sizes.width)
        self.layers = nn.ModuleList(PrefixLayer(sizes) for _ in range(sizes.depth))
        self.norm = RMSNorm(sizes.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Cache:
        """Prefix embeddings [B, P, W], rotary factors [B, 1, P, d], mask [B, 1, P, P] -> keys and values."""
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            x, key, value = layer(x, cos, sin, mask, index == self.sizes.depth - 1)
            keys.append(key)
            values.append(value)
        return Cache(tuple(keys), tuple(values))


class ActionExpert(nn.Module):
    """The Gemma that turns noisy actions into a velocity."""

    def __init__(self, sizes: GemmaSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ExpertLayer(sizes) for _ in range(sizes.depth))
        self.norm = AdaptiveRMSNorm(sizes.width)

    def forward(self, x: Tensor, condition: Tensor, cache: Cache, suffix: Suffix) -> Tensor:
        """x [B, H, W] under condition [1, W] -> [B, H, W]."""
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer(x, condition, keys, values, suffix)
        return self.norm(x, condition)[0]  # type: ignore[no-any-return]


class PatchEmbedding(nn.Module):
    """Non-overlapping patches as a strided convolution."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.stride = sizes.patch_size
        self.weight = _parameter(sizes.width, 3, sizes.patch_size, sizes.patch_size)
        self.bias = _parameter(sizes.width)

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight.to(images.dtype), self.bias.to(images.dtype), stride=self.stride)


class PositionEmbedding(nn.Module):
    """One learned vector a patch."""

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.weight = _parameter(entries, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.to(x.dtype)


class VisionEmbeddings(nn.Module):
    """Images to patch vectors with positions."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(sizes)
        self.position_embedding = PositionEmbedding(sizes.tokens, sizes.width)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, T, W]."""
        return self.position_embedding(self.patch_embedding(images).flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


class VisionAttention(nn.Module):
    """Multi-head attention with biases, no mask, no positions."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.head_dim = sizes.width // sizes.num_heads
        self.q_proj = Linear(sizes.width, sizes.width, bias=True)
        self.k_proj = Linear(sizes.width, sizes.width, bias=True)
        self.v_proj = Linear(sizes.width, sizes.width, bias=True)
        self.out_proj = Linear(sizes.width, sizes.width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            projection(x).reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(_attend(queries, keys, values, None))  # type: ignore[no-any-return]


class VisionMLP(nn.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.fc1 = Linear(sizes.width, sizes.mlp_dim, bias=True)
        self.fc2 = Linear(sizes.mlp_dim, sizes.width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class VisionLayer(nn.Module):
    """One pre-norm block of SigLIP."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(sizes.width)
        self.self_attn = VisionAttention(sizes)
        self.layer_norm2 = LayerNorm(sizes.width)
        self.mlp = VisionMLP(sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


class VisionEncoder(nn.Module):
    """The stack of SigLIP blocks."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(sizes) for _ in range(sizes.depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionModel(nn.Module):
    """SigLIP without its pooling head."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(sizes)
        self.encoder = VisionEncoder(sizes)
        self.post_layernorm = LayerNorm(sizes.width)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] in [-1, 1] -> [N, T, W]."""
        return self.post_layernorm(self.encoder(self.embeddings(images)))  # type: ignore[no-any-return]


class VisionTower(nn.Module):
    """Holds the vision model under the name that the checkpoint has for it."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.vision_model = VisionModel(sizes)


class Projector(nn.Module):
    """Image tokens to the width of the language model."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


class PaliGemmaModel(nn.Module):
    """Image encoder, projector and language model."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        vision, llm = config.architecture.vision, config.architecture.llm
        self.vision_tower = VisionTower(vision)
        self.multi_modal_projector = Projector(vision.width, llm.width)
        self.language_model = LanguageModel(llm)


class PaliGemma(nn.Module):
    """PaliGemma with its output head, which is tied to the token embedding and not used."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.model = PaliGemmaModel(config)
        self.lm_head = Linear(config.architecture.llm.width, config.architecture.llm.vocab_size)


class GemmaExpert(nn.Module):
    """The action expert with an output head that the checkpoint has and nothing uses."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.model = ActionExpert(config.architecture.expert)
        self.lm_head = Linear(config.architecture.expert.width, config.architecture.llm.vocab_size)


class PaliGemmaWithExpert(nn.Module):
    """Holds both Gemmas under the names that the checkpoint has for them."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.paligemma = PaliGemma(config)
        self.gemma_expert = GemmaExpert(config)


class Pi05(nn.Module):
    """The policy. Build it on torch's meta device and fill it with `load_state_dict(..., assign=True)`.

    Inputs of `forward`: images [B, V, 3, S, S] float32 in [-1, 1], image_masks [B, V] bool, tokens [B, L] int64,
    token_masks [B, L] bool, noise [B, H, D] float32; result: actions [B, H, D] float32, normalized and padded.
    """

    rope_frequencies: Tensor
    time_frequencies: Tensor
    action_offsets: Tensor
    start_time: Tensor
    first_step: Tensor

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.config = config
        width = config.architecture.expert.width
        self.paligemma_with_expert = PaliGemmaWithExpert(config)
        self.action_in_proj = Linear(config.action_dim, width, bias=True)
        self.action_out_proj = Linear(width, config.action_dim, bias=True)
        self.time_mlp_in = Linear(width, width, bias=True)
        self.time_mlp_out = Linear(width, width, bias=True)
        self.register_buffer(
            "rope_frequencies", rotary_frequencies(config.architecture.llm.head_dim), persistent=False
        )
        self.register_buffer("time_frequencies", time_frequencies(width), persistent=False)
        self.register_buffer("action_offsets", torch.arange(config.horizon, device="cpu"), persistent=False)
        self.register_buffer("start_time", torch.ones(1, device="cpu"), persistent=False)
        self.register_buffer("first_step", torch.zeros((), dtype=torch.int64, device="cpu"), persistent=False)

    def forward(
        self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_masks: Tensor, noise: Tensor
    ) -> Tensor:
        cache, suffix = self.read_prefix(self.embed_images(images), image_masks, tokens, token_masks)
        return self.denoise(noise, cache, suffix)

    @torch.no_grad()
    def trace(
        self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_masks: Tensor, noise: Tensor
    ) -> Trace:
        """The same computation, with every intermediate tensor of interest."""
        features = self.embed_images(images)
        cache, suffix = self.read_prefix(features, image_masks, tokens, token_masks)
        x, time = noise, self.start_time
        times, conditions, states, velocities = [], [], [], []
        for _ in range(self.config.steps):
            times.append(time)
            states.append(x)
            conditions.append(self.time_condition(time))
            velocities.append(self.velocity(x, conditions[-1], cache, suffix))
            x, time = self._advance(x, time, velocities[-1])
        return Trace(
            image_features=features,
            prefix_keys=torch.stack(cache.keys),
            prefix_values=torch.stack(cache.values),
            time=torch.cat(times),
            time_cond=torch.cat(conditions),
            x_t=torch.stack(states),
            v_t=torch.stack(velocities),
            actions=x,
        )

    def embed_images(self, images: Tensor) -> Tensor:
        """[B, V, 3, S, S] -> [B, V, T, llm width]; all views go through the encoder as one batch."""
        model = self.paligemma_with_expert.paligemma.model
        features = model.multi_modal_projector(model.vision_tower.vision_model(images.flatten(0, 1)))
        return features.reshape(*images.shape[:2], *features.shape[1:])  # type: ignore[no-any-return]

    def read_prefix(
        self, features: Tensor, image_masks: Tensor, tokens: Tensor, token_masks: Tensor
    ) -> tuple[Cache, Suffix]:
        """Run the language model over view 0, view 1, ..., prompt, and prepare what every step shares."""
        language_model = self.paligemma_with_expert.paligemma.model.language_model
        batch, views, length, width = features.shape
        text = language_model.embed_tokens(tokens) * math.sqrt(width)
        prefix = torch.cat([features.flatten(1, 2), text], dim=1)
        seen = image_masks[:, :, None].expand(batch, views, length).reshape(batch, views * length)
        valid = torch.cat([seen, token_masks], dim=1)
        counts = valid.to(torch.int64)
        both = valid[:, None, :, None] & valid[:, None, None, :]
        cache = language_model(prefix, *_rotary(counts.cumsum(1) - 1, self.rope_frequencies), _additive(both))
        horizon = self.config.horizon
        positions = counts.sum(1, keepdim=True) + self.action_offsets
        cos, sin = _rotary(positions, self.rope_frequencies)
        visible = torch.cat(
            [valid, torch.ones((batch, horizon), dtype=torch.bool, device=valid.device)], dim=1
        )
        return cache, Suffix(cos, sin, _additive(visible[:, None, None, :]))

    def denoise(self, noise: Tensor, cache: Cache, suffix: Suffix) -> Tensor:
        """Noise [B, H, D] -> actions [B, H, D], in a Python loop."""
        x, time = noise, self.start_time
        for _ in range(self.config.steps):
            x, time = self.denoise_step(x, time, cache, suffix)
        return x

    def denoise_step(self, x: Tensor, time: Tensor, cache: Cache, suffix: Suffix) -> tuple[Tensor, Tensor]:
        """State x [B, H, D] at time [1] -> state and time of the next step, by one Euler step of the flow."""
        return self._advance(x, time, self.velocity(x, self.time_condition(time), cache, suffix))

    def time_condition(self, time: Tensor) -> Tensor:
        """Flow-matching time [1] -> condition [1, expert width] of every adaRMS norm."""
        angles = time[:, None] * self.time_frequencies
        embedded = torch.cat([angles.sin(), angles.cos()], dim=1)
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedded))))

    def velocity(self, x: Tensor, condition: Tensor, cache: Cache, suffix: Suffix) -> Tensor:
        """State x [B, H, D] -> velocity [B, H, D]."""
        expert = self.paligemma_with_expert.gemma_expert.model
        return self.action_out_proj(expert(self.action_in_proj(x), condition, cache, suffix))  # type: ignore[no-any-return]

    def _advance(self, x: Tensor, time: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """One step of length dt = -1 / N; the time accumulates in float32, as in the reference."""
        dt = -1.0 / self.config.steps
        return x + dt * velocity, time + dt


class LoopedPi05(Pi05):
    """The same policy with the denoising steps in `while_loop`, counted by an integer."""

    def denoise(self, noise: Tensor, cache: Cache, suffix: Suffix) -> Tensor:
        steps = self.config.steps

        def unfinished(step: Tensor, x: Tensor, time: Tensor) -> Tensor:
            return step < steps

        def body(step: Tensor, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return (step + 1, *self.denoise_step(x, time, cache, suffix))

        result: Sequence[Tensor] = while_loop(  # type: ignore[no-untyped-call]
            unfinished, body, (self.first_step, noise, self.start_time)
        )
        return result[1]


def time_frequencies(width: int) -> Tensor:
    """[width / 2] float32, radians a unit of time: 2 pi / period, periods spaced geometrically.

    Computed in float64 and rounded once, as the reference does; that the graph then multiplies in float32 moves
    the actions by less than 1e-6 of their size.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device="cpu")
    period = TIME_MIN_PERIOD * (TIME_MAX_PERIOD / TIME_MIN_PERIOD) ** fraction
    return (2 * math.pi / period).to(torch.float32)


def _additive(valid: Tensor) -> Tensor:
    """Boolean mask -> 0 where true, `MASKED` where false, float32."""
    return torch.where(valid, 0.0, MASKED)


def parameter_shapes(config: Pi05Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, the two output heads that nothing uses included."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Pi05(config).state_dict().items()}


def torch_weights(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Weights as tensors for `load_state_dict(..., assign=True)`; what lies in a file stays mapped.

    The tensors share memory with the weights and must not be written to.
    """
    return {name: _tensor(weight.load()) for name, weight in weights.items()}


def _tensor(values: Array) -> Tensor:
    """torch has no way in for `ml_dtypes`, so bfloat16 goes through 16-bit integers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        if values.dtype == BFLOAT16:
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(values)


def load_policy(config: Pi05Config, weights: Mapping[str, Weight]) -> Pi05:
    """The policy with these weights; parameters that nothing uses may be absent.

    Raises:
        KeyError: a parameter that the computation reads is absent.
    """
    with torch.device("meta"):
        policy = Pi05(config)
    needed = set(weights) & set(policy.state_dict())
    result = policy.load_state_dict(
        torch_weights({name: weights[name] for name in needed}), assign=True, strict=False
    )
    if absent := [name for name in result.missing_keys if not name.endswith("lm_head.weight")]:
        raise KeyError(", ".join(absent))
    return policy.eval()


__all__ = [
    "Cache",
    "LoopedPi05",
    "Pi05",
    "Suffix",
    "Trace",
    "load_policy",
    "parameter_shapes",
    "rotary_frequencies",
    "time_frequencies",
    "torch_weights",
]
