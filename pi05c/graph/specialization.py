"""Inputs whose values were fixed at compile time: the record in a model's metadata, and the check of what is fed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np

from pi05c.graph.errors import Pi05cError
from pi05c.graph.runner import Array

SPECIALIZED_KEY = "pi05c.specialized"
"""Metadata entry of a model: its fixed inputs in JSON, by name."""


@dataclass(frozen=True)
class FixedInput:
    """A mask of which some or all elements were fixed.

    Attributes:
        name: of the input. One that is fixed as a whole is no input of the graph any more.
        shape: its dimensions.
        values: the elements in row-major order; None for one that the caller gives.
    """

    name: str
    shape: tuple[int, ...]
    values: tuple[bool | None, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is left to the caller."""
        return None not in self.values

    @property
    def array(self) -> Array:
        """The fixed values, false where the caller decides."""
        return np.array([bool(value) for value in self.values], np.bool_).reshape(self.shape)

    def obstacle(self, array: Array) -> str | None:
        """Why an array of the right shape and type is not what the graph was specialized for, in one sentence."""
        for index, (wanted, given) in enumerate(zip(self.values, np.ravel(array).tolist(), strict=True)):
            if wanted is not None and given is not wanted:
                place = [int(position) for position in np.unravel_index(index, self.shape)]
                return (
                    f"input {self.name!r} holds {given} at {place}, but the graph was specialized for {wanted} there: "
                    "give an observation that fits, or compile with other options of specialize"
                )
        return None


def fixed_inputs(metadata: Mapping[str, str]) -> tuple[FixedInput, ...]:
    """The fixed inputs of a model by its metadata.

    Raises:
        Pi05cError: the entry is damaged.
    """
    try:
        entries = json.loads(metadata.get(SPECIALIZED_KEY, "{}"))
        found = tuple(
            FixedInput(name, tuple(entry["shape"]), tuple(entry["values"])) for name, entry in entries.items()
        )
        damaged = any(math.prod(fixed.shape) != len(fixed.values) for fixed in found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        damaged = True
    if damaged:
        raise Pi05cError(
            f"the metadata entry {SPECIALIZED_KEY} of the model is damaged: compile the plain graph again"
        )
    return found


def record_fixed(metadata: MutableMapping[str, str], fixed: Sequence[FixedInput]) -> None:
    """Add fixed inputs to a model's metadata."""
    known = {entry.name: entry for entry in (*fixed_inputs(metadata), *fixed)}
    metadata[SPECIALIZED_KEY] = json.dumps(
        {name: {"shape": entry.shape, "values": entry.values} for name, entry in known.items()}
    )


__all__ = ["SPECIALIZED_KEY", "FixedInput", "fixed_inputs", "record_fixed"]
