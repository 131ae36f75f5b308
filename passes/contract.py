"""What a pass is: a function over a graph, registered under its name with its contract."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, TypeVar, get_type_hints

import onnx_graphsurgeon as gs
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pi05c.graph.edit import Editor, Names
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.ranges import Ranges

_Candidate = TypeVar("_Candidate")


class LimitReached(BaseException):
    """A pass has made as many rewrites as it may. Not an `Exception`, so that no pass catches it by chance."""


@dataclass(frozen=True)
class Skip:
    """A place that a pass recognised and left alone."""

    where: str
    reason: str


@dataclass
class PassContext:
    """What a pass is given beside the graph, and where it records what it did.

    Attributes:
        ranges: calibrated ranges, None where there are none.
        names: the names in use, for `editor`.
        metadata: the model's metadata, shared with it.
        limit: after how many rewrites the pass is stopped, None for never.
        dry: the graph is thrown away afterwards, so values on which no rewrite depends need not be computed.
        rewrites: the names of the nodes or tensors that each rewrite changed, in order.
    """

    names: Names
    ranges: Ranges | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    dry: bool = False
    rewrites: list[tuple[str, ...]] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def editor(self, scope: gs.Graph) -> Editor:
        """An editor for the graph or one of its subgraphs."""
        return Editor(scope, self.names)

    @property
    def changes(self) -> list[str]:
        """What `rewrites` holds, one after the other."""
        return list(chain.from_iterable(self.rewrites))

    def changed(self, *where: gs.Node | gs.Tensor | str) -> None:
        """Record one rewrite, of a node or tensor or of several that cannot change apart, as soon as it is whole.

        Raises:
            LimitReached: it was the last one that the pass may make. The graph is kept as it is at this point.
        """
        self.rewrites.append(tuple(map(_name, where)))
        if self.limit is not None and len(self.rewrites) >= self.limit:
            raise LimitReached

    def first(
        self, candidates: Sequence[_Candidate], counts: Callable[[_Candidate], bool] = lambda candidate: True
    ) -> Sequence[_Candidate]:
        """The candidates in front of the first one that the limit forbids, for a pass that edits all in one go.

        Args:
            counts: whether a candidate will be a rewrite.
        """
        left = math.inf if self.limit is None else self.limit - len(self.rewrites)
        for index, candidate in enumerate(candidates):
            left -= counts(candidate)
            if left < 0:
                return candidates[:index]
        return candidates

    def skip(self, where: gs.Node | gs.Tensor | str, reason: str) -> None:
        """Record a place that was left alone, and why, in a phrase that completes "left alone: "."""
        self.skips.append(Skip(_name(where), reason))

    def note(self, sentence: str) -> None:
        """Record something about the whole graph that the user should read."""
        self.notes.append(sentence)


def _name(where: gs.Node | gs.Tensor | str) -> str:
    return where if isinstance(where, str) else str(where.name)


class PassFunction(Protocol):
    """Edits `graph` in place; keyword-only arguments are its options."""

    __name__: str

    def __call__(self, graph: gs.Graph, ctx: PassContext, **options: Any) -> None: ...


RangedTensors = Callable[..., Iterable[gs.Tensor]]
"""Given the graph and the pass's options, the tensors whose range the pass needs."""

SampledTensors = Callable[..., Iterable[tuple[gs.Tensor, int]]]
"""Given the graph and the pass's options, the tensors of which the pass uses some rows, and how many at most."""


@dataclass(frozen=True)
class Pass:
    """A registered pass.

    Attributes:
        name: the function's name, which is its file's and what the command line calls it.
        exact: it computes the same function up to float32 rounding.
        after: passes that must come earlier where they are in the pipeline.
        min_opset: the graph is converted up to this opset before the pass runs; by its options where that is a function.
        ranges: which tensors must be calibrated first, None for a pass that needs no ranges.
        ranges_optional: it runs unguarded, and says so, where there are no ranges.
        rows: of which tensors rows are sampled with the ranges, None for a pass that uses none.
        formats: narrow number formats that it brings in, by ONNX's names, which a target must have; by its options
            where that is a function.
    """

    name: str
    function: PassFunction
    exact: bool
    after: tuple[str, ...] = ()
    min_opset: int | Callable[..., int] = 0
    ranges: RangedTensors | None = None
    ranges_optional: bool = False
    formats: tuple[str, ...] | Callable[..., tuple[str, ...]] = ()
    rows: SampledTensors | None = None

    def opset_for(self, **options: Any) -> int:
        """The opset that the pass needs with these options; 0 for any."""
        return self.min_opset(**options) if callable(self.min_opset) else self.min_opset

    def formats_for(self, **options: Any) -> tuple[str, ...]:
        """The number formats that a target must have for what the pass does with these options."""
        return self.formats(**options) if callable(self.formats) else self.formats

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The keyword-only arguments by name."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def parse_options(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """Turn option texts into values of the types that the function declares.

        Raises:
            UsageError: an unknown option or a value of another type.
        """
        hints = get_type_hints(self.function)
        values = {}
        for key, text in texts.items():
            if key not in self.options:
                known = ", ".join(self.options) or "none"
                raise UsageError(f"pass {self.name} has no option {key!r}: its options are {known}")
            is_tuple = getattr(hints[key], "__origin__", None) is tuple
            value: object = [part for part in text.split(",") if part] if is_tuple else text
            try:
                values[key] = TypeAdapter(hints[key], config=ConfigDict()).validate_python(value)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise UsageError(
                    f"option {key}={text!r} of pass {self.name} is not usable: {reason}"
                ) from error
        return values


REGISTRY: dict[str, Pass] = {}
"""Every registered pass by name."""


def graph_pass(
    *,
    exact: bool,
    after: tuple[str, ...] = (),
    min_opset: int | Callable[..., int] = 0,
    ranges: RangedTensors | None = None,
    ranges_optional: bool = False,
    formats: tuple[str, ...] | Callable[..., tuple[str, ...]] = (),
    rows: SampledTensors | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a pass; see `Pass` for the arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__
        if name in REGISTRY and REGISTRY[name].function.__module__ != function.__module__:
            raise Pi05cError(f"two passes are called {name!r}: rename the one in {function.__module__}")
        REGISTRY[name] = Pass(name, function, exact, after, min_opset, ranges, ranges_optional, formats, rows)
        return function

    return register
