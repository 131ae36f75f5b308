"""`pi05c passes` and `pi05c inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pi05c.cli.app import Debug, Json, Plugin, app
from pi05c.cli.output import console, engine_lines, plain_table, print_json, show_precision


@app.command("passes")
def passes_command(plugin: Plugin = None, json_: Json = False, debug: Debug = False) -> None:
    """List the passes in default order, with their options."""
    from pi05c.passes import PRESETS, REGISTRY
    from pi05c.plugins import load_plugin

    for name in plugin or ():
        load_plugin(name)
    order = list(dict.fromkeys([*PRESETS["default"], *REGISTRY]))
    if json_:
        print_json({"passes": [_described(name) for name in order], "presets": PRESETS})
        return
    table = plain_table("pass", "exact", "what it does", "options")
    for name in order:
        facts = _described(name)
        options = "\n".join(f"{option['name']}={option['default']}" for option in facts["options"])
        table.add_row(name, "yes" if facts["exact"] else "no", facts["summary"], options)
    screen = console()
    screen.print(table)
    for preset, members in PRESETS.items():
        screen.print(f"{preset}: {', '.join(members) or 'nothing'}", markup=False)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="An engine folder or an ONNX file.")],
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Show inputs, outputs, precision by part, sizes, pipeline and provenance."""
    from pi05c.inspection import inspect

    found = inspect(path)
    if json_:
        print_json(found.as_json())
        return
    screen = console()
    screen.print(f"{path}: opset {found.opset}, {found.nodes:,} nodes", markup=False)
    for role, records in (("input", found.inputs), ("output", found.outputs)):
        for record in records:
            shape = ",".join(map(str, record.shape))
            contract = f", {record.contract}" if record.contract else ""
            screen.print(f"  {role:6} {record.name}: {record.dtype}[{shape}]{contract}", markup=False)
    for total in found.weights:
        screen.print(
            f"  {total.tensors:,} weights in {total.dtype}: {total.bytes / 1e6:,.1f} MB", markup=False
        )
    show_precision(found.precision)
    source = found.source
    if source.config is not None:
        screen.print(f"config: {json.dumps(source.config)}", markup=False)
    if source.weights_random is not None:
        screen.print(f"weights: {'random' if source.weights_random else 'from a checkpoint'}")
    if source.robot is not None:
        screen.print(f"robot: {json.dumps(source.robot)}", markup=False)
    if found.manifest is not None:
        screen.print(f"pipeline: {found.manifest.pipeline.resolved}", markup=False)
        for part in found.manifest.parts:
            screen.print(f"part {part.name}", markup=False)
            for role, records in (("input", part.inputs), ("output", part.outputs)):
                for record in records:
                    shape = ",".join(map(str, record.shape))
                    screen.print(f"  {role:6} {record.name}: {record.dtype}[{shape}]", markup=False)
        for line in engine_lines(path, found.manifest):
            screen.print(line, markup=False)
    for name, size in found.files.items():
        screen.print(f"  {name}: {size:,} bytes", markup=False)


def _described(name: str) -> dict[str, Any]:
    from pi05c.passes import REGISTRY

    spec = REGISTRY[name]
    return {
        "name": name,
        "summary": spec.summary,
        "exact": spec.exact,
        "after": list(spec.after),
        "min_opset": spec.opset_for(),
        "needs_ranges": spec.ranges is not None and not spec.ranges_optional,
        "formats": list(spec.formats_for()),
        "options": [
            {"name": key, "type": str(parameter.annotation), "default": parameter.default}
            for key, parameter in spec.options.items()
        ],
    }
