"""Configurations by name and from a checkpoint's config.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pi05c.frontend.config import CONFIGS, FULL, TINY, named_config, parse_config
from pi05c.graph.errors import Pi05cError, UsageError

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize(
    ("name", "horizon"),
    [
        ("pi05_base", 50),
        ("pi05_aloha", 50),
        ("pi05_droid", 15),
        ("pi05_droid_finetune", 16),
        ("pi05_libero", 10),
    ],
)
def test_released_configurations(name: str, horizon: int) -> None:
    config = named_config(name)
    assert config.horizon == horizon
    assert config.architecture == FULL
    assert config.prefix_length == 3 * 256 + 200


def test_both_spellings_describe_the_same_network() -> None:
    openpi = parse_config(json.loads((DATA / "pi05_tiny/config.json").read_text()), "a")
    lerobot = parse_config(json.loads((DATA / "pi05_tiny_lerobot/config.json").read_text()), "a")
    assert openpi.architecture == lerobot.architecture == TINY
    assert (openpi.action_dim, openpi.horizon) == (lerobot.action_dim, lerobot.horizon) == (32, 10)
    assert (openpi.prompt_length, lerobot.prompt_length) == (200, 24)
    assert (openpi.state_in_prompt, lerobot.state_in_prompt) == (None, True)


def test_the_small_configuration_has_the_sizes_of_the_reference(reference_dir: Path) -> None:
    fields = json.loads((reference_dir / "config.json").read_text())
    assert parse_config(fields, "pi05_tiny", CONFIGS["pi05_tiny"]) == CONFIGS["pi05_tiny"]


def test_lerobot_cameras_set_the_number_of_views() -> None:
    fields = {
        "type": "pi05",
        "input_features": {
            "observation.images.front": {"type": "VISUAL", "shape": [3, 256, 256]},
            "observation.state": {"type": "STATE", "shape": [8]},
        },
        "empty_cameras": 1,
    }
    assert parse_config(fields, "a").views == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"paligemma_variant": "gemma_9b"},
            r"unknown variants \(paligemma_variant 'gemma_9b'\).*gemma_2b, gemma_300m",
        ),
        ({"type": "pi0"}, "describes a pi0 model"),
        ({"pi05": False}, "describes a pi0 model"),
        ({"min_period": 0.001}, "min_period"),
        ({"action_horizon": "ten"}, "action_horizon .* is 'ten'"),
        ({"chunk_size": 0}, "chunk_size .* is 0"),
        ({"image_resolution": [336, 336]}, "336.*224 x 224"),
        ({"architecture": {"vision": {}}}, r"vision\.width: Field required"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Pi05cError, match=message):
        parse_config(fields, "folder")


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("expert", "depth", 2, "differ in depth"),
        ("expert", "num_kv_heads", 2, "differ in num_kv_heads"),
        ("llm", "head_dim", 33, "differ in head_dim; head_dim is odd"),
        ("llm", "num_heads", 0, "every size must be positive"),
        ("vision", "patch_size", 15, "not a multiple of patch_size"),
    ],
)
def test_contradicting_sizes_are_named(part: str, field: str, value: int, message: str) -> None:
    architecture = asdict(TINY)
    architecture[part][field] = value
    with pytest.raises(Pi05cError, match=message):
        parse_config({"architecture": architecture}, "folder")


def test_a_file_and_a_name_must_agree() -> None:
    fields = {"action_horizon": 10, "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    assert parse_config(fields, "a", CONFIGS["pi05_libero"]).state_in_prompt is False
    with pytest.raises(Pi05cError, match="horizon 10 instead of 15"):
        parse_config(fields, "a", CONFIGS["pi05_droid"])


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UsageError, match="pi05_libero"):
        named_config("pi06")


def test_options_replace_what_they_name() -> None:
    config = CONFIGS["pi05_libero"].with_options(batch=2, horizon=None, steps=4)
    assert (config.batch, config.horizon, config.steps) == (2, 10, 4)
    with pytest.raises(UsageError, match="prompt length is 0"):
        config.with_options(prompt_length=0)
