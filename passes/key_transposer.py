"""K^T as one node, however many attentions read the same keys."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from pi05c.graph.edit import Editor
from pi05c.graph.io import scopes
from pi05c.passes.contract import PassContext
from pi05c.passes.patterns.walk import static_shape

SWAP_LAST = [0, 1, 3, 2]
"""Transpose of the last two of four axes."""


class KeyTransposer:
    """Transposes tensors of shape [B, K, C, d], each once and in the scope that makes it.

    Attributes:
        editors: an editor for each scope, by `id(scope)`.
    """

    def __init__(self, graph: gs.Graph, ctx: PassContext) -> None:
        self.editors: dict[int, Editor] = {id(scope): ctx.editor(scope) for scope in scopes(graph)}
        self._scope_of: dict[int, gs.Graph] = {}
        self._known: dict[int, gs.Tensor] = {}
        for scope in scopes(graph):
            for tensor in scope.inputs:
                self._scope_of[id(tensor)] = scope
            for node in scope.nodes:
                self._scope_of.update({id(tensor): scope for tensor in node.outputs})

    def __call__(self, keys: gs.Tensor, scope: gs.Graph) -> gs.Tensor:
        """`keys`, of static shape, as [B, K, d, C]; `scope` is where a constant is transposed."""
        if id(keys) not in self._known:
            editor = self.editors[id(self._scope_of.get(id(keys), scope))]
            batch, heads, length, width = static_shape(keys) or ()
            shape = [batch, heads, width, length]
            name = f"{keys.name}.transposed"
            self._known[id(keys)] = editor.add(
                "Transpose", [keys], name, dtype=keys.dtype, shape=shape, attrs={"perm": SWAP_LAST}
            )
        return self._known[id(keys)]
