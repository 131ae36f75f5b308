"""A policy of three nodes, samples for it, and builders that stand in for TensorRT's."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from pi05c.backend import tensorrt
from pi05c.backend.targets import Flavour
from pi05c.graph.edit import producer
from pi05c.graph.weights import Scaled, weight_of
from pi05c.passes import REGISTRY, Pass, PassContext

ROWS, WIDTH = 8, 32
SAMPLES = 4


def write_policy(path: Path, *, batch: int | str = 1, metadata: dict[str, str] | None = None) -> Path:
    """`actions = x @ w + bias`, float32, with `w` in a data file beside it."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["product"], name="project"),
            helper.make_node("Identity", ["product"], ["same"], name="nothing"),
            helper.make_node("Add", ["same", "bias"], ["actions"], name="shift"),
        ],
        "policy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, ROWS, WIDTH])],
        [helper.make_tensor_value_info("actions", TensorProto.FLOAT, [batch, ROWS, WIDTH])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(rng.standard_normal(WIDTH).astype(np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=256)
    return path


def write_samples(path: Path, *, count: int = SAMPLES, synthetic: bool = False) -> Path:
    """Inputs for `write_policy`, batch 1."""
    x = np.random.default_rng(1).standard_normal((count, 1, ROWS, WIDTH)).astype(np.float32)
    marks = {"synthetic": np.array(True)} if synthetic else {}
    np.savez(path, x=x, **marks)
    return path


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """`model.onnx` with recorded samples beside it, in a folder of its own."""
    folder = tmp_path / "policy"
    folder.mkdir()
    write_samples(folder / "model.calibration.npz")
    return write_policy(folder / "model.onnx")


WORKER = """
    import json, os, sys, time
    from pathlib import Path
    request = json.loads(Path(sys.argv[1]).read_text())
    {body}
    """

BUILDS = """
    Path(request["plan"]).write_bytes(b"plan of " + Path(request["model"]).read_bytes()[:8])
    print("@pi05c " + json.dumps({"event": "built", "version": "9.9", "peak_memory": 1}))
    """
FAILS = 'print("[E] no kernel for node project"); sys.exit(1)'
CRASHES = "os.abort()"
HANGS = 'Path(request["plan"]).write_bytes(b"half"); time.sleep(600)'


def worker(folder: Path, body: str) -> tuple[str, str]:
    """The command of a builder that does what `body` says."""
    script = folder / "worker.py"
    lines = textwrap.dedent(WORKER).replace("{body}", textwrap.dedent(body).strip())
    script.write_text(lines)
    return sys.executable, str(script)


def use_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Let that builder stand for TensorRT-RTX, installed or not, on a machine without a GPU."""
    monkeypatch.setattr(tensorrt, "WORKER_COMMAND", worker(folder, body))
    pretend_installed(monkeypatch, Flavour.TENSORRT_RTX)


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *flavours: Flavour) -> None:
    """Let exactly these flavours be installed; TensorRT-RTX builds for what it supports, TensorRT for nothing."""

    def can_build(targets: tuple[object, ...], flavour: Flavour) -> str | None:
        if flavour not in flavours:
            return f"{flavour.product} is not installed"
        if flavour is Flavour.TENSORRT:
            return "TensorRT builds for the GPU at hand, and this machine has none"
        foreign = [str(target) for target in targets if flavour not in target.flavours]  # type: ignore[attr-defined]
        return f"{flavour.product} does not build for {', '.join(foreign)}" if foreign else None

    monkeypatch.setattr(tensorrt, "installed_flavours", lambda: flavours)
    monkeypatch.setattr(tensorrt, "can_build", can_build)
    monkeypatch.setattr("pi05c.building.compute_capabilities", lambda: ())


@pytest.fixture
def wrecking_pass(monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered pass, `wreck`, that claims to be exact and makes a weight `factor` times as large."""

    def wreck(graph: gs.Graph, ctx: PassContext, *, factor: float = 1.5) -> None:
        """Scale the projection's weight."""
        node = next(node for node in graph.nodes if node.op == "MatMul")
        weight = node.inputs[1]
        while not isinstance(weight, gs.Constant):
            weight = producer(weight).inputs[0]  # type: ignore[union-attr]
        weight._values = Scaled(weight_of(weight), np.float32(factor))
        ctx.changed(node)

    monkeypatch.setitem(REGISTRY, "wreck", Pass("wreck", wreck, exact=True))
    return "wreck"
