"""Choosing formats: every choice is within its budget, and near the best that trying all of them finds."""

from __future__ import annotations

import itertools
import random

import pytest

from pi05c.tunegroups import KEPT
from pi05c.tunesearch import Effect, Effects, Frontier, effects_of


def drawn(seed: int, groups: int = 7) -> Effects:
    generator = random.Random(seed)
    found = {}
    for index in range(groups):
        error, cost = generator.uniform(0.1, 3.0), -generator.uniform(0.2, 2.0)
        found[f"g{index}"] = {
            KEPT: Effect(0.0, 0.0),
            "fp8": Effect(error, cost),
            "nvfp4": Effect(error * generator.uniform(2, 8), cost * generator.uniform(1.1, 1.9)),
        }
    return found


def best(effects: Effects, budget: float) -> float:
    costs = []
    for formats in itertools.product(*(effects[name] for name in effects)):
        chosen = [effects[name][each] for name, each in zip(effects, formats, strict=True)]
        if sum(effect.error for effect in chosen) <= budget:
            costs.append(sum(effect.cost for effect in chosen))
    return min(costs)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("part", [0.02, 0.2, 0.6])
def test_choices_are_within_the_budget_and_near_the_best(seed: int, part: float) -> None:
    effects = drawn(seed)
    frontier = Frontier(effects)
    budget = part * frontier.error(frontier.choices[0])
    choice = frontier.within(budget)
    assert choice is not None
    assert frontier.error(choice) <= budget
    largest = max(-effect.cost for formats in effects.values() for effect in formats.values())
    least = best(effects, budget)
    assert least - 1e-9 <= frontier.cost(choice) <= least + largest
    for name, formats in effects.items():
        for each, effect in formats.items():
            changed = {**choice, name: each}
            if effect.cost < effects[name][choice[name]].cost:
                assert frontier.error(changed) > budget, f"{name} could be {each}"


def test_the_path_leads_from_the_cheapest_to_the_most_accurate() -> None:
    frontier = Frontier(drawn(1))
    errors = [frontier.error(choice) for choice in frontier.choices]
    costs = [frontier.cost(choice) for choice in frontier.choices]
    assert errors == sorted(errors, reverse=True)
    assert costs == sorted(costs)
    assert set(frontier.choices[-1].values()) == {KEPT}
    assert frontier.within(-1.0) is None


def test_effects_are_what_is_left_of_float16() -> None:
    effects = effects_of((0.25, 10.0), {("a", "fp8"): (1.0, 7.0), ("b", "fp8"): (0.2, 12.0)}, ["a", "b", "c"])
    assert effects["a"]["fp8"] == Effect(0.75, -3.0)
    assert effects["b"]["fp8"] == Effect(0.0, 2.0)
    assert list(effects["c"]) == [KEPT]
    assert Frontier(effects).choices[0] == {"a": "fp8", "b": KEPT, "c": KEPT}
