"""A random pi0.5 that is wide enough for the outliers that real language models have, generated from a seed.

    python benchmarks/wide_model.py FOLDER [--seed N]

Random weights alone give activations that are nearly Gaussian, which any number format takes well. What trained
language models have beside that, and what a recipe must survive, is put in by hand, in the plain graph's own weights:

- Outlier channels: the gain 1 + w of a norm is large in a few channels, the same in all layers, so that what the linears
  behind it multiply has channels far beyond the others (Dettmers et al., LLM.int8(), arXiv:2208.07339; SmoothQuant,
  arXiv:2211.10438). The columns that read them are smaller by the root of that gain.
- Massive activations: a few channels of the residual stream are large at every token from the embedding on (Sun et al.,
  arXiv:2402.17762).
- Outliers inside the MLPs: a few rows of `up_proj` are large, and the columns of `down_proj` that read them smaller by
  the root of that.

`RandomWeight` draws the rest: heavy tails, gains that differ from layer to layer and channel to channel.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.frontend.config import Architecture, GemmaSizes, LanguageSizes, Pi05Config, VisionSizes
from pi05c.frontend.export import export_model
from pi05c.graph.io import load, save
from pi05c.graph.runner import Array
from pi05c.graph.weights import InMemory, weight_of

ARCHITECTURE = Architecture(
    VisionSizes(width=192, depth=4, mlp_dim=768, num_heads=4, image_size=56, patch_size=14),
    LanguageSizes(
        width=512, depth=8, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64, vocab_size=2048
    ),
    GemmaSizes(width=256, depth=8, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=64),
)

HORIZON, PROMPT_LENGTH = 10, 24

OUTLIER_SHARE = 1 / 64
"""Share of the channels behind a norm, and inside an MLP, that are outliers."""

LARGEST_GAIN = 24.0
"""Gains of outlier channels are drawn between 4 and this, evenly in the logarithm."""

MASSIVE_CHANNELS = 2
MASSIVE_FACTOR = 12.0
"""How many channels of the residual stream are massive, and by how much."""

_LLM = "paligemma_with_expert.paligemma.model.language_model"
_PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"


def write_wide_model(folder: Path, seed: int = 0) -> tuple[Path, Pi05Config]:
    """Write `wide.onnx` with its weights and made-up samples into `folder`, the same for the same seed."""
    path = folder / "wide.onnx"
    fields = {
        "action_horizon": HORIZON,
        "max_token_len": PROMPT_LENGTH,
        "architecture": asdict(ARCHITECTURE),
    }
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "wide.json"
        config.write_text(json.dumps(fields))
        resolved = export_model(None, path, config=str(config), random=True, seed=seed).config
    model = load(path)
    weights = {tensor.name: tensor for tensor in _constants(model.graph)}
    for name, values in _with_outliers({name: weights[name] for name in weights}, seed).items():
        dtype = weight_of(weights[name]).dtype
        weights[name].values = InMemory(values.astype(dtype))
    save(model, path)
    return path, resolved


def _constants(graph: gs.Graph) -> list[gs.Constant]:
    found = {id(t): t for t in graph.tensors().values() if isinstance(t, gs.Constant)}
    for body in graph.subgraphs(recursive=True):
        found |= {id(t): t for t in body.tensors().values() if isinstance(t, gs.Constant)}
    return list(found.values())


def _with_outliers(weights: dict[str, gs.Constant], seed: int) -> dict[str, Array]:
    """The weights that change, in float32."""
    changed: dict[str, Array] = {}

    def values(name: str) -> Array:
        if name not in changed:
            changed[name] = weight_of(weights[name]).load().astype(np.float32)
        return changed[name]

    def scale(name: str, index: Any, by: Array | float) -> None:
        if name in weights:  # the last layer of the language model makes keys and values alone
            values(name)[index] *= by

    generator = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    sizes = ARCHITECTURE.llm
    channels = generator.permutation(sizes.width)
    outliers = channels[: max(1, round(sizes.width * OUTLIER_SHARE))]
    massive = channels[-MASSIVE_CHANNELS:]
    for name in (f"{_LLM}.embed_tokens.weight", f"{_PROJECTOR}.weight", f"{_PROJECTOR}.bias"):
        axis = (..., massive) if "embed" in name else (massive,)
        scale(name, axis, MASSIVE_FACTOR)
    for layer in range(sizes.depth):
        place = f"{_LLM}.layers.{layer}"
        for norm, readers in (
            ("input_layernorm", [f"self_attn.{each}_proj" for each in "qkv"]),
            ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            gains = _gains(generator, len(outliers))
            name = f"{place}.{norm}.weight"
            if name in weights:
                values(name)[outliers] = gains - 1  # Gemma multiplies by 1 + w
            for reader in readers:
                scale(f"{place}.{reader}.weight", (slice(None), outliers), gains**-0.5)
        inner = generator.permutation(sizes.mlp_dim)[: round(sizes.mlp_dim * OUTLIER_SHARE)]
        gains = _gains(generator, len(inner))
        scale(f"{place}.mlp.up_proj.weight", (inner,), gains[:, None])
        scale(f"{place}.mlp.down_proj.weight", (slice(None), inner), gains**-0.5)
    return changed


def _gains(generator: np.random.Generator, count: int) -> Array:
    return np.exp(generator.uniform(np.log(4), np.log(LARGEST_GAIN), count)).astype(np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_wide_model(arguments.folder, arguments.seed)[0])
