"""`pi05c extract`: the graph of a part computes what it computes in the whole, whatever runs before it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from pi05c.backend.onnxruntime import load_runner
from pi05c.cli import main
from pi05c.extraction import StepTable
from pi05c.graph.runner import Array

LAYERS = 3
"""Of `pi05_tiny`."""

CACHE = {f"prefix_{kind}_{layer}" for layer in range(LAYERS) for kind in ("keys", "values")}


def extracted(model: Path, part: str, folder: Path) -> Path:
    output = folder / f"{part}.onnx"
    assert main(["extract", str(model), "--part", part, "-o", str(output), "-q"]) == 0
    return output


def sample(model: Path) -> dict[str, Array]:
    with np.load(model.with_name("model.calibration.npz")) as file:
        return {name: file[name][0] for name in file.files}


def run_part(path: Path, space: dict[str, Array]) -> dict[str, Array]:
    runner = load_runner(path)
    return runner.run({spec.name: space[spec.name] for spec in runner.inputs})


@pytest.mark.parametrize("parts", [("vision", "prefix", "denoise"), ("vision", "prefix+denoise")])
def test_parts_in_a_chain_are_the_whole_bit_by_bit(
    tiny_model: Path, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    space = sample(tiny_model)
    expected = load_runner(tiny_model).run(space)["actions"]
    for part in parts:
        space |= run_part(extracted(tiny_model, part, tmp_path), space)
    np.testing.assert_array_equal(space["actions"], expected)


def test_the_denoising_takes_the_cache_the_mask_and_the_noise(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "denoise.onnx"
    assert main(["extract", str(tiny_model), "--part", "denoise", "-o", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    inputs = {record["name"]: (record["dtype"], record["shape"]) for record in facts["inputs"]}
    assert set(inputs) == CACHE | {"prefix_mask", "noise"}
    assert all(inputs[name] == ("float32", [1, 1, 72, 32]) for name in CACHE)
    assert inputs["prefix_mask"] == ("bool", [1, 72])
    assert [record["name"] for record in facts["outputs"]] == ["actions"]


def test_only_the_weights_of_a_part_are_written(tiny_model: Path, tmp_path: Path) -> None:
    def size(path: Path) -> int:
        return path.with_name(f"{path.name}.data").stat().st_size

    parts = [extracted(tiny_model, part, tmp_path) for part in ("vision", "prefix", "denoise")]
    assert size(tiny_model) <= sum(map(size, parts)) < size(tiny_model) + 10_000
    names = {tensor.name for tensor in onnx.load(parts[0], load_external_data=False).graph.initializer}
    assert not any("gemma_expert" in name or "language_model" in name for name in names)


def test_a_part_compiles_with_the_samples_that_were_written_beside_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    part = extracted(tiny_model, "denoise", tmp_path)
    output = tmp_path / "engine"
    assert main([str(part), "--passes", "fp16", "--backend", "onnxruntime", "-o", str(output), "-q"]) == 0
    errors = json.loads((output / "manifest.json").read_text())["verification"]["errors"]
    assert 0 < max(error["relative_l2"] for error in errors) < 0.005


def test_steps_with_rows_of_the_table_are_the_loop(tiny_model: Path, tmp_path: Path) -> None:
    space = sample(tiny_model)
    expected = load_runner(tiny_model).run(space)["actions"]
    with np.load(extracted(tiny_model, "step", tmp_path).with_name("step.calibration.npz")) as file:
        space |= {name: file[name][0] for name in file.files if name.startswith(("prefix_", "action_"))}
    step = load_runner(tmp_path / "step.onnx")
    x = space["noise"]
    for row in StepTable(tmp_path / "step.table.onnx").rows():
        given = {**space, "x": x, "step_row": row}
        x = step.run({spec.name: given[spec.name] for spec in step.inputs})["next_x"]
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("steps", [1, 5, 7])
def test_the_table_makes_rows_for_any_number_of_steps(tiny_model: Path, tmp_path: Path, steps: int) -> None:
    extracted(tiny_model, "step", tmp_path)
    table = StepTable(tmp_path / "step.table.onnx")
    rows = table.rows(steps)
    assert len(rows) == steps
    np.testing.assert_array_equal(rows[0][:-1], table.rows()[0][:-1])
    assert all(row[-1] == np.float32(-1 / steps) for row in rows)


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("text", 2, "unknown part 'text'"),
        ("denoise+prefix", 2, "out of order"),
        ("vision+denoise", 2, "leaves out a part"),
        ("prefix+step", 2, "cannot be joined"),
        ("vision,prefix", 2, "names several graphs"),
    ],
)
def test_a_part_that_is_none_is_refused(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
    status: int,
    message: str,
) -> None:
    assert main(["extract", str(tiny_model), "--part", part, "-o", str(tmp_path / "x.onnx")]) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("x.*"))


def test_a_part_that_the_model_lacks_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    denoise = extracted(tiny_model, "denoise", tmp_path)
    extracted(denoise, "step", tmp_path)
    assert {spec.name for spec in load_runner(tmp_path / "step.onnx").inputs} == CACHE | {
        *("prefix_mask", "x", "step_row"),
    }, "nobody before it could hand over what follows from the mask"
    for part, message in (("vision", "no part vision"), ("prefix+denoise", "no part prefix")):
        assert main(["extract", str(denoise), "--part", part, "-o", str(tmp_path / "x.onnx")]) == 1
        assert message in capsys.readouterr().err
    vision = extracted(tiny_model, "vision", tmp_path)
    assert main(["extract", str(vision), "--part", "denoise", "-o", str(tmp_path / "x.onnx")]) == 1
    assert "no part denoise" in capsys.readouterr().err


def test_a_graph_without_a_loop_has_no_step(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unrolled = tmp_path / "engine"
    arguments = [str(tiny_model), "--passes", "canonicalize,fuse_denoise_loop", "--backend", "onnxruntime"]
    assert main([*arguments, "-o", str(unrolled), "-q"]) == 0
    status = main(["extract", str(unrolled / "model.onnx"), "--part", "step", "-o", str(tmp_path / "x.onnx")])
    assert status == 1
    assert "no Loop in it accumulates the flow" in capsys.readouterr().err
