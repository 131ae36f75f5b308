"""The torch model against the reference, and its parameter names and shapes at full size."""

from __future__ import annotations

import ast
import gzip
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the model needs the extra [torch]")

from pi05c.frontend.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from pi05c.frontend.config import CONFIGS  # noqa: E402
from pi05c.frontend.model import Pi05, Trace, load_policy, parameter_shapes  # noqa: E402
from pi05c.frontend.samples import input_specs  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
CASES = ("three_views", "one_view_masked", "batch_ragged")
TOLERANCE = 1e-4
"""Largest absolute difference to the reference."""


@pytest.fixture(scope="module", params=["pi05_tiny", "pi05_tiny_lerobot"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return open_checkpoint(DATA / request.param)


def policy_of(checkpoint: Checkpoint, batch: int) -> Pi05:
    return load_policy(checkpoint.config.with_options(prompt_length=24, batch=batch), checkpoint.weights)


def inputs_of(case: str, policy: Pi05) -> list[Tensor]:
    with np.load(DATA / f"pi05_tiny/{case}.inputs.npz") as archive:
        return [torch.from_numpy(archive[spec.name]) for spec in input_specs(policy.config)]


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_the_reference(checkpoint: Checkpoint, case: str) -> None:
    with np.load(DATA / f"pi05_tiny/{case}.float32.npz") as archive:
        expected = {name: archive[name] for name in archive.files}
    policy = policy_of(checkpoint, len(expected["actions"]))
    trace = policy.trace(*inputs_of(case, policy))
    assert {field.name for field in fields(Trace)} == set(expected)
    for name, reference in expected.items():
        computed = getattr(trace, name).numpy()
        if name in ("time", "time_cond"):  # the reference has one copy for each observation
            computed = np.repeat(computed[:, None], reference.shape[1], axis=1)
        assert computed.shape == reference.shape
        assert computed.dtype == np.float32
        assert np.abs(computed - reference).max() <= TOLERANCE, name


def test_forward_is_the_last_state_of_the_trace(checkpoint: Checkpoint) -> None:
    policy = policy_of(checkpoint, 1)
    inputs = inputs_of("three_views", policy)
    with torch.no_grad():
        assert torch.equal(policy(*inputs), policy.trace(*inputs).actions)


def test_masked_tokens_and_absent_cameras_do_not_matter(checkpoint: Checkpoint) -> None:
    policy = policy_of(checkpoint, 1)
    images, image_masks, tokens, token_masks, noise = inputs_of("one_view_masked", policy)
    assert not image_masks.all()
    assert not token_masks.all()
    other_images = torch.where(image_masks[:, :, None, None, None], images, 0.5)
    other_tokens = torch.where(token_masks, tokens, 7)
    assert not torch.equal(other_images, images)
    assert not torch.equal(other_tokens, tokens)
    with torch.no_grad():
        expected = policy(images, image_masks, tokens, token_masks, noise)
        changed = policy(other_images, image_masks, other_tokens, token_masks, noise)
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-6)


def test_the_condition_has_one_row_whatever_the_batch(checkpoint: Checkpoint) -> None:
    condition = policy_of(checkpoint, 2).time_condition(torch.ones(1))
    assert condition.shape == (1, checkpoint.config.architecture.expert.width)


def test_weights_stay_mapped_and_bfloat16(checkpoint: Checkpoint) -> None:
    policy = policy_of(checkpoint, 1)
    assert {parameter.dtype for parameter in policy.parameters() if not parameter.is_meta} == {torch.bfloat16}
    name = "action_in_proj.weight"
    assert np.shares_memory(
        policy.state_dict()[name].view(torch.int16).numpy(), checkpoint.weights[name].load().view(np.int16)
    )


def test_full_size_parameters_are_those_of_openpi() -> None:
    lines = gzip.decompress((DATA / "pi05_parameters.tsv.gz").read_bytes()).decode().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    expected = {row[0]: ast.literal_eval(row[1]) for row in rows}
    assert len(expected) == 813
    assert parameter_shapes(CONFIGS["pi05_base"]) == expected


def test_an_absent_weight_is_named(reference_dir: Path) -> None:
    checkpoint = open_checkpoint(reference_dir)
    weights = {name: weight for name, weight in checkpoint.weights.items() if name != "time_mlp_in.bias"}
    with pytest.raises(KeyError, match=r"time_mlp_in\.bias"):
        load_policy(checkpoint.config, weights)
