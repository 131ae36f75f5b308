"""Exports, compiles and verifies the full-size model with random weights; prints time and peak memory of each stage.

    python benchmarks/full_size.py FOLDER

Memory is sampled over the whole process tree: `anonymous` is RssAnon and shared memory, which the machine must
hold; `mapped` is RssFile, pages of the weight files that the kernel may drop.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SAMPLES = 3
"""Made-up samples for the compile: two to calibrate with, one held back."""

_SAMPLE_SECONDS = 0.05
_FIELDS = ("RssAnon", "RssShmem", "RssFile")


@dataclass
class Stage:
    """One command: seconds of wall-clock time and peak memory in GB (10^9 bytes)."""

    name: str
    command: str
    seconds: float
    anonymous: float
    mapped: float


def run(name: str, arguments: list[str]) -> Stage:
    """Run one pi05c command to its end.

    Raises:
        SystemExit: the command failed.
    """
    command = [sys.executable, "-m", "pi05c", *arguments]
    print(f"\n$ pi05c {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peak = {"anonymous": 0, "mapped": 0}
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, done))
    watcher.start()
    status = process.wait()
    done.set()
    watcher.join()
    if status:
        raise SystemExit(status)
    seconds = time.perf_counter() - start
    stage = Stage(name, " ".join(arguments), seconds, peak["anonymous"] / 1e6, peak["mapped"] / 1e6)
    return stage


def _watch(pid: int, peak: dict[str, int], done: threading.Event) -> None:
    while not done.wait(_SAMPLE_SECONDS):
        totals = dict.fromkeys(_FIELDS, 0)
        for member in _tree(pid):
            for field, kilobytes in _memory(member).items():
                totals[field] += kilobytes
        peak["anonymous"] = max(peak["anonymous"], totals["RssAnon"] + totals["RssShmem"])
        peak["mapped"] = max(peak["mapped"], totals["RssFile"])


def _tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return found
    for child in children:
        found.extend(_tree(int(child)))
    return found


def _memory(pid: int) -> dict[str, int]:
    """Kilobytes by kind, none where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key: int(value.split()[0]) for key, value in pairs if key in _FIELDS}


def main(folder: Path) -> None:
    """Run all stages under `folder` and leave `full_size.json` there."""
    model, engine = str(folder / "model.onnx"), str(folder / "engine")
    folder.mkdir(parents=True, exist_ok=True)
    stages = [run("export", ["export", "--random", "--config", "pi05_libero", "--seed", "0", "-o", model])]
    samples = folder / "samples.npz"
    with np.load(folder / "model.calibration.npz") as made_up:
        arrays = {name: array if array.ndim == 0 else array[:SAMPLES] for name, array in made_up.items()}
    np.savez(samples, **arrays)
    options = ["--passes", "default", "--calibration", str(samples), "--target", "sm120", "--verbose"]
    stages += [
        run("compile", [model, *options, "-o", engine]),
        run("verify", ["verify", engine]),
        run("inspect", ["inspect", engine]),
    ]
    (folder / "full_size.json").write_text(json.dumps([asdict(stage) for stage in stages], indent=2))
    print("\nstage      seconds  anonymous GB  mapped GB")
    for stage in stages:
        print(f"{stage.name:9} {stage.seconds:8.1f} {stage.anonymous:13.2f} {stage.mapped:10.2f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: full_size.py FOLDER")
    main(Path(sys.argv[1]))
