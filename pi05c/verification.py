"""`pi05c run` and `pi05c verify`: an engine folder or a graph, on the samples at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pi05c.backend.onnxruntime import load_runner
from pi05c.backend.signature import TensorSpec
from pi05c.chain import load_chain
from pi05c.comparison import Comparison, compare
from pi05c.fitting import refuse_unfit
from pi05c.folder import GRAPH, SAMPLES
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.files import refuse_replacing
from pi05c.graph.io import Model, load
from pi05c.graph.runner import Array, Runner
from pi05c.graph.specialization import fixed_inputs
from pi05c.inspection import data_files, spec_of_record
from pi05c.manifest import Manifest, check_files, read_manifest
from pi05c.precision import default_limit, refuse_limit
from pi05c.progress import Progress, Update
from pi05c.runtime import ONNXRUNTIME, Policy, choose
from pi05c.runtime import load as load_policy
from pi05c.samples import Samples, fixed_specs, input_specs, load_samples, save_samples

SIMULATION = "its graph in onnxruntime"


@dataclass(frozen=True)
class RunResult:
    """What ran on how many samples, and what came out."""

    ran: str
    output: Path
    samples: int


@dataclass(frozen=True)
class Verdict:
    """Errors of a folder against the float32 reference of its samples.

    Attributes:
        limit: the largest relative L2 error that passes.
        simulated: the graph in onnxruntime.
        measured: the engine on its GPU, its package on the CPU, or its graph in torch on the GPU at hand; None where
            none of these runs here.
        ran: what was measured, in a phrase.
        why_not_measured: why it was not the engine; None where it was.
    """

    limit: float
    simulated: Comparison
    measured: Comparison | None
    ran: str | None
    why_not_measured: str | None

    @property
    def passed(self) -> bool:
        """Whether what a robot would run is within the limit: the engine where it ran, else its graph."""
        return (self.measured or self.simulated).passes(self.limit)


def run(
    path: Path | str,
    inputs: Path | str,
    output: Path | str,
    *,
    steps: int | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Run an engine folder or an ONNX file on the samples of an .npz file and write the outputs to another.

    The engine runs where it can; of a split one its parts, one after the other. Where there is a GPU and it does not
    load, its graph runs, with a warning.

    Args:
        steps: denoising steps, of a folder with a step of its own; None for as many as the model was exported with.

    Raises:
        UsageError: `steps` is given and the steps are inside an engine, or it is not positive.
        Pi05cError: the folder, the samples or the output file cannot be used.
    """
    path, output = Path(path), Path(output)
    progress = progress or Progress()
    refuse_replacing(output, [path, Path(inputs)])
    engine: Policy | None = None
    manifest = read_manifest(path) if path.is_dir() else None
    if steps is not None and (manifest is None or not manifest.parts):
        raise UsageError(
            f"--steps cannot change the denoising steps of {path}, which are inside its graph: compile it with "
            "--split vision+prefix,step"
        )
    if manifest is not None:
        try:
            engine, _ = _engine(path, manifest, steps)
        except Pi05cError as error:
            if not all((path / place / manifest.engine.product).is_file() for place in manifest.places):
                raise
            progress.warn(str(error))
    model = _model(path, manifest)
    refuse_replacing(output, data_files(model))
    specs = _input_specs(model, manifest)
    samples = load_samples([Path(inputs)], specs, fixed_specs(model))
    refuse_unfit(samples, fixed_inputs(model.metadata))
    ran = SIMULATION if engine is None else engine.ran
    with progress.stage(f"run {ran}") as update:
        results = _results(engine or _simulation(path, manifest, steps), samples, specs, update)
    save_samples(output, results)
    return RunResult(ran, output, len(samples))


def verify(
    folder: Path | str,
    *,
    samples: Path | str | None = None,
    max_error: float | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Compare an engine folder with the float32 reference of its samples, on the machine at hand.

    Args:
        samples: an .npz file of inputs with their reference outputs, as `samples.npz` of the folder, which is taken
            where none is named.
        max_error: the limit on the relative L2 error; None for the one that the folder was compiled with.

    Raises:
        UsageError: `max_error` is no limit.
        Pi05cError: it is no engine folder, a file of it is not the one that was written, or there are no samples
            with reference outputs.
    """
    refuse_limit(max_error)
    folder = Path(folder)
    progress = progress or Progress()
    manifest = read_manifest(folder)
    with progress.stage("check the files"):
        check_files(folder, manifest)
    path = Path(samples) if samples is not None else folder / SAMPLES
    if not path.is_file():
        raise Pi05cError(
            f"there is no {path} to verify against: name inputs with reference outputs with --samples FILE.npz"
        )
    wanted = [spec_of_record(record) for record in manifest.outputs]
    model = _model(folder, manifest)
    specs = _input_specs(model, manifest)
    found = load_samples([path], specs, [*wanted, *fixed_specs(model)])
    refuse_unfit(found, fixed_inputs(model.metadata))
    names = [spec.name for spec in wanted]
    reference = [{name: sample[name] for name in names if name in sample} for sample in found]
    if not all(reference):
        raise Pi05cError(f"{path} holds no reference outputs ({', '.join(names)}): give samples that do")
    with progress.stage(f"run {SIMULATION}") as update:
        simulated = compare(reference, _results(_simulation(folder, manifest), found, specs, update))
    engine, reason = _engine(folder, manifest)
    measured = None
    if engine is not None:
        with progress.stage(f"run {engine.ran}") as update:
            measured = compare(reference, _results(engine, found, specs, update))
    if max_error is None:
        compiled = manifest.verification
        max_error = compiled.limit if compiled is not None else default_limit(manifest.precision)
    return Verdict(max_error, simulated, measured, None if engine is None else engine.ran, reason)


def _results(
    runner: Runner, samples: Samples, inputs: Sequence[TensorSpec], update: Update
) -> list[dict[str, Array]]:
    """The outputs for each sample, of which `inputs` are fed: references and fixed inputs are not."""
    results = []
    for index, sample in enumerate(samples.only(spec.name for spec in inputs)):
        update(index / len(samples), f"sample {index + 1} of {len(samples)}")
        results.append(dict(runner.run(sample)))
    return results


def _model(path: Path, manifest: Manifest | None) -> Model:
    """The graph, or that of the first part."""
    return load(path if manifest is None else path / manifest.places[0] / GRAPH)


def _input_specs(model: Model, manifest: Manifest | None) -> tuple[TensorSpec, ...]:
    """What is fed to a policy: of a split one, what its parts take together and none of them makes."""
    if manifest is None or not manifest.parts:
        return input_specs(model)
    return tuple(spec_of_record(record) for record in manifest.inputs if record.fed)


def _simulation(path: Path, manifest: Manifest | None, steps: int | None = None) -> Runner:
    """The graph, or the graphs of all parts, in onnxruntime."""
    if manifest is None or not manifest.parts:
        return load_runner(path if manifest is None else path / GRAPH)
    return load_chain(path, manifest.places, [record.name for record in manifest.outputs], steps=steps)


def _engine(folder: Path, manifest: Manifest, steps: int | None = None) -> tuple[Policy | None, str | None]:
    """What runs the folder faster than onnxruntime, loaded, and why that is not its engine (None where it is)."""
    chosen, obstacle = choose(folder, manifest)
    if chosen == ONNXRUNTIME:
        return None, obstacle
    return load_policy(folder, backend=chosen, steps=steps), obstacle or None
