"""Measures on one NVIDIA GPU what each pass, each camera and each step costs, beside `gpu.py`.

    python benchmarks/gpu_tables.py OUT [--config pi05_libero] [--scratch FOLDER] [--device cuda] [--only NAME ...]

Reads the `model.onnx` that `gpu.py` left in FOLDER, or makes it. The pipeline `default` is built up pass by pass, where a
pass finds something to do; it is run for one, two and three cameras; and it is cut behind some of its steps. Ranges are
assumed, not measured: they change no latency. Each variant is prepared in a process of its own, several at once, and
measured while all others wait. `OUT/gpu_tables.json` holds the results.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu import Measurement, export

AT_ONCE = 6
"""Processes that prepare at the same time: each holds a model in the memory of the GPU."""

DEFAULT = (
    "canonicalize",
    "batch_views",
    "drop_dead_prefix",
    "fuse_denoise_loop",
    "fuse_projections",
    "fold_gqa",
    "split_prefix_attention",
    "fold_scales",
    "dedupe",
    "lower_precision",
    "pin_fp32",
    "quantize_linears",
    "insert_attention_qdq",
    "disable_conv2d_quant",
)
"""The passes of `default` but the last."""

UNROLL = "fuse_denoise_loop"
"""The pass without which torch runs no graph: what precedes it is measured together with it."""

LOWER, BAKE = "lower_precision", "canonicalize"
"""The pass from which on weights are cast, and the one that bakes the casts, which ends `default`."""

CUTS = (1, 2, 4, 6, 8, 10)
"""Steps after which the graph is cut."""


def variants(idle: Sequence[str] = ()) -> dict[str, str]:
    """Pipelines by name, `pass 03 drop_dead_prefix` or `views 2`; none for passes that have nothing to do."""
    found = {}
    first = DEFAULT.index(UNROLL)
    for count in range(1, len(DEFAULT) + 1):
        if DEFAULT[count - 1] in idle and count < len(DEFAULT):
            continue
        passes = DEFAULT[:count] if count > first else (*DEFAULT[:count], UNROLL)
        if count > DEFAULT.index(LOWER):
            passes = (*passes, BAKE)
        if count != first + 1:
            found[f"pass {count:02d} {DEFAULT[count - 1]}"] = ",".join(passes)
    for views in (1, 2, 3):
        present = ",".join("1" if view < views else "0" for view in range(3))
        found[f"views {views}"] = f"specialize{{views={present}}},{','.join(DEFAULT)},{BAKE}"
    return dict(reversed(found.items()))


def idle_passes(folder: Path) -> list[str]:
    """Passes of `default` that find nothing to do in the model."""
    from pi05c.cost import AssumedRanges
    from pi05c.graph.io import load
    from pi05c.passes.pipeline import run as run_steps
    from pi05c.passrun import RunOptions, plan

    steps = plan(",".join(DEFAULT), RunOptions()).steps
    results = run_steps(load(folder / "model.onnx"), steps, calibrate=lambda *_: AssumedRanges(), dry=True)
    return [result.step.spec.name for result in results if not result.changes]


def states(graph: Any) -> list[str]:
    """What x += dt * v gives, step by step, from the noise on."""
    found = []
    tensor = next(item for item in graph.inputs if item.name == "noise")
    while tensor is not graph.outputs[0]:
        tensor = next(node.outputs[0] for node in tensor.outputs if node.op == "Add")
        found.append(tensor.name)
    return found


def cut(whole: Any, part: Any, result: str) -> Any:
    """A part that gives one of its values alone, without the nodes that it does not need."""
    from pi05c.backend.torch_graph import Part

    needed, calls = {result}, []
    for call in reversed(part._calls):
        if not needed.isdisjoint(call[2]):
            calls.append(call)
            needed.update(name for name in call[1] if name is not None)
    return Part(whole, calls[::-1], part.inputs, [result])


def measure(run: Measurement, pipeline: str, cuts: bool) -> dict[str, Any]:
    """Prepare a variant, wait for a line on the standard input, measure."""
    from pi05c.backend.torch_graph import TorchGraph
    from pi05c.cost import AssumedRanges
    from pi05c.graph.io import load
    from pi05c.passes.pipeline import run as run_steps
    from pi05c.passrun import RunOptions, plan

    model = load(run.folder / "model.onnx")
    run_steps(model, plan(pipeline, RunOptions()).steps, calibrate=lambda *_: AssumedRanges())
    names = states(model.graph) if cuts else []
    module = TorchGraph(model.graph, run.device).eval()
    del model
    gc.collect()
    prefix, steps = module.halves("noise")
    early, late = run.compiled(prefix), run.late(prefix, steps)
    recorded = {
        "prefix": run.recorded(early)[1],
        "whole": run.recorded(lambda: late(early()))[1],
    }
    for count in CUTS if cuts else ():
        some = run.late(prefix, cut(module, steps, names[count - 1]))
        recorded[f"steps {count}"] = run.recorded(lambda some=some: some(early()))[1]
    print("ready", flush=True)
    sys.stdin.readline()
    report: dict[str, Any] = {name: run.timed(replay) for name, replay in recorded.items()}
    kernels = run.kernels(recorded["whole"])
    return {"pipeline": pipeline, "fused": module.fused, "kernels": kernels.get("kernels"), **report}


def supervise(options: argparse.Namespace) -> None:
    """Prepare variants side by side, then let one after the other measure."""
    options.scratch.mkdir(parents=True, exist_ok=True)
    export(options.scratch, options.config)
    idle = idle_passes(options.scratch)
    report: dict[str, Any] = {"passes with nothing to do": idle}
    script = [sys.executable, __file__, *sys.argv[1:], "--variant"]
    found = variants(idle)
    waiting = [name for name in found if not options.only or any(word in name for word in options.only)]
    while waiting:
        batch, waiting = waiting[:AT_ONCE], waiting[AT_ONCE:]
        running = {
            name: subprocess.Popen([*script, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for name in batch
        }
        for name, process in running.items():
            ready = process.stdout.readline()  # type: ignore[union-attr]
            print(name, "ready" if ready else "failed", flush=True)
        for name, process in running.items():
            result = process.communicate("go\n")[0]
            report[name] = json.loads(result) if result else {"failed": process.returncode}
            (options.out / "gpu_tables.json").write_text(json.dumps(report, indent=1) + "\n")
            brief = {
                key: value["median_ms"] for key, value in report[name].items() if key in ("prefix", "whole")
            }
            print(name, brief, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="pi05_libero")
    parser.add_argument("--scratch", type=Path, help="14 GB for the graph; OUT where it is not given")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="*", help="variants whose names hold one of these")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.scratch = options.scratch or options.out
    options.out.mkdir(parents=True, exist_ok=True)
    if options.variant is None:
        supervise(options)
        return
    run = Measurement(options.out, options.scratch, options.config, options.device)
    pipeline = variants()[options.variant]
    last = options.variant.startswith(f"pass {len(DEFAULT)}")
    print(json.dumps(measure(run, pipeline, last)), flush=True)


if __name__ == "__main__":
    main()
