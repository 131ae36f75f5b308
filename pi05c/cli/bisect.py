"""`pi05c bisect`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pi05c.cli.app import (
    Calibration,
    CalibrationMethod,
    Debug,
    Json,
    Passes,
    Plugin,
    Quiet,
    Target,
    Verbose,
    app,
)
from pi05c.cli.output import console, make_progress, print_json
from pi05c.graph.errors import UsageError


@app.command()
def bisect(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL.onnx|STAGES", help="The plain graph, or a folder that --dump wrote."),
    ],
    passes: Passes = None,
    plugin: Plugin = None,
    calibration: Calibration = None,
    calibration_method: CalibrationMethod = "max",
    target: Target = None,
    start_from: Annotated[
        Path | None, typer.Option(help="A file that --dump wrote: the passes behind it are searched.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Largest relative L2 error that is good; what compile allows if left out."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the reproducer; bisect-PASS if none.")
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            help="A command that exits with 0 if the graph is good: everything behind it. It finds the graph at "
            "polygraphy_debug.onnx, or where {} stands."
        ),
    ] = None,
    fail_code: Annotated[
        list[int] | None, typer.Option(help="The only exit status of the command that is bad.")
    ] = None,
    ignore_fail_code: Annotated[
        list[int] | None, typer.Option(help="An exit status of the command that is good.")
    ] = None,
    fail_regex: Annotated[
        list[str] | None, typer.Option(help="Bad only where the command prints something that matches.")
    ] = None,
    iter_artifact: Annotated[
        Path | None, typer.Option(help="Where the command finds the graph instead of polygraphy_debug.onnx.")
    ] = None,
    artifacts: Annotated[
        list[Path] | None,
        typer.Option(help="A file that the command leaves, to be sorted into good and bad."),
    ] = None,
    artifacts_dir: Annotated[
        Path | None, typer.Option(help="Folder of good and bad; polygraphy_artifacts if none.")
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Find the first pass, and in it the first rewrite, that breaks a graph; exit 0 if nothing is wrong, 1 if it was found.

    It exits with 2 where it cannot tell. --check comes last, since what follows it is the command.
    """
    from pi05c.bisection import bisect
    from pi05c.criterion import ARTIFACT, ARTIFACTS_FOLDER, CheckCommand, parse_check
    from pi05c.guilt import result_lines
    from pi05c.passrun import RunOptions

    command = None
    if check is not None:
        command = CheckCommand(
            parse_check(check),
            iter_artifact or ARTIFACT,
            tuple(fail_code or ()),
            tuple(ignore_fail_code or ()),
            tuple(map(_regex, fail_regex or ())),
            tuple(artifacts or ()),
            artifacts_dir or ARTIFACTS_FOLDER,
        )
    elif fail_code or ignore_fail_code or fail_regex or iter_artifact or artifacts or artifacts_dir:
        raise UsageError("the options of a command need one: write --check COMMAND last")
    result = bisect(
        model,
        passes,
        RunOptions(plugins=tuple(plugin or ()), start_from=start_from),
        check=command,
        max_error=max_error,
        calibration=calibration or (),
        calibration_method=calibration_method,
        target=target,
        output=output,
        progress=make_progress(quiet, verbose),
    )
    if json_:
        print_json(result.as_json())
    elif not quiet:
        screen = console()
        for line in result_lines(result):
            screen.print(line.plain, style=line.style or None, markup=False)
    if result.guilty is not None:
        raise typer.Exit(1)


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"--fail-regex {text!r} is no regular expression: {error}") from error
