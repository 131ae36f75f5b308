"""What commands print, for people and for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pi05c.terminal import printable, screen

if TYPE_CHECKING:
    from pi05c.comparison import Comparison
    from pi05c.manifest import Manifest, PrecisionRecord
    from pi05c.progress import Progress


FILE_WIDTH = 200
"""Columns of a table that goes to a file or a pipe, where nothing need be cut off."""


def plain_table(*text: str, figures: Sequence[str] = (), title: str | None = None) -> Any:
    """A table without a frame: columns of text, then columns of figures."""
    from rich.table import Table

    table = Table(*text, box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for heading in figures:
        table.add_column(heading, justify="right")
    return table


def show_precision(records: Sequence[PrecisionRecord]) -> None:
    dtypes = list(dict.fromkeys(record.dtype for record in records))
    if not dtypes:
        return
    table = plain_table("part", "operators", figures=dtypes)
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for record in records:
        rows.setdefault((record.part, record.kind), {})[record.dtype] = record.count
    for (part, kind), counts in rows.items():
        table.add_row(part, kind, *(str(counts.get(dtype, "")) for dtype in dtypes))
    console().print(table)


def show_errors(title: str, comparison: Comparison) -> None:
    table = plain_table(
        title=title, figures=("sample", "output", "relative L2", "cosine", "SQNR dB", "max abs")
    )
    table.columns[1].justify = "left"
    for error in comparison.errors:
        table.add_row(
            str(error.sample),
            error.output,
            f"{error.relative_l2:.4g}",
            f"{error.cosine:.6f}",
            f"{error.sqnr_db:.1f}",
            f"{error.max_abs:.3g}",
        )
    console().print(table)


def engine_lines(folder: Path, manifest: Manifest) -> list[str]:
    """What there is of each plan."""
    return [_engine_line(folder / place, folder, manifest, place) for place in manifest.places]


def _engine_line(where: Path, folder: Path, manifest: Manifest, place: str) -> str:
    engine = manifest.engine_of(place)
    if engine.file is None:
        return f"{where}: no plan ({engine.reason})"
    size = manifest.files[engine.file].bytes / 1e6
    seconds = "" if engine.seconds is None else f", built in {engine.seconds:.1f} s"
    return f"{folder / engine.file}: {size:,.1f} MB for {', '.join(engine.targets)}{seconds}"


def console(file_width: int | None = None) -> Any:
    """The screen, or the file or pipe in its place, where tables may be `file_width` columns wide."""
    to_file = not sys.stdout.isatty()
    return screen(soft_wrap=to_file, width=file_width if to_file else None)


def echo(text: str, *, nl: bool = True) -> None:
    """Print text as it is, without control characters."""
    typer.echo(printable(text), nl=nl)


def print_json(value: Any) -> None:
    """Print JSON; the texts `inf`, `-inf` and `nan` stand for numbers that it has no spelling for."""
    typer.echo(json.dumps(_spelled(value), indent=2, default=str, allow_nan=False))


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _spelled(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def make_progress(quiet: bool, verbose: bool) -> Progress:
    from pi05c.progress import Progress, StderrProgress

    return Progress() if quiet else StderrProgress(verbose=verbose)
