"""drop_dead_prefix: rows, carried values and masks that no output needs."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from pi05c.graph.edit import remove_dead
from pi05c.graph.io import scopes
from pi05c.graph.sort import sort_graph
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.dead_outputs import drop_dead_outputs
from pi05c.passes.patterns.attention import find_attention
from pi05c.passes.patterns.known import Known
from pi05c.passes.patterns.liveness import Liveness
from pi05c.passes.patterns.masked_keys import Mask, find_mask
from pi05c.passes.patterns.walk import output_ids
from pi05c.passes.shrink import Shrinker


@graph_pass(exact=True, after=("specialize", "canonicalize"), min_opset=13)
def drop_dead_prefix(graph: gs.Graph, ctx: PassContext) -> None:
    """Leave out rows, carried values and masks that no output needs.

    A row that nobody reads is not computed: what the last prefix layer does after its keys and values, and positions
    that a Slice or Gather drops. The Slice moves up through linears, norms, RoPE and attention's query rows to the
    first tensor of which other readers need more.

    Where a mask leaves out a key in every run, with a probability of exactly 0 in every row, the key's row goes from
    the attention of each layer, up to the camera tower's batch and the lookup of tokens: absent cameras and padding,
    once `specialize` has fixed them. A row that a mask leaves out in some runs stays; in those it may hold other
    values than before, which nothing reads. A mask that lets everything through goes.

    So do values that a Loop or Scan carries or collects, and outputs of If, that nothing needs.
    """
    while True:
        dropped = drop_dead_outputs(graph)
        sort_graph(graph)
        remove_dead(graph)
        live = Liveness(graph)
        dropped += Shrinker(graph, ctx, live).run()
        sort_graph(graph)
        remove_dead(graph)
        if not dropped:
            break
        ctx.changed(*dropped)
    for name, reason in live.skips.items():
        ctx.skip(name, reason)
    for name in _drop_open_masks(graph, ctx):
        ctx.changed(name)
    if not ctx.changes and not ctx.skips:
        ctx.skip("graph", "all that it computes is needed")


def _drop_open_masks(graph: gs.Graph, ctx: PassContext) -> Iterator[str]:
    """Take out masks that are known to let everything through; the name of each one's node, once it is out."""
    known, returned = Known(graph), output_ids(graph)
    editors = {id(scope): ctx.editor(scope) for scope in scopes(graph)}
    for attention in find_attention(graph)[0]:
        mask = find_mask(attention, known)
        if not isinstance(mask, Mask) or not mask.lets_all_through:
            continue
        logits, masked = mask.node.inputs[mask.logits], mask.node.outputs[0]
        shape = None if logits.shape is None else list(logits.shape)
        keeps_shape = shape is not None and None not in shape and shape == list(masked.shape or ())
        if keeps_shape and id(masked) not in returned:
            editors[id(attention.scope)].replace_uses(masked, logits)
            yield mask.node.name
