"""What a robot needs beside the network: normalization statistics, cameras, real dimensions, form of the prompt.

openpi keeps statistics in `assets/<asset id>/norm_stats.json`; LeRobot in the normalizer steps of
`policy_preprocessor.json` and `policy_postprocessor.json`, with tensors in safetensors files beside them, or in a
dataset's `stats.json`. Nothing here is computed: what the files do not say stays absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pi05c.frontend.config import camera_names, read_json
from pi05c.graph.errors import Pi05cError

if TYPE_CHECKING:
    from pi05c.frontend.checkpoint import Checkpoint

OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""openpi's `IMAGE_KEYS`: its policies stack their cameras in this order."""

_LEROBOT_PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")
_LEROBOT_STATISTICS = ("stats.json", "meta/stats.json")
_NORMALIZERS = ("normalizer_processor", "unnormalizer_processor")
_STATE_TOKENIZER = "pi05_prepare_state_tokenizer_processor_step"
"""LeRobot's registry names of the processor steps that matter here."""

_VECTORS = {"observation.state": "state", "action": "actions", "state": "state", "actions": "actions"}
"""Features whose statistics are kept, and openpi's name for each."""

_STATISTICS = ("mean", "std", "q01", "q99", "min", "max")


@dataclass(frozen=True)
class Robot:
    """What belongs to one robot and its data, as far as the checkpoint's files say.

    Attributes:
        framework: whose policy it is, `openpi` or `lerobot`: they scale images and states differently.
        cameras: names in the order of the views.
        state_dim: numbers in a real state, before padding.
        action_dim: numbers in a real action, before padding.
        state_in_prompt: whether the prompt spells out the discretized state.
        normalization: how each kind of feature is normalized (`quantiles`, `mean_std`, ...).
        statistics: by set (an openpi asset id, or `policy`), by vector (`state`, `actions`), by statistic.
        files: SHA-256 of each file this comes from, by its path inside the checkpoint.
    """

    framework: str | None = None
    cameras: tuple[str, ...] = ()
    state_dim: int | None = None
    action_dim: int | None = None
    state_in_prompt: bool | None = None
    normalization: Mapping[str, str] = field(default_factory=dict)
    statistics: Mapping[str, Mapping[str, Mapping[str, list[float]]]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """All fields as one JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Robot:
        """What `to_json` wrote, or an earlier version of it did.

        Raises:
            ValueError: it is no JSON object.
        """
        known = cls.__dataclass_fields__
        return cls(**{name: value for name, value in dict(json.loads(text)).items() if name in known})


def read_robot(checkpoint: Checkpoint) -> Robot:
    """Collect what the files of a checkpoint say about its robot.

    Raises:
        Pi05cError: a file that is there cannot be understood.
    """
    if "type" in checkpoint.fields or any(
        (checkpoint.folder / name).is_file() for name in _LEROBOT_PROCESSORS
    ):
        return _read_lerobot(checkpoint)
    return _read_openpi(checkpoint)


def _read_openpi(checkpoint: Checkpoint) -> Robot:
    assets = checkpoint.folder / "assets"
    statistics, files = {}, _Files(checkpoint.folder)
    for path in sorted(assets.rglob("norm_stats.json")):
        content = read_json(path)
        asset = path.parent.relative_to(assets).as_posix()
        statistics[asset] = statistics_of(content.get("norm_stats", content), path)
        files.add(path)
    files.add(checkpoint.folder / "config.json")
    views = checkpoint.config.views
    return Robot(
        framework="openpi",
        cameras=OPENPI_CAMERAS[:views] if views <= len(OPENPI_CAMERAS) else (),
        state_dim=_length(statistics, "state"),
        action_dim=_length(statistics, "actions"),
        state_in_prompt=checkpoint.config.state_in_prompt,
        normalization={"state": "quantiles", "actions": "quantiles"} if statistics else {},
        statistics=statistics,
        files=files.hashes,
    )


def _read_lerobot(checkpoint: Checkpoint) -> Robot:
    folder, fields = checkpoint.folder, checkpoint.fields
    files = _Files(folder)
    files.add(folder / "config.json")
    merged: dict[str, dict[str, list[float]]] = {}
    modes: dict[str, str] = dict(fields.get("normalization_mapping") or {})
    state_in_prompt = checkpoint.config.state_in_prompt
    for path in (folder / name for name in _LEROBOT_PROCESSORS):
        if not path.is_file():
            continue
        files.add(path)
        steps = read_json(path).get("steps") or []
        names = [step.get("registry_name") for step in steps]
        if path.name == _LEROBOT_PROCESSORS[0]:
            state_in_prompt = _STATE_TOKENIZER in names
        for step in steps:
            if step.get("registry_name") in _NORMALIZERS:
                modes.update(step.get("config", {}).get("norm_map") or {})
                if state_file := step.get("state_file"):
                    files.add(folder / state_file)
                    _merge(merged, _state_file(folder / state_file))
    for path in (folder / name for name in _LEROBOT_STATISTICS):
        if not merged and path.is_file():
            files.add(path)
            merged = statistics_of(read_json(path), path)
    return Robot(
        framework="lerobot",
        cameras=tuple(camera_names(fields)),
        state_dim=_feature(fields, "input_features", "observation.state")
        or _length({"policy": merged}, "state"),
        action_dim=_feature(fields, "output_features", "action") or _length({"policy": merged}, "actions"),
        state_in_prompt=state_in_prompt,
        normalization={
            vector: modes[kind].lower()
            for kind, vector in (("STATE", "state"), ("ACTION", "actions"))
            if kind in modes
        },
        statistics={"policy": merged} if merged else {},
        files=files.hashes,
    )


class _Files:
    """Hashes of files by their path inside a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hashes: dict[str, str] = {}

    def add(self, path: Path) -> None:
        from pi05c.frontend.checkpoint import file_sha256

        if path.is_file():
            self.hashes[path.relative_to(self.folder).as_posix()] = file_sha256(path)


def _state_file(path: Path) -> Iterator[tuple[str, str, list[float]]]:
    """Vector, statistic and numbers of each tensor in the state of a normalizer step (`action.q01`, ...)."""
    from pi05c.frontend.checkpoint import read_safetensors

    if not path.is_file():
        raise Pi05cError(f"{path} is missing: the checkpoint's processor takes its statistics from it")
    for name, weight in read_safetensors([path]).items():
        feature, _, statistic = name.rpartition(".")
        if feature in _VECTORS and statistic in _STATISTICS:
            yield _VECTORS[feature], statistic, np.asarray(weight.load(), np.float64).ravel().tolist()


def _merge(into: dict[str, dict[str, list[float]]], entries: Iterator[tuple[str, str, list[float]]]) -> None:
    for vector, statistic, numbers in entries:
        into.setdefault(vector, {})[statistic] = numbers


def statistics_of(content: Mapping[str, Any], path: Path) -> dict[str, dict[str, list[float]]]:
    """Statistics of states and actions from a JSON object {feature: {statistic: numbers}}."""
    try:
        return {
            _VECTORS[feature]: {
                name: np.asarray(numbers, np.float64).ravel().tolist()
                for name, numbers in statistics.items()
                if name in _STATISTICS and numbers is not None
            }
            for feature, statistics in content.items()
            if feature in _VECTORS
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise Pi05cError(f"{path} does not hold normalization statistics: {error}") from error


def _length(statistics: Mapping[str, Mapping[str, Mapping[str, list[float]]]], vector: str) -> int | None:
    """The dimension on which all sets of statistics agree, if they do."""
    lengths = {
        len(numbers) for vectors in statistics.values() for numbers in vectors.get(vector, {}).values()
    }
    return lengths.pop() if len(lengths) == 1 else None


def _feature(fields: Mapping[str, Any], group: str, name: str) -> int | None:
    shape = ((fields.get(group) or {}).get(name) or {}).get("shape")
    return int(shape[0]) if shape else None


__all__ = ["OPENPI_CAMERAS", "Robot", "read_robot", "statistics_of"]
