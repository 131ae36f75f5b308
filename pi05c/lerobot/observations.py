"""Samples of a policy's graph from the frames of a LeRobot dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pi05c.backend.signature import TensorSpec
from pi05c.frontend.export import CONFIG_KEY, ROBOT_KEY
from pi05c.frontend.robot import Robot
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.io import Model, load
from pi05c.graph.runner import Array
from pi05c.lerobot.dataset import CAMERA_PREFIX, Frame, LeRobotDataset
from pi05c.lerobot.images import FRAMEWORKS, image_input
from pi05c.lerobot.prompt import load_tokenizer, padded, prompt_state, prompt_tokens
from pi05c.samples import HELD_BACK_FRACTION, RANDOM_WEIGHTS, WEIGHTS_KEY, fixed_specs, input_specs

FRAMES = 32
"""So many samples are made of a dataset where no number is given."""

_TAKEN = ("images", "image_masks", "tokens", "token_masks", "noise")


class Observations:
    """Samples of a graph, made one by one of frames that are spread evenly over a dataset's episodes.

    The frames are the same each time. Their order puts every fourth behind the others: those are held back for
    verification, and are spread as evenly. Noise is drawn from a normal distribution, seeded by the frame's number.

    Attributes:
        source: the name of the dataset's folder.
        notes: what was decided, in sentences for the user.
    """

    def __init__(
        self,
        dataset: Path | str,
        model: Path | str,
        *,
        tokenizer: Path | str,
        cameras: Mapping[str, str] | None = None,
        frames: int | None = None,
        preprocess: str | None = None,
    ) -> None:
        """Read what the dataset and the model say; frames are read when samples are asked for.

        Args:
            dataset: the folder.
            model: the graph that `pi05c export` wrote.
            tokenizer: PaliGemma's: a sentencepiece `.model`, a `tokenizer.json`, or a folder that holds either.
            cameras: the dataset's camera of a view, where they do not have the same name. A view is called as in the
                checkpoint, or by its number where that names none.
            frames: how many samples; None for 32, or all where there are fewer.
            preprocess: `openpi`, `lerobot`, or `lerobot-0.4` for policies trained before LeRobot 0.5; None for that of
                the checkpoint, or `lerobot` where the model was made of none.

        Raises:
            Pi05cError: dataset, model or tokenizer cannot be used, or they do not belong together.
            UsageError: `cameras`, `frames` or `preprocess` name what there is not.
        """
        self._dataset = LeRobotDataset(Path(dataset))
        self.source = Path(dataset).resolve().name
        self._model = load(Path(model))
        self._specs = _specs(self._model)
        self._tokenizer = load_tokenizer(Path(tokenizer))
        self._robot = _robot(self._model)
        self._framework = preprocess or self._robot.framework or _without_framework(self._model)
        if self._framework not in FRAMEWORKS:
            raise UsageError(f"--preprocess {self._framework} is unknown: give {', '.join(FRAMEWORKS)}")
        self._vocabulary = _vocabulary(self._model)
        self._batch, views, _, self._size, _ = self._fixed("images", 5)
        _, self._length = self._fixed("tokens", 2)
        self._cameras = self._assigned(views, cameras or {})
        self._wanted = tuple(dict.fromkeys(camera for camera in self._cameras if camera is not None))
        self._places = _places(len(self._dataset), frames, self._batch)
        how = self._robot.normalization.get("state", "quantiles")
        self._how, (self._statistics, self._where) = how, self._chosen_statistics(how)
        self.notes = self._told(views)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._places)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        """Samples by input name.

        Raises:
            Pi05cError: a file is broken, or a prompt is too long for the model.
        """
        for places in self._places:
            parts = [self._observation(self._dataset.frame(place, self._wanted)) for place in places]
            yield {
                name: np.stack([part[name] for part in parts]).astype(spec.dtype, copy=False)
                for name, spec in self._specs.items()
            }

    def _observation(self, frame: Frame) -> dict[str, Array]:
        """Arrays of one frame, without the batch."""
        which = f"frame {frame.index} of {self._dataset.folder}"
        state = None
        if self._robot.state_in_prompt is not False:
            state = prompt_state(frame.state, self._statistics, self._how, self._framework, self._where)
        ids = prompt_tokens(self._tokenizer, frame.task, state)
        if self._vocabulary is not None and max(ids) >= self._vocabulary:
            raise Pi05cError(
                f"the prompt of {which} has the token {max(ids)}, but the model knows {self._vocabulary}: give the "
                "tokenizer that it was trained with"
            )
        tokens, token_masks = padded(ids, self._length, which, frame.task)
        absent = np.full((3, self._size, self._size), -1, np.float32)
        made = {
            "images": np.stack(
                [
                    absent
                    if camera is None
                    else image_input(frame.images[camera], self._size, self._framework)
                    for camera in self._cameras
                ]
            ),
            "image_masks": np.array([camera is not None for camera in self._cameras]),
            "tokens": tokens,
            "token_masks": token_masks,
        }
        if "noise" in self._specs:
            _, *shape = self._fixed("noise", 3)
            made["noise"] = np.random.default_rng(frame.index).standard_normal(shape, np.float32)
        return made

    def _fixed(self, name: str, rank: int) -> tuple[int, ...]:
        """The sizes of an input."""
        spec = self._specs.get(name)
        sizes = () if spec is None else tuple(size for size in spec.shape if isinstance(size, int))
        if len(sizes) != rank or (spec is not None and len(spec.shape) != rank):
            raise Pi05cError(
                f"{self._model.path} does not take {name} of {rank} fixed sizes: samples of a dataset are made for graphs "
                "of pi05c export"
            )
        return sizes

    def _assigned(self, views: int, given: Mapping[str, str]) -> tuple[str | None, ...]:
        """The dataset's camera of each view; None where it has none."""
        names = self._views(views)
        found = {_short(camera): camera for camera in self._dataset.cameras}
        here = ", ".join(found) or "none"
        for view, camera in given.items():
            if view not in names:
                raise UsageError(
                    f"--camera {view}={camera}: the model has no view {view!r}, it has {', '.join(names)}"
                )
            if _short(camera) not in found:
                raise UsageError(f"--camera {view}={camera}: the dataset has no such camera, it has {here}")
        chosen = [found.get(_short(given.get(name, name))) for name in names]
        if not any(chosen):
            raise Pi05cError(
                f"no camera of {self._dataset.folder} ({here}) is called as a view of the model ({', '.join(names)}): say "
                "which is which with --camera VIEW=CAMERA"
            )
        return tuple(chosen)

    def _views(self, count: int) -> tuple[str, ...]:
        """Names of the views, or their numbers where the checkpoint names other ones."""
        names = self._robot.cameras
        return names if len(names) == count else tuple(str(number) for number in range(count))

    def _chosen_statistics(self, how: str) -> tuple[Mapping[str, Sequence[float]], str]:
        """The statistics of the policy where it has one set, else of the dataset; and what to call them."""
        if self._robot.state_in_prompt is False or how == "identity":
            return {}, "no statistics"
        sets = [vectors["state"] for vectors in self._robot.statistics.values() if "state" in vectors]
        if len(sets) == 1:
            return sets[0], "the statistics of the checkpoint"
        return self._dataset.statistics, f"the statistics of {self._dataset.folder}"

    def _told(self, views: int) -> list[str]:
        total, batch = sum(len(places) for places in self._places), self._batch
        names = self._views(views)
        seen = [
            f"{name} {'masked' if camera is None else f'sees {_short(camera)}'}"
            for name, camera in zip(names, self._cameras, strict=True)
        ]
        unused = [_short(camera) for camera in self._dataset.cameras if camera not in self._wanted]
        return [
            f"{self.source}: {total} of {len(self._dataset)} frames in {self._dataset.episodes} episodes"
            + (f", {batch} a sample" if batch > 1 else "")
            + f", preprocessed as {self._framework} does",
            f"cameras: {', '.join(seen)}" + (f"; not used: {', '.join(unused)}" if unused else ""),
            "states: not in the prompt"
            if self._robot.state_in_prompt is False
            else f"states: normalized by {self._where} ({self._how})",
        ]


def _specs(model: Model) -> dict[str, TensorSpec]:
    """Inputs of the graph, and those that it had before it was specialized."""
    specs = {spec.name: spec for spec in (*input_specs(model), *fixed_specs(model))}
    if unknown := [name for name in specs if name not in _TAKEN]:
        raise Pi05cError(
            f"{model.path} takes {unknown[0]!r}, which no dataset gives: samples of one are made for graphs of pi05c export, "
            f"which take {', '.join(_TAKEN)}"
        )
    return specs


def _robot(model: Model) -> Robot:
    text = model.metadata.get(ROBOT_KEY)
    try:
        return Robot() if text is None else Robot.from_json(text)
    except (TypeError, ValueError) as error:
        raise Pi05cError(
            f"the entry {ROBOT_KEY!r} of {model.path} is broken: export the model again"
        ) from error


def _without_framework(model: Model) -> str:
    """Whose preprocessing a graph gets that names none: LeRobot's, as the dataset is, unless a checkpoint had its own."""
    if model.metadata.get(WEIGHTS_KEY, RANDOM_WEIGHTS) != RANDOM_WEIGHTS:
        raise UsageError(
            f"{model.path} does not say whose checkpoint it was made of: export it again, or give --preprocess openpi or "
            "lerobot"
        )
    return "lerobot"


def _vocabulary(model: Model) -> int | None:
    try:
        return int(json.loads(model.metadata[CONFIG_KEY])["architecture"]["llm"]["vocab_size"])
    except (KeyError, TypeError, ValueError):
        return None


def _short(camera: str) -> str:
    return camera.removeprefix(CAMERA_PREFIX)


def _places(total: int, frames: int | None, batch: int) -> list[list[int]]:
    """Places of the frames of each sample: evenly spread, every fourth sample behind the others."""
    count = min(FRAMES, total // batch) if frames is None else frames
    if not 1 <= count * batch <= total:
        raise UsageError(
            f"{count or frames or 1} samples of {batch} frame{'s' if batch > 1 else ''} cannot be made of {total}: give "
            f"--frames from 1 to {total // batch}"
        )
    spread = [(2 * number + 1) * total // (2 * count * batch) for number in range(count * batch)]
    samples = [spread[number * batch : (number + 1) * batch] for number in range(count)]
    last = HELD_BACK_FRACTION - 1
    return [
        sample
        for _, sample in sorted(enumerate(samples), key=lambda each: each[0] % HELD_BACK_FRACTION == last)
    ]


__all__ = ["FRAMES", "Observations"]
