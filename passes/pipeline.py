"""Reads a pipeline's text, checks it, and runs it pass by pass."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from pi05c.graph.check import problems, refuse_invalid
from pi05c.graph.clone import collection_paused
from pi05c.graph.edit import Names, remove_dead
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.io import Model
from pi05c.graph.opset import raise_opset
from pi05c.graph.ranges import Ranges, Wanted
from pi05c.graph.scopes import scopes
from pi05c.graph.sort import sort_graph
from pi05c.passes.contract import REGISTRY, LimitReached, Pass, PassContext, Skip

_ITEM = re.compile(r"(?P<minus>-?)(?P<name>\w+)(?:\{(?P<options>[^{}]*)\})?\Z")


LIMIT = "rewrite_limit"
"""The option that every pass has beside its own: `name{rewrite_limit=3}` makes its first three rewrites only."""


@dataclass(frozen=True)
class Step:
    """One pass with the options that were given for it.

    Attributes:
        limit: after how many rewrites it is stopped, None for never.
    """

    spec: Pass
    options: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None

    @property
    def formats(self) -> tuple[str, ...]:
        """Number formats that a target must have for it, by ONNX's names."""
        return self.spec.formats_for(**self.options)

    @property
    def given(self) -> dict[str, Any]:
        """The options, the limit among them where there is one."""
        return self.options if self.limit is None else {**self.options, LIMIT: self.limit}

    @property
    def text(self) -> str:
        """The step as pipeline text."""
        if not self.given:
            return self.spec.name
        spelled = ",".join(f"{key}={_spell(value)}" for key, value in self.given.items())
        return f"{self.spec.name}{{{spelled}}}"


@dataclass(frozen=True)
class StepResult:
    """What one pass did.

    Attributes:
        rewrites: the names of the nodes or tensors that each rewrite changed, in order.
        skips: places left alone, with the reason.
        notes: sentences about the whole graph.
        seconds: wall-clock time of the pass itself.
        nodes_before, nodes_after: number of nodes, subgraphs included.
    """

    step: Step
    rewrites: tuple[tuple[str, ...], ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]
    seconds: float
    nodes_before: int
    nodes_after: int

    @property
    def changes(self) -> tuple[str, ...]:
        """What `rewrites` holds, one after the other."""
        return tuple(chain.from_iterable(self.rewrites))


class MissingRangesError(Pi05cError):
    """A pass needs ranges and there are none."""


class InvalidGraphError(Pi05cError):
    """A pass left a graph that is not valid.

    Attributes:
        rewrites: what each rewrite of the pass changed, as in `StepResult`.
    """

    def __init__(self, message: str, rewrites: tuple[tuple[str, ...], ...]) -> None:
        super().__init__(message)
        self.rewrites = rewrites


Calibrate = Callable[[Model, Wanted], Ranges | None]
"""Measures tensors of a model; None where no data was given."""

AfterStep = Callable[[Model, StepResult], None]
"""Called after each pass with the model as it then stands."""


def parse(text: str, presets: dict[str, tuple[str, ...]]) -> tuple[Step, ...]:
    """Resolve `default`, `default,-pin_fp32`, `a,b{option=value}` into steps.

    A preset stands for its passes; `-name` takes a pass out; a name with options that is already in the list
    gives that one its options; any other name is appended.

    Raises:
        UsageError: an unknown pass, preset or option, a malformed item, or an order that a pass forbids.
    """
    steps: list[Step] = []
    for item in items(text):
        match = _ITEM.match(item)
        if match is None:
            raise UsageError(f"{item!r} in --passes is malformed: write name, -name or name{{option=value}}")
        name, options = match["name"], match["options"]
        if name in presets and not match["minus"] and options is None:
            steps.extend(parse(",".join(presets[name]), {}) if presets[name] else ())
            continue
        if name not in REGISTRY:
            known = ", ".join([*presets, *REGISTRY])
            raise UsageError(
                f"--passes names {name!r}, which is neither a pass nor a preset: known are {known}"
            )
        places = [index for index, step in enumerate(steps) if step.spec.name == name]
        if match["minus"]:
            if not places:
                raise UsageError(f"--passes takes out {name!r}, which is not in the list before it")
            steps = [step for step in steps if step.spec.name != name]
            continue
        texts = dict(_options(options or "", item))
        limit = _limit(name, texts.pop(LIMIT, None))
        step = Step(REGISTRY[name], REGISTRY[name].parse_options(texts), limit)
        if places and options is not None:
            steps[places[-1]] = step
        else:
            steps.append(step)
    _check_order(steps)
    return tuple(steps)


def named(text: str) -> list[str]:
    """The names of passes and presets in a pipeline's text; what is malformed is passed over."""
    return [match["name"] for item in items(text) if (match := _ITEM.match(item)) is not None]


def run(
    model: Model,
    steps: Sequence[Step],
    *,
    calibrate: Calibrate | None = None,
    after_step: AfterStep | None = None,
    before_step: Callable[[Step], None] | None = None,
    dry: bool = False,
) -> list[StepResult]:
    """Run the steps on `model` in place.

    Ranges are measured once, on the graph as it stands before the first pass that asks, for every pass that does.

    Args:
        dry: the graph will be thrown away; see `PassContext.dry`.

    Raises:
        MissingRangesError: a pass needs ranges and there are none.
        InvalidGraphError: a pass left a graph that is not valid. What is wrong with it already is blamed on no pass.
        Pi05cError: the graph is not valid as it is given.
    """
    results: list[StepResult] = []
    ranges: Ranges | None = None
    asked = False
    with collection_paused() as collecting:
        known = set(refuse_invalid(model)) if steps else set()
        for index, step in enumerate(steps):
            if before_step is not None:
                before_step(step)
            if step.spec.ranges is not None and not asked:
                asked = True
                needed = wanted(model, steps[index:])
                if calibrate is not None and (needed.tensors or needed.rows):
                    with collecting():
                        ranges = calibrate(model, needed)
            results.append(_run_step(model, step, ranges, dry, known))
            if after_step is not None:
                with collecting():
                    after_step(model, results[-1])
    return results


def _run_step(model: Model, step: Step, ranges: Ranges | None, dry: bool, known: set[str]) -> StepResult:
    """Run one step; `known` is what was wrong with the graph before."""
    spec = step.spec
    if spec.ranges is not None and not spec.ranges_optional and ranges is None:
        wanted = list(spec.ranges(model.graph, **step.options))
        if wanted:
            raise MissingRangesError(
                f"pass {spec.name} needs the ranges of {len(wanted)} tensors: give --calibration FILE.npz, put "
                "recorded samples beside the model as MODEL.calibration.npz, or name made-up data with "
                "--calibration synthetic"
            )
    raise_opset(model, spec.opset_for(**step.options))
    before = _node_count(model)
    ctx = PassContext(Names(model.graph), ranges, model.metadata, step.limit, dry)
    start = time.perf_counter()
    if step.limit != 0:
        with contextlib.suppress(LimitReached):
            spec.function(model.graph, ctx, **step.options)
    sort_graph(model.graph)
    remove_dead(model.graph)
    seconds = time.perf_counter() - start
    if ctx.rewrites:
        fresh = [problem for problem in problems(model) if problem not in known]
        if fresh:
            message = f"pass {spec.name} left a graph that is not valid: {fresh[0]}"
            raise InvalidGraphError(message, tuple(ctx.rewrites))
    return StepResult(
        step, tuple(ctx.rewrites), tuple(ctx.skips), tuple(ctx.notes), seconds, before, _node_count(model)
    )


def wanted(model: Model, steps: Sequence[Step]) -> Wanted:
    """What must be measured of a model for steps that run on it or later."""
    names: dict[str, None] = {}
    rows: dict[str, int] = {}
    quantized: set[str] = set()
    for step in steps:
        if step.spec.ranges is not None:
            asked = [tensor.name for tensor in step.spec.ranges(model.graph, **step.options)]
            names.update(dict.fromkeys(asked))
            if step.formats:
                quantized.update(asked)
        if step.spec.rows is not None:
            for tensor, count in step.spec.rows(model.graph, **step.options):
                rows[tensor.name] = max(count, rows.get(tensor.name, 0))
    return Wanted(tuple(names), rows, frozenset(quantized))


def items(text: str) -> Iterator[str]:
    """Pipeline text, split at commas outside braces."""
    depth, item = 0, ""
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            yield item.strip()
            item = ""
        else:
            item += character
    yield item.strip()


def _limit(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise UsageError(f"option {LIMIT}={text!r} of pass {name} is not usable: give a number from 0 on")
    return int(text)


def _options(text: str, item: str) -> Iterator[tuple[str, str]]:
    """`a=1,b=2,3` as a: 1, b: 2,3 - a part without `=` continues the value before it."""
    key, value = "", ""
    for part in text.split(",") if text.strip() else []:
        if "=" in part:
            if key:
                yield key, value
            key, value = (side.strip() for side in part.split("=", 1))
        elif key:
            value += f",{part.strip()}"
        else:
            raise UsageError(f"{item!r} in --passes is malformed: options are written name{{option=value}}")
    if key:
        yield key, value


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(str(part) for part in value)
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _check_order(steps: Sequence[Step]) -> None:
    for index, step in enumerate(steps):
        later = {other.spec.name for other in steps[index + 1 :]} - {
            other.spec.name for other in steps[:index]
        }
        for name in step.spec.after:
            if name in later:
                raise UsageError(
                    f"pass {step.spec.name} must come after {name}: change the order in --passes"
                )


def _node_count(model: Model) -> int:
    return sum(len(scope.nodes) for scope in scopes(model.graph))
