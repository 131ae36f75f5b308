"""specialize: cameras and prompt length that are fixed at compile time."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import BOOL, to_numpy
from pi05c.graph.edit import producer
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.specialization import FixedInput, fixed_inputs, record_fixed
from pi05c.graph.weights import InMemory
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.walk import static_shape


@graph_pass(exact=True, min_opset=10)
def specialize(
    graph: gs.Graph,
    ctx: PassContext,
    *,
    views: tuple[int, ...] = (),
    prompt: int = 0,
    masks: bool = False,
    image_mask: str = "image_masks",
    prompt_mask: str = "token_masks",
) -> None:
    """Fix which cameras are present and how many text tokens a prompt can have.

    `views=1,1,0`: the third of three cameras is absent. `prompt=64`: of the text tokens, only the first 64 are ever
    valid. `masks=true`: all cameras that are present and all text tokens up to `prompt` are valid in every
    observation. The masks of cameras [B, V] and text tokens [B, L] are the inputs that `image_mask` and `prompt_mask`
    name. What is fixed of them becomes constant, and an input that is fixed as a whole leaves the graph. In the same
    pipeline `drop_dead_prefix` then takes absent cameras and padding out of the graph; images and tokens keep their
    shape as inputs. Not part of a preset: put it first, `specialize{views=1,1,0,prompt=64},default`. The contract is
    recorded, and an observation that does not fit it is refused.
    """
    wanted = planned(
        graph,
        ctx.metadata,
        views=views,
        prompt=prompt,
        masks=masks,
        image_mask=image_mask,
        prompt_mask=prompt_mask,
    )
    if not wanted:
        ctx.skip("graph", "nothing is fixed: name cameras, prompt or masks with an option of specialize")
    for fixed in wanted:
        if fixed in fixed_inputs(ctx.metadata):
            ctx.skip(fixed.name, "it is fixed already")
            continue
        tensor = next(tensor for tensor in graph.inputs if tensor.name == fixed.name)
        if fixed.is_whole:
            graph.inputs = [other for other in graph.inputs if other is not tensor]
            tensor.to_constant(InMemory(fixed.array))
        else:
            _pad(graph, ctx, tensor, fixed)
        record_fixed(ctx.metadata, [fixed])
        ctx.changed(fixed.name)


def planned(
    graph: gs.Graph,
    metadata: dict[str, str],
    *,
    views: tuple[int, ...] = (),
    prompt: int = 0,
    masks: bool = False,
    image_mask: str = "image_masks",
    prompt_mask: str = "token_masks",
) -> list[FixedInput]:
    """What the pass fixes in a graph, which stays as it is; see `specialize` for the options.

    Raises:
        Pi05cError: the graph has no such mask, or the mask is no bool[B, n].
        UsageError: an option that does not fit the mask's shape, or differs from what was fixed before.
    """
    known = {fixed.name: fixed for fixed in fixed_inputs(metadata)}
    found = []
    if views or masks:
        batch, count = _shape(graph, known, image_mask, "image_mask", "cameras")
        present = views or (1,) * count
        if len(present) != count or not set(present) <= {0, 1} or not any(present):
            raise UsageError(
                f"option views={','.join(map(str, views))} of pass specialize must hold {count} numbers, 1 for a camera "
                f"that is present and 0 for one that is not, as {image_mask!r} has {count} cameras, and at least one 1"
            )
        found.append(FixedInput(image_mask, (batch, count), tuple(map(bool, present)) * batch))
    if prompt or masks:
        batch, count = _shape(graph, known, prompt_mask, "prompt_mask", "text tokens")
        length = prompt or count
        if not 1 <= length <= count:
            raise UsageError(
                f"option prompt={prompt} of pass specialize must be between 1 and {count}, the number of text tokens in "
                f"{prompt_mask!r}"
            )
        row = (True if masks else None,) * length + (False,) * (count - length)
        found.append(FixedInput(prompt_mask, (batch, count), row * batch))
    for fixed in found:
        if known.get(fixed.name, fixed) != fixed:
            raise UsageError(
                f"the graph was specialized before, with other values of {fixed.name!r}: compile the plain graph"
            )
    return [fixed for fixed in found if any(value is not None for value in fixed.values)]


def _shape(
    graph: gs.Graph, known: dict[str, FixedInput], name: str, option: str, what: str
) -> tuple[int, int]:
    """Batch and number of elements of a mask."""
    tensor = next((tensor for tensor in graph.inputs if tensor.name == name), None)
    shape = known[name].shape if name in known else None if tensor is None else static_shape(tensor)
    if tensor is None and shape is None:
        inputs = ", ".join(tensor.name for tensor in graph.inputs)
        raise Pi05cError(
            f"pass specialize needs the mask of the {what}, and the graph has no input {name!r} (its inputs are "
            f"{inputs}): name it with the option {option}=NAME"
        )
    if shape is None or len(shape) != 2 or (tensor is not None and to_numpy(tensor.dtype) != BOOL):
        raise Pi05cError(
            f"input {name!r} is no mask of type bool and static shape [batch, {what}], as pass specialize needs: name "
            f"the mask with the option {option}=NAME"
        )
    return shape[0], shape[1]


def _pad(graph: gs.Graph, ctx: PassContext, tensor: gs.Variable, fixed: FixedInput) -> None:
    """Let every reader see the fixed end of a mask, whatever is fed there."""
    batch, count = fixed.shape
    length = fixed.values.index(False)
    editor = ctx.editor(graph)
    bounds = [
        editor.constant(f"{tensor.name}.{name}", np.array([value], np.int64))
        for name, value in (("start", 0), ("end", length), ("axis", 1))
    ]
    given = editor.add("Slice", [tensor, *bounds], f"{tensor.name}.given", dtype=BOOL, shape=[batch, length])
    padding = editor.constant(f"{tensor.name}.padding", np.zeros((batch, count - length), np.bool_))
    padded = editor.add(
        "Concat", [given, padding], f"{tensor.name}.padded", dtype=BOOL, shape=fixed.shape, attrs={"axis": 1}
    )
    slice_node = producer(given)
    assert slice_node is not None
    editor.replace_uses(tensor, padded)
    slice_node.inputs[0] = tensor
