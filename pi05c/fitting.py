"""Whether samples are what a graph was specialized for."""

from __future__ import annotations

from collections.abc import Sequence

from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model
from pi05c.graph.specialization import FixedInput, fixed_inputs
from pi05c.passes.pipeline import Step
from pi05c.passes.specialize import planned, specialize
from pi05c.samples import Samples


def planned_inputs(model: Model, steps: Sequence[Step]) -> tuple[FixedInput, ...]:
    """The inputs of a model that are fixed already, or will be once the steps have run.

    Raises:
        Pi05cError, UsageError: as the pass `specialize`.
    """
    found = {fixed.name: fixed for fixed in fixed_inputs(model.metadata)}
    for step in steps:
        if step.spec.name == specialize.__name__:
            found |= {fixed.name: fixed for fixed in planned(model.graph, model.metadata, **step.options)}
    return tuple(found.values())


def fitting(samples: Samples, fixed: Sequence[FixedInput]) -> Samples:
    """The samples that hold nothing else than what the graph is specialized for.

    Raises:
        Pi05cError: there is none.
    """
    if not fixed:
        return samples
    names = [entry.name for entry in fixed]
    masks = samples.only(names)
    kept = [
        index
        for index, sample in enumerate(masks)
        if not any(entry.name in sample and entry.obstacle(sample[entry.name]) for entry in fixed)
    ]
    if not kept:
        raise Pi05cError(
            f"none of the {len(samples)} samples of {samples.source} fits what the graph is specialized for "
            f"({', '.join(names)}): give samples that do with --calibration FILE.npz, or other options of specialize"
        )
    return samples.at(kept)


def refuse_unfit(samples: Samples, fixed: Sequence[FixedInput]) -> None:
    """Refuse samples that a graph was not specialized for.

    Raises:
        Pi05cError: names the first such sample, with its input, the value and the remedy.
    """
    for index, sample in enumerate(samples.only([entry.name for entry in fixed])):
        for entry in fixed:
            if entry.name in sample and (reason := entry.obstacle(sample[entry.name])):
                raise Pi05cError(f"{samples.source}, sample {index}: {reason}")


__all__ = ["fitting", "planned_inputs", "refuse_unfit"]
