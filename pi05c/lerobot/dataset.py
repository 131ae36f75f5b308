"""A LeRobot dataset of format v3 on the disk: its cameras, its statistics, and single frames of it.

pyarrow reads Parquet, Pillow images and PyAV videos. LeRobot itself is not needed: versions of it that read this format
ask for other versions of torch than the export does.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pi05c.frontend.config import read_json
from pi05c.frontend.robot import statistics_of
from pi05c.graph.errors import Pi05cError, unreadable
from pi05c.graph.requirements import refuse_unsupported
from pi05c.graph.runner import Array
from pi05c.samples import LEROBOT_INFO

WITH_LEROBOT = "pi05c[lerobot]"

CAMERA_PREFIX = "observation.images."
"""What LeRobot's name of a camera begins with."""

_STATE = "observation.state"
_STATISTICS = "meta/stats.json"
_TASKS = "meta/tasks.parquet"
_EPISODES = "meta/episodes"
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

_CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"


@dataclass(frozen=True)
class Frame:
    """What was observed at one moment.

    Attributes:
        index: its number in the dataset.
        task: what the robot was told.
        state: as recorded, float32 [numbers].
        images: uint8 [height, width, 3] by camera.
    """

    index: int
    task: str
    state: Array
    images: Mapping[str, Array]


@dataclass(frozen=True)
class _Episode:
    """Where the frames of an episode lie: their numbers, and the row of the episodes' table."""

    start: int
    stop: int
    row: Mapping[str, Any]


class LeRobotDataset:
    """A folder that LeRobot wrote.

    Attributes:
        folder: where it lies.
        cameras: names of its features that are colour images or videos.
    """

    def __init__(self, folder: Path) -> None:
        """Read what `meta/` says.

        Raises:
            Pi05cError: it is no dataset of format v3, a file of it is missing or broken, it lacks states, or the extra
                is not installed.
        """
        _require_extra()
        self.folder = folder
        info = read_json(folder / LEROBOT_INFO)
        _refuse_version(folder, info.get("codebase_version"))
        features = info.get("features")
        if not isinstance(features, dict) or not all(isinstance(entry, dict) for entry in features.values()):
            raise Pi05cError(f"{folder / LEROBOT_INFO} lists no features: fetch or record the dataset again")
        if _STATE not in features:
            raise Pi05cError(f"{folder} has no feature {_STATE!r}: pi0.5 reads the state of the robot there")
        self._videos = {
            name for name, entry in features.items() if entry.get("dtype") == "video" and not _is_depth(entry)
        }
        images = {
            name for name, entry in features.items() if entry.get("dtype") == "image" and not _is_depth(entry)
        }
        self.cameras = tuple(name for name in features if name in self._videos | images)
        self._data_path = info.get("data_path") or _DATA_PATH
        self._video_path = info.get("video_path") or _VIDEO_PATH
        rate = info.get("fps")
        if not isinstance(rate, (int, float)) or rate <= 0:
            raise Pi05cError(
                f"{folder / LEROBOT_INFO} states {rate!r} frames a second: fetch the dataset again"
            )
        self._tolerance = 0.5 / rate
        self._tasks = self._read_tasks()
        self._episodes = self._read_episodes()
        self._ends = np.cumsum([episode.stop - episode.start for episode in self._episodes]).tolist()

    def __len__(self) -> int:
        """Number of frames."""
        return int(self._ends[-1])

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self._episodes)

    @property
    def statistics(self) -> Mapping[str, Sequence[float]]:
        """Those of the state, by name (`q01`, `q99`, ...).

        Raises:
            Pi05cError: there are none.
        """
        path = self.folder / _STATISTICS
        if not path.is_file():
            raise Pi05cError(f"{path} is missing: states are normalized by the statistics in it")
        statistics = statistics_of(read_json(path), path)
        if "state" not in statistics:
            raise Pi05cError(f"{path} has no statistics of {_STATE!r}: states are normalized by them")
        return statistics["state"]

    def frame(self, place: int, cameras: Sequence[str]) -> Frame:
        """The frame at a place, counted over all episodes in order.

        Args:
            cameras: whose images are wanted.

        Raises:
            Pi05cError: a file is missing or broken, or the frame has no task or holds NaN or infinity.
        """
        number = bisect_right(self._ends, place)
        episode = self._episodes[number]
        index = episode.stop - (self._ends[number] - place)
        stored = [camera for camera in cameras if camera not in self._videos]
        path = self._path(self._data_path, episode, "data")
        names = ["index", "timestamp", "task_index", _STATE, *stored]
        rows = _read_parquet(path, names, filters=[("index", "=", index)])
        if len(rows) != 1:
            raise Pi05cError(
                f"{path} holds frame {index} {len(rows)} times, where {_EPISODES} says once: fetch the dataset again"
            )
        row = rows[0]
        task = self._tasks.get(row["task_index"])
        if task is None:
            raise Pi05cError(
                f"frame {index} of {self.folder} is of task {row['task_index']}, which {_TASKS} lacks: fetch the dataset "
                "again, or record it with tasks"
            )
        state = np.atleast_1d(np.asarray(row[_STATE], np.float32))
        if not np.isfinite(state).all():
            raise Pi05cError(
                f"the state of frame {index} of {self.folder} holds NaN or infinity: take its episode out of the dataset"
            )
        images = {
            camera: _image(row[camera], f"image {camera!r} of frame {index} in {path}") for camera in stored
        }
        for camera in cameras:
            if camera in self._videos:
                images[camera] = self._video_image(episode, camera, row["timestamp"])
        return Frame(index, task, state, images)

    def _video_image(self, episode: _Episode, camera: str, seconds: float) -> Array:
        path = self._path(self._video_path, episode, f"videos/{camera}", video_key=camera)
        return _video_frame(path, episode.row[f"videos/{camera}/from_timestamp"] + seconds, self._tolerance)

    def _path(self, template: str, episode: _Episode, kind: str, **names: str) -> Path:
        """The file of an episode's data, or of one of its videos."""
        chunk, file = (episode.row[f"{kind}/{part}_index"] for part in ("chunk", "file"))
        try:
            return self.folder / template.format(chunk_index=chunk, file_index=file, **names)
        except (AttributeError, LookupError, ValueError) as error:
            raise Pi05cError(
                f"{self.folder / LEROBOT_INFO} states the path {template!r}, which names no file: fetch the dataset again"
            ) from error

    def _read_tasks(self) -> dict[int, str]:
        """Tasks by number. pandas stores the text, which is the index of LeRobot's table, under one of two names."""
        path = self.folder / _TASKS
        rows = _read_parquet(path, ["task_index"], any_of=("task", "__index_level_0__"))
        return {
            row["task_index"]: next(text for key, text in row.items() if key != "task_index") for row in rows
        }

    def _read_episodes(self) -> list[_Episode]:
        files = sorted((self.folder / _EPISODES).rglob("*.parquet"))
        names = ["dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index"]
        for camera in sorted(self._videos):
            names += [f"videos/{camera}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
        rows = [row for path in files for row in _read_parquet(path, names)]
        found = [_Episode(row["dataset_from_index"], row["dataset_to_index"], row) for row in rows]
        found = sorted(
            (episode for episode in found if episode.start < episode.stop), key=lambda each: each.start
        )
        if not found:
            raise Pi05cError(
                f"{self.folder / _EPISODES} lists no episode with frames: record some, or fetch the folder"
            )
        return found


def _require_extra() -> None:
    refuse_unsupported(WITH_LEROBOT)
    try:
        import av  # noqa: F401
        import PIL  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise Pi05cError(
            f"reading a LeRobot dataset needs {error.name}, which is not installed: pip install '{WITH_LEROBOT}'"
        ) from error


def _refuse_version(folder: Path, version: object) -> None:
    if isinstance(version, str) and version.startswith("v3."):
        return
    if isinstance(version, str) and version.startswith(("v1.", "v2.")):
        raise Pi05cError(
            f"{folder} is a LeRobot dataset of format {version}, but v3 is read: convert it with LeRobot's {_CONVERTER}"
        )
    raise Pi05cError(
        f"{folder / LEROBOT_INFO} states the format {version!r}, but v3 of LeRobot's datasets is read: convert it with "
        "LeRobot"
    )


def _is_depth(feature: Mapping[str, Any]) -> bool:
    kept = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return bool(kept.get("is_depth_map") or kept.get("video.is_depth_map"))


def _read_parquet(
    path: Path, names: Sequence[str], *, any_of: Sequence[str] = (), filters: Any = None
) -> list[dict[str, Any]]:
    """Rows of a file, with the columns that are named and the first of `any_of` that there is."""
    import pyarrow
    from pyarrow import parquet

    try:
        there = parquet.read_schema(path).names
        if any_of:
            names = [*names, next((name for name in any_of if name in there), any_of[0])]
        if missing := [name for name in names if name not in there]:
            raise Pi05cError(
                f"{path} lacks the column {missing[0]!r} of LeRobot's format v3: fetch the dataset again"
            )
        table = parquet.read_table(path, columns=list(names), filters=filters, partitioning=None)
    except FileNotFoundError as error:
        raise Pi05cError(f"{path} is missing: fetch all files of the dataset") from error
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise Pi05cError(f"{path} cannot be read as Parquet ({reason}): fetch it again") from error
    return list(table.to_pylist())


def _image(stored: Any, which: str) -> Array:
    """uint8 [height, width, 3] of an image as `datasets` stores it: the bytes of a file."""
    from PIL import Image

    content = stored.get("bytes") if isinstance(stored, dict) else None
    if not content:
        raise Pi05cError(f"{which} is not stored in the file: write the dataset with its images embedded")
    try:
        with Image.open(io.BytesIO(content)) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise Pi05cError(f"{which} cannot be decoded: fetch the dataset again") from error


def _video_frame(path: Path, seconds: float, tolerance: float) -> Array:
    """uint8 [height, width, 3]: the frame of a video that is nearest to a time, and no farther than `tolerance`."""
    import av

    nearest: tuple[float, Any] | None = None
    try:
        with av.open(str(path)) as container:
            container.seek(max(0, int(seconds * av.time_base) - 1))
            for frame in container.decode(video=0):
                if frame.time is None:
                    continue
                if nearest is None or abs(frame.time - seconds) < abs(nearest[0] - seconds):
                    nearest = frame.time, frame
                if frame.time >= seconds:
                    break
            if nearest is not None and abs(nearest[0] - seconds) <= tolerance:
                return np.asarray(nearest[1].to_ndarray(format="rgb24"))
    except FileNotFoundError as error:
        raise Pi05cError(f"{path} is missing: fetch all files of the dataset") from error
    except (av.FFmpegError, IndexError) as error:
        reason = unreadable(error) if isinstance(error, OSError) else "it holds no video"
        raise Pi05cError(f"{path} cannot be decoded ({reason}): fetch it again") from error
    raise Pi05cError(f"{path} has no frame at {seconds:.3f} s, where an episode has one: fetch it again")


__all__ = ["CAMERA_PREFIX", "WITH_LEROBOT", "Frame", "LeRobotDataset"]
