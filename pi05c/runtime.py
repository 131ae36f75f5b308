"""`pi05c.load`: an engine folder as a callable policy, on whatever of this machine runs it fastest."""

from __future__ import annotations

import importlib.util
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from pi05c.backend import inductor
from pi05c.backend.gpu import compute_capabilities
from pi05c.backend.inductor import CPU, INDUCTOR
from pi05c.backend.signature import TensorSpec
from pi05c.backend.targets import Flavour, target_of, unsupported
from pi05c.backend.tensorrt import installed_flavours
from pi05c.chain import StageCall, load_chain
from pi05c.contract import Contract, vocabulary_of
from pi05c.folder import GRAPH
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.io import load as load_graph
from pi05c.graph.requirements import WITH_TORCH
from pi05c.graph.specialization import FixedInput
from pi05c.inspection import spec_of_record
from pi05c.manifest import Manifest, read_manifest

ONNXRUNTIME = "onnxruntime"

TORCH = "torch"
"""The graph in torch, uncompiled."""

WARM_UP_RUNS = 3
"""Calls after which clocks and caches have settled; the first of them captures the CUDA graph."""

_NO_TORCH = f"PyTorch is not installed (pip install '{WITH_TORCH}')"

Work = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Puts one run on a device's stream: buffers by input name -> buffers by output name."""

Calls = Callable[[Mapping[str, Any]], list[StageCall]]
"""Runs once, and gives the parts of a run, each by itself."""


class Device(Protocol):
    """Where buffers lie, and the one stream that everything runs on."""

    @property
    def name(self) -> str: ...
    @property
    def on_gpu(self) -> bool: ...
    def activate(self) -> None: ...
    def allocate(self, spec: TensorSpec) -> Any: ...
    def copy_in(self, buffer: Any, value: Any) -> None: ...
    def copy_out(self, buffer: Any, like: Any = None) -> Any: ...
    def capture(self, work: Callable[[], Mapping[str, Any]]) -> Callable[[], None]: ...
    def seconds(self, work: Callable[[], None]) -> float: ...
    def synchronize(self) -> None: ...
    def close(self) -> None: ...


class Part(Protocol):
    """A loaded engine that takes and gives buffers of its device."""

    inputs: tuple[TensorSpec, ...]

    def run(self, inputs: Any) -> dict[str, Any]: ...
    def begin(self) -> None: ...
    def save_cache(self) -> None: ...
    def close(self) -> None: ...


class Policy:
    """A loaded engine folder. Calls from several threads run one after the other.

    Attributes:
        inputs: what a call takes.
        outputs: what it gives.
        backend: `tensorrt`, `tensorrt-rtx`, `inductor` or `onnxruntime`.
        ran: one phrase on what runs where.
        session: what runs it, for measurements.
    """

    def __init__(
        self,
        contract: Contract,
        outputs: Sequence[TensorSpec],
        backend: str,
        ran: str,
        session: Session,
    ) -> None:
        self.inputs, self.outputs = contract.inputs, tuple(outputs)
        self.backend, self.ran = backend, ran
        self._contract, self.session = contract, session
        self._lock = threading.Lock()
        self._closed = False

    def __call__(self, observation: Mapping[str, Any] | None = None, /, **named: Any) -> dict[str, Any]:
        """Run once.

        Args:
            observation: inputs by name; numpy arrays, or torch tensors on the CPU or the GPU.
            named: inputs, or more of them.

        Returns:
            The outputs by name, which later calls do not change: torch tensors on the device of the first tensor if
            an input is one, else numpy arrays.

        Raises:
            Pi05cError: an input is missing, unknown, or not what the folder was compiled for; or the policy is closed.
        """
        given = self._contract.check({**(observation or {}), **named})
        with self._lock:
            if self._closed:
                raise Pi05cError("the policy is closed: load it again")
            like = next((value for value in given.values() if not isinstance(value, np.ndarray)), None)
            return self.session.run(given, like)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As a call; see `pi05c.graph.runner.Runner`."""
        return self(inputs)

    def warm_up(self, observation: Mapping[str, Any] | None = None, runs: int = WARM_UP_RUNS) -> None:
        """Run some times, on a made-up observation where none is given, so that the next call is fast."""
        observation = self.made_up() if observation is None else observation
        for _ in range(runs):
            self(observation)

    def made_up(self, seed: int = 0) -> dict[str, Any]:
        """An observation that a call takes: floats in [-1, 1] and token ids by chance, every mask open."""
        generator = np.random.default_rng(seed)
        values = {spec.name: _by_chance(spec, generator, self._contract.vocabulary) for spec in self.inputs}
        return values | self._contract.fixed_values()

    def close(self) -> None:
        """Free what it holds on the GPU; a second time does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.session.close()

    def __enter__(self) -> Policy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Session(Protocol):
    """What runs a policy: inputs that are placed once may be run many times."""

    @property
    def device_name(self) -> str: ...
    @property
    def on_gpu(self) -> bool: ...
    def run(self, inputs: Mapping[str, Any], like: Any) -> dict[str, Any]: ...
    def place(self, inputs: Mapping[str, Any]) -> None: ...
    def launch(self) -> None: ...
    def seconds(self, work: Callable[[], None]) -> float: ...
    def stages(self) -> list[StageCall]: ...
    def close(self) -> None: ...


class HostSession:
    """The graph, or the graphs of a chain, in onnxruntime."""

    device_name, on_gpu = "the CPU", False

    def __init__(self, work: Work, calls: Calls | None = None) -> None:
        self._work, self._calls = work, calls
        self._arrays: dict[str, Any] = {}

    def run(self, inputs: Mapping[str, Any], like: Any) -> dict[str, Any]:
        self.place(inputs)
        results = self._work(self._arrays)
        if like is None:
            return results
        import torch

        return {name: torch.from_numpy(value).to(like.device) for name, value in results.items()}

    def place(self, inputs: Mapping[str, Any]) -> None:
        """Take the inputs of the runs that follow."""
        self._arrays = {name: _to_numpy(value) for name, value in inputs.items()}

    def launch(self) -> None:
        """Run once."""
        self._work(self._arrays)

    def seconds(self, work: Callable[[], None]) -> float:
        """How long something takes."""
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def stages(self) -> list[StageCall]:
        """The parts of a chain, each by itself; none of a single graph."""
        return [] if self._calls is None else self._calls(self._arrays)

    def close(self) -> None:
        """Nothing to give back."""


class DeviceSession:
    """Engines on a device: buffers that are allocated once, and one CUDA graph that is captured at the first run.

    What cannot be captured runs call by call, with a warning.

    Args:
        calls: gives the parts of `work`, each by itself.
        capture: False to launch each call anew.
    """

    def __init__(
        self,
        device: Device,
        parts: Sequence[Part],
        work: Work,
        inputs: Sequence[TensorSpec],
        calls: Calls | None = None,
        *,
        capture: bool = True,
    ) -> None:
        self._device, self._parts, self._work = device, list(parts), work
        self._calls, self._capture = calls, capture
        self.device_name, self.on_gpu = device.name, device.on_gpu
        self._buffers = {spec.name: device.allocate(spec) for spec in inputs}
        self._results: dict[str, Any] = {}
        self._replay: Callable[[], None] | None = None

    def run(self, inputs: Mapping[str, Any], like: Any) -> dict[str, Any]:
        self.place(inputs)
        self.launch()
        return {name: self._device.copy_out(buffer, like) for name, buffer in self._results.items()}

    def place(self, inputs: Mapping[str, Any]) -> None:
        """Copy the inputs of the runs that follow to the device."""
        self._device.activate()
        for name, value in inputs.items():
            self._device.copy_in(self._buffers[name], value)

    def seconds(self, work: Callable[[], None]) -> float:
        """How long what `work` puts on the stream takes there, by events before and behind it."""
        self._device.activate()
        return self._device.seconds(work)

    def stages(self) -> list[StageCall]:
        """The parts of a chain, each by itself, captured if the whole is; none of a single engine."""
        if self._calls is None:
            return []
        self._begin()
        calls = self._calls(self._buffers)
        self._device.synchronize()
        return [replace(call, work=self._stage(call)) for call in calls]

    def _stage(self, call: StageCall) -> Callable[[], None]:
        def work() -> dict[str, Any]:
            self._begin()
            call.work()
            return {}

        return self._captured(work)

    def launch(self) -> None:
        """Put one run on the stream, from the inputs of the last one."""
        if self._replay is None:
            self._prepare()
        else:
            self._replay()

    def _prepare(self) -> None:
        """Run once as it is, so that everything lazy is done, and capture the second run."""
        self._enqueue()
        self._device.synchronize()
        self._replay = self._captured(self._enqueue)
        for part in self._parts:
            part.save_cache()
        self._replay()

    def _captured(self, work: Callable[[], dict[str, Any]]) -> Callable[[], None]:
        if self._capture:
            try:
                return self._device.capture(work)
            except (Pi05cError, RuntimeError) as error:
                warnings.warn(f"no CUDA graph, so each call is launched anew: {error}", stacklevel=6)

        def launch() -> None:
            work()

        return launch

    def _begin(self) -> None:
        for part in self._parts:
            part.begin()

    def _enqueue(self) -> dict[str, Any]:
        self._begin()
        self._results = self._work(self._buffers)
        return self._results

    def close(self) -> None:
        self._device.activate()
        self._device.synchronize()
        for part in self._parts:
            part.save_cache()
            part.close()
        self._replay, self._results = None, {}
        self._device.close()


def load(folder: Path | str, *, backend: str | None = None, steps: int | None = None) -> Policy:
    """Load an engine folder for repeated runs.

    Args:
        folder: what `pi05c.compile` wrote.
        backend: `tensorrt`, `tensorrt-rtx` or `inductor` for what the folder holds, `torch` or `onnxruntime` for its
            graph; None for what it holds where this machine runs that, else, with a warning, for torch on a GPU, else
            for onnxruntime.
        steps: denoising steps, of a folder whose step is an engine of its own; None for as many as it was exported
            with.

    Raises:
        UsageError: `steps` is given and the steps are inside an engine; an unknown backend.
        Pi05cError: it is no engine folder, or the backend that was asked for does not run it here.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if steps is not None and not manifest.parts:
        raise UsageError(
            f"the denoising steps of {folder} are inside its engine: compile with --split vision+prefix,step to choose "
            "them at run time"
        )
    found, obstacle = choose(folder, manifest, backend)
    if obstacle and backend is None:
        where = "onnxruntime on the CPU" if found == ONNXRUNTIME else "torch on the GPU, uncompiled"
        warnings.warn(f"{obstacle}, so {folder} runs in {where}", stacklevel=2)
    if found == ONNXRUNTIME:
        return _on_host(folder, manifest, steps)
    return _on_device(folder, manifest, found, steps)


def choose(folder: Path, manifest: Manifest, backend: str | None = None) -> tuple[str, str]:
    """What runs a folder here, and why not something faster (empty where nothing is).

    Raises:
        UsageError: the backend is unknown.
        Pi05cError: the one that was asked for does not run it here.
    """
    known = [*(flavour.value for flavour in Flavour), INDUCTOR, TORCH, ONNXRUNTIME]
    if backend is not None and backend not in known:
        raise UsageError(f"unknown backend {backend!r}: choose among {', '.join(known)}")
    if backend in (TORCH, ONNXRUNTIME):
        if backend == TORCH and not inductor.is_installed():
            raise Pi05cError(f"torch does not run here: {_NO_TORCH}")
        return backend, f"{backend} was asked for"
    obstacle = _obstacle(folder, manifest)
    made_by = manifest.engine.flavour
    if backend is not None and made_by != backend and obstacle is None:
        obstacle = f"the {manifest.engine.product} of {folder} was made by {made_by}, not by {backend}"
    if obstacle is None:
        assert made_by is not None
        return made_by, ""
    if backend is not None:
        raise Pi05cError(f"{backend} does not run here: {obstacle}")
    return (TORCH if _torch_runs(folder, manifest) else ONNXRUNTIME), obstacle


def _obstacle(folder: Path, manifest: Manifest) -> str | None:
    engine = manifest.engine
    if missing := [place for place in manifest.places if not (folder / place / engine.product).is_file()]:
        return f"{folder / missing[0]} has no {engine.product} yet"
    if engine.targets != [CPU] and not compute_capabilities():
        return "this machine has no NVIDIA GPU"
    if engine.flavour == INDUCTOR:
        return None if inductor.is_installed() else _NO_TORCH
    flavour = next((flavour for flavour in Flavour if flavour.value == engine.flavour), None)
    if flavour is None:
        return f"{folder} was compiled without a plan"
    if flavour not in installed_flavours():
        return f"{flavour.product} is not installed (pip install '{flavour.extra}')"
    return None


def _torch_runs(folder: Path, manifest: Manifest) -> bool:
    """Whether torch runs the graphs of a folder on the GPU at hand."""
    present = compute_capabilities()
    if not present or not inductor.is_installed() or importlib.util.find_spec("triton") is None:
        return False
    target = target_of(present[0])
    if target is None or unsupported(target, (record.dtype for record in manifest.precision)):
        return False
    import torch

    from pi05c.backend.torch_graph import refuse_unknown

    if not torch.cuda.is_available():
        return False
    try:
        for place in manifest.places:
            refuse_unknown(load_graph(folder / place / GRAPH).graph)
    except Pi05cError:
        return False
    return True


def _on_host(folder: Path, manifest: Manifest, steps: int | None) -> Policy:
    contract = _contract(manifest)
    names = [record.name for record in manifest.outputs]
    calls = None
    if manifest.parts:
        chain = load_chain(folder, manifest.places, names, steps=steps)
        work: Work = chain.run
        calls = chain.calls
    else:
        from pi05c.backend.onnxruntime import load_runner

        work = load_runner(folder / GRAPH).run
    return Policy(
        contract, _outputs(manifest), ONNXRUNTIME, "its graph in onnxruntime", HostSession(work, calls)
    )


def _on_device(folder: Path, manifest: Manifest, backend: str, steps: int | None) -> Policy:
    if backend == TORCH:
        device, load_part = _torch(folder)
    elif backend == INDUCTOR:
        device, load_part = _inductor(folder, manifest)
    else:
        device, load_part = _tensorrt(folder, manifest, Flavour(backend))
    try:
        parts = {place: load_part(place) for place in manifest.places}
        session = device_session(folder, manifest, device, parts, steps)
    except BaseException:
        device.close()
        raise
    what = "its graph in torch" if backend == TORCH else "the engine"
    where = "its GPU" if device.on_gpu else "the CPU"
    return Policy(_contract(manifest), _outputs(manifest), backend, f"{what} on {where}", session)


def _tensorrt(folder: Path, manifest: Manifest, flavour: Flavour) -> tuple[Device, Callable[[str], Part]]:
    """The GPU, and what loads the plan of a place there."""
    from pi05c.backend.cuda import CudaDevice
    from pi05c.backend.tensorrt_engine import TensorRTEngine

    device = CudaDevice()
    return device, lambda place: TensorRTEngine(folder / place / manifest.engine.product, flavour, device)


def _inductor(folder: Path, manifest: Manifest) -> tuple[Device, Callable[[str], Part]]:
    """The device that a folder was compiled for, and what loads the package of a place there."""
    from pi05c.backend.inductor_engine import InductorEngine
    from pi05c.backend.torch_device import TorchCpu, TorchCuda

    device = TorchCpu() if manifest.engine.targets == [CPU] else TorchCuda()
    return device, lambda place: InductorEngine(
        folder / place / GRAPH, folder / place / manifest.engine.product, device
    )


def _torch(folder: Path) -> tuple[Device, Callable[[str], Part]]:
    """The GPU at hand, else the CPU, and what loads the graph of a place there."""
    import torch

    from pi05c.backend.torch_device import TorchCpu, TorchCuda
    from pi05c.backend.torch_engine import TorchEngine

    device = TorchCuda() if torch.cuda.is_available() else TorchCpu()
    return device, lambda place: TorchEngine(folder / place / GRAPH, device)


def device_session(
    folder: Path, manifest: Manifest, device: Device, parts: Mapping[str, Part], steps: int | None = None
) -> DeviceSession:
    """Chain the parts of a folder on one device; what crosses their borders stays there."""
    inputs = _contract(manifest).inputs
    if not manifest.parts:
        (part,) = parts.values()
        return DeviceSession(device, [part], part.run, inputs)

    def place_row(row: Any) -> Any:
        buffer = device.allocate(TensorSpec("row", row.dtype, row.shape))
        device.copy_in(buffer, row)
        return buffer

    names = [record.name for record in manifest.outputs]
    chain = load_chain(
        folder, manifest.places, names, steps=steps, load=parts.__getitem__, place_row=place_row
    )
    return DeviceSession(device, list(parts.values()), chain.run, inputs, chain.calls)


def _contract(manifest: Manifest) -> Contract:
    specs = [spec_of_record(record) for record in manifest.inputs if record.fed]
    fixed = [
        FixedInput(record.name, tuple(int(dim) for dim in record.shape), tuple(record.fixed))
        for record in manifest.inputs
        if record.fixed is not None
    ]
    return Contract(specs, fixed, vocabulary_of(manifest))


def _outputs(manifest: Manifest) -> list[TensorSpec]:
    return [spec_of_record(record) for record in manifest.outputs]


def _by_chance(spec: TensorSpec, generator: np.random.Generator, vocabulary: int | None) -> Any:
    shape = [int(dim) if isinstance(dim, int) else 1 for dim in spec.shape]
    if spec.dtype.kind == "b":
        return np.ones(shape, spec.dtype)
    if spec.dtype.kind in "iu":
        return generator.integers(0, vocabulary or 1, shape).astype(spec.dtype)
    return generator.uniform(-1, 1, shape).astype(spec.dtype)


def _to_numpy(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()


__all__ = [
    "ONNXRUNTIME",
    "TORCH",
    "DeviceSession",
    "HostSession",
    "Policy",
    "choose",
    "device_session",
    "load",
]
