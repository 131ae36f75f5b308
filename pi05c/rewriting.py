"""The way of one graph through the passes: ranges measured on its own samples, every rewrite recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

from pi05c.backend.devices import Device
from pi05c.backend.targets import Target
from pi05c.calibration import MeasuredRanges
from pi05c.comparison import Comparison
from pi05c.cost import cost_records
from pi05c.graph.errors import Pi05cError, VerificationError, is_of_machine
from pi05c.graph.io import Model
from pi05c.kernels import kernels_of
from pi05c.manifest import CostRecord, PassRecord, PipelineRecord, SkipRecord
from pi05c.passes import pipeline
from pi05c.passrun import Calibrator, Plan, RunOptions, run
from pi05c.progress import Progress
from pi05c.samples import Samples
from pi05c.thresholds import MAX, Method


@dataclass(frozen=True)
class Piece:
    """A graph that becomes an engine: the whole policy, or a group of its parts.

    Attributes:
        place: the subfolder that it goes to, which is its name; empty for the whole.
        model: rewritten in place.
        requested: its passes as they were asked for.
        plan: its passes.
        samples: to measure ranges on; None where there are none.
        runs: how often it runs for one observation.
        held_back: to run its stages on, where they are looked at.
    """

    place: str
    model: Model
    requested: str
    plan: Plan
    samples: Samples | None
    runs: int = 1
    held_back: Samples | None = None

    def title(self, what: str) -> str:
        """What is done, with the part that it is done to."""
        return f"{what} of {self.place}" if self.place else what


@dataclass(frozen=True)
class Rewritten:
    """What the passes did.

    Attributes:
        calibrated: whether ranges were measured.
    """

    pipeline: PipelineRecord
    calibrated: bool


class PassFailedError(Exception):
    """A pass broke down or left a graph that is not as it must be.

    Attributes:
        number: of the pass, from 1.
        ranges: those that passes were given so far; None where none were.
        cause: what was raised.
        told: the same in words, with the name of the pass.
    """

    def __init__(self, number: int, name: str, ranges: MeasuredRanges | None, cause: Exception) -> None:
        self.number, self.ranges, self.cause = number, ranges, cause
        self.told = str(cause)
        if not isinstance(cause, Pi05cError):
            self.told = f"pass {name} broke down ({type(cause).__name__}: {cause})"
        super().__init__(self.told)


def rewrite(
    piece: Piece,
    progress: Progress,
    options: RunOptions,
    *,
    targets: Sequence[Target],
    cache: Path | None,
    scratch: Path,
    fresh: bool = False,
    reads: Iterable[Path] = (),
    device: Device | None = None,
    method: Method = MAX,
    executor: Executor | None = None,
) -> Rewritten:
    """Run a piece's passes on its model, and count what it costs before and after each.

    Args:
        options: how the run is looked at; the stages of a part go to a subfolder of its name.
        targets: GPUs whose number formats the graph may use.
        cache: folder of measured ranges; None for the user's.
        scratch: folder for weights that have to be evaluated.
        fresh: measure ranges though the cache has them.
        reads: as `pi05c.passrun.run` takes them.
        device: the GPU that costs are for; None where it is not known.
        method, executor: as `pi05c.calibration.cached_ranges` takes them.

    Raises:
        Pi05cError: a pass needs ranges and there are none, or refuses what it was asked for.
        PassFailedError: a pass broke down, or `options` has its result checked and the check failed.
    """
    if piece.place and options.dump is not None:
        options = replace(options, dump=options.dump / piece.place)
    title = f"calibrate {piece.place}".strip()
    calibrator = Calibrator(
        piece.plan,
        piece.samples,
        progress,
        title=title,
        cache=cache,
        scratch=scratch,
        fresh=fresh,
        method=method,
        executor=executor,
    )
    costs: list[list[CostRecord]] = []

    def count(current: Model) -> list[CostRecord]:
        return _cost(current, piece.runs, device, progress)

    def count_cost(current: Model, result: pipeline.StepResult) -> None:
        costs.append(count(current) if costs[-1] and result.rewrites else costs[-1])

    with progress.stage(piece.title("passes")) as update:
        costs.append(count(piece.model))
        try:
            done = run(
                piece.model,
                piece.plan,
                calibrator,
                options,
                update,
                samples=piece.held_back,
                targets=targets,
                scratch=scratch,
                reads=reads,
                place=piece.place,
                after_step=count_cost,
            )
        except Exception as error:
            number = piece.plan.done + len(costs)
            if not _is_failure(error) or number > len(piece.plan.steps):
                raise
            name = piece.plan.steps[number - 1].spec.name
            raise PassFailedError(number, name, calibrator.ranges, error) from error
    for step in piece.plan.ahead:
        if piece.samples is None and calibrator.ranges is None and step.spec.ranges is not None:
            progress.warn(
                f"{step.spec.name} ran without ranges, so activations are not guarded against overflow: give "
                "--calibration FILE.npz"
            )
    piece.model.metadata["pi05c.pipeline"] = piece.plan.text
    moved: Sequence[Comparison | None] = [error.comparison for error in done.errors]
    record = PipelineRecord(
        requested=piece.requested,
        resolved=piece.plan.text,
        passes=[
            _pass_record(*after)
            for after in zip(done.results, costs[1:], moved or [None] * len(done.results), strict=True)
        ],
        cost=costs[0],
        cost_device=None if device is None else device.product,
    )
    return Rewritten(record, calibrator.measured)


def _is_failure(error: Exception) -> bool:
    """Whether a pass is to blame, and not the request, the disk or the memory."""
    if isinstance(error, Pi05cError):
        return isinstance(error, (pipeline.InvalidGraphError, VerificationError))
    return not is_of_machine(error)


def _cost(model: Model, runs: int, device: Device | None, progress: Progress) -> list[CostRecord]:
    """The cost of a graph that runs `runs` times, by part; empty where it cannot be counted."""
    try:
        kernels = [replace(kernel, times=kernel.times * runs) for kernel in kernels_of(model)]
    except Pi05cError as error:
        progress.note(f"the report says nothing of costs: {error}")
        return []
    return cost_records(kernels, device)


def _pass_record(result: pipeline.StepResult, cost: list[CostRecord], moved: Comparison | None) -> PassRecord:
    spec = result.step.spec
    defaults = {name: parameter.default for name, parameter in spec.options.items()}
    return PassRecord(
        name=spec.name,
        exact=spec.exact,
        options={**defaults, **result.step.options},
        changed=len(result.changes),
        skipped=[SkipRecord(where=skip.where, reason=skip.reason) for skip in result.skips],
        notes=list(result.notes),
        seconds=round(result.seconds, 4),
        nodes_before=result.nodes_before,
        nodes_after=result.nodes_after,
        cost=cost,
        moved=None if moved is None else moved.worst.relative_l2,
    )
