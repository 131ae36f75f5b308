"""`pi05c bench`: how long a policy takes, by itself, by part, beside the plain model, and over sizes."""

from __future__ import annotations

import contextlib
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, computed_field

from pi05c.backend.child import memory_of
from pi05c.backend.gpu import compute_capabilities
from pi05c.backend.inductor import INDUCTOR
from pi05c.backend.onnxruntime import load_runner
from pi05c.baseline import BASELINES, load_baseline
from pi05c.contract import Contract
from pi05c.frontend.config import Pi05Config
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.inspection import source_of
from pi05c.manifest import read_manifest
from pi05c.progress import Progress
from pi05c.runtime import ONNXRUNTIME, HostSession, Policy, choose
from pi05c.runtime import load as load_policy

SWEPT = ("batch", "views", "prompt_length", "horizon", "steps")
"""Sizes of a model that can be swept."""

_PACKAGES = ("pi05c", "onnxruntime", "numpy", "torch", "triton", "tensorrt", "tensorrt-rtx")
_ANY_ERROR = 1e9
"""The limit on the error of what is compiled to be timed: how long it takes does not depend on its numbers."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Timing(_Record):
    """Milliseconds of each run."""

    all_ms: list[float]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def median_ms(self) -> float:
        """Half of the runs take longer."""
        return float(np.median(self.all_ms))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p95_ms(self) -> float:
        """One run in 20 takes longer."""
        return float(np.percentile(self.all_ms, 95))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p99_ms(self) -> float:
        """One run in 100 takes longer."""
        return float(np.percentile(self.all_ms, 99))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def min_ms(self) -> float:
        """The fastest run."""
        return min(self.all_ms)


class PartTiming(_Record):
    """One call of a part by itself, of which an observation takes `runs`."""

    name: str
    runs: int
    call: Timing


class Configuration(_Record):
    """What was measured of one policy.

    Attributes:
        name: the folder or file, the passes, or the kind of baseline.
        backend: `tensorrt`, `tensorrt-rtx`, `inductor`, `onnxruntime`, `torch-eager` or `torch-compile`.
        ran: what ran where, in a phrase.
        device: the product's name of the GPU, or `the CPU`.
        on_gpu: whether the times are of CUDA events.
        sizes: batch, views, prompt_length, horizon and steps, as far as they are known.
        swept: those of them that are swept.
        latency: from inputs on the device to outputs on it.
        call: from inputs in host memory to outputs there, by the host's clock.
        parts: of a split engine, and of baselines.
        throughput: observations a second, launched without waiting for one another.
        memory: bytes that loading and running took: of the GPU without its context, else of this process at its peak;
            None where that cannot be read.
        load_s: seconds of loading; imports are not counted.
        first_s: seconds of the first call, in which graphs are captured and kernels loaded.
    """

    name: str
    backend: str
    ran: str
    device: str
    on_gpu: bool
    sizes: dict[str, int]
    swept: dict[str, int]
    latency: Timing
    call: Timing
    parts: list[PartTiming]
    throughput: float
    memory: int | None
    load_s: float
    first_s: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cold_start_s(self) -> float:
        """Seconds from the start of loading to the first actions."""
        return self.load_s + self.first_s


class Benchmark(_Record):
    """All that was measured in one run: on which machine, with which versions, and how often each was timed."""

    versions: dict[str, str]
    cpu: str
    gpu: str | None
    warm_up: int
    runs: int
    seed: int
    configurations: list[Configuration]


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        baselines: of `BASELINES`.
        passes: pipelines that ONNX files are compiled with first; none: they run as they are, in onnxruntime.
        backend: which compiles them; None as `pi05c compile` chooses.
        split: parts that become one engine each.
        sweeps: sizes to export models with, one after the other, by the names of `SWEPT`.
        steps: denoising steps, of a folder with a step of its own.
        runs: timed runs of each configuration.
        warm_up: runs before them.
        seed: of observations and of random weights.
    """

    paths: Sequence[Path]
    baselines: Sequence[str] = ()
    passes: Sequence[str] = ()
    backend: str | None = None
    split: str | None = None
    sweeps: Mapping[str, Sequence[int]] = field(default_factory=dict)
    steps: int | None = None
    runs: int = 50
    warm_up: int = 5
    seed: int = 0


def parse_sweeps(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Read `views=1,2,3` and the like; one size may be given several times.

    Raises:
        UsageError: no such size, or no positive numbers.
    """
    sweeps: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in SWEPT:
            raise UsageError(f"--sweep {text!r} names no size: choose among {', '.join(SWEPT)}")
        words = [word.strip() for word in numbers.split(",")]
        if not all(word.isdecimal() and int(word) for word in words):
            raise UsageError(f"--sweep {text!r} is malformed: write {name}=1,2,3")
        sweeps[name] = tuple(dict.fromkeys((*sweeps.get(name, ()), *map(int, words))))
    return sweeps


def bench(request: Request, progress: Progress | None = None) -> Benchmark:
    """Measure each policy, and the baselines at the same sizes, in this process.

    Raises:
        UsageError: options that contradict each other or what the paths are.
        Pi05cError: a model or folder cannot be used.
    """
    progress = progress or Progress()
    _refuse(request)
    _import_torch(request)
    gauge = _Gauge()
    found: list[Configuration] = []
    baselines: dict[tuple[str, str], Configuration] = {}
    for subject in _subjects(request, progress):
        with progress.stage(f"measure {subject.name}"):
            measured = [_measure(subject, request, gauge, progress)]
        for kind in request.baselines:
            plain, key = subject.baseline(kind, request.seed), (kind, subject.config_key)
            if key not in baselines:
                with progress.stage(f"measure {plain.name}"):
                    baselines[key] = _measure(plain, request, gauge, progress)
            measured.append(baselines[key])
        for swept in subject.points:
            label = "".join(f", {name} {value}" for name, value in swept.items())
            labelled = [
                item.model_copy(update={"name": item.name + label, "swept": swept}) for item in measured
            ]
            found += [item for item in labelled if item not in found]
    return Benchmark(
        versions={"python": platform.python_version(), **_versions()},
        cpu=_cpu(),
        gpu=gauge.gpu,
        warm_up=request.warm_up,
        runs=request.runs,
        seed=request.seed,
        configurations=found,
    )


def _refuse(request: Request) -> None:
    if request.runs < 1 or request.warm_up < 0:
        raise UsageError("--runs must be at least 1, and --warm-up at least 0")
    if unknown := [kind for kind in request.baselines if kind not in BASELINES]:
        raise UsageError(f"unknown baseline {unknown[0]!r}: choose among {', '.join(BASELINES)}")
    folders = [path for path in request.paths if path.is_dir()]
    if folders and request.sweeps:
        raise UsageError(
            f"--sweep exports models of other sizes, and {folders[0]} is a folder: name its model.onnx"
        )
    if request.steps is not None and (len(folders) < len(request.paths) or request.passes):
        raise UsageError(
            "--steps is for folders whose step is an engine of its own: use --sweep steps=N for a model"
        )
    compiling = request.passes or request.backend or request.split
    if len(folders) == len(request.paths) and compiling:
        raise UsageError("--passes, --backend and --split compile ONNX files, and there are only folders")
    if compiling and not request.passes:
        raise UsageError("--backend and --split say how an ONNX file is compiled: give its --passes too")


def _import_torch(request: Request) -> None:
    """Import torch where something will need it, so that nothing's start is charged with it."""
    folders = [read_manifest(path) for path in request.paths if path.is_dir()]
    flavours = [manifest.engine.flavour for manifest in folders]
    if request.baselines or INDUCTOR in (request.backend, *flavours) or compute_capabilities():
        with contextlib.suppress(ImportError):
            import torch  # noqa: F401


@dataclass(frozen=True)
class _Subject:
    """A policy that can be loaded.

    Attributes:
        points: the values of swept sizes that it stands for.
    """

    name: str
    load: Callable[[], Policy]
    config: Pi05Config | None
    points: Sequence[dict[str, int]] = ({},)

    @property
    def config_key(self) -> str:
        """What a baseline is made of."""
        return "" if self.config is None else replace(self.config, name="").to_json()

    def baseline(self, kind: str, seed: int) -> _Subject:
        """The plain model of the same sizes."""
        config = self.config
        if config is None:
            raise Pi05cError(
                f"{self.name} does not say which network it is, so there is no plain model to set beside it: export it "
                "with pi05c, or leave out --baseline"
            )
        return _Subject(kind, lambda: load_baseline(config, kind, seed), config)


def _subjects(request: Request, progress: Progress) -> Iterator[_Subject]:
    """Each policy in turn; what is compiled for one is removed before the next."""
    for path in request.paths:
        if path.is_dir():
            yield _folder(path, request.steps)
        elif not request.sweeps and not request.passes:
            yield _graph(path)
        else:
            for model, points in _models(path, request, progress):
                yield from (replace(each, points=points) for each in _compiled(model, request, progress))


def _folder(path: Path, steps: int | None, backend: str | None = None) -> _Subject:
    config = _config(read_manifest(path).source.config)
    if config is not None:
        config = config.with_options(steps=steps)
    return _Subject(path.name or str(path), lambda: load_policy(path, backend=backend, steps=steps), config)


def _graph(path: Path) -> _Subject:
    """An ONNX file as it is, in onnxruntime."""
    from pi05c.graph.io import load

    config = _config(source_of(load(path), hashed=False).config)

    def load_graph() -> Policy:
        runner = load_runner(path)
        vocabulary = None if config is None else config.architecture.llm.vocab_size
        session = HostSession(runner.run)
        return Policy(
            Contract(runner.inputs, vocabulary=vocabulary),
            runner.outputs,
            ONNXRUNTIME,
            "the graph in onnxruntime",
            session,
        )

    return _Subject(path.name, load_graph, config)


def _models(
    path: Path, request: Request, progress: Progress
) -> Iterator[tuple[Path, Sequence[dict[str, int]]]]:
    """The model, or models with random weights that differ from it in one size each, and what each stands for."""
    if not request.sweeps:
        yield path, [{}]
        return
    from pi05c.frontend.export import export_model
    from pi05c.graph.io import load

    config = _config(source_of(load(path), hashed=False).config)
    if config is None:
        raise Pi05cError(
            f"{path} does not say which network it is, so models of other sizes cannot be made: export it with pi05c"
        )
    points: dict[Pi05Config, list[dict[str, int]]] = {}
    for name, values in request.sweeps.items():
        for value in values:
            points.setdefault(config.with_options(**{name: value}), []).append({name: value})
    for config, stands_for in points.items():
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=path.parent) as scratch:
            described = Path(scratch) / "config.json"
            described.write_text(
                json.dumps({"architecture": asdict(config.architecture), "action_dim": config.action_dim})
            )
            model = Path(scratch) / "model.onnx"
            sizes = {name: getattr(config, name) for name in SWEPT}
            told = ", ".join(f"{name}={value}" for point in stands_for for name, value in point.items())
            with progress.stage(f"export {told}"):
                export_model(None, model, config=str(described), random=True, seed=request.seed, **sizes)
            yield model, stands_for


def _compiled(model: Path, request: Request, progress: Progress) -> Iterator[_Subject]:
    """The model compiled by each pipeline, one after the other; as it is where there are none."""
    from pi05c.compilation import compile

    if not request.passes:
        yield replace(_graph(model), name="plain graph")
        return
    for passes in request.passes:
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=model.parent) as scratch:
            compiled = compile(
                model,
                Path(scratch) / "engine",
                passes=passes,
                split=request.split,
                backend=request.backend,
                calibration=_made_up_samples(model, request.seed),
                max_error=_ANY_ERROR,
                cache=Path(scratch) / "cache",
                progress=progress,
            )
            runs_here, _ = choose(compiled.folder, compiled.manifest)
            yield replace(_folder(compiled.folder, None, runs_here), name=passes)


def _made_up_samples(model: Path, seed: int) -> Sequence[dict[str, Any]]:
    """One sample to calibrate with and one to verify on; those that belong to a model that says not what it is."""
    from pi05c.frontend.samples import synthetic_samples
    from pi05c.graph.io import load

    config = _config(source_of(load(model), hashed=False).config)
    if config is None:
        return []
    arrays = synthetic_samples(config, seed, 2)
    return [{name: array[index] for name, array in arrays.items()} for index in range(2)]


def _config(fields: Any) -> Pi05Config | None:
    return None if fields is None else Pi05Config.from_json(fields)


def _measure(subject: _Subject, request: Request, gauge: _Gauge, progress: Progress) -> Configuration:
    gauge.start()
    start = time.perf_counter()
    with _told(progress):
        policy = subject.load()
    load_s = time.perf_counter() - start
    with policy, _told(progress):
        observation = policy.made_up(request.seed)
        start = time.perf_counter()
        policy(observation)
        first_s = time.perf_counter() - start
        for _ in range(request.warm_up):
            policy(observation)
        call = Timing(all_ms=[_seconds(lambda: policy(observation)) * 1e3 for _ in range(request.runs)])
        session = policy.session
        latency, throughput = call, 1e3 * request.runs / sum(call.all_ms)
        if session.on_gpu:
            latency = _timed(session.seconds, session.launch, request.runs)
            throughput = request.runs / session.seconds(lambda: _repeat(session.launch, request.runs))
        parts = [
            PartTiming(name=part.name, runs=part.runs, call=_timed(session.seconds, part.work, request.runs))
            for part in session.stages()
        ]
        sizes = {} if subject.config is None else {name: getattr(subject.config, name) for name in SWEPT}
        return Configuration(
            name=subject.name,
            backend=policy.backend,
            ran=policy.ran,
            device=session.device_name,
            on_gpu=session.on_gpu,
            sizes=sizes,
            swept={},
            latency=latency,
            call=call,
            parts=parts,
            throughput=throughput * sizes.get("batch", 1),
            memory=gauge.read(session.on_gpu),
            load_s=load_s,
            first_s=first_s,
        )


def _timed(seconds: Callable[[Callable[[], Any]], float], work: Callable[[], Any], runs: int) -> Timing:
    seconds(work)
    return Timing(all_ms=[seconds(work) * 1e3 for _ in range(runs)])


def _repeat(work: Callable[[], None], times: int) -> None:
    for _ in range(times):
        work()


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextlib.contextmanager
def _told(progress: Progress) -> Iterator[None]:
    """Show warnings as those of the command."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        progress.warn(str(warning.message))


class _Gauge:
    """Memory in use on the GPU, where there is one, and by this process."""

    def __init__(self) -> None:
        self._device: Any = None
        if compute_capabilities():
            from pi05c.backend.cuda import CudaDevice

            self._device = CudaDevice()  # keeps the context, so that it is not counted
        self.gpu: str | None = None if self._device is None else self._device.name
        self._before = (0, 0)

    def start(self) -> None:
        """Count from here on."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
        self._before = self._device_memory(), memory_of(what="VmRSS")

    def read(self, on_gpu: bool) -> int | None:
        """Bytes more than at the start: now on the GPU, at the peak in host memory; None where it cannot be read."""
        if on_gpu:
            return self._device_memory() - self._before[0]
        peak = memory_of()
        return max(peak - self._before[1], 0) if peak else None

    def _device_memory(self) -> int:
        if self._device is None:
            return 0
        self._device.activate()
        return int(self._device.memory())


def _cpu() -> str:
    """The product's name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


__all__ = ["Benchmark", "Configuration", "PartTiming", "Request", "Timing", "bench", "parse_sweeps"]
