"""Which constants hold the same, and which nodes do the same with their inputs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.domains import STANDARD_DOMAINS, TENSORRT_DOMAIN
from pi05c.graph.weights import weight_of
from pi05c.passes.patterns.dependence import NONDETERMINISTIC


def is_function(node: gs.Node) -> bool:
    """Whether a node's inputs and attributes settle its result: no body, nothing random.

    What an operator of another tool or a function of the model does is not known: it may draw random numbers.
    """
    known = node.domain in STANDARD_DOMAINS or node.domain == TENSORRT_DOMAIN
    return known and node.op not in NONDETERMINISTIC and not list(node.subgraphs())


def fingerprint(constant: gs.Constant) -> Hashable:
    """What two constants share only if they hold the same bytes; large weights are not read for it."""
    found: Any = weight_of(constant).fingerprint()
    return found if isinstance(found, Hashable) else id(constant)


def operation(node: gs.Node) -> Hashable:
    """What a node does, whatever its inputs are: operator, attributes and which outputs it makes."""
    attributes = tuple((key, _plain(value)) for key, value in sorted(node.attrs.items()))
    overload = getattr(node, "overload", "")
    return (
        node.domain or "",
        node.op,
        overload,
        attributes,
        tuple(bool(tensor.name) for tensor in node.outputs),
    )


class ValueNumbers:
    """Numbers for tensors: those of equal number are equal in value, whichever nodes compute them.

    Args:
        scope: whose nodes are numbered; tensors from elsewhere are equal to themselves alone, constants to those of
            the same bytes.
    """

    def __init__(self, scope: gs.Graph) -> None:
        self._of: dict[int, int] = {}
        self._known: dict[Hashable, int] = {}
        for node in scope.nodes:
            key = (operation(node), tuple(map(self.of, node.inputs))) if is_function(node) else id(node)
            for index, tensor in enumerate(node.outputs):
                self._of[id(tensor)] = self.number((key, index))

    def of(self, tensor: gs.Tensor) -> int:
        """The number of a tensor; an input that is left out has one too."""
        found = self._of.get(id(tensor))
        if found is None:
            key = fingerprint(tensor) if isinstance(tensor, gs.Constant) else tensor.name and id(tensor)
            found = self._of[id(tensor)] = self.number(key)
        return found

    def number(self, key: Hashable) -> int:
        """The number of whatever `key` describes."""
        return self._known.setdefault(key, len(self._known))


def _plain(value: Any) -> Hashable:
    if isinstance(value, gs.Constant):
        return fingerprint(value)
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes()
    return str(value)
