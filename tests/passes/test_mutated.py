"""Exact passes keep the numbers of golden cases in which something was changed."""

from __future__ import annotations

import random

import numpy as np
import onnx
from every_case import CASES, GoldenCase
from hypothesis import given
from hypothesis import strategies as st
from mutations import Mutant
from pass_graphs import Array, editable, outputs_of, relative_error, seeded_inputs
from random_graphs import examples

from pi05c.graph.check import problems, refuse_invalid
from pi05c.graph.errors import Pi05cError
from pi05c.passes import PRESETS, REGISTRY
from pi05c.passes.pipeline import parse, run

EXACT = [c for c in CASES if REGISTRY[c.graph_pass].exact and c.graph_pass != "specialize"]

INVALID = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    RuntimeError,
    ValueError,
    Pi05cError,
)


@examples(300)
@given(st.randoms(use_true_random=False))
def test_exact_passes_keep_numbers(rng: random.Random) -> None:
    case = rng.choice(EXACT)
    mutant = Mutant(case.model(), rng)
    try:
        changed = [mutant.mutate() for _ in range(rng.randint(1, 3))]
        onnx.checker.check_model(mutant.proto)
        onnx.shape_inference.infer_shapes(mutant.proto, check_type=True, strict_mode=True)
        inputs = _inputs(case, mutant.proto)
        expected = outputs_of(mutant.proto, inputs)
        known = set(refuse_invalid(editable(mutant.proto)))
    except INVALID:
        return  # no valid graph came out
    if not all(np.isfinite(values.astype(np.float64)).all() for values in expected.values()):
        return
    options = ",".join(f"{key}={value}" for key, value in case.options.items())
    alone = f"{case.graph_pass}{{{options}}}" if options else case.graph_pass
    for passes in (alone, f"canonicalize,{alone}", "exact"):
        model = editable(mutant.proto)
        run(model, parse(passes, PRESETS))
        where = f"{passes} of {case.graph_pass}/{case.name}: {changed}"
        assert known.issuperset(problems(model)), where
        assert relative_error(outputs_of(model, inputs), expected) <= max(case.limit, 2e-5), where


def _inputs(case: GoldenCase, proto: onnx.ModelProto) -> dict[str, Array]:
    """Of the sizes of the case where the changed graph leaves them open."""
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in case.build().graph.input}
    inputs = seeded_inputs(proto, 5)
    for value in proto.graph.input:
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if 0 in dims and value.name in sizes:
            shape = [now or before for now, before in zip(dims, sizes[value.name], strict=True)]
            inputs[value.name] = np.resize(inputs[value.name], shape)
    return inputs
