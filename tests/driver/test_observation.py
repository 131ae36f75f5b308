"""What verification measures inside the graphs, against the same tensors fetched from graphs run apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Command
from onnx import helper, numpy_helper

from pi05c.backend.onnxruntime import load_runner
from pi05c.folder import GRAPH, REPORT, SAMPLES
from pi05c.graph.runner import Array
from pi05c.manifest import Manifest, VerificationRecord, read_manifest

STEPS = 10
STEP = 3


def held_back(folder: Path) -> list[dict[str, Array]]:
    with np.load(folder / SAMPLES) as file:
        arrays = {name: file[name] for name in file.files if np.ndim(file[name])}
    return [dict(zip(arrays, values, strict=True)) for values in zip(*arrays.values(), strict=True)]


def run(path: Path, samples: list[dict[str, Array]], wanted: str, steps: int | None = None) -> list[Array]:
    """A float32 tensor of the outermost graph at `path`, of each sample; of a loop that ends after `steps`."""

    def edit(proto: onnx.ModelProto) -> None:
        if wanted not in {output.name for output in proto.graph.output}:
            proto.graph.output.append(helper.make_tensor_value_info(wanted, onnx.TensorProto.FLOAT, None))
        if steps is not None:
            (loop,) = (node for node in proto.graph.node if node.op_type == "Loop")
            proto.graph.initializer.append(numpy_helper.from_array(np.array(steps), "trips"))
            loop.input[0] = "trips"

    runner = load_runner(path, edit=edit)
    names = [spec.name for spec in runner.inputs]
    return [runner.run({name: sample[name] for name in names})[wanted] for sample in samples]


def result_of(path: Path, node: str) -> str:
    """The tensor that a node of the outermost graph makes."""
    graph = onnx.load_model(path, load_external_data=False).graph
    return next(str(found.output[0]) for found in graph.node if found.name == node)


def worst(reference: list[Array], result: list[Array]) -> float:
    pairs = zip(reference, result, strict=True)
    return max(float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in pairs)


def verified(manifest: Manifest) -> VerificationRecord:
    assert manifest.verification is not None
    return manifest.verification


def test_drift_and_layers_are_those_of_the_tensors_fetched(
    tiny_model: Path, tmp_path: Path, pi05c: Command
) -> None:
    folder = tmp_path / "engine"
    assert pi05c(tiny_model, "--backend", "onnxruntime", "-o", folder, "-q").status == 0
    found, samples = verified(read_manifest(folder)), held_back(folder)
    assert [drift.step for drift in found.drift] == list(range(STEPS))

    drift = found.drift[STEP]
    plain = run(tiny_model, samples, "actions", STEP + 1)
    rewritten = run(folder / GRAPH, samples, result_of(folder / GRAPH, drift.x_node))
    assert drift.x == pytest.approx(worst(plain, rewritten), rel=1e-3)
    before = run(tiny_model, samples, "actions", STEP)
    earlier = run(folder / GRAPH, samples, result_of(folder / GRAPH, found.drift[STEP - 1].x_node))
    moved = [after - x for after, x in zip(plain, before, strict=True)]
    moves = [after - x for after, x in zip(rewritten, earlier, strict=True)]
    assert drift.v == pytest.approx(worst(moved, moves), rel=1e-2)
    assert found.drift[-1].x == pytest.approx(found.worst().relative_l2, rel=1e-5)

    layer = next(each for each in found.layers if (each.part, each.layer, each.half) == ("vision", 1, "MLP"))
    node = "vision.encoder.layers.1.Add_1"
    plain = run(tiny_model, samples, result_of(tiny_model, node))
    rewritten = run(folder / GRAPH, samples, result_of(folder / GRAPH, layer.node))
    rewritten = [b.reshape(a.shape) for a, b in zip(plain, rewritten, strict=True)]
    assert layer.relative_l2 == pytest.approx(worst(plain, rewritten), rel=1e-3)

    page = (folder / REPORT).read_text(encoding="utf-8")
    for title in (
        "Precision map",
        "Error by denoising step",
        "Where the error arises",
        "Ranges and saturation",
    ):
        assert f"<h2>{title}</h2>" in page


def test_parts_are_measured_like_the_whole(tiny_model: Path, tmp_path: Path, pi05c: Command) -> None:
    places = []
    for options in ((), ("--split", "vision,prefix,step")):
        folder = tmp_path / f"engine{len(places)}"
        assert (
            pi05c(
                tiny_model, *options, "--passes", "exact", "--backend", "onnxruntime", "-o", folder, "-q"
            ).status
            == 0
        )
        found = verified(read_manifest(folder))
        assert [drift.step for drift in found.drift] == list(range(STEPS))
        assert found.drift[-1].x == pytest.approx(found.worst().relative_l2, rel=1e-3)
        assert all(layer.relative_l2 < 1e-4 for layer in found.layers)
        places.append({(layer.part, layer.layer, layer.step, layer.half) for layer in found.layers})
    assert places[0] == places[1]
    assert {part for part, *_ in places[0]} == {"vision", "prefix", "denoise"}


def test_exit_3_names_the_step_and_the_layer(tiny_model: Path, tmp_path: Path, pi05c: Command) -> None:
    options = ("--passes", "fp16", "--max-error", "1e-6", "--backend", "onnxruntime")
    result = pi05c(tiny_model, *options, "-o", tmp_path / "engine", "-q")
    assert result.status == 3
    assert "x departs that far after denoising step 0" in result.err
    assert "the first layer that does is vision, layer 0, behind its attention" in result.err
    assert "'vision.encoder.layers.0.Add'" in result.err


@pytest.mark.slow
def test_layers_are_found_behind_nvfp4(tiny_model: Path, tmp_path: Path, pi05c: Command) -> None:
    folder = tmp_path / "engine"
    options = ("--passes", "nvfp4", "--backend", "onnxruntime")
    assert pi05c(tiny_model, *options, "-o", folder, "-q").status == 0
    manifest = read_manifest(folder)
    types = {(each.layer, each.operator): each.dtype for each in manifest.operators if each.part == "prefix"}
    for name in ("qkv", "out", "gate/up", "down"):
        assert types[0, name] == "float4e2m1"
    assert (None, "linear") not in types
    assert ("prefix", 0) in {(layer.part, layer.layer) for layer in verified(manifest).layers}
