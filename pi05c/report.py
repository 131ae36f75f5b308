"""`report.html`: the manifest for people, one self-contained file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pi05c.folder import REPORT
from pi05c.manifest import CostRecord, Manifest, PassRecord, PipelineRecord

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: Path, manifest: Manifest) -> None:
    """Write the report of an engine folder beside its manifest. Whatever the model's names hold is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["figure"] = figure
    environment.globals["skips"] = grouped_skips
    environment.globals["cost_rows"] = cost_rows
    environment.globals["pass_costs"] = pass_costs
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


def figure(value: float) -> str:
    """A number with four significant digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def cost_rows(pipeline: PipelineRecord) -> list[tuple[CostRecord, CostRecord]]:
    """What each part, and all of them, cost before and after the passes; empty where that is not known."""
    before = pipeline.cost
    after = pipeline.passes[-1].cost if pipeline.passes else before
    if not before or not after:
        return []
    rows = []
    for name in dict.fromkeys(record.part for record in (*before, *after)):
        old, new = ([record for record in side if record.part == name] for side in (before, after))
        rows.append((_sum(name, old), _sum(name, new)))
    return [*rows, (_sum("all", before), _sum("all", after))]


def pass_costs(pipeline: PipelineRecord) -> list[tuple[str, CostRecord, CostRecord]]:
    """The passes that change what the graph costs: name, and the sum over all parts before and after each."""
    found = []
    before = _sum("all", pipeline.cost)
    for record in pipeline.passes:
        after = _sum("all", record.cost)
        if record.cost and after != before:
            found.append((record.name, before, after))
        before = after
    return found


def _sum(name: str, records: Sequence[CostRecord]) -> CostRecord:
    return CostRecord(
        part=name,
        flops=sum(record.flops for record in records),
        weight_bytes=sum(record.weight_bytes for record in records),
        activation_bytes=sum(record.activation_bytes for record in records),
        kernels=sum(record.kernels for record in records),
        operators=sum(record.operators for record in records),
        seconds=sum(record.seconds or 0.0 for record in records),
    )
