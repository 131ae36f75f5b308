"""Domains that operators belong to."""

from __future__ import annotations

STANDARD_DOMAINS = frozenset([None, "", "ai.onnx"])
"""ONNX's own, in each of its spellings; onnx-graphsurgeon knows one more, None."""

TENSORRT_DOMAIN = "trt"
"""Of the operators that TensorRT adds, such as `TRT_FP4DynamicQuantize`."""
