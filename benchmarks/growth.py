"""How the time of the default passes grows with the graph: denoising steps, and layers, at small width.

    python benchmarks/growth.py [-o FILE.json]

Each graph is exported with random weights and calibrated once; then the passes run `REPEATS` times with the ranges given,
of which the fastest counts, in seconds of processor time. The sizes of a series take turns, so that a machine that gets
slower or faster on the way does so for all of them. The exponent is the slope of log(time) over log(size).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from full_size_parts import run_passes

from pi05c.frontend.config import CONFIGS
from pi05c.frontend.export import export_model
from pi05c.graph.io import load
from pi05c.progress import Progress

STEPS = (10, 20, 40)
DEPTHS = (18, 36, 72)
REPEATS = 5
EXPONENT = 1.1


def export(path: Path, *, depth: int | None = None, steps: int = 2) -> None:
    """The small model with another number of layers in the language model and the action expert, or of steps."""
    tiny = CONFIGS["pi05_tiny"]
    architecture = dataclasses.asdict(tiny.architecture)
    for part in ("llm", "expert"):
        architecture[part]["depth"] = depth or architecture[part]["depth"]
    config = path.with_name("config.json")
    fields = {
        "action_horizon": tiny.horizon,
        "max_token_len": tiny.prompt_length,
        "architecture": architecture,
    }
    config.write_text(json.dumps(fields))
    export_model(None, path, config=str(config), random=True, steps=steps)


def seconds_of(model: Path) -> float:
    """Processor seconds of the default passes, ranges given from the second call on."""
    graph = load(model)
    gc.collect()  # the graph of the call before
    start = time.process_time()
    run_passes(graph, model.with_suffix(".calibration.npz"), "default", Progress())
    return time.process_time() - start


def best_of(models: Sequence[Path]) -> list[float]:
    """Processor seconds of each model."""
    for model in models:
        seconds_of(model)  # measures the ranges
    rounds = [[seconds_of(model) for model in models] for _ in range(REPEATS)]
    return [min(seconds) for seconds in zip(*rounds, strict=True)]


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log(seconds) over log(sizes), by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def main() -> None:
    """Measure both series and print them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    found = {}
    for title, sizes in (("steps", STEPS), ("depth", DEPTHS)):
        with tempfile.TemporaryDirectory() as folder:
            models = [Path(folder) / str(size) / "model.onnx" for size in sizes]
            for model, size in zip(models, sizes, strict=True):
                model.parent.mkdir()
                export(model, **{title: size})
            seconds = best_of(models)
        for size, value in zip(sizes, seconds, strict=True):
            print(f"{title} {size}: {value:.2f} s", flush=True)
        found[title] = {"sizes": sizes, "seconds": seconds, "exponent": exponent(sizes, seconds)}
        print(f"{title}: exponent {found[title]['exponent']:.2f} (to reach: at most {EXPONENT})")
    if asked.output is not None:
        asked.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
