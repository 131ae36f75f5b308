"""One run of passes over a model, looked at on the way: dumped, printed, checked, limited, stopped and gone on with."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pi05c.backend.targets import Target, parse_targets
from pi05c.calibration import MeasuredRanges, cached_ranges
from pi05c.fitting import fitting, planned_inputs
from pi05c.graph.check import load_valid
from pi05c.graph.errors import UsageError
from pi05c.graph.io import Model
from pi05c.graph.ranges import Ranges, Wanted
from pi05c.graph.text import canonical_text
from pi05c.passes.pipeline import AfterStep, Step, StepResult
from pi05c.passes.pipeline import run as run_steps
from pi05c.plugins import parse_passes
from pi05c.progress import Progress, Update
from pi05c.samples import Samples, find_samples, split
from pi05c.stagecheck import StageChecker, StageError, VerifyEach
from pi05c.stages import StageFolder, load_stage, recorded_ranges
from pi05c.thresholds import MAX, Method, parse_method

CHANGED, ALL = "changed", "all"
"""Words of `--print-after` beside the names of passes."""

_LIMIT = re.compile(r"(?:(?P<name>\w+)=)?(?P<limit>\d+)\Z")
_STAGE_TITLE = re.compile(r"(?P<number>\d+)-(?P<name>\w+)\Z")


@dataclass(frozen=True)
class RunOptions:
    """How a run of passes is looked at.

    Attributes:
        plugins: files and entry points that bring passes; see `pi05c.plugins`.
        rewrite_limit: `N` for every pass, `NAME=N` for one: after how many rewrites it is stopped.
        stop_after: the last pass to run, by name (its first run) or as `03-name`.
        start_from: a dumped stage; the passes behind it run.
        dump: folder that gets every stage.
        print_after: the pass whose result is printed as text, `changed` for each that changed something, or `all`.
        verify_each: check each result.
    """

    plugins: tuple[str, ...] = ()
    rewrite_limit: tuple[str, ...] = ()
    stop_after: str | None = None
    start_from: Path | None = None
    dump: Path | None = None
    print_after: str | None = None
    verify_each: VerifyEach | None = None


@dataclass(frozen=True)
class Plan:
    """The passes of a run.

    Attributes:
        steps: of the pipeline up to the last one that runs.
        done: how many of them the graph has been through.
        start: the dumped stage that it starts from, None for the plain graph.
    """

    steps: tuple[Step, ...]
    done: int = 0
    start: Path | None = None

    @property
    def ahead(self) -> tuple[Step, ...]:
        """The steps that run."""
        return self.steps[self.done :]

    @property
    def text(self) -> str:
        """The steps as pipeline text."""
        return ",".join(step.text for step in self.steps) or "none"

    def load(self, model: Path) -> Model:
        """The graph that the steps run on, where `model` is the plain graph."""
        return load_valid(model) if self.start is None else load_stage(self.start)[0]


def plan(passes: str | None, options: RunOptions) -> Plan:
    """Decide which passes run.

    Args:
        passes: pipeline text; None for that of the stage to start from, else `default`.

    Raises:
        UsageError: the text is wrong, it departs from what the stage has been through, or an option names a pass
            that does not run.
        Pi05cError: a plug-in or the stage cannot be loaded.
    """
    steps, done = _resolved(passes, options)
    for text in options.rewrite_limit:
        steps = (*steps[:done], *_limited(steps[done:], text))
    if options.stop_after is not None:
        steps = steps[: _place(options.stop_after, steps, done, "--stop-after") + 1]
    chosen = Plan(steps, done, options.start_from)
    refuse_print_after(options, [chosen])
    return chosen


def refuse_print_after(options: RunOptions, plans: Sequence[Plan]) -> None:
    """Check that one of several runs prints something.

    Raises:
        UsageError: the pass that `print_after` names does not run.
    """
    name = options.print_after
    if name is None or name in (CHANGED, ALL):
        return
    titles = [(title, plain) for plan in plans for title, plain in _titles(plan)]
    if all(name not in either for either in titles):
        ahead = [step for plan in plans for step in plan.ahead]
        raise UsageError(f"--print-after names {name!r}, which does not run: {_running(ahead)}")


def _titles(plan: Plan) -> list[tuple[str, str]]:
    """How the stages behind the passes that run are called: `03-name` and `name`."""
    names = [step.spec.name for step in plan.steps]
    return [(f"{number:02d}-{name}", name) for number, name in enumerate(names, 1)][plan.done :]


def _resolved(passes: str | None, options: RunOptions) -> tuple[tuple[Step, ...], int]:
    if options.start_from is None:
        return parse_passes(passes or "default", options.plugins), 0
    stage = load_stage(options.start_from)[1]
    own = parse_passes(stage.pipeline, options.plugins)
    steps = own if passes is None else parse_passes(passes, options.plugins)
    for number, (past, step) in enumerate(zip(own[: stage.number], steps, strict=False), 1):
        if past.text != step.text:
            raise UsageError(
                f"{options.start_from} has been through {past.text} as pass {number}, where --passes names {step.text}: "
                "only passes behind the stage may differ"
            )
    if len(steps) < stage.number:
        raise UsageError(f"{options.start_from} has been through more passes than --passes names")
    return steps, stage.number


def _limited(steps: Sequence[Step], text: str) -> tuple[Step, ...]:
    match = _LIMIT.match(text)
    if match is None:
        raise UsageError(
            f"--rewrite-limit {text!r} is malformed: write a number, or NAME=NUMBER for one pass"
        )
    name, limit = match["name"], int(match["limit"])
    if name is not None and all(step.spec.name != name for step in steps):
        raise UsageError(f"--rewrite-limit names {name!r}, which does not run: {_running(steps)}")
    return tuple(replace(step, limit=limit) if name in (None, step.spec.name) else step for step in steps)


def _place(name: str, steps: Sequence[Step], done: int, option: str) -> int:
    """Index of the pass that an option names, among those that run."""
    match = _STAGE_TITLE.match(name)
    for index in range(done, len(steps)):
        wanted = steps[index].spec.name
        if name == wanted or (match and int(match["number"]) == index + 1 and match["name"] == wanted):
            return index
    raise UsageError(f"{option} names {name!r}, which does not run: {_running(steps[done:])}")


def _running(steps: Iterable[Step]) -> str:
    return f"the passes that run are {', '.join(step.spec.name for step in steps) or 'none'}"


@dataclass(frozen=True)
class RunSamples:
    """What ranges are measured on, and what results are verified on."""

    measured: Samples
    held_back: Samples

    @property
    def files(self) -> set[Path]:
        """The files that they are read from."""
        return self.measured.files | self.held_back.files


def samples_for(
    plain: Model, steps: Sequence[Step], calibration: Sequence[str | Path], progress: Progress
) -> RunSamples | None:
    """The samples that a run of passes uses; None where there are none. What the user must know of them is said.

    Args:
        plain: the plain graph.
        steps: that will run on it, or on its parts.
        calibration: as `pi05c.samples.find_samples` takes it.

    Raises:
        Pi05cError: they cannot be used, or none fits what the graph is specialized for.
    """
    found = find_samples(plain, calibration)
    if found is None:
        return None
    samples = fitting(found, planned_inputs(plain, steps))
    if len(samples) < len(found):
        progress.warn(
            f"{len(found) - len(samples)} of {len(found)} samples do not fit what the graph is specialized for and are "
            "left out"
        )
    if samples.synthetic:
        progress.warn(
            f"ranges come from made-up samples ({samples.source}): record some before a robot moves"
        )
    measured, held_back = split(samples)
    if len(held_back) == 0:
        held_back = measured
        progress.warn("there is one sample only: it serves both calibration and verification")
    return RunSamples(measured, held_back)


class Calibrator:
    """Gives passes their ranges: those recorded beside the stage that a run starts from, else measured ones.

    `cached_ranges` says what `cache`, `scratch`, `method` and `executor` are.

    Attributes:
        ranges: what was given; None before, and where there are no samples.
        recorded: the ranges beside the stage that the run starts from; None where it starts before them.
        measured: whether this run measured them, or found them in its cache.
    """

    def __init__(
        self,
        plan: Plan,
        samples: Samples | None,
        progress: Progress,
        *,
        title: str = "calibrate",
        cache: Path | None = None,
        scratch: Path | None = None,
        fresh: bool = False,
        method: Method = MAX,
        executor: Executor | None = None,
    ) -> None:
        self._title, self._fresh = title, fresh
        self.recorded: MeasuredRanges | None = None
        # The ranges beside a stage were measured before the first pass that asks. Where that is the next one, they are
        # those of this graph, and samples that are given come first.
        known = plan.done if samples is not None else plan.done + 1
        if plan.start is not None and any(step.spec.ranges for step in plan.steps[:known]):
            self.recorded = recorded_ranges(plan.start.parent)
        self._samples, self._progress, self._cache, self._scratch = samples, progress, cache, scratch
        self._method, self._executor = method, executor
        self.ranges: MeasuredRanges | None = None
        self.measured = False

    def __call__(self, model: Model, wanted: Wanted) -> Ranges | None:
        """A `pi05c.passes.pipeline.Calibrate`."""
        if self.recorded is not None:
            self.ranges = self.recorded
        elif self._samples is not None:
            self.measured = True
            with self._progress.stage(self._title) as update:
                self.ranges = cached_ranges(
                    model,
                    wanted.tensors,
                    self._samples.only(tensor.name for tensor in model.graph.inputs),
                    self._cache,
                    rows=wanted.rows,
                    quantized=wanted.quantized,
                    method=self._method,
                    executor=self._executor,
                    scratch=self._scratch,
                    fresh=self._fresh,
                    progress=lambda done, total: update(done / total, f"sample {done} of {total}"),
                )
            if self.ranges.cached:
                self._progress.note("ranges: measured before on this graph and these samples, not again")
        return self.ranges


@dataclass(frozen=True)
class RunResult:
    """What a run of passes did.

    Attributes:
        model: the graph, as rewritten.
        results: one for each pass that ran.
        errors: of each pass, where numbers were verified.
        stages: file of each dumped stage by number.
    """

    model: Model
    results: tuple[StepResult, ...]
    errors: tuple[StageError, ...] = ()
    stages: dict[int, Path] | None = None


def run(
    model: Model,
    plan: Plan,
    calibrate: Calibrator,
    options: RunOptions,
    update: Update,
    *,
    samples: Samples | None = None,
    targets: Sequence[Target] = (),
    scratch: Path | None = None,
    reads: Iterable[Path] = (),
    place: str = "",
    after_step: AfterStep | None = None,
) -> RunResult:
    """Run the passes that are ahead on `model`, in place.

    Args:
        samples: inputs that dumped stages are kept with and numbers are verified on.
        targets: GPUs whose formats `verify_each` holds the graph to.
        scratch: folder for stages that are measured and not dumped; None: the system's.
        reads: files of samples and the plain graph, which a dump must not replace.
        place: the part that the model is, named where stages are printed; empty for the whole.
        after_step: called after each pass as well.

    Raises:
        Pi05cError: a pass failed, or a file cannot be written.
        VerificationError: `verify_each` found something.
    """
    numbers = options.verify_each == "numbers"
    if numbers and samples is None:
        raise UsageError("--verify-each=numbers runs the graph on samples: give --calibration FILE.npz")
    checker = StageChecker(targets, samples if numbers else None) if options.verify_each else None
    stages: dict[int, Path] = {}
    number = plan.done

    with ExitStack() as stack:
        reads = {path for path in (*reads, model.path, plan.start) if path is not None}
        folder = _stage_folder(plan, options, reads, numbers, scratch, stack)

        def write(follows: str | None) -> Path | None:
            if folder is not None:
                stages[number] = folder.write(model, number, follows)
            return stages.get(number)

        def calibrated(current: Model, wanted: Wanted) -> Ranges | None:
            ranges = calibrate(current, wanted)
            if folder is not None and calibrate.ranges is not None:
                folder.write_ranges(calibrate.ranges)
            return ranges

        def after(current: Model, result: StepResult) -> None:
            nonlocal number
            number += 1
            spec = result.step.spec
            path = write(spec.name)
            if options.print_after in (ALL, spec.name, f"{number:02d}-{spec.name}") or (
                options.print_after == CHANGED and result.rewrites
            ):
                _print_stage(current, number, result, place)
            if checker is not None:
                checker.check(current, path, result)
            if after_step is not None:
                after_step(current, result)

        if folder is not None and samples is not None:
            folder.write_samples(samples)
        if folder is not None and calibrate.recorded is not None:
            folder.write_ranges(calibrate.recorded)
        if plan.start is not None and _goes_on_in(options.dump, plan):
            stages[number] = plan.start
        else:
            write(plan.steps[number - 1].spec.name if number else None)
        if checker is not None:
            checker.start(model, stages.get(number))
        results = run_steps(
            model,
            plan.ahead,
            calibrate=calibrated,
            before_step=lambda step: update(None, step.spec.name),
            after_step=after,
        )
    errors = tuple(checker.errors) if checker is not None else ()
    return RunResult(model, tuple(results), errors, stages if options.dump is not None else None)


def _stage_folder(
    plan: Plan,
    options: RunOptions,
    reads: Collection[Path],
    numbers: bool,
    scratch: Path | None,
    stack: ExitStack,
) -> StageFolder | None:
    if options.dump is not None:
        first = plan.done + 1 if _goes_on_in(options.dump, plan) else 0
        return StageFolder(options.dump, plan.text, first=first, reads=reads)
    if numbers:
        made = stack.enter_context(TemporaryDirectory(prefix="pi05c-", dir=scratch))
        return StageFolder(Path(made), plan.text)
    return None


def _goes_on_in(dump: Path | None, plan: Plan) -> bool:
    """Whether the stage that a run starts from lies in the folder that its stages are written to."""
    return plan.start is not None and dump is not None and plan.start.parent.resolve() == dump.resolve()


def _print_stage(model: Model, number: int, result: StepResult, place: str) -> None:
    stage = f"{number:02d}-{result.step.spec.name}{f' of {place}' if place else ''}"
    title = f"# {stage}: {len(result.changes)} changed, {len(result.skips)} skipped"
    print(f"{title}\n{canonical_text(model.graph)}", end="", file=sys.stderr)


def run_passes(
    model: Path | str | Model,
    passes: str | None = None,
    options: RunOptions | None = None,
    *,
    calibration: Sequence[str | Path] = (),
    calibration_method: str = "max",
    target: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> RunResult:
    """Run passes and nothing else: no engine folder is written, and the outcome is not held against the plain graph.

    Args:
        model: the plain graph, or its file; a graph in memory is rewritten in place.
        passes: as `plan` takes them.
        calibration: as `pi05c.samples.find_samples` takes it.
        calibration_method: as `pi05c.thresholds.parse_method` takes it.
        target: GPUs whose formats `verify_each` holds the graph to.
        cache: folder of measured ranges; None for the user's.
        executor: where samples are measured; None: in this process.

    Raises:
        Pi05cError: as `plan` and `run`.
    """
    progress, options = progress or Progress(), options or RunOptions()
    method = parse_method(calibration_method)
    chosen = plan(passes, options)
    plain = model if isinstance(model, Model) else load_valid(model)
    samples = None
    if calibration or _uses_samples(chosen, options):
        samples = samples_for(plain, chosen.steps, calibration, progress)
    current = plain if chosen.start is None else load_stage(chosen.start)[0]
    measured = None if samples is None else samples.measured
    calibrate = Calibrator(chosen, measured, progress, cache=cache, method=method, executor=executor)
    with progress.stage("passes") as update:
        return run(
            current,
            chosen,
            calibrate,
            options,
            update,
            samples=None if samples is None else samples.held_back,
            targets=parse_targets(target) if target is not None else (),
            reads={
                *(() if plain.path is None else (plain.path,)),
                *(() if samples is None else samples.files),
            },
        )


def _uses_samples(plan: Plan, options: RunOptions) -> bool:
    measures = any(step.spec.ranges is not None for step in plan.ahead)
    return measures or options.dump is not None or options.verify_each == "numbers"


__all__ = ["Calibrator", "Plan", "RunOptions", "RunResult", "plan", "run", "run_passes"]
