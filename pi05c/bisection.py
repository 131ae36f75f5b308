"""`pi05c bisect`: the first pass that makes a graph fail a criterion, and in that pass the first rewrite.

As `git bisect` does, it takes it that whatever comes behind a bad graph is bad. Without a limit given, a stage is held to
the limit of the narrowest type that it computes in, as the outcome of a compile is; the last stage of each limit is
looked at first, so that what an exact pass breaks is not excused by the wider limit of what comes later.

Stages and candidates lie in one folder and share their data files, as dumps do. It becomes the reproducer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pi05c.backend.targets import parse_targets
from pi05c.calibration import MeasuredRanges
from pi05c.criterion import CheckCommand, Criterion, ErrorCriterion, Verdict
from pi05c.cutout import cut_out
from pi05c.diffing import diff_files
from pi05c.folder import scratch
from pi05c.graph.check import load_valid
from pi05c.graph.errors import MachineError, Pi05cError, UsageError, is_of_machine, unwritable
from pi05c.graph.io import DataFolder, Model, location_of, save, tensors
from pi05c.graph.ranges import Ranges, Wanted
from pi05c.graph.read import read_proto
from pi05c.guilt import AFTER, BEFORE, BisectResult, Guilty, Replay, Trial, write_readme
from pi05c.passes import REGISTRY
from pi05c.passes.pipeline import InvalidGraphError, MissingRangesError, Step, StepResult, named
from pi05c.passes.pipeline import run as run_steps
from pi05c.passrun import Calibrator, Plan, RunOptions, plan, samples_for
from pi05c.plugins import parse_passes
from pi05c.progress import Progress, Update
from pi05c.samples import Samples, find_samples, fixed_specs, input_specs, load_samples
from pi05c.stages import SAMPLES, STAGE_KEY, StageFolder, load_stage, recorded_ranges, stage_files
from pi05c.thresholds import MAX, Method, parse_method


def bisect(
    model: Path | str,
    passes: str | None = None,
    options: RunOptions | None = None,
    *,
    check: CheckCommand | None = None,
    max_error: float | None = None,
    calibration: Sequence[str | Path] = (),
    calibration_method: str = "max",
    target: str | None = None,
    output: Path | str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> BisectResult:
    """Find what breaks a graph, and write a folder that shows it.

    Args:
        model: the plain graph, or a folder of dumped stages, the first of which stands for it.
        passes: as `pi05c.passrun.plan` takes them; those of the stages where these are given.
        options: of these, `plugins` and `start_from` count.
        check: the criterion; None for the error against the plain graph.
        max_error: the relative L2 error that is good; None: what `pi05c compile` allows.
        calibration: as `pi05c.samples.find_samples` takes it.
        calibration_method: as `pi05c.thresholds.parse_method` takes it.
        target: GPUs whose number formats the graphs may use.
        output: the folder to write; None: `bisect-PASS` in the current one.
        cache: folder of measured ranges; None for the user's.

    Raises:
        Pi05cError: the graph fails before the first pass, there is nothing to measure on, the outcome does not repeat,
            or a file cannot be read or written.
        UsageError: options exclude each other.
    """
    path, options, progress = Path(model), options or RunOptions(), progress or Progress()
    method = parse_method(calibration_method)
    place = Path("bisect") if output is None else Path(output)
    if output is not None and place.exists():
        raise Pi05cError(f"{place} exists: remove it, or name another folder with -o")
    if check is not None and max_error is not None:
        raise UsageError("--check and --max-error are two criteria: give one of them")
    if path.is_dir() and (passes is not None or options.start_from is not None):
        raise UsageError(f"{path} holds stages, which name their passes: leave out --passes and --start-from")
    if path.is_dir() and method != MAX:
        raise UsageError(f"{path} holds stages with the ranges of their run: leave out --calibration-method")
    with scratch(_beside(check, place)) as work:
        if path.is_dir():
            stages = _dumped(path, options, calibration, check is None)
        else:
            stages = _run(path, passes, options, calibration, method, cache, work.folder, progress)
        criterion: Criterion = check or _by_error(stages, max_error, target)
        with progress.stage("bisect") as update:
            search = _Search(stages, criterion, work.folder, update)
            result = search.result()
        if result.guilty is None or result.start is None:
            return result
        _prune(work.folder, keep=[result.start.name])
        replay = Replay(
            path, result.start.name, tuple(options.plugins), tuple(map(str, calibration)), calibration_method
        )
        write_readme(work.folder, result.guilty, stages.pipeline, replay)
        return _published(result, work.folder, place if output is not None else None)


def _beside(check: CheckCommand | None, place: Path) -> Path:
    """Where the scratch folder lies: below the folder of the file that a command looks for, where it looks for one."""
    return place if check is None or check.in_place else check.artifact.with_name(place.name)


def _by_error(stages: _Stages, max_error: float | None, target: str | None) -> ErrorCriterion:
    if stages.samples is None:
        raise Pi05cError(
            "there are no samples to compare graphs on: give --calibration FILE.npz, or a criterion with --check COMMAND"
        )
    targets = () if target is None else parse_targets(target)
    return ErrorCriterion(stages.plain, stages.samples, max_error=max_error, targets=targets)


# Stages


@dataclass(frozen=True)
class _Stages:
    """The graphs before the first pass and after each.

    Attributes:
        plain: the graph that others are compared with.
        files: by number, without gaps.
        pipeline: the text of all passes.
        steps: the same; None where a plug-in is missing.
        missing: which, in words.
        failure: what the pass behind the last stage failed with; None where all ran.
        ranges: what the passes were given.
        samples: to compare on.
    """

    plain: Path
    files: Mapping[int, Path]
    pipeline: str
    steps: tuple[Step, ...] | None
    missing: str = ""
    failure: str | None = None
    ranges: MeasuredRanges | None = None
    samples: Samples | None = None

    def title(self, number: int) -> str:
        """`03-fold_gqa`, of a pass that failed too."""
        if number in self.files:
            return self.files[number].stem
        assert self.steps is not None
        return f"{number:02d}-{self.steps[number - 1].spec.name}"


def _dumped(folder: Path, options: RunOptions, calibration: Sequence[str | Path], measured: bool) -> _Stages:
    files = stage_files(folder)
    numbers = list(files)
    for number, following in pairwise(numbers):
        if following != number + 1:
            raise Pi05cError(f"{folder} lacks stage {number + 1:02d}: dump the run again")
    first, stage = load_stage(files[numbers[0]])
    samples = None
    if calibration:
        samples = find_samples(first, calibration)
    elif measured and (folder / SAMPLES).is_file():
        samples = load_samples([folder / SAMPLES], input_specs(first), fixed_specs(first))
    steps, missing = None, ""
    try:
        steps = parse_passes(stage.pipeline, options.plugins)
    except UsageError as error:
        missing = f"the rewrite was not looked for: {error}"
        if unknown := [name for name in named(stage.pipeline) if name not in REGISTRY]:
            missing = (
                f"the rewrite was not looked for, since {unknown[0]} is a pass of a plug-in: give the --plugin that the "
                "stages were dumped with"
            )
    return _Stages(
        files[numbers[0]], files, stage.pipeline, steps, missing, None, recorded_ranges(folder), samples
    )


def _run(
    path: Path,
    passes: str | None,
    options: RunOptions,
    calibration: Sequence[str | Path],
    method: Method,
    cache: Path | None,
    folder: Path,
    progress: Progress,
) -> _Stages:
    """Run the passes once, and dump every stage."""
    chosen = plan(passes, options)
    plain = load_valid(path)
    found = samples_for(plain, chosen.steps, calibration, progress)
    calibrate = Calibrator(
        chosen, None if found is None else found.measured, progress, cache=cache, method=method
    )
    stages = StageFolder(folder, chosen.text)
    with progress.stage("passes") as update:
        files, failure = _dump(chosen, chosen.load(path), calibrate, stages, update)
    if found is not None:
        stages.write_samples(found.held_back)
    if calibrate.ranges is not None:
        stages.write_ranges(calibrate.ranges)
    return _Stages(
        path,
        files,
        chosen.text,
        chosen.steps,
        failure=failure,
        ranges=calibrate.ranges,
        samples=None if found is None else found.held_back,
    )


def _dump(
    chosen: Plan, model: Model, calibrate: Calibrator, folder: StageFolder, update: Update
) -> tuple[dict[int, Path], str | None]:
    """Run passes, write each stage, and say what a pass failed with."""
    number = chosen.done
    files = {number: folder.write(model, number, chosen.steps[number - 1].spec.name if number else None)}
    in_pass = False

    def before(step: Step) -> None:
        nonlocal in_pass
        update(None, step.spec.name)
        in_pass = True

    def calibrated(current: Model, wanted: Wanted) -> Ranges | None:
        nonlocal in_pass
        in_pass = False
        ranges = calibrate(current, wanted)
        in_pass = True
        return ranges

    def after(current: Model, result: StepResult) -> None:
        nonlocal number, in_pass
        in_pass = False
        number += 1
        files[number] = folder.write(current, number, result.step.spec.name)

    try:
        run_steps(model, chosen.ahead, calibrate=calibrated, before_step=before, after_step=after)
    except MissingRangesError:
        raise
    except Exception as error:
        if not in_pass or is_of_machine(error):
            raise
        return files, _told(error)
    return files, None


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, Pi05cError) else f"{type(error).__name__}: {error}"


# The search


def _content(path: Path) -> str:
    """SHA-256 of what a graph written by `pi05c.graph.io.save` computes: without its mark as a stage and without where
    its weights lie."""
    proto = read_proto(path)
    metadata = [entry for entry in proto.metadata_props if entry.key != STAGE_KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(metadata)
    for tensor in tensors(proto):
        checksums = [entry for entry in tensor.external_data if entry.key == "checksum"]
        del tensor.external_data[:]
        tensor.external_data.extend(checksums)
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


class _Search:
    def __init__(self, stages: _Stages, criterion: Criterion, folder: Path, update: Update) -> None:
        self.stages, self.criterion, self.folder, self.update = stages, criterion, folder, update
        self.candidates = DataFolder(folder)
        self.trials: list[Trial] = []
        self._judged: dict[tuple[str, float], Verdict] = {}
        self.verdicts: dict[int, Verdict] = {}
        self.limits = self._limits()

    def _limits(self) -> dict[int, float]:
        """The limit of each stage: no narrower than that of a stage before it."""
        limits: dict[int, float] = {}
        widest = 0.0
        for number, path in self.stages.files.items():
            self.update(None, f"looking at {path.stem}")
            widest = limits[number] = max(widest, self.criterion.limit_of(path))
        return limits

    def result(self) -> BisectResult:
        number = self._first_bad_stage()
        if number is None:
            return BisectResult(tuple(self.trials))
        start = self._start(number - 1)
        guilty = self._guilty(number, start)
        return BisectResult(tuple(self.trials), guilty, start)

    def judge(self, title: str, path: Path, limit: float) -> Verdict:
        """What the criterion says of a graph; a graph that was judged before under another title is not judged again."""
        self.update(None, title)
        key = _content(path), limit
        if key not in self._judged:
            self._judged[key] = self.criterion.judge(path, title, limit)
        self.trials.append(Trial(title, self._judged[key]))
        return self._judged[key]

    # Passes

    def _judge_stage(self, number: int) -> Verdict:
        if number not in self.verdicts:
            path = self.stages.files[number]
            self.verdicts[number] = self.judge(path.stem, path, self.limits[number])
        return self.verdicts[number]

    def _first_bad_stage(self) -> int | None:
        first, last = min(self.stages.files), max(self.stages.files)
        verdict = self._judge_stage(first)
        if not verdict.good:
            raise Pi05cError(
                f"{self.stages.title(first)} is bad before any pass has run, since {verdict.told}: no pass is to "
                "blame; see that the criterion holds for the plain graph"
            )
        if self.stages.failure is not None:
            self.trials.append(Trial(self.stages.title(last + 1), Verdict(False, self.stages.failure)))
        else:
            self._judge_stage(last)
        low = first
        for end in self._ends():
            if not self._judge_stage(end).good:
                return self._between(low, end)
            low = end
        return None if self.stages.failure is None else last + 1

    def _ends(self) -> list[int]:
        """The last stage of each limit."""
        numbers = list(self.stages.files)
        return [
            number
            for number, following in zip(numbers, [*numbers[1:], None], strict=True)
            if following is None or self.limits[following] > self.limits[number]
        ]

    def _between(self, low: int, high: int) -> int:
        """The first bad stage behind `low`, which is good, up to `high`, which is bad."""
        while high - low > 1:
            middle = (low + high) // 2
            if self._judge_stage(middle).good:
                low = middle
            else:
                high = middle
        return high

    # Rewrites

    def _start(self, number: int) -> Path:
        """The stage that the guilty pass runs on, in the folder that becomes the reproducer."""
        path = self.stages.files[number]
        if path.resolve().parent == self.folder.resolve():
            return path
        model, stage = load_stage(path)
        folder = StageFolder(self.folder, self.stages.pipeline, first=number)
        if self.stages.samples is not None:
            folder.write_samples(self.stages.samples)
        if self.stages.ranges is not None:
            folder.write_ranges(self.stages.ranges)
        return folder.write(model, number, stage.follows)

    def _guilty(self, number: int, start: Path) -> Guilty:
        """Search the rewrites of the pass behind the stage `start`."""
        title = self.stages.title(number)
        before = self._judge_stage(number - 1)
        after = self.verdicts.get(number) or Verdict(False, self.stages.failure or "")
        if self.stages.steps is None:
            shutil.copyfile(start, self.folder / BEFORE)
            name = title.split("-", 1)[1]
            return Guilty(title, name, None, None, (), before, after, trouble=self.stages.missing)
        step = self.stages.steps[number - 1]
        limit = self.limits.get(number, max(self.limits.values()))
        pair = _Rewrites(self, start, step, title, limit).search(before)
        found = Guilty(
            title, step.text, pair.rewrite, pair.rewrites, pair.names, pair.old.verdict, pair.new.verdict
        )
        assert pair.old.path is not None
        shutil.copyfile(pair.old.path, self.folder / BEFORE)
        if pair.new.path is None:
            return found
        shutil.copyfile(pair.new.path, self.folder / AFTER)
        return self._compared(found)

    def _compared(self, found: Guilty) -> Guilty:
        """Say what differs, and cut it out."""
        paths = self.folder / BEFORE, self.folder / AFTER
        try:
            diff = diff_files(*paths)
        except Pi05cError as error:
            return dataclasses.replace(found, trouble=f"{AFTER} cannot be compared: {error}")
        found = dataclasses.replace(found, diff=dataclasses.replace(diff, a=Path(BEFORE), b=Path(AFTER)))
        try:
            cutout = cut_out(*paths, diff.graphs.alignment, self._sample(found.after))
        except Pi05cError as error:
            return dataclasses.replace(found, trouble=str(error))
        return dataclasses.replace(found, cutout=cutout, trouble=cutout.trouble)

    def _sample(self, verdict: Verdict) -> Mapping[str, Any] | None:
        """The sample on which the graph is worst; the first where none is known."""
        if self.stages.samples is None:
            return None
        return self.stages.samples[0 if verdict.comparison is None else verdict.comparison.worst.sample]


@dataclass(frozen=True)
class _Candidate:
    """A stage after some rewrites of the pass behind it.

    Attributes:
        path: None where the pass left nothing that can be written.
        rewrites: what each changed; None where the pass ended with an error of its own.
        verdict: None before it is judged; where the pass failed, what it failed with.
    """

    path: Path | None
    rewrites: tuple[tuple[str, ...], ...] | None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class _Judged:
    path: Path | None
    verdict: Verdict


@dataclass(frozen=True)
class _Pair:
    """Two graphs one rewrite apart: the first is good, the second bad. The rest as in `Guilty`."""

    old: _Judged
    new: _Judged
    rewrite: int
    rewrites: int | None
    names: tuple[str, ...] = ()


class _Rewrites:
    """The rewrites of one pass on one stage. A limit of None is none."""

    def __init__(self, search: _Search, start: Path, step: Step, title: str, limit: float) -> None:
        self._search, self._start, self._step, self._title, self._limit = search, start, step, title, limit
        self._candidates: dict[int | None, _Candidate] = {}

    def search(self, before: Verdict) -> _Pair:
        """The first bad rewrite.

        Args:
            before: what the criterion says of the stage.

        Raises:
            Pi05cError: the graph is good when the pass runs again.
        """
        start = _Judged(self._start, before)
        first = self._judged(0)
        if not first.verdict.good:
            return _Pair(start, first, 0, None)
        every = self._ran(None)[1]
        high = self._failing() if every is None else len(every)
        count = None if every is None else high
        last = self._judged(high)
        if last.verdict.good:
            whole = self._judged(None)
            if whole.verdict.good:
                raise Pi05cError(
                    f"{self._title} is bad, but good when its pass runs again: its outcome does not repeat, or the stages "
                    "were dumped by another version"
                )
            return _Pair(last, whole, high + 1, count)
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            if self._judged(middle).verdict.good:
                low = middle
            else:
                high = middle
        made = self._candidate(high).rewrites or ()
        names = made[high - 1] if len(made) >= high else ()
        return _Pair(self._judged(low), self._judged(high), high, count, names)

    def _failing(self) -> int:
        """A limit with which the pass fails, where it fails without one."""
        limit = 1
        while self._ran(limit)[1] is not None:
            limit *= 2
        return limit

    def _judged(self, limit: int | None) -> _Judged:
        """Judge the stage after so many rewrites."""
        candidate = self._candidate(limit)
        verdict = candidate.verdict
        if verdict is None and candidate.path is not None:
            verdict = self._search.judge(self._titled(limit), candidate.path, self._limit)
            self._candidates[limit] = dataclasses.replace(candidate, verdict=verdict)
        assert verdict is not None
        return _Judged(candidate.path, verdict)

    def _titled(self, limit: int | None) -> str:
        return f"{self._title}.{'all' if limit is None else limit}"

    def _candidate(self, limit: int | None) -> _Candidate:
        if limit not in self._candidates:
            self._candidates[limit] = self._made(limit)
        return self._candidates[limit]

    def _made(self, limit: int | None) -> _Candidate:
        """Run the pass and write what it leaves."""
        model, rewrites, failure = self._ran(limit)
        verdict = None
        if failure:
            verdict = Verdict(False, failure)
            self._search.trials.append(Trial(self._titled(limit), verdict))
        path = self._search.folder / f"{self._titled(limit)}.onnx"
        if rewrites is None:
            return _Candidate(None, None, verdict)
        try:
            save(model, path, shared=self._search.candidates)
        except Pi05cError as error:
            if verdict is None or is_of_machine(error):
                raise
            return _Candidate(None, rewrites, verdict)
        return _Candidate(path, rewrites, verdict)

    def _ran(self, limit: int | None) -> tuple[Model, tuple[tuple[str, ...], ...] | None, str]:
        """Run the pass: the graph, the rewrites or None where an error ended it, and what it failed with."""
        step = self._step if limit is None else dataclasses.replace(self._step, limit=limit)
        model, _ = load_stage(self._start)
        try:
            (result,) = run_steps(model, [step], calibrate=lambda *_: self._search.stages.ranges)
        except MissingRangesError:
            raise
        except InvalidGraphError as error:
            return model, error.rewrites, str(error)
        except Exception as error:
            if is_of_machine(error):
                raise
            return model, None, _told(error)
        return model, result.rewrites, ""


# The reproducer


def _prune(folder: Path, keep: Iterable[str]) -> None:
    """Remove the stages and candidates that are not part of the reproducer, and the data that only they name."""
    kept = {BEFORE, AFTER, *keep}
    used = set()
    for path in folder.glob("*.onnx"):
        if path.name in kept or path.suffixes[-2:] in ([".min", ".onnx"], [".body", ".onnx"]):
            proto = read_proto(path)
            used |= {location_of(tensor) for tensor in tensors(proto)}
        else:
            path.unlink()
            path.with_suffix(".txt").unlink(missing_ok=True)
    for path in folder.glob("*.data"):
        if path.name not in used:
            path.unlink()


def _published(result: BisectResult, work: Path, output: Path | None) -> BisectResult:
    """Put the reproducer in its place."""
    assert result.guilty is not None and result.start is not None  # noqa: PT018
    place = output or _free(f"bisect-{result.guilty.stage.split('-', 1)[1]}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(work, place)
    except OSError as error:
        raise MachineError(f"{place} cannot be written: {unwritable(error)}") from error
    guilty = result.guilty
    if guilty.cutout is not None:
        cutout = guilty.cutout
        first, second = cutout.extracted_from
        cutout = dataclasses.replace(
            cutout,
            before=place / cutout.before.name,
            after=place / cutout.after.name,
            extracted_from=(place / first.name, place / second.name),
        )
        guilty = dataclasses.replace(guilty, cutout=cutout)
    return dataclasses.replace(result, guilty=guilty, start=place / result.start.name, folder=place)


def _free(name: str) -> Path:
    """`name`, or with the first number behind it that is not taken."""
    place, number = Path(name), 1
    while place.exists():
        number += 1
        place = Path(f"{name}-{number}")
    return place


__all__ = ["bisect"]
