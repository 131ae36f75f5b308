"""`report.html`: the manifest for people, one self-contained file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pi05c.folder import REPORT
from pi05c.graph.files import write_text
from pi05c.manifest import (
    CostRecord,
    LayerErrorRecord,
    Manifest,
    OperatorRecord,
    PassRecord,
    PipelineRecord,
    QuantizerRecord,
)
from pi05c.passes.patterns.layers import OPERATORS

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
    environment.globals["operators"] = OPERATORS
    environment.globals["maps"] = precision_maps(manifest)
    verified = manifest.verification
    environment.globals["layers"] = [] if verified is None else layer_rows(verified.layers)
    environment.globals["quantizers"] = [] if verified is None else quantizer_rows(verified.quantizers)
    environment.filters["widths"] = width_of
    text = environment.get_template("report.html").render(m=manifest, precision=precision_rows(manifest))
    write_text(folder / REPORT, text)


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


def cost_rows(
    pipeline: PipelineRecord, by: Literal["part", "dtype"] = "part"
) -> list[tuple[str, CostRecord, CostRecord]]:
    """What each part or type, and all of them, cost before and after the passes; empty where that is not known."""
    before = pipeline.cost
    after = pipeline.passes[-1].cost if pipeline.passes else before
    if not before or not after:
        return []
    rows = []
    for name in dict.fromkeys(getattr(record, by) for record in (*before, *after)):
        old, new = (_sum([each for each in side if getattr(each, by) == name]) for side in (before, after))
        rows.append((name, old, new))
    return [*rows, ("all", _sum(before), _sum(after))]


def pass_costs(pipeline: PipelineRecord) -> list[tuple[str, CostRecord, CostRecord]]:
    """The passes that change what the graph costs: name, and the sum over all parts before and after each."""
    found = []
    before = _sum(pipeline.cost)
    for record in pipeline.passes:
        after = _sum(record.cost)
        if record.cost and after != before:
            found.append((record.name, before, after))
        before = after
    return found


def _sum(records: Sequence[CostRecord]) -> CostRecord:
    return CostRecord(
        part="",
        flops=sum(record.flops for record in records),
        weight_bytes=sum(record.weight_bytes for record in records),
        activation_bytes=sum(record.activation_bytes for record in records),
        kernels=sum(record.kernels for record in records),
        operators=sum(record.operators for record in records),
        seconds=sum(record.seconds or 0.0 for record in records),
    )


@dataclass
class PartMap:
    """What computes in which type in one part: by layer and operator, and outside of layers.

    Attributes:
        layers: for each layer the records of each of `OPERATORS` that it has.
        others: records outside of layers.
    """

    part: str
    layers: dict[int, dict[str, list[OperatorRecord]]] = field(default_factory=dict)
    others: list[OperatorRecord] = field(default_factory=list)


def precision_maps(manifest: Manifest) -> list[PartMap]:
    """The precision map of each part."""
    maps: dict[str, PartMap] = {}
    for record in manifest.operators:
        found = maps.setdefault(record.part, PartMap(record.part))
        if record.layer is None or record.operator not in OPERATORS:
            found.others.append(record)
        else:
            found.layers.setdefault(record.layer, {}).setdefault(record.operator, []).append(record)
    return list(maps.values())


def width_of(dtype: str) -> str:
    """What a type is coloured by: its class on the page. Of two factors the narrower counts."""
    known = {"float64": 32, "float32": 32, "bfloat16": 16, "float16": 16, "float8e4m3fn": 8, "float4e2m1": 4}
    bits = [known.get(side, 0) for side in dtype.split(" x ")]
    return f"w{min(bits)}{' half' if len(set(bits)) > 1 else ''}"


@dataclass
class LayerRow:
    """The errors of one layer: the worst step behind each half, and every step."""

    part: str
    layer: int
    steps: list[LayerErrorRecord] = field(default_factory=list)

    def worst(self, half: str) -> LayerErrorRecord | None:
        """The step with the largest error behind a half."""
        return max((s for s in self.steps if s.half == half), key=lambda s: s.relative_l2, default=None)


def layer_rows(records: Sequence[LayerErrorRecord]) -> list[LayerRow]:
    """One row a layer, its steps together."""
    rows: dict[tuple[str, int], LayerRow] = {}
    for record in records:
        rows.setdefault((record.part, record.layer), LayerRow(record.part, record.layer)).steps.append(record)
    return list(rows.values())


@dataclass
class QuantizerRow:
    """What the quantizers of one operator of one layer met, all steps together."""

    part: str | None
    layer: int | None
    operator: str | None
    records: list[QuantizerRecord] = field(default_factory=list)

    @property
    def low(self) -> float:
        """The smallest value."""
        return min(record.low for record in self.records)

    @property
    def high(self) -> float:
        """The largest value."""
        return max(record.high for record in self.records)

    @property
    def largest(self) -> float:
        """The largest share of 448 * scale that a value takes."""
        return max(max(-r.low, r.high) / (r.scale * 448) for r in self.records)

    @property
    def clipped(self) -> int:
        """Elements beyond 448 * scale."""
        return sum(record.clipped for record in self.records)

    @property
    def flushed(self) -> int:
        """Elements that became zero."""
        return sum(record.flushed for record in self.records)

    @property
    def elements(self) -> int:
        """Elements whose number is known."""
        return sum(record.elements or 0 for record in self.records)


def quantizer_rows(records: Sequence[QuantizerRecord]) -> list[QuantizerRow]:
    """One row for each operator of each layer, what clips or flushes most in front."""
    rows: dict[tuple[str | None, int | None, str | None], QuantizerRow] = {}
    for record in records:
        key = record.part, record.layer, record.operator
        rows.setdefault(key, QuantizerRow(*key)).records.append(record)
    return sorted(
        rows.values(),
        key=lambda row: (-row.clipped / (row.elements or 1), -row.flushed / (row.elements or 1)),
    )
