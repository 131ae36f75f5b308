"""Fixed cameras and prompts: the contract, and what then leaves the reference model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from pass_graphs import (
    editable,
    fitted,
    graph_text,
    outputs_of,
    relative_error,
    run_pass,
    run_passes,
    text_of,
)

from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.io import Model, load, scopes
from pi05c.graph.specialization import SPECIALIZED_KEY, fixed_inputs

VIEWS, PATCHES, TOKENS = 3, 16, 24
"""Cameras, tokens of each, and text tokens of the reference model."""


def _lengths(model: Model) -> set[int]:
    """Every size of every tensor that a node makes."""
    tensors = [t for scope in scopes(model.graph) for node in scope.nodes for t in node.outputs]
    return {size for tensor in tensors for size in tensor.shape or ()}


def _matmul_flops(model: Model) -> int:
    total = 0
    for scope in scopes(model.graph):
        for node in scope.nodes:
            if node.op == "MatMul":
                total += 2 * math.prod(node.outputs[0].shape) * node.inputs[0].shape[-1]
    return total


def _ops(model: Model) -> list[str]:
    return [node.op for scope in scopes(model.graph) for node in scope.nodes]


def _case(reference_dir: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(reference_dir / f"{name}.inputs.npz"))


@pytest.mark.parametrize(
    ("options", "views", "tokens", "inputs"),
    [
        ("views=1,1,0", 2, TOKENS, ["images", "tokens", "token_masks", "noise"]),
        ("views=1,0,1", 2, TOKENS, ["images", "tokens", "token_masks", "noise"]),
        ("views=0,0,1,prompt=10", 1, 10, ["images", "tokens", "token_masks", "noise"]),
        ("views=1,1,0,prompt=16", 2, 16, ["images", "tokens", "token_masks", "noise"]),
        ("views=1,1,0,prompt=16,masks=true", 2, 16, ["images", "tokens", "noise"]),
        ("prompt=16", 3, 16, ["images", "image_masks", "tokens", "token_masks", "noise"]),
        ("masks=true", 3, TOKENS, ["images", "tokens", "noise"]),
    ],
)
def test_absent_cameras_and_padding_leave_the_graph(
    options: str, views: int, tokens: int, inputs: list[str], tiny_model: Path, reference_dir: Path
) -> None:
    plain, model = load(tiny_model), load(tiny_model)
    before = {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in model.graph.inputs}
    run_passes(model, f"specialize{{{options}}},canonicalize,drop_dead_prefix")

    assert [tensor.name for tensor in model.graph.inputs] == inputs
    assert {t.name: (t.dtype, list(t.shape)) for t in model.graph.inputs} == {n: before[n] for n in inputs}
    prefix = views * PATCHES + tokens
    assert prefix in _lengths(model)
    assert (VIEWS * PATCHES + TOKENS in _lengths(model)) == (prefix == VIEWS * PATCHES + TOKENS)
    conv = next(node for node in model.graph.nodes if node.op == "Conv")
    assert conv.outputs[0].shape[0] == views
    run_passes(plain, "canonicalize")
    fewer = prefix < VIEWS * PATCHES + TOKENS
    assert (_matmul_flops(model) < _matmul_flops(plain)) == fewer
    assert ("Where" in _ops(model)) == ("masks=true" not in options)

    for case in ("three_views", "one_view_masked"):
        sample = fitted(model, _case(reference_dir, case))
        expected = outputs_of(load(tiny_model), sample)
        assert relative_error(outputs_of(model, _only(sample, model)), expected) < 1e-5


def _only(sample: dict[str, np.ndarray], model: Model) -> dict[str, np.ndarray]:
    return {name: sample[name] for name in (tensor.name for tensor in model.graph.inputs)}


@pytest.mark.parametrize("pipeline", ["exact", "none"])
def test_reference_case_with_an_absent_camera(pipeline: str, tiny_model: Path, reference_dir: Path) -> None:
    """The reference's own actions, computed by another implementation, on an observation without a third camera."""
    model = load(tiny_model)
    run_passes(model, f"specialize{{views=1,1,0,prompt=16}},{pipeline}".removesuffix(",none"))
    sample = _only(_case(reference_dir, "one_view_masked"), model)
    expected = {"actions": np.load(reference_dir / "one_view_masked.float32.npz")["actions"]}
    assert relative_error(outputs_of(model, sample), expected) < 1e-5


def test_what_is_fed_for_an_absent_camera_does_not_matter(tiny_model: Path, reference_dir: Path) -> None:
    model = load(tiny_model)
    run_passes(model, "specialize{views=1,1,0,prompt=16},exact")
    sample = _only(_case(reference_dir, "one_view_masked"), model)
    other = {**sample, "images": sample["images"].copy(), "tokens": sample["tokens"].copy()}
    other["images"][:, 2], other["tokens"][:, 16:] = 7.0, 3
    assert relative_error(outputs_of(model, other), outputs_of(model, sample)) == 0


def test_every_prompt_length_up_to_the_limit(tiny_model: Path, reference_dir: Path) -> None:
    model = load(tiny_model)
    run_passes(model, "specialize{views=1,1,0,prompt=6},exact")
    sample = _case(reference_dir, "one_view_masked")
    for length in range(7):
        sample["token_masks"] = np.arange(TOKENS)[None] < length
        expected = outputs_of(load(tiny_model), sample)
        assert relative_error(outputs_of(model, _only(sample, model)), expected) < 1e-5, length


def test_through_the_default_pipeline(tiny_model: Path, reference_dir: Path) -> None:
    model = load(tiny_model)
    sample = _case(reference_dir, "one_view_masked")
    run_passes(model, "specialize{views=1,1,0,prompt=16,masks=false},default", [_only_fixed(sample)])
    expected = {"actions": np.load(reference_dir / "one_view_masked.float32.npz")["actions"]}
    assert relative_error(outputs_of(model, _only(sample, model)), expected) < 0.04
    assert VIEWS * PATCHES + TOKENS not in _lengths(model)


def _only_fixed(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in sample.items() if name != "image_masks"}


def test_two_observations_at_once(reference_dir: Path, tmp_path: Path) -> None:
    """In a batch, padding goes where all masks are known."""
    pytest.importorskip("torch")
    from pi05c.frontend.export import export_model

    path = tmp_path / "batch2.onnx"
    export_model(reference_dir, path, batch=2, prompt_length=TOKENS)
    model = load(path)
    run_passes(model, "specialize{views=1,0,1,prompt=12,masks=true},exact")
    assert 2 * PATCHES + 12 in _lengths(model)
    assert VIEWS * PATCHES + TOKENS not in _lengths(model)
    sample = fitted(model, _case(reference_dir, "batch_ragged"))
    expected = outputs_of(load(path), sample)
    assert relative_error(outputs_of(model, _only(sample, model)), expected) < 1e-5


MASKS = """
    masks (bool[1,3] image_masks, bool[1,4] token_masks, float[1,2] x) => (bool[1,7] valid, float[1,2] y) {
      valid = Concat<axis = 1>(image_masks, token_masks)
      y = Neg(x)
    }"""


def _masks() -> onnx.ModelProto:
    return graph_text(MASKS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"views": "1,1"}, UsageError, "must hold 3 numbers"),
        ({"views": "1,1,2"}, UsageError, "1 for a camera that is present"),
        ({"views": "0,0,0"}, UsageError, "at least one 1"),
        ({"prompt": "5"}, UsageError, "option prompt=5 .* between 1 and 4"),
        ({"prompt": "-1"}, UsageError, "option prompt=-1 .* between 1 and 4"),
        (
            {"views": "1,1,0", "image_mask": "cameras"},
            Pi05cError,
            "no input 'cameras' .* option image_mask=NAME",
        ),
        ({"prompt": "2", "prompt_mask": "text"}, Pi05cError, "no input 'text' .* option prompt_mask=NAME"),
        (
            {"prompt": "1", "prompt_mask": "x"},
            Pi05cError,
            "'x' is no mask of type bool .* option prompt_mask=NAME",
        ),
    ],
)
def test_refusals_change_nothing(options: dict[str, str], error: type[Exception], message: str) -> None:
    model = editable(_masks())
    before = text_of(model)
    with pytest.raises(error, match=message):
        run_pass(model, "specialize", **options)
    assert text_of(model) == before
    assert model.metadata == {}


def test_masks_are_found_by_name() -> None:
    proto = _masks()
    proto.graph.input[0].name = "cameras"
    proto.graph.node[0].input[0] = "cameras"
    model = editable(proto)
    run_pass(model, "specialize", views="1,1,0", image_mask="cameras")
    assert fixed_inputs(model.metadata)[0].name == "cameras"


def test_the_contract_is_in_the_metadata() -> None:
    model = editable(_masks())
    run_pass(model, "specialize", views="1,0,1")
    run_pass(model, "specialize", prompt="3")
    assert json.loads(model.metadata[SPECIALIZED_KEY]) == {
        "image_masks": {"shape": [1, 3], "values": [True, False, True]},
        "token_masks": {"shape": [1, 4], "values": [None, None, None, False]},
    }


def test_specialized_twice() -> None:
    model = editable(_masks())
    run_pass(model, "specialize", views="1,0,1")
    again = run_pass(model, "specialize", views="1,0,1")
    assert again.changes == ()
    assert [skip.reason for skip in again.skips] == ["it is fixed already"]
    with pytest.raises(UsageError, match="specialized before, with other values of 'image_masks'"):
        run_pass(model, "specialize", views="1,1,1")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": 1}', '{"a": {"shape": [2], "values": [true]}}', '{"a": {"shape": [1]}}']
)
def test_damaged_metadata(text: str) -> None:
    with pytest.raises(Pi05cError, match=r"pi05c\.specialized of the model is damaged"):
        fixed_inputs({SPECIALIZED_KEY: text})
