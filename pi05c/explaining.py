"""`pi05c explain`: what one pass would do to a graph, node by node. Nothing is written, and no graph is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pi05c.cost import AssumedRanges
from pi05c.graph.check import load_valid
from pi05c.graph.clone import collection_paused
from pi05c.graph.errors import UsageError
from pi05c.graph.io import Model
from pi05c.graph.ranges import Ranges, Wanted
from pi05c.nodechanges import Place, Rewrite, Snapshot, Told
from pi05c.passes import REGISTRY
from pi05c.passes.pipeline import Calibrate, Step, StepResult, named
from pi05c.passes.pipeline import run as run_steps
from pi05c.passrun import Calibrator, Plan, RunOptions, plan, samples_for
from pi05c.plugins import parse_passes
from pi05c.progress import Progress
from pi05c.stages import load_stage, recorded_ranges
from pi05c.thresholds import Method, parse_method

ASSUMED = "assumed, so that every activation fits: no sample was run"
"""Where ranges come from that nobody measured."""


@dataclass(frozen=True)
class Explanation:
    """What a pass would do.

    Attributes:
        step: the pass with its options.
        behind: the passes that ran before it, in memory.
        ranges: where ranges came from; None where it needs none.
        skipped: places left alone, each with the reason.
        result: what the pass reported.
    """

    step: Step
    behind: tuple[Step, ...]
    ranges: str | None
    rewrites: tuple[Rewrite, ...]
    skipped: tuple[tuple[Place, str], ...]
    result: StepResult

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "pass": self.step.text,
            "exact": self.step.spec.exact,
            "behind": [step.text for step in self.behind],
            "ranges": self.ranges,
            "nodes_before": self.result.nodes_before,
            "nodes_after": self.result.nodes_after,
            "rewrites": [
                {
                    "number": rewrite.number,
                    "changed": [
                        {**vars(changed.place), "becomes": changed.becomes} for changed in rewrite.changed
                    ],
                    "beside": rewrite.beside,
                    "removed": list(rewrite.removed),
                    "added": list(rewrite.added),
                }
                for rewrite in self.rewrites
            ],
            "skipped": [{**vars(place), "reason": reason} for place, reason in self.skipped],
            "notes": list(self.result.notes),
        }


def explain(
    model: Path | str,
    name: str,
    *,
    passes: str | None = None,
    plugins: Sequence[str] = (),
    start_from: Path | None = None,
    calibration: Sequence[str | Path] = (),
    calibration_method: str = "max",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Run one pass on a graph in memory, and tell what it did.

    Args:
        model: the plain graph.
        name: the pass as pipeline text, `fold_norms` or `quantize_linears{keep=*lm_head*}`.
        passes: a pipeline; those of its passes that stand before the pass run first, all of them where it is not
            in the pipeline. None: none does.
        plugins: as `pi05c.plugins.load_plugin` takes them.
        start_from: a dumped stage to explain the pass on, with the ranges that lie beside it.
        calibration: samples to measure ranges on, where the pass or one before it needs some. Without them, ranges
            are assumed.
        calibration_method: as `pi05c.thresholds.parse_method` takes it.
        cache: folder of measured ranges; None for the user's.

    Raises:
        UsageError: `name` is not one pass, or the method is not known.
        Pi05cError: a file cannot be read, or a pass fails.
    """
    progress = progress or Progress()
    path, method = Path(model), parse_method(calibration_method)
    before, step, chosen = _steps(name, passes, plugins, start_from)
    ahead = (*before, step)
    with collection_paused(), progress.stage("explain") as update:
        current = chosen.load(path)
        ranges = _RangeSource(path, replace(chosen, steps=(*chosen.steps[: chosen.done], *ahead)), progress)
        ranges.choose(calibration, method, cache)
        seen: list[Snapshot] = []

        def before_step(upcoming: Step) -> None:
            update(None, upcoming.spec.name)
            if upcoming is step:
                seen.append(Snapshot(current.graph))

        result = run_steps(current, ahead, calibrate=ranges, before_step=before_step, dry=True)[-1]
        told = Told(seen[0], Snapshot(current.graph))
        rewrites = told.rewrites(result.rewrites)
        skipped = tuple((told.place(skip.where), skip.reason) for skip in result.skips)
    used = ranges.source if any(each.spec.ranges is not None for each in ahead) else None
    return Explanation(step, before, used, rewrites, skipped, result)


def _steps(
    name: str, passes: str | None, plugins: Sequence[str], start_from: Path | None
) -> tuple[tuple[Step, ...], Step, Plan]:
    """The passes that run first, the one that is explained, and the run that they belong to."""
    steps = parse_passes(name, plugins)
    if len(steps) != 1 or named(name) != [steps[0].spec.name]:
        raise UsageError(f"--pass {name!r} is not one pass: known are {', '.join(REGISTRY)}")
    (step,) = steps
    chosen = plan(
        passes or ("none" if start_from is None else None), RunOptions(tuple(plugins), start_from=start_from)
    )
    if passes is None:
        return (), step, chosen
    names = [each.spec.name for each in chosen.ahead]
    if step.spec.name not in names:
        return chosen.ahead, step, chosen
    place = names.index(step.spec.name)
    if not step.options and step.limit is None:
        step = chosen.ahead[place]
    return chosen.ahead[:place], replace(step), chosen


class _RangeSource:
    """Gives passes ranges: those beside the stage, else measured where samples are named, else assumed ones."""

    def __init__(self, model: Path, run: Plan, progress: Progress) -> None:
        self._model, self._run, self._progress = model, run, progress
        self._calibrate: Calibrate = lambda _model, _wanted: AssumedRanges()
        self.source = ASSUMED

    def choose(self, calibration: Sequence[str | Path], method: Method, cache: Path | None) -> None:
        run = self._run
        if run.start is not None and (recorded := _ranges_beside(run.start)) is not None:
            self.source = f"recorded beside {run.start.name}: {recorded.source}"
            self._calibrate = lambda _model, _wanted: recorded
        elif calibration:
            samples = samples_for(load_valid(self._model), run.steps, calibration, self._progress)
            if samples is not None:
                self.source = (
                    f"measured on {len(samples.measured)} samples of {samples.measured.source}, by {method}"
                )
                self._calibrate = Calibrator(
                    run, samples.measured, self._progress, cache=cache, method=method
                )

    def __call__(self, model: Model, wanted: Wanted) -> Ranges | None:
        return self._calibrate(model, wanted)


def _ranges_beside(stage: Path) -> Ranges | None:
    """The ranges recorded in the run of a stage, where they hold for it: where its graph is one that they were
    measured on or a later one."""
    place = load_stage(stage)[1]
    asking = (
        index for index, step in enumerate(parse_passes(place.pipeline)) if step.spec.ranges is not None
    )
    return recorded_ranges(stage.parent) if next(asking, place.number + 1) <= place.number else None


__all__ = ["ASSUMED", "Explanation", "explain"]
