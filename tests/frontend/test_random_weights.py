"""Random weights: a function of seed, name and position, with the spread of a trained model's."""

from __future__ import annotations

import numpy as np
import pytest

from pi05c.frontend.random_weights import RandomWeight, random_weights
from pi05c.graph import weights as storage

MATRIX = "paligemma_with_expert.paligemma.model.language_model.layers.1.mlp.gate_proj.weight"
SIBLING = MATRIX.replace("gate_proj", "up_proj")
EXPERT = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.gate_proj.weight"
CONVOLUTION = (
    "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.patch_embedding.weight"
)


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16)


@pytest.mark.parametrize(
    ("name", "shape"), [(MATRIX, (101, 37)), (CONVOLUTION, (10, 3, 5, 5)), ("a.bias", (77,))]
)
def test_regions_are_parts_of_the_whole(name: str, shape: tuple[int, ...]) -> None:
    whole = RandomWeight(name, shape, 3).load()
    assert whole.shape == shape
    weight = RandomWeight(name, shape, 3)
    for start in (0, 3, shape[0] - 1):
        region = (slice(start, shape[0]), *(slice(1, dim - 1) for dim in shape[1:]))
        assert np.array_equal(bits(weight.read(region)), bits(np.ascontiguousarray(whole[region])))


def test_chunks_join_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = RandomWeight(MATRIX, (101, 37), 0)
    expected = weight.load()
    monkeypatch.setattr(storage, "CHUNK_BYTES", 500)
    chunks = list(weight.chunks())
    assert len(chunks) > 10
    assert np.array_equal(bits(np.concatenate(chunks)), bits(expected))


def test_seed_and_name_decide() -> None:
    shapes = {MATRIX: (64, 64), SIBLING: (64, 64)}
    first, again, other = random_weights(shapes, 0), random_weights(shapes, 0), random_weights(shapes, 1)
    assert first[MATRIX].checksum() == again[MATRIX].checksum()
    assert first[MATRIX].checksum() != other[MATRIX].checksum()
    assert first[MATRIX].checksum() != first[SIBLING].checksum()


def test_values_are_fixed_for_good() -> None:
    """A model made with a seed today is the same model tomorrow."""
    assert RandomWeight(MATRIX, (64, 64), 0).checksum().startswith("60d818c42ac610bc")


def outliers(name: str, width: int) -> set[int]:
    deviation = RandomWeight(name, (512, width), 0).load().astype(np.float32).std(axis=0)
    return set(np.flatnonzero(deviation > 3 * np.median(deviation)).tolist())


def test_layers_that_read_the_same_share_outlier_channels() -> None:
    assert len(outliers(MATRIX, 256)) == 4
    assert outliers(MATRIX, 256) == outliers(SIBLING, 256)
    assert outliers(EXPERT, 256) == set()


def test_layers_and_rows_have_scales_of_their_own() -> None:
    gains = [
        RandomWeight(EXPERT.replace(".1.", f".{layer}."), (256, 256), 0).load().astype(np.float32).std() * 16
        for layer in range(18)
    ]
    assert 0.5 < min(gains) < 0.9 < 1.2 < max(gains) < 2
    rows = RandomWeight(EXPERT, (256, 256), 0).load().astype(np.float32).std(axis=1)
    assert rows.max() > 1.7 * rows.min()


def test_tails_are_heavier_than_gaussian() -> None:
    values = RandomWeight("time_mlp_in.bias", (200_000,), 0).load().astype(np.float64)
    standard = (values - values.mean()) / values.std()
    assert values.std() == pytest.approx(0.05, rel=0.01)
    assert (standard**4).mean() - 3 == pytest.approx(1.45, abs=0.1)
