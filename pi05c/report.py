"""`report.html`: the manifest for people, one self-contained file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pi05c.folder import REPORT
from pi05c.manifest import Manifest, PassRecord

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: Path, manifest: Manifest) -> None:
    """Write the report of an engine folder beside its manifest. Whatever the model's names hold is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["skips"] = grouped_skips
    environment.globals["columns"] = precision_columns(manifest)
    environment.globals["pipelines"] = [(part.name, part.pipeline) for part in manifest.parts] or [
        ("", manifest.pipeline)
    ]
    environment.globals["errors"] = [
        *(manifest.verification.errors if manifest.verification is not None else ()),
        *(error for part in manifest.parts for error in part.errors),
    ]
    text = environment.get_template("report.html").render(m=manifest, precision=precision_rows(manifest))
    (folder / REPORT).write_text(text, encoding="utf-8")


def grouped_skips(record: PassRecord) -> list[tuple[str, int, str]]:
    """Skips that share a reason, numbers and names aside: an example of the reason, how many, and one place."""
    groups: dict[str, list[Any]] = {}
    for skip in record.skipped:
        words = [word for word in skip.reason.split() if not any(mark in word for mark in "'0123456789")]
        groups.setdefault(" ".join(words), []).append(skip)
    return [(found[0].reason, len(found), found[0].where) for found in groups.values()]


def precision_columns(manifest: Manifest) -> list[str]:
    """The types that anything computes in, most used first."""
    counts: Counter[str] = Counter()
    for record in manifest.precision:
        counts[record.dtype] += record.count
    return [dtype for dtype, _ in counts.most_common()]


def precision_rows(manifest: Manifest) -> list[tuple[str, str, dict[str, int]]]:
    """Part, kind of operator, and how many compute in each type."""
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for record in manifest.precision:
        rows.setdefault((record.part, record.kind), {})[record.dtype] = record.count
    return [(part, kind, counts) for (part, kind), counts in rows.items()]
