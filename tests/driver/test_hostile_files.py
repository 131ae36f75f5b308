"""Files beside the model that lie: samples, checkpoints, manifests and metadata; and names that a terminal would obey."""

from __future__ import annotations

import io
import json
import math
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Command
from small_folder import write_engine
from small_policy import policy, wrecking_pass, write_policy, write_samples

from pi05c.calibration import FORMAT, read_ranges
from pi05c.graph import npz
from pi05c.graph.errors import Pi05cError
from pi05c.graph.npz import read_npz
from pi05c.tunemeasure import Store

__all__ = ["policy", "wrecking_pass"]

SHAPE = (1, 8, 32)
GOOD = np.zeros(SHAPE, np.float32)


def member(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=True)
    return buffer.getvalue()


def header(shape: str, descr: str = "'<f4'") -> bytes:
    """The beginning of a .npy file that declares what is given."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as written:
        for name, content in members.items():
            written.writestr(name, content)
    return buffer.getvalue()


def patched(data: bytes, signature: bytes, offset: int, content: bytes) -> bytes:
    """An archive whose last header of a kind holds something else (PKWARE APPNOTE 4.3)."""
    place = data.rindex(signature) + offset
    return data[:place] + content + data[place + len(content) :]


LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
PACKED = archive({"x.npy": member(np.random.default_rng(0).standard_normal(SHAPE))}, zipfile.ZIP_DEFLATED)
STORED = archive({"x.npy": member(GOOD)})
BROKEN_STREAM = PACKED.index(b"x.npy") + 60


class _Runs:
    """What pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (archive({"x.npy": member(np.array([_Runs()], object))}), "pickled Python objects"),
        (archive({"x.npy": member(np.array([_Runs()], object))}, zipfile.ZIP_DEFLATED), "pickled Python objects"),
        (archive({"x.npy": member(np.zeros(1, [("a", "O")]))}), "pickled Python objects"),
        (member(GOOD), "a single array without a name"),
        (archive({"x": b"text"}), "is no array"),
        (archive({"x.npy": b"text"}), "magic string"),
        (archive({"x.npy": header("(1, 8, 1099511627776)")}), "holds 0 bytes"),
        (archive({"x.npy": header("(1, 8, 1099511627776)")}, zipfile.ZIP_DEFLATED), "holds 0 bytes"),
        (archive({"x.npy": header(str((2**70, 8)))}), "holds 0 bytes"),
        (archive({"x.npy": header("(-1, 8, 32)") + bytes(1024)}), "holds 1024 bytes"),
        (archive({"x.npy": header("(-1, -8, 32)") + bytes(1024)}), "holds 1024 bytes"),
        (archive({"x.npy": header("(1, 8, 16)") + bytes(1024)}), "holds 1024 bytes"),
        (archive({"x.npy": header("(" * 9000)}), "cannot be read"),
        (archive({"x.npy": header("__import__('os').abort()")}), "cannot be read"),
        (archive({"x.npy": header("(1,)", "'zzz'")}), "cannot be read"),
        (archive({"x.npy": b"\x93NUMPY\x09\x00" + bytes(64)}), "cannot be read"),
        (STORED[: len(STORED) // 2], "not a zip file"),
        (b"", "not a zip file"),
        (patched(patched(PACKED, CENTRAL, 8, b"\x01\x00"), LOCAL, 6, b"\x01\x00"), "is encrypted"),
        (patched(patched(PACKED, CENTRAL, 10, b"\x63\x00"), LOCAL, 8, b"\x63\x00"), "compression method"),
        (PACKED[:BROKEN_STREAM] + bytes(40) + PACKED[BROKEN_STREAM + 40 :], "cannot be read"),
        (patched(PACKED, CENTRAL, 16, bytes(4)), "Bad CRC-32"),
        (patched(STORED, CENTRAL, 42, b"\xff\xff\xff\x7f"), "cannot be read"),
        (patched(STORED, LOCAL, 26, b"\xff\xff"), "cannot be read"),
        (patched(STORED, CENTRAL, 24, struct.pack("<I", 2**31)), "cannot be read"),
    ],
)  # fmt: skip
def test_samples_that_are_not_what_they_say(
    pi05c: Command, policy: Path, tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    arguments = (policy, "--passes", "none", "-o", tmp_path / "engine", "--backend", "onnxruntime")
    result = pi05c(*arguments, "--calibration", tmp_path / "bad.npz")
    assert result.status == 1
    (error,) = result.err.splitlines()
    assert f"{tmp_path / 'bad.npz'} " in error
    assert said in error
    assert "defect" not in error


def test_what_little_data_unpacks_to_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive({"x.npy": header("(1048576,)", "'|u1'") + bytes(2**20)}, zipfile.ZIP_DEFLATED)
    (tmp_path / "bomb.npz").write_bytes(content)
    assert len(content) < 2**12
    assert read_npz(tmp_path / "bomb.npz")["x"].shape == (2**20,)
    monkeypatch.setattr(npz, "UNPACKED_BYTES", 2**19)
    with pytest.raises(Pi05cError, match=r"unpacks to more than .* save it with numpy\.savez"):
        read_npz(tmp_path / "bomb.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "array", [GOOD, np.asfortranarray(GOOD), np.zeros((0, 3)), np.float32(1), np.array(True)]
)
def test_plain_arrays_are_read_as_numpy_reads_them(
    tmp_path: Path, save: Callable[..., None], array: Any
) -> None:
    save(tmp_path / "good.npz", x=array)
    found = read_npz(tmp_path / "good.npz")["x"]
    np.testing.assert_array_equal(found, array)
    assert found.dtype == np.asarray(array).dtype


# Checkpoints


def _entry(**changed: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changed}


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]", "null", "{", "[" * 100_000, '{"a":' * 100_000, '{"a": 3}', '{"a": null}',
        json.dumps({"a": _entry(shape=["9"])}), json.dumps({"a": _entry(shape=None)}),
        json.dumps({"a": _entry(shape=[-2, -2])}), json.dumps({"a": _entry(shape=[4.0])}),
        json.dumps({"a": _entry(shape=[True, 4])}), json.dumps({"a": _entry(shape=[2**62, 2**62])}),
        '{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 1e999]}}',
        '{"a": {"dtype": "F32", "shape": [' + "9" * 6000 + '], "data_offsets": [0, 16]}}',
        json.dumps({"a": _entry(dtype=[])}), json.dumps({"a": _entry(dtype={"a": 1})}), json.dumps({"a": _entry(dtype=None)}),
        json.dumps({"a": _entry(data_offsets=[16, 0])}), json.dumps({"a": _entry(data_offsets=[-16, 0])}),
        json.dumps({"a": _entry(data_offsets=[1])}), json.dumps({"a": _entry(data_offsets="ab")}),
        json.dumps({"a": _entry(data_offsets=[0, 2**70])}), json.dumps({"a": _entry(data_offsets=[10**12, 10**12 + 16])}),
        json.dumps({"a": _entry(), "b": _entry(data_offsets=[8, 24])}),
    ],
)  # fmt: skip
def test_headers_of_checkpoints_that_lie(tmp_path: Path, reference_dir: Path, text: str) -> None:
    pytest.importorskip("torch", reason="reading a checkpoint needs the extra [torch]")
    from pi05c.frontend.checkpoint import open_checkpoint

    shutil.copy(reference_dir / "config.json", tmp_path)
    encoded = text.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(64))
    with pytest.raises(Pi05cError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [0, 2**40, 2**63, 2**64 - 1])
def test_headers_of_a_length_that_the_file_has_not(tmp_path: Path, reference_dir: Path, length: int) -> None:
    pytest.importorskip("torch", reason="reading a checkpoint needs the extra [torch]")
    from pi05c.frontend.checkpoint import open_checkpoint

    shutil.copy(reference_dir / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" + bytes(64))
    with pytest.raises(Pi05cError, match="is not a safetensors file, or is truncated"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"action_horizon": 10**12}, {"action_horizon": "x"}, {"action_dim": True}, {"paligemma_variant": []},
        {"image_resolution": 5}, {"input_features": [1]}, {"input_features": {"observation.images.a": 3}},
        {"input_features": {"observation.images.a": {"type": "VISUAL"}}, "empty_cameras": 10**9},
        {"architecture": 3}, {"architecture": {"vision": {"width": 10**12}}},
    ],
)  # fmt: skip
def test_configurations_that_nobody_can_build(
    tmp_path: Path, reference_dir: Path, changes: dict[str, Any]
) -> None:
    pytest.importorskip("torch", reason="reading a checkpoint needs the extra [torch]")
    from pi05c.frontend.checkpoint import open_checkpoint

    shutil.copy(reference_dir / "model.safetensors", tmp_path)
    fields = json.loads((reference_dir / "config.json").read_text())
    if "paligemma_variant" in changes:
        del fields["architecture"]
    for key, value in changes.items():
        fields[key] = (
            {**fields[key], "vision": {**fields[key]["vision"], **value["vision"]}}
            if isinstance(value, dict) and key == "architecture"
            else value
        )
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(Pi05cError):
        open_checkpoint(tmp_path)


# Manifests and metadata


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "null", "3", '{"format": 3}', '{"format": ' + "9" * 6000 + "}"]
)
def test_manifests_that_are_none(pi05c: Command, tmp_path: Path, text: str) -> None:
    engine = write_engine(tmp_path / "engine")
    (engine / "manifest.json").write_text(text)
    for command in ("inspect", "verify", "build"):
        result = pi05c(command, engine)
        assert result.status == 1
        assert "defect" not in result.err


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "parts/../../secret"])
def test_manifests_that_point_out_of_their_folder(pi05c: Command, tmp_path: Path, name: str) -> None:
    engine = write_engine(tmp_path / "engine")
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 3, "sha256": "0"}
    (engine / "manifest.json").write_text(json.dumps(manifest))
    result = pi05c("verify", engine)
    assert result.status == 1
    assert "lies outside of the folder" in result.err


INSPECT, VERIFY, BUILD, BENCH = (
    ("inspect", "--json"),
    ("verify", "--json"),
    ("build",),
    ("bench", "--runs", "1", "--json"),
)
LYING_VALUES: list[tuple[tuple[str, ...], tuple[Any, ...], Any]] = [
    (VERIFY, ("inputs", 0, "dtype"), "float31"),
    (BENCH, ("inputs", 0, "shape", 0), -1),
    (BENCH, ("inputs", 0, "shape", 0), 10**30),
    (BENCH, ("inputs", 0, "fixed"), [True]),
    (INSPECT, ("inputs", 0, "low"), math.nan),
    (INSPECT, ("inputs", 0, "high"), -math.inf),
    (VERIFY, ("outputs", 0, "dtype"), "undefined"),
    (VERIFY, ("verification", "limit"), math.nan),
    (INSPECT, ("pipeline", "passes", 0, "seconds"), math.inf),
    (BENCH, ("source", "config"), {"architecture": {"llm": {"vocab_size": math.inf}}}),
    (INSPECT, ("source", "robot"), [math.nan]),
    (INSPECT, ("engine", "file"), "absent.engine"),
    (BUILD, ("engine", "options", "shapes"), [3]),
    (BUILD, ("engine", "options", "shapes"), {"x": 3}),
    (BUILD, ("engine", "options", "shapes"), {"x": [[1], [1]]}),
]


def test_manifests_whose_values_do_not_fit(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    assert pi05c(policy, "--passes", "canonicalize", "-o", engine, "--target", "h100").status == 0
    written = (engine / "manifest.json").read_text()
    for words, place, value in LYING_VALUES:
        manifest = at = json.loads(written)
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value
        (engine / "manifest.json").write_text(json.dumps(manifest))
        result = pi05c(words[0], engine, *words[1:])
        assert "defect" not in result.err, (place, value)
        assert (result.status == 0) == ("error: " not in result.err)
        if result.status == 0:
            json.loads(result.out, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "key", ["pi05c.config", "pi05c.robot", "pi05c.specialized", "pi05c.stage", "pi05c.step"]
)
@pytest.mark.parametrize("text", ["[" * 100_000, "}{", "9" * 6000, "[1, 2]", '{"a": {"b": 1}}', "null"])
def test_metadata_that_is_not_what_pi05c_writes(pi05c: Command, tmp_path: Path, key: str, text: str) -> None:
    model = write_policy(tmp_path / "model.onnx", metadata={key: text})
    for words in (
        (model, "--passes", "none", "-o", tmp_path / "engine", "--backend", "onnxruntime"),
        ("inspect", model),
    ):
        result = pi05c(*words)
        assert result.status in (0, 1)
        assert "defect" not in result.err


TEXTS: dict[str, bytes] = {
    "no UTF-8": b"\xff\xfe",
    "deep JSON": b"[" * 100_000,
    "deep TOML": b"x=" + b"[" * 5000,
    "a long number": b"x=" + b"9" * 6000,
    "a number alone": b"9" * 6000,
}


def test_text_that_is_none(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    """Of whatever kind, in the place of each file of text; a pipe is not waited for, a large file not read."""
    engine, golden, stages = write_engine(tmp_path / "engine"), tmp_path / "golden", tmp_path / "stages"
    golden.mkdir()
    (golden / "a.toml").write_text(f"model={json.dumps(str(policy))}\npasses='none'")
    assert pi05c("golden", "update", golden).status == 0
    assert pi05c(policy, "--passes", "fp16", "--dump", stages).status == 0
    stage = stages / "00-input.onnx"
    readers: list[tuple[Path, tuple[str | Path, ...]]] = [
        (tmp_path / "p.toml", (policy, "--passes", f"@{tmp_path / 'p.toml'}", "-o", tmp_path / "out")),
        (engine / "manifest.json", ("inspect", engine)),
        (stages / "ranges.json", ("explain", policy, "--pass", "lower_precision", "--start-from", stage)),
        (golden / "a.golden.txt", ("golden", "check", golden)),
        (golden / "a.toml", ("golden", "check", golden)),
    ]
    for path, words in readers:
        for kind in [*TEXTS, "a folder", "a pipe", "a large file", "a link to itself"]:
            path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
            if kind in TEXTS:
                path.write_bytes(TEXTS[kind])
            elif kind == "a folder":
                path.mkdir()
            elif kind == "a pipe":
                os.mkfifo(path)
            elif kind == "a large file":
                path.touch()
                os.truncate(path, 2**40)
            else:
                path.symlink_to(path)
            result = pi05c(*words)
            assert "defect" not in result.err, (path, kind)
            assert (result.status == 0) == ("error: " not in result.err and words[0] != "golden"), (
                path,
                kind,
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("samples",), math.inf), (("ranges", "x", 0), math.nan), (("ranges", "x", 0), 9e9), (("ranges", "x"), [1]),
        (("thresholds",), {"x": math.nan}), (("thresholds",), {"x": math.inf}), (("thresholds",), {"x": -1}),
        (("rows",), {"x": {"offset": -1, "shape": [2**62], "sha256": ""}}),
    ],
)  # fmt: skip
def test_ranges_that_are_none(tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    record: dict[str, Any] = {"format": FORMAT, "graph": "", "data": "", "source": "", "synthetic": False}
    record |= {"samples": 1, "ranges": {"x": [0, 1]}, "thresholds": {}, "left_out": {}, "rows": {}}
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps(record))
    assert read_ranges(path).high == {"x": 1}
    at = record
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    path.write_text(json.dumps(record))
    with pytest.raises(Pi05cError, match=r"ranges\.json|rows"):
        read_ranges(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"errors": [math.nan]}, {"errors": []}, {"errors": [-1]}, {"stored": math.inf}, {"read": -1},
        {"floors": {"h100": math.nan}}, {"floors": {"h100": 1e308}}, {"floors": 3}, {"cosines": [1, 1]},
    ],
)  # fmt: skip
def test_measurements_that_are_none_are_made_again(tmp_path: Path, changes: dict[str, Any]) -> None:
    good = {"errors": [0.1], "cosines": [1], "stored": 1, "read": 1, "floors": {"h100": 1}}
    for record, known in ((good, True), (good | changes, False)):
        (tmp_path / "r.json").write_text(json.dumps({"measurements": {"key": record}}))
        assert bool(Store(tmp_path / "r.json", ())._found) == known


def test_messages_are_cut(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    result = pi05c(policy, "--passes", "x" * 100_000, "-o", tmp_path / "out")
    assert result.status == 2
    assert len(result.err) < 5000
    assert "neither a pass nor a preset" in result.err


def test_names_are_shown_and_not_obeyed(pi05c: Command, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07[/red]\r<script>alert(1)</script>\n%y"
    path = write_policy(tmp_path / "model.onnx")
    proto = onnx.load(path, load_external_data=False)
    proto.graph.node[0].name = proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = evil
    proto.graph.input[0].name = proto.graph.node[0].input[0] = f"{evil}x"
    proto.metadata_props.add(key="pi05c.config", value=json.dumps(evil))
    path.write_bytes(proto.SerializeToString())
    other = write_policy(tmp_path / "other.onnx")
    engine = tmp_path / "engine"
    for words in (
        (path, "--passes", "exact", "-o", engine, "--backend", "onnxruntime", "--verbose"),
        (path, "--passes", "exact", "--print-after", "all"),
        ("inspect", path),
        ("inspect", engine),
        ("cost", path),
        ("explain", path, "--pass", "canonicalize"),
        ("explain", path, "--pass", "quantize_linears"),
        ("diff", path, other),
        ("diff", path, other, "--format", "markdown"),
        ("diff", path, other, "--names", "--format", "html", "-o", tmp_path / "diff.html"),
    ):
        result = pi05c(*words)
        assert "defect" not in result.err
        for text in (result.out, result.err):
            assert not {character for character in text if not character.isprintable()} - {"\n", "\t"}, words
    for page in (engine / "report.html", tmp_path / "diff.html"):
        text = page.read_text(encoding="utf-8")
        assert "<script>alert" not in text
        assert "&lt;script&gt;" in text or "\\x1b" in text or page.name == "report.html"


def test_names_in_what_bisect_writes(pi05c: Command, wrecking_pass: str, tmp_path: Path) -> None:
    """Names of nodes and tensors end no code block and no cell, and are no HTML and no command to a terminal."""
    evil = "\x1b]0;owned\x07`|<script>alert(1)</script>\n```\n# owned; $(touch owned) '\" \\"
    path = write_policy(tmp_path / "model.onnx")
    proto = onnx.load(path, load_external_data=False)
    product = next(node for node in proto.graph.node if node.op_type == "MatMul")
    renamed = {product.output[0]: f"{evil}t", "x": f"{evil}x"}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    product.name, proto.graph.input[0].name = evil, renamed["x"]
    path.write_bytes(proto.SerializeToString())
    write_samples(tmp_path / "model.calibration.npz")
    with np.load(tmp_path / "model.calibration.npz") as stored:
        np.savez(tmp_path / "renamed.npz", **{f"{evil}x": stored["x"]})
    found = tmp_path / "found"
    words = ("bisect", path, "--passes", "wreck", "--calibration", tmp_path / "renamed.npz", "-o", found)
    result = pi05c(*words)
    assert result.status == 1, result.err
    text = (found / "README.md").read_text(encoding="utf-8")
    for shown in (result.out, result.err, text):
        assert not {character for character in shown if not character.isprintable()} - {"\n", "\t"}
    outside, fence = [], ""
    for line in text.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if fence:
            fence = "" if line == fence else fence
        elif len(ticks) >= 3:
            fence = ticks
        else:
            outside.append(line)
    assert not fence
    prose = [re.sub(r"`[^`]*`", "", line) if line.startswith("|") else line for line in outside]
    assert any("&lt;script&gt;" in line for line in prose)
    assert not any("<script>" in line or line.startswith("# owned") for line in prose)
    rows = [line for line in outside if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3, 4}
    assert json.loads((found / "bisect.json").read_text())["names"] == [evil]


def test_names_in_what_debug_writes(pi05c: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that loads samples holds the path of the model, whatever it is, as a text and not as code."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'a""";open("owned", "w");"""\\'
    folder.mkdir()
    path = write_policy(folder / '"""\nopen("owned", "w")\n"""\x1b[31m.onnx')
    write_samples(path.with_suffix(".calibration.npz"))
    for words in (("debug", "canonicalize", path), ("data-loader", path, "-o", tmp_path / "loader.py")):
        result = pi05c(*words)
        assert result.status == 0, result.err
        assert "\x1b" not in result.out + result.err
    assert (tmp_path / "pi05c_samples.py").exists()
    for script in ("pi05c_samples.py", "loader.py"):
        loaded = runpy.run_path(str(tmp_path / script))["load_data"]()
        assert len(loaded)
    assert not (tmp_path / "owned").exists()


def test_plug_ins_load_only_when_they_are_named(policy: Path, tmp_path: Path) -> None:
    """A Python file beside the model, in the working folder or in the engine folder is none."""
    engine = tmp_path / "engine"
    for folder in (policy.parent, tmp_path):
        for name in ("passes.py", "plugin.py", "conftest.py", "pi05c_plugin.py", "wreck.py"):
            (folder / name).write_text("raise SystemExit('loaded')")
    command = (
        [sys.executable, "-P", "-m", "pi05c"]
        if sys.version_info >= (3, 11)
        else [sys.executable, "-m", "pi05c"]
    )
    words = [str(policy), "--passes", "none", "-o", str(engine), "--backend", "onnxruntime", "-q"]
    run = subprocess.run([*command, *words], cwd=policy.parent, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_folder_whose_name_is_no_text(pi05c: Command, tmp_path: Path) -> None:
    """onnxruntime takes UTF-8 alone; scripts hold the name as it is."""
    plain = tmp_path / "plain"
    plain.mkdir()
    write_samples(plain / "model.calibration.npz")
    write_policy(plain / "model.onnx")
    folder = plain.rename(tmp_path / os.fsdecode(b"\xff\xfe"))
    model = folder / "model.onnx"
    result = pi05c(model, "--passes", "none", "-o", tmp_path / "engine", "--backend", "onnxruntime")
    assert result.status == 1
    assert "whose name is no UTF-8: rename it, or go there by a link" in result.err
    (tmp_path / "link").symlink_to(folder)
    assert pi05c("data-loader", model, "-o", tmp_path / "loader.py").status == 0
    assert len(runpy.run_path(str(tmp_path / "loader.py"))["load_data"]()) == 1
    linked = tmp_path / "link" / "model.onnx"
    result = pi05c(linked, "--passes", "none", "-o", tmp_path / "engine", "--backend", "onnxruntime")
    assert result.status == 0, result.err


def test_without_a_home_nothing_is_kept(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container for a user that it does not know."""

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("PI05C_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    words = (policy, "--passes", "fp16", "-o", tmp_path / "engine", "--backend", "onnxruntime")
    for _ in range(2):
        result = pi05c(*words)
        assert (result.status, result.err) == (0, "")
