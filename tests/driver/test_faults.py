"""What a killed process, a failing disk, and files that vanish, change or are nowhere to be written leave behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command
from faulty_runs import content
from onnx import TensorProto, helper, numpy_helper
from small_policy import policy, write_policy, write_samples

from pi05c import compilation
from pi05c.folder import GRAPH, MANIFEST
from pi05c.manifest import check_files, read_manifest

__all__ = ["policy"]

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}


def compile_words(policy: Path, output: Path, passes: str = "none") -> tuple[str, ...]:
    return (str(policy), "--passes", passes, "-o", str(output), "--backend", "onnxruntime")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def whole(folder: Path) -> bool:
    """Whether a folder holds what its manifest says, byte by byte."""
    check_files(folder, read_manifest(folder))
    return True


# One file operation after the other


def broken_runs(kind: str, folder: Path, *words: str) -> list[dict[str, Any]]:
    """What a command left for each file operation that was broken; the last is of the run that nothing broke."""
    lines = subprocess.run(
        [sys.executable, str(HERE / "faulty_runs.py"), kind, str(folder), *words],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
        check=True,
    ).stdout
    return [json.loads(line) for line in lines.splitlines()]


def engine_files(left: dict[str, str]) -> dict[str, str]:
    return {name: data for name, data in left.items() if name.startswith("engine/")}


@pytest.fixture
def before(pi05c: Command, tmp_path: Path) -> Path:
    """A folder whose subfolder `before` holds a policy and an engine folder of it, without a plan."""
    place = tmp_path / "before"
    (place / "policy").mkdir(parents=True)
    write_samples(place / "policy" / "model.calibration.npz")
    model = write_policy(place / "policy" / "model.onnx")
    assert pi05c(str(model), "--passes", "none", "-o", place / "engine", "--target", "h100").status == 0
    return tmp_path


def restored(place: Path, left: dict[str, str]) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    for name, data in left.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(bytes.fromhex(data))
    return place


@pytest.mark.parametrize("kind", ["kill", "EIO"])
def test_whichever_file_operation_is_the_last_one_an_engine_is_old_or_whole(
    before: Path, pi05c: Command, kind: str
) -> None:
    old = engine_files(content(before / "before"))
    now = before / "now"
    words = (str(now / "policy" / "model.onnx"), "--passes", "default", "-o", str(now / "engine"))
    runs = broken_runs(kind, before, *words, "--target", "sm120")
    assert len(runs) > 20
    assert runs[-1]["status"] == 0
    assert "engine/model.engine" in runs[-1]["left"]
    for run in runs[:-1]:
        left = run["left"]
        place = restored(before / "after", left)
        if engine_files(left) != old:
            assert whole(place / "engine"), run["reached"]
            assert "engine/model.engine" in left
        elif run["status"] == 0:
            raise AssertionError(f"nothing was written without a word: {run['reached']}")
        if kind == "kill":
            assert run["status"] == -signal.SIGKILL
            continue
        assert run["status"] in (0, 1)
        errors = [line for line in run["said"].splitlines() if line.startswith("error: ")]
        assert len(errors) == run["status"], run
        assert "Traceback" not in run["said"]
        assert "defect" not in run["said"], run
        assert not [name for name in left if ".partial" in name], run["reached"]
    if kind == "kill":
        unfinished = max(runs[:-1], key=lambda run: len(run["left"]))
        restored(now, unfinished["left"])
        assert pi05c(*compile_words(now / "policy" / "model.onnx", now / "engine")).status == 0
        assert whole(now / "engine")
        assert names(now) - {"cache"} == {"policy", "engine"}


def test_a_plan_that_is_built_in_its_folder_is_old_or_whole(before: Path, pi05c: Command) -> None:
    runs = broken_runs("kill", before, "build", str(before / "now" / "engine"), "--target", "sm120")
    assert runs[-1]["status"] == 0
    built = runs[-1]["left"]["engine/model.engine"]
    for run in runs:
        place = restored(before / "after", run["left"])
        manifest = read_manifest(place / "engine")
        for name, record in manifest.files.items():
            assert (place / "engine" / name).stat().st_size == record.bytes or name == "report.html"
        assert run["left"].get("engine/model.engine") in (None, built)
        assert pi05c("inspect", place / "engine").status == 0


# A disk that is full, small or read-only


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory with the given options."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mounted{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a file system needs root")
        places.append(place)
        return place

    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    yield mount
    for place in places:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(policy: Path, pi05c: Command, mounted: Callable[[str], Path]) -> None:
    place = mounted("size=2m")
    output = place / "engine"
    assert pi05c(*compile_words(policy, output)).status == 0
    before, block = content(output), 4096
    used = sum(len(data) // 2 // block * block + block for data in before.values())
    filler = place / "filler"
    failures = 0
    for free in range(0, 2 * used + 16 * block, 2 * block):
        filler.write_bytes(bytes(max(0, shutil.disk_usage(place).free - free)))
        result = pi05c(*compile_words(policy, output, "exact"))
        if result.status == 0:
            break
        failures += 1
        (error,) = result.err.splitlines()[-1:]
        assert result.status == 1
        assert error.startswith("error: ")
        assert "the disk is full; free some space" in error
        assert content(output) == before
        assert names(place) - {"engine.unfinished"} == {"engine", "filler"}
        filler.unlink()
    assert failures > 3
    assert result.status == 0
    assert whole(output)


def test_a_limit_on_the_size_of_files(policy: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)); "
        "from pi05c.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", limited, *compile_words(policy, output)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert result.returncode == 1
    assert "a file may not become that large here" in result.stderr
    assert "Traceback" not in result.stderr
    assert names(tmp_path) == {"policy"}


def test_places_where_nobody_may_write(
    policy: Path, tmp_path: Path, pi05c: Command, mounted: Callable[[str], Path]
) -> None:
    place = mounted("size=2m")
    engine = place / "engine"
    assert pi05c(*compile_words(policy, engine)).status == 0
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    before = content(place)
    samples = policy.with_name("model.calibration.npz")
    for words in (
        compile_words(policy, engine),
        compile_words(policy, place / "new" / "engine"),
        (policy, "--passes", "exact", "--dump", place / "stages"),
        ("build", engine, "--target", "sm120", "--backend", "tensorrt-rtx"),
        ("run", engine, "--inputs", samples, "-o", place / "out.npz"),
        ("extract", policy, "--part", "prefix", "-o", place / "part.onnx"),
        ("diff", policy, engine, "-o", place / "diff.txt"),
        ("data-loader", policy, "-o", place / "samples.py"),
        ("bisect", policy, "--passes", "exact", "-o", place / "found"),
    ):
        result = pi05c(*words)
        said = f"{' '.join(map(str, words[:2]))}: {result.err}"
        assert result.status in (1, 2, 4) or "found" in str(words[-1]), said
        assert "defect" not in result.err, said
        assert "Traceback" not in result.err, said
        if result.status and "is not installed" not in said:
            assert "read-only file system" in result.err or "no part" in result.err, said
    assert content(place) == before


# Inputs that vanish, change, or are the output


@pytest.mark.parametrize("named", ["model.onnx", "model.onnx.data", "model.calibration.npz"])
@pytest.mark.parametrize("what", ["vanishes", "changes"])
@pytest.mark.parametrize("stage", ["plain_run", "_rewrite", "_verify", "_build"])
def test_an_input_that_is_lost_on_the_way(
    policy: Path,
    tmp_path: Path,
    pi05c: Command,
    monkeypatch: pytest.MonkeyPatch,
    named: str,
    what: str,
    stage: str,
) -> None:
    output = tmp_path / "engine"
    assert pi05c(*compile_words(policy, output)).status == 0
    before, places = content(output), names(tmp_path)
    stage_itself, file = getattr(compilation, stage), policy.with_name(named)

    def lose(*arguments: Any, **named: Any) -> Any:
        if what == "vanishes":
            file.unlink()
        else:
            time.sleep(0.01)
            os.utime(file)
            file.write_bytes(file.read_bytes())
        return stage_itself(*arguments, **named)

    monkeypatch.setattr(compilation, stage, lose)
    result = pi05c(*compile_words(policy, output, "fp16"), "--max-error", "0.1")
    assert "Traceback" not in result.err
    assert "defect" not in result.err
    if result.status == 0:
        assert what == "vanishes"  # behind its last reader
        assert whole(output)
    else:
        assert result.status == 1
        assert str(file) in result.err.splitlines()[-1]
        assert content(output) == before
    assert names(tmp_path) - {"engine.unfinished"} == places


def test_a_link_in_an_engine_folder_is_not_thrown_away(policy: Path, tmp_path: Path, pi05c: Command) -> None:
    output, mine = tmp_path / "engine", tmp_path / "mine"
    assert pi05c(*compile_words(policy, output)).status == 0
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (output / "link").symlink_to(mine)
    result = pi05c(*compile_words(policy, output))
    assert result.status == 1
    assert "'link', which its manifest.json does not name" in result.err
    assert (output / "link" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("target", ["nowhere", "engine"])
def test_a_link_that_leads_nowhere_is_no_output(
    policy: Path, tmp_path: Path, pi05c: Command, target: str
) -> None:
    (tmp_path / "engine").symlink_to(tmp_path / target)
    result = pi05c(*compile_words(policy, tmp_path / "engine"))
    assert "Traceback" not in result.err
    assert "defect" not in result.err
    if target == "engine":
        assert result.status == 1
        return
    assert result.status == 0
    assert (tmp_path / "engine").is_symlink()
    assert whole(tmp_path / "nowhere")


# Two at once


def test_two_compilations_into_one_folder(policy: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    command = [sys.executable, "-m", "pi05c", *compile_words(policy, output)]
    both = [
        subprocess.Popen([*command, "--quiet"], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert whole(output)
    assert names(tmp_path) == {"policy", "engine"}
    assert {MANIFEST, GRAPH} <= names(output)


# A builder whose parent is gone


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a child with its parent")
def test_the_builder_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    hanging = (
        "import sys, time; from pi05c.backend import tensorrt_worker as worker; "
        "worker.build = lambda request: (print('ready', flush=True), time.sleep(600)); worker.main(sys.argv[1])"
    )
    request = tmp_path / "request.json"
    request.write_text('{"rtx": true, "model": "m", "plan": "p"}')
    starter = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE); "
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starter, hanging, str(request)],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while _runs(child):
        assert time.monotonic() < deadline, "the builder outlives the process that started it"
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


# Files that are cut short while they are mapped

CUT_IN_A_PASS = """
    import os
    import numpy as np
    import onnx_graphsurgeon as gs
    from pi05c.graph.weights import weight_of, whole
    from pi05c.passes.contract import PassContext, graph_pass


    @graph_pass(exact=True)
    def cut(graph: gs.Graph, ctx: PassContext) -> None:
        \"\"\"Shorten the file of a weight between mapping and reading it.\"\"\"
        weight = weight_of(next(tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant)))
        values = weight.read(whole(weight.shape))
        os.truncate({data!r}, 8)
        np.asarray(values).sum()
    """
CUT_IN_A_RUN = """
    import os, sys
    from pi05c.backend.onnxruntime import OnnxRuntimeRunner
    from pi05c.cli import main

    run = OnnxRuntimeRunner.run

    def cut_and_run(runner, inputs):
        os.truncate({data!r}, 8)
        return run(runner, inputs)

    OnnxRuntimeRunner.run = cut_and_run
    sys.exit(main(sys.argv[1:]))
    """


@pytest.fixture
def mapped(tmp_path: Path) -> Path:
    """A graph that reads its weight, 16 MB in a file beside it, where it is mapped; with samples."""
    folder = tmp_path / "mapped"
    folder.mkdir()
    width = 2048
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[width, width])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="model.onnx.data")
    np.full((width, width), 0.5, np.float32).tofile(folder / "model.onnx.data")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width]) for name in ("x", "actions")]
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["m"]),
        helper.make_node("ReduceMax", ["m", "rows"], ["actions"]),
    ]
    weights = [tensor, numpy_helper.from_array(np.array([0]), "rows")]
    graph = helper.make_graph(nodes, "largest", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    np.savez(folder / "model.calibration.npz", x=np.ones((2, 1, width), np.float32))
    return folder / "model.onnx"


@pytest.mark.skipif(
    not hasattr(signal, "SIGBUS") or not Path("/proc/self/maps").exists(), reason="Linux alone tells"
)
@pytest.mark.parametrize("code", [CUT_IN_A_PASS, CUT_IN_A_RUN], ids=["in a pass", "in onnxruntime"])
def test_weights_that_are_cut_short_while_they_are_read(mapped: Path, tmp_path: Path, code: str) -> None:
    data, output, script = mapped.with_name("model.onnx.data"), tmp_path / "engine", tmp_path / "cut.py"
    script.write_text(textwrap.dedent(code).format(data=str(data)))
    words = compile_words(mapped, output)
    environment = {**ENVIRONMENT, "PI05C_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "pi05c", *words], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    before = content(output)
    command = [sys.executable, str(script), *words]
    if code is CUT_IN_A_PASS:
        command = [sys.executable, "-m", "pi05c", *words, "--passes", "cut", "--plugin", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: {data} became shorter while it was read: start again when nothing writes it any more"
    )
    assert content(output) == before


# Outputs that are read


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "model.calibration.npz", "linked"])
def test_what_is_read_is_not_replaced(policy: Path, pi05c: Command, tmp_path: Path, name: str) -> None:
    output, samples = policy.with_name(name), policy.with_name("model.calibration.npz")
    if name == "linked":
        output.hardlink_to(policy)
    before = content(policy.parent)
    words: tuple[tuple[str | Path, ...], ...] = (
        ("run", policy, "--inputs", samples, "-o", output),
        ("extract", policy, "--part", "prefix", "-o", output),
    )
    if name in ("model.onnx", "linked"):
        words = (*words, ("diff", policy, policy, "-o", output))
    for command in words:
        result = pi05c(*command)
        assert result.status in (1, 2), command
        assert "would replace" in result.err
        assert "which is read: choose another -o" in result.err
        assert content(policy.parent) == before


def test_files_of_an_engine_that_is_read_are_not_replaced(
    policy: Path, pi05c: Command, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    assert pi05c(*compile_words(policy, engine)).status == 0
    before = content(engine)
    for command in (
        ("run", engine, "--inputs", policy.with_name("model.calibration.npz"), "-o", engine / "model.onnx"),
        ("run", engine, "--inputs", engine / "samples.npz", "-o", engine / "samples.npz"),
        ("diff", policy, engine, "-o", engine / "manifest.json"),
        ("bench", engine, "-o", engine / "manifest.json"),
    ):
        result = pi05c(*command)
        assert "would replace" in result.err, command
        assert content(engine) == before


def test_recorded_samples_are_not_replaced_by_made_up_ones(tmp_path: Path, pi05c: Command) -> None:
    pytest.importorskip("torch", reason="exporting the model needs the extra [torch]")
    samples = write_samples(tmp_path / "model.calibration.npz")
    before = samples.read_bytes()
    result = pi05c("export", "--random", "--config", "pi05_tiny", "-o", tmp_path / "model.onnx")
    assert result.status == 1
    assert "holds recorded samples, which made-up ones would replace" in result.err
    assert samples.read_bytes() == before
    assert names(tmp_path) == {samples.name}
