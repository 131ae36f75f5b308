"""`pi05c diff` as a user types it: what it prints in each form, by pass, and its exit status."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_policy import policy

from pi05c import cli
from pi05c.diffing import diff_files
from pi05c.diffview import CONTEXT_LINES
from pi05c.graph import weights
from pi05c.graph.io import load, save
from pi05c.passes import PRESETS
from pi05c.passes.pipeline import parse, run
from pi05c.stages import StageFolder

__all__ = ["policy"]

GOLDEN = Path(__file__).parents[2] / "golden"

LOOP = GOLDEN / "fuse_denoise_loop" / "unrolled.onnx"
"""A small graph with a Loop."""

Diff = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def diff(capsys: pytest.CaptureFixture[str]) -> Diff:
    def command(*arguments: str | Path) -> tuple[int, str, str]:
        status = cli.main(["diff", *map(str, arguments)])
        return (status, *capsys.readouterr())

    return command


def edit(source: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a model with its weights inside, changed."""
    proto = onnx.load(source)
    change(proto)
    onnx.save(proto, target)
    return target


def rename(proto: onnx.ModelProto) -> None:
    names: dict[str, str] = {}
    for node in proto.graph.node:
        node.name = f"other {node.name}"
        for name in node.output:
            names[name] = f"other {name}"
    for output in proto.graph.output:
        names[output.name] = output.name
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def add_relu(proto: onnx.ModelProto) -> None:
    last = proto.graph.node[-1]
    end = last.output[0]
    last.output[0] = "before <script>alert(1)</script> `relu`"
    proto.graph.node.append(helper.make_node("Relu", [last.output[0]], [end], "end.Relu"))


@pytest.fixture
def relu(policy: Path, tmp_path: Path) -> Path:
    return edit(policy, tmp_path / "relu.onnx", add_relu)


def test_equal_files_print_nothing_and_exit_0(diff: Diff, policy: Path) -> None:
    assert diff(policy, policy) == (0, "", "")


def test_a_renamed_graph_differs_only_where_names_are_asked_for(
    diff: Diff, policy: Path, tmp_path: Path
) -> None:
    other = edit(policy, tmp_path / "renamed.onnx", rename)
    assert diff(policy, other) == (0, "", "")
    status, out, _ = diff(policy, other, "--names")
    assert status == 1
    assert "renamed" in out


def test_text_shows_what_was_added(diff: Diff, policy: Path, relu: Path) -> None:
    status, out, err = diff(policy, relu)
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert lines[:3] == [f"--- {policy}", f"+++ {relu}", "nodes: 1 added"]
    changed = [line for line in lines[3:] if line.startswith(("+", "-"))]
    assert len(changed) == 1
    assert changed[0].startswith("+ ")
    assert " = Relu(" in changed[0]


def test_mirrored_it_is_removed(diff: Diff, policy: Path, relu: Path) -> None:
    assert diff(relu, policy)[1].splitlines()[2] == "nodes: 1 removed"


def test_json_is_for_programs(diff: Diff, policy: Path, relu: Path) -> None:
    status, out, _ = diff(policy, relu, "--json")
    found = json.loads(out)
    assert status == 1
    assert found["same"] is False
    assert found["counts"] == {"node": {"added": 1}}
    (change,) = found["changes"]
    assert (change["thing"], change["kinds"], change["name"]) == ("node", ["added"], "end.Relu")
    assert json.loads(diff(policy, policy, "--json")[1])["same"] is True


def test_markdown_holds_names_in_a_fence_that_they_cannot_close(
    diff: Diff, policy: Path, tmp_path: Path
) -> None:
    def add_fence(proto: onnx.ModelProto) -> None:
        add_relu(proto)
        proto.graph.node[-1].input[0] = proto.graph.node[-2].output[0] = "a\n````\n# not a heading"

    other = edit(policy, tmp_path / "fence.onnx", add_fence)
    status, out, _ = diff(policy, other, "--format", "markdown")
    assert status == 1
    assert "| all | nodes: 1 added |" in out
    assert out.count("`````diff") == 1
    assert "No difference." in diff(policy, policy, "--format", "markdown")[1]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_self_contained_and_escaped(diff: Diff, policy: Path, relu: Path, tmp_path: Path) -> None:
    page = tmp_path / "diff.html"
    status, out, _ = diff(policy, relu, "--format", "html", "-o", page)
    assert (status, out) == (1, "")
    parser = _Page()
    parser.feed(page.read_text())
    assert "script" not in parser.tags
    assert parser.links == []
    assert "<script>alert(1)</script>" in parser.text
    assert "Relu(" in parser.text


def test_page_leaves_out_what_is_equal(diff: Diff, tmp_path: Path) -> None:
    unrolled = load(LOOP)
    run(unrolled, parse("fuse_denoise_loop", PRESETS))
    save(unrolled, tmp_path / "unrolled.onnx")
    relu = edit(tmp_path / "unrolled.onnx", tmp_path / "relu.onnx", add_relu)
    out = diff(tmp_path / "unrolled.onnx", relu, "--format", "html")[1]
    nodes = len(unrolled.graph.nodes)
    assert f">{nodes - CONTEXT_LINES} equal lines<" in out
    assert out.count('<tr class="equal">') == CONTEXT_LINES


def test_page_shows_both_sides_of_a_body(diff: Diff, tmp_path: Path) -> None:
    case = GOLDEN / "canonicalize" / "loop_body.onnx"
    model = load(case)
    run(model, parse("canonicalize", PRESETS))
    save(model, tmp_path / "after.onnx")
    status, out, _ = diff(case, tmp_path / "after.onnx", "--format", "html")
    assert status == 1
    rows = re.findall(r'<tr class="(\w+)">\s*<td class="code left[^>]*>(.*?)</td>', out, re.DOTALL)
    assert ("equal", "  body:") in rows
    assert any(kind == "removed" and "    %scaled_copy" not in text for kind, text in rows)


def test_every_form_goes_to_a_file(diff: Diff, policy: Path, relu: Path, tmp_path: Path) -> None:
    for form in (["--json"], ["--format", "text"], ["--format", "markdown"]):
        printed = diff(policy, relu, *form)[1]
        assert diff(policy, relu, *form, "-o", tmp_path / "out") == (1, "", "")
        assert (tmp_path / "out").read_text() == printed
    assert diff(policy, relu, "-o", tmp_path / "none" / "out")[0] == 2


@pytest.mark.parametrize("missing", [0, 1])
def test_trouble_exits_2(diff: Diff, policy: Path, tmp_path: Path, missing: int) -> None:
    files = [policy, policy]
    files[missing] = tmp_path / "none.onnx"
    status, out, err = diff(*files)
    assert (status, out) == (2, "")
    assert err == f"error: there is no file {tmp_path / 'none.onnx'}\n"


def test_two_forms_at_once_are_refused(diff: Diff, policy: Path) -> None:
    assert diff(policy, policy, "--json", "--format", "html")[0] == 2
    assert diff(policy, policy, "--format", "pdf")[0] == 2


# Weights


def test_recorded_checksums_are_believed_and_nothing_is_read(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(load(policy), tmp_path / "saved.onnx")

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(weights.Stored, "chunks", refuse)
    found = diff_files(tmp_path / "saved.onnx", tmp_path / "saved.onnx")
    assert found.same
    assert found.hashed.tensors == 0


@pytest.mark.parametrize("checksum", [None, "da39a3ee5e6b4b0d3255bfef95601890afd80709"])
def test_without_a_sha256_weights_are_read_and_it_is_said(
    diff: Diff, policy: Path, tmp_path: Path, checksum: str | None
) -> None:
    """The other checksum is a SHA-1 of the whole file, as ONNX's documentation has it."""

    def strip(proto: onnx.ModelProto) -> None:
        weight = next(t for t in proto.graph.initializer if len(t.raw_data) > 1024)
        values = numpy_helper.to_array(weight).copy()
        values.reshape(-1)[0] += np.asarray(1, values.dtype)
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))

    paths = []
    for name, change in (("a", lambda proto: None), ("b", strip)):
        folder = tmp_path / name
        folder.mkdir()
        proto = onnx.load(policy)
        change(proto)
        onnx.save(
            proto, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=1024
        )
        stripped = onnx.load(folder / "m.onnx", load_external_data=False)
        for tensor in stripped.graph.initializer:
            entries = [entry for entry in tensor.external_data if entry.key != "checksum"]
            if tensor.external_data:
                del tensor.external_data[:]
                tensor.external_data.extend(entries)
                if checksum is not None:
                    tensor.external_data.add(key="checksum", value=checksum)
        (folder / "m.onnx").write_bytes(stripped.SerializeToString())
        paths.append(folder / "m.onnx")
    status, out, _ = diff(*paths)
    assert status == 1
    assert out.splitlines()[2] == "initializers: 1 changed"
    assert "have no recorded SHA-256 and were read" in out
    assert diff(paths[0], paths[0])[0] == 0


# Stages of one run


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    """Every stage of the exact passes and float16, as `--dump` leaves them."""
    text = "canonicalize,fuse_denoise_loop,dedupe,lower_precision"
    folder = StageFolder(tmp_path / "stages", text)
    model = load(LOOP)
    folder.write(model, 0, None)
    for number, step in enumerate(parse(text, PRESETS), 1):
        run(model, [step])
        folder.write(model, number, step.spec.name)
    return folder.folder


def test_differences_of_stages_name_their_pass(diff: Diff, stages: Path) -> None:
    status, out, _ = diff(stages / "00-input.onnx", stages / "04-lower_precision.onnx", "--json")
    assert status == 1
    found = json.loads(out)
    assert found["passes"] == ["01-canonicalize", "02-fuse_denoise_loop", "03-dedupe", "04-lower_precision"]
    assert all(change["passes"] for change in found["changes"])
    added_casts = [
        change
        for change in found["changes"]
        if change["kinds"] == ["added"] and "= Cast(" in change["after"] and "{to=float16}" in change["after"]
    ]
    assert added_casts
    assert {tuple(change["passes"]) for change in added_casts} == {("04-lower_precision",)}
    loop = next(change for change in found["changes"] if change["before"] and "Loop(" in change["before"])
    assert loop["kinds"] == ["removed"]
    assert loop["passes"] == ["02-fuse_denoise_loop"]


def test_backwards_the_same_passes_are_named(diff: Diff, stages: Path) -> None:
    out = diff(stages / "04-lower_precision.onnx", stages / "01-canonicalize.onnx", "--json")[1]
    found = json.loads(out)
    assert found["passes"] == ["04-lower_precision", "03-dedupe", "02-fuse_denoise_loop"]
    loop = next(change for change in found["changes"] if change["after"] and "Loop(" in change["after"])
    assert loop["passes"] == ["02-fuse_denoise_loop"]


def test_text_of_stages_has_a_heading_for_each_pass(diff: Diff, stages: Path) -> None:
    out = diff(stages / "01-canonicalize.onnx", stages / "04-lower_precision.onnx")[1]
    headings = [line for line in out.splitlines() if line.startswith("@@")]
    assert any(line.startswith("@@ 02-fuse_denoise_loop: ") for line in headings)
    assert any(line.startswith("@@ 04-lower_precision: ") for line in headings)
    page = diff(stages / "01-canonicalize.onnx", stages / "04-lower_precision.onnx", "--format", "html")[1]
    assert "04-lower_precision" in page


def test_stages_of_which_one_is_missing_have_no_passes(diff: Diff, stages: Path) -> None:
    (stages / "02-fuse_denoise_loop.onnx").unlink()
    out = diff(stages / "00-input.onnx", stages / "04-lower_precision.onnx", "--json")[1]
    assert json.loads(out)["passes"] == []


def test_stages_of_two_runs_have_no_passes(diff: Diff, stages: Path, tmp_path: Path) -> None:
    shutil.copytree(stages, tmp_path / "other")
    out = diff(stages / "00-input.onnx", tmp_path / "other" / "04-lower_precision.onnx", "--json")[1]
    assert json.loads(out)["passes"] == []


@pytest.mark.parametrize("passes", [pytest.param("default", marks=pytest.mark.slow), "nvfp4"])
def test_two_runs_of_one_compile_differ_in_nothing(
    diff: Diff, brief_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: str
) -> None:
    """Each with ranges of its own, measured anew."""
    for run_name in ("one", "two"):
        arguments = ["--passes", passes, "--backend", "onnxruntime", "-o", str(tmp_path / run_name), "-q"]
        monkeypatch.setenv("PI05C_CACHE", str(tmp_path / f"{run_name}-cache"))
        assert cli.main([str(brief_model), *arguments]) == 0
    assert diff(tmp_path / "one", tmp_path / "two", "--names")[:2] == (0, "")
