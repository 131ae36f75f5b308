"""A diff for people: lines for a terminal, markdown for a pull request, a page with both graphs side by side."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from pi05c.diffing import Attributed, ModelDiff, counted
from pi05c.graph.diff import Change
from pi05c.graph.text import node_line

SHOWN_CHANGES = 100
"""Differences of one pass and kind of thing that text and markdown list before they only count."""

CONTEXT_LINES = 3
"""Equal lines around a difference in the page, as in a unified diff."""

_TEMPLATES = Path(__file__).parent / "templates"
_WORD = re.compile(r"[\w./:]+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Line:
    """One line of text; `mark` is `-`, `+`, `@` of a heading, `.` of an explanation, or a space."""

    mark: str
    text: str

    @property
    def plain(self) -> str:
        """The line as text without colour shows it."""
        return f"{self.mark}{self.text}" if self.mark in "-+" else self.text

    @property
    def style(self) -> str:
        """How rich shows it."""
        return {"-": "red", "+": "green", "@": "bold cyan", ".": "dim"}.get(self.mark, "")


def text_lines(diff: ModelDiff, *, everything: bool = False) -> Iterator[Line]:
    """The diff as lines, by pass where the files are stages of one run.

    What differs in nothing but its type is counted, and of a pass no more than `SHOWN_CHANGES` nodes and as many
    initializers are listed, unless `everything` is asked for.
    """
    if diff.same:
        return
    yield Line("-", f"-- {diff.a}")
    yield Line("+", f"++ {diff.b}")
    yield Line(" ", summary(diff.changes))
    for title, changes in by_passes(diff).items():
        yield Line(" ", "")
        yield Line("@", f"@@ {title}: {summary(changes)}" if title else "@@")
        yield from _section(changes, everything)
    if diff.hashed.tensors:
        yield Line(" ", "")
        yield Line(".", read_note(diff))


def read_note(diff: ModelDiff) -> str:
    """Which weights were read."""
    size = diff.hashed.bytes / 1e6
    return f"{diff.hashed.tensors} external weights ({size:,.1f} MB) have no recorded SHA-256 and were read"


def summary(changes: Iterable[Attributed]) -> str:
    """`nodes: 3 removed, 5 added; initializers: 1 changed`."""
    things: dict[str, list[str]] = {}
    for (thing, kind), count in counted(tuple(changes)).items():
        things.setdefault(thing, []).append(f"{count:,} {kind}")
    return "; ".join(f"{thing}s: {', '.join(counts)}" for thing, counts in things.items())


def by_passes(diff: ModelDiff) -> dict[str, tuple[Attributed, ...]]:
    """The changes under the passes that made them, in the order of these; under an empty title where none is known."""
    groups: dict[tuple[str, ...], list[Attributed]] = {}
    for found in diff.changes:
        groups.setdefault(found.passes, []).append(found)
    order = {name: number for number, name in enumerate(diff.passes)}
    keys = sorted(groups, key=lambda passes: [order[name] for name in passes])
    return {", ".join(passes): tuple(groups[passes]) for passes in keys}


def _section(changes: tuple[Attributed, ...], everything: bool) -> Iterator[Line]:
    things: dict[str, list[Change]] = {}
    for found in changes:
        if everything or found.change.kinds != ("retyped",):
            things.setdefault(found.change.thing, []).append(found.change)
    for thing, listed in things.items():
        limit = len(listed) if everything else SHOWN_CHANGES
        for change in listed[:limit]:
            yield from _change(change)
        if len(listed) > limit:
            yield Line(".", f"  {len(listed) - limit:,} more {thing}s (--all lists them)")
    if not everything:
        yield from _retyped([found.change for found in changes if found.change.kinds == ("retyped",)])


def _change(change: Change) -> Iterator[Line]:
    where = f"[{change.scope}] " if change.scope else ""
    prefix = f"{change.thing} " if change.thing in ("input", "output", "model") else ""
    for mark, text in (("-", change.before), ("+", change.after)):
        if text is not None:
            yield Line(mark, f" {where}{prefix}{text}")
    for detail in change.details:
        yield Line(".", f"    {detail}")


def _retyped(changes: list[Change]) -> Iterator[Line]:
    """One line for all that went from one type to another."""
    totals: Counter[tuple[str, str]] = Counter()
    for change in changes:
        for old, new in {_element_types(detail) for detail in change.details}:
            totals[change.thing, f"{old} -> {new}" if old != new else f"{old} in another shape"] += 1
    for (thing, types), count in totals.items():
        yield Line(".", f"  {thing}s retyped: {count:,} {types}")


def _element_types(detail: str) -> tuple[str, str]:
    """`float32` and `float16` of `float32[4] -> float16[4]`."""
    old, new = detail.split(" -> ")
    return old.split("[", 1)[0], new.split("[", 1)[0]


def markdown(diff: ModelDiff, *, everything: bool = False) -> str:
    """The diff for a pull request: a table of counts, and the lines of each pass in a fold."""
    lines = [f"### `{code(str(diff.a))}` and `{code(str(diff.b))}`", ""]
    if diff.same:
        return "\n".join([*lines, "No difference.", ""])
    lines += ["| pass | differences |", "|---|---|"]
    groups = by_passes(diff)
    for title, changes in groups.items():
        lines.append(f"| {title or 'all'} | {summary(changes)} |")
    for title, changes in groups.items():
        body = [
            f"{line.mark if line.mark in '-+' else ' '}{line.text}" for line in _section(changes, everything)
        ]
        lines += [
            "",
            f"<details><summary>{title or 'Differences'}</summary>",
            "",
            *fenced(body, "diff"),
            "",
            "</details>",
        ]
    if diff.hashed.tensors:
        lines += ["", read_note(diff)]
    return "\n".join([*lines, ""])


def fenced(body: list[str], language: str) -> list[str]:
    """A code block whose fence no line of it can close."""
    longest = max((len(run) for line in body for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *body, fence]


def code(text: str) -> str:
    """Text that a code span of Markdown can hold."""
    return text.replace("`", "'")


# Side by side


@dataclass(frozen=True)
class Row:
    """A line of the page: the same place in both graphs.

    Attributes:
        left, right: pieces of text, each with whether it differs; None where a graph has no such line.
        kinds: how it differs; empty of an equal line.
        note: differences in words and the passes that made them.
        elided: how many equal lines stand here that are not shown.
    """

    left: list[tuple[str, bool]] | None
    right: list[tuple[str, bool]] | None
    kinds: tuple[str, ...] = ()
    note: str = ""
    elided: int = 0


def html(diff: ModelDiff) -> str:
    """A self-contained page; whatever the names hold is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    other = [found for found in diff.changes if found.change.thing != "node"]
    sections = [
        (title, rows)
        for title, rows in (
            ("Inputs, outputs and initializers", [_row(found) for found in other]),
            ("Nodes", _with_context(list(_Sides(diff).rows()))),
        )
        if any(row.kinds for row in rows)
    ]
    totals = {title: summary(changes) for title, changes in by_passes(diff).items()}
    note = read_note(diff) if diff.hashed.tensors else ""
    return environment.get_template("diff.html").render(d=diff, sections=sections, totals=totals, note=note)


def _row(found: Attributed, indent: str = "") -> Row:
    change = found.change
    prefix = f"{change.thing} " if change.thing in ("input", "output", "model") else ""
    left, right = (
        None if text is None else f"{indent}{prefix}{text}" for text in (change.before, change.after)
    )
    note = "; ".join((*found.passes, *change.details))
    if left is None or right is None:
        whole = [[(text, False)] if text is not None else None for text in (left, right)]
        return Row(whole[0], whole[1], change.kinds, note)
    return Row(*_marked(left, right), change.kinds, note)


def _marked(left: str, right: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both lines in pieces, those that the other lacks marked."""
    words = _WORD.findall(left), _WORD.findall(right)
    sides: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    for tag, i, j, k, m in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, piece in zip(sides, ("".join(words[0][i:j]), "".join(words[1][k:m])), strict=True):
            if piece:
                side.append((piece, tag != "equal"))
    return sides


def _with_context(rows: list[Row]) -> list[Row]:
    """The rows that differ with a few equal ones around them; a row that counts in place of the others."""
    near = bytearray(len(rows))
    for index, row in enumerate(rows):
        if row.kinds:
            low, high = max(0, index - CONTEXT_LINES), min(len(rows), index + CONTEXT_LINES + 1)
            near[low:high] = b"\1" * (high - low)
    shown: list[Row] = []
    elided = 0
    for keep, row in zip(near, rows, strict=True):
        if keep and elided:
            shown.append(Row(None, None, elided=elided))
            elided = 0
        if keep:
            shown.append(row)
        else:
            elided += 1
    return [*shown, Row(None, None, elided=elided)] if elided else shown


@dataclass
class _Sides:
    """Walks both graphs in the order in which the second lists its nodes, bodies indented."""

    diff: ModelDiff
    shown: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        pairs = self.diff.graphs.alignment
        self.a, self.b = pairs.a, pairs.b
        self.of_a = {id(node): number for number, node in enumerate(self.a.nodes)}
        self.of_b = {id(node): number for number, node in enumerate(self.b.nodes)}
        self.pairs = pairs
        self.made = {y: x for x, y in pairs.nodes.items()}
        nodes = [found for found in self.diff.changes if found.change.thing == "node"]
        self.changed = {found.change.b: found for found in nodes if found.change.b is not None}
        self.gone = {found.change.a: found for found in nodes if found.change.b is None}

    def rows(self) -> Iterator[Row]:
        yield from self._scope(self.a.scopes[0].graph, self.b.scopes[0].graph, "")

    def _scope(self, before: gs.Graph | None, after: gs.Graph, indent: str) -> Iterator[Row]:
        left = [] if before is None else before.nodes
        follow: dict[int, list[int]] = {}
        anchor = -1
        for node in left:
            number = self.of_a[id(node)]
            if number in self.gone:
                follow.setdefault(anchor, []).append(number)
            else:
                anchor = number
        for number in follow.get(-1, ()):
            yield from self._removed(number, indent)
        for node in after.nodes:
            y = self.of_b[id(node)]
            x = self.made.get(y)
            if y in self.changed:
                yield _row(self.changed[y], indent)
            else:
                line = f"{indent}{node_line(node)}"
                old = line if x is None else f"{indent}{node_line(self.a.nodes[x])}"
                yield Row([(old, False)], [(line, False)])
            theirs = {} if x is None else _bodies(self.a.nodes[x])
            for key, body in _bodies(node).items():
                yield Row([(f"{indent}  {key}:", False)], [(f"{indent}  {key}:", False)])
                yield from self._scope(theirs.get(key), body, f"{indent}    ")
            for number in follow.get(x, ()) if x is not None else ():
                yield from self._removed(number, indent)

    def _removed(self, number: int, indent: str) -> Iterator[Row]:
        yield _row(self.gone[number], indent)
        for body in _bodies(self.a.nodes[number]).values():
            for node in body.nodes:
                yield from self._removed(self.of_a[id(node)], f"{indent}    ")


def _bodies(node: gs.Node) -> dict[str, Any]:
    return {key: value for key, value in sorted(node.attrs.items()) if isinstance(value, gs.Graph)}
