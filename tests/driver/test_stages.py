"""Runs of passes that are dumped, printed, checked, limited, stopped and gone on with."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Command
from small_policy import policy, wrecking_pass, write_policy

from pi05c import plugins
from pi05c.backend.onnxruntime import load_runner
from pi05c.folder import GRAPH
from pi05c.graph.io import load, location_of, tensors
from pi05c.graph.text import canonical_text
from pi05c.manifest import read_manifest
from pi05c.passes import PRESETS, REGISTRY
from pi05c.passes.pipeline import named
from pi05c.stages import STAGE_KEY, stage_files

__all__ = ["policy", "wrecking_pass"]

NO_PLAN = ("--backend", "onnxruntime")


@pytest.fixture
def stages(pi05c: Command, policy: Path, tmp_path: Path) -> Path:
    """The default pipeline on the small policy, dumped."""
    assert pi05c(policy, "--dump", tmp_path / "stages").status == 0
    return tmp_path / "stages"


def graph_of(path: Path) -> str:
    return canonical_text(load(path).graph)


def metadata_of(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


# Dumps


def test_each_stage_is_a_model_by_itself_and_names_its_place(stages: Path) -> None:
    names = ["input", *PRESETS["default"]]
    files = stage_files(stages)
    assert [path.name for path in files.values()] == [f"{i:02d}-{name}.onnx" for i, name in enumerate(names)]
    sample = {"x": np.load(stages / "samples.npz")["x"]}
    for number, path in files.items():
        onnx.checker.check_model(path, full_check=True)
        assert np.isfinite(load_runner(path).run(sample)["actions"]).all()
        place = json.loads(metadata_of(path)[STAGE_KEY])
        assert place == {
            "number": number,
            "pass": None if number == 0 else names[number],
            "pipeline": ",".join(PRESETS["default"]),
        }
        assert path.with_suffix(".txt").read_text() == graph_of(path)


def test_stages_share_their_data(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stages"
    assert (
        pi05c(policy, "--passes", "canonicalize,dedupe,lower_precision,canonicalize", "--dump", folder).status
        == 0
    )
    used = {
        path.name: {location_of(t) for t in tensors(onnx.load(path, load_external_data=False))} - {None}
        for path in stage_files(folder).values()
    }
    base = {"00-input.onnx.data"}
    assert used["00-input.onnx"] == used["02-dedupe.onnx"] == used["03-lower_precision.onnx"] == base
    assert used["04-canonicalize.onnx"] == {"04-canonicalize.onnx.data"}, (
        "the weight is stored in float16 now"
    )
    data = {path.name for path in folder.glob("*.data")}
    assert data == {"00-input.onnx.data", "04-canonicalize.onnx.data"}
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in folder.iterdir())


def test_beside_the_model_its_own_data_is_the_base(pi05c: Command, policy: Path) -> None:
    assert pi05c(policy, "--passes", "dedupe", "--dump", policy.parent).status == 0
    assert not list(policy.parent.glob("0*.data"))
    assert graph_of(policy.parent / "01-dedupe.onnx")


def test_dumping_changes_nothing(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    assert pi05c(policy, "-o", tmp_path / "a", *NO_PLAN).status == 0
    assert (
        pi05c(
            policy, "-o", tmp_path / "b", *NO_PLAN, "--dump", tmp_path / "s", "--verify-each=numbers"
        ).status
        == 0
    )
    assert (tmp_path / "a" / GRAPH).read_bytes() == (tmp_path / "b" / GRAPH).read_bytes()
    assert graph_of(tmp_path / "a" / GRAPH) == graph_of(max(stage_files(tmp_path / "s").values()))


def test_a_shorter_run_leaves_no_stage_of_a_longer_one(pi05c: Command, policy: Path, stages: Path) -> None:
    (stages / "notes.md").write_text("mine")
    assert pi05c(policy, "--passes", "dedupe", "--dump", stages).status == 0
    left = {path.name for path in stages.iterdir()}
    assert {"00-input.onnx", "00-input.onnx.data", "00-input.txt", "01-dedupe.onnx", "01-dedupe.txt"} < left
    assert left - {"samples.npz", "notes.md"} == {
        "00-input.onnx",
        "00-input.onnx.data",
        "00-input.txt",
        "01-dedupe.onnx",
        "01-dedupe.txt",
    }


def test_a_file_that_is_no_stage_is_not_replaced(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    mine = write_policy(tmp_path / "01-mine.onnx")
    before = mine.read_bytes()
    result = pi05c(policy, "--passes", "dedupe", "--dump", tmp_path)
    assert result.status == 1
    assert "01-mine.onnx" in result.err
    assert mine.read_bytes() == before


def test_the_model_that_is_read_is_not_replaced(pi05c: Command, stages: Path) -> None:
    result = pi05c(stages / "00-input.onnx", "--passes", "dedupe", "--dump", stages)
    assert result.status == 1
    assert "--start-from" in result.err
    assert load(stages / "00-input.onnx")


@pytest.mark.parametrize("name", ["01-notes.txt", "02-weights.onnx.data", "samples.npz", "ranges.json"])
def test_a_file_that_no_dump_left_is_not_replaced(
    pi05c: Command, policy: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("keep me")
    result = pi05c(policy, "--passes", "exact", "--dump", folder)
    assert result.status == 1
    assert name in result.err
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: "keep me"}


def test_samples_that_are_read_are_not_replaced(pi05c: Command, policy: Path, stages: Path) -> None:
    before = (stages / "samples.npz").read_bytes()
    result = pi05c(policy, "--calibration", stages / "samples.npz", "--dump", stages)
    assert result.status == 1
    assert "samples.npz, which is read" in result.err
    assert (stages / "samples.npz").read_bytes() == before


def test_going_on_into_another_folder_keeps_nothing_of_another_run(
    pi05c: Command, policy: Path, stages: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert pi05c(policy, "--passes", "exact", "--dump", other).status == 0
    start = next(path for number, path in stage_files(stages).items() if number == len(PRESETS["exact"]))
    assert pi05c(policy, "--start-from", start, "--dump", other).status == 0
    texts = {json.loads(metadata_of(path)[STAGE_KEY])["pipeline"] for path in stage_files(other).values()}
    assert texts == {",".join(PRESETS["default"])}
    assert min(stage_files(other)) == len(PRESETS["exact"])


def test_ranges_go_along_into_another_folder(
    pi05c: Command, policy: Path, stages: Path, tmp_path: Path
) -> None:
    *_, last = stage_files(stages).values()
    assert pi05c(policy, "--start-from", last, "--dump", tmp_path / "other").status == 0
    assert (tmp_path / "other" / "ranges.json").read_text() == (stages / "ranges.json").read_text()


def test_a_dump_inside_the_engine_folder_is_refused(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    result = pi05c(policy, "-o", tmp_path / "e", "--dump", tmp_path / "e" / "stages", *NO_PLAN)
    assert result.status == 2
    assert not (tmp_path / "e").exists()


def test_without_output_something_must_be_looked_at(pi05c: Command, policy: Path) -> None:
    result = pi05c(policy, "--passes", "exact")
    assert result.status == 2
    assert "--dump" in result.err


def test_two_compiles_give_one_graph(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert pi05c(policy, "-o", tmp_path / name, *NO_PLAN).status == 0
    assert pi05c("diff", tmp_path / "a", tmp_path / "b", "--names").status == 0
    assert (tmp_path / "a" / GRAPH).read_bytes() == (tmp_path / "b" / GRAPH).read_bytes()


# Going on, stopping, limiting


def test_going_on_from_any_stage_ends_at_the_same_graph(
    pi05c: Command, policy: Path, stages: Path, tmp_path: Path
) -> None:
    files = stage_files(stages)
    last = graph_of(files[max(files)])
    for number in range(len(files) - 1):
        folder = tmp_path / f"from_{number}"
        assert pi05c(policy, "--start-from", files[number], "--dump", folder).status == 0
        again = stage_files(folder)
        assert list(again) == list(files)[number:]
        assert graph_of(again[max(again)]) == last, f"from stage {number}"


def test_going_on_in_the_same_folder_keeps_the_stages_before(
    pi05c: Command, policy: Path, stages: Path
) -> None:
    kept = {path.name: path.read_bytes() for path in stages.iterdir()}
    start = next(stages.glob("*-lower_precision.onnx"))
    assert pi05c(policy, "--start-from", start, "--dump", stages).status == 0
    assert {path.name: path.read_bytes() for path in stages.iterdir()} == kept


def test_going_on_makes_an_engine_folder(pi05c: Command, policy: Path, stages: Path, tmp_path: Path) -> None:
    start = next(stages.glob("*-pin_fp32.onnx"))
    assert pi05c(policy, "-o", tmp_path / "whole", *NO_PLAN).status == 0
    assert pi05c(policy, "--start-from", start, "-o", tmp_path / "rest", *NO_PLAN).status == 0
    assert (tmp_path / "whole" / GRAPH).read_bytes() == (tmp_path / "rest" / GRAPH).read_bytes()
    assert STAGE_KEY not in metadata_of(tmp_path / "rest" / GRAPH)


def test_passes_behind_a_stage_may_differ(pi05c: Command, policy: Path, stages: Path, tmp_path: Path) -> None:
    start = next(stages.glob("01-*.onnx"))
    run = (policy, "--start-from", start, "--dump", tmp_path / "other")
    assert pi05c(*run, "--passes", "canonicalize,dedupe").status == 0
    assert list(stage_files(tmp_path / "other")) == [1, 2]
    result = pi05c(*run, "--passes", "dedupe,lower_precision")
    assert result.status == 2
    assert "canonicalize" in result.err
    assert pi05c(*run, "--passes", "none").status == 2


def test_only_a_stage_can_be_gone_on_from(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    result = pi05c(policy, "--start-from", policy, "--dump", tmp_path / "s")
    assert result.status == 1
    assert "no dumped stage" in result.err


@pytest.mark.parametrize(("name", "last"), [("canonicalize", 1), ("dedupe", 8), ("14-canonicalize", 14)])
def test_stopping(pi05c: Command, policy: Path, tmp_path: Path, name: str, last: int) -> None:
    text = "canonicalize,batch_views,drop_dead_prefix,fuse_denoise_loop,fuse_projections,fold_gqa,split_prefix_attention,"
    text += "dedupe,lower_precision,pin_fp32,quantize_linears,insert_attention_qdq,disable_conv2d_quant,canonicalize"
    folder = tmp_path / "s"
    assert pi05c(policy, "--passes", text, "--dump", folder, "--stop-after", name).status == 0
    assert max(stage_files(folder)) == last


@pytest.mark.parametrize(
    "option", [("--stop-after", "dedup"), ("--print-after", "dedup"), ("--rewrite-limit", "dedup=1")]
)
def test_a_pass_that_does_not_run_is_named(
    pi05c: Command, policy: Path, tmp_path: Path, option: tuple[str, str]
) -> None:
    result = pi05c(policy, "--dump", tmp_path / "s", *option)
    assert result.status == 2
    assert "'dedup'" in result.err
    assert "fold_gqa" in result.err


@pytest.mark.parametrize("limit", ["x", "-1", "canonicalize=", "=3"])
def test_a_limit_that_is_no_number_is_refused(
    pi05c: Command, policy: Path, tmp_path: Path, limit: str
) -> None:
    assert pi05c(policy, "--dump", tmp_path / "s", f"--rewrite-limit={limit}").status == 2


def test_limits_count_rewrites(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    def rewrites(*options: str) -> dict[str, int]:
        result = pi05c(policy, "--passes", "fp16", "--dump", tmp_path / "s", "--json", *options)
        assert result.status == 0, result.err
        return {found["name"]: found["rewrites"] for found in json.loads(result.out)["passes"]}

    whole = rewrites()
    assert whole["lower_precision"] == 2
    assert rewrites("--rewrite-limit", "lower_precision=1")["lower_precision"] == 1
    assert set(rewrites("--rewrite-limit", "0").values()) == {0}
    assert graph_of(max(stage_files(tmp_path / "s").values())) == graph_of(policy)


# Printing


def test_printing_after_one_pass(pi05c: Command, policy: Path) -> None:
    result = pi05c(policy, "--passes", "exact", "--print-after", "canonicalize")
    assert result.status == 0
    title, *lines = result.err.splitlines()
    assert title == "# 01-canonicalize: 1 changed, 0 skipped"
    assert lines[0] == "inputs: %x: float32[1,8,32]"
    assert lines[-1].startswith("outputs: %actions")


def test_printing_what_changed_something_or_all(pi05c: Command, policy: Path) -> None:
    def titles(which: str) -> list[str]:
        err = pi05c(policy, "--passes", "exact", "--print-after", which).err
        return [line.split(":")[0].split("-")[1] for line in err.splitlines() if line.startswith("# ")]

    assert titles("all") == named(",".join(PRESETS["exact"]))
    assert titles("changed") == ["canonicalize"]


# Checking


def test_structure_and_numbers_of_a_sound_pipeline(pi05c: Command, policy: Path) -> None:
    assert pi05c(policy, "--verify-each").status == 0
    result = pi05c(policy, "--verify-each=numbers", "--json")
    assert result.status == 0
    moved = {found["name"]: found["moved"]["relative_l2"] for found in json.loads(result.out)["passes"]}
    assert moved["batch_views"] == 0
    assert 0 < moved["lower_precision"] < 0.005 < moved["quantize_linears"] < 0.08
    assert "moved by" in pi05c(policy, "--verify-each=numbers").out


def test_an_exact_pass_that_is_not_is_named(
    pi05c: Command, policy: Path, wrecking_pass: str, tmp_path: Path
) -> None:
    passes = ("--passes", f"canonicalize,{wrecking_pass},dedupe")
    assert pi05c(policy, *passes, "--verify-each=structure").status == 0
    for more in ((), ("-o", tmp_path / "e", *NO_PLAN), ("--dump", tmp_path / "s")):
        result = pi05c(policy, *passes, "--verify-each=numbers", *more)
        assert result.status == 3
        assert "pass wreck is said to be exact" in result.err
    assert not (tmp_path / "e").exists()
    assert max(stage_files(tmp_path / "s")) == 2, "the guilty stage is the last one in the dump"


def test_an_engine_folder_keeps_what_each_pass_moved(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    result = pi05c(policy, "--passes", "fp16", "--verify-each=numbers", "-o", folder, *NO_PLAN)
    assert "moved by" in result.out
    moved = {record.name: record.moved for record in read_manifest(folder).pipeline.passes}
    assert moved["fuse_projections"] is not None
    assert moved["lower_precision"] is not None
    assert moved["fuse_projections"] < 1e-5 < moved["lower_precision"]


def test_numbers_need_samples(pi05c: Command, policy: Path) -> None:
    policy.with_name("model.calibration.npz").unlink()
    result = pi05c(policy, "--passes", "exact", "--verify-each=numbers")
    assert result.status == 2
    assert "--calibration" in result.err


BREAKERS = """
    import numpy as np, onnx_graphsurgeon as gs
    from pi05c.graph.edit import Editor
    from pi05c.passes import graph_pass

    @graph_pass(exact=False)
    def zero_scale(graph, ctx):
        "Quantize by nothing."
        x, editor = graph.inputs[0], ctx.editor(graph)
        zero = editor.constant("zero", np.zeros((), np.float32))
        point = editor.constant("point", np.zeros((), np.int8))
        codes = editor.add("QuantizeLinear", [x, zero, point], "codes", dtype=np.int8, shape=x.shape)
        back = editor.add("DequantizeLinear", [codes, zero, point], "back", dtype=np.float32, shape=x.shape)
        reader = next(node for node in graph.nodes if node.op == "MatMul")
        reader.inputs[0] = back
        ctx.changed("silently")

    @graph_pass(exact=False)
    def foreign(graph, ctx):
        "An operator that nobody knows."
        node = next(node for node in graph.nodes if node.op == "Identity")
        node.op, node.domain = "Mystery", "nowhere"
        graph.import_domains = [*graph.import_domains, __import__("onnx").helper.make_opsetid("nowhere", 1)]
        node.outputs[0].shape, node.outputs[0].dtype = node.inputs[0].shape, node.inputs[0].dtype

    @graph_pass(exact=False)
    def bfloat(graph, ctx):
        "Go through bfloat16."
        editor = ctx.editor(graph)
        node = next(node for node in graph.nodes if node.op == "Identity")
        import ml_dtypes
        node.inputs[0] = editor.cast(editor.cast(node.inputs[0], ml_dtypes.bfloat16), np.float32)
    """


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("zero_scale", "sm120", "not positive"),
        ("foreign", "sm120", "domain 'nowhere'"),
        ("bfloat", "sm75", "BF16"),
    ],
)
def test_structure_sees_what_the_checker_does_not(
    pi05c: Command, policy: Path, tmp_path: Path, name: str, target: str, reason: str
) -> None:
    plugin = _plugin(tmp_path / "breakers.py", BREAKERS)
    run = (policy, "--plugin", plugin, "--passes", name, "--target", target)
    result = pi05c(*run, "--verify-each")
    assert result.status in (1, 3)
    assert f"pass {name} left a graph that is not valid" in result.err
    assert reason in result.err


# Plug-ins


def _plugin(path: Path, text: str) -> Path:
    import textwrap

    path.write_text(textwrap.dedent(text))
    return path


HALVE = """
    import onnx_graphsurgeon as gs
    from pi05c.passes import PassContext, graph_pass

    @graph_pass(exact=True, after=("canonicalize",))
    def {name}(graph: gs.Graph, ctx: PassContext, *, times: int = 1) -> None:
        "Count the MatMuls."
        for node in graph.nodes:
            if node.op == "MatMul":
                ctx.skip(node, f"it is only counted, {{times}} times")
    """


def test_a_file_brings_a_pass(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    plugin = _plugin(tmp_path / "mine.py", HALVE.format(name="count_linears"))
    text = "canonicalize,count_linears{times=3}"
    result = pi05c(policy, "--plugin", plugin, "--passes", text, "-o", tmp_path / "e", *NO_PLAN, "--json")
    assert result.status == 0, result.err
    record = json.loads(result.out)["pipeline"]["passes"][1]
    assert record["name"] == "count_linears"
    assert record["options"] == {"times": 3}
    assert record["skipped"] == [{"where": "project", "reason": "it is only counted, 3 times"}]
    again = pi05c(policy, "--plugin", plugin, "--passes", "count_linears,canonicalize", "--verify-each")
    assert again.status == 2, "its order is checked as any other's"


def test_it_is_listed(pi05c: Command, tmp_path: Path) -> None:
    plugin = _plugin(tmp_path / "mine.py", HALVE.format(name="count_linears"))
    assert "count_linears" not in pi05c("passes").out
    assert "count_linears" in pi05c("passes", "--plugin", plugin).out


def test_an_entry_point_is_loaded_by_the_name_of_its_pass_only(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plugin(tmp_path / "installed_passes.py", HALVE.format(name="count_installed"))
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [
        EntryPoint(name, module, plugins.GROUP)
        for name, module in (("count_installed", "installed_passes"), ("unused", "fails_when_it_is_imported"))
    ]
    monkeypatch.setattr(
        plugins, "entry_points", lambda group, name=None: [p for p in points if name in (None, p.name)]
    )
    assert pi05c(policy, "--passes", "exact", "--verify-each").status == 0
    assert "count_installed" not in REGISTRY
    assert pi05c(policy, "--passes", "exact,count_installed", "--verify-each").status == 0
    assert "count_installed" in REGISTRY
    result = pi05c(policy, "--passes", "exact", "--plugin", "unused", "--verify-each")
    assert result.status == 1
    assert "fails_when_it_is_imported" in result.err
    result = pi05c(policy, "--plugin", "no_such", "--verify-each")
    assert "count_installed, unused" in result.err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import onnx", "registers no pass"),
        ("raise SystemExit(0)", "SystemExit"),
        (
            "from pi05c.passes import graph_pass\n@graph_pass(exact=True)\ndef canonicalize(graph, ctx): ...",
            "two passes",
        ),
    ],
    ids=["fails", "empty", "ends", "taken"],
)
def test_a_plug_in_that_cannot_be_used_is_named(
    pi05c: Command, policy: Path, tmp_path: Path, text: str, reason: str
) -> None:
    before = dict(REGISTRY)
    (tmp_path / "bad.py").write_text(text)
    result = pi05c(policy, "--plugin", tmp_path / "bad.py", "--verify-each")
    assert result.status == 1
    assert "bad.py" in result.err
    assert reason in result.err
    assert before == REGISTRY


def test_a_plug_in_may_have_any_name(pi05c: Command, tmp_path: Path) -> None:
    (tmp_path / "passes").write_text(
        "from pi05c.passes import graph_pass\n@graph_pass(exact=True)\ndef mine(graph, ctx):\n    'Mine.'\n"
    )
    assert "mine" in pi05c("passes", "--plugin", tmp_path / "passes").out


def test_a_plug_in_that_is_not_there(pi05c: Command, policy: Path) -> None:
    result = pi05c(policy, "--plugin", "none.py", "--verify-each")
    assert result.status == 1
    assert "none.py" in result.err


# The whole model


def test_stages_of_the_model(pi05c: Command, brief_model: Path, tmp_path: Path) -> None:
    shutil.copytree(brief_model.parent, tmp_path / "model")
    model = tmp_path / "model" / "model.onnx"
    folder = tmp_path / "stages"
    assert pi05c(model, "--dump", folder, "--verify-each=numbers").status == 0
    files = stage_files(folder)
    assert len(files) == len(PRESETS["default"]) + 1
    for path in files.values():
        onnx.checker.check_model(path)
    start = next(folder.glob("*-pin_fp32.onnx"))
    assert pi05c(model, "--start-from", start, "--dump", tmp_path / "again").status == 0
    again = stage_files(tmp_path / "again")
    assert graph_of(again[max(again)]) == graph_of(files[max(files)])
