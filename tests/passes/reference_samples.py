"""Calibration samples for the reference model."""

from __future__ import annotations

import numpy as np

from pi05c.graph.runner import Array

CASES = {"three_views": 1, "one_view_masked": 1, "batch_ragged": 2}
"""The cases of the reference model and their batch sizes."""

COUNT = 16
"""Observations of a set."""


def drawn_like_the_cases(seed: int, batch: int, count: int = COUNT) -> list[dict[str, Array]]:
    """Samples of the kind that the inputs of the cases are: images of uniform noise, absent views of zeros.

    Args:
        batch: observations in a sample.
        count: observations in all.
    """
    generator = np.random.default_rng([seed, batch])
    samples = []
    for index in range(count // batch):
        images = generator.uniform(-1, 1, (batch, 3, 3, 56, 56)).astype(np.float32)
        seen = np.ones((batch, 3), np.bool_)
        if index % 2:
            seen[generator.integers(batch), generator.integers(3)] = False
        images[~seen] = 0.0
        valid = np.arange(24) < generator.integers(7, 25, (batch, 1))
        samples.append(
            {
                "images": images,
                "image_masks": seen,
                "tokens": np.where(valid, generator.integers(1, 512, (batch, 24)), 0),
                "token_masks": valid,
                "noise": generator.standard_normal((batch, 10, 32), np.float32),
            }
        )
    return samples
