"""The pass `fuse_denoise_loop`."""

from __future__ import annotations

from typing import Literal

import onnx_graphsurgeon as gs

from pi05c.graph.errors import UsageError
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.loop_edit import drop_unchanged, make_names_unique
from pi05c.passes.patterns.loops import StaticLoop, each_loop, find_static_loop
from pi05c.passes.patterns.step_plan import StepPlan, plan_steps
from pi05c.passes.step_tables import index_tables, is_indexed
from pi05c.passes.unroll import obstacle_to_unrolling, unroll

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
    that depends on nothing but constants and the step. A loop whose condition or trip count only a run knows, or of
    more than `max_steps` steps, is left alone.

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
    for scope, node in each_loop(graph):
        any_loop = True
        loop = find_static_loop(graph, scope, node, max_steps)
        reason = loop if isinstance(loop, str) else obstacle_to_unrolling(loop)
        if reason or isinstance(loop, str):
            ctx.skip(node, reason or "")
            continue
        _fuse(graph, loop, ctx, unrolled=mode == "unroll" or loop.steps == 0)
    if not any_loop:
        ctx.note("the graph has no Loop or Scan")


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
