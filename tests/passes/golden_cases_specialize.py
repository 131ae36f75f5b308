"""The golden cases of `specialize`."""

from __future__ import annotations

import onnx
from golden_cases import case
from pass_graphs import graph_text

_MASKS = """
        masks (bool[1,3] image_masks, bool[1,4] token_masks) => (bool[1,7] valid) {
          valid = Concat<axis = 1>(image_masks, token_masks)
        }"""


@case(
    "specialize",
    "The third camera is absent and a prompt has two tokens at most: one mask is constant, the other padded.",
    options={"views": "1,1,0", "prompt": "2"},
)
def specialize__views_and_prompt() -> onnx.ModelProto:
    return graph_text(_MASKS)


@case(
    "specialize",
    "All masks of what remains are true: no mask is left to be fed.",
    options={"masks": "true", "prompt": "3"},
)
def specialize__masks() -> onnx.ModelProto:
    return graph_text(_MASKS)


@case("specialize", "Without an option nothing is fixed.")
def specialize__refused() -> onnx.ModelProto:
    return graph_text(_MASKS)
