"""`pi05c view`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pi05c.cli.app import Debug, app
from pi05c.cli.output import echo


@app.command()
def view(
    path: Annotated[Path, typer.Argument(help="An ONNX file, an engine folder, or one part in it.")],
    debug: Debug = False,
) -> None:
    """Open a graph in Netron; Ctrl-C ends it."""
    from pi05c.folder import GRAPH
    from pi05c.graph.errors import Pi05cError
    from pi05c.graph.io import load
    from pi05c.graph.requirements import refuse_unsupported

    graph = path / GRAPH if path.is_dir() else path
    if path.is_dir() and not graph.is_file():
        raise Pi05cError(
            f"{path} holds no {GRAPH}: name an ONNX file, an engine folder, or a part of a split one"
        )
    load(graph)
    refuse_unsupported("pi05c[view]")
    try:
        import netron
    except ImportError as error:
        raise Pi05cError(
            "Netron is not installed: pip install 'pi05c[view]', or open the file at https://netron.app"
        ) from error
    echo(f"{graph} in Netron")
    netron.start(str(graph))
    netron.wait()
