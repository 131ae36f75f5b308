"""Domains that operators belong to."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

STANDARD_DOMAINS = frozenset([None, "", "ai.onnx"])
"""ONNX's own, in each of its spellings; onnx-graphsurgeon knows one more, None."""

TENSORRT_DOMAIN = "trt"
"""Of the operators that TensorRT adds."""

DYNAMIC = "TRT_FP4DynamicQuantize"
"""TensorRT's operator that quantizes activations while the engine runs: FP4 codes and FP8 scales of blocks."""

FP4_PLACEHOLDER = "TRT_FP4QDQ"
"""What ModelOpt's torch exporter puts behind a weight that it leaves to be turned into FP4; see `fp4_weights`."""


def tell_apart(node: gs.Node) -> None:
    """Call an operator of another domain `domain::name` where ONNX has one of its name.

    What looks for a MatMul, by `node.op`, then finds none that another tool or a function of the model defines.
    """
    if node.domain == "ai.onnx":
        node.domain = ""
    elif node.domain not in STANDARD_DOMAINS and onnx.defs.has(node.op):
        node.op = f"{node.domain}::{node.op}"


def bare_name(node: gs.Node) -> str:
    """The name of a node's operator within its domain."""
    return str(node.op).removeprefix(f"{node.domain}::")


def full_name(node: gs.Node) -> str:
    """The name of a node's operator, with its domain where that is not ONNX's own."""
    return f"{node.domain}::{bare_name(node)}" if node.domain else str(node.op)
