"""What is kept of a pass that failed: the graph before it, the pipeline, the versions and the command that fails again.

The weights of a stage go with it up to `COPIED_BYTES`. Beyond that the command starts from the model, whose weights are
there already, and of the stage its text is kept. The graph of a part lies in no file, so its weights always go with it.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pi05c.folder import failed_pass, scratch
from pi05c.graph.errors import Pi05cError
from pi05c.graph.files import read_text, write_text
from pi05c.graph.io import Model
from pi05c.graph.text import canonical_text
from pi05c.inspection import weight_totals
from pi05c.passes.pipeline import run as run_steps
from pi05c.passrun import RunOptions
from pi05c.rewriting import PassFailedError, Piece
from pi05c.samples import Samples
from pi05c.stages import SAMPLES, Stage, StageFolder
from pi05c.thresholds import MAX, Method

COPIED_BYTES = 2**30
"""Up to which size the weights of a stage are copied."""

SCRIPT = "reproduce.sh"
PIPELINE = "pipeline.txt"
RECORD = "failure.json"


@dataclass(frozen=True)
class Request:
    """What was asked of the run.

    Attributes:
        model: the plain graph.
        options: how the run was looked at.
        calibration: files and folders of samples, or `synthetic`.
        method: of calibration.
        target: GPUs, as `--target` takes them.
    """

    model: Path
    options: RunOptions
    calibration: Sequence[Path | str]
    method: Method
    target: str | None


def keep_failure(
    output: Path,
    failure: PassFailedError,
    piece: Piece,
    request: Request,
    fresh: Callable[[], Model],
    versions: Mapping[str, str],
) -> Path:
    """Write the reproducer beside `output`, in the place of the last one.

    Args:
        piece: the graph that the pass failed on, with all its passes.
        fresh: loads the graph before the first pass.
        versions: of pi05c and what it uses, by package.

    Returns:
        The command to run.

    Raises:
        Pi05cError: it cannot be written.
    """
    place = _place(output)
    with scratch(place) as work:
        model = fresh()
        done, number = piece.plan.done, failure.number
        run_steps(model, piece.plan.steps[done : number - 1], calibrate=lambda *_: failure.ranges)
        follows = piece.plan.steps[number - 2].spec.name if number > 1 else None
        size = sum(total.bytes for total in weight_totals(model.graph))
        if piece.place or size <= COPIED_BYTES:
            start = _write_stage(work.folder, model, follows, failure, piece, request)
            words = _from_stage(start, failure, piece, request)
        else:
            stage = Stage.model_validate({"number": number - 1, "pass": follows, "pipeline": piece.plan.text})
            (work.folder / f"{stage.title}.txt").write_text(canonical_text(model.graph), encoding="utf-8")
            words = _from_model(failure, piece, request)
        _write_texts(work.folder, failure, piece, words, versions)
        if place.exists():
            shutil.rmtree(place)
        work.folder.rename(place)
    return place / SCRIPT


def _place(output: Path) -> Path:
    """`OUTPUT.failed-pass`, or where that holds files of somebody else, the first number behind it that is free."""
    first = place = failed_pass(output)
    number = 1
    while place.exists() and not _is_ours(place):
        number += 1
        place = first.with_name(f"{first.name}-{number}")
    return place


def _is_ours(folder: Path) -> bool:
    try:
        known = json.loads(read_text(folder / RECORD))["files"]
    except (Pi05cError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return {path.name for path in folder.iterdir()} <= {RECORD, *known}


def _write_stage(
    folder: Path, model: Model, follows: str | None, failure: PassFailedError, piece: Piece, request: Request
) -> Path:
    stages = StageFolder(folder, piece.plan.text)
    if failure.ranges is not None:
        stages.write_ranges(failure.ranges)
    if _runs(request) and piece.samples is not None and piece.held_back is not None:
        own = [] if piece.held_back is piece.samples else piece.held_back
        every = [*piece.samples, *own]
        stages.write_samples(Samples.of(every, synthetic=piece.samples.synthetic))
    return stages.write(model, failure.number - 1, follows)


def _from_stage(start: Path, failure: PassFailedError, piece: Piece, request: Request) -> list[str]:
    name = piece.plan.steps[failure.number - 1].spec.name
    words = [start.name, "--start-from", start.name, "--stop-after", f"{failure.number:02d}-{name}"]
    if _runs(request) and (start.parent / SAMPLES).exists():
        words += ["--calibration", SAMPLES]
    return [*words, *_looked_at(request)]


def _from_model(failure: PassFailedError, piece: Piece, request: Request) -> list[str]:
    steps = piece.plan.steps[: failure.number]
    words = [str(request.model.resolve()), "--passes", ",".join(step.text for step in steps)]
    if piece.plan.start is not None:
        words += ["--start-from", str(piece.plan.start.resolve())]
    for samples in request.calibration:
        words += ["--calibration", _absolute(samples)]
    if request.method != MAX:
        words += ["--calibration-method", str(request.method)]
    return [*words, *_looked_at(request)]


def _looked_at(request: Request) -> list[str]:
    words = [f"--verify-each={request.options.verify_each or 'structure'}"]
    for plugin in request.options.plugins:
        words += ["--plugin", _absolute(plugin)]
    return words if request.target is None else [*words, "--target", request.target]


def _runs(request: Request) -> bool:
    return request.options.verify_each == "numbers"


def _absolute(name: Path | str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


def _write_texts(
    folder: Path, failure: PassFailedError, piece: Piece, words: Sequence[str], versions: Mapping[str, str]
) -> None:
    command = shlex.join(["pi05c", *words])
    script = folder / SCRIPT
    write_text(script, f'#!/bin/sh\ncd "$(dirname "$0")" && exec {command}\n')
    script.chmod(0o755)
    write_text(folder / PIPELINE, f"{piece.plan.text}\n")
    record = {
        "pass": piece.plan.steps[failure.number - 1].text,
        "number": failure.number,
        "part": piece.place or None,
        "error": failure.told,
        "command": command,
        "versions": dict(versions),
        "files": sorted(path.name for path in folder.iterdir()),
    }
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


__all__ = ["COPIED_BYTES", "Request", "keep_failure"]
