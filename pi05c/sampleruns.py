"""Runs of a compile on samples: the plain graph, and the rewritten ones in its place, both observed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx

from pi05c.backend.onnxruntime import load_runner
from pi05c.chain import load_chain
from pi05c.extraction import PartGraph
from pi05c.folder import GRAPH
from pi05c.graph.runner import Array
from pi05c.observation import Observation, ObservedRunner
from pi05c.progress import Progress
from pi05c.samples import Samples
from pi05c.splitting import run_plain

Outputs = list[dict[str, Array]]
"""Tensors by name, one mapping a sample."""

Run = Callable[[Mapping[str, Array]], dict[str, Array]]
"""Runs a graph, or several in a chain, on one sample."""


def _runs(path: Path, edit: Callable[[onnx.ModelProto], None]) -> Run:
    """Runs a graph on samples that may hold more than it takes, such as inputs that were fixed."""
    runner = load_runner(path, edit=edit)
    names = [spec.name for spec in runner.inputs]
    return lambda sample: runner.run({name: sample[name] for name in names})


def _observed_plain(path: Path, observation: Observation) -> Run:
    """Runs the plain graph and keeps what is observed of it."""
    observer = observation.plain(path)
    run = _runs(path, observer.edit)
    return lambda sample: observer.take(run(sample))


def simulation(
    folder: Path, runs: Mapping[str, int], outputs: Sequence[str], observation: Observation
) -> Run:
    """What runs the rewritten graphs in onnxruntime, observed.

    Args:
        runs: how often the graph of each place runs for one observation; the empty place is that of the whole.
        outputs: names of the policy's.
    """
    if list(runs) == [""]:
        runner = observation.rewritten(folder / GRAPH)
        names = [spec.name for spec in runner.inputs]
        return lambda sample: runner.run({name: sample[name] for name in names})

    def load_part(place: str) -> ObservedRunner:
        return observation.rewritten(folder / place / GRAPH, runs=runs[place], place=place)

    return load_chain(folder, list(runs), list(outputs), load=load_part).run_all


def run_all(load: Callable[[], Run], samples: Samples | None, progress: Progress, title: str) -> Outputs:
    """What a graph gives for each sample, as a stage of its own; nothing where there are no samples."""
    if samples is None:
        return []
    with progress.stage(title) as update:
        run = load()
        results = []
        for index, sample in enumerate(samples):
            update(index / len(samples), f"sample {index + 1} of {len(samples)}")
            results.append(run(sample))
        return results


@dataclass(frozen=True)
class PlainRun:
    """What the plain graph gave, borders included; None where nothing is calibrated."""

    measured: Outputs | None
    held_back: Outputs


def plain_run(
    path: Path,
    parts: Sequence[PartGraph] | None,
    measured: Samples | None,
    held_back: Samples | None,
    observation: Observation,
    progress: Progress,
) -> PlainRun:
    """Run the whole plain graph once a sample, for verification and for what parts are calibrated on.

    Args:
        parts: of a policy that is split.
        measured: the samples that parts are calibrated on; None where none is.
    """
    if held_back is None:
        return PlainRun(None, [])
    if parts is None:
        run = partial(_observed_plain, path, observation)
        return PlainRun(None, run_all(run, held_back, progress, "run the plain graph"))
    observer = observation.plain(path)
    if measured is None:
        return PlainRun(None, run_plain(path, parts, held_back, progress, observer))
    if held_back is measured:
        spaces = run_plain(path, parts, measured, progress, observer)
        return PlainRun(spaces, spaces)
    held = run_plain(path, parts, held_back, progress, observer)
    return PlainRun(run_plain(path, parts, measured, progress), held)


def only(spaces: Outputs, names: Sequence[str]) -> Outputs:
    """Some tensors of each sample; those that it lacks are left out."""
    return [{name: space[name] for name in names if name in space} for space in spaces]


__all__ = ["Outputs", "PlainRun", "only", "plain_run", "run_all", "simulation"]
