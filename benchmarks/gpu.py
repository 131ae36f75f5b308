"""Measures the whole policy on one NVIDIA GPU: plain torch compiled by Inductor, then the passes' graphs.

    python benchmarks/gpu.py OUT [--config pi05_libero] [--scratch FOLDER] [--device cuda]

Exports a model with random weights, rewrites it by the pipelines `fp16` and `default` (ranges measured on one made-up
sample), translates each graph to torch, compiles its prefix by Inductor and records prefix and steps as one CUDA graph.
The baseline is the plain model in BF16, prefix and denoising step compiled by Inductor and recorded in the same way.
Each pipeline has a process of its own. Whoever times holds `FOLDER/lock` alone; other programs that use the GPU meanwhile
hold it shared, as `flock --shared` does. `OUT/gpu.json` is written again after each stage. With `--device cpu` nothing is
recorded, to try the script.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import platform
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PIPELINES = ("fp16", "default")
SEED = 0
RUNS = 60
"""Timed replays of each CUDA graph."""

EXPORTED = "exported"
"""The file that says of which configuration the model in a folder is."""


def export(folder: Path, config: str) -> None:
    """Write the plain graph, one sample to calibrate with and one to compare on, unless they are there."""
    if (folder / EXPORTED).exists() and (folder / EXPORTED).read_text() == config:
        return
    (folder / EXPORTED).unlink(missing_ok=True)
    from pi05c.frontend.config import named_config
    from pi05c.frontend.export import export_model
    from pi05c.frontend.samples import synthetic_samples, write_samples

    export_model(None, folder / "model.onnx", config=config, random=True, seed=SEED)
    samples = synthetic_samples(named_config(config), SEED, 2)
    write_samples(folder / "calibrate.npz", {name: array[:1] for name, array in samples.items()}, True)
    np.savez(folder / "compare.npz", **{name: array[1] for name, array in samples.items()})
    (folder / EXPORTED).write_text(config)


def rewrite(folder: Path, pipeline: str) -> None:
    """Run the passes of a pipeline, keep the graph, then simulate it in onnxruntime on the sample to compare on."""
    from pi05c.backend.onnxruntime import load_runner
    from pi05c.graph.io import save
    from pi05c.passrun import run_passes

    started = time.monotonic()
    result = run_passes(
        folder / "model.onnx", pipeline, calibration=[folder / "calibrate.npz"], cache=folder / "cache"
    )
    path = folder / pipeline / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    save(result.model, path)
    print(f"{pipeline}: rewritten in {time.monotonic() - started:.0f} s", flush=True)
    (path.parent / "rewritten").touch()
    with np.load(folder / "compare.npz") as file:
        actions = load_runner(path).run({name: file[name] for name in file.files})["actions"]
    np.save(path.parent / "partial.npy", actions)
    (path.parent / "partial.npy").rename(path.parent / "simulated.npy")
    print(f"{pipeline}: simulated after {time.monotonic() - started:.0f} s", flush=True)


def prepare(folder: Path, config: str) -> None:
    """Export, then rewrite by each pipeline side by side."""
    export(folder, config)
    script = [sys.executable, __file__, str(folder), "--config", config, "--rewrite"]
    running = {pipeline: subprocess.Popen([*script, pipeline]) for pipeline in PIPELINES}
    for process in running.values():
        process.wait()


class Measurement:
    """Everything that runs in the process that measures."""

    def __init__(self, out: Path, folder: Path, config: str, device: str) -> None:
        import torch

        from pi05c.frontend.config import named_config
        from pi05c.frontend.samples import synthetic_samples

        self.torch, self.out, self.folder, self.device = torch, out, folder, device
        self.config = named_config(config)
        self.cuda = device == "cuda"
        self.started = time.monotonic()
        self.report: dict[str, Any] = {
            "card": torch.cuda.get_device_name() if self.cuda else platform.machine(),
            "versions": {
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "python": sys.version.split()[0],
            },
            "config": config,
            "runs": RUNS,
            "stages_s": {},
        }
        samples = synthetic_samples(self.config, SEED, 2)
        self.inputs = {name: torch.from_numpy(np.array(a[1])).to(device) for name, a in samples.items()}

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Do something, record its result and seconds; a failure is recorded and does not end the run."""
        started = time.monotonic()
        try:
            result = work()
        except Exception:
            result = {"failed": traceback.format_exc()[-1500:]}
            print(result["failed"], flush=True)
        seconds = round(time.monotonic() - started, 1)
        self.report["stages_s"][name] = seconds
        if isinstance(result, dict):
            self.report[name] = result
        (self.out / "gpu.json").write_text(json.dumps(self.report, indent=1) + "\n")
        brief = {k: v for k, v in result.items() if k != "profile"} if isinstance(result, dict) else ""
        print(
            f"[{time.monotonic() - self.started:.0f} s] {name}: {seconds} s {json.dumps(brief)}", flush=True
        )
        return result

    def recorded(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record `work` as a CUDA graph: its result, and what replays it."""
        torch = self.torch
        with torch.no_grad():
            if not self.cuda:
                return work(), work
            work()  # compiles, for minutes
            with self.holding(fcntl.LOCK_SH):
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    work()
                torch.cuda.current_stream().wait_stream(side)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    result = work()
                torch.cuda.synchronize()
        return result, graph.replay

    @contextlib.contextmanager
    def holding(self, how: int) -> Iterator[None]:
        """Keep others that know the lock off the GPU: all with LOCK_EX, those that time with LOCK_SH."""
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, how)
            yield

    def timed(self, replay: Callable[[], Any]) -> dict[str, float]:
        """Milliseconds of replays, by CUDA events."""
        torch = self.torch
        if not self.cuda:
            started = time.monotonic()
            with torch.no_grad():
                replay()
            return {"median_ms": (time.monotonic() - started) * 1e3}
        times = []
        with self.holding(fcntl.LOCK_EX):
            for _ in range(10):
                replay()
            for _ in range(RUNS):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
        return {
            "median_ms": float(np.median(times)),
            "p95_ms": float(np.percentile(times, 95)),
            "min_ms": min(times),
        }

    def kernels(self, replay: Callable[[], None]) -> dict[str, Any]:
        """Kernels of one replay: how many, their time together, and those that take most."""
        if not self.cuda:
            return {}
        torch = self.torch
        with (
            self.holding(fcntl.LOCK_EX),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile,
        ):
            replay()
            torch.cuda.synchronize()
        count: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                count[event.name[:90]] += 1
                total[event.name[:90]] += event.time_range.elapsed_us()
        top = [
            {"kernel": name, "count": count[name], "us": round(us, 1)} for name, us in total.most_common(14)
        ]
        return {"kernels": sum(count.values()), "kernels_ms": sum(total.values()) / 1e3, "top": top}

    def error(self, actions: Any) -> float:
        """Relative L2 distance of actions from those of the plain model in float32 on this device."""
        found = actions.detach().float().cpu().numpy().astype(np.float64)
        return float(np.linalg.norm(found - self.reference) / np.linalg.norm(self.reference))

    def load_plain(self) -> None:
        """The plain model with the weights of the export, and the float32 reference."""
        from concurrent.futures import ThreadPoolExecutor

        from pi05c.frontend.model import load_policy, parameter_shapes
        from pi05c.frontend.random_weights import random_weights
        from pi05c.graph.weights import InMemory

        torch = self.torch
        weights = random_weights(parameter_shapes(self.config), SEED)
        used = [name for name in weights if "lm_head" not in name]
        with ThreadPoolExecutor(6) as pool:
            arrays = dict(zip(used, pool.map(lambda name: InMemory(weights[name].load()), used), strict=True))
        self.plain = load_policy(self.config, arrays)
        both = self.plain.paligemma_with_expert
        both.paligemma.lm_head = both.gemma_expert.lm_head = torch.nn.Identity()  # nothing uses them
        self.plain.to(self.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with torch.no_grad():
            self.reference = self.plain(**self.inputs).cpu().numpy().astype(np.float64)
        np.save(self.folder / "partial.npy", self.reference)
        (self.folder / "partial.npy").rename(self.folder / "reference.npy")

    def compile_baseline(self) -> None:
        """Prefix and denoising step of the plain model in BF16, each compiled as one function."""
        from pi05c.frontend.plain import half_precision

        torch = self.torch
        policy = half_precision(self.plain)

        def prefix(images: Any, image_masks: Any, tokens: Any, token_masks: Any) -> Any:
            return policy.read_prefix(policy.embed_images(images), image_masks, tokens, token_masks)

        compiled = {
            name: torch.compile(f, fullgraph=True)
            for name, f in (("prefix", prefix), ("step", policy.denoise_step))
        }
        names = ("images", "image_masks", "tokens", "token_masks")
        self.prefix = lambda: compiled["prefix"](*(self.inputs[name] for name in names))

        def steps(cache: Any, suffix: Any) -> Any:
            x, moment = self.inputs["noise"], policy.start_time
            for _ in range(self.config.steps):
                x, moment = compiled["step"](x, moment, cache, suffix)
            return x

        self.steps = steps
        with torch.no_grad():
            self.steps(*self.prefix())

    def baseline(self) -> dict[str, Any]:
        """Times of the compiled plain model."""
        return self.figures(self.prefix, lambda border: self.steps(*border), lambda x: x)

    def figures(
        self, prefix: Callable[[], Any], steps: Callable[[Any], Any], actions: Callable[[Any], Any]
    ) -> dict[str, Any]:
        """Times of prefix, ten steps and both in one graph; error and kernels."""
        border, replay_prefix = self.recorded(prefix)
        _, replay_steps = self.recorded(lambda: steps(border))
        result, replay = self.recorded(lambda: steps(prefix()))
        first, second, whole = (self.timed(each) for each in (replay_prefix, replay_steps, replay))
        report = {"whole": whole, "prefix": first, "steps": second, "error": self.error(actions(result))}
        report["profile"] = {"prefix": self.kernels(replay_prefix), "steps": self.kernels(replay_steps)}
        return report

    def wait_for(self, *paths: Path) -> None:
        """Wait until other processes have made files; the one that started this process ends it where they never do."""
        while not all(path.exists() for path in paths):
            time.sleep(0.2)

    def compiled(self, prefix: Any) -> Callable[[], Any]:
        """The part of a translated graph that no step belongs to, compiled by Inductor, on the inputs."""
        torch = self.torch
        given = [self.inputs[name] for name in prefix.inputs]
        with torch.no_grad():
            program = torch.export.export(prefix, tuple(given), strict=False).module()
        function = torch.compile(program, fullgraph=True)
        return lambda: function(*given)

    def late(self, prefix: Any, steps: Any) -> Callable[[Any], Any]:
        """The part that depends on the noise, as a function of what the other part gives."""
        own = [name for name in steps.inputs if name not in prefix.outputs]

        def run(border: Any) -> Any:
            values = dict(zip(prefix.outputs, border, strict=True))
            return steps(*(self.inputs[name] if name in own else values[name] for name in steps.inputs))

        return run

    def rewritten(self, pipeline: str) -> dict[str, Any]:
        """Times of a rewritten graph, once it is there."""
        from pi05c.backend.torch_graph import translate

        place, reference = self.folder / pipeline, self.folder / "reference.npy"
        self.wait_for(place / "rewritten", reference)
        started = time.monotonic()
        self.reference = np.load(reference)
        module = translate(place / "model.onnx", self.device)
        prefix, steps = module.halves("noise")
        report = self.figures(self.compiled(prefix), self.late(prefix, steps), lambda result: result[0])
        return {"fused": module.fused, "seconds": round(time.monotonic() - started, 1), **report}

    def simulations(self) -> dict[str, Any]:
        """Errors of those simulations in onnxruntime that are done."""
        found = {}
        for pipeline in PIPELINES:
            path = self.folder / pipeline / "simulated.npy"
            if path.exists():
                found[pipeline] = self.error(self.torch.from_numpy(np.load(path)))
        return found


def measure(out: Path, folder: Path, config: str, device: str) -> None:
    """Prepare and measure the pipelines in other processes, the baseline in this one."""
    run = Measurement(out, folder, config, device)
    made = ("rewritten", "simulated.npy", "figures.json")
    for left in ("reference.npy", *(f"{name}/{file}" for name in PIPELINES for file in made)):
        (folder / left).unlink(missing_ok=True)
    script = [sys.executable, __file__, str(folder), "--config", config, "--device", device]
    preparing = subprocess.Popen([*script, "--prepare"])
    waiting = {name: subprocess.Popen([*script, "--measure", name]) for name in PIPELINES}
    run.stage("load", run.load_plain)
    run.stage("compile", run.compile_baseline)
    run.stage("baseline", run.baseline)
    preparing.wait()
    for name, process in waiting.items():
        if not (folder / name / "rewritten").exists() or not (folder / "reference.npy").exists():
            process.kill()
        process.wait()
        run.stage(name, lambda place=folder / name: json.loads((place / "figures.json").read_text()))
    run.stage("simulated", run.simulations)
    run.stage("baseline_again", run.baseline)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="pi05_libero")
    parser.add_argument("--scratch", type=Path, help="20 GB for the graphs; OUT where it is not given")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rewrite", choices=PIPELINES, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=PIPELINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.scratch or options.out
    folder.mkdir(parents=True, exist_ok=True)
    if options.prepare:
        prepare(options.out, options.config)
    elif options.rewrite:
        rewrite(options.out, options.rewrite)
    elif options.measure:
        run = Measurement(options.out, options.out, options.config, options.device)
        found = run.rewritten(options.measure)
        (options.out / options.measure / "figures.json").write_text(json.dumps(found))
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        measure(options.out, folder, options.config, options.device)


if __name__ == "__main__":
    main()
