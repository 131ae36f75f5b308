"""Canonical text of a graph: one line a tensor, in execution order, for goldens, diffs and people.

%probs: float32[1,8,10,978] = Softmax(%logits) {axis=-1}
%wq: float8e4m3fn[2048,1024] = initializer sha256:1f0c9a2e
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from pi05c.graph.domains import full_name
from pi05c.graph.dtypes import name_of
from pi05c.graph.weights import weight_of

_SHOWN_VALUES = 8
"""Constants of up to this many elements are shown by value (six digits, which do not depend on the processor that
computed them), larger ones by hash."""


def canonical_text(graph: gs.Graph, *, values: bool = True) -> str:
    """The graph as text; attributes sorted, initializers where they are first used, bodies indented.

    Args:
        values: show what initializers hold, for which they are read.
    """
    return "\n".join(_lines(graph, "", set(), initializer_line if values else declared)) + "\n"


def _lines(
    graph: gs.Graph, indent: str, shown: set[int], line: Callable[[gs.Constant], str]
) -> Iterator[str]:
    yield f"{indent}inputs: {', '.join(declared(tensor) for tensor in graph.inputs)}"
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and id(tensor) not in shown:
                shown.add(id(tensor))
                yield f"{indent}{line(tensor)}"
        yield f"{indent}{node_line(node)}"
        for key, value in sorted(node.attrs.items()):
            if isinstance(value, gs.Graph):
                yield f"{indent}  {key}:"
                yield from _lines(value, indent + "    ", shown, line)
    for tensor in graph.outputs:
        if isinstance(tensor, gs.Constant) and id(tensor) not in shown:
            yield f"{indent}{line(tensor)}"
    yield f"{indent}outputs: {', '.join(declared(tensor) for tensor in graph.outputs)}"


def node_line(node: gs.Node) -> str:
    """`%y: float32[4] = Add(%x, %b) {...}`, without the node's subgraphs."""
    outputs = ", ".join(declared(tensor) if tensor.name else "_" for tensor in node.outputs)
    inputs = ", ".join(f"%{escaped(tensor.name)}" if tensor.name else "_" for tensor in node.inputs)
    attributes = {key: value for key, value in sorted(node.attrs.items()) if not isinstance(value, gs.Graph)}
    listed = ", ".join(f"{escaped(key)}={attribute_text(key, value)}" for key, value in attributes.items())
    return f"{outputs} = {escaped(full_name(node))}({inputs})" + (f" {{{listed}}}" if listed else "")


def initializer_line(constant: gs.Constant) -> str:
    """`%w: float16[4,8] = initializer sha256:...`, or the values where they are few."""
    return f"{declared(constant)} = {initializer_text(constant)}"


def declared(tensor: gs.Tensor) -> str:
    """`%x: float32[4,?]`: a tensor with its type and shape."""
    shape = (
        "?"
        if tensor.shape is None
        else ",".join("?" if dim is None else escaped(str(dim)) for dim in tensor.shape)
    )
    return f"%{escaped(tensor.name)}: {name_of(tensor.dtype)}[{shape}]"


def escaped(name: str) -> str:
    """A name on one line: line ends and other control characters as in a Python string."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def initializer_text(constant: gs.Constant) -> str:
    """What a constant holds: its values where they are few, else the beginning of their SHA-256."""
    weight = weight_of(constant)
    if math.prod(weight.shape) <= _SHOWN_VALUES:
        return _values(weight.load())
    return f"initializer sha256:{weight.checksum()[:8]}"


def _values(array: Any) -> str:
    if array.dtype.kind in "fV":
        items = [f"{float(value):.6g}" for value in array.reshape(-1)]
    else:
        items = [str(value) for value in np.asarray(array).reshape(-1)]
    return items[0] if array.ndim == 0 else f"[{', '.join(items)}]"


def attribute_text(key: str, value: Any) -> str:
    """The value of the attribute `key` as canonical text; not of a subgraph."""
    if isinstance(value, gs.Constant):
        return f"{declared(value)} {initializer_text(value)}"
    if key in ("to", "dtype", "output_dtype") and isinstance(value, (int, np.integer, type, np.dtype)):
        return name_of(value)
    if isinstance(value, onnx.AttributeProto):
        kind = str(onnx.AttributeProto.AttributeType.Name(value.type)).lower()
        return f"{kind} sha256:{hashlib.sha256(value.SerializeToString(deterministic=True)).hexdigest()[:8]}"
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(attribute_text('', item) for item in value)}]"
    return escaped(str(value))
