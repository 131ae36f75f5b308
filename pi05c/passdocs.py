"""`make docs`: one page a pass, made of its docstring, its contract and its golden cases, and an index of them.

python -m pi05c.passdocs GOLDEN PAGES
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pi05c.diffview import fenced
from pi05c.golden import AFTER_SUFFIX, BEFORE_SUFFIX
from pi05c.graph.errors import UsageError
from pi05c.passes import PRESETS, REGISTRY, Pass
from pi05c.passes.pipeline import named

INDEX = "README.md"


@dataclass(frozen=True)
class Example:
    """A golden case as a page shows it.

    Attributes:
        name: of the case.
        shows: its sentence.
        before, after: lines of the graph without that sentence; of the result and what the pass reported.
    """

    name: str
    shows: str
    before: list[str]
    after: list[str]

    @property
    def refuses(self) -> bool:
        """Whether the pass changed nothing."""
        return not any(line.startswith("changed: ") for line in self.after)


def pages(golden: Path) -> dict[str, str]:
    """The text of every page by file name.

    Args:
        golden: folder of golden cases, `PASS/NAME.before.txt` and `PASS/NAME.after.txt`; a pass may have none.
    """
    made = {f"{name}.md": page(spec, examples(golden / name)) for name, spec in REGISTRY.items()}
    return {INDEX: index(), **made}


def examples(folder: Path) -> list[Example]:
    """The golden cases of a pass: those that change something first, each kind by name."""
    found = []
    for path in sorted(folder.glob(f"*{BEFORE_SUFFIX}")):
        name = path.name.removesuffix(BEFORE_SUFFIX)
        sentence, *before = path.read_text(encoding="utf-8").splitlines()
        after = path.with_name(f"{name}{AFTER_SUFFIX}").read_text(encoding="utf-8").splitlines()
        found.append(Example(name, sentence.removeprefix("# "), before, after))
    return sorted(found, key=lambda example: example.refuses)


def page(spec: Pass, cases: Sequence[Example]) -> str:
    """The page of one pass."""
    lines = [f"# {spec.name}", "", *(inspect.getdoc(spec.function) or "").splitlines(), "", *_facts(spec)]
    if cases:
        lines += ["", "## Examples"]
    for case in cases:
        lines += ["", f"### {case.name}", "", case.shows, ""]
        if case.before == case.after[: len(case.before)]:
            lines += ["Nothing changes:", "", *fenced(case.after, "text")]
        else:
            lines += [
                "Before:",
                "",
                *fenced(case.before, "text"),
                "",
                "After:",
                "",
                *fenced(case.after, "text"),
            ]
    return "\n".join([*lines, "", f"[All passes]({INDEX})", ""])


def _facts(spec: Pass) -> list[str]:
    presets = [f"`{name}`" for name, members in PRESETS.items() if spec.name in named(",".join(members))]
    facts = [
        (
            "exact",
            "yes: the same function up to float32 rounding" if spec.exact else "no: it changes numbers",
        ),
        ("options", ", ".join(f"`{key}={option.default}`" for key, option in spec.options.items()) or "none"),
        ("in", ", ".join(presets) or "no preset: name it in `--passes`"),
        ("comes after", ", ".join(f"[{name}]({name}.md)" for name in spec.after)),
        ("needs opset", str(spec.opset_for() or "")),
        ("needs of the target", ", ".join(spec.formats_for())),
        ("ranges", _ranges(spec)),
    ]
    return ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts if text)]


def _ranges(spec: Pass) -> str:
    if spec.ranges is None:
        return ""
    return "used where samples are given" if spec.ranges_optional else "needed: give samples"


def index() -> str:
    """The list of all passes in default order, and the presets."""
    order = list(dict.fromkeys(PRESETS["default"]))
    lines = [
        "# The passes",
        "",
        "In the order in which `default` runs them. `pi05c passes` prints this list with options. These pages are made",
        "by `make docs` of docstrings and golden cases.",
        "",
        *_table(order),
    ]
    if others := [name for name in REGISTRY if name not in order]:
        lines += ["", "Not in `default`:", "", *_table(others)]
    lines += ["", "## Presets", ""]
    lines += [f"- `{name}`: {', '.join(members) or 'nothing'}" for name, members in PRESETS.items()]
    return "\n".join([*lines, ""])


def _table(names: Sequence[str]) -> list[str]:
    rows = [
        f"| [{name}]({name}.md) | {'yes' if REGISTRY[name].exact else 'no'} | {REGISTRY[name].summary} |"
        for name in names
    ]
    return ["| pass | exact | what it does |", "|---|---|---|", *rows]


def write(folder: Path, golden: Path) -> None:
    """Write the pages into a folder; pages of passes that are gone are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages(golden)
    for path in folder.glob("*.md"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """Write the pages: `GOLDEN PAGES`."""
    if len(arguments) != 2:
        raise UsageError("give two folders: that of the golden cases, and that of the pages")
    write(Path(arguments[1]), Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
