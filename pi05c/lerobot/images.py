"""Images as pi0.5 takes them: scaled to fit a square, padded, in [-1, 1]."""

from __future__ import annotations

import numpy as np

from pi05c.graph.runner import Array

FRAMEWORKS = ("openpi", "lerobot", "lerobot-0.4")
"""Whose preprocessing there is; the last as it was before LeRobot 0.5."""


def image_input(image: Array, size: int, framework: str) -> Array:
    """One view, float32 [3, size, size].

    openpi resizes with Pillow, which averages over what a pixel covers, and rounds to 8 bits. LeRobot interpolates in
    float32 between the four nearest pixels (torch's `interpolate`, bilinear). LeRobot 0.4 padded before the range became
    [-1, 1], with what is -3 after that.

    Args:
        image: uint8 [height, width, 3].
        framework: one of `FRAMEWORKS`.
    """
    height, width = image.shape[:2]
    ratio = max(width / size, height / size)
    new_height, new_width = int(height / ratio), int(width / ratio)
    if (height, width) == (size, size):
        scaled = image.astype(np.float32) / 255
    elif framework == "openpi":
        from PIL import Image

        resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
        scaled = np.asarray(resized).astype(np.float32) / 255
    else:
        rows = _interpolated(image.astype(np.float32) / 255, new_height)
        scaled = _interpolated(rows.transpose(1, 0, 2), new_width).transpose(1, 0, 2)
    square = np.full((size, size, 3), -1 if framework == "lerobot-0.4" else 0, np.float32)
    top, left = (size - scaled.shape[0]) // 2, (size - scaled.shape[1]) // 2
    square[top : top + scaled.shape[0], left : left + scaled.shape[1]] = scaled
    return np.ascontiguousarray((square * 2 - 1).transpose(2, 0, 1))


def _interpolated(values: Array, count: int) -> Array:
    """`count` rows between those of `values`, pixel centres at halves, the outermost rows repeated."""
    place = (np.arange(count, dtype=np.float32) + 0.5) * np.float32(len(values) / count) - np.float32(0.5)
    place = np.maximum(place, 0)
    lower = place.astype(np.int64)
    upper = np.minimum(lower + 1, len(values) - 1)
    weight = (place - lower).astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
    return np.asarray(values[lower] * (1 - weight) + values[upper] * weight)


__all__ = ["FRAMEWORKS", "image_input"]
