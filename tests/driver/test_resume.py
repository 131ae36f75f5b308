"""A compile that ended early: what of it the next one takes over, and when it does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import Command
from small_policy import BUILDS, HANGS, policy, use_worker, wrecking_pass, write_samples

import pi05c
from pi05c import checkpoint, compilation
from pi05c.folder import CHECKPOINT, GRAPH, PLAN, SAMPLES
from pi05c.graph.errors import VerificationError
from pi05c.manifest import check_files, read_manifest
from pi05c.passrun import RunOptions
from pi05c.progress import Progress

__all__ = ["policy", "wrecking_pass"]

TAKEN = "goes on with what an earlier run of this finished"


class Said(Progress):
    """Keeps notes too."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    @property
    def taken(self) -> str:
        """What was taken over."""
        return next((note.removeprefix(f"{TAKEN}: ") for note in self.notes if note.startswith(TAKEN)), "")

    @property
    def titles(self) -> list[str]:
        """The stages that ran."""
        return [stage.title for stage in self.stages]


def interrupted(monkeypatch: pytest.MonkeyPatch, model: Path, output: Path, **options: object) -> None:
    """A compile that Ctrl-C ends while its report is written."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(compilation, "write_report", fail)
        with pytest.raises(KeyboardInterrupt):
            pi05c.compile(model, output, **{"backend": "onnxruntime", "passes": "exact", **options})


def compiled(model: Path, output: Path, **options: object) -> Said:
    progress = Said()
    pi05c.compile(
        model, output, progress=progress, **{"backend": "onnxruntime", "passes": "exact", **options}
    )
    return progress


def test_a_verified_graph_is_not_made_again(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "engine"
    interrupted(monkeypatch, policy, output)
    assert not output.exists()
    said = compiled(policy, output)
    assert said.taken == "the rewritten graph and its verification"
    assert said.titles == ["load", "publish"]
    check_files(output, read_manifest(output))
    assert not (tmp_path / "engine.unfinished").exists()

    whole = compiled(policy, tmp_path / "other")
    assert whole.taken == ""
    one, other = read_manifest(output), read_manifest(tmp_path / "other")
    seconds = {"passes": [], "engine": one.engine}
    assert one.verification == other.verification
    assert one.files[GRAPH] == other.files[GRAPH]
    assert one.files[SAMPLES] == other.files[SAMPLES]
    assert one.pipeline.model_copy(update=seconds) == other.pipeline.model_copy(update=seconds)


@pytest.mark.parametrize("what", ["passes", "samples", "weights", "limit", "target", "code", "fresh", "dump"])
def test_other_content_starts_from_the_beginning(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    output = tmp_path / "engine"
    interrupted(monkeypatch, policy, output)
    options: dict[str, object] = {}
    if what == "passes":
        options["passes"] = "exact,-fold_norms"
    elif what == "samples":
        write_samples(policy.with_name("model.calibration.npz"), count=3)
    elif what == "weights":
        data = policy.with_name(f"{policy.name}.data")
        data.write_bytes(bytes(4) + data.read_bytes()[4:])
    elif what == "limit":
        options["max_error"] = 0.5
    elif what == "target":
        options["target"] = "sm120"
    elif what == "code":
        monkeypatch.setattr(checkpoint, "_code_sha256", lambda: "of another version")
    elif what == "fresh":
        options["fresh"] = True
    else:
        options["options"] = RunOptions(dump=tmp_path / "stages")
    said = compiled(policy, output, **options)
    assert said.taken == ""
    assert "passes" in said.titles
    assert not (tmp_path / "engine.unfinished").exists()


@pytest.mark.parametrize(
    "damage",
    ["a file is short", "a file is missing", "no JSON", "other JSON", "no files", "a plan", "elsewhere"],
)
def test_what_is_damaged_is_not_taken_over(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    output, unfinished = tmp_path / "engine", tmp_path / "engine.unfinished"
    interrupted(monkeypatch, policy, output)
    data, record = unfinished / f"{GRAPH}.data", unfinished / CHECKPOINT
    if damage == "a file is short":
        os.truncate(data, 4)
    elif damage == "a file is missing":
        data.unlink()
    elif damage in ("no JSON", "other JSON"):
        record.write_text("{" if damage == "no JSON" else json.dumps({"key": 1}))
    else:
        said = json.loads(record.read_text())
        if damage == "no files":
            said["files"] = {}
        elif damage == "a plan":
            said["manifest"]["engine"]["file"] = PLAN
        else:
            said["files"]["../policy/model.onnx"] = policy.stat().st_size
        record.write_text(json.dumps(said))
    assert compiled(policy, output).taken == ""
    check_files(output, read_manifest(output))
    assert policy.is_file()


def test_an_unfinished_folder_that_is_not_pi05cs_stays(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "engine.unfinished" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    interrupted(monkeypatch, policy, tmp_path / "engine")
    assert [path.name for path in mine.parent.iterdir()] == ["notes.txt"]
    compiled(policy, tmp_path / "engine", fresh=True)
    assert mine.read_text() == "mine"


def test_a_run_whose_passes_are_looked_at_leaves_nothing(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, policy, tmp_path / "engine", options=RunOptions(verify_each="structure"))
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}


def test_a_rejected_result_holds_no_checkpoint(policy: Path, tmp_path: Path, wrecking_pass: str) -> None:
    with pytest.raises(VerificationError):
        compiled(policy, tmp_path / "engine", passes=wrecking_pass)
    rejected = tmp_path / "engine.rejected"
    check_files(rejected, read_manifest(rejected))
    assert CHECKPOINT not in {path.name for path in rejected.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"policy", "engine.rejected"}


def test_of_several_engines_those_that_are_built_are_not_built_again(
    brief_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pi05c: Command
) -> None:
    (tmp_path / "worker").mkdir()
    use_worker(monkeypatch, tmp_path / "worker", BUILDS)
    output = tmp_path / "engine"
    command = (
        brief_model,
        "-o",
        output,
        "--passes",
        "fp16",
        "--split",
        "vision,prefix,denoise",
        "--target",
        "sm120",
    )
    build_plan, built = compilation.build_plan, []

    def build(folder: Path, *rest: object) -> object:
        built.append(folder.name)
        if built == ["vision", "prefix"]:
            raise KeyboardInterrupt
        return build_plan(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(compilation, "build_plan", build)
    assert pi05c(*command).status == 130
    unfinished = tmp_path / "engine.unfinished"
    plans = [path.relative_to(unfinished).as_posix() for path in unfinished.rglob(PLAN)]
    assert plans == [f"vision/{PLAN}"]

    result = pi05c(*command)
    assert result.status == 0
    assert f"{TAKEN}: the rewritten graph, its verification and the engine of vision" in result.err
    assert built == ["vision", "prefix", "prefix", "denoise"]
    manifest = read_manifest(output)
    check_files(output, manifest)
    assert [part.engine.file for part in manifest.parts] == [
        f"{part}/{PLAN}" for part in ("vision", "prefix", "denoise")
    ]


@pytest.mark.usefixtures("own_cache")
def test_measured_ranges_are_taken_from_the_cache_and_forgotten_if_asked(
    policy: Path, tmp_path: Path, pi05c: Command
) -> None:
    command = (policy, "--passes", "default", "--backend", "onnxruntime", "-o", tmp_path / "engine")
    said = "ranges: measured before on this graph and these samples, not again"
    assert said not in pi05c(*command).err
    assert said in pi05c(*command).err
    assert said not in pi05c(*command, "--fresh").err


def test_what_a_killed_process_finished_is_taken_over(
    policy: Path, tmp_path: Path, pi05c: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    use_worker(monkeypatch, tmp_path, HANGS)
    script = tmp_path / "compile.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import pytest\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from small_policy import HANGS, use_worker\n"
        "from pi05c import cli\n"
        "use_worker(pytest.MonkeyPatch(), Path(sys.argv[1]), HANGS)\n"
        "cli.main(sys.argv[2:])\n"
    )
    command = (str(policy), "--passes", "exact", "--target", "sm120", "-o", str(place / "engine"))
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path), *command])
    try:
        deadline = time.monotonic() + 120
        while (
            not any(
                path.stat().st_size for path in place.glob(".engine.partial-*/.model.engine.partial-*.engine")
            )
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        assert time.monotonic() < deadline
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    use_worker(monkeypatch, tmp_path, BUILDS)
    result = pi05c(*command)
    assert result.status == 0
    assert f"{TAKEN}: the rewritten graph and its verification" in result.err
    assert (place / "engine" / PLAN).read_bytes().startswith(b"plan of")
    assert [path.name for path in place.iterdir()] == ["engine"]
