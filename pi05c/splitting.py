"""A policy as several engines: which parts, which passes for each, and what each is calibrated on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pi05c.extraction import (
    Grouping,
    PartGraph,
    PlainBorders,
    StepTable,
    complete_grouping,
    extract,
    parse_grouping,
    part_samples,
)
from pi05c.folder import TABLE
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.io import save
from pi05c.graph.runner import Array
from pi05c.observation import PlainObserver
from pi05c.passes import pipeline
from pi05c.passrun import Plan, RunOptions, plan, refuse_print_after
from pi05c.progress import Progress
from pi05c.rewriting import Piece
from pi05c.samples import Samples

_WHOLE_ONLY = ("specialize",)
"""Passes that change what parts hand to one another."""


@dataclass(frozen=True)
class PartPasses:
    """The passes of one part, as they were asked for and resolved."""

    requested: str
    plan: Plan


def parse_part_passes(
    text: str, grouping: Grouping, options: RunOptions | None = None
) -> dict[str, PartPasses]:
    """Read `default`, or `fp16,prefix=default,denoise=default,-pin_fp32`, where what stands in front serves the others.

    Without anything in front parts that are not named get `default`.

    Raises:
        UsageError: as `pipeline.parse`; a part that is not split off; a pass that takes the whole policy; an option
            that takes a run apart which is several.
    """
    options = options or RunOptions()
    for option, given in (
        ("--start-from", options.start_from is not None),
        ("--stop-after", options.stop_after is not None),
        ("--rewrite-limit", bool(options.rewrite_limit)),
        ("--verify-each=numbers", options.verify_each == "numbers"),
    ):
        if given:
            raise UsageError(
                f"{option} looks at one run of passes, and --split makes one for each part: take the part out with "
                "pi05c extract and look at that"
            )
    names = ["+".join(group) for group in grouping]
    texts: dict[str, list[str]] = {"": []}
    current = ""
    for item in pipeline.items(text):
        match = re.match(r"([\w+]+)=", item)
        if match is not None:
            current = match[1]
            if current not in names:
                raise UsageError(
                    f"--passes names part {current!r}, which --split does not: {', '.join(names)}"
                )
            if current in texts:
                raise UsageError(f"--passes names part {current!r} twice: give all its passes in one place")
            texts[current] = []
            item = item[match.end() :]
        texts[current].append(item)
    rest = ",".join(texts[""]) or "default"
    found = {}
    for name in names:
        requested = ",".join(texts[name]) if name in texts else rest
        chosen = plan(requested, replace(options, print_after=None))
        for step in chosen.steps:
            if step.spec.name in _WHOLE_ONLY:
                raise UsageError(
                    f"{step.spec.name} takes the policy as a whole: compile it with --passes {step.spec.name} and "
                    "--backend onnxruntime first, and split the model.onnx of that folder"
                )
        found[name] = PartPasses(requested, chosen)
    refuse_print_after(options, [passes.plan for passes in found.values()])
    return found


def parse_split(text: str) -> Grouping:
    """Read `vision,prefix+denoise`.

    Raises:
        UsageError: as `parse_grouping`.
    """
    try:
        return parse_grouping(text)
    except UsageError as error:
        raise UsageError(f"--split: {error}") from error


def cut(path: Path, grouping: Grouping) -> list[PartGraph]:
    """Every part of the model at `path`.

    Raises:
        Pi05cError: the model has a part that `grouping` leaves out or lacks one that it names, has dynamic shapes, or
            cannot be cut there.
    """
    complete = complete_grouping(path, grouping)
    if complete != grouping:
        missing = next(group for group in complete if group not in grouping)
        raise Pi05cError(
            f"--split leaves out {'+'.join(missing)}, which {path} has: name each of its parts, joined with + where "
            "they stay one engine"
        )
    parts = [extract(path, grouping, index) for index in range(len(grouping))]
    for part in parts:
        for tensor in (*part.model.graph.inputs, *part.model.graph.outputs):
            if tensor.shape is None or not all(isinstance(dim, int) for dim in tensor.shape):
                raise Pi05cError(
                    f"{tensor.name!r} of {part.name} has no fixed shape, which a hand-over between engines needs: "
                    "export the model with fixed sizes"
                )
    return parts


def run_plain(
    path: Path,
    parts: Sequence[PartGraph],
    samples: Sequence[dict[str, Array]],
    progress: Progress,
    observer: PlainObserver | None = None,
) -> list[dict[str, Array]]:
    """What the whole plain graph gives for samples: inputs, outputs, and what crosses the borders of parts, by name.

    Args:
        observer: keeps what it observes of each sample.
    """
    with progress.stage("run the plain graph") as update:
        borders = PlainBorders(path, parts, None if observer is None else observer.edit)
        spaces = []
        for index, sample in enumerate(samples):
            update(index / len(samples), f"sample {index + 1} of {len(samples)}")
            space = borders.run(sample)
            spaces.append(space if observer is None else observer.take(space))
    return spaces


def pieces_of(
    parts: Sequence[PartGraph],
    passes: Mapping[str, PartPasses],
    measured: Samples | None,
    plain: Sequence[Mapping[str, Array]] | None,
    folder: Path,
) -> list[Piece]:
    """What is to be rewritten; the table of a step is written into `folder` already.

    Args:
        measured: the samples that serve calibration.
        plain: what the plain graph gave for them.
    """
    pieces = []
    for part in parts:
        place = folder / part.name
        place.mkdir()
        table = None
        if part.step is not None:
            save(part.step.table, place / TABLE)
            table = StepTable(place / TABLE)
        samples = None
        if measured is not None and plain is not None:
            rows = [] if table is None else table.rows()
            feeds = [fed for space in plain for fed in part_samples(part, space, rows)]
            samples = Samples.of(feeds, source=measured.source, synthetic=measured.synthetic)
        chosen = passes[part.name]
        pieces.append(
            Piece(
                part.name,
                part.model,
                chosen.requested,
                chosen.plan,
                samples,
                runs=1 if table is None else table.steps,
            )
        )
    return pieces


__all__ = ["PartPasses", "cut", "parse_part_passes", "parse_split", "pieces_of", "run_plain"]
