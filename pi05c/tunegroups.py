"""What `pi05c tune` chooses formats for: groups of linears and of attention MatMuls, and the passes that a choice becomes.

A group is what shares a part, a layer (or a few neighbouring ones) and a half of it: the linears of attention, or those
of the MLP. The attention MatMuls of each part are one group.
"""

from __future__ import annotations

import fnmatch
import glob
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pi05c.graph.errors import UsageError
from pi05c.graph.io import Model
from pi05c.graph.ranges import Ranges
from pi05c.passes import REGISTRY
from pi05c.passes.patterns.attention import find_attention
from pi05c.passes.patterns.layers import OPERATORS, Layers
from pi05c.passes.patterns.linear import find_linears
from pi05c.passes.patterns.parts import PARTS, Part, parts_of
from pi05c.passes.pipeline import Step, run

KEPT, FP8, NVFP4, NVFP4_W4A16 = "kept", "fp8", "nvfp4", "nvfp4_w4a16"
"""Formats of a group; `kept` is the working precision, float16."""

TWO_TERMS = "_two_terms"
"""What the name of a format ends with whose activations are multiplied in two terms."""

FORMATS = (FP8, FP8 + TWO_TERMS, NVFP4, NVFP4 + TWO_TERMS, NVFP4_W4A16)
"""What can be chosen beside it, of NVFP4 with and without activations one, by the names that `quantize_linears` has."""

MATMULS = "attention MatMuls"
"""The kind of a group of MatMuls between two activations."""

RESOLUTION: Mapping[Part, int] = {"vision": 6, "prefix": 18, "denoise": 6}
"""Into how many groups of layers a part is divided at most, for each half of a layer."""

NAMES: Mapping[Part, str] = {"vision": "vision", "prefix": "LLM", "denoise": "expert"}

_LINEARS, _ATTENTION = "quantize_linears", "insert_attention_qdq"
_ATTENTION_LINEARS = ("qkv", "out")

Choice = Mapping[str, str]
"""The format of each group, by the group's name."""


@dataclass(frozen=True)
class Group:
    """Operators that get one format.

    Attributes:
        name: how it is shown, `LLM 3 MLP`.
        kind: `attention` or `MLP` for the linears of that half of a layer, `linear` outside of layers, or `MATMULS`.
        layers: the first and the last one; None outside of layers and for all.
        formats: those that all of it can have beside `KEPT`.
        patterns: name its weights and nothing else; none for `MATMULS`.
        operators: how many there are, all steps.
    """

    name: str
    part: Part
    kind: str
    layers: tuple[int, int] | None
    formats: tuple[str, ...]
    patterns: tuple[str, ...]
    operators: int

    @property
    def family(self) -> str:
        """What it is measured together with: the other layers of its part and kind."""
        return f"{NAMES[self.part]} {self.kind}"


@dataclass(frozen=True)
class Base:
    """The pipeline that a choice is put into.

    Attributes:
        steps: all of them.
        cut: index of `quantize_linears`: what stands before is the same for every choice.
    """

    steps: tuple[Step, ...]
    cut: int

    @classmethod
    def of(cls, steps: tuple[Step, ...]) -> Base:
        """Take a pipeline apart.

        Raises:
            UsageError: it does not quantize linears.
        """
        found = [index for index, step in enumerate(steps) if step.spec.name == _LINEARS]
        if not found:
            raise UsageError(
                f"tune chooses what {_LINEARS} does, and --passes does not name it: give a pipeline that quantizes, "
                "such as default"
            )
        return cls(steps, found[0])

    @property
    def ahead(self) -> tuple[Step, ...]:
        """The steps that are the same for every choice."""
        return self.steps[: self.cut]

    def with_choice(self, groups: Sequence[Group], choice: Choice) -> tuple[Step, ...]:
        """All steps, where each group gets its format."""
        options = {_LINEARS: self._linears(groups, choice), _ATTENTION: _attention(groups, choice)}
        return tuple(
            replace(step, options=_given({**step.options, **options[step.spec.name]}))
            if step.spec.name in options
            else step
            for step in self.steps
        )

    def _linears(self, groups: Sequence[Group], choice: Choice) -> dict[str, Any]:
        linears = [group for group in groups if group.kind != MATMULS]
        narrow = {name: element_of(chosen) for name, chosen in choice.items()}
        fp4 = next((narrow[group.name] for group in linears if narrow[group.name] not in (KEPT, FP8)), FP8)

        def patterns(chosen: Callable[[Group], bool]) -> tuple[str, ...]:
            return tuple(pattern for group in linears if chosen(group) for pattern in group.patterns)

        return {
            "llm": fp4,
            "fp8": patterns(lambda g: fp4 != FP8 and narrow[g.name] == FP8 and g.part == "prefix"),
            "nvfp4": patterns(lambda g: narrow[g.name] == fp4 != FP8 and g.part != "prefix"),
            "two_terms": patterns(lambda g: choice[g.name].endswith(TWO_TERMS)),
            "keep": (
                *self.steps[self.cut].options.get("keep", ()),
                *patterns(lambda g: narrow[g.name] == KEPT),
            ),
        }


def _attention(groups: Sequence[Group], choice: Choice) -> dict[str, Any]:
    kept = [group.part for group in groups if group.kind == MATMULS and choice[group.name] == KEPT]
    quantized = [group.part for group in groups if group.kind == MATMULS and choice[group.name] != KEPT]
    return {"vision": "vision" in quantized, "keep": tuple(part for part in kept if part != "vision")}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that say what is so anyhow."""
    return {key: value for key, value in options.items() if value not in ((), False, FP8)}


def find_groups(
    load_model: Callable[[], Model],
    base: Base,
    ranges: Ranges | None,
    formats: Sequence[str],
    resolution: int | None = None,
) -> list[Group]:
    """The groups of a graph that `base.ahead` has been through, in the order of execution.

    Args:
        load_model: gives the graph, a new one each time.
        formats: of `FORMATS`.
        resolution: into how many groups of layers a part is divided at most, instead of `RESOLUTION`.
    """
    graph = load_model().graph
    parts, attentions = parts_of(graph), find_attention(graph)[0]
    part_of = {attention.name: parts[id(attention.qk)] for attention in attentions}
    weights = {linear.node.name: linear.weight.name for linear in find_linears(graph)}
    names = {*weights, *weights.values()}
    members: dict[tuple[Part, int | None, str], set[str]] = defaultdict(set)
    count: dict[str, int] = defaultdict(int)
    for operator in Layers(graph).operators:
        name = operator.node.name
        if name in weights:
            kind = _kind(operator.name)
            members[operator.place.part, operator.place.layer, kind].add(weights[name])
            count[weights[name]] += 1
    changed = _changed(load_model, base, ranges, formats)
    found = []
    blocks = _blocks(members, resolution)
    for (part, layers, kind), own in blocks.items():
        able = tuple(each for each in formats if all(weight in changed[each] for weight in own))
        if able:
            name = " ".join([NAMES[part], *_spelled(layers), kind])
            operators = sum(count[weight] for weight in own)
            found.append(Group(name, part, kind, layers, able, _patterns(own, names), operators))
    for part in PARTS:
        count_of = sum(part_of.get(name) == part for name in changed[MATMULS])
        if count_of and FP8 in formats:
            found.append(Group(f"{NAMES[part]} {MATMULS}", part, MATMULS, None, (FP8,), (), count_of))
    return found


def _kind(role: str) -> str:
    if role not in OPERATORS:
        return "linear"
    return "attention" if role in _ATTENTION_LINEARS else "MLP"


def _spelled(layers: tuple[int, int] | None) -> list[str]:
    if layers is None:
        return []
    first, last = layers
    return [str(first) if first == last else f"{first}-{last}"]


def _blocks(
    members: Mapping[tuple[Part, int | None, str], set[str]], resolution: int | None
) -> dict[tuple[Part, tuple[int, int] | None, str], set[str]]:
    """Weights by part, layers and kind; neighbouring layers together where a part has too many."""
    depth = {
        part: 1 + max((layer for p, layer, _ in members if p == part and layer is not None), default=0)
        for part in PARTS
    }
    blocks: dict[tuple[Part, tuple[int, int] | None, str], set[str]] = defaultdict(set)
    order = sorted(
        members, key=lambda key: (PARTS.index(key[0]), -1 if key[1] is None else key[1], key[2].lower())
    )
    for part, layer, kind in order:
        block = None
        if layer is not None:
            size = math.ceil(depth[part] / (resolution or RESOLUTION[part]))
            first = layer // size * size
            block = first, min(first + size, depth[part]) - 1
        blocks[part, block, kind] |= members[part, layer, kind]
    return blocks


def element_of(format_: str) -> str:
    """A format without what it says of terms."""
    return format_.removesuffix(TWO_TERMS)


def everywhere(format_: str) -> dict[str, Any]:
    """Options of `quantize_linears` that give all linears a format."""
    narrow = element_of(format_)
    options: dict[str, Any] = {} if narrow == FP8 else {"llm": narrow, "nvfp4": ("*",)}
    return options if narrow == format_ else {**options, "two_terms": ("*",)}


def _changed(
    load_model: Callable[[], Model], base: Base, ranges: Ranges | None, formats: Sequence[str]
) -> dict[str, set[str]]:
    """The weights that each format can be given to, and under `MATMULS` the attentions: the passes run dry."""
    found: dict[str, set[str]] = {}
    own = {key: base.steps[base.cut].options[key] for key in ("keep",) if key in base.steps[base.cut].options}
    for each in formats:
        model = load_model()
        weights = {linear.node.name: linear.weight.name for linear in find_linears(model.graph)}
        options = {**own, **everywhere(each)}
        (result,) = run(model, [Step(REGISTRY[_LINEARS], options)], calibrate=lambda *_: ranges, dry=True)
        refused = {weights[skip.where] for skip in result.skips if skip.where in weights}
        found[each] = {weights[name] for name in result.changes} - refused
    found[MATMULS] = set()
    if any(step.spec.name == _ATTENTION for step in base.steps[base.cut :]):
        step = Step(REGISTRY[_ATTENTION], {"vision": True})
        (result,) = run(load_model(), [step], calibrate=lambda *_: ranges, dry=True)
        found[MATMULS] = set(result.changes)
    return found


def _patterns(own: set[str], names: set[str]) -> tuple[str, ...]:
    """Patterns that match names of weights in `own` and no other name of a linear or weight: one for all where that goes."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in own:
        by_folder[_folder(name)].append(name)
    found = []
    for folder in sorted(by_folder):
        pattern = f"{_literal(folder)}.*"
        matched = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        exact = [_literal(name) for name in sorted(by_folder[folder])]
        found += [pattern] if folder and matched <= own else exact
    return tuple(found)


def _literal(name: str) -> str:
    """A pattern that matches a name; what a pipeline's text cannot hold becomes `?`."""
    return "".join("?" if character in "{},=" else character for character in glob.escape(name))


def _folder(name: str) -> str:
    """`a.layers.3.mlp` of `a.layers.3.mlp.down_proj.weight`: what the weights of one half of a layer have in common."""
    return ".".join(name.split(".")[:-2])


def whole(groups: Sequence[Group], wanted: Mapping[str, str] | str) -> dict[str, str]:
    """A choice of one format for all groups that can have it (those of vision's attention MatMuls stay), or by family."""
    choice = {}
    for group in groups:
        asked = wanted if isinstance(wanted, str) else wanted.get(group.family, KEPT)
        if isinstance(wanted, str) and group.kind == MATMULS and group.part == "vision":
            asked = KEPT
        choice[group.name] = asked if asked in group.formats else KEPT
    return choice


__all__ = [
    "FORMATS",
    "FP8",
    "KEPT",
    "MATMULS",
    "NVFP4",
    "NVFP4_W4A16",
    "TWO_TERMS",
    "Base",
    "Choice",
    "Group",
    "element_of",
    "everywhere",
    "find_groups",
    "whole",
]
