"""The parts of a split engine, run one after the other as the policy that they were cut from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pi05c.backend.onnxruntime import load_runner
from pi05c.backend.signature import TensorSpec
from pi05c.extraction import NEXT_STATE, ROW, STATE, STEP, StepTable
from pi05c.folder import GRAPH, TABLE
from pi05c.graph.errors import UsageError
from pi05c.graph.runner import Array


class StageRunner(Protocol):
    """A loaded part."""

    inputs: tuple[TensorSpec, ...]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As `pi05c.graph.runner.Runner`."""
        ...


@dataclass(frozen=True)
class Stage:
    """One part of a chain."""

    name: str
    runner: StageRunner


@dataclass(frozen=True)
class StageCall:
    """A part by itself, as a run of the whole calls it first.

    Attributes:
        runs: how often a run calls it.
        work: calls it once.
    """

    name: str
    runs: int
    work: Callable[[], Any]


class Chain:
    """Runs parts in order; implements `pi05c.graph.runner.Runner`.

    Each part takes its inputs by name from the inputs of the policy and from what earlier parts gave. What engines
    hand to one another stays on the GPU. A step runs once for each row of its table.

    Args:
        stages: in order of execution.
        outputs: what `run` gives.
        table: of the step, if the last stage is one.
        steps: denoising steps; None for as many as the policy was exported with.
        place_row: puts a row where the stages take it from; None where they take arrays.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        outputs: Sequence[str],
        *,
        table: StepTable | None = None,
        steps: int | None = None,
        place_row: Callable[[Array], Any] | None = None,
    ) -> None:
        self._stages = list(stages)
        self._outputs = list(outputs)
        self._table = table
        rows: Sequence[Any] = [] if table is None else table.rows(steps)
        self._rows = list(rows) if place_row is None else [place_row(row) for row in rows]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see `Runner`."""
        space = self.run_all(inputs)
        return {name: space[name] for name in self._outputs}

    def calls(self, inputs: Mapping[str, Array]) -> list[StageCall]:
        """Run once, and give each part by itself, on what it was given first."""
        first: dict[str, Callable[[], Any]] = {}
        runs: Counter[str] = Counter()

        def see(stage: Stage, given: dict[str, Array]) -> None:
            first.setdefault(stage.name, partial(stage.runner.run, given))
            runs[stage.name] += 1

        self.run_all(inputs, see)
        return [StageCall(name, runs[name], work) for name, work in first.items()]

    def run_all(
        self, inputs: Mapping[str, Array], see: Callable[[Stage, dict[str, Array]], None] | None = None
    ) -> dict[str, Array]:
        """Run once; the inputs, what crosses the borders, and the outputs.

        Args:
            see: called before each part, with what it is given.
        """
        space = dict(inputs)

        def run(stage: Stage, given: dict[str, Array]) -> dict[str, Array]:
            if see is not None:
                see(stage, given)
            return stage.runner.run(given)

        for stage in self._stages:
            names = [spec.name for spec in stage.runner.inputs]
            if self._table is None or stage.name != STEP:
                space |= run(stage, {name: space[name] for name in names})
                continue
            fixed = {name: space[name] for name in names if name not in (STATE, ROW)}
            x = space[self._table.state]
            for row in self._rows:
                given = {**fixed, STATE: x, ROW: row}
                x = run(stage, {name: given[name] for name in names})[NEXT_STATE]
            space[self._table.result] = x
        return space


def load_chain(
    folder: Path,
    parts: Sequence[str],
    outputs: Sequence[str],
    *,
    steps: int | None = None,
    load: Callable[[str], StageRunner] | None = None,
    place_row: Callable[[Array], Any] | None = None,
) -> Chain:
    """Load the parts of a split engine.

    Args:
        folder: the engine folder.
        parts: the names of its parts.
        outputs: of the policy.
        steps, place_row: see `Chain`.
        load: gives the runner of a part by its name; None for its graph in onnxruntime.

    Raises:
        UsageError: `steps` is given and no part is a step, or it is not positive.
        Pi05cError: a part does not load.
    """
    if steps is not None and STEP not in parts:
        raise UsageError(
            f"--steps cannot change the denoising steps of {folder}, which are inside its engine: split off {STEP} "
            "(--split vision+prefix,step)"
        )
    table = StepTable(folder / STEP / TABLE) if STEP in parts else None
    stages = [
        Stage(part, load_runner(folder / part / GRAPH) if load is None else load(part)) for part in parts
    ]
    return Chain(stages, outputs, table=table, steps=steps, place_row=place_row)


__all__ = ["Chain", "Stage", "StageCall", "load_chain"]
