"""`pi05c golden check` and `pi05c golden update`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pi05c.cli.app import Debug, Json, Quiet, app
from pi05c.cli.output import console, echo, print_json
from pi05c.graph.errors import UsageError

golden = typer.Typer(
    help="Keep what passes make of your graphs as text in your repository.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(golden, name="golden")


class Format(str, Enum):
    """How differences are shown."""

    TEXT = "text"
    MARKDOWN = "markdown"


@golden.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds the cases.")],
    format_: Annotated[
        Format, typer.Option("--format", help="text, or markdown for a pull request.")
    ] = Format.TEXT,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare the kept texts with what the passes make now; exit 0 if equal, 1 if not, 2 on trouble."""
    from pi05c.golden import as_json, markdown, texts

    if json_ and format_ is not Format.TEXT:
        raise UsageError("--json and --format ask for two forms at once: give one of them")
    found = texts(folder)
    stale = [text for text in found if not text.same]
    if json_:
        print_json(as_json(folder, found))
    elif format_ is Format.MARKDOWN and not quiet:
        echo(markdown(folder, found), nl=False)
    elif not quiet:
        screen = console()
        styles = {"-": "red", "+": "green", "@": "cyan"}
        for text in stale:
            for line in text.diff(folder):
                screen.print(line, style=styles.get(line[:1]), markup=False)
        if stale:
            remedy = f"if this is meant: pi05c golden update {folder}"
            screen.print(f"{len(stale)} of {len(found)} texts differ; {remedy}", markup=False)
        else:
            screen.print(f"{len(found)} texts are as kept", markup=False)
    if stale:
        raise typer.Exit(1)


@golden.command()
def update(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds the cases.")],
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the texts anew, for `git diff` to show."""
    from pi05c.golden import as_json, texts
    from pi05c.golden import update as write

    found = texts(folder)
    stale = [text for text in found if not text.same]
    write(stale)
    if json_:
        print_json(as_json(folder, found))
    elif not quiet:
        for text in stale:
            echo(f"{'removed' if text.now is None else 'wrote'} {text.path}")
        echo(f"{len(stale)} of {len(found)} texts changed")
