"""Calibration samples: checked when given, reproducible when made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pi05c.frontend.config import CONFIGS
from pi05c.frontend.samples import (
    input_specs,
    is_synthetic,
    read_samples,
    synthetic_samples,
    write_samples,
)
from pi05c.graph.errors import Pi05cError

CONFIG = CONFIGS["pi05_tiny"]


def test_synthetic_samples_fit_the_inputs() -> None:
    samples = synthetic_samples(CONFIG, 0, 8)
    for spec in input_specs(CONFIG):
        assert samples[spec.name].shape == (8, *spec.shape)
        assert samples[spec.name].dtype == spec.dtype
    images, masks = samples["images"], samples["token_masks"]
    assert np.abs(images).max() <= 1
    assert 0.2 < images.std() < 0.8
    assert np.unique(masks.sum(-1)).size > 3, "prompts of several lengths"
    assert (np.diff(masks.astype(int), axis=-1) <= 0).all(), "padding comes last"
    assert (samples["tokens"][~masks] == 0).all()
    assert samples["tokens"].max() < CONFIG.architecture.llm.vocab_size
    assert not samples["image_masks"].all()
    assert samples["image_masks"][..., 0].all()


def test_images_have_structure() -> None:
    images = synthetic_samples(CONFIG, 0, 4)["images"]
    assert np.abs(np.diff(images, axis=-1)).mean() < images.std()


def test_the_seed_decides() -> None:
    first, again, other = (synthetic_samples(CONFIG, seed, 2) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["noise"], other["noise"])


def test_one_sample_and_many_join(tmp_path: Path, reference_dir: Path) -> None:
    many = tmp_path / "many.npz"
    write_samples(many, synthetic_samples(CONFIG, 0, 3), synthetic=True)
    joined = read_samples([reference_dir / "three_views.inputs.npz", many], CONFIG)
    assert {name: len(array) for name, array in joined.items()} == dict.fromkeys(joined, 4)
    assert is_synthetic(many)
    assert not is_synthetic(reference_dir / "three_views.inputs.npz")
    assert not is_synthetic(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": None}, "lacks noise"),
        ({"state": np.zeros(3)}, "holds state, which the policy has no input for"),
        ({"tokens": np.zeros((1, 24), np.int32)}, "tokens .* is int32, but the policy's input is int64"),
        (
            {"tokens": np.zeros((1, 25), np.int64)},
            r"tokens .* has shape \[1, 25\], but a sample has \[1, 24\]",
        ),
        ({"tokens": np.full((1, 24), 512)}, "512, outside 0 to 511"),
        ({"noise": np.full((1, 10, 32), np.nan, np.float32)}, "noise .* not finite"),
        ({"noise": np.zeros((2, 1, 10, 32), np.float32)}, "different numbers of samples: .*noise 2"),
        ({"noise": np.zeros((0, 1, 10, 32), np.float32)}, r"noise .* has shape \[0, 1, 10, 32\]"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, reference_dir: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    with np.load(reference_dir / "three_views.inputs.npz") as archive:
        arrays = {**archive, **change}
    path = tmp_path / "given.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(Pi05cError, match=message):
        read_samples([path], CONFIG)


def test_what_is_no_archive_of_arrays_is_refused(tmp_path: Path) -> None:
    text, pickled = tmp_path / "text.npz", tmp_path / "pickled.npz"
    text.write_text("hello")
    np.savez(pickled, images=np.array([{}], dtype=object))
    for path, said in ((text, r"cannot be read as an \.npz file"), (pickled, "holds pickled Python objects")):
        with pytest.raises(Pi05cError, match=said):
            read_samples([path], CONFIG)
    with pytest.raises(Pi05cError, match="cannot be read"):
        read_samples([tmp_path / "absent.npz"], CONFIG)
