"""The plain policy with random weights, in float32 or BF16: what other implementations are measured against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pi05c.frontend import model
from pi05c.frontend.config import Pi05Config
from pi05c.frontend.model import Pi05


def random_policy(config: Pi05Config, device: str | torch.device, seed: int = 0) -> Pi05:
    """The plain policy with normal weights of mean square 1 / inputs, made on `device`; heads that nothing uses left out."""
    with torch.device("meta"):
        policy = Pi05(config)
    both = policy.paligemma_with_expert
    both.paligemma.lm_head = both.gemma_expert.lm_head = nn.Identity()  # type: ignore[assignment]
    generator = torch.Generator(device).manual_seed(seed)

    def draw(shape: torch.Size) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return (values / math.sqrt(math.prod(shape[1:]) or 1)).to(torch.bfloat16)

    weights = {name: draw(parameter.shape) for name, parameter in policy.named_parameters()}
    policy.load_state_dict(weights, assign=True, strict=False)
    return policy.to(device).eval()


def half_precision(policy: Pi05) -> Pi05:
    """The same policy computing in BF16: its functions on tensors cast there, state and time in float32."""
    language = policy.paligemma_with_expert.paligemma.model.language_model
    language.__class__, language.embed_tokens.__class__ = _HalfLanguageModel, _HalfEmbedding
    policy.__class__ = _HalfPi05
    return policy


def _half(items: Sequence[Any]) -> list[Any]:
    return [item.to(torch.bfloat16) for item in items]


class _HalfEmbedding(model.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class _HalfLanguageModel(model.LanguageModel):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> model.Cache:
        return super().forward(x, *_half([cos, sin, mask]))


class _HalfPi05(Pi05):
    def embed_images(self, images: Tensor) -> Tensor:
        return super().embed_images(images.to(torch.bfloat16))

    def read_prefix(self, *arguments: Tensor) -> tuple[model.Cache, model.Suffix]:
        cache, suffix = super().read_prefix(*arguments)
        return cache, model.Suffix(*_half(suffix))

    def time_condition(self, time: Tensor) -> Tensor:
        return super().time_condition(time).to(torch.bfloat16)

    def velocity(self, x: Tensor, *arguments: Any) -> Tensor:
        return super().velocity(x.to(torch.bfloat16), *arguments).to(torch.float32)


__all__ = ["half_precision", "random_policy"]
