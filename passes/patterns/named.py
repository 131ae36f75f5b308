"""Linears by name and by place, as options of passes name them."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection

import onnx_graphsurgeon as gs

from pi05c.passes.patterns.layers import Layers
from pi05c.passes.patterns.linear import Linear


class Named:
    """Tells which linears of a graph, as it is when this is made, a pattern of the shell's form names.

    A pattern is held against the name of the MatMul or Gemm, that of the weight, and the place: `part.layer.operator`,
    or `part.operator` outside of layers.

    Args:
        patterns: all that will be asked about; where there are none, places are not looked for.
    """

    def __init__(self, graph: gs.Graph, *patterns: Collection[str]) -> None:
        self._places = _places(graph) if any(patterns) else {}

    def __call__(self, linear: Linear, patterns: Collection[str]) -> bool:
        names = (linear.node.name, linear.weight.name, self._places.get(id(linear.node), ""))
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _places(graph: gs.Graph) -> dict[int, str]:
    """The place of each linear by `id` of its node."""
    places = {}
    for found in Layers(graph).operators:
        parts = (found.place.part, found.place.layer, found.name)
        places[id(found.node)] = ".".join(str(part) for part in parts if part is not None)
    return places
