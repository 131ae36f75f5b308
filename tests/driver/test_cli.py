"""The command line as a user types it: forms, exit codes, what goes to stdout and stderr."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command, Result
from small_policy import (
    BUILDS,
    FAILS,
    HANGS,
    ROWS,
    SAMPLES,
    WIDTH,
    policy,
    pretend_installed,
    use_worker,
    worker,
    wrecking_pass,
    write_policy,
    write_samples,
)

from pi05c.backend.onnxruntime import load_runner
from pi05c.backend.targets import Flavour
from pi05c.cli.app import spread as spread_samples
from pi05c.folder import GRAPH, PLAN
from pi05c.manifest import Manifest, check_files, read_manifest
from pi05c.passes import PRESETS, REGISTRY

__all__ = ["policy", "wrecking_pass"]

NO_PLAN = ("--backend", "onnxruntime")


@pytest.fixture
def engine(pi05c: Command, policy: Path, tmp_path: Path) -> Path:
    """A folder without a plan."""
    folder = tmp_path / "engine"
    assert pi05c(policy, "--passes", "exact", "-o", folder, *NO_PLAN).status == 0
    return folder


def sentence(result: Result) -> str:
    """The one line of an error."""
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.err
    return lines[0]


def python(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


# Forms


@pytest.mark.parametrize(
    "arguments",
    [
        ["MODEL", "-o", "OUT"],
        ["compile", "MODEL", "-o", "OUT"],
        ["-o", "OUT", "MODEL"],
        ["--quiet", "MODEL", "-o", "OUT"],
        ["-q", "compile", "MODEL", "--output", "OUT"],
        ["--passes", "exact", "--output=OUT", "MODEL"],
    ],
)
def test_the_bare_form_compiles(pi05c: Command, policy: Path, tmp_path: Path, arguments: list[str]) -> None:
    names = {"MODEL": str(policy), "OUT": str(tmp_path / "engine")}
    words = [
        word.replace("OUT", names["OUT"]) if "OUT" in word else names.get(word, word) for word in arguments
    ]
    assert pi05c(*words, "--passes", "none", *NO_PLAN).status == 0
    assert (tmp_path / "engine" / GRAPH).is_file()


def test_a_model_in_a_file_of_any_name(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    model = policy.with_suffix(".bin")
    policy.rename(model)
    assert pi05c(model, "--passes", "none", "-o", tmp_path / "engine", *NO_PLAN).status == 0


@pytest.mark.parametrize("form", ["several words", "repeated", "folder", "before the model", "with ="])
def test_calibration_takes_several_samples(pi05c: Command, tmp_path: Path, form: str) -> None:
    model = write_policy(tmp_path / "model.onnx")
    samples = tmp_path / "samples"
    samples.mkdir()
    first, second = write_samples(samples / "a.npz"), write_samples(samples / "b.npz", count=2)
    words: list[str | Path] = {
        "several words": [model, "--calibration", first, second],
        "repeated": [model, "--calibration", first, "--calibration", second],
        "folder": [model, "--calibration", samples],
        "before the model": ["--calibration", first, second, model],
        "with =": [model, f"--calibration={first}", "--calibration", second],
    }[form]
    result = pi05c(*words, "--passes", "fp16", "--json", "-o", tmp_path / "engine", *NO_PLAN)
    assert result.status == 0, result.err
    used = json.loads(result.out)["calibration"]
    assert used["used"] + used["held_back"] == SAMPLES + 2


def test_the_checkpoint_of_export_is_no_sample() -> None:
    words = ["export", "--calibration", "a.npz", "b.npz", "checkpoint", "-o", "model.onnx"]
    spread = ["export", "--calibration", "a.npz", "--calibration", "b.npz", "checkpoint", "-o", "model.onnx"]
    assert spread_samples(words) == spread


def test_help_and_version(pi05c: Command) -> None:
    for arguments in (["--help"], ["-h"], ["compile", "--help"], ["run", "-h"]):
        result = pi05c(*arguments)
        assert result.status == 0
        assert "Usage" in result.out
    from importlib.metadata import version

    assert pi05c("--version") == Result(0, f"pi05c {version('pi05c')}\n", "")
    for command in ("compile", "export", "build", "run", "verify", "passes", "inspect"):
        assert command in pi05c("--help").out


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["compile", "--help"], ["export", "--help"], ["samples", "--help"]],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "numpy", "jinja2"}
    heavy |= {"av", "PIL", "pyarrow", "sentencepiece", "tokenizers"}
    script = (
        "import sys; from pi05c.cli import main; status = main(sys.argv[1:]); "
        f"sys.exit(status or ' '.join(sorted({heavy!r} & set(sys.modules))) or 0)"
    )
    done = python("-c", script, *arguments)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = python(
        "-c", "import sys, pi05c; sys.exit(' '.join({'onnx', 'numpy', 'torch'} & set(sys.modules)) or 0)"
    )
    assert done.returncode == 0, done.stderr


def test_completion_knows_commands_and_options_of_the_bare_form(policy: Path) -> None:
    def complete(line: str) -> str:
        environment = {
            **os.environ,
            "_PI05C_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        }
        return python("-m", "pi05c", env=environment).stdout

    assert "export" in complete("pi05c exp")
    assert "--passes" in complete(f"pi05c {policy} --pas")


# Errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bogus"], "--bogus"),
        (["exprot"], "No such command 'exprot'"),
        (["passes", "more"], "extra argument"),
        (["compile"], "MODEL"),
        (["run", "x", "--inputs"], "--inputs"),
        (["export", "-o", "x.onnx", "--batch", "two"], "--batch"),
        (["export", "-o", "x.onnx"], "either a checkpoint folder or --random"),
        (["MODEL"], "'--output'"),
        (["MODEL", "-o", "OUT", "--passes", "fp17"], "neither a pass nor a preset"),
        (["MODEL", "-o", "OUT", "--passes", "pin_fp32{x=1}"], "has no option 'x'"),
        (["MODEL", "-o", "OUT", "--target", "sm1"], "unknown target sm1"),
        (["MODEL", "-o", "OUT", "--backend", "cuda"], "unknown backend 'cuda'"),
        (["MODEL", "-o", "OUT", "--shapes", "x"], "is malformed"),
        (["MODEL", "-o", "OUT", "--max-error", "low"], "--max-error"),
    ],
)
def test_usage_errors_exit_with_2(
    pi05c: Command, policy: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    names = {"MODEL": str(policy), "OUT": str(tmp_path / "engine")}
    result = pi05c(*(names.get(word, word) for word in arguments))
    assert result.status == 2
    assert said.lower() in sentence(result).lower()
    assert result.out == ""
    assert not (tmp_path / "engine").exists()


def test_no_arguments_print_help_and_exit_with_2(pi05c: Command) -> None:
    result = pi05c()
    assert result.status == 2
    assert "Usage" in result.out


def test_wrong_inputs_exit_with_1(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    output = tmp_path / "engine"
    assert "there is no file" in sentence(missing := pi05c("missing.onnx", "-o", output, *NO_PLAN))
    assert "text.onnx" in sentence(damaged := pi05c(text, "-o", output, *NO_PLAN))
    assert "is a folder" in sentence(folder := pi05c(tmp_path, "-o", output, *NO_PLAN))
    assert "has no FP8" in sentence(target := pi05c(policy, "-o", output, "--target", "sm86"))
    assert "its own input" in sentence(own := pi05c(policy, "-o", policy.parent, *NO_PLAN))
    assert {missing.status, damaged.status, folder.status, target.status, own.status} == {1}
    assert not output.exists()


def test_a_failed_verification_exits_with_3(
    pi05c: Command, policy: Path, tmp_path: Path, wrecking_pass: str
) -> None:
    result = pi05c(policy, "--passes", wrecking_pass, "-o", tmp_path / "engine", *NO_PLAN)
    assert result.status == 3
    assert "beyond the limit" in sentence(result)
    assert not (tmp_path / "engine").exists()
    rejected = tmp_path / "engine.rejected"
    assert pi05c("verify", rejected).status == 3
    assert pi05c("verify", rejected, "--max-error", "10").status == 0


@pytest.mark.parametrize("output", ["diff", "golden"])
def test_only_the_command_decides_on_the_exit_status(
    pi05c: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pi05c("-o", output, "missing.onnx").status == 1
    assert pi05c("--json", output, "missing.onnx").status == 2


def test_a_failed_build_exits_with_4(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_worker(monkeypatch, tmp_path, FAILS)
    result = pi05c(policy, "--passes", "none", "-o", tmp_path / "engine", "--target", "sm120")
    assert result.status == 4
    assert "no kernel for node project" in sentence(result)


def test_a_defect_is_one_sentence_that_says_how_to_see_more(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise IndexError("list index out of range\x1b[2J")

    monkeypatch.setattr("pi05c.compilation.compile", broken)
    arguments = (policy, "-o", tmp_path / "engine")
    result = pi05c(*arguments)
    assert result.status == 1
    assert "has a defect (IndexError: list index out of range" in sentence(result)
    assert "--debug" in result.err
    assert "\x1b" not in result.err
    debugged = pi05c(*arguments, "--debug")
    assert debugged.status == 1
    assert "Traceback" in debugged.err


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pi05c", "passes", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=60)
    assert "Traceback" not in errors
    assert "error" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_and_leaves_the_old_engine(
    engine: Path, policy: Path, tmp_path: Path, number: signal.Signals
) -> None:
    before = {path.name: path.read_bytes() for path in engine.iterdir()}
    command = worker(tmp_path, HANGS)
    script = (
        "import sys; from pi05c.backend import tensorrt; from pi05c.cli import main; "
        f"tensorrt.WORKER_COMMAND = {command!r}; tensorrt.can_build = lambda *_: None; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [str(policy), "--passes", "none", "-o", str(engine), "--target", "sm120"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )
    deadline = time.monotonic() + 60
    while not any(
        path.stat().st_size for path in tmp_path.glob(".engine.partial-*/.model.engine.partial-*.engine")
    ):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == "interrupted"
    assert {path.name: path.read_bytes() for path in engine.iterdir()} == before
    assert not list(tmp_path.glob(".engine*"))


# What is shown


@pytest.mark.usefixtures("own_cache")
def test_the_summary_of_a_compilation(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_worker(monkeypatch, tmp_path, BUILDS)
    result = pi05c(policy, "--passes", "default", "-o", tmp_path / "engine", "--target", "sm120")
    assert result.status == 0
    for name in PRESETS["default"]:
        assert name in result.out
    for word in (
        "changed",
        "skipped",
        "seconds",
        "linear",
        "float8e4m3fn",
        "relative L2",
        "cosine",
        "SQNR",
        "max abs",
    ):
        assert word in result.out
    assert "calibrated on 3 samples of model.calibration.npz" in result.out
    assert f"{tmp_path / 'engine' / PLAN}" in result.out
    assert "for sm120, built in" in result.out
    assert result.err == ""


def test_made_up_samples_are_announced_on_stderr(pi05c: Command, tmp_path: Path) -> None:
    write_samples(tmp_path / "model.calibration.npz", synthetic=True)
    model = write_policy(tmp_path / "model.onnx", metadata={"pi05c.weights": "random"})
    result = pi05c(model, "--passes", "fp16", "-o", tmp_path / "engine", *NO_PLAN)
    assert result.status == 0
    assert "made-up samples" in result.err
    assert "made-up samples" in result.out


def test_quiet_prints_nothing_and_verbose_logs_each_stage(
    pi05c: Command, policy: Path, tmp_path: Path
) -> None:
    arguments = (policy, "--passes", "exact", "-o", tmp_path / "engine", *NO_PLAN)
    assert pi05c(*arguments, "--quiet") == Result(0, "", "")
    result = pi05c(*arguments, "--verbose")
    for stage in (
        "load",
        "run the plain graph",
        "passes",
        "write the graph",
        "run the rewritten graph",
        "publish",
    ):
        assert f"{stage}: " in result.err
    assert pi05c(*arguments).err == ""


def test_progress_is_shown_on_a_terminal_only(policy: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "pi05c", str(policy), "--passes", "exact", *NO_PLAN]
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(
        [*arguments, "-o", str(tmp_path / "a")], stdout=subprocess.PIPE, stderr=child, env=environment
    ) as process:
        os.close(child)
        assert process.stdout is not None
        shown = b""
        while True:
            try:
                part = os.read(parent, 65536)
            except OSError:  # what Linux answers when the other side is closed
                break
            if not part:
                break
            shown += part
        out = process.stdout.read()
    os.close(parent)
    assert process.returncode == 0
    assert b"run the plain graph" in shown
    assert b"\x1b" not in out
    piped = subprocess.run([*arguments, "-o", str(tmp_path / "b")], capture_output=True, timeout=120)
    assert piped.stderr == b""


def test_json_is_all_of_stdout(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    compiled = json.loads(pi05c(policy, "--passes", "exact", "-o", folder, "--json", *NO_PLAN).out)
    assert compiled["folder"] == str(folder)
    assert compiled["verification"]["passed"] is True
    verified = json.loads(pi05c("verify", folder, "--json").out)
    assert verified["passed"] is True
    assert verified["limit"] == 1e-5
    assert [error["sample"] for error in verified["simulated"]["errors"]] == [0]
    assert verified["measured"] is None
    assert verified["why_not_measured"]
    inspected = json.loads(pi05c("inspect", folder, "--json").out)
    assert inspected["manifest"]["pipeline"]["requested"] == "exact"
    graph = json.loads(pi05c("inspect", policy, "--json").out)
    assert graph["manifest"] is None
    assert graph["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": [1, ROWS, WIDTH], "low": None, "high": None, "fixed": None}
    ]
    assert {total["dtype"]: total["bytes"] for total in graph["weights"]} == {
        "float32": 4 * WIDTH * (WIDTH + 1)
    }


def test_passes_lists_every_pass_in_default_order(pi05c: Command) -> None:
    listed = json.loads(pi05c("passes", "--json").out)
    names = [entry["name"] for entry in listed["passes"]]
    assert sorted(names) == sorted(REGISTRY)
    default = list(dict.fromkeys(PRESETS["default"]))
    assert names[: len(default)] == default
    assert listed["presets"] == {name: list(members) for name, members in PRESETS.items()}
    by_name = {entry["name"]: entry for entry in listed["passes"]}
    assert by_name["canonicalize"]["exact"] is True
    assert by_name["quantize_linears"]["exact"] is False
    for entry in listed["passes"]:
        assert entry["summary"]
        assert {option["name"] for option in entry["options"]} == set(REGISTRY[entry["name"]].options)
    text = pi05c("passes").out
    for name in names:
        assert name in text


def test_inspect_shows_what_the_robot_needs(pi05c: Command, tmp_path: Path) -> None:
    write_samples(tmp_path / "model.calibration.npz")
    model = write_policy(tmp_path / "model.onnx", metadata={"pi05c.robot": '{"cameras": ["wrist"]}'})
    folder = tmp_path / "engine"
    assert pi05c(model, "--passes", "exact", "-o", folder, *NO_PLAN).status == 0
    for path in (model, folder):
        shown = pi05c("inspect", path).out
        assert "wrist" in shown
        assert f"x: float32[1,{ROWS},{WIDTH}]" in shown
        assert "linear" in shown
    assert "canonicalize" in pi05c("inspect", folder).out


# run and verify


@pytest.mark.parametrize("what", ["engine", "model"])
def test_run_writes_the_outputs_and_says_what_ran(
    pi05c: Command, engine: Path, policy: Path, tmp_path: Path, what: str
) -> None:
    path = engine if what == "engine" else policy
    inputs = policy.with_name("model.calibration.npz")
    result = pi05c("run", path, "--inputs", inputs, "-o", tmp_path / "out.npz")
    assert result.status == 0
    assert "in onnxruntime" in result.out
    x = np.load(inputs)["x"]
    expected = np.stack([load_runner(policy).run({"x": sample})["actions"] for sample in x])
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["actions"], expected, rtol=1e-5, atol=1e-5)


def test_run_takes_one_sample_without_a_leading_axis(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    x = np.zeros((1, ROWS, WIDTH), np.float32)
    np.savez(tmp_path / "one.npz", x=x)
    result = pi05c("run", policy, "--inputs", tmp_path / "one.npz", "-o", tmp_path / "out.npz")
    assert result.status == 0
    assert "one sample, by its graph in onnxruntime" in result.out
    assert np.load(tmp_path / "out.npz")["actions"].shape == x.shape


def test_run_refuses_what_it_cannot_use(pi05c: Command, engine: Path, policy: Path, tmp_path: Path) -> None:
    inputs = policy.with_name("model.calibration.npz")
    np.savez(tmp_path / "other.npz", y=np.zeros(3, np.float32))
    assert "lacks 'x'" in sentence(
        pi05c("run", engine, "--inputs", tmp_path / "other.npz", "-o", tmp_path / "o.npz")
    )
    assert "choose another -o" in sentence(pi05c("run", engine, "--inputs", inputs, "-o", inputs))
    assert "cannot be written" in sentence(
        pi05c("run", engine, "--inputs", inputs, "-o", tmp_path / "no" / "o.npz")
    )
    assert "not an engine folder" in sentence(
        pi05c("run", tmp_path, "--inputs", inputs, "-o", tmp_path / "o.npz")
    )


def test_run_and_verify_use_the_engine_where_it_runs(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_worker(monkeypatch, tmp_path, BUILDS)
    folder = tmp_path / "engine"
    assert pi05c(policy, "--passes", "none", "-o", folder, "--target", "sm120").status == 0
    graph = load_runner(folder / GRAPH)

    class Engine:
        ran = "the engine on its GPU"

        def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {name: value * np.float32(1.5) for name, value in graph.run(inputs).items()}

    loaded: list[tuple[Path, str]] = []

    def load_engine(folder: Path, manifest: Manifest, backend: str, steps: int | None) -> Engine:
        loaded.append((folder, backend))
        return Engine()

    monkeypatch.setattr("pi05c.runtime.compute_capabilities", lambda: ((12, 0),))
    monkeypatch.setattr("pi05c.runtime.installed_flavours", lambda: tuple(Flavour))
    monkeypatch.setattr("pi05c.runtime._on_device", load_engine)
    inputs = policy.with_name("model.calibration.npz")
    assert "the engine on its GPU" in pi05c("run", folder, "--inputs", inputs, "-o", tmp_path / "o.npz").out
    assert loaded == [(folder, "tensorrt-rtx")]
    result = pi05c("verify", folder)
    assert result.status == 3
    assert "simulated" in result.out
    assert "measured" in result.out
    assert "0.5" in sentence(result)


def test_a_plan_that_does_not_load_is_an_error_to_verify_and_a_warning_to_run(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pi05c.graph.errors import Pi05cError

    use_worker(monkeypatch, tmp_path, BUILDS)
    folder = tmp_path / "engine"
    assert pi05c(policy, "--passes", "none", "-o", folder, "--target", "sm120").status == 0

    def load_engine(folder: Path, manifest: Manifest, backend: str, steps: int | None) -> None:
        raise Pi05cError(f"{folder / PLAN} does not load on this GPU")

    monkeypatch.setattr("pi05c.runtime.compute_capabilities", lambda: ((8, 9),))
    monkeypatch.setattr("pi05c.runtime.installed_flavours", lambda: tuple(Flavour))
    monkeypatch.setattr("pi05c.runtime._on_device", load_engine)
    inputs = policy.with_name("model.calibration.npz")
    result = pi05c("run", folder, "--inputs", inputs, "-o", tmp_path / "o.npz")
    assert result.status == 0
    assert "in onnxruntime" in result.out
    assert "does not load on this GPU" in result.err
    assert "does not load on this GPU" in sentence(pi05c("verify", folder))


def test_verify_takes_samples_with_their_reference(
    pi05c: Command, engine: Path, policy: Path, tmp_path: Path
) -> None:
    x = np.load(policy.with_name("model.calibration.npz"))["x"]
    actions = np.stack([load_runner(policy).run({"x": sample})["actions"] for sample in x])
    np.savez(tmp_path / "good.npz", x=x, actions=actions)
    np.savez(tmp_path / "bad.npz", x=x, actions=actions * np.float32(1.01))
    good = pi05c("verify", engine, "--samples", tmp_path / "good.npz", "--json")
    assert good.status == 0
    assert len(json.loads(good.out)["simulated"]["errors"]) == SAMPLES
    assert pi05c("verify", engine, "--samples", tmp_path / "bad.npz").status == 3
    assert pi05c("verify", engine, "--samples", tmp_path / "bad.npz", "--max-error", "0.02").status == 0
    without = pi05c("verify", engine, "--samples", policy.with_name("model.calibration.npz"))
    assert without.status == 1
    assert "no reference outputs" in sentence(without)


def test_verify_refuses_a_folder_that_was_altered(pi05c: Command, engine: Path) -> None:
    (engine / GRAPH).write_bytes((engine / GRAPH).read_bytes() + b" ")
    result = pi05c("verify", engine)
    assert result.status == 1
    assert "is not the file that manifest.json names" in sentence(result)


def test_build_finishes_a_folder_on_the_device(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch)
    folder = tmp_path / "engine"
    result = pi05c(policy, "--passes", "exact", "-o", folder, "--target", "sm120")
    assert result.status == 0
    assert "build_engine.sh" in result.err
    assert "no plan" in result.out
    assert pi05c("build", folder).status == 4
    use_worker(monkeypatch, tmp_path, BUILDS)
    built = pi05c("build", folder, "--backend", "tensorrt-rtx")
    assert built.status == 0, built.err
    assert "built in" in built.out
    assert (folder / PLAN).is_file()
    assert pi05c("verify", folder).status == 0


def test_export_and_compile_the_reference_checkpoint(
    pi05c: Command, reference_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="exporting the model needs the extra [torch]")
    model = tmp_path / "model.onnx"
    inputs = reference_dir / "three_views.inputs.npz"
    exported = pi05c(
        "export", reference_dir, "-o", model, "--prompt-length", "24", "--calibration", inputs, "--json"
    )
    assert exported.status == 0, exported.err
    facts = json.loads(exported.out)
    assert facts["synthetic"] is False
    assert facts["parameters"] > 0
    compiled = pi05c(model, "--passes", "exact", "-o", tmp_path / "engine", "--json", *NO_PLAN)
    assert compiled.status == 0, compiled.err
    assert "one sample only" in compiled.err
    assert json.loads(compiled.out)["source"]["config"]["name"]
    result = pi05c("run", tmp_path / "engine", "--inputs", inputs, "-o", tmp_path / "actions.npz")
    assert result.status == 0
    expected = np.load(reference_dir / "three_views.float32.npz")["actions"]
    np.testing.assert_allclose(np.load(tmp_path / "actions.npz")["actions"], expected, atol=1e-4)


# Streams and terminals


def shell(command: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which `pi05c` is this one."""
    line = f'pi05c() {{ "{sys.executable}" -m pi05c "$@"; }}; {command}'
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    return subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )


def test_streams_that_are_closed_get_no_file(policy: Path, tmp_path: Path) -> None:
    """Else a data file would be descriptor 1 or 2, and hold what libraries print."""
    words = f"{policy} --passes exact --backend onnxruntime --verbose -o engine"
    assert shell(f"pi05c {words} <&- >&- 2>&-", tmp_path).returncode == 0
    check_files(tmp_path / "engine", read_manifest(tmp_path / "engine"))
    for stream in (">&-", "2>&-"):
        assert shell(f"pi05c inspect engine {stream}", tmp_path).returncode == 0


def test_a_reader_that_leaves_is_no_error(policy: Path, tmp_path: Path) -> None:
    done = shell(f"pi05c inspect {policy} | true; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_full_output_is_said(policy: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("there is no /dev/full")
    done = shell(f"pi05c inspect {policy} > /dev/full", tmp_path)
    assert done.returncode == 1
    assert "the standard output cannot be used: the disk is full" in done.stderr


@pytest.mark.parametrize("columns", ["0", "1", "9" * 5000])
def test_widths_that_no_terminal_has(
    policy: Path, pi05c: Command, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "input  x: float32[1,8,32]" in pi05c("inspect", policy).out


def test_an_output_that_lacks_characters(policy: Path, tmp_path: Path) -> None:
    renamed = policy.rename(policy.with_name("\N{LATIN SMALL LETTER E WITH ACUTE}.onnx"))
    done = shell(f"pi05c inspect {renamed}", tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\xe9.onnx: opset 21" in done.stdout
