"""What finders of connected arithmetic return."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class Region:
    """Nodes that together compute one thing.

    Attributes:
        scope: the graph that holds them.
        nodes: in order, the last one making `output`.
        input, output: what they read, constants aside, and what they make.
    """

    scope: gs.Graph
    nodes: tuple[gs.Node, ...]
    input: gs.Tensor
    output: gs.Tensor

    @property
    def name(self) -> str:
        """The name of the last node, which names the region in reports."""
        return str(self.nodes[-1].name)
