"""fold_scales: constant factors go into the weights beside them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import BFLOAT16, FLOAT32, is_float, to_numpy
from pi05c.graph.edit import Editor, remove_dead, replace_input
from pi05c.graph.io import scopes
from pi05c.graph.runner import Array
from pi05c.graph.weights import Scaled, Weight, weight_of
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.factor import Factor, Site, Span, find_factors
from pi05c.passes.patterns.flow import FlowStep, find_flow, velocity_linear
from pi05c.passes.patterns.linear import readers_of, weight_obstacle
from pi05c.passes.patterns.walk import constant, output_ids

MIB = 2**20

_Key = tuple[int, int, Span, bytes]
"""What tells the changes to a weight: its `id`, the axis as it is stored, the part of it, and the value."""

_Groups = dict[_Key, list[tuple[Factor, Site]]]

_Refusal = tuple[gs.Node, str]


@graph_pass(exact=True, after=("canonicalize", "fuse_denoise_loop", "fuse_projections"))
def fold_scales(
    graph: gs.Graph, ctx: PassContext, *, max_scale_ratio: float = 16.0, max_growth: float = 16.0
) -> None:
    """Multiply weights by the constant factors that stand beside them: 1/sqrt(head_dim), dt, layer scales.

    1/sqrt(head_dim) of attention goes back through RoPE, which is linear, into the columns and the bias that make
    Q, also of a joined q/k/v; sqrt(width) into the embedding table; dt of x += dt * v into the weight and bias
    that make v; any other number or vector of channels into the linear in front of it, or those behind. A weight
    is scaled once for all steps that share it, and only if all of its readers ask for the same. Left alone is what
    computes in another type than float32, where the product would be rounded anew, and dt of a single step, which
    nothing else tells from a residual connection.

    A power of two is exact: a bfloat16 weight stays bfloat16. Any other product is kept in float32, which lowering
    the precision later undoes (the 27 q/k/v of SigLIP, whose scale is 72^-0.5, take 205 MiB more until then), but
    not where it would add more than `max_growth` MiB to one weight: the embedding of pi0.5 would grow by 1004 MiB
    to save the scaling of 200 rows. One scale serves a weight that is quantized later, so channels of one weight
    are scaled apart by `max_scale_ratio` at most. E4M3 keeps its relative precision over 15 binades: at a ratio of
    16 the error of normally distributed weights does not change, for weights of Student's t with three degrees of
    freedom (largest 160 sigma) it does from 64 on.
    """
    editors = {id(scope): ctx.editor(scope) for scope in scopes(graph)}
    while True:
        factors, refused = _plan(graph, max_scale_ratio, max_growth * MIB)
        if not factors:
            break
        for together in _rewrites(factors):
            _fold(together, editors)
            ctx.changed(*(factor.node for factor in together))
        remove_dead(graph)  # a factor that stood behind a folded one now stands beside the weight
    for node, reason in refused:
        ctx.skip(node, reason)
    if not ctx.changes and not refused:
        ctx.skip("graph", "no constant factor in it stands beside a weight")


def _plan(graph: gs.Graph, max_ratio: float, max_bytes: float) -> tuple[list[Factor], list[_Refusal]]:
    """The factors to fold, one change to a weight at a time, and those to leave, one for each weight."""
    factors, fixed = find_factors(graph)
    refused = {id(entry.weight or entry.node): (entry.node, entry.reason) for entry in fixed}
    outputs = output_ids(graph)
    flow = {id(step.scaled): step for step in find_flow(graph) if step.scaled is not None}
    steps = Counter(id(linear.weight) for step in flow.values() if (linear := velocity_linear(step)))
    kept = []
    changes: dict[int, _Key] = {}
    for factor in _agreeing(factors, refused):
        reason = _flow_obstacle(factor, flow.get(id(factor.node)), graph, steps)
        for site in factor.sites:
            reason = reason or _obstacle(factor, site, outputs, max_ratio, max_bytes)
        if reason:
            refused.setdefault(id(factor.sites[0].weight), (factor.node, reason))
            continue
        keys = {id(site.weight): _key(factor, site) for site in factor.sites}
        if all(changes.get(weight, key) == key for weight, key in keys.items()):
            changes |= keys
            kept.append(factor)
    return _agreeing(kept, refused), list(refused.values())


def _agreeing(factors: list[Factor], refused: dict[int, _Refusal]) -> list[Factor]:
    """The factors that all readers of their weights ask for."""
    while True:
        partial = {
            key: entries
            for key, entries in _by_key(factors).items()
            if len(readers_of(entries[0][1].weight)) != len(entries)
        }
        if not partial:
            return factors
        for (factor, site), *_ in partial.values():
            reason = f"the readers of the weight {site.weight.name!r} do not all ask for it"
            refused.setdefault(id(site.weight), (factor.node, reason))
        factors = [
            factor for factor in factors if not any(_key(factor, site) in partial for site in factor.sites)
        ]


def _by_key(factors: list[Factor]) -> _Groups:
    groups: _Groups = defaultdict(list)
    for factor in factors:
        for site in factor.sites:
            groups[_key(factor, site)].append((factor, site))
    return groups


def _key(factor: Factor, site: Site) -> _Key:
    axis = 0 if factor.value.ndim == 0 and site.span == Span() else _stored_axis(site)
    return id(site.weight), axis, site.span, factor.value.tobytes()


def _flow_obstacle(factor: Factor, step: FlowStep | None, graph: gs.Graph, steps: Counter[int]) -> str:
    """Why dt must stay: the finder of the flow would not know the step without it."""
    if step is None:
        return ""
    linear = velocity_linear(step)
    if linear is None or linear.node is not factor.sites[0].node:
        return "it is dt, and no linear makes the velocity"
    if step.scope is graph and steps[id(linear.weight)] < 2:
        return "it is dt of a single step"
    return ""


def _obstacle(factor: Factor, site: Site, outputs: set[int], max_ratio: float, max_bytes: float) -> str:
    """Why a weight cannot take a factor, empty where nothing speaks against it."""
    node, weight, path = site.node, site.weight, site.path
    if node.op == "Gemm":
        return f"{node.name!r} is a Gemm"
    if reason := weight_obstacle(weight, path, outputs):
        return reason
    computed = [factor.node.outputs[0], *(bias.node.outputs[0] for bias in site.biases)]
    computed += [node.outputs[0]] if site.linear else []
    casts = [above.outputs[0] for above in path if above.op == "Cast"]
    casts += [bias.node.inputs[bias.index] for bias in site.biases]
    if any(to_numpy(tensor.dtype) != FLOAT32 for tensor in (*computed, *casts)) or not is_float(weight.dtype):
        return "it computes in another type than float32"
    values = weight_of(weight)
    multipliers = _scaled_already(values, _stored_axis(site)) * _along(
        factor.value, site.span, weight.shape[_stored_axis(site)]
    )
    ratio = float(np.abs(multipliers).max() / np.abs(multipliers).min())
    if ratio > max_ratio:
        return f"it would scale the channels of one weight {ratio:.3g}-fold apart, more than {max_ratio:g}"
    growth = math.prod(values.shape) * _dtype(factor, site).itemsize - values.nbytes
    if growth > max_bytes:
        return f"the weight {weight.name!r} would be stored in float32, {growth / MIB:.0f} MiB more"
    return ""


def _dtype(factor: Factor, site: Site) -> np.dtype[np.generic]:
    """The type that holds a scaled weight: its own where the factor is a power of two and bfloat16 takes it."""
    exact = (np.frexp(np.abs(factor.value))[0] == 0.5).all()
    return BFLOAT16 if exact and to_numpy(site.weight.dtype) == BFLOAT16 else FLOAT32


def _stored_axis(site: Site) -> int:
    return 1 - site.axis if site.linear is not None and site.linear.transposed else site.axis


def _along(value: Array, span: Span, size: int) -> Array:
    """The multipliers along an axis of `size`, float64: `value` within the span, 1 elsewhere."""
    multipliers = np.ones(size)
    multipliers[span.start : span.stop] = value
    return multipliers


def _scaled_already(weight: Weight, axis: int) -> Array:
    """By what the channels of a weight along an axis have been multiplied since it was stored."""
    multipliers: Array = np.ones(())
    while isinstance(weight, Scaled):
        if weight.factor.size == weight.factor.shape[axis]:
            multipliers = multipliers * weight.factor.reshape(-1)
        weight = weight.base
    return multipliers


def _rewrites(factors: list[Factor]) -> list[list[Factor]]:
    """Factors that can only be folded together: they change a weight in the same way, for its several readers."""
    groups = _by_key(factors)
    found: list[list[Factor]] = []
    seen: set[int] = set()
    for first in factors:
        together, stack = list[Factor](), [first]
        while stack:
            factor = stack.pop()
            if id(factor) not in seen:
                seen.add(id(factor))
                together.append(factor)
                stack += [other for site in factor.sites for other, _ in groups[_key(factor, site)][::-1]]
        if together:
            found.append(together)
    return found


def _fold(together: list[Factor], editors: dict[int, Editor]) -> None:
    biases: dict[object, gs.Constant] = {}
    for entries in _by_key(together).values():
        _scale_weight(*entries[0])
        for factor, site in entries:
            _read_scaled(site)
            _scale_biases(factor, site, editors[id(site.scope)], biases)
    for factor in together:
        editor = editors[id(factor.scope)]
        editor.replace_uses(factor.node.outputs[0], factor.node.inputs[factor.index])


def _scale_weight(factor: Factor, site: Site) -> None:
    """Scale a weight as it is stored, for all of its readers."""
    axis = _stored_axis(site)
    multipliers = _along(factor.value, site.span, site.weight.shape[axis])
    shape = [-1, 1] if axis == 0 else [1, -1]
    site.weight._values = Scaled(weight_of(site.weight), multipliers.reshape(shape), _dtype(factor, site))


def _read_scaled(site: Site) -> None:
    """Drop the casts behind a weight, or behind the rows gathered from it, that its new type makes needless."""
    dtype = site.weight.dtype
    tensors: list[gs.Tensor] = [site.weight, *(above.outputs[0] for above in site.path)]
    if site.linear is None and not any(above.op == "Cast" for above in site.path):
        tensors.append(site.node.outputs[0])
    for tensor in tensors[1:] if to_numpy(dtype) == FLOAT32 else ():
        tensor.dtype = FLOAT32
    for tensor in tensors:
        for cast in [user for user in tensor.outputs if user.op == "Cast"]:
            if to_numpy(cast.attrs["to"]) == to_numpy(tensor.dtype):
                for reader in list(cast.outputs[0].outputs):
                    replace_input(reader, cast.outputs[0], tensor)


def _scale_biases(factor: Factor, site: Site, editor: Editor, known: dict[object, gs.Constant]) -> None:
    """Give each bias its scaled copy, in float32; steps that share a bias share the copy."""
    for bias in site.biases:
        stored = constant(bias.node.inputs[bias.index])
        assert stored is not None
        key = (id(stored), bias.span, id(editor))
        if key not in known:
            multipliers = _along(factor.value, bias.span, stored.shape[-1])
            known[key] = editor.constant(stored.name, Scaled(weight_of(stored), multipliers, FLOAT32))
        bias.node.inputs[bias.index] = known[key]
