"""A rewritten graph as a torch module: nodes by the table of operators, weights as buffers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from torch import Tensor, nn

from pi05c.backend import torch_fusion, torch_kernels
from pi05c.backend.torch_operators import CONSTANT_ARGUMENTS, OPERATORS, Call, Entry, to_torch
from pi05c.graph.domains import STANDARD_DOMAINS
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import load
from pi05c.graph.runner import Array
from pi05c.graph.weights import array_of

_Call = tuple[Callable[..., Any], list[str | None], list[str]]
"""A function, the names of what it takes, and of what it gives."""


class TorchGraph(nn.Module):
    """A graph without subgraphs. `forward` takes its inputs in order and gives its outputs in order.

    Attributes:
        inputs: names of the inputs.
        outputs: names of the outputs.
        fused: how often each pattern of `torch_fusion` was found.
    """

    def __init__(self, graph: gs.Graph, device: str = "cpu", fuse: bool = True) -> None:
        """Translate `graph`, which is consumed.

        Args:
            device: where the weights are to be.
            fuse: look for patterns that one kernel computes.

        Raises:
            Pi05cError: an operator is not in the table; it is named, with how many nodes it has.
        """
        super().__init__()
        refuse_unknown(graph)
        self.inputs = [tensor.name for tensor in graph.inputs]
        self.outputs = [tensor.name for tensor in graph.outputs]
        self.fused = torch_fusion.fuse(graph) if fuse else {}
        self._device = device
        self._known: dict[Any, str] = {}
        self._calls = [self._call(node) for node in graph.nodes]
        self._results = [self._place(tensor) for tensor in graph.outputs]
        self._known.clear()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in order, contiguous, as another graph that was compiled ahead of time takes them."""
        results = _run(self, self._calls, self.inputs, self._results, inputs)
        return tuple(value.contiguous() for value in results)

    def observe(self, inputs: Mapping[str, Tensor], see: Callable[[str, Tensor], None]) -> None:
        """Run once and show every input and every result by name; each is freed after the last node that reads it.

        Args:
            inputs: by name.
        """
        last = {name: index for index, (_, arguments, _) in enumerate(self._calls) for name in arguments}
        values: dict[str, Any] = dict(inputs)
        for name, value in inputs.items():
            see(name, value)
        for index, (function, arguments, made) in enumerate(self._calls):
            given = function(
                *(
                    None if name is None else values[name] if name in values else self.get_buffer(name)
                    for name in arguments
                )
            )
            for name, value in zip(
                made, given if isinstance(given, (tuple, list)) else (given,), strict=True
            ):
                see(name, value)
                values[name] = value
            for read in {*made, *arguments}:
                if read is not None and last.get(read, index) == index:
                    values.pop(read, None)

    def halves(self, name: str) -> tuple[Part, Part]:
        """What does not depend on the input `name`, and what does; the first gives what the second reads of it."""
        late = {name}
        calls: tuple[list[_Call], list[_Call]] = ([], [])
        for call in self._calls:
            depends = not late.isdisjoint(call[1])
            calls[depends].append(call)
            if depends:
                late.update(call[2])
        early = {result for call in calls[False] for result in call[2]}
        read = {value for call in calls[True] for value in call[1] if value is not None} | {*self._results}
        border = sorted(early & read)
        inputs = [value for value in self.inputs if value in read or value == name]
        return (
            Part(self, calls[False], [value for value in self.inputs if value != name], border),
            Part(self, calls[True], [*inputs, *border], self._results),
        )

    def _call(self, node: gs.Node) -> _Call:
        """A node as a function, the names of what it takes, and of what it gives."""
        results = [tensor.name for tensor in node.outputs]
        if node.domain == torch_fusion.DOMAIN:
            return (*_FUSED[node.op](self, node), results)
        entry: Entry = OPERATORS[node.op]
        call = Call(node)
        fixed = CONSTANT_ARGUMENTS.get(node.op, ())
        arguments = [
            None if index in fixed or not tensor.name else self._place(tensor)
            for index, tensor in enumerate(node.inputs)
        ]
        while arguments and arguments[-1] is None and len(arguments) > 1:
            arguments.pop()
        return (lambda *values: entry(call, *values)), arguments, results

    def _place(self, tensor: gs.Tensor) -> str:
        """The name of a value in `forward`: that of a constant is that of its buffer."""
        if not isinstance(tensor, gs.Constant):
            return str(tensor.name)
        return self.buffer(id(tensor), lambda: to_torch(array_of(tensor)).to(self._device), keep=tensor)

    def constant(self, values: Array) -> str:
        """A buffer that holds a few numbers, one for all nodes that hold the same."""
        key = (values.dtype.name, values.shape, values.tobytes())
        return self.buffer(key, lambda: to_torch(values).to(self._device))

    def matrix(self, tensor: gs.Constant) -> str:
        """A buffer that holds a [K, N] weight as [N, K]."""
        return self.buffer(
            ("transposed", id(tensor)),
            lambda: to_torch(array_of(tensor)).to(self._device).t().contiguous(),
            keep=tensor,
        )

    def buffer(self, key: Any, make: Callable[[], Tensor], keep: Any = None) -> str:
        """The name of the buffer of a key; made at the first time. `keep` holds what the key is the identity of."""
        if key not in self._known:
            name = f"constant_{len(self._known)}"
            self.register_buffer(name, make())
            self._known[key] = name
            if keep is not None:
                self._known[("kept", id(keep))] = self._known.get(("kept", id(keep)), name)
        return self._known[key]


class Part(nn.Module):
    """Some nodes of a translated graph. `forward` takes `inputs` in order and gives `outputs` in order."""

    def __init__(
        self, whole: TorchGraph, calls: Sequence[_Call], inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = list(inputs), list(outputs)
        self._calls = calls
        for name in {*outputs, *(value for call in calls for value in call[1] if value is not None)}:
            if name in whole._buffers:
                self.register_buffer(name, whole.get_buffer(name))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in order."""
        return _run(self, self._calls, self.inputs, self.outputs, inputs)


def _run(
    module: nn.Module,
    calls: Sequence[_Call],
    names: Sequence[str],
    results: Sequence[str],
    inputs: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Call in order, on inputs by name and buffers of the module."""
    values: dict[str, Any] = dict(zip(names, inputs, strict=True))
    for function, arguments, made in calls:
        given = function(
            *(
                None if name is None else values[name] if name in values else module.get_buffer(name)
                for name in arguments
            )
        )
        values.update(zip(made, given if isinstance(given, (tuple, list)) else (given,), strict=True))
    return tuple(values[name] if name in values else module.get_buffer(name) for name in results)


def _fused(
    function: Callable[..., Tensor], constants: Callable[[TorchGraph, gs.Node], dict[str, Any]]
) -> Callable[[TorchGraph, gs.Node], tuple[Callable[..., Any], list[str | None]]]:
    """A fused node as a call by keyword: tensors by the node's own names, the rest from `constants`."""
    parameters = list(inspect.signature(function).parameters)

    def make(graph: TorchGraph, node: gs.Node) -> tuple[Callable[..., Any], list[str | None]]:
        given = constants(graph, node)
        tensors = {
            name: graph.matrix(tensor) if name == "weight" else graph._place(tensor)
            for name, tensor in zip(node.attrs["names"], node.inputs, strict=True)
        }
        tensors |= {name: value for name, value in given.items() if isinstance(value, _Buffer)}
        plain = {name: value for name, value in given.items() if not isinstance(value, _Buffer)}
        names = [name for name in parameters if name in tensors]

        def call(*values: Tensor) -> Tensor:
            return function(**dict(zip(names, values, strict=True)), **plain)

        return call, [str(tensors[name]) for name in names]

    return make


class _Buffer(str):
    """The name of a buffer, among plain values."""


_FOLDED = ("norm_scale", "norm_shift", "gate")
"""What a row linear takes that is constant where what depends on the step alone was folded."""


def _one(graph: TorchGraph, node: gs.Node, *names: str) -> dict[str, Any]:
    """Scales of a node, each a buffer of one number, or None."""
    values = {name: node.attrs.get(name) for name in names}
    return {
        name: None if value is None else _Buffer(graph.constant(np.array([value], np.float32)))
        for name, value in values.items()
    }


def _row_linear(graph: TorchGraph, node: gs.Node) -> dict[str, Any]:
    tensors = dict(zip(node.attrs["names"], node.inputs, strict=True))
    columns = tensors["weight"].shape[1]
    scales = np.ascontiguousarray(np.broadcast_to(node.attrs["weight_scale"], columns).astype(np.float32))
    epsilon = node.attrs["epsilon"]
    return {
        "weight_scale": _Buffer(graph.constant(scales)),
        **_one(graph, node, "scale", "out_scale"),
        "epsilon": 0.0 if epsilon is None else epsilon,
        "gated": node.attrs["gated"],
        "constant": all(isinstance(tensors.get(name), gs.Constant | None) for name in _FOLDED),
    }


def _row_attention(graph: TorchGraph, node: gs.Node) -> dict[str, Any]:
    scales = node.attrs["scales"]
    return {
        "scales": None if scales is None else _Buffer(graph.constant(np.array(scales, np.float32))),
        **_one(graph, node, "out_scale"),
        "starts": node.attrs["starts"],
        "heads": node.attrs["heads"],
    }


def _scaled_matmul(graph: TorchGraph, node: gs.Node) -> dict[str, Any]:
    return {
        name: _Buffer(graph.constant(np.array(node.attrs[name], np.float32)))
        for name in ("scale", "weight_scale")
    }


_FUSED = {
    torch_fusion.ROW_LINEAR: _fused(torch_kernels.row_linear, _row_linear),
    torch_fusion.ROW_ATTENTION: _fused(torch_kernels.row_attention, _row_attention),
    torch_fusion.SCALED_MATMUL: _fused(torch_kernels.scaled_matmul, _scaled_matmul),
    torch_fusion.ATTENTION: _fused(torch_kernels.attention, lambda graph, node: {}),
}


def refuse_unknown(graph: gs.Graph) -> None:
    """Refuse a graph with operators outside the table.

    Raises:
        Pi05cError: names each, with the number of its nodes.
    """
    unknown: dict[str, int] = {}
    for node in graph.nodes:
        standard = (node.domain or "") in STANDARD_DOMAINS
        if not standard or node.op not in OPERATORS:
            name = node.op if standard else f"{node.domain}::{node.op}"
            unknown[name] = unknown.get(name, 0) + 1
    if unknown:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(unknown.items()))
        loop = "; the pass fuse_denoise_loop unrolls a Loop" if "Loop" in unknown else ""
        raise Pi05cError(
            f"the torch backend does not translate {listed}: compile with other passes, or for TensorRT{loop}"
        )


def translate(path: Path, device: str = "cpu", fuse: bool = True) -> TorchGraph:
    """The graph at `path` as a module.

    Raises:
        Pi05cError: it cannot be read, or holds an operator outside the table.
    """
    return TorchGraph(load(path).graph, device, fuse).eval()


__all__ = ["Part", "TorchGraph", "refuse_unknown", "translate"]
