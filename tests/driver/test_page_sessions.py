"""The pages that work with Polygraphy are run as they stand, from the first command to the last."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from page_session import File, Python, Shell, first_missing, same, session

ROOT = Path(__file__).parents[2]
PAGES = ("debugging.md", "polygraphy.md")


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_page_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the page exports its model, which needs the extra [torch]")
    pytest.importorskip("onnxscript", reason="the page exports its model, which needs the extra [torch]")
    steps = session((ROOT / "docs" / name).read_text())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "200"}
    for step in steps:
        if isinstance(step, File):
            (tmp_path / step.name).write_text(step.text)
            continue
        words = (
            [sys.executable, "-c", step.text] if isinstance(step, Python) else ["bash", "-c", step.command]
        )
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        expected = step if isinstance(step, Shell) else Shell(step.text)
        assert done.returncode == expected.status, f"{expected.command}\n{done.stdout}"
        if expected.output:
            missing = first_missing(expected.output, done.stdout.splitlines())
            assert missing is None, (
                f"{expected.command} does not print in its place: {missing}\n{done.stdout}"
            )


def test_pages_that_show_polygraphy_are_run() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        shells = [step for step in session(page.read_text()) if isinstance(step, Shell)]
        if any(shell.command.startswith("polygraphy ") for shell in shells):
            assert page.name in PAGES


# The reader of pages

PAGE = """\
Take `one.py`:

```python
a = 1
```

And run it:

    $ first --with "a b"  # exit 1
    printed 0.5
    ...
    end

    $ second
    $ third

Or:

    fourth
    fifth

```python
print(2)
```
"""


def test_session_is_read_in_order() -> None:
    assert session(PAGE) == [
        File("one.py", "a = 1\n"),
        Shell('first --with "a b"', ("printed 0.5", "...", "end"), 1),
        Shell("second"),
        Shell("third"),
        Shell("fourth"),
        Shell("fifth"),
        Python("print(2)\n"),
    ]


@pytest.mark.parametrize(
    ("printed", "missing"),
    [
        (["printed 0.52", "this", "that", "end"], None),
        (["printed 0.52", "end"], None),
        (["printed 0.9", "end"], "printed 0.5"),
        (["more", "printed 0.5", "end"], "printed 0.5"),
        (["printed 0.5", "this"], "end"),
        (["printed 0.5", "end", "this", "end"], "(more is printed)"),
        (["printed 0.5", "end", "this"], "(more is printed)"),
    ],
)
def test_output_is_held_to_the_page(printed: list[str], missing: str | None) -> None:
    assert first_missing(["printed 0.5", "...", "end"], printed) == missing


def test_lines_that_stand_together_are_printed_together() -> None:
    assert first_missing(["...", "a", "b", "..."], ["a", "c", "a", "b", "d"]) is None
    assert first_missing(["...", "a", "b", "..."], ["a", "c", "b", "d"]) == "a\nb"


def test_lines_may_differ_in_space_and_last_digits() -> None:
    assert same("a  1 0.0241", "a 1    0.0239")
    assert not same("a 1 0.0241", "a 2 0.0241")
    assert not same("a 1e-07", "a 1e-05")
    assert same("a 120 ...", "a 120 0.08 seconds")
    assert not same("a 120 ...", "a 121 0.08 seconds")


def test_output_behind_no_command_is_an_error() -> None:
    with pytest.raises(ValueError, match="'first' stands behind no command"):
        session("    first\n\n    $ second\n")
