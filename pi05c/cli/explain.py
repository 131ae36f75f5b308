"""`pi05c explain`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pi05c.cli.app import Calibration, CalibrationMethod, Debug, Json, Plugin, Quiet, Verbose, app
from pi05c.cli.output import echo, make_progress, print_json

if TYPE_CHECKING:
    from pi05c.explaining import Explanation
    from pi05c.nodechanges import Place

_COLUMN = 80
"""Widest that a column of text is aligned to."""


@app.command()
def explain(
    model: Annotated[Path, typer.Argument(help="The plain ONNX graph.")],
    pass_: Annotated[str, typer.Option("--pass", help="One pass, with options: `fold_norms{option=value}`.")],
    passes: Annotated[
        str | None,
        typer.Option(help="A pipeline: what stands before the pass in it runs first, in memory."),
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="A file that --dump wrote, to explain the pass on.")
    ] = None,
    calibration: Calibration = None,
    calibration_method: CalibrationMethod = "max",
    plugin: Plugin = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show each rewrite as canonical text too.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show what a pass would change and what it would leave alone and why, node by node. Nothing is written."""
    from pi05c.explaining import explain

    found = explain(
        model,
        pass_,
        passes=passes,
        plugins=tuple(plugin or ()),
        start_from=start_from,
        calibration=calibration or (),
        calibration_method=calibration_method,
        progress=make_progress(quiet, verbose),
    )
    if json_:
        print_json(found.as_json())
    elif not quiet:
        as_it_is = passes is None and start_from is None
        echo("\n".join([*_rewrites(found, diff), *_skipped(found), *_summary(found, as_it_is)]))


def _rewrites(found: Explanation, diff: bool) -> Iterator[str]:
    rows = [
        (str(rewrite.number), *_columns(changed.place), changed.becomes)
        for rewrite in found.rewrites
        for changed in rewrite.changed
    ]
    lines = _aligned(rows)
    for rewrite in found.rewrites:
        last = len(rewrite.changed) - 1
        for index in range(last + 1):
            yield next(lines) + (f"; {rewrite.beside}" if rewrite.beside and index == last else "")
        if diff:
            yield from (typer.style(f"    - {line}", fg="red") for line in rewrite.removed)
            yield from (typer.style(f"    + {line}", fg="green") for line in rewrite.added)


def _skipped(found: Explanation) -> Iterator[str]:
    yield from _aligned([("left", *_columns(place), reason) for place, reason in found.skipped])


def _summary(found: Explanation, as_it_is: bool) -> Iterator[str]:
    result = found.result
    yield from (f"note: {note}" for note in result.notes)
    counts = Counter(
        (changed.place.part, changed.place.operator)
        for rewrite in found.rewrites
        for changed in rewrite.changed
    )
    for (part, operator), count in sorted(counts.items(), key=lambda item: -item[1]):
        yield f"  {count} {operator}{f' of {part}' if part else ''}"
    if found.ranges is not None:
        yield f"ranges: {found.ranges}"
    yield (
        f"{found.step.text}: {_counted(len(found.rewrites), 'rewrite')}, "
        f"{_counted(len(found.skipped), 'place')} left alone, "
        f"{result.nodes_before:,} -> {result.nodes_after:,} nodes"
    )
    if found.behind:
        yield f"behind {','.join(step.text for step in found.behind)}"
    elif as_it_is and found.step.spec.after:
        yield (
            f"on the graph as it is: in a pipeline it comes behind {', '.join(found.step.spec.after)} "
            "(--passes default runs what precedes it)"
        )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _columns(place: Place) -> tuple[str, str, str]:
    return place.part, place.operator, f"{place.scope}: {place.name}" if place.scope else place.name


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows as lines; every column but the last as wide as its widest cell, up to a limit."""
    widths = [min(max(map(len, cells)), _COLUMN) for cells in zip(*rows, strict=True)][:-1]
    for *cells, last in rows:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), last])
