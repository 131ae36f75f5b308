"""Pipelines that lie in files, for `--passes @recipe.toml`: an ordered list of passes with options, and provenance.

    [[passes]]
    name = "quantize_linears"
    llm = "nvfp4"
    keep = ["*vision*layers.0.*"]

    [provenance]
    tool = "pi05c tune"

Each table of `passes` is one pass: what stands beside `name` are its options. A name may be that of a preset. What
`provenance` holds changes nothing; where `model_sha256` is in it, compiling another model is warned of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pi05c.graph.errors import Pi05cError
from pi05c.graph.files import read_toml, write_text
from pi05c.passes.pipeline import Step, items

MARK = "@"
"""What an item of `--passes` begins with that names a file."""

MODEL = "model_sha256"
"""The entry of the provenance that tells for which model a file was made: the hash of its file and of its weights."""

_SEPARATORS = frozenset("{},=")
"""What tells items and options of a pipeline's text apart, and can be in no value."""


@dataclass(frozen=True)
class PipelineFile:
    """A pipeline as a file holds it.

    Attributes:
        text: as `--passes` takes it.
        provenance: where it comes from.
    """

    text: str
    provenance: Mapping[str, Any] = field(default_factory=dict)


def expand(text: str) -> str:
    """A pipeline's text with the passes of a file in place of each `@FILE`.

    Raises:
        Pi05cError: as `read_pipeline_file`.
    """
    if MARK not in text:
        return text
    return ",".join(
        read_pipeline_file(Path(item[1:])).text if item.startswith(MARK) else item for item in items(text)
    )


def files_of(text: str) -> list[Path]:
    """The files that a pipeline's text names."""
    return [Path(item[1:]) for item in items(text) if item.startswith(MARK)]


def read_pipeline_file(path: Path) -> PipelineFile:
    """Read a file. Whether its passes and options exist shows when the text is parsed.

    Raises:
        Pi05cError: it cannot be read, or is no list of passes.
    """
    table = read_toml(path)
    if unknown := sorted(table.keys() - {"passes", "provenance"}):
        raise Pi05cError(f"{path} holds {unknown[0]!r}: a pipeline holds `passes` and `provenance`")
    passes, provenance = table.get("passes"), table.get("provenance", {})
    if not isinstance(passes, list) or not passes or not isinstance(provenance, dict):
        raise Pi05cError(f'{path} lists no passes: write a table [[passes]] with name = "..." for each')
    return PipelineFile(",".join(_item(path, entry) for entry in passes), provenance)


def write_pipeline_file(path: Path, steps: Iterable[Step], provenance: Mapping[str, Any], title: str) -> None:
    """Write steps that `read_pipeline_file` reads again; the file appears whole or not at all.

    Args:
        provenance: texts, numbers, lists of these, and one level of tables of them.
        title: the comment at the top.

    Raises:
        Pi05cError: the file cannot be written.
    """
    lines = [f"# {title}", ""]
    for step in steps:
        options = {
            key: list(value) if isinstance(value, tuple) else value for key, value in step.given.items()
        }
        lines += ["[[passes]]", f"name = {_spelled(step.spec.name)}"]
        lines += [*(f"{key} = {_spelled(value)}" for key, value in options.items()), ""]
    tables = {key: value for key, value in provenance.items() if isinstance(value, Mapping)}
    lines += ["[provenance]"]
    lines += [f"{key} = {_spelled(value)}" for key, value in provenance.items() if key not in tables]
    for name, table in tables.items():
        lines += [
            "",
            f"[provenance.{name}]",
            *(f"{_key(k)} = {_spelled(value)}" for k, value in table.items()),
        ]
    write_text(path, "\n".join(lines) + "\n")


def _item(path: Path, entry: object) -> str:
    """One pass as pipeline text."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise Pi05cError(f'{path} lists a pass without a name: write name = "..." in each table [[passes]]')
    options = []
    for key, value in entry.items():
        if key == "name":
            continue
        parts = value if isinstance(value, list) else [value]
        spelled = [str(part).lower() if isinstance(part, bool) else str(part) for part in parts]
        if bad := next((text for text in [key, *spelled] if _SEPARATORS & set(text)), None):
            raise Pi05cError(
                f"{path} gives {entry['name']} the option {key} with {bad!r}: none of {{ }} , = can be in it; write ? for "
                "one character of a pattern"
            )
        options.append(f"{key}={','.join(spelled)}")
    return f"{entry['name']}{{{','.join(options)}}}" if options else str(entry["name"])


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else json.dumps(name)


def _spelled(value: Any) -> str:
    """A value in TOML, whose strings, numbers and booleans JSON spells alike."""
    if isinstance(value, (list, tuple)):
        parts = [_spelled(part) for part in value]
        short = f"[{', '.join(parts)}]"
        return short if len(short) < 80 else "[\n" + "".join(f"  {part},\n" for part in parts) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


__all__ = ["MARK", "MODEL", "PipelineFile", "expand", "files_of", "read_pipeline_file", "write_pipeline_file"]
