"""The golden cases of batch_views: a small tower for each camera, as a loop over cameras exports it."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from golden_cases import case
from pass_graphs import Array, graph_text, normal

PATCHES = 4
"""Of an 8 x 8 image, in patches of 4 x 4."""

WIDTH = 16


def weights(*also: str) -> dict[str, Array]:
    """The tower's, and more linears of the same size."""
    return {
        "kernel": normal(1, WIDTH, 3, 4, 4, scale=0.15),
        "position": normal(2, 1, PATCHES, WIDTH),
        "gain": normal(3, WIDTH),
        "shift": normal(4, WIDTH),
        "w": normal(5, WIDTH, WIDTH),
        **{name: normal(6 + index, WIDTH, WIDTH) for index, name in enumerate(also)},
    }


def tower(view: int, image: str, batch: int = 1, linear: str = "w") -> str:
    """Patch embedding, position, attention without heads: from `image` to `seen{view}` [batch, PATCHES, WIDTH]."""
    v = view
    return f"""
          conv{v} = Conv<strides = [4, 4]>({image}, kernel)
          rows{v} = Reshape(conv{v}, to_rows)
          turned{v} = Transpose<perm = [0, 2, 1]>(rows{v})
          placed{v} = Add(turned{v}, position)
          normed{v} = LayerNormalization<axis = -1>(placed{v}, gain, shift)
          key{v} = Transpose<perm = [0, 2, 1]>(normed{v})
          logits{v} = MatMul(normed{v}, key{v})
          probs{v} = Softmax<axis = -1>(logits{v})
          mixed{v} = MatMul(probs{v}, normed{v})
          seen{v} = MatMul(mixed{v}, {linear})"""


def towers(images: Iterable[str]) -> str:
    return "".join(tower(view, image) for view, image in enumerate(images))


SHAPES = f"int64[3] to_rows = {{1, {WIDTH}, {PATCHES}}}"


@case(
    "batch_views",
    "Three cameras, an input and a tower each: one tower over a batch, whose results stand side by side.",
)
def batch_views__separate_inputs() -> onnx.ModelProto:
    images = ", ".join(f"float[1,3,8,8] {name}" for name in ("base", "left", "right"))
    return graph_text(
        f"""
        policy ({images}, float[1,2,{WIDTH}] text) => (float[1,{3 * PATCHES + 2},{WIDTH}] prefix) <{SHAPES}> {{
          {towers(("base", "left", "right"))}
          prefix = Concat<axis = 1>(seen0, seen1, seen2, text)
        }}""",
        weights(),
    )


@case(
    "batch_views", "Views of one stacked input, two samples: a reshape of the stack takes the slices' place."
)
def batch_views__stacked_input() -> onnx.ModelProto:
    indices = ", ".join(f"int64 view{view} = {{{view}}}" for view in range(3))
    picked = "".join(f"\n          image{v} = Gather<axis = 1>(images, view{v})" for v in range(3))
    body = towers(f"image{view}" for view in range(3))
    return graph_text(
        f"""
        policy (float[2,3,3,8,8] images) => (float[2,{3 * PATCHES},{WIDTH}] prefix)
          <{indices}, int64[3] to_rows = {{-1, {WIDTH}, {PATCHES}}}> {{{picked}
          {body}
          prefix = Concat<axis = 1>(seen0, seen1, seen2)
        }}""",
        weights(),
    )


@case(
    "batch_views", "Something reads what one view's tower computes on the way: a Split gives it that view's."
)
def batch_views__one_view_read() -> onnx.ModelProto:
    return graph_text(
        f"""
        policy (float[1,3,8,8] base, float[1,3,8,8] left)
          => (float[1,{2 * PATCHES},{WIDTH}] prefix, float[1,{PATCHES},{WIDTH}] focus, float[1,{PATCHES},{PATCHES}] probs0)
          <{SHAPES}> {{
          {towers(("base", "left"))}
          focus = Tanh(mixed1)
          prefix = Concat<axis = 1>(seen0, seen1)
        }}""",
        weights(),
    )


@case("batch_views", "A projector for each camera at the end: the towers become one, the projectors stay.")
def batch_views__own_projectors() -> onnx.ModelProto:
    return graph_text(
        f"""
        policy (float[1,3,8,8] base, float[1,3,8,8] left) => (float[1,{2 * PATCHES},{WIDTH}] prefix) <{SHAPES}> {{
          {towers(("base", "left"))}
          out0 = MatMul(seen0, w_base)
          out1 = MatMul(seen1, w_left)
          prefix = Concat<axis = 1>(out0, out1)
        }}""",
        weights("w_base", "w_left"),
    )


@case("batch_views", "An operator that mixes the batch comes first: a batch would mix the views.")
def batch_views__mixed_batch() -> onnx.ModelProto:
    body = "".join(
        tower(view, image, batch=2).replace(f"Add(turned{view}", f"Add(mean{view}")
        + f"\n          mean{view} = ReduceMean<keepdims = 1>(turned{view}, zero)"
        for view, image in enumerate(("base", "left"))
    )
    return graph_text(
        f"""
        policy (float[2,3,8,8] base, float[2,3,8,8] left) => (float[1,{2 * PATCHES},{WIDTH}] prefix)
          <int64[3] to_rows = {{2, {WIDTH}, {PATCHES}}}, int64[1] zero = {{0}}> {{
          {body}
          prefix = Concat<axis = 1>(seen0, seen1)
        }}""",
        weights(),
    )


@case("batch_views", "Cameras of two sizes: their images are no batch.")
def batch_views__two_sizes() -> onnx.ModelProto:
    return graph_text(
        f"""
        policy (float[1,3,8,8] base, float[1,3,16,4] left) => (float[1,{2 * PATCHES},{WIDTH}] prefix) <{SHAPES}> {{
          {towers(("base", "left"))}
          prefix = Concat<axis = 1>(seen0, seen1)
        }}""",
        weights(),
    )


@case("batch_views", "Two towers that share the patch embedding alone: most of their weights differ.")
def batch_views__own_weights() -> onnx.ModelProto:
    body = (
        "".join(
            tower(view, image).replace(
                f"key{view} = ", f"own{view} = MatMul(normed{view}, {weight})\n          key{view} = "
            )
            for view, (image, weight) in enumerate((("base", "w_base"), ("left", "w_left")))
        )
        .replace("(normed0)", "(own0)")
        .replace("(normed1)", "(own1)")
    )
    return graph_text(
        f"""
        policy (float[1,3,8,8] base, float[1,3,8,8] left) => (float[1,{2 * PATCHES},{WIDTH}] prefix) <{SHAPES}> {{
          {body}
          prefix = Concat<axis = 1>(seen0, seen1)
        }}""",
        weights("w_base", "w_left"),
    )
