"""fold_norms: what a norm multiplies and adds goes into the linears that read it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import FLOAT32, to_numpy
from pi05c.graph.edit import Editor, replace_input
from pi05c.graph.io import scopes
from pi05c.graph.runner import Array
from pi05c.graph.weights import Projected, Scaled, Transposed, weight_of
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.linear import (
    Bias,
    Linear,
    bias_of,
    find_linears,
    linears_reading,
    readers_of,
    weight_obstacle,
)
from pi05c.passes.patterns.norm import Norm, PerChannel, find_norms
from pi05c.passes.patterns.walk import output_ids, stored_vector


@dataclass(frozen=True)
class _Fold:
    """What can go from a norm into the linears that are its only readers.

    Attributes:
        gain: the norm's weight, float32 [channels]; None where there is nothing to fold.
        shift: its bias, float32 [channels]; None where there is nothing to fold.
        biases: of the linears, one each where `shift` is given.
    """

    norm: Norm
    linears: tuple[Linear, ...]
    gain: Array | None
    shift: Array | None
    biases: tuple[Bias, ...]

    def factor(self, linear: Linear) -> tuple[bytes, bool]:
        """What the linear's weight is multiplied by, and along which axis, as a key."""
        return (b"" if self.gain is None else self.gain.tobytes(), linear.transposed)


@graph_pass(exact=True, after=("canonicalize", "fuse_denoise_loop"))
def fold_norms(graph: gs.Graph, ctx: PassContext) -> None:
    """Multiply a norm's weight into the linears that read it, and add its bias to theirs.

    (u * g + s) @ W + b becomes u @ (g W) + (s @ W + b), where u is what the norm divided and g its weight: of an
    RMSNorm or LayerNorm as stored, of Gemma 1 + w, of adaRMS the 1 + scale of a step. Every reader of the norm has to
    be a linear in float32, also behind operators that move whole rows. Weights are read only when they are written.
    A product of bfloat16 numbers is none, so they are stored in float32, twice the bytes, where no later pass lowers
    or quantizes them.

    s goes only where each of the linears adds a bias already: a new addition would cost what the old one did. Where s
    stays, so does g. A weight is multiplied once for all norms of the same g that it follows, as those of unrolled
    steps; it stays where anything reads it that needs it as it is. Hence 1 + scale, which differs from step to step,
    stays a product: a weight for each step would cost more to read than it saves. The gate of a residual branch stays
    for the same reason. LayerNormalization and RMSNormalization must have a weight: ones are left to them.
    """
    folds = _without_conflicts(_folds(graph, ctx), ctx)
    editors = {id(scope): ctx.editor(scope) for scope in scopes(graph)}
    shifted: dict[object, gs.Constant] = {}
    scaled: set[int] = set()
    ones: dict[object, gs.Constant] = {}
    for group in _sharing_weights(folds):
        for fold in group:
            if fold.shift is not None:
                _fold_shift(fold, editors[id(fold.norm.scope)], shifted)
        for fold in group:
            if fold.gain is not None:
                _fold_gain(fold, editors[id(fold.norm.scope)], scaled, ones)
        ctx.changed(*(fold.norm.name for fold in group))


def _sharing_weights(folds: list[_Fold]) -> list[list[_Fold]]:
    """The folds that change something, those together that change one weight: none is right before all are."""
    group_of: dict[int, list[_Fold]] = {}
    for fold in folds:
        if fold.gain is None and fold.shift is None:
            continue
        weights = [id(linear.weight) for linear in fold.linears]
        group: list[_Fold] = []
        for other in {id(found): found for key in weights if (found := group_of.get(key))}.values():
            group += other
        group.append(fold)
        group_of |= dict.fromkeys(
            [*weights, *(id(x.weight) for other in group for x in other.linears)], group
        )
    return list({id(group): group for group in group_of.values()}.values())


def _folds(graph: gs.Graph, ctx: PassContext) -> list[_Fold]:
    outputs = output_ids(graph)
    linears = {id(linear.node): linear for linear in find_linears(graph)}
    found = []
    reported: set[tuple[int, ...]] = set()
    for norm in find_norms(graph):
        read, reason = linears_reading(norm.output, linears, outputs)
        fold = _Fold(norm, tuple(read), _changing(norm.weight, 1), _changing(norm.bias, 0), ())
        if not (_stands(norm.weight, fold.gain) or _stands(norm.bias, fold.shift)):
            continue
        reason = reason or _obstacle(fold, outputs)
        if not reason:
            fold, reason = _possible(fold, outputs)
            found.append(fold)
        key = tuple(id(linear.weight) for linear in read)
        if reason and not (key and key in reported):
            reported.add(key)  # one step stands for all that share their weights
            ctx.skip(norm.name, reason)
    if not found and not reported:
        ctx.skip("graph", "no norm in it has a weight or a bias")
    return found


def _changing(part: PerChannel | None, neutral: int) -> Array | None:
    """The values of a part, None where it has none or all are neutral."""
    values = None if part is None else part.values
    return None if values is None or (values == neutral).all() else values


def _stands(part: PerChannel | None, values: Array | None) -> bool:
    """Whether a norm computes a part at run time."""
    return part is not None and (values is not None or part.stored is None)


def _obstacle(fold: _Fold, outputs: set[int]) -> str:
    """Why nothing of a norm can be folded, empty where nothing speaks against it."""
    norm = fold.norm
    if norm.rounds:
        return "it rounds to another type than float32"
    for part in (norm.weight, norm.bias):
        if part is not None and list(norm.input.shape or ()) != list(part.node.outputs[0].shape or ()):
            return "its shape is not that of its input"
        if part is not None and id(part.node.outputs[0]) in outputs:
            return f"{part.node.outputs[0].name!r} is an output of the graph"
    for linear in fold.linears:
        types = [tensor.dtype for tensor in (linear.node.outputs[0], linear.node.inputs[1])]
        if linear.node.op != "MatMul":
            return f"{linear.node.name!r} is a Gemm"
        if reason := weight_obstacle(linear.weight, linear.path, outputs):
            return reason
        types += [node.outputs[0].dtype for node in linear.path if node.op == "Cast"]
        if any(to_numpy(dtype) != FLOAT32 for dtype in types):
            return f"{linear.node.name!r} computes in another type than float32"
    return ""


def _possible(fold: _Fold, outputs: set[int]) -> tuple[_Fold, str]:
    """The fold without what has nowhere to go, and why that stays."""
    norm, biases, reason = fold.norm, [], ""
    if _stands(norm.bias, fold.shift):
        if fold.shift is None:
            reason = "what it adds is not a stored vector"
        for linear in fold.linears:
            bias = None if id(linear.node.outputs[0]) in outputs else bias_of(linear)
            if bias is None or stored_vector(bias.node.inputs[bias.index], linear.columns) is None:
                reason = reason or f"{linear.node.name!r} has no bias of its own that could take the norm's"
            else:
                biases.append(bias)
        if reason:
            return replace(fold, gain=None, shift=None), reason
    if _stands(norm.weight, fold.gain) and fold.gain is None:
        reason = "what it multiplies by is not a stored vector"
    return replace(fold, biases=tuple(biases)), reason


def _without_conflicts(folds: list[_Fold], ctx: PassContext) -> list[_Fold]:
    """Drop the gain where a weight has a reader that does not follow a norm with the same one."""
    reported: set[int] = set()
    while True:
        factors: dict[int, list[tuple[bytes, bool]]] = defaultdict(list)
        for fold in folds:
            for linear in fold.linears:
                factors[id(linear.weight)].append(fold.factor(linear))
        kept = []
        for fold in folds:
            shared = next((x.weight for x in fold.linears if _conflict(x, factors[id(x.weight)])), None)
            if fold.gain is not None and shared is not None:
                fold = replace(fold, gain=None)
                if id(shared) not in reported:
                    reported.add(id(shared))
                    ctx.skip(
                        fold.norm.name, f"the weight {shared.name!r} has a reader that needs it as it is"
                    )
            kept.append(fold)
        if all(new is old for new, old in zip(kept, folds, strict=True)):
            return folds
        folds = kept


def _conflict(linear: Linear, factors: list[tuple[bytes, bool]]) -> bool:
    return len(set(factors)) > 1 or len(factors) != len(readers_of(linear.weight))


def _fold_shift(fold: _Fold, editor: Editor, known: dict[object, gs.Constant]) -> None:
    """Add what the norm adds to the biases of its linears; a new bias serves all steps that have the same."""
    norm, shift = fold.norm, fold.shift
    assert norm.bias is not None
    assert shift is not None
    for linear, bias in zip(fold.linears, fold.biases, strict=True):
        key = (id(linear.weight), linear.transposed, id(bias.stored), shift.tobytes(), id(linear.scope))
        if key not in known:
            weight = weight_of(linear.weight)
            as_read = Transposed(weight, [1, 0]) if linear.transposed else weight
            moved = Projected(as_read, shift, weight_of(bias.stored))
            known[key] = editor.constant(bias.stored.name, moved)
        bias.node.inputs[bias.index] = known[key]
    if norm.bias.node.op == "Add":
        _bypass(norm.bias)
    else:
        norm.bias.node.inputs.pop(norm.bias.index)


def _fold_gain(fold: _Fold, editor: Editor, scaled: set[int], ones: dict[object, gs.Constant]) -> None:
    """Multiply the weights of a norm's linears by the norm's, each once however many steps share it."""
    norm, gain = fold.norm, fold.gain
    assert norm.weight is not None
    assert gain is not None
    for linear in fold.linears:
        if id(linear.weight) not in scaled:
            scaled.add(id(linear.weight))
            factor = gain[None, :] if linear.transposed else gain[:, None]
            linear.weight._values = Scaled(weight_of(linear.weight), factor, FLOAT32)
        for node in linear.path:
            node.outputs[0].dtype = FLOAT32
            if node.op == "Cast":
                for reader in list(node.outputs[0].outputs):
                    replace_input(reader, node.outputs[0], node.inputs[0])
    if norm.weight.node.op == "Mul":
        _bypass(norm.weight)
        return
    key = (id(norm.scope), gain.size)
    if key not in ones:
        ones[key] = editor.constant(f"{norm.name}.ones", np.ones(gain.size, np.float32))
    norm.weight.node.inputs[norm.weight.index] = ones[key]


def _bypass(part: PerChannel) -> None:
    """Let the readers of a Mul or Add read what it multiplies or adds to."""
    for reader in list(part.node.outputs[0].outputs):
        replace_input(reader, part.node.outputs[0], part.node.inputs[1 - part.index])
