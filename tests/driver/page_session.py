"""A page of the documentation as a session: the files that it shows, the commands, and what they print.

A fenced Python block is a file if the paragraph before it ends with that file's name in backticks and a colon;
otherwise it is run. In an indented block, `$ ` starts a command whose output follows up to an empty line or the next
command; a block without it holds commands alone. `# exit N` behind a command is its exit status. In an output, a line
`...` stands for any lines, and `...` at the end of a line for its rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

_FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE_NAME = re.compile(r"`(?P<name>[\w.]+)`:\s*\Z")
_STATUS = re.compile(r"\s+# exit (?P<status>\d+)\Z")
_FRACTION = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+")

_INDENT = " " * 4
_PROMPT = "$ "
_ANY = "..."

SAME_SIZE = 0.3
"""By how much of itself a measured fraction may depart from the one on the page; processors round differently."""


@dataclass(frozen=True)
class File:
    """A file that the page shows."""

    name: str
    text: str


@dataclass(frozen=True)
class Python:
    """Statements that the page shows."""

    text: str


@dataclass(frozen=True)
class Shell:
    """A command, the lines that the page shows of its output, and its exit status."""

    command: str
    output: tuple[str, ...] = ()
    status: int = 0


def session(page: str) -> list[File | Python | Shell]:
    """What a page shows, in order.

    Raises:
        ValueError: an output stands behind no command.
    """
    steps: list[File | Python | Shell] = []
    start = 0
    for fence in _FENCED.finditer(page):
        before = page[start : fence.start()]
        steps += _shells(before)
        if fence["language"] == "python":
            name = _FILE_NAME.search(before)
            steps.append(File(name["name"], fence["body"]) if name else Python(fence["body"]))
        start = fence.end()
    return [*steps, *_shells(page[start:])]


def _shells(text: str) -> Iterator[Shell]:
    for block in _blocks(text):
        if not any(line.startswith(_PROMPT) for line in block):
            yield from (_shell(line, ()) for line in block if line)
            continue
        command: str | None = None
        output: list[str] = []
        for line in [*block, ""]:
            if line and not line.startswith(_PROMPT):
                if command is None:
                    raise ValueError(f"{line!r} stands behind no command: write {_PROMPT!r} before it")
                output.append(line)
                continue
            if command is not None:
                yield _shell(command, output)
            command, output = (line.removeprefix(_PROMPT) if line else None), []


def _blocks(text: str) -> Iterator[list[str]]:
    """Runs of indented lines, with empty ones between them kept."""
    block: list[str] = []
    for line in [*text.splitlines(), "end"]:
        if line.startswith(_INDENT) or (block and not line.strip()):
            block.append(line.removeprefix(_INDENT).rstrip())
        elif block:
            yield block
            block = []


def _shell(command: str, output: Iterable[str]) -> Shell:
    status = _STATUS.search(command)
    return Shell(_STATUS.sub("", command), tuple(output), int(status["status"]) if status else 0)


def first_missing(shown: Sequence[str], printed: Sequence[str]) -> str | None:
    """The first of the page's runs of lines that a command did not print in its place; None if there is none."""
    place, anywhere = 0, False
    for is_any, lines in groupby(shown, key=lambda line: line == _ANY):
        if is_any:
            anywhere = True
            continue
        run = list(lines)
        places = range(place, len(printed) - len(run) + 1) if anywhere else (place,)
        found = next((at for at in places if _same_run(run, printed[at : at + len(run)])), None)
        if found is None:
            return "\n".join(run)
        place, anywhere = found + len(run), False
    return None if anywhere or place == len(printed) else "(more is printed)"


def _same_run(shown: Sequence[str], printed: Sequence[str]) -> bool:
    return len(shown) == len(printed) and all(map(same, shown, printed))


def same(shown: str, printed: str) -> bool:
    """Whether two lines differ in white space and in the last digits of fractions alone."""
    if shown.endswith(_ANY):
        shown = shown.removesuffix(_ANY).rstrip()
        words = printed.split()
        printed = " ".join(words[: len(shown.split())])
    if _FRACTION.sub("#", shown).split() != _FRACTION.sub("#", printed).split():
        return False
    pairs = zip(_FRACTION.findall(shown), _FRACTION.findall(printed), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=SAME_SIZE) for a, b in pairs)


__all__ = ["File", "Python", "Shell", "first_missing", "same", "session"]
