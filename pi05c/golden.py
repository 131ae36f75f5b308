"""`pi05c golden`: what passes make of a graph, kept as text in a repository and compared with what they make of it now.

A folder holds cases in two forms, at any depth:

- `NAME.toml` names a model, a pipeline and where ranges come from; the result is kept as `NAME.golden.txt`. A
  `golden.toml` holds several, each a table `[case.NAME]`.
- `PASS/NAME.onnx` with an entry `METADATA_KEY` in the model's metadata is one case of one pass: what it shows, options
  and ranges. The graph is kept as `NAME.before.txt`, the result as `NAME.after.txt`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pi05c.graph.errors import MachineError, Pi05cError, unwritable
from pi05c.graph.files import read_text, read_toml, write_text
from pi05c.graph.io import Model, load
from pi05c.graph.ranges import Ranges
from pi05c.graph.text import canonical_text
from pi05c.graph.weights import InMemory
from pi05c.passes import REGISTRY
from pi05c.passes.pipeline import Calibrate, Step, StepResult, run
from pi05c.plugins import parse_passes

METADATA_KEY = "pi05c.golden"
"""Metadata of a model that is a case by itself: JSON with `shows`, `options`, `low`, `high`, `rows`, `limit`."""

LIST_FILE = "golden.toml"
RESULT_SUFFIX = ".golden.txt"
BEFORE_SUFFIX = ".before.txt"
AFTER_SUFFIX = ".after.txt"


# Cases


class PassCase(BaseModel):
    """What the metadata of a model says of itself as a case.

    Attributes:
        shows: one sentence.
        options: of the pass, as text.
        low, high: measured ranges by tensor name; None for no calibration.
        rows: sampled rows by tensor name.
        limit: relative L2 error of the outputs that the case allows; for tests, the texts do not depend on it.
        why: where that error comes from.
    """

    model_config = ConfigDict(extra="forbid")

    shows: str
    options: dict[str, str] = {}
    low: dict[str, float] | None = None
    high: dict[str, float] | None = None
    rows: dict[str, list[list[float]]] = {}
    limit: float = 0.0
    why: str = ""

    @classmethod
    def of(cls, model: Model) -> PassCase:
        """The case that a model is.

        Raises:
            Pi05cError: the metadata does not hold one.
        """
        try:
            return cls.model_validate_json(model.metadata[METADATA_KEY])
        except ValidationError as error:
            raise Pi05cError(
                f"the metadata {METADATA_KEY} of {model.path} is not a case: {_first(error)}"
            ) from error

    @property
    def ranges(self) -> Ranges | None:
        """The ranges that the pass is given."""
        if self.low is None:
            return None
        rows = {name: InMemory(np.array(values, np.float32)) for name, values in self.rows.items()}
        return Ranges(self.low, self.high or {}, "the case", rows=rows)


class PipelineCase(BaseModel):
    """A case in a TOML file.

    Attributes:
        model: an ONNX file, from the folder of the TOML file.
        passes: pipeline text.
        plugins: Python files with further passes, from the same folder.
        calibration: .npz files or folders of samples from the same folder, or `synthetic`; without it, the samples
            beside the model.
        ranges: `[low, high]` by tensor name instead of calibration, so that the text depends on no processor.
        shows: a sentence that heads the text.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    passes: str = "default"
    plugins: list[str] = []
    calibration: list[str] = []
    ranges: dict[str, tuple[float, float]] | None = None
    shows: str = ""


class _CaseList(BaseModel):
    model_config = ConfigDict(extra="forbid")

    case: dict[str, PipelineCase] = Field(min_length=1)


@dataclass(frozen=True)
class Text:
    """A kept text and what it would be now.

    Attributes:
        path: where it is kept.
        kept: None where there is no such file.
        now: None where no case makes it any more.
    """

    path: Path
    kept: str | None
    now: str | None

    @property
    def same(self) -> bool:
        return self.kept == self.now

    def diff(self, root: Path) -> list[str]:
        """Unified diff from what is kept to what it would be now."""
        name = self.path.relative_to(root).as_posix()
        kept, now = ((text or "").splitlines() for text in (self.kept, self.now))
        old = f"kept {name}" if self.kept is not None else "nothing is kept"
        new = f"now {name}" if self.now is not None else "no case makes it"
        return list(difflib.unified_diff(kept, now, old, new, lineterm=""))


def texts(folder: Path) -> list[Text]:
    """Every text that is kept in a folder or should be, by path. Nothing is written.

    Raises:
        Pi05cError: there is no case in the folder, a case cannot be read, or its passes fail.
    """
    if not folder.is_dir():
        raise Pi05cError(f"there is no folder {folder}: name the one that holds the golden cases")
    found: dict[Path, str] = {}
    for path in sorted(folder.rglob("*.toml")):
        for name, case in _pipeline_cases(path):
            found[path.with_name(f"{name}{RESULT_SUFFIX}")] = _named(
                f"{path} [{name}]", _pipeline_text, path, case
            )
    for path in sorted(folder.rglob("*.onnx")):
        if path.parent.name in REGISTRY:
            model = load(path)
            if METADATA_KEY in model.metadata:
                found[_beside(path, BEFORE_SUFFIX)] = before_text(model)
                found[_beside(path, AFTER_SUFFIX)] = _named(str(path), _pass_text, model, path.parent.name)
    if not found:
        raise Pi05cError(
            f"{folder} holds no golden case: write NAME.toml with model and passes, or a {LIST_FILE} (docs/golden.md)"
        )
    kept = {path: _read(path) for path in found}
    left = {path: _read(path) for path in sorted(folder.rglob(f"*{RESULT_SUFFIX}")) if path not in found}
    return [Text(path, kept.get(path, left.get(path)), found.get(path)) for path in sorted({*found, *left})]


def update(stale: Iterable[Text]) -> None:
    """Write the texts that differ; remove those that no case makes.

    Raises:
        Pi05cError: one cannot be written.
    """
    for text in stale:
        _write(text)


def _write(text: Text) -> None:
    try:
        if text.now is None:
            text.path.unlink()
        else:
            write_text(text.path, text.now)
    except OSError as error:
        raise MachineError(f"{text.path} cannot be written: {unwritable(error)}") from error


def run_pass_case(model: Model, name: str) -> StepResult:
    """Run one pass on a model that is a case of it, in place."""
    case = PassCase.of(model)
    step = Step(REGISTRY[name], REGISTRY[name].parse_options(case.options))
    return run(model, [step], calibrate=lambda _, names: case.ranges)[0]


def before_text(model: Model) -> str:
    """The graph under the sentence that it illustrates."""
    return f"# {PassCase.of(model).shows}\n{canonical_text(model.graph)}"


def after_text(model: Model, result: StepResult) -> str:
    """The graph and what the pass reported."""
    return canonical_text(model.graph) + "".join(f"{line}\n" for line in _report(result))


def _report(result: StepResult) -> Iterator[str]:
    yield from (f"changed: {name}" for name in result.changes)
    yield from (f"skipped: {skip.where}: {skip.reason}" for skip in result.skips)
    yield from (f"note: {note}" for note in result.notes)


def _pass_text(model: Model, name: str) -> str:
    return after_text(model, run_pass_case(model, name))


def _pipeline_text(toml: Path, case: PipelineCase) -> str:
    """The resulting graph, under what each pass did."""
    model = load(toml.parent / case.model)
    steps = parse_passes(case.passes, [toml.parent / plugin for plugin in case.plugins])
    results = run(model, steps, calibrate=_calibrate(toml.parent, model, case))
    lines = [f"# {case.shows}"] if case.shows else []
    for result in results:
        lines.append(f"# {result.step.text}: {len(result.changes)} changed, {len(result.skips)} skipped")
        lines += [f"#   {line}" for line in _report(result) if not line.startswith("changed: ")]
    return "".join(f"{line}\n" for line in lines) + canonical_text(model.graph)


def _calibrate(folder: Path, model: Model, case: PipelineCase) -> Calibrate:
    """Ranges of a case: those it states, else measured as `pi05c compile` measures them."""
    if case.ranges is not None:
        low = {name: pair[0] for name, pair in case.ranges.items()}
        high = {name: pair[1] for name, pair in case.ranges.items()}
        return lambda _, names: Ranges(low, high, "the case")
    from pi05c.calibration import cached_ranges
    from pi05c.samples import SYNTHETIC, find_samples, split

    given = [item if item == SYNTHETIC else folder / item for item in case.calibration]
    samples = find_samples(model, given)
    if samples is None:
        return lambda _, names: None
    measured = split(samples)[0]
    return lambda current, wanted: cached_ranges(current, wanted.tensors, measured, rows=wanted.rows)


def _pipeline_cases(path: Path) -> list[tuple[str, PipelineCase]]:
    try:
        table = read_toml(path)
        if path.name == LIST_FILE:
            return list(_CaseList.model_validate(table).case.items())
        return [(path.stem, PipelineCase.model_validate(table))]
    except ValidationError as error:
        raise Pi05cError(f"{path} does not hold a golden case: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"])
    return f"{place}: {found['msg']}" if place else str(found["msg"])


def _named(case: str, function: Any, *arguments: Any) -> str:
    """The text of a case; an error that names it."""
    try:
        return str(function(*arguments))
    except Pi05cError as error:
        raise Pi05cError(f"golden case {case}: {error}") from error


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.stem + suffix)


def _read(path: Path) -> str | None:
    return read_text(path) if path.is_file() else None


# For people


def markdown(folder: Path, found: Sequence[Text]) -> str:
    """What differs, for a pull request."""
    from pi05c.diffview import fenced

    stale = [text for text in found if not text.same]
    if not stale:
        return f"### Golden texts\n\nAll {len(found)} are as kept.\n"
    lines = ["### Golden texts", "", f"{len(stale)} of {len(found)} differ from what is kept.", ""]
    for text in stale:
        name = text.path.relative_to(folder).as_posix()
        lines += [
            f"<details><summary>{escape(name)}</summary>",
            "",
            *fenced(text.diff(folder), "diff"),
            "",
            "</details>",
            "",
        ]
    return "\n".join([*lines, f"If this is meant: `pi05c golden update {folder.as_posix()}`", ""])


def as_json(folder: Path, found: Sequence[Text]) -> dict[str, Any]:
    """Plain values for `--json`."""
    return {
        "texts": len(found),
        "different": [
            {"path": text.path.relative_to(folder).as_posix(), "diff": text.diff(folder)}
            for text in found
            if not text.same
        ],
    }


__all__ = [
    "METADATA_KEY",
    "PassCase",
    "PipelineCase",
    "Text",
    "after_text",
    "as_json",
    "before_text",
    "markdown",
    "run_pass_case",
    "texts",
    "update",
]
