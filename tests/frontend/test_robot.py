"""What the robot needs beside the network, from the files of both kinds of checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="checkpoints are checked against the model, which needs [torch]")

from safetensors.torch import save_file  # noqa: E402

from pi05c.frontend.checkpoint import file_sha256, open_checkpoint  # noqa: E402
from pi05c.frontend.config import CONFIGS  # noqa: E402
from pi05c.frontend.robot import Robot, read_robot  # noqa: E402
from pi05c.graph.errors import Pi05cError  # noqa: E402

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def openpi(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "pi05_tiny", tmp_path / "c", ignore=shutil.ignore_patterns("*.npz"))
    assets = tmp_path / "c/assets/lab/arm"
    assets.mkdir(parents=True)
    vector = {"mean": [0.0] * 7, "std": [1.0] * 7, "q01": [-1.5] * 7, "q99": [1.5] * 7}
    state = {name: [*numbers, 0.25] for name, numbers in vector.items()}
    (assets / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": state, "actions": vector}}))
    return tmp_path / "c"


@pytest.fixture
def lerobot(tmp_path: Path) -> Path:
    folder = tmp_path / "c"
    shutil.copytree(DATA / "pi05_tiny_lerobot", folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["input_features"] = {
        "observation.images.top": {"type": "VISUAL", "shape": [3, 56, 56]},
        "observation.images.wrist": {"type": "VISUAL", "shape": [3, 56, 56]},
        "observation.state": {"type": "STATE", "shape": [8]},
    }
    config["output_features"] = {"action": {"type": "ACTION", "shape": [7]}}
    config["empty_cameras"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    state_file = "policy_preprocessor_step_2_normalizer_processor.safetensors"
    steps = [
        {"registry_name": "rename_observations_processor", "config": {}},
        {
            "registry_name": "normalizer_processor",
            "config": {"norm_map": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}},
            "state_file": state_file,
        },
        {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}},
    ]
    (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    save_file(
        {
            "observation.state.q01": torch.full((8,), -2.0),
            "action.q99": torch.arange(7.0),
            "observation.images.top.mean": torch.zeros(3, 1, 1),
        },
        folder / state_file,
    )
    return folder


def test_openpi_assets(openpi: Path) -> None:
    robot = read_robot(open_checkpoint(openpi, CONFIGS["pi05_tiny"]))
    assert robot.framework == "openpi"
    assert robot.cameras == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    assert (robot.state_dim, robot.action_dim) == (8, 7)
    assert robot.normalization == {"state": "quantiles", "actions": "quantiles"}
    assert robot.statistics["lab/arm"]["actions"]["q99"] == [1.5] * 7
    path = "assets/lab/arm/norm_stats.json"
    assert robot.files[path] == file_sha256(openpi / path)


def test_lerobot_processors(lerobot: Path) -> None:
    checkpoint = open_checkpoint(lerobot)
    robot = read_robot(checkpoint)
    assert robot.framework == "lerobot"
    assert robot.cameras == ("top", "wrist", "empty_camera_0")
    assert checkpoint.config.views == 3
    assert (robot.state_dim, robot.action_dim) == (8, 7)
    assert robot.state_in_prompt is True
    assert robot.normalization == {"state": "quantiles", "actions": "quantiles"}
    assert robot.statistics == {
        "policy": {"state": {"q01": [-2.0] * 8}, "actions": {"q99": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}}
    }
    assert set(robot.files) == {
        "config.json",
        "policy_preprocessor.json",
        "policy_preprocessor_step_2_normalizer_processor.safetensors",
    }


def test_lerobot_dataset_statistics(lerobot: Path) -> None:
    (lerobot / "policy_preprocessor.json").unlink()
    (lerobot / "meta").mkdir()
    (lerobot / "meta/stats.json").write_text(json.dumps({"action": {"mean": [0.5] * 7, "count": [3]}}))
    robot = read_robot(open_checkpoint(lerobot))
    assert robot.statistics == {"policy": {"actions": {"mean": [0.5] * 7}}}


def test_absent_files_leave_things_open(reference_dir: Path) -> None:
    robot = read_robot(open_checkpoint(reference_dir))
    assert (robot.state_dim, robot.action_dim, robot.state_in_prompt, robot.statistics) == (
        None,
        None,
        None,
        {},
    )
    assert json.loads(robot.to_json())["files"] == {"config.json": file_sha256(reference_dir / "config.json")}


def test_a_missing_state_file_is_named(lerobot: Path) -> None:
    name = "policy_preprocessor_step_2_normalizer_processor.safetensors"
    (lerobot / name).unlink()
    with pytest.raises(Pi05cError, match=name):
        read_robot(open_checkpoint(lerobot))


def test_damaged_statistics_are_named(openpi: Path) -> None:
    (openpi / "assets/lab/arm/norm_stats.json").write_text('{"norm_stats": {"state": {"mean": ["x"]}}}')
    with pytest.raises(Pi05cError, match=r"norm_stats\.json does not hold normalization statistics"):
        read_robot(open_checkpoint(openpi))


def test_json_round_trip() -> None:
    robot = Robot(framework="openpi", cameras=("a",), state_in_prompt=True)
    assert json.loads(robot.to_json())["cameras"] == ["a"]
    assert Robot.from_json(robot.to_json()).to_json() == robot.to_json()
    assert Robot.from_json('{"state_dim": 3, "of_later": 1}') == Robot(state_dim=3)
