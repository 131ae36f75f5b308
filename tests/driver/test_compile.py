"""From a graph to an engine folder: what is written, what is refused, and what a failure leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_policy import (
    BUILDS,
    CRASHES,
    FAILS,
    ROWS,
    SAMPLES,
    WIDTH,
    policy,
    pretend_installed,
    use_worker,
    wrecking_pass,
    write_policy,
    write_samples,
)

import pi05c
from pi05c.backend.onnxruntime import load_runner
from pi05c.backend.targets import Flavour
from pi05c.folder import FAILED_BUILD, GRAPH, MANIFEST, PLAN, REPORT, SCRIPT
from pi05c.folder import SAMPLES as SAMPLES_FILE
from pi05c.graph.errors import BuildError, Pi05cError, UsageError, VerificationError
from pi05c.manifest import read_manifest
from pi05c.passes.pipeline import named
from pi05c.progress import Progress

__all__ = ["policy", "wrecking_pass"]

FOLDER = [PLAN, GRAPH, f"{GRAPH}.data", MANIFEST, REPORT, SAMPLES_FILE]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "engine"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def compiled(model: Path, output: Path, **options: Any) -> Path:
    """An engine folder without a plan."""
    return pi05c.compile(model, output, **{"backend": "onnxruntime", "passes": "none", **options}).folder


def test_the_folder_holds_what_the_manifest_says(
    policy: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_worker(monkeypatch, tmp_path, BUILDS)
    progress = Progress()
    manifest = pi05c.compile(policy, output, passes="exact", target="sm89,sm120", progress=progress).manifest
    assert manifest == read_manifest(output)
    assert names(output) == set(FOLDER)
    assert set(manifest.files) == set(FOLDER) - {MANIFEST}
    assert names(output.parent) == {"engine"}

    assert manifest.pipeline.requested == "exact"
    assert [record.name for record in manifest.pipeline.passes] == named(manifest.pipeline.resolved)
    assert manifest.engine.targets == ["sm89", "sm120"]
    assert manifest.engine.flavour == "tensorrt-rtx"
    assert manifest.engine.version == "9.9"
    assert manifest.engine.file == PLAN

    (x,), (actions,) = manifest.inputs, manifest.outputs
    assert (x.name, x.dtype, x.shape) == ("x", "float32", [1, ROWS, WIDTH])
    held_back = np.load(policy.with_name("model.calibration.npz"))["x"][SAMPLES - 1 :]
    assert (x.low, x.high) == (float(held_back.min()), float(held_back.max()))
    assert actions.low is not None

    verification = manifest.verification
    assert verification is not None
    assert verification.passed
    assert verification.limit == 1e-5
    assert verification.worst().relative_l2 < 1e-6
    assert [stage.title for stage in progress.stages][-1] == "publish"


def test_the_samples_are_the_held_back_inputs_with_the_actions_of_the_plain_graph(
    policy: Path, output: Path
) -> None:
    compiled(policy, output, passes="exact")
    kept = np.load(output / SAMPLES_FILE)
    given = np.load(policy.with_name("model.calibration.npz"))["x"]
    np.testing.assert_array_equal(kept["x"], given[-1])
    np.testing.assert_array_equal(kept["actions"], load_runner(policy).run({"x": given[-1]})["actions"])


def test_the_rewritten_graph_names_its_pipeline_and_the_source_is_hashed(policy: Path, output: Path) -> None:
    manifest = read_manifest(compiled(policy, output, passes="canonicalize"))
    properties = onnx.load(output / GRAPH, load_external_data=False).metadata_props
    assert {entry.key: entry.value for entry in properties}["pi05c.pipeline"] == "canonicalize"
    data = policy.with_name("model.onnx.data")
    raw = bytearray(data.read_bytes())
    raw[0] ^= 1
    data.write_bytes(raw)
    changed = read_manifest(compiled(policy, output, passes="canonicalize", max_error=1.0))
    assert changed.source.sha256 != manifest.source.sha256


def test_metadata_of_the_policy_goes_into_the_manifest(tmp_path: Path, output: Path) -> None:
    write_samples(tmp_path / "model.calibration.npz", synthetic=True)
    model = write_policy(
        tmp_path / "model.onnx",
        metadata={
            "pi05c.robot": json.dumps({"cameras": ["base", "wrist"]}),
            "pi05c.weights": "random",
            "owner": "lab",
        },
    )
    source = read_manifest(compiled(model, output)).source
    assert source.robot == {"cameras": ["base", "wrist"]}
    assert source.weights_random is True
    assert source.metadata["owner"] == "lab"


def test_made_up_samples_are_announced(tmp_path: Path, output: Path) -> None:
    write_samples(tmp_path / "model.calibration.npz", synthetic=True)
    model = write_policy(tmp_path / "model.onnx")
    with pytest.raises(Pi05cError, match="made-up data"):
        compiled(model, output)
    progress = Progress()
    compiled(model, output, calibration=["synthetic"], progress=progress)
    assert any("made-up samples" in warning for warning in progress.warnings)


def test_without_samples_nothing_is_verified_and_that_is_said(tmp_path: Path, output: Path) -> None:
    progress = Progress()
    manifest = read_manifest(compiled(write_policy(tmp_path / "model.onnx"), output, progress=progress))
    assert manifest.verification is None
    assert any("nothing was verified" in warning for warning in progress.warnings)


def test_a_pass_that_needs_ranges_and_gets_none_is_refused(tmp_path: Path, output: Path) -> None:
    model = write_policy(tmp_path / "model.onnx")
    with pytest.raises(Pi05cError, match="needs the ranges of"):
        compiled(model, output, passes="canonicalize,lower_precision,quantize_linears")
    assert not output.parent.exists()


def test_calibration_is_recorded_where_a_pass_used_it(policy: Path, output: Path, tmp_path: Path) -> None:
    assert read_manifest(compiled(policy, output)).calibration is None
    manifest = read_manifest(compiled(policy, output, passes="fp16", cache=tmp_path / "cache"))
    assert manifest.calibration is not None
    assert manifest.calibration.used == SAMPLES - 1
    assert manifest.calibration.held_back == 1
    assert not manifest.calibration.synthetic


def test_a_float32_graph_is_never_taken_for_a_narrower_one(
    policy: Path, output: Path, tmp_path: Path
) -> None:
    def linears(passes: str) -> set[str]:
        manifest = read_manifest(compiled(policy, output, passes=passes, cache=tmp_path / "cache"))
        return {record.dtype for record in manifest.precision if record.kind == "linear"}

    assert linears("exact") == {"float32"}
    assert linears("fp16") == {"float16"}
    assert linears("default") == {"float8e4m3fn"}


def test_the_limit_follows_the_narrowest_type(policy: Path, output: Path, tmp_path: Path) -> None:
    def limit(passes: str) -> float:
        manifest = read_manifest(compiled(policy, output, passes=passes, cache=tmp_path / "cache"))
        assert manifest.verification is not None
        return manifest.verification.limit

    assert limit("exact") < limit("fp16") < limit("default")


def test_a_result_beyond_its_limit_is_kept_beside_the_old_engine(
    policy: Path, output: Path, wrecking_pass: str
) -> None:
    compiled(policy, output)
    before = content(output)
    with pytest.raises(VerificationError, match="beyond the limit of 1e-05") as caught:
        compiled(policy, output, passes=wrecking_pass)
    assert content(output) == before
    kept = output.with_name("engine.rejected")
    assert str(kept) in str(caught.value)
    manifest = read_manifest(kept)
    assert manifest.verification is not None
    assert not manifest.verification.passed
    assert manifest.verification.worst().relative_l2 > 0.1
    assert names(output.parent) == {"engine", "engine.rejected"}
    with pytest.raises(Pi05cError, match="failed verification"):
        pi05c.build(kept)


def test_a_rejected_result_does_not_overwrite_what_is_not_pi05cs(
    policy: Path, output: Path, wrecking_pass: str
) -> None:
    kept = output.with_name("engine.rejected")
    kept.mkdir(parents=True)
    (kept / "notes.txt").write_text("mine")
    with pytest.raises(VerificationError, match="is not kept"):
        compiled(policy, output, passes=wrecking_pass)
    assert names(kept) == {"notes.txt"}


def test_a_larger_limit_accepts_the_same_result(policy: Path, output: Path, wrecking_pass: str) -> None:
    manifest = read_manifest(compiled(policy, output, passes=wrecking_pass, max_error=10.0))
    assert manifest.verification is not None
    assert manifest.verification.limit == 10.0


@pytest.mark.parametrize(("body", "said"), [(FAILS, "no kernel for node project"), (CRASHES, "crashed")])
def test_a_failed_build_leaves_the_old_engine_and_a_way_to_repeat_it(
    policy: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    use_worker(monkeypatch, tmp_path, BUILDS)
    pi05c.compile(policy, output, passes="none", target="sm120")
    before = content(output)
    use_worker(monkeypatch, tmp_path, body)
    with pytest.raises(BuildError, match=said) as caught:
        pi05c.compile(policy, output, passes="none", target="sm120")
    assert content(output) == before
    kept = output.with_name("engine.failed")
    assert names(output.parent) == {"engine", "engine.failed"}
    assert str(kept / FAILED_BUILD / "reproduce.sh") in str(caught.value)
    assert ".partial-" not in str(caught.value)
    request = json.loads((kept / FAILED_BUILD / "request.json").read_text())
    assert (kept / FAILED_BUILD / request["model"]).resolve() == (kept / GRAPH).resolve()
    assert read_manifest(kept).engine.reason == "the builder failed"


def test_what_was_kept_of_a_failed_build_can_be_built_once_the_builder_works(
    policy: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_worker(monkeypatch, tmp_path, FAILS)
    with pytest.raises(BuildError):
        pi05c.compile(policy, output, passes="none", target="sm120")
    use_worker(monkeypatch, tmp_path, BUILDS)
    kept = output.with_name("engine.failed")
    manifest = pi05c.build(kept)
    assert manifest == read_manifest(kept)
    assert manifest.engine.file == PLAN
    assert manifest.engine.reason is None
    assert FAILED_BUILD not in names(kept)


def test_a_target_that_cannot_be_built_here_gets_a_script(
    policy: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch, Flavour.TENSORRT_RTX)
    manifest = pi05c.compile(policy, output, passes="none", target="thor").manifest
    assert names(output) == {*FOLDER, SCRIPT} - {PLAN}
    assert manifest.engine.targets == ["sm110"]
    assert manifest.engine.flavour == "tensorrt"
    assert manifest.engine.file is None
    script = (output / SCRIPT).read_text()
    assert "trtexec" in script
    assert (output / SCRIPT).stat().st_mode & 0o100


def test_where_no_builder_is_installed_a_named_target_still_gets_its_folder(
    policy: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch)
    pi05c.compile(policy, output, passes="none", target="h100")
    assert SCRIPT in names(output)
    with pytest.raises(BuildError, match="is installed"):
        pi05c.compile(policy, output, passes="none")
    with pytest.raises(BuildError, match=r"TensorRT is not installed.*run this on the device"):
        pi05c.build(output)


@pytest.mark.parametrize("passes", ["nvfp4", "default,quantize_linears{nvfp4=*gate*}"])
def test_fp4_is_refused_where_the_target_has_none(policy: Path, output: Path, passes: str) -> None:
    with pytest.raises(Pi05cError, match="has no FP4 tensor cores"):
        pi05c.compile(policy, output, passes=passes, target="sm89")
    assert not output.parent.exists()


@pytest.mark.parametrize(
    "passes",
    [
        "nvfp4",
        pytest.param(
            "nvfp4,quantize_linears{llm=nvfp4,two_terms=*layers.0.*,rounding=compensated}",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_nvfp4_builds_and_is_measured(brief_model: Path, output: Path, tmp_path: Path, passes: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building needs the extra [rtx]")
    cache = tmp_path / "cache"
    manifest = pi05c.compile(brief_model, output, passes=passes, target="sm120", cache=cache).manifest
    kinds = {(record.part, record.kind, record.dtype) for record in manifest.precision}
    assert ("prefix", "linear", "float4e2m1") in kinds
    assert ("denoise", "linear", "float8e4m3fn") in kinds
    assert manifest.engine is not None
    assert manifest.verification is not None
    assert 0.01 < manifest.verification.worst().relative_l2 < manifest.verification.limit


@pytest.mark.parametrize("target", ["sm86", "orin", "sm89,sm80"])
@pytest.mark.parametrize("installed", [(), (Flavour.TENSORRT_RTX,)])
def test_formats_that_a_target_lacks_are_refused_before_anything_is_written(
    policy: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    installed: tuple[Flavour, ...],
) -> None:
    pretend_installed(monkeypatch, *installed)
    with pytest.raises(Pi05cError, match="has no FP8 tensor cores"):
        pi05c.compile(policy, output, passes="default", target=target)
    assert not output.parent.exists()


def test_a_stored_type_that_a_target_lacks_is_refused(
    policy: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_worker(monkeypatch, tmp_path, BUILDS)
    options = {"target": "sm75", "cache": tmp_path / "cache", "max_error": 1.0}
    with pytest.raises(
        Pi05cError, match=r"has no BF16 tensor cores; it has FP16, INT8: choose another --target$"
    ):
        pi05c.compile(
            policy, output, passes="canonicalize,fuse_denoise_loop,lower_precision{to=bfloat16}", **options
        )
    assert not output.parent.exists()
    assert pi05c.compile(policy, output, passes="fp16", **options).manifest.engine.targets == ["sm75"]


def test_the_default_target_without_a_gpu_is_said(
    policy: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_worker(monkeypatch, tmp_path, BUILDS)
    said: list[str] = []

    class Listening(Progress):
        def note(self, sentence: str) -> None:
            said.append(sentence)

    manifest = pi05c.compile(policy, output, passes="none", progress=Listening()).manifest
    assert manifest.engine.targets == ["sm120"]
    assert any("no --target and no GPU here: building for sm120" in sentence for sentence in said)


@pytest.mark.parametrize("wrong", ["type", "scale"])
def test_an_invalid_graph_is_blamed_on_its_file_and_on_no_pass(
    tmp_path: Path, output: Path, wrong: str
) -> None:
    text = {
        "type": "g (float[2] x, float16[2] z) => (float[2] y) { y = Add(x, z) }",
        "scale": "g (float[2] x) => (int8[2] y) <float s = {0}, int8 p = {0}> { y = QuantizeLinear(x, s, p) }",
    }[wrong]
    model = tmp_path / "wrong.onnx"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}'), model)
    with pytest.raises(
        Pi05cError, match=r"wrong\.onnx is not valid ONNX: |is not positive|contradict"
    ) as error:
        pi05c.compile(model, output, passes="exact", target="sm120")
    assert "\n" not in str(error.value)
    assert not output.exists()


def test_a_dynamic_input_needs_a_profile(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pi05c.building import parse_profile

    use_worker(monkeypatch, tmp_path, BUILDS)
    write_samples(tmp_path / "model.calibration.npz")
    model = write_policy(tmp_path / "model.onnx", batch="batch")
    with pytest.raises(UsageError, match="give --shapes x=MIN:OPT:MAX"):
        pi05c.compile(model, output, passes="none", target="sm120")
    with pytest.raises(UsageError, match="'y', which is no input"):
        pi05c.compile(
            model, output, passes="none", target="sm120", profiles=(parse_profile("y=1x8x32:1x8x32:1x8x32"),)
        )
    profile = parse_profile("x=1x8x32:2x8x32:4x8x32")
    manifest = pi05c.compile(model, output, passes="none", target="sm120", profiles=(profile,)).manifest
    assert manifest.inputs[0].shape == ["batch", ROWS, WIDTH]
    assert manifest.engine.options["shapes"] == {"x": [[1, ROWS, WIDTH], [2, ROWS, WIDTH], [4, ROWS, WIDTH]]}
    assert pi05c.build(output).engine.options == manifest.engine.options


def test_a_prompt_longer_than_what_the_graph_holds_is_refused_before_anything_runs(
    tmp_path: Path, output: Path
) -> None:
    """Of a length that is baked into the graph the builder says only that something is not conformable."""
    from pi05c.building import parse_profile

    text = """<ir_version: 10, opset_import: ["": 21]>
        g (float[1,L,4] tokens) => (float[1,L,4] y) { y = Add(tokens, positions) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.node[0].name = "embed"
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(np.zeros((1, 200, 4), np.float32), "positions")
    )
    model = tmp_path / "prompt.onnx"
    onnx.save(proto, model)
    profile = parse_profile("tokens=1x208x4:1x208x4:1x208x4")
    with pytest.raises(
        UsageError, match=r"'embed' gets 'tokens' \[1, 208, 4\] and 'positions' \[1, 200, 4\]"
    ):
        pi05c.compile(model, output, passes="none", target="sm120", profiles=(profile,))
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 200
    onnx.save(proto, model)
    with pytest.raises(UsageError, match=r"\[1, 208, 4\] do not fit input tokens: float32\[1,200,4\]"):
        pi05c.compile(model, output, passes="none", target="sm120", profiles=(profile,))
    assert not output.exists()


@pytest.mark.parametrize("text", ["x", "x=1x2", "x=1:2", "x=a:b:c", "=1:1:1", "x=1:2:3:4"])
def test_a_malformed_profile(text: str) -> None:
    from pi05c.building import parse_profile

    with pytest.raises(UsageError, match="is malformed"):
        parse_profile(text)


def test_a_folder_or_a_missing_file_is_no_model(tmp_path: Path, output: Path) -> None:
    with pytest.raises(Pi05cError, match="is a folder, but an ONNX file is compiled"):
        compiled(tmp_path, output)
    with pytest.raises(Pi05cError, match="there is no file"):
        compiled(tmp_path / "model.onnx", output)


def test_the_model_and_its_samples_are_never_replaced(policy: Path) -> None:
    for place in (policy.parent, policy.parent.parent):
        with pytest.raises(Pi05cError, match="would replace its own input"):
            compiled(policy, place)
    assert policy.is_file()


def test_compiling_twice_writes_the_same_graph(policy: Path, output: Path, tmp_path: Path) -> None:
    first = content(compiled(policy, output, passes="fp16", cache=tmp_path / "cache"))
    second = content(compiled(policy, output, passes="fp16", cache=tmp_path / "cache"))
    assert first[GRAPH] == second[GRAPH]
    assert first[f"{GRAPH}.data"] == second[f"{GRAPH}.data"]


def test_a_build_that_fails_in_place_leaves_the_old_plan(
    policy: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_worker(monkeypatch, tmp_path, BUILDS)
    pi05c.compile(policy, output, passes="none", target="sm120")
    before = content(output)
    use_worker(monkeypatch, tmp_path, FAILS)
    with pytest.raises(BuildError):
        pi05c.build(output)
    assert FAILED_BUILD in names(output)
    assert before == {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def test_build_for_another_target(
    policy: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_worker(monkeypatch, tmp_path, BUILDS)
    pi05c.compile(policy, output, passes="default", target="sm120", cache=tmp_path / "cache")
    assert pi05c.build(output, target="sm89").engine.targets == ["sm89"]
    before = content(output)
    with pytest.raises(Pi05cError, match="has no FP8 tensor cores"):
        pi05c.build(output, target="sm86")
    with pytest.raises(Pi05cError, match="run this on the device"):
        pi05c.build(output, target="thor")
    with pytest.raises(UsageError, match="makes no plan"):
        pi05c.build(output, backend="onnxruntime")
    assert content(output) == before


def test_tensorrt_rtx_builds_for_two_targets_without_a_gpu(
    policy: Path, output: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building needs the extra [rtx]")
    manifest = pi05c.compile(
        policy,
        output,
        passes="default",
        target="sm89,sm120",
        backend="tensorrt-rtx",
        cache=tmp_path / "cache",
    ).manifest
    assert manifest.engine.targets == ["sm89", "sm120"]
    assert manifest.files[PLAN].bytes == (output / PLAN).stat().st_size > 0


@pytest.mark.parametrize(("passes", "limit"), [("exact", 1e-5), ("fp16", 0.002), ("default", 0.06)])
def test_the_small_reference_policy(
    tiny_model: Path, output: Path, tmp_path: Path, passes: str, limit: float
) -> None:
    manifest = read_manifest(compiled(tiny_model, output, passes=passes, cache=tmp_path / "cache"))
    assert manifest.verification is not None
    assert manifest.verification.worst().relative_l2 <= limit
    assert len(manifest.verification.errors) == 2
    assert manifest.source.weights_random is False
    assert manifest.source.robot is not None


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"strip_weights": True}, "needs a GPU"),
        ({"timing_cache": Path("kernels.cache")}, "timing cache"),
        ({"hardware_compatible": True}, "hardware compatibility"),
    ],
)
def test_builder_options_are_refused_before_the_model_is_read(
    option: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pi05c.backend.tensorrt.compute_capabilities", lambda: ())
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UsageError, match=said):
        pi05c.compile(
            tmp_path / "absent.onnx", tmp_path / "engine", target="sm120", backend="tensorrt-rtx", **option
        )
