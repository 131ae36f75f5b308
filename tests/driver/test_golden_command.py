"""`pi05c golden` as a user types it: cases in TOML and in metadata, exit status, what it prints and writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from small_policy import policy, write_samples

from pi05c import cli
from pi05c.golden import RESULT_SUFFIX

__all__ = ["policy"]

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "golden"

Golden = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def golden(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Golden:
    monkeypatch.setenv("PI05C_CACHE", str(tmp_path / "cache"))

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        status = cli.main(["golden", *map(str, arguments)])
        return (status, *capsys.readouterr())

    return command


@pytest.fixture
def cases(policy: Path, tmp_path: Path) -> Path:
    """Two cases of a user: one file each, the texts written."""
    folder = tmp_path / "cases"
    folder.mkdir()
    onnx.save(onnx.load(policy), folder / "policy.onnx")
    (folder / "exact.toml").write_text('model = "policy.onnx"\npasses = "exact"\n')
    (folder / "half.toml").write_text(
        'model = "policy.onnx"\npasses = "fp16"\nshows = "It runs in float16."\ncalibration = ["samples.npz"]\n'
    )
    write_samples(folder / "samples.npz")
    assert cli.main(["golden", "update", str(folder), "--quiet"]) == 0
    return folder


def test_our_own_texts_are_as_kept(golden: Golden) -> None:
    count = len(list(GOLDEN.glob("*/*.txt")))
    assert golden("check", GOLDEN) == (0, f"{count} texts are as kept\n", "")


def test_update_writes_the_graph_and_what_each_pass_did(cases: Path) -> None:
    text = (cases / f"half{RESULT_SUFFIX}").read_text()
    assert text.startswith("# It runs in float16.\n# canonicalize: ")
    assert "# lower_precision: " in text
    assert "{to=float16}" in text
    assert not (cases / f"exact{RESULT_SUFFIX}").read_text().count("float16")


def test_check_of_what_was_updated_finds_nothing(golden: Golden, cases: Path) -> None:
    assert golden("check", cases) == (0, "2 texts are as kept\n", "")
    assert golden("update", cases) == (0, "0 of 2 texts changed\n", "")


def add_relu(path: Path) -> None:
    proto = onnx.load(path)
    last = proto.graph.node[-1]
    end = last.output[0]
    last.output[0] = "before_relu"
    proto.graph.node.append(onnx.helper.make_node("Relu", ["before_relu"], [end], "end.Relu"))
    onnx.save(proto, path)


def test_a_change_exits_1_and_is_shown(golden: Golden, cases: Path) -> None:
    add_relu(cases / "policy.onnx")
    status, out, err = golden("check", cases)
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert f"--- kept exact{RESULT_SUFFIX}" in lines
    assert any(line.startswith("+%") and "Relu(%before_relu)" in line for line in lines)
    assert lines[-1] == f"2 of 2 texts differ; if this is meant: pi05c golden update {cases}"
    assert golden("update", cases)[0] == 0
    assert golden("check", cases)[0] == 0


def test_markdown_is_for_a_pull_request(golden: Golden, cases: Path) -> None:
    assert golden("check", cases, "--format", "markdown")[1].endswith("All 2 are as kept.\n")
    add_relu(cases / "policy.onnx")
    status, out, _ = golden("check", cases, "--format", "markdown")
    assert status == 1
    assert f"<details><summary>exact{RESULT_SUFFIX}</summary>" in out
    assert out.count("```diff") == 2
    assert "Relu(%before_relu)" in out


def test_json_is_for_programs(golden: Golden, cases: Path) -> None:
    assert json.loads(golden("check", cases, "--json")[1]) == {"texts": 2, "different": []}
    add_relu(cases / "policy.onnx")
    status, out, _ = golden("check", cases, "--json")
    assert status == 1
    assert [entry["path"] for entry in json.loads(out)["different"]] == [
        f"exact{RESULT_SUFFIX}",
        f"half{RESULT_SUFFIX}",
    ]


def test_a_missing_text_and_one_too_many_are_differences(golden: Golden, cases: Path) -> None:
    (cases / f"exact{RESULT_SUFFIX}").rename(cases / f"old{RESULT_SUFFIX}")
    status, out, _ = golden("check", cases)
    assert status == 1
    assert "--- nothing is kept" in out
    assert "+++ no case makes it" in out
    assert golden("update", cases)[0] == 0
    assert not (cases / f"old{RESULT_SUFFIX}").exists()
    assert golden("check", cases)[0] == 0


def test_one_file_may_list_several_cases(golden: Golden, cases: Path) -> None:
    folder = cases.parent / "list"
    folder.mkdir()
    (folder / "golden.toml").write_text(
        '[case.plain]\nmodel = "../cases/policy.onnx"\npasses = "none"\n'
        '[case.half]\nmodel = "../cases/policy.onnx"\npasses = "fp16"\n'
        "ranges = { observation = [-4.0, 4.0] }\n"
    )
    assert golden("update", folder)[0] == 0
    assert {path.name for path in folder.iterdir()} == {
        "golden.toml",
        f"plain{RESULT_SUFFIX}",
        f"half{RESULT_SUFFIX}",
    }


def test_a_case_in_metadata_is_one_of_the_pass_that_its_folder_names(golden: Golden, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "dedupe", tmp_path / "golden" / "dedupe")
    twins = tmp_path / "golden" / "dedupe" / "twins.after.txt"
    twins.write_text(twins.read_text().replace("changed: ", "was changed: "))
    status, out, _ = golden("check", tmp_path / "golden")
    assert status == 1
    assert "--- kept dedupe/twins.after.txt" in out
    assert golden("update", tmp_path / "golden")[0] == 0
    assert twins.read_text() == (GOLDEN / "dedupe" / "twins.after.txt").read_text()


@pytest.mark.parametrize(
    ("toml", "reason"),
    [
        ("model = ", "is no TOML: "),
        ('passes = "exact"\n', "does not hold a golden case: model: "),
        ('model = "policy.onnx"\nlimits = 3\n', "does not hold a golden case: limits: "),
        ('model = "none.onnx"\n', "there is no file "),
        ('model = "policy.onnx"\npasses = "exakt"\n', "--passes names 'exakt'"),
        ('model = "policy.onnx"\npasses = "default"\n', "needs the ranges of "),
    ],
)
def test_trouble_exits_2_and_names_the_case(golden: Golden, cases: Path, toml: str, reason: str) -> None:
    (cases / "bad.toml").write_text(toml)
    for command in ("check", "update"):
        status, out, err = golden(command, cases)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert reason in err
        assert str(cases / "bad.toml") in err


def test_a_folder_without_cases_is_trouble(golden: Golden, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        status, _, err = golden("check", folder)
        assert status == 2
        assert str(folder) in err
    assert golden("check", tmp_path, "--json", "--format", "markdown")[0] == 2


def test_the_example_workflow_runs_commands_that_exist() -> None:
    page = (ROOT / "docs" / "golden.md").read_text()
    assert "pi05c golden check golden --format markdown" in page


def test_passes_of_a_plug_in_stand_in_a_case(golden: Golden, cases: Path) -> None:
    plugin = cases / "mine.py"
    plugin.write_text(
        "from pi05c.passes import graph_pass\n"
        "@graph_pass(exact=True)\n"
        "def rename_product(graph, ctx):\n"
        '    """Rename what the MatMul makes."""\n'
        '    node = next(node for node in graph.nodes if node.op == "MatMul")\n'
        '    if node.outputs[0].name != "renamed_product":\n'
        '        node.outputs[0].name = "renamed_product"\n'
        "        ctx.changed(node)\n"
    )
    (cases / "mine.toml").write_text(
        'model = "policy.onnx"\npasses = "rename_product"\nplugins = ["mine.py"]\n'
    )
    status, out, _ = golden("update", cases)
    assert status == 0
    assert out.endswith("\n1 of 3 texts changed\n")
    assert "%renamed_product: " in (cases / f"mine{RESULT_SUFFIX}").read_text()
    assert golden("check", cases) == (0, "3 texts are as kept\n", "")
    (cases / "mine.toml").write_text(
        'model = "policy.onnx"\npasses = "rename_product"\nplugins = ["none.py"]\n'
    )
    status, _, err = golden("check", cases)
    assert status == 2
    assert "there is no plug-in" in err
