"""Parts of a compile, and what they are held against, each run as a process of its own by `full_size.py`.

    python benchmarks/full_size_parts.py PART MODEL.onnx SAMPLES.npz FOLDER

`floor` is a bare loop over the weights; `bare` runs the plain graph once a sample in onnxruntime and does nothing else. The
last line printed is JSON with the seconds of what is compared, without imports.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from pi05c.backend import tensorrt
from pi05c.backend.onnxruntime import load_runner
from pi05c.building import choose
from pi05c.graph.io import Model, load, save, scopes
from pi05c.graph.weights import Stored
from pi05c.passrun import Calibrator, RunOptions, plan, run
from pi05c.progress import Progress
from pi05c.samples import Samples, find_samples, split

LOOP = "default,fuse_denoise_loop{mode=loop}"
_CHUNK = 2**24


def floor(model: Path, samples: Path, folder: Path) -> float:
    """Read every weight, take its largest value, cast it to FP8, write it: numpy as it comes, one thread."""
    weights = {id(weight): weight for weight in _stored(load(model))}.values()
    start = time.perf_counter()
    with (folder / "floor.bin").open("wb") as file:
        for weight in weights:
            values = np.memmap(weight.path, weight.dtype, "r", weight.offset, weight.shape or (1,)).reshape(
                -1
            )
            pieces = [values[at : at + _CHUNK] for at in range(0, values.size, _CHUNK)]
            amax = max(np.abs(piece.astype(np.float32)).max() for piece in pieces)
            scale = np.float32(amax / 448 if amax else 1)
            for piece in pieces:
                file.write(
                    (piece.astype(np.float32) / scale).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).data
                )
    seconds = time.perf_counter() - start
    (folder / "floor.bin").unlink()
    return seconds


def bare(model: Path, samples: Path, folder: Path) -> float:
    """Run the plain graph once a calibration sample."""
    chosen = _calibration(load(model), samples)
    start = time.perf_counter()
    runner = load_runner(model)
    for sample in chosen:
        runner.run({spec.name: sample[spec.name] for spec in runner.inputs})
    return time.perf_counter() - start


def bare_one(model: Path, samples: Path, folder: Path) -> float:
    """Run the plain graph on one sample."""
    chosen = _calibration(load(model), samples)
    start = time.perf_counter()
    runner = load_runner(model)
    runner.run({spec.name: chosen[0][spec.name] for spec in runner.inputs})
    return time.perf_counter() - start


def calibrate(model: Path, samples: Path, folder: Path) -> float:
    """Measure the ranges that the default passes ask for; they go to the cache."""
    progress = Progress()
    run_passes(load(model), samples, "default", progress, fresh=True)
    return next(stage.seconds for stage in progress.stages if stage.title == "calibrate")


def passes(model: Path, samples: Path, folder: Path) -> float:
    """Run the default passes with the ranges in the cache, and write the graph."""
    start = time.perf_counter()
    rewritten = load(model)
    run_passes(rewritten, samples, "default", Progress())
    save(rewritten, folder / "passes.onnx")
    seconds = time.perf_counter() - start
    for path in folder.glob("passes.onnx*"):
        path.unlink()
    return seconds


def loop_graph(model: Path, samples: Path, folder: Path) -> float:
    """The graph whose denoising stays a loop, for `build_loop`."""
    start = time.perf_counter()
    rewritten = load(model)
    run_passes(rewritten, samples, LOOP, Progress())
    save(rewritten, folder / "loop.onnx")
    return time.perf_counter() - start


def build_loop(model: Path, samples: Path, folder: Path) -> float:
    """The engine of `loop_graph`."""
    return _build(folder / "loop.onnx", folder / "loop.engine")


def build_unrolled(model: Path, samples: Path, folder: Path) -> float:
    """The engine of the graph that the compile left."""
    return _build(folder / "engine" / "model.onnx", folder / "unrolled.engine")


def _build(graph: Path, engine: Path) -> float:
    builder = choose("tensorrt-rtx", "sm120", {})
    assert builder.options is not None
    start = time.perf_counter()
    tensorrt.build(graph, engine, builder.options)
    seconds = time.perf_counter() - start
    engine.unlink()
    return seconds


def run_passes(model: Model, samples: Path, text: str, progress: Progress, *, fresh: bool = False) -> None:
    """Run passes on a model, with ranges from the cache unless `fresh`."""
    options = RunOptions()
    chosen = plan(text, options)
    calibrator = Calibrator(chosen, _calibration(model, samples), progress, fresh=fresh)
    run(model, chosen, calibrator, options, lambda fraction, detail: None)


def _calibration(model: Model, samples: Path) -> Samples:
    found = find_samples(model, [samples])
    assert found is not None
    return split(found)[0]


def _stored(model: Model) -> list[Stored]:
    tensors = [tensor for scope in scopes(model.graph) for node in scope.nodes for tensor in node.inputs]
    return [tensor._values for tensor in tensors if isinstance(getattr(tensor, "_values", None), Stored)]


PARTS = {
    part.__name__: part
    for part in (floor, bare, bare_one, calibrate, passes, loop_graph, build_loop, build_unrolled)
}

if __name__ == "__main__":
    name, *paths = sys.argv[1:]
    seconds = PARTS[name](*map(Path, paths))
    print(json.dumps({"seconds": seconds}))
