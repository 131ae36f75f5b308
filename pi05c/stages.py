"""Dumped stages: the graph before the first pass and after each, as numbered files of one folder.

`00-input.onnx` and `03-lower_precision.onnx` stand beside their canonical texts. The data file of a stage holds the
weights that no earlier stage has, and a stage names the files of the stages before it by location. Beside them lie
the ranges and rows that passes were given, and, of a whole policy, the samples that the stages can be run on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pi05c.graph.errors import MachineError, Pi05cError, unwritable
from pi05c.graph.files import write_text
from pi05c.graph.io import DataFolder, Model, load, save
from pi05c.graph.read import read_proto
from pi05c.graph.text import canonical_text

if TYPE_CHECKING:
    from pi05c.calibration import MeasuredRanges
    from pi05c.samples import Samples

STAGE_KEY = "pi05c.stage"
"""Metadata entry of a dumped stage: a `Stage` in JSON."""

INPUT = "input"
"""What the stage before the first pass is called."""

RANGES = "ranges.json"
ROWS = "ranges.rows"
SAMPLES = "samples.npz"

_FILE = re.compile(r"(?P<number>\d{2,})-(?P<name>\w+)\.(onnx|onnx\.data|txt)\Z")


class Stage(BaseModel):
    """Which place in a run a graph has.

    Attributes:
        number: how many passes it has been through.
        follows: the last of them; None before the first.
        pipeline: the text of the whole pipeline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = Field(ge=0)
    follows: str | None = Field(alias="pass")
    pipeline: str

    @property
    def title(self) -> str:
        """`03-lower_precision`: the file's name without its suffix."""
        return f"{self.number:02d}-{self.follows or INPUT}"


def stage_of(model: Model) -> Stage | None:
    """What a model's metadata says of its place; None where it is no dumped stage."""
    return _parsed(model.metadata.get(STAGE_KEY, ""))


def _parsed(text: str) -> Stage | None:
    try:
        return Stage.model_validate_json(text)
    except ValidationError:
        return None


def _is_stage(path: Path) -> bool:
    try:
        proto = read_proto(path)
    except Pi05cError:
        return False
    return any(entry.key == STAGE_KEY and _parsed(entry.value) is not None for entry in proto.metadata_props)


def load_stage(path: Path) -> tuple[Model, Stage]:
    """Read a stage to go on from; its mark is taken off the model.

    Raises:
        Pi05cError: it cannot be read, or is no dumped stage.
    """
    model = load(path)
    stage = stage_of(model)
    if stage is None:
        raise Pi05cError(f"{path} is no dumped stage: name a file that --dump wrote, such as 00-input.onnx")
    del model.metadata[STAGE_KEY]
    return model, stage


def stage_files(folder: Path) -> dict[int, Path]:
    """The stages in a folder by number.

    Raises:
        Pi05cError: it holds none.
    """
    found = {
        int(match["number"]): path
        for path in sorted(folder.glob("*.onnx"))
        if (match := _FILE.match(path.name)) is not None and _is_stage(path)
    }
    if not found:
        raise Pi05cError(f"{folder} holds no dumped stage: make some with pi05c MODEL.onnx --dump {folder}")
    return dict(sorted(found.items()))


def recorded_ranges(folder: Path) -> MeasuredRanges | None:
    """The ranges beside dumped stages, None where none were measured.

    Raises:
        Pi05cError: the file cannot be read.
    """
    from pi05c.calibration import read_ranges

    path = folder / RANGES
    return read_ranges(path) if path.is_file() else None


class StageFolder:
    """Writes the stages of one run.

    Attributes:
        folder: where.
        pipeline: the text of the whole pipeline.
    """

    def __init__(self, folder: Path, pipeline: str, *, first: int = 0, reads: Iterable[Path] = ()) -> None:
        """Make the folder, and remove what an earlier run left there from stage `first` on.

        Args:
            first: number of the first stage to be written; those before it are kept.
            reads: the files of the run, which must not be among those that are replaced.

        Raises:
            Pi05cError: the folder cannot be made, or a file that would be replaced is read by the run or was not
                left by a dump.
        """
        self.folder = folder
        self.pipeline = pipeline
        self._data = DataFolder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            named = {
                path: int(match["number"])
                for path in sorted(folder.iterdir())
                if (match := _FILE.match(path.name)) is not None
            }
            own = {path.stem for path in named if path.suffix == ".onnx" and _is_stage(path)}
            stale = [path for path, number in named.items() if number >= first]
            beside = [path for name in (RANGES, ROWS, SAMPLES) if (path := folder / name).exists()]
            self._refuse([*stale, *beside], own, {path.resolve() for path in reads})
            for path in [*stale, *(beside if first == 0 else ())]:
                path.unlink()
        except OSError as error:
            raise MachineError(f"--dump {folder} cannot be written: {unwritable(error)}") from error

    def _refuse(self, replaced: Iterable[Path], own: Collection[str], reads: Collection[Path]) -> None:
        for path in replaced:
            if path.resolve() in reads:
                raise Pi05cError(
                    f"--dump {self.folder} would replace {path.name}, which is read: name another folder, or go on from "
                    "a stage of that one with --start-from"
                )
            by_dump = path.name.split(".")[0] in own if _FILE.match(path.name) else bool(own)
            if not by_dump:
                raise Pi05cError(
                    f"--dump {self.folder} would replace {path.name}, which no dump left there: name another folder"
                )

    def write(self, model: Model, number: int, follows: str | None) -> Path:
        """Write one stage with its text; the model stays as it is.

        Raises:
            Pi05cError: it cannot be written.
        """
        stage = Stage.model_validate({"number": number, "pass": follows, "pipeline": self.pipeline})
        path = self.folder / f"{stage.title}.onnx"
        with _marked(model, stage):
            save(model, path, shared=self._data)
        write_text(path.with_suffix(".txt"), canonical_text(model.graph))
        return path

    def write_ranges(self, ranges: MeasuredRanges) -> None:
        """Keep the ranges that passes were given, for runs that start from a stage."""
        from pi05c.calibration import save_ranges

        save_ranges(self.folder / RANGES, ranges)

    def write_samples(self, samples: Samples) -> None:
        """Keep the inputs that the stages are measured on."""
        from pi05c.samples import save_samples

        save_samples(self.folder / SAMPLES, list(samples), synthetic=samples.synthetic)


@contextmanager
def _marked(model: Model, stage: Stage) -> Iterator[None]:
    kept = dict(model.metadata)
    model.metadata[STAGE_KEY] = stage.model_dump_json(by_alias=True)
    try:
        yield
    finally:
        model.metadata.clear()
        model.metadata.update(kept)


__all__ = [
    "RANGES",
    "SAMPLES",
    "STAGE_KEY",
    "Stage",
    "StageFolder",
    "load_stage",
    "recorded_ranges",
    "stage_files",
    "stage_of",
]
