"""Which format each group gets: the least cost within an error, by what each group costs alone.

Rounding errors of different groups are nearly independent, so their squares add up: the square of the predicted error
is that of float16 and of each group's own, as measured with that group alone quantized. Costs add up too. Choosing one
format a group is then a knapsack. It is solved greedily: from the cheapest formats on, the change that takes away most
squared error for what it costs comes next; with what is left of the budget the dearest changes are taken back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pi05c.tunegroups import KEPT, Choice


@dataclass(frozen=True)
class Effect:
    """What a format does to a group, against `KEPT`.

    Attributes:
        error: squared relative L2 error that it adds.
        cost: what it adds in seconds or bytes: negative where it saves some.
    """

    error: float
    cost: float


Effects = Mapping[str, Mapping[str, Effect]]
"""By name of the group and format; `KEPT` is among the formats."""


class Frontier:
    """The choices from the cheapest to the most accurate.

    Attributes:
        choices: each differs from the one before in one group.
    """

    def __init__(self, effects: Effects) -> None:
        self._effects = effects
        choice = {
            name: min(formats, key=lambda each: _by_cost(formats[each])) for name, formats in effects.items()
        }
        self.choices: list[dict[str, str]] = [dict(choice)]
        while (change := self._next(choice)) is not None:
            name, chosen = change
            choice[name] = chosen
            self.choices.append(dict(choice))

    def error(self, choice: Choice) -> float:
        """The squared error that a choice is predicted to add to that of float16."""
        return math.fsum(self._effects[name][chosen].error for name, chosen in choice.items())

    def cost(self, choice: Choice) -> float:
        """How much more it is predicted to cost than float16."""
        return math.fsum(self._effects[name][chosen].cost for name, chosen in choice.items())

    def within(self, budget: float) -> dict[str, str] | None:
        """The cheapest choice found whose squared error is within a budget; None where not even the last one is."""
        choice = next((each for each in self.choices if self.error(each) <= budget), None)
        if choice is None:
            return None
        choice = dict(choice)
        left = budget - self.error(choice)
        backward = [
            (now.cost - other.cost, name, format_)
            for name, chosen in choice.items()
            for format_, other in self._effects[name].items()
            if (now := self._effects[name][chosen]).cost > other.cost
        ]
        for _, name, format_ in sorted(backward, reverse=True):
            current = self._effects[name][choice[name]]
            step = self._effects[name][format_].error - current.error
            if step <= left and self._effects[name][format_].cost < current.cost:
                left -= step
                choice[name] = format_
        return choice

    def _next(self, choice: Choice) -> tuple[str, str] | None:
        """The change that takes away most squared error for its cost; None where nothing takes any away."""
        best, found = 0.0, None
        for name, chosen in choice.items():
            now = self._effects[name][chosen]
            for format_, other in self._effects[name].items():
                gained, paid = now.error - other.error, other.cost - now.cost
                if gained <= 0:
                    continue
                rate = gained / paid if paid > 0 else math.inf
                if found is None or rate > best:
                    best, found = rate, (name, format_)
        return found


def _by_cost(effect: Effect) -> tuple[float, float]:
    return effect.cost, effect.error


def effects_of(
    kept: tuple[float, float], alone: Mapping[tuple[str, str], tuple[float, float]], names: Sequence[str]
) -> dict[str, dict[str, Effect]]:
    """Effects from measurements.

    Args:
        kept: mean squared error and cost with nothing quantized.
        alone: the same with one group in one format.
    """
    error, cost = kept
    found: dict[str, dict[str, Effect]] = {name: {KEPT: Effect(0.0, 0.0)} for name in names}
    for (name, format_), (own_error, own_cost) in alone.items():
        found[name][format_] = Effect(max(0.0, own_error - error), own_cost - cost)
    return found


__all__ = ["Effect", "Effects", "Frontier", "effects_of"]
