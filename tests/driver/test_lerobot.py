"""A LeRobot dataset as samples: what is made of its frames, and what is refused.

`tests/data/lerobot` holds a dataset that LeRobot wrote, and the inputs that LeRobot's own processor makes of it.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Command
from onnx import TensorProto, helper
from small_policy import write_policy

pytest.importorskip("pyarrow", reason="reading a LeRobot dataset needs the extra [lerobot]")
pytest.importorskip("av", reason="reading a LeRobot dataset needs the extra [lerobot]")
pytest.importorskip("PIL", reason="reading a LeRobot dataset needs the extra [lerobot]")
sentencepiece = pytest.importorskip("sentencepiece", reason="making prompts needs the extra [lerobot]")
pytest.importorskip("tokenizers", reason="making prompts needs the extra [lerobot]")

from PIL import Image  # noqa: E402
from pyarrow import parquet  # noqa: E402

from pi05c.frontend.export import CONFIG_KEY, ROBOT_KEY  # noqa: E402
from pi05c.frontend.robot import OPENPI_CAMERAS, Robot  # noqa: E402
from pi05c.graph.errors import Pi05cError, UsageError  # noqa: E402
from pi05c.graph.runner import Array  # noqa: E402
from pi05c.lerobot.observations import Observations  # noqa: E402
from pi05c.manifest import read_manifest  # noqa: E402
from pi05c.samples import WEIGHTS_KEY, find_samples, load_samples, split  # noqa: E402

DATA = Path(__file__).parents[1] / "data"
REFERENCE = DATA / "lerobot"
TOKENIZER = REFERENCE / "tokenizer"
FRAMES, SIZE, LENGTH, HORIZON, WIDTH = 9, 28, 160, 4, 6
VIEWS = ("top", "wrist", "empty_camera_0")
OF_LEROBOT = Robot(framework="lerobot", cameras=VIEWS, state_in_prompt=True)
STATE, TOP, WRIST = "observation.state", "observation.images.top", "observation.images.wrist"
DATA_FILE, EPISODES_FILE = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
VIDEO_FILE = f"videos/{TOP}/chunk-000/file-000.mp4"
ORDER = [0, 1, 2, 4, 5, 6, 8, 3, 7]
"""Of nine frames every fourth comes last: it is held back."""


def write_graph(
    path: Path, robot: Robot | None = OF_LEROBOT, *, batch: int = 1, length: int = LENGTH, other: str = ""
) -> Path:
    """A graph with the inputs of a policy; it adds means of some to the noise."""
    shapes: dict[str, tuple[int, list[int]]] = {
        "images": (TensorProto.FLOAT, [batch, 3, 3, SIZE, SIZE]),
        "image_masks": (TensorProto.BOOL, [batch, 3]),
        "tokens": (TensorProto.INT64, [batch, length]),
        "token_masks": (TensorProto.BOOL, [batch, length]),
        "noise": (TensorProto.FLOAT, [batch, HORIZON, WIDTH]),
    }
    if other:
        shapes[other] = (TensorProto.FLOAT, [1])
    mean = helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0)
    added = helper.make_node("Add", ["noise", "mean"], ["actions"])
    graph = helper.make_graph(
        [mean, added],
        "policy",
        [helper.make_tensor_value_info(name, *entry) for name, entry in shapes.items()],
        [helper.make_tensor_value_info("actions", *shapes["noise"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    if robot is not None:
        helper.set_model_props(model, {ROBOT_KEY: robot.to_json()})
    onnx.save(model, path)
    return path


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "model.onnx")


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """A copy of the dataset, to be changed."""
    folder = tmp_path / "recordings"
    shutil.copytree(REFERENCE / "recordings", folder)
    return folder


def made(graph: Path, dataset: Path = REFERENCE / "recordings", **options: Any) -> list[dict[str, Array]]:
    return list(Observations(dataset, graph, **{"tokenizer": TOKENIZER, **options}))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_table(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the rows of a Parquet file in place; its schema stays."""
    table = parquet.read_table(path)
    rows = table.to_pylist()
    changed = change(rows)
    parquet.write_table(table.from_pylist(rows if changed is None else changed, schema=table.schema), path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


# what is made


@pytest.mark.parametrize(
    "tokenizer", [TOKENIZER, TOKENIZER / "tokenizer.model", TOKENIZER / "tokenizer.json"]
)
@pytest.mark.parametrize("version", ["lerobot", "lerobot-0.4"])
def test_samples_are_what_lerobot_makes(graph: Path, version: str, tokenizer: Path) -> None:
    expected = np.load(REFERENCE / f"{version}.npz")
    assert 0 < expected["token_masks"].sum(-1).max() < LENGTH
    samples = made(graph, frames=FRAMES, tokenizer=tokenizer, preprocess=version)
    assert len(samples) == FRAMES
    for sample, number in zip(samples, ORDER, strict=True):
        assert set(sample) == {*expected, "noise"}
        np.testing.assert_allclose(sample["images"], expected["images"][number], rtol=0, atol=1e-6)
        for name in ("image_masks", "tokens", "token_masks"):
            assert sample[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(sample[name], expected[name][number])


def test_samples_are_what_openpi_makes(tmp_path: Path) -> None:
    """openpi's rules written out a second time: Pillow's filter, one number after the other into 256 intervals."""
    low, high = [-2.0, -3, -0.2, -4, -1], [1.0, 3, 0.1, 6, 1]
    statistics = {"q01": [*low, *[0.0] * 27], "q99": [*high, *[0.0] * 27]}
    robot = Robot(
        framework="openpi",
        cameras=OPENPI_CAMERAS,
        normalization={"state": "quantiles"},
        statistics={"lab": {"state": statistics}},
    )
    cameras = {"base_0_rgb": "wrist", "right_wrist_0_rgb": WRIST}
    samples = made(write_graph(tmp_path / "model.onnx", robot), frames=FRAMES, cameras=cameras)
    rows = rows_of(REFERENCE / "recordings" / DATA_FILE)
    tasks = {
        row["task_index"]: row["__index_level_0__"]
        for row in rows_of(REFERENCE / "recordings/meta/tasks.parquet")
    }
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))
    for sample, number in zip(samples, ORDER, strict=True):
        row = rows[number]
        words = []
        for value, least, most in zip(row[STATE], low, high, strict=True):
            place = (value - least) / (most - least + 1e-6) * 2 - 1
            words.append(str(-1 if place < -1 else min(int((place + 1) * 128), 255)))
        task = tasks[row["task_index"]].strip().replace("_", " ")
        tokens = processor.encode(f"Task: {task}, State: {' '.join(words)};\nAction: ", add_bos=True)
        padding = LENGTH - len(tokens)
        np.testing.assert_array_equal(sample["tokens"], [[*tokens, *[0] * padding]])
        np.testing.assert_array_equal(sample["token_masks"], [[True] * len(tokens) + [False] * padding])
        small = Image.open(io.BytesIO(row[WRIST]["bytes"])).resize((22, SIZE), Image.Resampling.BILINEAR)
        wide = np.zeros((SIZE, SIZE, 3), np.uint8)
        wide[:, 3:25] = small
        view = wide.astype(np.float32).transpose(2, 0, 1) / 255 * 2 - 1
        np.testing.assert_allclose(
            sample["images"][0], [view, np.full_like(view, -1), view], rtol=0, atol=1e-6
        )
        np.testing.assert_array_equal(sample["image_masks"], [[True, False, True]])


def test_a_policy_that_is_not_told_the_state_gets_the_task_alone(tmp_path: Path, recordings: Path) -> None:
    robot = Robot(framework="openpi", cameras=VIEWS, state_in_prompt=False)
    (recordings / "meta/stats.json").unlink()
    sample = made(write_graph(tmp_path / "model.onnx", robot), recordings, frames=1)[0]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))
    expected = [2, *processor.encode("pick up the red cube"), *processor.encode("\n")]
    assert sample["tokens"][sample["token_masks"]].tolist() == expected


@pytest.mark.parametrize(
    ("how", "expected"), [("mean_std", "128 255"), ("min_max", "128 128"), ("identity", "255 255")]
)
def test_states_are_normalized_as_the_checkpoint_says(
    tmp_path: Path, recordings: Path, how: str, expected: str
) -> None:
    """0 begins the interval 128; what is beyond the last one, 255, counts as in it."""
    statistics = {"mean": [2.0, 5.0], "std": [1.0, 1.0], "min": [1.0, 5.0], "max": [3.0, 7.0]}
    robot = Robot(
        framework="lerobot",
        cameras=VIEWS,
        normalization={"state": how},
        statistics={"policy": {"state": statistics}},
    )
    table = parquet.read_table(recordings / DATA_FILE).drop_columns([STATE])
    states = type(table).from_pylist([{STATE: [2.0, 6.0]}] * FRAMES)[STATE]
    parquet.write_table(table.append_column(STATE, states), recordings / DATA_FILE)
    sample = made(write_graph(tmp_path / "model.onnx", robot), recordings, frames=1)[0]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))
    tokens = [2, *processor.encode(f"Task: pick up the red cube, State: {expected};\nAction: ")]
    assert sample["tokens"][sample["token_masks"]].tolist() == tokens


def test_statistics_of_the_checkpoint_come_before_those_of_the_dataset(tmp_path: Path) -> None:
    statistics = {"q01": [-9.0] * 5, "q99": [9.0] * 5}
    robot = Robot(framework="lerobot", cameras=VIEWS, statistics={"policy": {"state": statistics}})
    own = Observations(
        REFERENCE / "recordings", write_graph(tmp_path / "own.onnx", robot), tokenizer=TOKENIZER
    )
    others = Observations(REFERENCE / "recordings", write_graph(tmp_path / "model.onnx"), tokenizer=TOKENIZER)
    assert "the statistics of the checkpoint" in own.notes[2]
    assert "the statistics of" in others.notes[2]
    assert "recordings" in others.notes[2]
    first, second = next(iter(own)), next(iter(others))
    assert not np.array_equal(first["tokens"], second["tokens"])


def numbers_of(samples: list[dict[str, Array]], entry: int = 0) -> list[int]:
    """Which frames samples are of, by their noise."""
    noise = [
        np.random.default_rng(number).standard_normal((HORIZON, WIDTH), np.float32)
        for number in range(FRAMES)
    ]
    return [
        next(number for number in range(FRAMES) if np.array_equal(sample["noise"][entry], noise[number]))
        for sample in samples
    ]


def test_frames_are_spread_evenly_and_the_same_each_time(graph: Path) -> None:
    assert numbers_of(made(graph, frames=4)) == [1, 3, 5, 7]
    assert numbers_of(made(graph, frames=1)) == [4]
    assert numbers_of(made(graph)) == ORDER
    first, second = made(graph, frames=3), made(graph, frames=3)
    assert all(
        np.array_equal(one[name], two[name]) for one, two in zip(first, second, strict=True) for name in one
    )


def test_a_sample_has_as_many_frames_as_the_batch(tmp_path: Path) -> None:
    samples = made(write_graph(tmp_path / "model.onnx", batch=2), frames=4)
    assert numbers_of(samples) == [0, 2, 5, 7]
    assert numbers_of(samples, 1) == [1, 3, 6, 8]
    assert samples[0]["images"].shape == (2, 3, 3, SIZE, SIZE)


def test_a_dataset_of_several_files_gives_the_same(graph: Path, recordings: Path) -> None:
    table = parquet.read_table(recordings / DATA_FILE)
    second = recordings / "data/chunk-007/file-003.parquet"
    second.parent.mkdir()
    parquet.write_table(table.slice(0, 5), recordings / DATA_FILE)
    parquet.write_table(table.slice(5), second)
    episodes = parquet.read_table(recordings / EPISODES_FILE)
    rows = episodes.to_pylist()
    rows[1] |= {"data/chunk_index": 7, "data/file_index": 3}
    more = recordings / "meta/episodes/chunk-000/file-001.parquet"
    parquet.write_table(episodes.from_pylist(rows[1:], schema=episodes.schema), more)
    parquet.write_table(episodes.from_pylist(rows[:1], schema=episodes.schema), recordings / EPISODES_FILE)
    for one, two in zip(made(graph, frames=FRAMES), made(graph, recordings, frames=FRAMES), strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_the_time_of_a_video_begins_where_the_episode_says(graph: Path, recordings: Path) -> None:
    """The second episode shown from the first one's beginning."""
    edit_table(recordings / EPISODES_FILE, lambda rows: rows[1].update({f"videos/{TOP}/from_timestamp": 0.0}))
    expected = np.load(REFERENCE / "lerobot.npz")["images"]
    samples = dict(zip(ORDER, made(graph, recordings, frames=FRAMES), strict=True))
    np.testing.assert_allclose(samples[6]["images"][:, 0], expected[1][:, 0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(samples[6]["images"][:, 1], expected[6][:, 1], rtol=0, atol=1e-6)


def test_a_depth_map_is_no_camera(graph: Path, recordings: Path) -> None:
    edit_json(
        recordings / "meta/info.json",
        lambda info: info["features"][WRIST].update(info={"is_depth_map": True}),
    )
    sample = made(graph, recordings, frames=1)[0]
    assert sample["image_masks"].tolist() == [[True, False, False]]


def test_views_without_names_are_numbered(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.onnx", None)
    sample = made(graph, frames=1, cameras={"2": "top"})[0]
    assert sample["image_masks"].tolist() == [[False, False, True]]
    with pytest.raises(
        Pi05cError, match=r"no camera of .* \(top, wrist\) is called as a view of the model \(0, 1, 2\)"
    ):
        made(graph)


# the command line


def test_samples_are_written_and_found_beside_the_model(pi05c: Command, graph: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.calibration.npz"
    result = pi05c("samples", graph, REFERENCE / "recordings", "--tokenizer", TOKENIZER, "-o", output)
    assert result.status == 0, result.err
    assert result.out == f"{output}: 9 samples of recordings\n"
    assert "9 of 9 frames in 2 episodes, preprocessed as lerobot does" in result.err
    assert "top sees top, wrist sees wrist, empty_camera_0 masked" in result.err
    found = load_samples([output], _specs(graph))
    assert not found.synthetic
    for one, two in zip(found, made(graph), strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in two)
    result = pi05c(
        "samples", graph, REFERENCE / "recordings", "--tokenizer", TOKENIZER, "-o", output, "--json"
    )
    assert json.loads(result.out)["count"] == FRAMES


def _specs(graph: Path) -> Any:
    from pi05c.graph.io import load
    from pi05c.samples import input_specs

    return input_specs(load(graph))


def test_compile_measures_on_a_dataset_as_on_the_samples_made_of_it(
    pi05c: Command, graph: Path, tmp_path: Path
) -> None:
    dataset, samples = REFERENCE / "recordings", tmp_path / "samples.npz"
    told = ("--tokenizer", TOKENIZER, "--frames", "6")
    assert pi05c("samples", graph, dataset, "-o", samples, *told).status == 0
    compiled = (
        "compile",
        graph,
        "--passes",
        "lower_precision",
        "--max-error",
        "0.01",
        "--backend",
        "onnxruntime",
    )
    assert pi05c(*compiled, "-o", tmp_path / "a", "--calibration", samples).status == 0
    result = pi05c(*compiled, "-o", tmp_path / "b", "--calibration", dataset, *told)
    assert result.status == 0, result.err
    first, second = (read_manifest(tmp_path / name).calibration for name in "ab")
    assert first is not None
    assert second is not None
    assert second.source == "recordings"
    assert first.model_dump(exclude={"source"}) == second.model_dump(exclude={"source"})
    assert not list(tmp_path.glob(".pi05c-*"))
    looked_at = ("compile", graph, "--passes", "lower_precision", "--verify-each=numbers")
    result = pi05c(*looked_at, "--calibration", dataset, *told)
    assert result.status == 0, result.err


def test_held_back_samples_are_every_fourth(graph: Path, tmp_path: Path, pi05c: Command) -> None:
    output = tmp_path / "samples.npz"
    assert (
        pi05c("samples", graph, REFERENCE / "recordings", "--tokenizer", TOKENIZER, "-o", output).status == 0
    )
    from pi05c.graph.io import load

    found = find_samples(load(graph), [output])
    assert found is not None
    measured, held_back = split(found)
    assert numbers_of(list(held_back)) == [3, 7]
    assert len(measured) == 7


def test_a_compile_without_a_dataset_needs_nothing_of_the_extra(tmp_path: Path) -> None:
    model = write_policy(tmp_path / "model.onnx")
    code = (
        "import sys\n"
        "for name in ('pyarrow', 'av', 'PIL', 'sentencepiece', 'tokenizers', 'pi05c.lerobot'): sys.modules[name] = None\n"
        "from pi05c.cli import main\n"
        f"sys.exit(main(['compile', {str(model)!r}, '--passes', 'exact', '--backend', 'onnxruntime', '-o', "
        f"{str(tmp_path / 'engine')!r}]))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


# what is refused


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _cut(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def _info(**entries: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "meta/info.json", lambda info: info.update(entries))


def _images(content: Mapping[str, Any]) -> Callable[[Path], None]:
    return lambda folder: edit_table(
        folder / DATA_FILE, lambda rows: [{**row, WRIST: {**row[WRIST], **content}} for row in rows]
    )


def _no_quantiles(folder: Path) -> None:
    edit_json(folder / "meta/stats.json", lambda stats: stats[STATE].pop("q01"))


def _no_statistics(folder: Path) -> None:
    edit_json(folder / "meta/stats.json", lambda stats: stats.pop(STATE))


def _no_state(folder: Path) -> None:
    edit_json(folder / "meta/info.json", lambda info: info["features"].pop(STATE))


def _other_state(folder: Path) -> None:
    edit_json(folder / "meta/stats.json", lambda stats: stats[STATE].update(q01=[0.0] * 3, q99=[1.0] * 3))


def _one_task(folder: Path) -> None:
    edit_table(folder / "meta/tasks.parquet", lambda rows: rows[:1])


def _no_episode(folder: Path) -> None:
    edit_table(folder / EPISODES_FILE, lambda rows: [])


def _other_frames(folder: Path) -> None:
    edit_table(folder / DATA_FILE, lambda rows: rows[:3])


def _late(folder: Path) -> None:
    edit_table(folder / EPISODES_FILE, lambda rows: rows[1].update({f"videos/{TOP}/from_timestamp": 100.0}))


def _nan(folder: Path) -> None:
    edit_table(folder / DATA_FILE, lambda rows: rows[0].update({STATE: [0.0, float("nan"), 0.0, 0.0, 0.0]}))


def _no_column(folder: Path) -> None:
    table = parquet.read_table(folder / DATA_FILE)
    parquet.write_table(table.drop_columns(["task_index"]), folder / DATA_FILE)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "version 2": (
        _info(codebase_version="v2.1"),
        r"of format v2.1, but v3 is read: .*convert_dataset_v21_to_v30",
    ),
    "version 4": (_info(codebase_version="v4.0"), r"states the format 'v4.0', but v3"),
    "no features": (_info(features=None), "lists no features"),
    "no rate": (_info(fps=0), "states 0 frames a second"),
    "path": (_info(data_path="{nothing}"), r"states the path '\{nothing\}', which names no file"),
    "no state": (_no_state, "has no feature 'observation.state'"),
    "no statistics": (_without("meta/stats.json"), r"stats.json is missing: states are normalized"),
    "no statistics of states": (_no_statistics, "has no statistics of 'observation.state'"),
    "no quantiles": (_no_quantiles, r"lack q01 of the state: .*augment_dataset_quantile_stats.py"),
    "other state": (_other_state, r"the state has 5 numbers, but the statistics of .* are of 3"),
    "no task": (_one_task, r"frame 5 of .* is of task 1, which meta/tasks.parquet lacks"),
    "no tasks": (_without("meta/tasks.parquet"), r"tasks.parquet is missing"),
    "no episode": (_no_episode, "lists no episode with frames"),
    "no episodes": (_without(EPISODES_FILE), "lists no episode with frames"),
    "other frames": (_other_frames, r"holds frame 4 0 times, where meta/episodes says once"),
    "NaN": (_nan, r"the state of frame 0 of .* holds NaN or infinity"),
    "no column": (_no_column, "lacks the column 'task_index' of LeRobot's format v3"),
    "no data": (_without(DATA_FILE), r"file-000.parquet is missing"),
    "cut data": (_cut(DATA_FILE), r"file-000.parquet cannot be read as Parquet \(.*\): fetch it again"),
    "cut episodes": (
        _cut(EPISODES_FILE),
        r"file-000.parquet cannot be read as Parquet \(.*\): fetch it again",
    ),
    "no video": (_without(VIDEO_FILE), r"file-000.mp4 is missing"),
    "cut video": (_cut(VIDEO_FILE), r"file-000.mp4 (cannot be decoded|has no frame at)"),
    "late": (_late, r"file-000.mp4 has no frame at 100"),
    "image elsewhere": (
        _images({"bytes": None}),
        r"image 'observation.images.wrist' of frame 0 .* is not stored",
    ),
    "broken image": (
        _images({"bytes": b"PNG"}),
        r"image 'observation.images.wrist' of frame 0 .* cannot be decoded",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_dataset_is_refused_in_one_sentence(
    pi05c: Command, graph: Path, recordings: Path, tmp_path: Path, name: str
) -> None:
    spoil, expected = REFUSED[name]
    spoil(recordings)
    output = tmp_path / "samples.npz"
    result = pi05c("samples", graph, recordings, "--tokenizer", TOKENIZER, "-q", "-o", output)
    assert result.status == 1
    (sentence,) = result.err.splitlines()
    assert re.search(expected, sentence)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"cameras": {"top": "left"}},
            r"--camera top=left: the dataset has no such camera, it has top, wrist",
        ),
        (
            {"cameras": {"base": "top"}},
            r"--camera base=top: the model has no view 'base', it has top, wrist, empty_camera_0",
        ),
        ({"frames": 10}, r"10 samples of 1 frame cannot be made of 9: give --frames from 1 to 9"),
        ({"frames": 0}, r"give --frames from 1 to 9"),
        ({"preprocess": "mine"}, r"--preprocess mine is unknown: give openpi, lerobot, lerobot-0.4"),
        (
            {"tokenizer": DATA / "none.model"},
            r"there is no tokenizer .*none.model: fetch paligemma_tokenizer.model",
        ),
        ({"tokenizer": DATA}, r"holds neither tokenizer.model nor tokenizer.json"),
        ({"tokenizer": DATA / "README.md"}, r"README.md cannot be read as a model of sentencepiece"),
        ({"tokenizer": DATA / "pi05_tiny/config.json"}, r"config.json cannot be read as a tokenizer"),
    ],
)
def test_a_wrong_request_is_refused_in_one_sentence(
    graph: Path, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(Pi05cError, match=expected) as raised:
        made(graph, **options)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, UsageError) == ("tokenizer" not in options)


def test_a_prompt_longer_than_the_model_takes_is_refused(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.onnx", length=20)
    with pytest.raises(
        Pi05cError,
        match=r"prompt of frame 0 of .*recordings has \d+ tokens, but the model takes 20 .*larger --prompt-length",
    ):
        made(graph)


def test_tokens_that_the_model_does_not_know_are_refused(graph: Path) -> None:
    model = onnx.load(graph)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    entries[CONFIG_KEY] = json.dumps({"architecture": {"llm": {"vocab_size": 300}}})
    helper.set_model_props(model, entries)
    onnx.save(model, graph)
    with pytest.raises(Pi05cError, match=r"has the token 3\d\d, but the model knows 300: give the tokenizer"):
        made(graph)


def test_a_checkpoint_of_unknown_kind_needs_the_rules_named(tmp_path: Path) -> None:
    """What was exported before the framework was recorded."""
    graph = write_graph(tmp_path / "model.onnx", Robot(cameras=VIEWS))
    model = onnx.load(graph)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, {**entries, WEIGHTS_KEY: "checkpoint"})
    onnx.save(model, graph)
    with pytest.raises(
        UsageError, match=r"does not say whose checkpoint .* give --preprocess openpi or lerobot"
    ):
        made(graph)
    assert len(made(graph, preprocess="openpi")) == FRAMES


def test_graphs_with_other_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Pi05cError, match=r"takes 'depth', which no dataset gives"):
        made(write_graph(tmp_path / "model.onnx", other="depth"))
    with pytest.raises(Pi05cError, match=r"takes 'x', which no dataset gives"):
        made(write_policy(tmp_path / "policy.onnx"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "holds tasks in words: give --tokenizer FILE"),
        (("--tokenizer", TOKENIZER, "--camera", "top"), "--camera top is not VIEW=CAMERA"),
        (("--tokenizer", TOKENIZER, "--camera", "=top"), "--camera =top is not VIEW=CAMERA"),
        (("--tokenizer", TOKENIZER, "--calibration", "other.npz"), "names a LeRobot dataset beside others"),
    ],
)
def test_a_compile_that_leaves_something_open_is_refused(
    pi05c: Command, graph: Path, tmp_path: Path, words: tuple[str | Path, ...], expected: str
) -> None:
    dataset = REFERENCE / "recordings"
    result = pi05c("compile", graph, "-o", tmp_path / "engine", "--calibration", dataset, *words)
    assert result.status == 2
    assert expected in result.err
    assert not (tmp_path / "engine").exists()


def test_options_of_a_dataset_need_one(pi05c: Command, graph: Path, tmp_path: Path) -> None:
    result = pi05c("compile", graph, "-o", tmp_path / "engine", "--frames", "3")
    assert result.status == 2
    assert "--frames is for a LeRobot dataset: give --calibration its folder" in result.err


def test_other_commands_name_the_one_that_makes_samples(pi05c: Command, graph: Path) -> None:
    result = pi05c("explain", graph, "--pass", "lower_precision", "--calibration", REFERENCE / "recordings")
    assert result.status == 1
    assert "is a LeRobot dataset: make samples of it with `pi05c samples MODEL.onnx" in result.err


@pytest.mark.parametrize("package", ["pyarrow", "av", "sentencepiece"])
def test_a_missing_package_is_named_with_the_extra(
    graph: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        Pi05cError, match=rf"needs {package}, which is not installed: pip install 'pi05c\[lerobot\]'"
    ):
        made(graph)


def test_the_output_is_named_as_what_it_is(pi05c: Command, graph: Path, tmp_path: Path) -> None:
    dataset = REFERENCE / "recordings"
    result = pi05c("samples", graph, dataset, "--tokenizer", TOKENIZER, "-o", tmp_path / "samples")
    assert result.status == 2
    assert "must end in .npz" in result.err
