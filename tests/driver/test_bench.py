"""`pi05c bench`, without a word on how long anything takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import Command
from small_policy import policy, write_policy

import pi05c as package
from pi05c.benchmark import Benchmark, Configuration, Timing, parse_sweeps
from pi05c.benchreport import bars, plots, write_benchmark
from pi05c.graph.errors import UsageError

__all__ = ["policy"]

QUICK = ("--runs", "3", "--warm-up", "0")


def configuration(name: str, ms: float, **swept: int) -> Configuration:
    timing = Timing(all_ms=[ms, ms, 3 * ms])
    return Configuration(
        name=name,
        backend="inductor",
        ran="the engine on its GPU",
        device="H100",
        on_gpu=True,
        sizes=swept,
        swept=swept,
        latency=timing,
        call=timing,
        parts=[],
        throughput=1e3 / ms,
        memory=None,
        load_s=1.0,
        first_s=0.5,
    )


def benchmark(*configurations: Configuration) -> Benchmark:
    return Benchmark(
        versions={"python": "3"},
        cpu="a CPU",
        gpu="H100",
        warm_up=0,
        runs=3,
        seed=0,
        configurations=list(configurations),
    )


@pytest.fixture(scope="module")
def split_engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    return package.compile(
        tiny_model,
        folder / "engine",
        split="vision+prefix,step",
        passes="canonicalize",
        backend="onnxruntime",
        cache=folder / "cache",
    ).folder


def test_folders_and_graphs_are_timed_and_written(
    split_engine: Path, tiny_model: Path, tmp_path: Path, pi05c: Command
) -> None:
    page, raw = tmp_path / "bench.html", tmp_path / "bench.json"
    result = pi05c("bench", split_engine, tiny_model, *QUICK, "--steps", "3", "-o", page, "-o", raw)
    assert result.status == 2
    assert "--steps is for folders" in result.err
    result = pi05c("bench", split_engine, tiny_model, *QUICK, "-o", page, "-o", raw)
    assert result.status == 0, result.err
    assert "on the CPU, by the clock of the host: engine; model.onnx" in result.out
    found = json.loads(raw.read_text())
    folder, graph = found["configurations"]
    assert (folder["name"], graph["name"]) == ("engine", "model.onnx")
    for item in (folder, graph):
        assert item["backend"] == "onnxruntime"
        assert item["sizes"] == {"batch": 1, "views": 3, "prompt_length": 24, "horizon": 10, "steps": 10}
        times = item["latency"]["all_ms"]
        assert len(times) == found["runs"] == 3
        assert min(times) > 0
        assert item["latency"]["median_ms"] == pytest.approx(np.median(times))
        assert min(times) <= item["latency"]["p95_ms"] <= item["latency"]["p99_ms"] <= max(times)
        assert item["throughput"] == pytest.approx(3e3 / sum(item["call"]["all_ms"]))
        assert item["cold_start_s"] == item["load_s"] + item["first_s"]
    assert [(part["name"], part["runs"]) for part in folder["parts"]] == [("vision+prefix", 1), ("step", 10)]
    assert graph["parts"] == []
    text = page.read_text()
    assert "<svg" in text
    assert "vision+prefix" in text
    assert not re.search(r"(src|href)=|https?://", text)


def test_the_plain_model_beside_it(split_engine: Path, pi05c: Command) -> None:
    result = pi05c("bench", split_engine, *QUICK, "--baseline", "torch-eager", "--steps", "2", "--json")
    assert result.status == 0, result.err
    engine, plain = json.loads(result.out)["configurations"]
    assert engine["sizes"] == plain["sizes"]
    assert plain["sizes"]["steps"] == 2
    assert plain["backend"] == plain["name"] == "torch-eager"
    assert re.fullmatch(r"the plain model in (BF16|float32) on .*", plain["ran"])
    assert [(part["name"], part["runs"]) for part in plain["parts"]] == [("prefix", 1), ("step", 2)]


def test_a_sweep_makes_models_of_other_sizes(tmp_path: Path, pi05c: Command) -> None:
    pytest.importorskip("onnxscript", reason="exporting models needs the extra [torch]")
    from pi05c.frontend.config import Architecture, GemmaSizes, LanguageSizes, Pi05Config, VisionSizes

    heads = {"depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    architecture = Architecture(
        VisionSizes(width=32, depth=1, mlp_dim=32, num_heads=2, image_size=28, patch_size=14),
        LanguageSizes(width=32, mlp_dim=32, vocab_size=64, **heads),
        GemmaSizes(width=32, mlp_dim=32, **heads),
    )
    described = Pi05Config("small", architecture, horizon=2, prompt_length=8, views=2, steps=1)
    model = write_policy(tmp_path / "model.onnx", metadata={"pi05c.config": described.to_json()})
    before = {path.name for path in tmp_path.iterdir()}
    page = tmp_path / "bench.html"
    result = pi05c(
        *("bench", model, *QUICK, "--sweep", "views=1,2", "--sweep", "steps=1", "--baseline", "torch-eager"),
        *("--passes", "exact", "--backend", "onnxruntime", "--json", "-o", page),
    )
    assert result.status == 0, result.err
    found = json.loads(result.out)["configurations"]
    assert [item["name"] for item in found] == [
        f"{name}, {point}" for point in ("views 1", "views 2", "steps 1") for name in ("exact", "torch-eager")
    ]
    sizes = {"batch": 1, "prompt_length": 8, "horizon": 2, "steps": 1}
    assert [item["sizes"] for item in found] == [{**sizes, "views": views} for views in (1, 1, 2, 2, 2, 2)]
    assert [item["swept"] for item in found[::2]] == [{"views": 1}, {"views": 2}, {"steps": 1}]
    assert found[2]["latency"] == found[4]["latency"], "a model of the same sizes is made and measured once"
    assert {"By views", "By steps"} <= set(re.findall("<h2>(.*)</h2>", page.read_text()))
    assert {path.name for path in tmp_path.iterdir()} == {*before, "bench.html"}


def test_a_model_of_another_exporter(policy: Path, pi05c: Command) -> None:
    result = pi05c("bench", policy, *QUICK, "--json")
    assert result.status == 0, result.err
    (found,) = json.loads(result.out)["configurations"]
    assert found["sizes"] == {}
    refused = pi05c("bench", policy, *QUICK, "--baseline", "torch-eager")
    assert refused.status == 1
    assert "does not say which network it is" in refused.err
    assert "models of other sizes cannot be made" in pi05c("bench", policy, "--sweep", "views=1,2").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runs", "0"), "--runs must be at least 1"),
        (("--baseline", "jax"), "unknown baseline 'jax': choose among torch-eager, torch-compile"),
        (("--sweep", "cameras=1"), "names no size: choose among batch, views, prompt_length, horizon, steps"),
        (("--sweep", "views=one"), "is malformed: write views=1,2,3"),
        (("--backend", "onnxruntime"), "give its --passes too"),
        (("--steps", "3"), "use --sweep steps=N"),
        (("-o", "bench.txt"), "must end in .json or .html"),
        (("-o", "nowhere/bench.json"), "does not exist; create it first"),
    ],
)
def test_usage(policy: Path, pi05c: Command, arguments: tuple[str, ...], message: str) -> None:
    result = pi05c("bench", policy, *arguments)
    assert result.status in (1, 2)
    assert message in result.err


def test_folders_are_neither_compiled_nor_swept(split_engine: Path, pi05c: Command) -> None:
    assert "is a folder: name its model.onnx" in pi05c("bench", split_engine, "--sweep", "views=1").err
    assert "compile ONNX files" in pi05c("bench", split_engine, "--passes", "fp16").err


def test_a_sweep_is_read() -> None:
    assert parse_sweeps(["prompt-length=48, 200", "views=1,2", "views=2,3"]) == {
        "prompt_length": (48, 200),
        "views": (1, 2, 3),
    }
    for text in ("views", "views=0,1", "views=-1"):
        with pytest.raises(UsageError, match="write views=1,2,3"):
            parse_sweeps([text])


def test_plots_start_at_zero_and_join_what_differs_in_one_size(tmp_path: Path) -> None:
    items = [
        configuration("fp16, views 1", 10.0, views=1),
        configuration("torch-eager", 40.0, views=1),
        configuration("fp16, views 3", 20.0, views=3),
        configuration("torch-eager", 20.0, views=3),
    ]
    (plot,) = plots(items)
    assert [line.name for line in plot.lines] == ["fp16", "torch-eager"]
    assert [(point.x, point.y, point.value) for point in plot.lines[0].points] == [
        (0.0, 195.0, 1),
        (560.0, 130.0, 3),
    ]
    drawn = bars(items)
    assert drawn[1].median == pytest.approx(4 * drawn[0].median)
    assert max(bar.p99 for bar in drawn) == pytest.approx(560.0)
    assert plots([configuration("engine", 1.0)]) == []
    write_benchmark(tmp_path / "page.html", benchmark(configuration("<b>", 1.0), configuration("b", 2.0)))
    assert "&lt;b&gt;" in (tmp_path / "page.html").read_text()


def test_a_made_up_observation_is_one_that_a_policy_takes(split_engine: Path) -> None:
    with package.load(split_engine, backend="onnxruntime") as loaded:
        made = loaded.made_up(seed=1)
        assert {spec.name for spec in loaded.inputs} <= made.keys()
        assert made["image_masks"].all()
        assert len(np.unique(made["tokens"])) > 1
        assert loaded(made)["actions"].shape == (1, 10, 32)
        assert not np.array_equal(made["noise"], loaded.made_up(seed=2)["noise"])
