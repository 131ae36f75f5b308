"""What a long run tells while it works: a live line on a terminal, nothing in a pipe, log lines if asked for.

Everything goes to stderr, so that stdout carries results alone.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pi05c.terminal import screen

Update = Callable[[float | None, str], None]
"""Takes the part of a stage that is done, 0 to 1 or None where unknown, and a few words on what it is at."""

_SHOWN_SECONDS = 1.0
"""A stage that took longer leaves a line behind on a terminal."""


@dataclass(frozen=True)
class Stage:
    """A finished stage. `peak_memory` is the process's largest resident set so far, in bytes; 0 if unknown."""

    title: str
    seconds: float
    peak_memory: int


class Progress:
    """Keeps the times of stages and what was said; shows nothing.

    Attributes:
        stages: finished stages in order.
        warnings: sentences that the user must read.
    """

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.warnings: list[str] = []

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """Time a stage and show it while the block runs."""
        start = time.perf_counter()
        with self._show(title) as update:
            yield update
        self.stages.append(Stage(title, time.perf_counter() - start, peak_memory()))
        self._done(self.stages[-1])

    def warn(self, sentence: str) -> None:
        """Say something that the user must not miss."""
        self.warnings.append(sentence)

    def note(self, sentence: str) -> None:
        """Say something worth knowing."""

    @contextlib.contextmanager
    def _show(self, title: str) -> Iterator[Update]:
        yield lambda fraction, detail: None

    def _done(self, stage: Stage) -> None:
        pass


class StderrProgress(Progress):
    """Warnings and notes on stderr; a live line where it is a terminal; each stage logged if `verbose`."""

    def __init__(self, *, verbose: bool = False) -> None:
        super().__init__()
        self._verbose = verbose
        self._console = screen(stderr=True, soft_wrap=True)

    def warn(self, sentence: str) -> None:
        super().warn(sentence)
        self._console.print(f"[bold yellow]warning:[/] {_escaped(sentence)}")

    def note(self, sentence: str) -> None:
        self._console.print(_escaped(sentence))

    @contextlib.contextmanager
    def _show(self, title: str) -> Iterator[Update]:
        if not self._console.is_terminal:
            if self._verbose:
                self._console.print(f"{_escaped(title)} ...")
            yield lambda fraction, detail: None
            return
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Live

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
        )
        with Live(*columns, console=self._console, transient=True, redirect_stdout=False) as live:
            task = live.add_task(_escaped(title), total=None, detail="")

            def update(fraction: float | None, detail: str) -> None:
                if fraction is None:
                    live.update(task, detail=_escaped(detail))
                else:
                    live.update(task, total=1.0, completed=fraction, detail=_escaped(detail))

            yield update

    def _done(self, stage: Stage) -> None:
        if self._verbose:
            memory = f", {stage.peak_memory / 1e9:.1f} GB peak" if stage.peak_memory else ""
            self._console.print(f"{_escaped(stage.title)}: {stage.seconds:.1f} s{memory}")
        elif self._console.is_terminal and stage.seconds >= _SHOWN_SECONDS:
            self._console.print(f"[green]done[/] {_escaped(stage.title)} [dim]{stage.seconds:.1f} s[/]")


def peak_memory() -> int:
    """The largest resident set of this process so far in bytes, mapped files included; 0 where unknown."""
    try:
        import resource
    except ImportError:
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
