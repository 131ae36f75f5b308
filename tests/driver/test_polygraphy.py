"""pi05c in Polygraphy: the option group of `polygraphy run`, the loader, the runner and the data loader."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Command, Result
from ml_dtypes import bfloat16
from onnx import TensorProto, helper, numpy_helper
from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs, OnnxFromPath, SaveOnnx
from polygraphy.exception import PolygraphyException
from polygraphy.tools import main as polygraphy_main
from small_policy import ROWS, SAMPLES, WIDTH, policy, wrecking_pass, write_policy, write_samples

from pi05c.graph.io import load
from pi05c.polygraphy import ApplyPasses, Pi05cRunner, load_samples
from pi05c.polygraphy import runner as runner_module
from pi05c.samples import Samples

__all__ = ["policy", "wrecking_pass"]

WRONG_PASSES = Path(__file__).with_name("wrong_passes.py")
HELD_BACK = SAMPLES // 4


@pytest.fixture
def polygraphy(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command line of Polygraphy's."""

    def run(*arguments: str | Path) -> Result:
        status = polygraphy_main([str(argument) for argument in arguments])
        return Result(int(status or 0), *capsys.readouterr())

    return run


@pytest.fixture
def own_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that temporary files go to."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def ramp() -> np.ndarray:
    return np.linspace(-1, 1, ROWS * WIDTH, dtype=np.float32).reshape(1, ROWS, WIDTH)


# polygraphy run


def test_plugin_imports_nothing_but_itself() -> None:
    """Every `polygraphy run` imports it."""
    script = (
        "import sys, polygraphy.tools.run.run; before = set(sys.modules); import pi05c.polygraphy.arguments; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pi05c", "pi05c.polygraphy", "pi05c.polygraphy.arguments"]


def test_exact_passes_agree_with_onnxrt(
    polygraphy: Command, pi05c: Command, brief_model: Path, tmp_path: Path
) -> None:
    script = tmp_path / "samples.py"
    assert pi05c("data-loader", brief_model, "-o", script).status == 0
    passes = ("--pi05c", "--pi05c-passes", "fuse_denoise_loop,pin_fp32")
    done = polygraphy(
        "run", brief_model, "--onnxrt", *passes, "--atol", "1e-4", "--data-loader-script", script
    )
    assert done.status == 0, done.out
    assert "pi05c: fuse_denoise_loop: 1 rewrites" in done.out
    assert "Passed: 2/2 iterations" in done.out


def test_wrong_pass_fails_and_its_rewrites_before_do_not(polygraphy: Command, brief_model: Path) -> None:
    command = ("run", brief_model, "--onnxrt", "--pi05c", "--pi05c-passes", "swap_modulation")
    plugin = ("--pi05c-plugin", WRONG_PASSES, "--atol", "1e-4")
    done = polygraphy(*command, *plugin)
    assert done.status != 0
    assert "FAILED | Output: 'actions'" in done.out
    done = polygraphy(*command, *plugin, "--pi05c-rewrite-limit", "swap_modulation=6")
    assert done.status == 0, done.out
    assert "swap_modulation{rewrite_limit=6}: 6 rewrites" in done.out


def test_stop_after_leaves_out_what_follows(polygraphy: Command, policy: Path, wrecking_pass: str) -> None:
    command = ("run", policy, "--onnxrt", "--pi05c", "--pi05c-passes", f"canonicalize,{wrecking_pass}")
    assert polygraphy(*command).status != 0
    assert polygraphy(*command, "--pi05c-stop-after", "canonicalize").status == 0


def test_generated_script_runs_from_another_folder(
    polygraphy: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(policy.parent)
    (policy.parent / "mine.py").write_text(WRONG_PASSES.read_text())
    script = tmp_path / "compare.py"
    options = (
        "--pi05c-passes",
        "quantize_linears,share_scales",
        "--pi05c-calibration",
        "model.calibration.npz",
    )
    command = (
        "run",
        policy.name,
        "--onnxrt",
        "--pi05c",
        *options,
        "--pi05c-plugin",
        "mine.py",
        "--compare",
        "l2",
    )
    assert polygraphy(*command, "--l2-tolerance", "1e9", "--gen-script", script).status == 0
    text = script.read_text()
    assert f"ApplyPasses({str(policy)!r}, passes='quantize_linears,share_scales'" in text
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pi05c: share_scales: 1 rewrites" in done.stdout


def test_without_passes_the_model_runs_by_its_path(polygraphy: Command, policy: Path, tmp_path: Path) -> None:
    script = tmp_path / "compare.py"
    assert polygraphy("run", policy, "--pi05c", "--pi05c-passes", "none", "--gen-script", script).status == 0
    assert f"Pi05cRunner({str(policy)!r})" in script.read_text()


def test_options_of_the_onnx_loader_come_before_the_passes(
    polygraphy: Command, policy: Path, tmp_path: Path
) -> None:
    """The graph goes through memory then; the samples beside its file still serve."""
    script = tmp_path / "compare.py"
    command = (
        "run",
        policy,
        "--onnxrt",
        "--pi05c",
        "--pi05c-passes",
        "quantize_linears",
        "--onnx-outputs",
        "product",
    )
    assert polygraphy(*command, "--gen-script", script).status == 0
    assert (
        f"ApplyPasses(modify_outputs, passes='quantize_linears', path={str(policy)!r})" in script.read_text()
    )
    done = polygraphy(*command, "--atol", "1", "--rtol", "1")
    assert done.status == 0, done.out
    assert "Comparing Output: 'product'" in done.out


def test_runners_one_after_the_other_in_processes_of_their_own(polygraphy: Command, policy: Path) -> None:
    options = ("--pi05c-passes", "canonicalize", "--sequential-runners", "--use-subprocess")
    assert polygraphy("run", policy, "--onnxrt", "--pi05c", *options).status == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--pi05c-passes", "nonsense"), "names 'nonsense', which is neither a pass nor a preset"),
        (("--pi05c-plugin", "nowhere.py"), "there is no plug-in nowhere.py"),
        (("--pi05c-calibration", "nowhere.npz"), "there is no file nowhere.npz"),
        (("--pi05c-rewrite-limit", "dedupe"), "'dedupe' is malformed"),
        (("--pi05c-stop-after", "specialize"), "names 'specialize', which does not run"),
    ],
)
def test_errors_are_one_sentence(
    polygraphy: Command, policy: Path, own_temporary: Path, options: tuple[str, str], sentence: str
) -> None:
    done = polygraphy("run", policy, "--pi05c", *options)
    assert done.status == 1
    (said,) = [line for line in done.err.splitlines() if line.startswith("[!]")]
    assert said.startswith("[!] pi05c: ")
    assert sentence in said
    assert "Traceback" not in done.out + done.err
    assert not list(own_temporary.iterdir())


def test_missing_model_is_one_sentence(polygraphy: Command, tmp_path: Path) -> None:
    done = polygraphy("run", tmp_path / "nowhere.onnx", "--pi05c")
    assert done.status == 1
    assert f"[!] pi05c: there is no file {tmp_path / 'nowhere.onnx'}" in done.err


# ApplyPasses


def test_loader_composes_with_those_of_polygraphy(policy: Path, tmp_path: Path) -> None:
    rewrite = ApplyPasses(OnnxFromPath(str(policy)), passes="canonicalize")
    saved = SaveOnnx(rewrite, str(tmp_path / "saved.onnx"))()
    assert [node.op_type for node in saved.graph.node] == ["MatMul", "Add"]
    assert onnx.load_from_string(BytesFromOnnx(rewrite)()) == saved
    marked = ModifyOutputs(ApplyPasses(str(policy), "canonicalize"), outputs=["product"])()
    assert [value.name for value in marked.graph.output] == ["product"]


def test_loader_gives_the_same_graph_by_path_and_from_memory(brief_model: Path) -> None:
    passes = "canonicalize,fuse_denoise_loop,fold_scales"
    by_path, from_memory = (
        ApplyPasses(brief_model, passes)(),
        ApplyPasses(OnnxFromPath(str(brief_model)), passes)(),
    )
    assert by_path == from_memory
    assert all(tensor.data_location != TensorProto.EXTERNAL for tensor in by_path.graph.initializer)


def test_loader_leaves_the_model_that_it_is_given(policy: Path) -> None:
    given = onnx.load(policy)
    before = given.SerializeToString()
    ApplyPasses(given, "canonicalize")()
    assert given.SerializeToString() == before


def test_model_in_memory_finds_samples_by_its_path(policy: Path) -> None:
    passes = "lower_precision,quantize_linears"
    with pytest.raises(PolygraphyException, match="--calibration"):
        ApplyPasses(onnx.load(policy), passes)()
    rewritten = ApplyPasses(onnx.load(policy), passes, path=policy)()
    assert any(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in rewritten.graph.initializer)


def test_exact_passes_ask_for_no_samples(policy: Path) -> None:
    """Not even for the right to use made-up ones beside a trained model."""
    write_samples(policy.with_name("model.calibration.npz"), synthetic=True)
    ApplyPasses(policy, "canonicalize")()
    with pytest.raises(PolygraphyException, match="made-up"):
        ApplyPasses(policy, "quantize_linears")()


# Pi05cRunner


def test_rewritten_model_is_never_in_memory(
    policy: Path, own_temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pi05c.polygraphy.loader.to_whole_proto", pytest.fail)
    with Pi05cRunner(ApplyPasses(policy, "canonicalize")) as runner:
        (folder,) = own_temporary.iterdir()
        assert (folder / "model.onnx.data").stat().st_size == WIDTH * WIDTH * 4
        outputs = runner.infer({"x": ramp()})
        assert runner.last_inference_time() > 0
    assert not list(own_temporary.iterdir())
    with Pi05cRunner(str(policy)) as plain:
        np.testing.assert_allclose(
            outputs["actions"], plain.infer({"x": ramp()})["actions"], rtol=1e-5, atol=1e-5
        )


def test_runner_takes_what_a_loader_gives(policy: Path, own_temporary: Path) -> None:
    expected = None
    for model in (policy, onnx.load(policy), OnnxFromPath(str(policy)), lambda: str(policy)):
        with Pi05cRunner(model) as runner:
            actions = runner.infer({"x": ramp()})["actions"]
        expected = actions if expected is None else expected
        np.testing.assert_array_equal(actions, expected)
    assert not list(own_temporary.iterdir())


def test_failed_start_leaves_nothing(
    policy: Path, own_temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        raise runner_module.Pi05cError(f"{path.name} cannot be loaded")

    monkeypatch.setattr(runner_module, "OnnxRuntimeRunner", fails)
    runner = Pi05cRunner(ApplyPasses(policy, "canonicalize"))
    with pytest.raises(PolygraphyException, match="cannot be loaded"):
        runner.activate()
    assert not runner.is_active
    assert not list(own_temporary.iterdir())


def test_outputs_that_numpy_lacks_are_float32(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.array([1, 1 / 3], bfloat16), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
            helper.make_node("Mul", ["narrow", "w"], ["y"]),
        ],
        "narrow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "narrow.onnx")
    with Pi05cRunner(tmp_path / "narrow.onnx") as runner:
        outputs = runner.infer({"x": np.array([3, 3], np.float32)})
    assert outputs["y"].dtype == np.float32
    third = np.float32(bfloat16(1 / 3))
    np.testing.assert_array_equal(outputs["y"], [3, np.float32(bfloat16(3 * third))])


def test_torch_in_torch_out(policy: Path) -> None:
    torch = pytest.importorskip("torch")
    with Pi05cRunner(policy) as runner:
        outputs = runner.infer({"x": torch.from_numpy(ramp())})
        expected = runner.infer({"x": ramp()})
    assert isinstance(outputs["actions"], torch.Tensor)
    np.testing.assert_array_equal(outputs["actions"].numpy(), expected["actions"])


def test_what_passes_fixed_is_taken_and_checked(brief_model: Path) -> None:
    sample = dict(load_samples(brief_model)[0])
    with Pi05cRunner(ApplyPasses(brief_model, "specialize{views=1,1,0}")) as runner:
        metadata = runner.get_input_metadata(use_numpy_dtypes=False)
        assert list(metadata["image_masks"].shape) == [1, 3]
        sample["image_masks"] = np.array([[True, True, False]])
        actions = runner.infer(sample)["actions"]
        with pytest.raises(PolygraphyException, match="specialized for False"):
            runner.infer({**sample, "image_masks": np.array([[True, True, True]])})
    with Pi05cRunner(brief_model) as plain:
        np.testing.assert_allclose(actions, plain.infer(sample)["actions"], rtol=1e-3, atol=1e-4)


# Samples


def test_data_loader_gives_what_was_held_back(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    script = tmp_path / "samples.py"
    done = pi05c("data-loader", policy, "-o", script)
    assert (done.status, done.out) == (0, f"{script}: {HELD_BACK} samples of model.calibration.npz\n")
    loaded = _loaded(script)
    x = np.load(policy.with_name("model.calibration.npz"))["x"]
    np.testing.assert_array_equal([sample["x"] for sample in loaded], x[SAMPLES - HELD_BACK :])


def test_data_loader_gives_all_of_other_files(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_samples(Path("more.npz"), count=3, synthetic=True)
    done = pi05c("data-loader", policy, "--calibration", "more.npz", "--all", "-o", "samples.py", "--json")
    assert json.loads(done.out) == {
        "script": "samples.py",
        "samples": 3,
        "source": "more.npz",
        "synthetic": True,
    }
    monkeypatch.chdir(policy.parent)
    assert len(_loaded(tmp_path / "samples.py")) == 3


def test_data_loader_of_a_single_sample_gives_it(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    write_samples(policy.with_name("model.calibration.npz"), count=1)
    assert pi05c("data-loader", policy, "-o", tmp_path / "samples.py").status == 0
    assert len(_loaded(tmp_path / "samples.py")) == 1


def test_data_loader_of_a_specialized_stage_gives_what_fits(
    pi05c: Command, brief_model: Path, tmp_path: Path
) -> None:
    stages, script = tmp_path / "stages", tmp_path / "samples.py"
    pi05c(brief_model, "--passes", "specialize{views=1,1,0}", "--dump", stages)
    samples = brief_model.with_name("model.calibration.npz")
    done = pi05c(
        "data-loader", stages / "01-specialize.onnx", "--calibration", samples, "--all", "-o", script
    )
    assert done.status == 0, done.err
    masks = np.load(samples)["image_masks"]
    fitting = [mask for mask in masks if mask.tolist() == [[True, True, False]]]
    assert 0 < len(fitting) < len(masks)
    assert len(_loaded(script)) == len(fitting)
    assert load(stages / "01-specialize.onnx").graph.inputs


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("samples.txt", "must end in .py"), ("nowhere/samples.py", "does not exist; create it first")],
)
def test_data_loader_names_what_is_wrong_with_its_file(
    pi05c: Command, policy: Path, tmp_path: Path, name: str, sentence: str
) -> None:
    done = pi05c("data-loader", policy, "-o", tmp_path / name)
    assert done.status == 1
    assert sentence in done.err


def test_data_loader_without_samples_names_the_remedy(pi05c: Command, tmp_path: Path) -> None:
    model = write_policy(tmp_path / "model.onnx")
    done = pi05c("data-loader", model, "-o", tmp_path / "samples.py")
    assert done.status == 1
    assert "there are no samples for" in done.err
    assert "--calibration FILE.npz" in done.err
    assert not (tmp_path / "samples.py").exists()


def test_samples_that_are_gone_are_one_sentence(policy: Path) -> None:
    policy.with_name("model.calibration.npz").unlink()
    with pytest.raises(PolygraphyException, match="there are no samples for"):
        load_samples(policy)


def _loaded(script: Path) -> Samples:
    scope: dict[str, object] = {}
    exec(script.read_text(), scope)
    samples = scope["load_data"]()  # type: ignore[operator]
    assert isinstance(samples, Samples)
    return samples
