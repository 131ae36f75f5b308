"""Observations for calibration: what the policy's inputs are, reading and checking `.npz` files, making synthetic ones."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pi05c.frontend.config import Pi05Config
from pi05c.graph.errors import Pi05cError
from pi05c.graph.npz import read_npz, write_npz
from pi05c.graph.runner import Array

SYNTHETIC_MARK = "synthetic"
"""Name of the entry that says that samples are made up."""

SYNTHETIC_SAMPLES = 8

_BEGIN_TOKEN = 2
"""PaliGemma's beginning-of-sequence token; padding is 0."""

_COARSE_CELLS = 6
"""Side of the random grid that is interpolated to the low-frequency part of a synthetic image."""

_PIXEL_NOISE = 0.15
"""Standard deviation of the high-frequency part of a synthetic image."""


@dataclass(frozen=True)
class InputSpec:
    """One input of the policy."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def input_specs(config: Pi05Config) -> tuple[InputSpec, ...]:
    """The policy's inputs in the order of the graph's."""
    batch, size = config.batch, config.architecture.vision.image_size
    return (
        InputSpec("images", (batch, config.views, 3, size, size), np.dtype(np.float32)),
        InputSpec("image_masks", (batch, config.views), np.dtype(np.bool_)),
        InputSpec("tokens", (batch, config.prompt_length), np.dtype(np.int64)),
        InputSpec("token_masks", (batch, config.prompt_length), np.dtype(np.bool_)),
        InputSpec("noise", (batch, config.horizon, config.action_dim), np.dtype(np.float32)),
    )


def read_samples(paths: Sequence[Path], config: Pi05Config) -> dict[str, Array]:
    """Samples of all files, stacked along a new leading axis.

    Each file holds one sample (arrays of the inputs' shapes) or many (one more leading axis).

    Raises:
        Pi05cError: a file is unreadable, or an array is missing, unknown, of another shape or dtype, out of the
            vocabulary, not finite, or counts other samples than its neighbours.
    """
    specs = input_specs(config)
    parts = [_read_file(path, specs, config.architecture.llm.vocab_size) for path in paths]
    return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in specs}


def _read_file(path: Path, specs: Sequence[InputSpec], vocabulary: int) -> dict[str, Array]:
    arrays = read_npz(path)
    names = [spec.name for spec in specs]
    if missing := [name for name in names if name not in arrays]:
        raise Pi05cError(f"{path} lacks {', '.join(missing)}: calibration samples hold {', '.join(names)}")
    if unknown := [name for name in arrays if name not in (*names, SYNTHETIC_MARK)]:
        raise Pi05cError(f"{path} holds {', '.join(unknown)}, which the policy has no input for: remove them")
    samples: dict[str, Array] = {}
    for spec in specs:
        array = arrays[spec.name]
        if array.dtype != spec.dtype:
            raise Pi05cError(
                f"{spec.name} in {path} is {array.dtype}, but the policy's input is {spec.dtype}"
            )
        if array.shape == spec.shape:
            array = array[None]
        if array.shape[1:] != spec.shape or array.shape[0] == 0:
            raise Pi05cError(
                f"{spec.name} in {path} has shape {list(array.shape)}, but a sample has {list(spec.shape)} "
                "(or one more leading axis for many samples)"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Pi05cError(f"{spec.name} in {path} holds values that are not finite")
        samples[spec.name] = array
    if len({len(array) for array in samples.values()}) > 1:
        counts = ", ".join(f"{name} {len(array)}" for name, array in samples.items())
        raise Pi05cError(f"the arrays of {path} hold different numbers of samples: {counts}")
    tokens = samples["tokens"]
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise Pi05cError(
            f"tokens in {path} range from {tokens.min()} to {tokens.max()}, outside 0 to {vocabulary - 1}"
        )
    return samples


def synthetic_samples(config: Pi05Config, seed: int, count: int = SYNTHETIC_SAMPLES) -> dict[str, Array]:
    """Made-up samples by input name, with a leading axis of `count`; the same for the same seed.

    Images are smooth fields with pixel noise in [-1, 1]; every fourth observation lacks its last camera; prompts
    have between a quarter and all of their tokens, which begin with the BOS token; noise is Gaussian.
    """
    generator = np.random.default_rng(np.random.SeedSequence([seed, count]))
    shapes = {spec.name: (count, *spec.shape) for spec in input_specs(config)}
    images = _smooth_fields(generator, shapes["images"])
    image_masks = np.ones(shapes["image_masks"], np.bool_)
    if config.views > 1:
        image_masks[3::4, :, -1] = False
        images[3::4, :, -1] = -1.0  # what openpi feeds for an absent camera
    length = config.prompt_length
    valid = generator.integers(max(1, length // 4), length + 1, size=(count, config.batch, 1))
    token_masks = np.arange(length) < valid
    tokens = generator.integers(
        min(3, config.architecture.llm.vocab_size - 1), config.architecture.llm.vocab_size, shapes["tokens"]
    )
    tokens[..., 0] = min(_BEGIN_TOKEN, config.architecture.llm.vocab_size - 1)
    return {
        "images": images,
        "image_masks": image_masks,
        "tokens": np.where(token_masks, tokens, 0),
        "token_masks": token_masks,
        "noise": generator.standard_normal(shapes["noise"], np.float32),
    }


def _smooth_fields(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Bilinear interpolation of a coarse random grid, plus pixel noise; float32 in [-1, 1]."""
    size = shape[-1]
    coarse = generator.uniform(-1, 1, (*shape[:-2], _COARSE_CELLS, _COARSE_CELLS)).astype(np.float32)
    position = np.linspace(0, _COARSE_CELLS - 1, size)
    cell = np.minimum(position.astype(np.int64), _COARSE_CELLS - 2)
    weights = np.zeros((size, _COARSE_CELLS), np.float32)
    weights[np.arange(size), cell] = 1 - (position - cell)
    weights[np.arange(size), cell + 1] = position - cell
    fields = weights @ coarse @ weights.T + _PIXEL_NOISE * generator.standard_normal(shape, np.float32)
    return np.asarray(np.clip(fields, -1, 1), np.float32)


def write_samples(path: Path, samples: Mapping[str, Array], synthetic: bool) -> None:
    """Write samples by input name, marked where they are synthetic; the file appears whole or not at all."""
    arrays = dict(samples)
    if synthetic:
        arrays[SYNTHETIC_MARK] = np.array(True)
    write_npz(path, arrays)


def is_synthetic(path: Path) -> bool:
    """Whether a file of samples is marked as made up; False for anything that is no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{SYNTHETIC_MARK}.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


__all__ = [
    "SYNTHETIC_MARK",
    "SYNTHETIC_SAMPLES",
    "InputSpec",
    "input_specs",
    "is_synthetic",
    "read_samples",
    "synthetic_samples",
    "write_samples",
]
