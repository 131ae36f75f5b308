"""The page of `pi05c tune`: error against cost, and what each group costs. One self-contained file, as the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pi05c.graph.files import write_text
from pi05c.report import figure
from pi05c.tunegroups import KEPT
from pi05c.tunemeasure import TIME

if TYPE_CHECKING:
    from pi05c.tuning import TuneResult

_TEMPLATES = Path(__file__).parent / "templates"

WIDTH, HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 20, 50
"""Size of the plot, and its margins, in the units of the SVG."""

_TICKS = (1, 2, 5)

UNITS: Mapping[str, tuple[float, str]] = {TIME: (1e-6, "us"), "read": (1e3, "kB"), "stored": (1e3, "kB")}
"""Unit of what a group saves, and its name."""

_AXES: Mapping[str, tuple[float, str]] = {
    TIME: (1e-3, "floor on {device}, ms"),
    "read": (1e6, "bytes of weights read in one run, MB"),
    "stored": (1e6, "bytes of weights, MB"),
}


@dataclass(frozen=True)
class Mark:
    """A point of the plot.

    Attributes:
        x, y: in the units of the SVG.
        kind: its class on the page.
        label: what stands beside it; empty for none.
        told: what the browser shows of it.
        left: whether the label stands to the left of it.
    """

    x: float
    y: float
    kind: str
    label: str
    told: str
    left: bool


@dataclass(frozen=True)
class Plot:
    """Error, on a logarithmic scale, against what is to be small."""

    axis: str
    marks: tuple[Mark, ...]
    line: str
    limit: float
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def write_page(result: TuneResult, model: str) -> None:
    """Write `result.page`. Whatever the model's names hold is escaped.

    Raises:
        Pi05cError: the file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["figure"] = figure
    formats = list(dict.fromkeys(each for group in result.groups for each in group.formats))
    largest = max(
        (effect.error for effects in result.effects.values() for effect in effects.values()), default=0.0
    )
    text = environment.get_template("tune.html").render(
        r=result,
        model=model,
        plot=plot_of(result),
        formats=formats,
        kept=KEPT,
        unit=UNITS[result.minimize],
        largest=math.sqrt(largest) or 1.0,
        families=[point for point in result.points if point.kind == "together"],
        measured=[point for point in result.points if point.kind != "together"],
    )
    write_text(result.page, text)


def plot_of(result: TuneResult) -> Plot:
    """Naive recipes, choices that were measured, the chosen one, and the line of predictions."""
    shown = [point for point in result.points if point.kind != "together"]
    unit, axis = _AXES[result.minimize]
    places = [(point.tuned.cost(result.minimize, result.device.name) / unit, point.worst) for point in shown]
    predicted = [(cost / unit, error) for cost, error in result.frontier]
    errors = [error for _, error in (*places, *predicted) if 0 < error < math.inf]
    x_range = _padded([x for x, _ in (*places, *predicted)])
    y_range = (min([*errors, result.limit]) / 1.5, max([*errors, result.limit]) * 1.5)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = math.log(min(max(y, y_range[0]), y_range[1]) / y_range[0]) / math.log(y_range[1] / y_range[0])
        return (
            round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 1),
            round(HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM), 1),
        )

    marks = []
    for point, (x, y) in zip(shown, places, strict=True):
        place = at(x, y)
        told = f"{point.name}: error {y:.4g}, {axis.format(device=result.device.product)} {x:.4g}"
        label = "" if point.kind == "tried" else point.name
        marks.append(Mark(*place, point.kind, label, told, place[0] > WIDTH * 0.7))
    line = " ".join(f"{x},{y}" for x, y in (at(*each) for each in predicted))
    return Plot(
        axis.format(device=result.device.product),
        tuple(marks),
        line,
        at(x_range[0], result.limit)[1],
        tuple((at(x, y_range[0])[0], f"{x:.4g}") for x in _even_ticks(*x_range)),
        tuple((at(x_range[0], y)[1], f"{y:g}") for y in _log_ticks(*y_range)),
    )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.06 * high or 1.0
    return low - pad, high + pad


def _even_ticks(low: float, high: float) -> list[float]:
    """Some round numbers between two."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * each for each in (*_TICKS, 10) if (high - low) / (power * each) <= 6)
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for each in _TICKS if low <= (tick := each * 10.0**power) <= high]


__all__ = ["Mark", "Plot", "plot_of", "write_page"]
