"""The table of the README on the real size: time and memory of every stage, against floors and peers of the same run.

    python benchmarks/full_size.py FOLDER [--only NAME,NAME] [--peers PYTHON] [--cap GB]

Exports the full-size model with random weights into FOLDER, and measures each stage in processes of their own, so that
memory is that of the stage alone. `--peers` names the Python of a virtual environment that has onnxslim and
nvidia-modelopt (`make bench` makes one); their runs are killed at `--cap` GB, which is then the result.

Results go to FOLDER/full_size.json after each stage, and a plot beside it, so that a run that is cut short goes on with
`--only`; `--table` prints the table of the results that are there.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from full_size_parts import PARTS
from measuring import Measured, measure

SAMPLES = 3
"""Made-up samples: two to calibrate with, one held back."""

HERE = Path(__file__).parent
PI05C = (sys.executable, "-m", "pi05c")


@dataclass(frozen=True)
class Target:
    """What a stage is to reach: seconds or a multiple of another stage's, GB of anonymous memory or more than another's.

    Attributes:
        seconds: at most so many.
        times: at most so many times the seconds of `of`.
        memory: GB.
        over: GB more than `of`.
    """

    seconds: float | None = None
    times: float | None = None
    memory: float | None = None
    over: float | None = None
    of: str = ""


TARGETS = {
    "export": Target(seconds=120, memory=9),
    "passes": Target(times=1.5, of="floor", memory=3),
    "calibrate": Target(times=1.3, of="bare", over=1),
    "build_unrolled": Target(seconds=120, memory=6),
    "build_loop": Target(seconds=45, memory=6),
    "verify": Target(times=2.5, of="bare_one", memory=10),
    "compile": Target(seconds=480, memory=10),
    "inspect": Target(seconds=5, memory=1),
    "passes_list": Target(seconds=5, memory=1),
    "diff": Target(seconds=5, memory=1),
    "explain": Target(seconds=5, memory=1),
    "help": Target(seconds=0.3),
}

TITLES = {
    "export": "`pi05c export --random`",
    "floor": "floor: a bare loop of amax, cast to FP8, write",
    "bare": "bare onnxruntime run, two samples",
    "bare_one": "bare onnxruntime run, one sample",
    "calibrate": "calibration, two samples",
    "passes": "default passes, ranges given, graph written",
    "compile": "`pi05c model.onnx --passes default -o engine`",
    "verify": "`pi05c verify engine`, one sample",
    "inspect": "`pi05c inspect engine`",
    "passes_list": "`pi05c passes`",
    "diff": "`pi05c diff model.onnx engine`",
    "explain": "`pi05c explain model.onnx --pass fuse_projections`",
    "help": "`pi05c --help`",
    "build_unrolled": "engine of the unrolled graph, SM120",
    "loop_graph": "graph with `mode=loop`: calibration, passes, writing",
    "build_loop": "engine with `mode=loop`, SM120",
    "onnxslim": "peer: onnxslim",
    "modelopt.onnx.autocast": "peer: modelopt.onnx.autocast",
    "modelopt.onnx.quantization": "peer: modelopt.onnx.quantization, FP8",
}


def commands(folder: Path, peers: Path | None) -> dict[str, tuple[str, ...]]:
    """The command of each stage, in the order in which they run."""
    model, samples, engine = (str(folder / name) for name in ("model.onnx", "samples.npz", "engine"))

    def part(name: str) -> tuple[str, ...]:
        return (sys.executable, str(HERE / "full_size_parts.py"), name, model, samples, str(folder))

    options = ("--passes", "default", "--calibration", samples, "--target", "sm120")
    found = {
        "export": (*PI05C, "export", "--random", "--config", "pi05_libero", "--seed", "0", "-o", model),
        **{name: part(name) for name in ("floor", "bare", "bare_one", "calibrate", "passes")},
        "compile": (*PI05C, model, *options, "--fresh", "--verbose", "-o", engine),
        "verify": (*PI05C, "verify", engine),
        "inspect": (*PI05C, "inspect", engine),
        "passes_list": (*PI05C, "passes"),
        "diff": (*PI05C, "diff", model, engine),
        "explain": (*PI05C, "explain", model, "--pass", "fuse_projections"),
        "help": (*PI05C, "--help"),
        **{name: part(name) for name in ("build_unrolled", "loop_graph", "build_loop")},
    }
    if peers is not None:
        python = str(peers)
        out = str(folder / "peer.onnx")
        found["onnxslim"] = (python, "-m", "onnxslim", model, out)
        found["modelopt.onnx.autocast"] = (
            *(python, "-m", "modelopt.onnx.autocast", "--onnx_path", model, "--output_path", out),
            *("--low_precision_type", "fp16"),
        )
        found["modelopt.onnx.quantization"] = (
            *(python, "-m", "modelopt.onnx.quantization", "--onnx_path", model, "--output_path", out),
            *("--quantize_mode", "fp8", "--calibration_data", str(folder / "peer.npz")),
        )
    return found


def main(arguments: list[str]) -> None:
    """Measure the stages asked for and leave the results in the folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--cap", type=float, default=22.0)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args(arguments)
    folder: Path = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "full_size.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    stages = commands(folder, asked.peers)
    wanted = [] if asked.table else asked.only.split(",") if asked.only else list(stages)
    for name in wanted:
        if name != "export":
            write_samples(folder)
        print(f"{name} ...", flush=True)
        done = measure(
            stages[name],
            cap=asked.cap if name not in TARGETS else None,
            log=folder / f"{name}.log",
            statuses=(1,) if name == "diff" else (0,),  # 1: the graphs differ
        )
        results[name] = asdict(done)
        if name in PARTS and done.ended == "done":
            results[name]["seconds"] = json.loads(done.output)["seconds"]
        path.write_text(json.dumps(results, indent=1))
        path.with_suffix(".svg").write_text(chart(results))
        print(f"{name}: {done.ended}, {results[name]['seconds']:.1f} s, {done.anonymous:.2f} GB", flush=True)
    print(table(results))


def write_samples(folder: Path) -> None:
    """The samples of the run, and for modelopt the first of them."""
    with np.load(folder / "model.calibration.npz") as made_up:
        chosen = {name: array if array.ndim == 0 else array[:SAMPLES] for name, array in made_up.items()}
    np.savez(folder / "samples.npz", **chosen)
    np.savez(folder / "peer.npz", **{name: array[0] for name, array in chosen.items() if array.ndim})


def table(results: dict[str, dict[str, object]]) -> str:
    """The results in Markdown."""
    lines = ["| stage | seconds | GB anonymous | GB mapped | to reach |", "|---|---|---|---|---|"]
    for name, title in TITLES.items():
        if name not in results:
            continue
        found = Measured(**results[name])  # type: ignore[arg-type]
        seconds = f"{found.seconds:.1f}" if found.seconds >= 1 else f"{found.seconds:.2f}"
        if found.ended != "done":
            seconds = f"{found.ended}, {seconds}"
        memory = f"{found.anonymous:.1f} | {found.mapped:.1f}"
        lines.append(f"| {title} | {seconds} | {memory} | {_against(name, found, results)} |")
    return "\n".join(lines)


def _against(name: str, found: Measured, results: dict[str, dict[str, object]]) -> str:
    """The target of a stage, and the ratio where it is one."""
    target, parts = TARGETS.get(name), []
    if target is None:
        return ""
    if target.seconds is not None:
        parts.append(f"{target.seconds:g} s")
    if target.times is not None and target.of in results:
        ratio = found.seconds / float(results[target.of]["seconds"])  # type: ignore[arg-type]
        parts.append(f"{target.times:g} x {target.of} (here {ratio:.2f})")
    if target.memory is not None:
        parts.append(f"{target.memory:g} GB")
    if target.over is not None and target.of in results:
        over = found.anonymous - float(results[target.of]["anonymous"])  # type: ignore[arg-type]
        parts.append(f"{target.over:g} GB more than {target.of} (here {over:.1f})")
    return ", ".join(parts)


_BAR, _LABELS, _WIDTH = 18, 330, 260
"""Height of a bar, width of the names and of a column, in pixels."""


def chart(results: dict[str, dict[str, object]]) -> str:
    """Seconds and anonymous memory of each stage as bars, an SVG image; a run that did not end by itself is red."""
    rows = [(name, title, Measured(**results[name])) for name, title in TITLES.items() if name in results]  # type: ignore[arg-type]
    height = _BAR * (len(rows) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABELS + 2 * _WIDTH + 140}" height="{height}" '
        'font-family="sans-serif" font-size="12">'
    ]
    for column, (title, field) in enumerate(
        (("seconds", "seconds"), ("GB of anonymous memory", "anonymous"))
    ):
        left = _LABELS + column * (_WIDTH + 70)
        largest = max((getattr(found, field) for _, _, found in rows), default=1) or 1
        parts.append(f'<text x="{left}" y="{_BAR - 5}" font-weight="bold">{title}</text>')
        for row, (_, _, found) in enumerate(rows, 1):
            value = getattr(found, field)
            colour = "#4477aa" if found.ended == "done" else "#cc3311"
            top = row * _BAR
            parts.append(
                f'<rect x="{left}" y="{top + 2}" width="{_WIDTH * value / largest:.1f}" height="{_BAR - 4}" '
                f'fill="{colour}"/>'
                f'<text x="{left + 4 + _WIDTH * value / largest:.1f}" y="{top + 13}">{value:.3g}</text>'
            )
    for row, (_, title, found) in enumerate(rows, 1):
        ended = "" if found.ended == "done" else f" ({found.ended})"
        parts.append(
            f'<text x="0" y="{row * _BAR + 13}">{html.escape(title.replace("`", "") + ended)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main(sys.argv[1:])
