"""What `pi05c bisect` calls good: outputs within a limit of the plain graph's, or a command that says so."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pi05c.backend.targets import Target
from pi05c.comparison import Comparison, compare
from pi05c.graph.errors import MachineError, Pi05cError, UsageError, unwritable
from pi05c.graph.io import load, location_of, tensors
from pi05c.graph.read import read_proto
from pi05c.precision import default_limit, precision_of, refuse_limit
from pi05c.samples import RANDOM_WEIGHTS, WEIGHTS_KEY, Samples
from pi05c.stagecheck import graph_problems, outputs_of

ARTIFACT = Path("polygraphy_debug.onnx")
"""Where `polygraphy debug reduce` leaves the graph that a command is to check (polygraphy 0.53)."""

ARTIFACTS_FOLDER = Path("polygraphy_artifacts")
"""Where Polygraphy's `--artifacts` are sorted into `good` and `bad`."""

PLACEHOLDER = "{}"
"""Stands in a command for the path of the graph, as in `find -exec` and `xargs -I{}`."""

_SHOWN_LINES = 12
"""The last lines of a command's output that are kept."""


@dataclass(frozen=True)
class Verdict:
    """What a criterion says of a graph.

    Attributes:
        good: whether it passes.
        reason: why, in a few words.
        comparison: with the plain graph; None where it was not run, or a command decided.
        output: the last lines that a command printed.
    """

    good: bool
    reason: str
    comparison: Comparison | None = None
    output: str = ""

    @property
    def told(self) -> str:
        """The reason, with the last line that a command printed."""
        return ": ".join([self.reason, *self.output.splitlines()[-1:]])

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        record: dict[str, Any] = {"good": self.good, "reason": self.reason}
        if self.comparison is not None:
            record["error"] = self.comparison.as_json()["worst"]
        if self.output:
            record["output"] = self.output
        return record


class Criterion(Protocol):
    """Judges graphs that lie in files."""

    def limit_of(self, path: Path) -> float:
        """The error that a graph may have; the same for all where the criterion knows no errors."""
        ...

    def judge(self, path: Path, title: str, limit: float) -> Verdict:
        """Whether the graph is good. `title` is what it is called."""
        ...


class ErrorCriterion:
    """A graph is good if it is valid, runs, and departs from the plain graph by no more than a limit.

    Attributes:
        samples: what the graphs run on.
    """

    def __init__(
        self,
        plain: Path,
        samples: Samples,
        *,
        max_error: float | None = None,
        targets: Sequence[Target] = (),
    ) -> None:
        """Run the plain graph.

        Args:
            plain: its file.
            samples: to run on.
            max_error: largest relative L2 error of an output; None: what `pi05c compile` allows for the narrowest type
                that the graph computes in.
            targets: GPUs whose number formats the graphs may use; none for all formats.

        Raises:
            UsageError: the limit is none.
            Pi05cError: the plain graph cannot be run, or gives NaN or infinity.
        """
        refuse_limit(max_error)
        model = load(plain)
        self.samples = samples
        self._max_error = max_error
        self._targets = targets
        self._random = model.metadata.get(WEIGHTS_KEY) == RANDOM_WEIGHTS
        self._known = set(graph_problems(model, targets))
        self._reference = outputs_of(plain, samples)
        compare(self._reference, self._reference)

    def limit_of(self, path: Path) -> float:
        if self._max_error is not None:
            return self._max_error
        return default_limit(precision_of(load(path).graph), weights_random=self._random)

    def judge(self, path: Path, title: str, limit: float) -> Verdict:
        try:
            fresh = [found for found in graph_problems(load(path), self._targets) if found not in self._known]
            if fresh:
                return Verdict(False, f"it is not valid: {fresh[0]}")
            comparison = compare(self._reference, outputs_of(path, self.samples))
        except MachineError:
            raise
        except Pi05cError as error:
            return Verdict(False, f"it does not run: {error}")
        good = comparison.passes(limit)
        worst = comparison.worst.relative_l2
        return Verdict(
            good,
            f"relative L2 error {worst:.4g}, {'within' if good else 'beyond'} the limit of {limit:g}",
            comparison,
        )


@dataclass(frozen=True)
class CheckCommand:
    """A graph is good if a command says so, as `polygraphy debug reduce --check` has it.

    The command finds the graph at `artifact`, or, where `{}` stands in it, at the path that takes its place. It runs in
    the current folder and without a shell. Exit status 0 is good, any other is bad.

    Attributes:
        words: the command.
        artifact: where the graph lies while the command runs.
        fail_codes: the statuses that are bad, where not all but 0 are.
        ignore_fail_codes: statuses that are good beside 0.
        fail_regexes: the graph is bad only if one of them is found in what the command prints; without `fail_codes`,
            whatever its status.
        artifacts: files that the command leaves, to be sorted into `good` and `bad`.
        artifacts_folder: the folder of those two.
    """

    words: tuple[str, ...]
    artifact: Path = ARTIFACT
    fail_codes: tuple[int, ...] = ()
    ignore_fail_codes: tuple[int, ...] = ()
    fail_regexes: tuple[re.Pattern[str], ...] = ()
    artifacts: tuple[Path, ...] = ()
    artifacts_folder: Path = ARTIFACTS_FOLDER

    def __post_init__(self) -> None:
        if not self.words:
            raise UsageError(
                "--check names no command: write it behind, such as --check polygraphy run {} --onnxrt"
            )
        if self.fail_codes and self.ignore_fail_codes:
            raise UsageError("--fail-code and --ignore-fail-code exclude each other: give one of them")
        if not self.in_place and self.artifact.exists():
            raise Pi05cError(
                f"{self.artifact} exists, and is where the command would find the graph: remove it, or name another "
                "file with --iter-artifact"
            )

    @property
    def in_place(self) -> bool:
        """Whether the command is given the path of the graph."""
        return any(PLACEHOLDER in word for word in self.words)

    def limit_of(self, path: Path) -> float:
        return 0.0

    def judge(self, path: Path, title: str, limit: float) -> Verdict:
        """Run the command.

        Raises:
            Pi05cError: it cannot be run, or a file cannot be written.
        """
        if self.in_place:
            return self._judged([word.replace(PLACEHOLDER, str(path)) for word in self.words], title)
        try:
            _place(path, self.artifact)
            return self._judged(self.words, title)
        except OSError as error:
            raise MachineError(f"{self.artifact} cannot be written: {unwritable(error)}") from error
        finally:
            self.artifact.unlink(missing_ok=True)

    def _judged(self, words: Sequence[str], title: str) -> Verdict:
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise Pi05cError(
                f"--check cannot run {words[0]!r} ({error.strerror or error}): name a program, and write a command of "
                "the shell as --check sh -c '...'"
            ) from error
        printed = done.stdout + done.stderr
        good = not self._failed(done.returncode, printed)
        self._sort_artifacts(good, title)
        last = "\n".join(printed.strip().splitlines()[-_SHOWN_LINES:])
        return Verdict(good, f"the command ended with status {done.returncode}", output=last)

    def _failed(self, status: int, printed: str) -> bool:
        """The rule of polygraphy 0.53 (`CheckCmdArgs.run_check`)."""
        if status in self.ignore_fail_codes:
            return False
        found = any(regex.search(printed) for regex in self.fail_regexes)
        if self.fail_codes:
            return status in self.fail_codes and (found or not self.fail_regexes)
        return found if self.fail_regexes else status != 0

    def _sort_artifacts(self, good: bool, title: str) -> None:
        folder = self.artifacts_folder / ("good" if good else "bad")
        for path in self.artifacts:
            if path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.move(path, folder / f"{path.stem}_{title}{path.suffix}")


def parse_check(text: str) -> tuple[str, ...]:
    """The words of a command.

    Raises:
        UsageError: a quote is not closed.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--check {text!r} is no command: {error}") from error


def _place(path: Path, artifact: Path) -> None:
    """Write the graph at `path` as `artifact`, which names its data files where they are: below its folder."""
    below = path.resolve().parent.relative_to(artifact.resolve().parent)
    proto = read_proto(path)
    for tensor in tensors(proto):
        location = location_of(tensor)
        for entry in tensor.external_data:
            if entry.key == "location" and location is not None:
                entry.value = (below / location).as_posix()
    artifact.write_bytes(proto.SerializeToString())


__all__ = [
    "ARTIFACT",
    "ARTIFACTS_FOLDER",
    "CheckCommand",
    "Criterion",
    "ErrorCriterion",
    "Verdict",
    "parse_check",
]
