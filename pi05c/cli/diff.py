"""`pi05c diff`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pi05c.cli.app import Debug, Json, Quiet, app
from pi05c.cli.output import console, echo
from pi05c.graph.errors import UsageError


class Format(str, Enum):
    """How a comparison is shown."""

    TEXT = "text"
    MARKDOWN = "markdown"
    HTML = "html"


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="An ONNX file or an engine folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    format_: Annotated[
        Format, typer.Option("--format", help="text, markdown for a pull request, or html side by side.")
    ] = Format.TEXT,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")] = None,
    names: Annotated[bool, typer.Option("--names", help="Another name is a difference too.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="List every difference in text and markdown, retyped nodes too.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what two graphs differ in, matched by structure; exit 0 if nothing, 1 if something, 2 on trouble.

    Stages of one run (`--dump`) are compared pass by pass.
    """
    from pi05c.diffing import diff_files
    from pi05c.diffview import html, markdown, text_lines
    from pi05c.graph.files import refuse_replacing

    if json_ and format_ is not Format.TEXT:
        raise UsageError("--json and --format ask for two forms at once: give one of them")
    if output is not None and (not output.exists() or output.is_file()):  # not a pipe
        refuse_replacing(output, [a, b])
    found = diff_files(a, b, names=names)
    if output is None and not quiet and format_ is Format.TEXT and not json_:
        screen = console()
        for line in text_lines(found, everything=everything):
            screen.print(line.plain, style=line.style or None, markup=False)
    elif output is not None or not quiet:
        if json_:
            text = json.dumps(found.as_json(), indent=2) + "\n"
        elif format_ is Format.HTML:
            text = html(found)
        elif format_ is Format.MARKDOWN:
            text = markdown(found, everything=everything)
        else:
            text = "".join(f"{line.plain}\n" for line in text_lines(found, everything=everything))
        _write(text, output)
    if not found.same:
        raise typer.Exit(1)


def _write(text: str, output: Path | None) -> None:
    if output is None:
        echo(text, nl=False)
        return
    from pi05c.graph.files import write_text

    write_text(output, text)
