"""The pass `fuse_denoise_loop`."""

from __future__ import annotations

from typing import Literal

import onnx_graphsurgeon as gs

from pi05c.graph.errors import UsageError
from pi05c.graph.scopes import nodes_of
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.loop_edit import drop_unchanged, make_names_unique
from pi05c.passes.patterns.loops import StaticLoop, each_loop, find_static_loop
from pi05c.passes.patterns.step_plan import StepPlan, plan_steps
from pi05c.passes.step_tables import index_tables, is_indexed
from pi05c.passes.unroll import obstacle_to_unrolling, unroll

MOST_NODES = 200_000
"""Nodes that a graph may have once its loops are unrolled, since loops inside loops multiply; pi0.5 has a tenth of it."""

MOST_LOOPS = 256
"""Copies of loops inside loops that may be made: each is looked at on its own, in the whole graph."""

# Unsqueeze takes its axes as an input, and Loop and Scan have the form that is edited here, from opset 13 on.
_OPSET = 13


@graph_pass(exact=True, after=("canonicalize",), min_opset=_OPSET)
def fuse_denoise_loop(
    graph: gs.Graph,
    ctx: PassContext,
    *,
    mode: Literal["unroll", "loop"] = "unroll",
    max_steps: int = 1000,
) -> None:
    """Unroll each Loop or Scan of a known number of steps, and compute at compile time what depends on the step alone.

    The number of steps is a constant trip count, the static size of a scanned axis, or found by running a condition
    that depends on nothing but constants and the step. A loop whose condition or trip count only a run knows, of
    more than `max_steps` steps, or that would make more than 200,000 nodes of the graph or copy more than 256 loops
    inside it, is left alone.

    Values of the body fall into three kinds. What is the same in every step is computed once, in front. What depends
    on constants and the step alone (counters, t, the time embedding and its MLP, the scale, shift and gate of adaRMS)
    is computed now, in the graph's own arithmetic and in the order of its steps, so that t accumulates in float32 as
    the graph says; its weights leave the graph. A value that would take more than 1 MiB for all steps, and more than
    the constants that it comes from, stays computed. The rest varies: `mode=unroll` copies it for each step, named
    `step_0/...`, with weights shared; `mode=loop` keeps the loop, which then reads the others from tables [steps, ...].
    """
    if max_steps < 1:
        raise UsageError(f"option max_steps={max_steps} of pass fuse_denoise_loop must be at least 1")
    any_loop = False
    room, loops_room = MOST_NODES - sum(1 for _ in nodes_of(graph)), MOST_LOOPS
    for scope, node in each_loop(graph):
        any_loop = True
        loop = find_static_loop(graph, scope, node, max_steps)
        if isinstance(loop, str):
            ctx.skip(node, loop)
            continue
        unrolled = mode == "unroll" or loop.steps == 0
        copied, loops = _copied(loop) if unrolled else (0, 0)
        reason = obstacle_to_unrolling(loop) if unrolled else None
        if not reason and copied > room:
            reason = f"its steps would be {copied:,} more nodes, and the graph may have {MOST_NODES:,}"
        if not reason and loops > loops_room:
            reason = f"its steps would be {loops:,} more loops, and {MOST_LOOPS} may be made"
        if reason:
            ctx.skip(node, reason)
            continue
        room, loops_room = room - copied, loops_room - loops
        _fuse(graph, loop, ctx, unrolled=unrolled)
    if not any_loop:
        ctx.note("the graph has no Loop or Scan")


def _copied(loop: StaticLoop) -> tuple[int, int]:
    """How many nodes, and loops among them, unrolling adds at most."""
    nodes = [node.op for node in nodes_of(loop.form.body)]
    copies = max(loop.steps - 1, 0)
    return len(nodes) * copies, sum(op in ("Loop", "Scan") for op in nodes) * copies


def _fuse(graph: gs.Graph, loop: StaticLoop, ctx: PassContext, *, unrolled: bool) -> None:
    form = loop.form
    editor, body_editor = ctx.editor(form.scope), ctx.editor(form.body)
    make_names_unique(graph, form.body, ctx.names)
    if form.unchanged:
        drop_unchanged(form, editor, body_editor)
        again = find_static_loop(graph, form.scope, form.node, loop.steps)
        assert isinstance(again, StaticLoop)
        loop = again
        ctx.changed(form.node)
    plan = plan_steps(graph, loop, stacked=not unrolled)
    if plan.obstacle:
        ctx.note(f"what depends on the step in {form.node.name!r} stays computed: {plan.obstacle}")
    if unrolled:
        unroll(loop, plan, editor)
    elif is_indexed(loop, plan):
        ctx.skip(form.node, "it reads all that depends on the step alone from tables")
        return
    else:
        index_tables(loop, plan, editor, body_editor)
    ctx.changed(form.node)
    ctx.note(_summary(loop, plan, unrolled))


def _summary(loop: StaticLoop, plan: StepPlan, unrolled: bool) -> str:
    size = sum(value.nbytes for _, values in plan.tables.values() for value in values)
    return (
        f"{loop.form.node.op} {loop.form.node.name!r}: {loop.steps} steps"
        f"{' unrolled' if unrolled else ''}, {len(plan.tables)} values a step computed at compile time ({size} bytes)"
    )
