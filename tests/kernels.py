"""What the installed onnxruntime lacks that newer versions have."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
from packaging.version import Version

from pi05c.graph.walk import graphs_in


def skip_without_kernels(model: onnx.ModelProto) -> None:
    """Skip the test where a model holds a quantizer of opset 23, which onnxruntime 1.23 has not, or one of mixed types."""
    installed = Version(onnxruntime.__version__)
    opset = max(entry.version for entry in model.opset_import if not entry.domain)
    nodes = [node for graph in graphs_in(model.graph) for node in graph.node]
    if (
        installed < Version("1.24")
        and opset >= 23
        and any(node.op_type == "QuantizeLinear" for node in nodes)
    ):
        pytest.skip("onnxruntime 1.23 has no QuantizeLinear of opset 23")
    stated = any(attribute.name == "output_dtype" for node in nodes for attribute in node.attribute)
    if installed < Version("1.32") and stated:
        pytest.skip("onnxruntime below 1.32 dequantizes to the type of the scale alone")
