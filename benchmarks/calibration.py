"""Time and memory of calibration beside a bare run of the same samples in onnxruntime.

    python benchmarks/calibration.py MODEL.onnx [SAMPLES [METHOD [PASSES]]]

MODEL.calibration.npz holds the samples. Each figure comes from a process of its own: the plain graph, loaded and run once a
sample; and what `pi05c compile` measures before the first pass that asks for ranges, from the hash of the graph to the last
sample. Anonymous memory is RssAnon and shared memory, the largest of samples 20 ms apart, passes included.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SAMPLE_SECONDS = 0.02


def bare(path: Path, count: int) -> dict[str, float]:
    """Seconds to load the plain graph and to run it on samples."""
    from pi05c.backend.onnxruntime import load_runner
    from pi05c.graph.io import load
    from pi05c.samples import find_samples

    samples = find_samples(load(path), ["synthetic"])
    assert samples is not None
    start = time.perf_counter()
    runner = load_runner(path)
    loaded = time.perf_counter() - start
    for index in range(count):
        runner.run(samples[index])
    return {"load": loaded, "seconds": time.perf_counter() - start}


def calibrated(path: Path, count: int, method: str, passes: str) -> dict[str, float]:
    """Seconds of the passes before calibration, and of calibration."""
    from pi05c.calibration import measure_ranges
    from pi05c.graph.io import Model, load
    from pi05c.graph.ranges import Wanted
    from pi05c.passes import PRESETS
    from pi05c.passes.pipeline import parse, run
    from pi05c.samples import find_samples
    from pi05c.thresholds import parse_method

    found: dict[str, float] = {}
    samples = find_samples(load(path), ["synthetic"])
    assert samples is not None
    before = time.perf_counter()

    class _MeasuredError(Exception):
        """Ends the run of passes."""

    def calibrate(model: Model, wanted: Wanted) -> None:
        start = time.perf_counter()
        found["passes"] = start - before
        done = [start]
        with tempfile.TemporaryDirectory() as scratch:
            measure_ranges(
                model,
                wanted.tensors,
                samples[:count],
                rows=wanted.rows,
                quantized=wanted.quantized,
                method=parse_method(method),
                scratch=Path(scratch),
                progress=lambda *_: done.append(time.perf_counter()),
            )
        found["first sample"] = done[1] - start
        found["seconds"] = time.perf_counter() - start
        found["tensors"] = len(wanted.tensors)
        raise _MeasuredError

    try:
        run(load(path), parse(passes, PRESETS), calibrate=calibrate)
    except _MeasuredError:
        return found
    raise SystemExit(f"no pass of {passes} asks for ranges")


def _measured(results: Any, function: Callable[..., dict[str, float]], *arguments: Any) -> None:
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_SECONDS):
            lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
            peak = max(
                peak, sum(int(words[1]) for words in lines if words and words[0] in ("RssAnon:", "RssShmem:"))
            )

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = function(*arguments)
    finally:
        done.set()
        watcher.join()
    results.put({**found, "anonymous GB": peak / 1e6})


def main(path: Path, count: int = 2, method: str = "max", passes: str = "default") -> None:
    """Measure both, and print them as JSON."""
    spawn = multiprocessing.get_context("spawn")
    record: dict[str, Any] = {"model": path.name, "samples": count, "method": method, "passes": passes}
    for name, function, arguments in (
        ("bare", bare, (path, count)),
        ("calibration", calibrated, (path, count, method, passes)),
    ):
        results = spawn.Queue()
        process = spawn.Process(target=_measured, args=(results, function, *arguments))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name} ended with {process.exitcode}")
        record[name] = {key: round(value, 3) for key, value in results.get().items()}
    record["ratio"] = round(record["calibration"]["seconds"] / record["bare"]["seconds"], 3)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: calibration.py MODEL.onnx [SAMPLES [METHOD [PASSES]]]")
    main(Path(sys.argv[1]), *[int(word) if word.isdigit() else word for word in sys.argv[2:]])
