"""A benchmark for people: one self-contained page with a table and plots."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pi05c.benchmark import Benchmark, Configuration
from pi05c.graph.files import write_text

_TEMPLATES = Path(__file__).parent / "templates"
_WIDTH, _HEIGHT = 560.0, 260.0
"""Of a plot's area, in the units of SVG."""


def write_benchmark(path: Path, benchmark: Benchmark) -> None:
    """Write the page. Whatever names hold is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("bench.html").render(
        b=benchmark, bars=bars(benchmark.configurations), plots=plots(benchmark.configurations)
    )
    write_text(path, text)


@dataclass(frozen=True)
class Bar:
    """The latency of a configuration along an axis of `_WIDTH`: median, and marks at p95 and p99."""

    configuration: Configuration
    median: float
    p95: float
    p99: float


def bars(configurations: list[Configuration]) -> list[Bar]:
    """One bar a configuration, the longest as wide as the axis."""
    longest = max((item.latency.p99_ms for item in configurations), default=0.0) or 1.0
    scale = _WIDTH / longest
    return [
        Bar(item, item.latency.median_ms * scale, item.latency.p95_ms * scale, item.latency.p99_ms * scale)
        for item in configurations
    ]


@dataclass(frozen=True)
class Point:
    """A configuration in a plot; `value` is that of the swept size."""

    x: float
    y: float
    value: int
    ms: float


@dataclass
class Line:
    """Medians of one way to run, over a swept size."""

    name: str
    points: list[Point] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Coordinates as SVG has them."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


@dataclass
class Plot:
    """Latency over one swept size."""

    size: str
    highest: float
    lines: list[Line]


def plots(configurations: list[Configuration]) -> list[Plot]:
    """A plot for each swept size; lines join what differs in it alone. The vertical axis begins at 0."""
    found = []
    for size in dict.fromkeys(name for item in configurations for name in item.swept):
        swept = [item for item in configurations if size in item.swept]
        values = [item.swept[size] for item in swept]
        low, high = min(values), max(values)
        highest = max(item.latency.median_ms for item in swept) or 1.0
        lines: dict[str, Line] = {}
        for item in sorted(swept, key=lambda item: item.swept[size]):
            name = item.name.removesuffix(f", {size} {item.swept[size]}")
            x = _WIDTH * (item.swept[size] - low) / ((high - low) or 1)
            y = _HEIGHT * (1 - item.latency.median_ms / highest)
            lines.setdefault(name, Line(name)).points.append(
                Point(x, y, item.swept[size], item.latency.median_ms)
            )
        found.append(Plot(size, highest, list(lines.values())))
    return found


__all__ = ["Bar", "Line", "Plot", "Point", "bars", "plots", "write_benchmark"]
