"""A policy as several engines: what is written, how it runs, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_policy import FAILS, pretend_installed, use_worker

from pi05c.backend.onnxruntime import load_runner
from pi05c.backend.targets import Flavour
from pi05c.cli import main
from pi05c.extraction import extract, parse_grouping
from pi05c.graph.runner import Array
from pi05c.manifest import Manifest, read_manifest

LAYERS = 3
"""Of `pi05_tiny`."""

CACHE = {f"prefix_{kind}_{layer}" for layer in range(LAYERS) for kind in ("keys", "values")}
RTX = importlib.util.find_spec("tensorrt_rtx") is not None

Compile = Callable[..., Path]


@pytest.fixture
def compiled(tiny_model: Path, tmp_path: Path) -> Compile:
    """Compiles `pi05_tiny` in parts, without plans unless asked."""

    def run(split: str, *options: str, backend: str | None = "onnxruntime") -> Path:
        output = tmp_path / "engine"
        chosen = [] if backend is None else ["--backend", backend]
        assert main([str(tiny_model), "--split", split, *options, *chosen, "-o", str(output), "-q"]) == 0
        return output

    return run


def types(records: list[Any]) -> dict[str, str]:
    return {record.name: record.dtype for record in records}


def ran(folder: Path, model: Path, *options: str) -> Array:
    """The actions of every sample of `model` by `pi05c run`."""
    output = folder.with_name("outputs.npz")
    inputs = model.with_name("model.calibration.npz")
    assert main(["run", str(folder), "--inputs", str(inputs), "-o", str(output), "-q", *options]) == 0
    with np.load(output) as file:
        return np.asarray(file["actions"])


def relative_error(result: Array, reference: Array) -> float:
    return float(np.linalg.norm(result - reference) / np.linalg.norm(reference))


def worst(manifest: Manifest) -> float:
    assert manifest.verification is not None
    return manifest.verification.worst().relative_l2


@pytest.mark.parametrize("split", ["vision,prefix,denoise", "vision,prefix+denoise", "vision+prefix,step"])
def test_exact_parts_are_the_single_graph_to_float32_rounding(
    tiny_model: Path, compiled: Compile, split: str
) -> None:
    folder = compiled(split, "--passes", "exact")
    manifest = read_manifest(folder)
    assert [part.name for part in manifest.parts] == split.split(",")
    assert worst(manifest) < 1e-5
    assert all(error.relative_l2 < 1e-5 for part in manifest.parts for error in part.errors)
    with np.load(tiny_model.with_name("model.calibration.npz")) as file:
        samples = [dict(zip(file.files, values, strict=True)) for values in zip(*file.values(), strict=True)]
    reference = np.stack([load_runner(tiny_model).run(sample)["actions"] for sample in samples])
    assert relative_error(ran(folder, tiny_model), reference) < 1e-5
    assert main(["verify", str(folder), "-q"]) == 0


def test_a_folder_holds_a_subfolder_a_part_and_its_manifest_says_what_crosses(compiled: Compile) -> None:
    folder = compiled("vision,prefix,denoise", "--passes", "vision=fp16,prefix=exact,denoise=fp16")
    manifest = read_manifest(folder)
    assert {path.name for path in folder.iterdir()} == {
        *("vision", "prefix", "denoise", "manifest.json", "report.html", "samples.npz"),
    }
    assert set(manifest.files) == {
        *("report.html", "samples.npz"),
        *(f"{part.name}/model.onnx" for part in manifest.parts),
        *(f"{part.name}/model.onnx.data" for part in manifest.parts),
    }
    vision, prefix, denoise = manifest.parts
    assert [part.pipeline.requested for part in manifest.parts] == ["fp16", "exact", "fp16"]
    assert {record.dtype for record in vision.precision if record.kind == "linear"} == {"float16"}
    assert {record.dtype for record in prefix.precision} == {"float32"}
    assert set(types(prefix.outputs)) == CACHE | {"prefix_mask"}
    assert {error.output for error in prefix.errors} == CACHE | {"prefix_mask"}
    assert set(types(denoise.inputs)) == CACHE | {"prefix_mask", "noise"}
    assert [record.name for record in manifest.inputs] == [
        *("images", "image_masks", "tokens", "token_masks", "noise"),
    ]
    assert manifest.calibration is not None


def test_each_graph_takes_and_gives_what_the_manifest_says(compiled: Compile) -> None:
    folder = compiled("vision,prefix,step", "--passes", "fp16")
    for part in read_manifest(folder).parts:
        runner = load_runner(folder / part.name / "model.onnx")
        for specs, records in ((runner.inputs, part.inputs), (runner.outputs, part.outputs)):
            assert [(s.name, s.dtype.name, list(s.shape)) for s in specs] == [
                (record.name, record.dtype, record.shape) for record in records
            ]


@pytest.mark.parametrize(
    ("passes", "dtype"), [("fp16", "float16"), ("exact", "float32"), ("exact,step=fp16", "float16")]
)
def test_the_cache_crosses_in_float16_where_that_changes_no_number(
    compiled: Compile, passes: str, dtype: str
) -> None:
    prefix, step = read_manifest(compiled("vision+prefix,step", "--passes", passes)).parts
    for records in (types(prefix.outputs), types(step.inputs)):
        assert {records[name] for name in CACHE} == {dtype}
    assert types(step.outputs) == {"next_x": "float32"}
    assert (prefix.runs, step.runs) == (1, 10)


def test_an_output_of_the_policy_keeps_its_type_though_it_crosses(tiny_model: Path, tmp_path: Path) -> None:
    vision = extract(tiny_model, parse_grouping("vision,prefix,denoise"), 0)
    inner = vision.results["image_features"]
    (features,) = vision.model.graph.outputs
    model = tmp_path / "model.onnx"
    for file in tiny_model.parent.glob("model.*"):
        shutil.copy(file, tmp_path)
    proto = onnx.load(model, load_external_data=False)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(inner, 1, features.shape))
    onnx.save(proto, model)
    folder = tmp_path / "engine"
    arguments = ["--split", "vision,prefix,denoise", "--passes", "fp16", "--backend", "onnxruntime"]
    assert main([str(model), *arguments, "-o", str(folder), "-q"]) == 0
    manifest = read_manifest(folder)
    assert types(manifest.outputs)[inner] == "float32"
    (returned,) = [
        spec for spec in load_runner(folder / "vision" / "model.onnx").outputs if spec.name == inner
    ]
    assert returned.dtype == np.float32


def test_a_part_without_passes_is_recorded_as_such(compiled: Compile) -> None:
    manifest = read_manifest(
        compiled("vision,prefix+denoise", "--passes", "vision=none,prefix+denoise=exact")
    )
    assert manifest.pipeline.resolved.startswith("vision=none,prefix+denoise=canonicalize,")


def test_stages_are_printed_by_part(compiled: Compile, capsys: pytest.CaptureFixture[str]) -> None:
    compiled(
        *("vision,prefix+denoise", "--passes", "vision=none,prefix+denoise=exact"),
        *("--print-after", "canonicalize"),
    )
    assert "# 01-canonicalize of prefix+denoise: " in capsys.readouterr().err


def test_parts_are_calibrated_each_on_what_the_plain_parts_before_them_give(compiled: Compile) -> None:
    manifest = read_manifest(compiled("vision,prefix,step", "--passes", "default"))
    assert {record.dtype for record in manifest.precision} >= {"float8e4m3fn", "float16"}
    assert 0.001 < worst(manifest) < 0.08
    assert manifest.verification is not None
    assert manifest.verification.limit == 0.08
    assert manifest.calibration is not None
    assert (manifest.calibration.used, manifest.calibration.held_back) == (6, 2)


def test_a_step_runs_any_number_of_steps(
    compiled: Compile, reference_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = compiled("vision+prefix,step", "--passes", "exact")
    other = tmp_path / "other" / "model.onnx"
    other.parent.mkdir()
    exported = [*("export", str(reference_dir), "-o", str(other)), "--prompt-length", "24"]
    assert main([*exported, "--steps", "7", "-q"]) == 0
    shutil.copy(tiny_model.with_name("model.calibration.npz"), other.with_name("model.calibration.npz"))
    expected = ran(other, other)
    assert relative_error(ran(folder, tiny_model, "--steps", "7"), expected) < 1e-5
    assert relative_error(ran(folder, tiny_model), expected) > 1e-4


def test_steps_inside_an_engine_cannot_be_chosen(
    compiled: Compile, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = compiled("vision,prefix+denoise", "--passes", "none")
    inputs = ["--inputs", str(tiny_model.with_name("model.calibration.npz"))]
    inputs += ["-o", str(folder.with_name("x.npz"))]
    for path in (folder, tiny_model):
        assert main(["run", str(path), *inputs, "--steps", "5"]) == 2
        assert "vision+prefix,step" in capsys.readouterr().err
    folder = compiled("vision+prefix,step", "--passes", "none")
    assert main(["run", str(folder), *inputs, "--steps", "0"]) == 2
    assert "takes no step" in capsys.readouterr().err


def test_a_part_beyond_the_limit_fails_the_chain(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "engine"
    arguments = [str(tiny_model), "--split", "vision,prefix+denoise", "--passes", "exact,vision=fp16"]
    arguments += ["--backend", "onnxruntime", "-o", str(output), "-q"]
    assert main([*arguments, "--max-error", "1e-6"]) == 3
    assert "beyond the limit of 1e-06" in capsys.readouterr().err
    assert not output.exists()
    kept = read_manifest(output.with_name("engine.rejected"))
    assert [part.engine.reason for part in kept.parts] == ["the graph failed verification"] * 2


def test_inspect_and_the_report_tell_each_part(compiled: Compile, capsys: pytest.CaptureFixture[str]) -> None:
    folder = compiled("vision,prefix+denoise", "--passes", "exact,vision=fp16")
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    for text in ("part vision", "part prefix+denoise", "image_features", "vision/model.onnx:"):
        assert text in shown
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    graphs = [onnx.load(folder / part / "model.onnx") for part in ("vision", "prefix+denoise")]
    assert facts["nodes"] == sum(len(model.graph.node) for model in graphs)
    for command, status, said in (("cost", 0, "vision"), ("diff", 2, "compare them one by one")):
        both = [str(folder)] * (2 if command == "diff" else 1)
        assert main([command, *both]) == status
        captured = capsys.readouterr()
        assert said in captured.out + captured.err
    report = (folder / "report.html").read_text()
    for text in ("Passes of vision", "Passes of prefix+denoise", "Contract of vision", "image_features"):
        assert text in report


@pytest.mark.skipif(not RTX, reason="building plans needs the extra [rtx]")
@pytest.mark.parametrize(
    ("split", "passes"),
    [
        ("vision,prefix,denoise", "default,vision=fp16,denoise=default,fuse_denoise_loop{mode=loop}"),
        ("vision,prefix+denoise", "fp16,prefix+denoise=fp16,fuse_denoise_loop{mode=loop}"),
        ("vision+prefix,step", "default"),
    ],
)
def test_a_plan_is_built_for_every_part(compiled: Compile, split: str, passes: str) -> None:
    folder = compiled(split, "--passes", passes, "--target", "sm120", backend=None)
    manifest = read_manifest(folder)
    for part in manifest.parts:
        assert part.engine.file == f"{part.name}/model.engine"
        assert manifest.files[part.engine.file].bytes == (folder / part.engine.file).stat().st_size > 10_000
    (folder / manifest.parts[0].name / "model.engine").unlink()
    assert main(["build", str(folder), "-q"]) == 0
    assert main(["verify", str(folder), "-q"]) == 0


def test_a_failed_build_leaves_all_parts_and_its_log(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_worker(monkeypatch, tmp_path, FAILS)
    output = tmp_path / "engine"
    arguments = [str(tiny_model), "--split", "vision,prefix+denoise", "--passes", "none", "--target", "sm120"]
    assert main([*arguments, "-o", str(output), "-q"]) == 4
    kept = tmp_path / "engine.failed"
    assert (kept / "vision" / "failed-build").is_dir()
    assert (kept / "prefix+denoise" / "model.onnx").is_file()
    assert "no kernel for node project" in capsys.readouterr().err
    assert main([*arguments, "-o", str(kept), "--backend", "onnxruntime", "-q"]) == 0, (
        "it is pi05c's to replace"
    )


def test_a_script_builds_every_part_on_the_device(
    compiled: Compile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_installed(monkeypatch, Flavour.TENSORRT_RTX)
    folder = compiled("vision,prefix+denoise", "--passes", "none", "--target", "thor", backend=None)
    tool = tmp_path / "trtexec"
    tool.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "[TensorRT v101300]"\n'
        'for word in "$@"; do case "$word" in --saveEngine=*) echo plan > "${word#*=}";; esac; done\n'
        'echo "TensorRT v101300"\n'
    )
    tool.chmod(0o755)
    subprocess.run(
        ["sh", str(folder / "build_engine.sh")],
        check=True,
        env={"PATH": "/usr/bin:/bin", "TRTEXEC": str(tool)},
    )
    for part in ("vision", "prefix+denoise"):
        assert (folder / part / "model.engine").read_text() == "plan\n"
    assert main(["verify", str(folder), "-q"]) == 0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--split", "vision,prefix"], 1, "--split leaves out denoise"),
        (["--split", "denoise,vision"], 2, "out of order"),
        (["--split", "camera,prefix"], 2, "unknown part 'camera'"),
        (["--split", "vision,prefix,denoise", "--passes", "step=fp16"], 2, "names part 'step'"),
        (["--split", "vision,prefix+denoise", "--passes", "vision=fp16,vision=exact"], 2, "twice"),
        (["--split", "vision,prefix+denoise", "--passes", "specialize{views=1,1,0}"], 2, "as a whole"),
        (["--split", "vision,prefix+denoise", "--shapes", "noise=1x2x3:1x2x3:1x2x3"], 2, "--shapes cannot"),
    ],
)
def test_what_cannot_be_split_is_refused_before_anything_is_written(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    message: str,
) -> None:
    output = tmp_path / "engine"
    assert main([str(tiny_model), *options, "--target", "sm120", "-o", str(output)]) == status
    error = capsys.readouterr().err
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_graph_without_vision_is_split_into_what_it_has(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = tmp_path / "rest.onnx"
    assert main(["extract", str(tiny_model), "--part", "prefix+denoise", "-o", str(rest), "-q"]) == 0
    arguments = [
        str(rest),
        "--passes",
        "exact",
        "--backend",
        "onnxruntime",
        "-q",
        "-o",
        str(tmp_path / "engine"),
    ]
    assert main([*arguments, "--split", "vision,prefix,denoise"]) == 1
    assert "has no part vision" in capsys.readouterr().err
    assert main([*arguments, "--split", "prefix,denoise"]) == 0
    assert worst(read_manifest(tmp_path / "engine")) < 1e-5
