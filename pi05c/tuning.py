"""`pi05c tune`: which format each group of operators gets, so that the actions stay within an error at the least cost.

The passes up to `quantize_linears` run once. Then each group is measured alone in each format, families of groups
together, and the naive recipes; `tunesearch` chooses by these, and what it chooses is measured as a whole, on the
calibration samples and on the held-back ones, until the cheapest choice within the limit is found.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pi05c.backend.devices import Device, find_device
from pi05c.backend.targets import Target, parse_targets, unsupported
from pi05c.calibration import graph_sha256
from pi05c.executors import executor_for, run_tasks
from pi05c.folder import scratch
from pi05c.graph.errors import Pi05cError, UsageError, VerificationError
from pi05c.graph.files import refuse_replacing
from pi05c.graph.io import Model, load, save
from pi05c.graph.ranges import Ranges, Wanted
from pi05c.inspection import source_of
from pi05c.passes import pipeline
from pi05c.passrun import Calibrator, Plan, RunOptions, RunSamples, plan, samples_for
from pi05c.pipelinefile import MODEL, files_of, write_pipeline_file
from pi05c.precision import LIMITS, RANDOM_WEIGHTS_FACTOR, refuse_limit
from pi05c.progress import Progress
from pi05c.samples import WAYS_TO_GIVE_SAMPLES
from pi05c.stagecheck import outputs_of
from pi05c.stages import RANGES
from pi05c.thresholds import parse_method
from pi05c.tunegroups import (
    FORMATS,
    FP8,
    KEPT,
    NVFP4,
    NVFP4_W4A16,
    Base,
    Choice,
    Group,
    element_of,
    everywhere,
    find_groups,
    whole,
)
from pi05c.tunemeasure import COSTS, STAGE, TIME, Measured, Store, Task, measure, write_sample
from pi05c.tunesearch import Effect, Frontier, effects_of

DEFAULT_TARGET = "sm120"
"""The GPU whose rates count where none is named."""

SAMPLES = 4
"""Calibration samples that choices are measured on, if there are as many."""

VERIFICATIONS = 8
"""So many choices are measured as a whole at most, before the most accurate one is."""

_CLOSE = 0.02
"""A choice whose error is so near below the limit is not bettered."""


@dataclass(frozen=True)
class Point:
    """One choice, measured as a whole.

    Attributes:
        kind: `naive`, `together` (one family quantized), `tried` or `chosen`.
        choice: the format of each group.
        predicted: relative L2 error by the sum of squares; None for naive recipes that the sum knows nothing of.
        tuned: on calibration samples.
        held_back: on held-back samples; None where it was not measured on those.
    """

    name: str
    kind: str
    choice: Choice
    predicted: float
    tuned: Measured
    held_back: Measured | None = None

    @property
    def worst(self) -> float:
        """The largest error on any sample."""
        return max(self.tuned.worst, self.held_back.worst if self.held_back is not None else 0.0)


@dataclass(frozen=True)
class TuneResult:
    """What was measured, chosen and written.

    Attributes:
        recipe: the pipeline file.
        page: what shows it to people.
        device: whose rates count.
        limit: the largest error that was allowed.
        minimize: what is to be small, one of `COSTS`.
        groups: in the order of execution.
        alone: by group and format, that group alone quantized.
        effects: what `alone` means, by group and format.
        points: everything that was measured as a whole, the chosen one last.
        frontier: predicted costs and errors of the choices from the cheapest to the most accurate.
        measured, reused: how many measurements were made, and how many an earlier run had made.
        provenance: as the recipe holds it.
    """

    recipe: Path
    page: Path
    device: Device
    limit: float
    minimize: str
    groups: tuple[Group, ...]
    alone: Mapping[tuple[str, str], Measured]
    effects: Mapping[str, Mapping[str, Effect]]
    points: tuple[Point, ...]
    frontier: tuple[tuple[float, float], ...]
    measured: int
    reused: int
    provenance: Mapping[str, Any]

    @property
    def kept(self) -> Point:
        """Nothing quantized."""
        return next(point for point in self.points if set(point.choice.values()) == {KEPT})

    @property
    def chosen(self) -> Point:
        """What the recipe does."""
        return self.points[-1]

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "recipe": str(self.recipe),
            "page": str(self.page),
            "device": self.device.name,
            "limit": self.limit,
            "minimize": self.minimize,
            "groups": [
                {
                    "name": group.name,
                    "format": self.chosen.choice[group.name],
                    "alone": {
                        each: {"error": effect.error**0.5, "cost": effect.cost}
                        for each, effect in self.effects[group.name].items()
                        if each != KEPT
                    },
                }
                for group in self.groups
            ],
            "points": [
                {
                    "name": point.name,
                    "kind": point.kind,
                    "predicted": point.predicted,
                    "error": point.tuned.worst,
                    "held_back_error": None if point.held_back is None else point.held_back.worst,
                    "seconds": point.tuned.floors[self.device.name],
                    "stored_bytes": point.tuned.stored,
                    "read_bytes": point.tuned.read,
                }
                for point in self.points
            ],
            "measured": self.measured,
            "reused": self.reused,
        }


def tune(
    model: Path | str,
    output: Path | str,
    *,
    passes: str | None = None,
    calibration: Sequence[Path | str] = (),
    calibration_method: str = "max",
    formats: Sequence[str] | None = None,
    target: str | None = None,
    max_error: float | None = None,
    minimize: str = TIME,
    samples: int = SAMPLES,
    resolution: int | None = None,
    plugins: Sequence[str | Path] = (),
    executor: Executor | None = None,
    jobs: int | None = None,
    dask: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Choose formats and write them as a pipeline file, with a page and the measurements beside it.

    Args:
        model: the plain graph.
        output: the recipe, `NAME.toml`; `NAME.html` and `NAME.measurements.json` go beside it.
        passes: pipeline text with `quantize_linears` in it, whose formats are chosen; its other options stay.
        calibration: as `pi05c.samples.find_samples` takes it.
        calibration_method: as `pi05c.thresholds.parse_method` takes it; compile with the same.
        formats: of `FORMATS`; None: FP8, and NVFP4 where `target` names a GPU that has it, both in one and in two terms.
        target: one GPU as `pi05c.backend.devices.find_device` takes it; None: `DEFAULT_TARGET`.
        max_error: largest relative L2 error of a sample; None: what `pi05c compile` allows FP8.
        minimize: one of `COSTS`: the floor of the time on that GPU, or bytes of weights that one run reads, or all.
        samples: how many calibration samples are run for each choice at most.
        resolution: into how many groups of layers each part is divided at most; fewer take less time.
        executor, jobs, dask: where measurements run, see `pi05c.executors.executor_for`. They share a folder beside
            `output`, which all workers must see.
        cache: folder of measured ranges; None for the user's.

    Raises:
        UsageError: an option is not usable.
        Pi05cError: the model or the samples cannot be used, or a file cannot be written.
        VerificationError: not even float16 is within the limit.
    """
    path, output, progress = Path(model), Path(output), progress or Progress()
    refuse_limit(max_error)
    _refuse(output, path, passes, minimize, samples, resolution)
    device, wanted = _formats(formats, target)
    method = parse_method(calibration_method)
    chosen = plan(passes, RunOptions(plugins=tuple(map(str, plugins))))
    base = Base.of(chosen.steps)
    with progress.stage("load"):
        plain = load(path)
        found = samples_for(plain, chosen.steps, calibration, progress)
        if found is None:
            raise Pi05cError(f"tune measures, and there are no samples: {WAYS_TO_GIVE_SAMPLES}")
        source = source_of(plain)
    if max_error is None:
        max_error = LIMITS["float8e4m3fn"] * (RANDOM_WEIGHTS_FACTOR if source.weights_random else 1.0)
    with scratch(output.with_suffix(".tune")) as work, executor_for(executor, jobs=jobs, dask=dask) as pool:
        calibrate = Calibrator(
            chosen, found.measured, progress, cache=cache, scratch=work.folder, method=method, executor=pool
        )
        prepared = _prepare(path, base, found, samples, wanted, calibrate, work.folder, progress)
        groups = find_groups(lambda: load(work.folder / STAGE), base, prepared.ranges, wanted, resolution)
        if not groups:
            raise Pi05cError(f"{path} has nothing that could be quantized: there is nothing to choose")
        store = Store(output.with_suffix(".measurements.json"), [*prepared.context, calibration_method])
        threads = None if pool is None else max(1, (os.cpu_count() or 1) // (jobs or 1))
        bench = _Bench(base, groups, prepared, store, pool, progress, tuple(map(str, plugins)), threads)
        run = _Run(bench, device, wanted, max_error, minimize)
        points = run.points()
    provenance = _provenance(
        path,
        source.sha256,
        chosen,
        found,
        calibration_method,
        device,
        max_error,
        minimize,
        points[-1],
        groups,
        run,
    )
    steps = base.with_choice(groups, points[-1].choice)
    write_pipeline_file(
        output,
        steps,
        provenance,
        f"Formats that pi05c tune chose for {path.name}: use with --passes @{output.name}",
    )
    result = TuneResult(
        output,
        output.with_suffix(".html"),
        device,
        max_error,
        minimize,
        tuple(groups),
        run.alone,
        run.effects,
        tuple(points),
        tuple(run.predicted(choice) for choice in run.frontier.choices),
        bench.made,
        bench.reused,
        provenance,
    )
    from pi05c.tunereport import write_page

    write_page(result, path.name)
    return result


def _refuse(
    output: Path, model: Path, passes: str | None, minimize: str, samples: int, resolution: int | None
) -> None:
    if output.suffix != ".toml":
        raise UsageError(f"the output {output} must end in .toml")
    for suffix in (".toml", ".html", ".measurements.json"):
        refuse_replacing(output.with_suffix(suffix), files_of(passes or ""))
    if model.is_dir():
        raise Pi05cError(
            f"{model} is a folder, but an ONNX file is tuned: name the model that it was made of"
        )
    if minimize not in COSTS:
        raise UsageError(f"--minimize {minimize!r} is not usable: choose among {', '.join(COSTS)}")
    if samples < 1:
        raise UsageError(f"--samples {samples} leaves nothing to measure on: give a number from 1 on")
    if resolution is not None and resolution < 1:
        raise UsageError(f"--resolution {resolution} is not usable: give a number of groups from 1 on")


def _formats(formats: Sequence[str] | None, target: str | None) -> tuple[Device, tuple[str, ...]]:
    """The GPU whose rates count, and the formats to choose among."""
    device = find_device(target or DEFAULT_TARGET)
    (gpu,) = parse_targets(device.target)
    if formats is None:
        has = gpu.formats if target is not None else ("fp8",)
        formats = [each for each in FORMATS if each != NVFP4_W4A16 and _tensor_core(each) in has]
        if not formats:
            raise UsageError(f"{_lacking(gpu, FP8)}: there is nothing to choose, compile with --passes fp16")
    if unknown := next((each for each in formats if each not in FORMATS), None):
        raise UsageError(f"--formats names {unknown!r}: known are {', '.join(FORMATS)}")
    if {NVFP4, NVFP4_W4A16} <= {element_of(each) for each in formats}:
        raise UsageError(f"--formats names {NVFP4} and {NVFP4_W4A16}: choose one of them")
    for each in formats:
        if reason := _lacking(gpu, each):
            raise UsageError(f"{reason}: leave {each} out of --formats, or choose another --target")
    return device, tuple(each for each in FORMATS if each in formats)


def _lacking(gpu: Target, format_: str) -> str | None:
    return unsupported(gpu, [_tensor_core(format_)])


def _tensor_core(format_: str) -> str:
    return "fp8" if element_of(format_) == FP8 else "fp4"


@dataclass(frozen=True)
class _Prepared:
    """What all choices start from, in `folder`.

    Attributes:
        ranges: what was calibrated.
        tuned, held_back: which samples choices are measured on, by number.
        hashes: of the samples, by number.
        context: hashes that each measurement depends on.
    """

    folder: Path
    ranges: Ranges | None
    tuned: tuple[int, ...]
    held_back: tuple[int, ...]
    hashes: Mapping[int, str]
    context: tuple[str, ...]


def _prepare(
    path: Path,
    base: Base,
    samples: RunSamples,
    count: int,
    formats: Sequence[str],
    calibrate: Calibrator,
    folder: Path,
    progress: Progress,
) -> _Prepared:
    """Run the passes that are the same for every choice, calibrate, and run the plain graph."""
    from pi05c.calibration import save_ranges

    linears, *behind = base.steps[base.cut :]
    variants = [
        [*base.ahead, replace(linears, options={**linears.options, **everywhere(each)}), *behind]
        for each in formats
    ]

    def calibrated(current: Model, _: Wanted) -> Ranges | None:
        return calibrate(current, _union(pipeline.wanted(current, steps) for steps in variants))

    model = load(path)
    with progress.stage("passes") as update:
        pipeline.run(
            model, base.ahead, calibrate=calibrated, before_step=lambda step: update(None, step.spec.name)
        )
        if calibrate.ranges is None:
            calibrated(model, Wanted())
    assert calibrate.ranges is not None
    with progress.stage("write the graph"):
        save(model, folder / STAGE)
        save_ranges(folder / RANGES, calibrate.ranges)
        stage_hash = graph_sha256(load(folder / STAGE))
    some = _spread(len(samples.measured), count)
    held_back = () if samples.held_back is samples.measured else tuple(range(len(samples.held_back)))
    taken = [*(samples.measured[i] for i in some), *(samples.held_back[i] for i in held_back)]
    hashes = [*(samples.measured.hashes[i] for i in some), *(samples.held_back.hashes[i] for i in held_back)]
    with progress.stage("run the plain graph"):
        for index, (sample, outputs) in enumerate(zip(taken, outputs_of(path, taken), strict=True)):
            write_sample(folder, index, sample, outputs)
    return _Prepared(
        folder,
        calibrate.ranges,
        tuple(range(len(some))),
        tuple(range(len(some), len(taken))),
        dict(enumerate(hashes)),
        (
            stage_hash,
            samples.measured.sha256,
            *(f"{name} {metadata.version(name)}" for name in ("pi05c", "onnxruntime")),
        ),
    )


def _union(parts: Iterable[Wanted]) -> Wanted:
    names: dict[str, None] = {}
    rows: dict[str, int] = {}
    quantized: frozenset[str] = frozenset()
    for part in parts:
        names.update(dict.fromkeys(part.tensors))
        quantized |= part.quantized
        for name, count in part.rows.items():
            rows[name] = max(count, rows.get(name, 0))
    return Wanted(tuple(names), rows, quantized)


def _spread(available: int, count: int) -> list[int]:
    """So many indices, evenly spread."""
    count = min(count, available)
    return [round(index * (available - 1) / max(1, count - 1)) for index in range(count)]


class _Bench:
    """Measures choices, each once, whatever run it was in."""

    def __init__(
        self,
        base: Base,
        groups: Sequence[Group],
        prepared: _Prepared,
        store: Store,
        executor: Executor | None,
        progress: Progress,
        plugins: tuple[str, ...],
        threads: int | None,
    ) -> None:
        self.groups = groups
        self.prepared = prepared
        self._base, self._store, self._executor, self._progress = base, store, executor, progress
        self._plugins, self._threads = plugins, threads
        self._own: set[Task] = set()
        self.reused = 0

    @property
    def made(self) -> int:
        """How many measurements this run made."""
        return len(self._own)

    def measure(self, choices: Sequence[Choice], samples: tuple[int, ...], title: str) -> list[Measured]:
        """The outcome of each choice on some samples."""
        tasks = [self._task(choice, samples) for choice in choices]
        hashes = [self.prepared.hashes[index] for index in samples]
        found = {task: measured for task in tasks if (measured := self._store.get(task, hashes)) is not None}
        left = [task for task in dict.fromkeys(tasks) if task not in found]
        earlier = found.keys() - self._own
        if earlier and len(tasks) > 1:
            self._progress.note(
                f"{title}: {len(earlier)} of {len(set(tasks))} were measured by an earlier run"
            )
        self.reused += len(earlier)
        if left:
            with self._progress.stage(title) as update:
                for index, measured in enumerate(run_tasks(measure, left, self._executor)):
                    self._store.put(left[index], hashes, measured)
                    found[left[index]] = measured
                    self._own.add(left[index])
                    update((index + 1) / len(left), f"{index + 1} of {len(left)}")
        return [found[task] for task in tasks]

    def _task(self, choice: Choice, samples: tuple[int, ...]) -> Task:
        steps = self._base.with_choice(self.groups, choice)[self._base.cut :]
        text = ",".join(step.text for step in steps)
        return Task(self.prepared.folder, text, self._plugins, samples, self._threads)


class _Run:
    """What is measured, and what is chosen by it."""

    def __init__(
        self, bench: _Bench, device: Device, formats: Sequence[str], limit: float, minimize: str
    ) -> None:
        self._bench, self._device, self._limit, self._minimize = bench, device, limit, minimize
        names = [group.name for group in bench.groups]
        self._nothing: dict[str, str] = dict.fromkeys(names, KEPT)
        pairs = [(group.name, each) for group in bench.groups for each in group.formats if each in formats]
        tuned = bench.prepared.tuned
        singles = [{**self._nothing, name: each} for name, each in pairs]
        self._kept, *alone = bench.measure([self._nothing, *singles], tuned, "measure each group alone")
        self.alone = dict(zip(pairs, alone, strict=True))
        self.effects = effects_of(
            self._figures(self._kept),
            {pair: self._figures(measured) for pair, measured in self.alone.items()},
            names,
        )
        self.frontier = Frontier(self.effects)
        self._formats = formats

    def _figures(self, measured: Measured) -> tuple[float, float]:
        return measured.mean_square, self._cost(measured)

    def _cost(self, measured: Measured) -> float:
        return measured.cost(self._minimize, self._device.name)

    def predicted(self, choice: Choice) -> tuple[float, float]:
        """Cost and relative L2 error of a choice."""
        cost = self._cost(self._kept) + self.frontier.cost(choice)
        return cost, (self._kept.mean_square + self.frontier.error(choice)) ** 0.5

    def points(self) -> list[Point]:
        """All that is measured as a whole, the chosen one last."""
        return [*self._known(), *self._search()]

    def _known(self) -> list[Point]:
        """The naive recipes, and each family together."""
        groups = self._bench.groups
        plain = [each for each in self._formats if each == element_of(each)]
        named: list[tuple[str, str, dict[str, str]]] = [("float16", "naive", dict(self._nothing))]
        if FP8 in plain:
            named.append(("FP8", "naive", whole(groups, FP8)))
        fp4 = next((each for each in plain if each != FP8), None)
        if fp4 is not None:
            rest = FP8 if FP8 in plain else KEPT
            everything = whole(groups, rest)
            for title, kinds in (("NVFP4 in the LLM", ("attention", "MLP")), ("NVFP4 in its MLPs", ("MLP",))):
                chosen = {
                    g.name: fp4 for g in groups if g.part == "prefix" and g.kind in kinds and fp4 in g.formats
                }
                if chosen:
                    named.append((title, "naive", {**everything, **chosen}))
        families = dict.fromkeys(group.family for group in groups)
        for family in families:
            for each in plain:
                choice = whole(groups, {family: each})
                if sum(chosen != KEPT for chosen in choice.values()) > 1:
                    named.append((f"{family}, {each}", "together", choice))
        found = self._bench.measure(
            [choice for _, _, choice in named], self._bench.prepared.tuned, "measure groups together"
        )
        return [
            Point(name, kind, choice, self.predicted(choice)[1], measured)
            for (name, kind, choice), measured in zip(named, found, strict=True)
        ]

    def _search(self) -> list[Point]:
        """The choices that are measured as a whole; the cheapest within the limit last.

        The budget starts where the prediction meets the limit, and moves by how far the measured error is off.
        """
        budget, most = self._limit**2 - self._kept.mean_square, float("inf")
        tried: list[Point] = []
        best: Point | None = None
        for _ in range(VERIFICATIONS):
            choice = self.frontier.within(budget)
            if choice is None or any(point.choice == choice for point in tried):
                break
            point = self._measured(choice)
            tried.append(point)
            used = self.frontier.error(choice)
            scale = (self._limit / point.worst) ** 2 if point.worst > 0 else float("inf")
            if point.worst <= self._limit:
                if best is None or self._cost(point.tuned) < self._cost(best.tuned):
                    best = point
                if scale < (1 + _CLOSE) ** 2:
                    break
                budget = min(max(used, budget) * scale, most)
            else:
                most = min(most, used * (1 - _CLOSE))
                budget = min(used * scale, most)
        if best is None:
            for choice in (self.frontier.choices[-1], self._nothing):
                point = self._measured(choice)
                tried.append(point)
                if point.worst <= self._limit:
                    best = point
                    break
        if best is None:
            raise VerificationError(
                f"with nothing quantized the actions depart by {tried[-1].worst:.4g}, beyond the limit of "
                f"{self._limit:g}: raise --max-error"
            )
        return [*(point for point in tried if point is not best), replace(best, name="chosen", kind="chosen")]

    def _measured(self, choice: Choice) -> Point:
        prepared = self._bench.prepared
        samples = (*prepared.tuned, *prepared.held_back)
        (measured,) = self._bench.measure([choice], samples, "measure a choice")
        held_back = measured.at(prepared.held_back) if prepared.held_back else None
        return Point(
            "tried", "tried", choice, self.predicted(choice)[1], measured.at(prepared.tuned), held_back
        )


def _provenance(
    path: Path,
    sha256: str,
    chosen: Plan,
    samples: RunSamples,
    method: str,
    device: Device,
    limit: float,
    minimize: str,
    point: Point,
    groups: Sequence[Group],
    run: _Run,
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "max_error": limit,
        "minimize": minimize,
        "error": point.tuned.worst,
        **({} if point.held_back is None else {"held_back_error": point.held_back.worst}),
        "floor_ms": 1e3 * point.tuned.floors[device.name],
        "weights_stored_bytes": point.tuned.stored,
        "weights_read_bytes": point.tuned.read,
    }
    formats = {
        group.name: f"{point.choice[group.name]}, error alone {run.effects[group.name][point.choice[group.name]].error ** 0.5:.2g}"
        if point.choice[group.name] != KEPT
        else KEPT
        for group in groups
    }
    return {
        "tool": f"pi05c tune {metadata.version('pi05c')}",
        "model": path.name,
        MODEL: sha256,
        "samples": samples.measured.source,
        "samples_sha256": samples.measured.sha256,
        "synthetic": samples.measured.synthetic,
        "calibration_method": method,
        "base": chosen.text,
        "device": device.name,
        "figures": figures,
        "formats": formats,
    }


__all__ = ["Point", "TuneResult", "tune"]
