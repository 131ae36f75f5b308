"""`pi05c cost`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi05c.cli.app import Debug, Json, Plugin, Quiet, Verbose, app
from pi05c.cli.output import FILE_WIDTH, console, make_progress, plain_table, print_json
from pi05c.graph.errors import UsageError

if TYPE_CHECKING:
    from pi05c.backend.devices import Device
    from pi05c.cost import Cost, Group, Kernel


@app.command()
def cost(
    model: Annotated[Path, typer.Argument(help="An ONNX file or an engine folder.")],
    other: Annotated[Path | None, typer.Argument(help="A second one, to set beside the first.")] = None,
    target: Annotated[
        str | None, typer.Option(help="The GPU whose roofline counts, such as h100, rtx5090 or thor.")
    ] = None,
    passes: Annotated[
        str | None, typer.Option(help="Run these passes on a copy, and show the cost after each.")
    ] = None,
    plugin: Plugin = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let float32 products use TF32 tensor cores.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Count FLOPs, bytes and kernels by part, kind and type, and the least time that they take."""
    from pi05c.backend.devices import find_device
    from pi05c.cost import cost_after_each_pass, cost_of

    if other is not None and passes is not None:
        raise UsageError("--passes takes one model: leave out the second, or --passes")
    if passes is not None and model.is_dir():
        raise UsageError(
            f"--passes takes an ONNX file, and {model} is a folder: name the model that it was made of"
        )
    device = None if target is None else find_device(target)
    if passes is not None:
        with make_progress(quiet, verbose).stage("passes") as update:
            found = cost_after_each_pass(model, passes, lambda name: update(None, name), plugins=plugin or ())
        labels = [step.name or "before" for step in found]
        _show_passes(labels, [step.kernels for step in found], device, tf32=tf32, as_json=json_)
        return
    kernels = [cost_of(path) for path in (model, other) if path is not None]
    if json_:
        described = [
            _described(path, these, device, tf32)
            for path, these in zip((model, other), kernels, strict=False)
        ]
        print_json({"device": None if device is None else _device_json(device), "graphs": described})
    elif len(kernels) == 1:
        _show(kernels[0], device, tf32=tf32)
    else:
        _show_pair(kernels[0], kernels[1], device, tf32=tf32)


def _show(kernels: Sequence[Kernel], device: Device | None, *, tf32: bool) -> None:
    from pi05c.cost import grouped, total

    table = _table(("part", "kind", "type"), device)
    for group in grouped(kernels, device, tf32=tf32):
        table.add_row(group.part, group.kind, group.dtype, *_figures(group.cost))
    table.add_section()
    for group in grouped(kernels, device, by=("part",), tf32=tf32):
        table.add_row(group.part, "all", "", *_figures(group.cost))
    table.add_row("all", "", "", *_figures(total(kernels, device, tf32=tf32)))
    _print(table, device)


def _show_pair(
    before: Sequence[Kernel], after: Sequence[Kernel], device: Device | None, *, tf32: bool
) -> None:
    from pi05c.cost import Cost, grouped, total

    table = _table(("part", "kind"), device)
    for by in (("part", "kind"), ("part",)):
        sides = [
            {(group.part, group.kind): group.cost for group in grouped(kernels, device, by=by, tf32=tf32)}
            for kernels in (before, after)
        ]
        nothing = Cost(seconds=None if device is None else 0.0)
        for part, kind in dict.fromkeys([*sides[0], *sides[1]]):
            pair = [side.get((part, kind), nothing) for side in sides]
            table.add_row(part, kind or "all", *_changes(*pair))
        table.add_section()
    table.add_row("all", "", *_changes(total(before, device, tf32=tf32), total(after, device, tf32=tf32)))
    _print(table, device)


def _show_passes(
    labels: Sequence[str],
    states: Sequence[Sequence[Kernel]],
    device: Device | None,
    *,
    tf32: bool,
    as_json: bool,
) -> None:
    from pi05c.cost import grouped, total

    costs = [total(kernels, device, tf32=tf32) for kernels in states]
    if as_json:
        steps = [
            {
                "pass": label,
                "total": asdict(cost),
                "parts": {g.part: asdict(g.cost) for g in grouped(kernels, device, by=("part",), tf32=tf32)},
            }
            for label, cost, kernels in zip(labels, costs, states, strict=True)
        ]
        print_json({"device": None if device is None else _device_json(device), "passes": steps})
        return
    table = _table(("after",), device)
    if device is not None:
        table.add_column("change, ms", justify="right")
    previous = costs[0]
    for label, cost in zip(labels, costs, strict=True):
        change = [] if cost.seconds is None or previous.seconds is None else [cost.seconds - previous.seconds]
        table.add_row(label, *_figures(cost), *(f"{1e3 * value:+.3f}" for value in change))
        previous = cost
    _print(table, device)
    console().print(
        "Ranges are assumed, not measured: every activation that a pass asks about is said to fit."
    )


def _table(labels: Sequence[str], device: Device | None) -> Any:
    figures = ["GFLOP", "weights MB", "activations MB", "kernels", "operators"]
    table = plain_table(*labels, figures=figures if device is None else [*figures, "ms"])
    for column in table.columns:
        column.no_wrap = True
    return table


def _figures(cost: Cost) -> list[str]:
    """GFLOP, megabytes of weights and activations, kernels, operators, and milliseconds where there are any."""
    figures = [
        f"{cost.flops / 1e9:,.2f}",
        f"{cost.weight_bytes / 1e6:,.1f}",
        f"{cost.activation_bytes / 1e6:,.1f}",
        f"{cost.kernels:,}",
        f"{cost.operators:,}",
    ]
    return figures if cost.seconds is None else [*figures, f"{1e3 * cost.seconds:,.3f}"]


def _changes(before: Cost, after: Cost) -> list[str]:
    pairs = zip(_figures(before), _figures(after), strict=True)
    return [old if old == new else f"{old} → {new}" for old, new in pairs]


def _print(table: Any, device: Device | None) -> None:
    screen = console(FILE_WIDTH)
    screen.print(table)
    if device is not None:
        screen.print(
            f"Floor on {device.product}: peak rates, {device.bandwidth / 1e9:,.4g} GB/s, no launches.",
            markup=False,
        )


def _described(
    path: Path | None, kernels: Sequence[Kernel], device: Device | None, tf32: bool
) -> dict[str, Any]:
    from pi05c.cost import grouped, total

    def rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
        return [{"part": g.part, "kind": g.kind, "dtype": g.dtype, **asdict(g.cost)} for g in groups]

    return {
        "path": str(path),
        "total": asdict(total(kernels, device, tf32=tf32)),
        "groups": rows(grouped(kernels, device, tf32=tf32)),
    }


def _device_json(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "product": device.product,
        "rates": dict(device.rates),
        "bandwidth": device.bandwidth,
        "source": device.source,
    }
