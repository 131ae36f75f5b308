"""`pi05c bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pi05c.cli.app import Backend, Debug, Json, Quiet, Split, Steps, Verbose, app
from pi05c.cli.output import FILE_WIDTH, console, make_progress, plain_table, print_json
from pi05c.graph.errors import UsageError

if TYPE_CHECKING:
    from pi05c.benchmark import Benchmark


@app.command()
def bench(
    paths: Annotated[list[Path], typer.Argument(help="Engine folders or ONNX files, any number.")],
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="torch-eager or torch-compile: the plain model beside them, as often as wanted."),
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            help="Compile the ONNX files by these passes first; as often as wanted, each is measured."
        ),
    ] = None,
    backend: Backend = None,
    split: Split = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="views=1,2,3 (or batch, prompt-length, horizon, steps): models of these sizes with random weights."
        ),
    ] = None,
    steps: Steps = None,
    runs: Annotated[int, typer.Option(help="Timed runs of each configuration.")] = 50,
    warm_up: Annotated[int, typer.Option(help="Runs before them.")] = 5,
    seed: Annotated[int, typer.Option(help="Of observations and random weights.")] = 0,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", "-o", help="FILE.json or FILE.html (with plots) to write; both may be given."
        ),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Time policies: latency, throughput, memory and cold start, by part where split."""
    from pi05c.benchmark import Request, bench, parse_sweeps
    from pi05c.benchreport import write_benchmark
    from pi05c.graph.files import write_text

    _check_outputs(output or (), paths)
    found = bench(
        Request(
            paths=paths,
            baselines=baseline or (),
            passes=passes or (),
            backend=backend,
            split=split,
            sweeps=parse_sweeps(sweep or ()),
            steps=steps,
            runs=runs,
            warm_up=warm_up,
            seed=seed,
        ),
        make_progress(quiet, verbose),
    )
    for path in output or ():
        if path.suffix == ".json":
            write_text(path, found.model_dump_json(indent=1) + "\n")
        else:
            write_benchmark(path, found)
    if json_:
        print_json(found.model_dump(mode="json"))
    elif not quiet:
        _show(found)


def _check_outputs(outputs: list[Path] | tuple[()], reads: list[Path]) -> None:
    """Refuse what cannot be written, before anything is measured."""
    from pi05c.graph.files import refuse_replacing

    for path in outputs:
        if path.suffix not in (".json", ".html"):
            raise UsageError(f"--output {path} must end in .json or .html")
        refuse_replacing(path, reads)


def _show(found: Benchmark) -> None:
    screen = console(FILE_WIDTH)
    figures = ("median ms", "p95", "p99", "call ms", "per second", "memory GB", "cold start s")
    table = plain_table("configuration", "what ran", figures=figures)
    for item in found.configurations:
        latency = item.latency
        table.add_row(
            item.name,
            item.ran,
            *(f"{value:.2f}" for value in (latency.median_ms, latency.p95_ms, latency.p99_ms)),
            f"{item.call.median_ms:.2f}",
            f"{item.throughput:.2f}",
            "" if item.memory is None else f"{item.memory / 1e9:.2f}",
            f"{item.cold_start_s:.2f}",
        )
    screen.print(table)
    if any(item.parts for item in found.configurations):
        parts = plain_table(
            "configuration", "part", figures=("calls", "median ms of one", "p95", "median ms of all")
        )
        for item in found.configurations:
            for part in item.parts:
                one = part.call
                parts.add_row(
                    item.name,
                    part.name,
                    str(part.runs),
                    f"{one.median_ms:.3f}",
                    f"{one.p95_ms:.3f}",
                    f"{one.median_ms * part.runs:.2f}",
                )
        screen.print()
        screen.print(parts)
    on_cpu = [item.name for item in found.configurations if not item.on_gpu]
    if on_cpu:
        screen.print(f"\non the CPU, by the clock of the host: {'; '.join(on_cpu)}", markup=False)
    screen.print(f"{found.gpu or 'no GPU'}, {found.cpu}", markup=False)
