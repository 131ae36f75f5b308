"""`pi05c.load`: what runs, what is refused, and the chain of engines on a device that is the host."""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pi05c
from pi05c.backend.onnxruntime import OnnxRuntimeRunner, load_runner
from pi05c.backend.signature import TensorSpec
from pi05c.folder import GRAPH, SAMPLES
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.manifest import PrecisionRecord, read_manifest
from pi05c.runtime import Policy, choose, device_session

torch = pytest.importorskip("torch", reason="torch tensors need the extra [torch]")

from pi05c.backend.torch_device import TorchCpu  # noqa: E402


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model, exact, in one graph."""
    folder = tmp_path_factory.mktemp("runtime")
    return pi05c.compile(
        tiny_model, folder / "engine", passes="exact", backend="onnxruntime", cache=folder / "cache"
    ).folder


@pytest.fixture(scope="module")
def split_engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with the step as a graph of its own."""
    folder = tmp_path_factory.mktemp("runtime")
    options: dict[str, Any] = {"split": "vision+prefix,step", "passes": "canonicalize"}
    return pi05c.compile(
        tiny_model, folder / "engine", backend="onnxruntime", cache=folder / "cache", **options
    ).folder


def samples(folder: Path) -> tuple[dict[str, Any], Any]:
    """The first held-back observation, and its reference actions."""
    with np.load(folder / SAMPLES) as file:
        arrays = {name: file[name] for name in file.files if name != "synthetic"}
    first = {name: array[0] for name, array in arrays.items()}
    return first, first.pop("actions")


def load_on_host(folder: Path, **options: Any) -> Policy:
    with pytest.warns(UserWarning, match="so .* runs in onnxruntime on the CPU"):
        return pi05c.load(folder, **options)


class HostDevice:
    """A device that is the host: work that is captured runs at once and again at each launch."""

    name, on_gpu = "host", False

    def __init__(self, captures: bool = True) -> None:
        self.captures, self.captured, self.launched, self.closed = captures, 0, 0, False

    def activate(self) -> None: ...

    def allocate(self, spec: TensorSpec) -> Any:
        return np.empty([int(dim or 0) for dim in spec.shape], spec.dtype)

    def copy_in(self, buffer: Any, value: Any) -> None:
        buffer[...] = value

    def copy_out(self, buffer: Any, like: Any = None) -> Any:
        return buffer.copy() if like is None else torch.from_numpy(buffer.copy())

    def capture(self, work: Callable[[], Mapping[str, Any]]) -> Callable[[], None]:
        if not self.captures:
            raise Pi05cError("this engine cannot be captured")
        self.captured += 1

        def launch() -> None:
            self.launched += 1
            work()

        return launch

    def seconds(self, work: Callable[[], None]) -> float:
        work()
        return 1.0

    def synchronize(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class HostPart(OnnxRuntimeRunner):
    """A part that counts its calls."""

    begun = saved = 0

    def begin(self) -> None:
        self.begun += 1

    def save_cache(self) -> None:
        self.saved += 1

    def close(self) -> None: ...


def test_a_folder_without_a_plan_runs_in_onnxruntime_and_says_so(engine: Path) -> None:
    observation, reference = samples(engine)
    with load_on_host(engine) as policy:
        assert (policy.backend, policy.ran) == ("onnxruntime", "its graph in onnxruntime")
        assert policy.inputs[0].name == "images"
        np.testing.assert_allclose(policy(observation)["actions"], reference, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(
            policy(**observation)["actions"], load_runner(engine / GRAPH).run(observation)["actions"]
        )
        policy.warm_up(runs=1)
    with pytest.raises(Pi05cError, match="the policy is closed"):
        policy(observation)
    policy.close()


def test_torch_tensors_give_torch_tensors(engine: Path) -> None:
    observation, _ = samples(engine)
    policy = pi05c.load(engine, backend="onnxruntime")
    tensors = {name: torch.from_numpy(value) for name, value in observation.items()}
    result = policy(tensors)["actions"]
    assert isinstance(result, torch.Tensor)
    np.testing.assert_array_equal(result.numpy(), policy(observation)["actions"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "missing input 'images'"),
        ({"image": np.zeros(3)}, "unknown input 'image'"),
        ({"noise": np.zeros((1, 10, 32))}, "input 'noise' holds float64, but the graph takes float32"),
        ({"noise": np.zeros((1, 9, 32), np.float32)}, "dimension 1 is 9 instead of 10"),
        ({"noise": np.full((1, 10, 32), np.nan, np.float32)}, "input 'noise' holds NaN"),
        ({"tokens": np.full((1, 24), 512)}, "input 'tokens' holds 512, but token ids go from 0 to 511"),
        ({"tokens": np.full((1, 24), -1)}, "input 'tokens' holds -1"),
        ({"noise": [0.0]}, "an input is a list"),
        ({"token_masks": torch.ones((1, 24))}, "input 'token_masks' holds float32"),
    ],
)
def test_an_observation_is_checked(engine: Path, change: dict[str, Any], message: str) -> None:
    observation, _ = samples(engine)
    given = {name: value for name, value in {**observation, **change}.items() if value is not None}
    with pytest.raises(Pi05cError, match=message):
        pi05c.load(engine, backend="onnxruntime")(given)


def test_masks_are_those_that_a_graph_was_specialized_for(tiny_model: Path, tmp_path: Path) -> None:
    with np.load(tiny_model.with_name("model.calibration.npz")) as file:
        arrays = dict(file)
    arrays["image_masks"][:] = [True, True, False]
    np.savez(tmp_path / "two.npz", **arrays)
    folder = pi05c.compile(
        tiny_model,
        tmp_path / "engine",
        passes="specialize{views=1,1,0},canonicalize",
        backend="onnxruntime",
        calibration=[tmp_path / "two.npz"],
    ).folder
    policy = pi05c.load(folder, backend="onnxruntime")
    assert "image_masks" not in [spec.name for spec in policy.inputs]
    policy.warm_up(runs=1)
    observation, _ = samples(folder)
    masks = np.array([[True, True, False]])
    np.testing.assert_array_equal(
        policy({**observation, "image_masks": masks})["actions"], policy(observation)["actions"]
    )
    with pytest.raises(Pi05cError, match=r"input 'image_masks' holds True at \[0, 2\]"):
        policy({**observation, "image_masks": np.ones((1, 3), np.bool_)})


def test_what_was_asked_for_is_loaded_or_refused(engine: Path) -> None:
    with pytest.raises(UsageError, match="unknown backend 'tvm'"):
        pi05c.load(engine, backend="tvm")
    with pytest.raises(Pi05cError, match=r"tensorrt does not run here: .* has no model\.engine yet"):
        pi05c.load(engine, backend="tensorrt")
    with pytest.raises(UsageError, match="--split vision"):
        pi05c.load(engine, steps=3)


@pytest.mark.gpu
def test_a_graph_runs_in_torch_where_it_is_asked_for(engine: Path, split_engine: Path) -> None:
    observation, reference = samples(engine)
    with pi05c.load(engine, backend="torch") as policy:
        assert re.fullmatch("its graph in torch on (its GPU|the CPU)", policy.ran)
        for _ in range(2):
            np.testing.assert_allclose(policy(observation)["actions"], reference, rtol=1e-3, atol=1e-3)
        other = {**observation, "noise": observation["noise"] + np.float32(0.1)}
        assert not np.allclose(policy(other)["actions"], reference, rtol=1e-3, atol=1e-3)
        tensors = {
            name: torch.from_numpy(value).to("cuda" if policy.session.on_gpu else "cpu")
            for name, value in other.items()
        }
        assert policy(tensors)["actions"].device == tensors["noise"].device
    expected = pi05c.load(split_engine, backend="onnxruntime", steps=5)(observation)["actions"]
    with pi05c.load(split_engine, backend="torch", steps=5) as policy:
        np.testing.assert_allclose(policy(observation)["actions"], expected, rtol=1e-3, atol=1e-3)


def test_a_gpu_without_the_builder_runs_the_graph_in_torch(
    engine: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json" if name == "triton" else name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("pi05c.backend.torch_device.TorchCuda", TorchCpu)
    monkeypatch.setattr("pi05c.runtime.compute_capabilities", lambda: ((9, 0),))
    with pytest.warns(
        UserWarning, match=r"has no model\.engine yet, so .* runs in torch on the GPU, uncompiled"
    ):
        policy = pi05c.load(engine)
    assert policy.backend == "torch"
    verdict = pi05c.verify(engine)
    assert verdict.measured is not None
    assert verdict.ran == "its graph in torch on the CPU"
    assert "has no model.engine yet" in (verdict.why_not_measured or "")

    with_loop = pi05c.compile(tiny_model, tmp_path / "engine", passes="none", backend="onnxruntime").folder
    assert choose(with_loop, read_manifest(with_loop))[0] == "onnxruntime"
    manifest = read_manifest(engine)
    fp8 = PrecisionRecord(part="denoise", kind="linear", dtype="float8e4m3fn", count=1)
    assert choose(engine, manifest.model_copy(update={"precision": [fp8]}))[0] == "torch"
    monkeypatch.setattr("pi05c.runtime.compute_capabilities", lambda: ((8, 0),))
    assert choose(engine, manifest)[0] == "torch"
    assert choose(engine, manifest.model_copy(update={"precision": [fp8]}))[0] == "onnxruntime"


def test_split_engines_chain_in_one_captured_graph(split_engine: Path) -> None:
    observation, reference = samples(split_engine)
    manifest = read_manifest(split_engine)
    device = HostDevice()
    parts = {place: HostPart(split_engine / place / GRAPH) for place in manifest.places}
    session = device_session(split_engine, manifest, device, parts)
    for launches in (1, 2):
        result = session.run(observation, None)["actions"]
        np.testing.assert_allclose(result, reference, rtol=1e-4, atol=1e-4)
        assert (device.captured, device.launched) == (1, launches)
    assert all(part.saved for part in parts.values())
    assert torch.is_tensor(session.run(observation, torch.zeros(1))["actions"])
    session.close()
    assert device.closed


def test_steps_are_chosen_at_run_time(split_engine: Path) -> None:
    observation, reference = samples(split_engine)
    five = load_on_host(split_engine, steps=5)(observation)["actions"]
    assert np.linalg.norm(five - reference) > 1e-3 * np.linalg.norm(reference)
    manifest = read_manifest(split_engine)
    parts = {place: HostPart(split_engine / place / GRAPH) for place in manifest.places}
    session = device_session(split_engine, manifest, HostDevice(), parts, 5)
    np.testing.assert_array_equal(session.run(observation, None)["actions"], five)


def test_what_cannot_be_captured_runs_call_by_call(engine: Path) -> None:
    observation, reference = samples(engine)
    manifest = read_manifest(engine)
    session = device_session(engine, manifest, HostDevice(captures=False), {"": HostPart(engine / GRAPH)})
    with pytest.warns(UserWarning, match="no CUDA graph, .*: this engine cannot be captured"):
        session.run(observation, None)
    changed = {**observation, "noise": observation["noise"] + np.float32(0.1)}
    assert not np.array_equal(
        session.run(changed, None)["actions"], session.run(observation, None)["actions"]
    )
    np.testing.assert_allclose(session.run(observation, None)["actions"], reference, rtol=1e-4, atol=1e-4)


def test_calls_from_several_threads_do_not_mix(engine: Path) -> None:
    observation, _ = samples(engine)
    policy = pi05c.load(engine, backend="onnxruntime")
    noises = np.random.default_rng(0).standard_normal((4, 1, 10, 32)).astype(np.float32)
    expected = [policy({**observation, "noise": noise})["actions"] for noise in noises]
    results: dict[int, Any] = {}

    def call(index: int) -> None:
        results[index] = policy({**observation, "noise": noises[index]})["actions"]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        np.testing.assert_array_equal(results[index], expected[index])
