"""From a plain graph to an engine folder: passes, calibration, verification, plan, manifest, in one step."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx

from pi05c.backend.devices import device_of
from pi05c.backend.onnxruntime import load_runner
from pi05c.backend.tensorrt import trtexec_script
from pi05c.building import (
    Builder,
    build_plan,
    built,
    choose,
    engine_record,
    refuse_unsupported,
    refuse_without_profile,
)
from pi05c.chain import load_chain
from pi05c.comparison import Comparison, OutputError, compare
from pi05c.extraction import Grouping, PartGraph
from pi05c.fitting import planned_inputs
from pi05c.folder import (
    GRAPH,
    PLAN,
    SAMPLES,
    SCRIPT,
    Scratch,
    check_output,
    failed,
    rejected,
    scratch,
)
from pi05c.graph.errors import BuildError, Pi05cError, UsageError, VerificationError
from pi05c.graph.io import Model, load, save
from pi05c.graph.runner import Array
from pi05c.handover import narrow_borders
from pi05c.inspection import data_files, source_of, tensor_records, with_fixed
from pi05c.manifest import (
    FORMAT,
    CalibrationRecord,
    EngineRecord,
    ErrorRecord,
    Manifest,
    PartRecord,
    PipelineRecord,
    TensorRecord,
    VerificationRecord,
    file_records,
    write_manifest,
)
from pi05c.observation import Observation, ObservedRunner
from pi05c.passes import pipeline
from pi05c.passrun import RunOptions, RunSamples, plan, samples_for
from pi05c.precision import default_limit, dtypes_of, operators_of, precision_of, refuse_limit
from pi05c.progress import Progress
from pi05c.report import write_report
from pi05c.reproducer import Request, keep_failure
from pi05c.rewriting import PassFailedError, Piece, rewrite
from pi05c.samples import Samples, save_samples
from pi05c.splitting import PartPasses, cut, parse_part_passes, parse_split, pieces_of, run_plain

_RECORDED_VERSIONS = ("pi05c", "onnx", "onnx-graphsurgeon", "onnxruntime", "numpy", "ml_dtypes")

Outputs = list[dict[str, Array]]
"""Tensors by name, one mapping a sample."""

Run = Callable[[Mapping[str, Array]], dict[str, Array]]
"""Runs a graph, or several in a chain, on one sample."""


@dataclass(frozen=True)
class CompileResult:
    """An engine folder that was made.

    Attributes:
        folder: where it lies.
        manifest: what it says of itself.
        seconds: wall-clock seconds of each stage, by its title.
    """

    folder: Path
    manifest: Manifest
    seconds: dict[str, float]


def compile(
    model: Path | str,
    output: Path | str,
    *,
    passes: str | None = None,
    split: str | None = None,
    calibration: Sequence[Path | str] = (),
    target: str | None = None,
    backend: str | None = None,
    max_error: float | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    options: RunOptions | None = None,
    **build_options: Any,
) -> CompileResult:
    """Compile an ONNX model into an engine folder.

    Args:
        model: the plain graph.
        output: the folder to write; an engine folder that is there is replaced in one step.
        passes: pipeline text, None for `default` or for that of the stage which `options` starts from; of a split
            engine also `TEXT,PART=TEXT,PART=TEXT`, see `parse_part_passes`.
        split: parts that become one engine each, `vision,prefix+denoise`; None for one engine.
        calibration: .npz files or folders of samples, or the word `synthetic`; see `find_samples`.
        target: GPUs to build for, `sm120,sm89`; None for the one at hand.
        backend: `tensorrt-rtx`, `tensorrt`, `onnxruntime` for a folder without a plan, None to choose.
        max_error: largest relative L2 error of any output of a held-back sample; None for the limit of the
            precision that the graph has (`pi05c.precision.LIMITS`).
        cache: folder of measured ranges; None for the user's.
        options: how the run of passes is looked at.
        build_options: further fields of `pi05c.backend.tensorrt.BuildOptions`.

    Raises:
        Pi05cError: the model, the samples or the request cannot be used; nothing was written.
        VerificationError: the error is beyond the limit; the result is kept as OUTPUT.rejected.
        Pi05cError, VerificationError: a pass failed, or `options` has its result checked and the check failed; the graph
            before it and the way to repeat it are kept as OUTPUT.failed-pass.
        BuildError: the builder failed; the graph and the way to repeat it are kept as OUTPUT.failed.
    """
    progress, options = progress or Progress(), options or RunOptions()
    path, output = Path(model), Path(output)
    if path.is_dir():
        raise Pi05cError(
            f"{path} is a folder, but an ONNX file is compiled: pi05c export makes one of a checkpoint, and "
            "pi05c build makes the plan of an engine folder"
        )
    refuse_limit(max_error)
    grouping = None if split is None else parse_split(split)
    by_part = _passes_of(passes, grouping, options)
    steps = [step for chosen in by_part.values() for step in chosen.plan.steps]
    dump = None if options.dump is None else options.dump.resolve()
    if dump is not None and output.resolve() in (dump, *dump.parents):
        raise UsageError(
            f"--dump {options.dump} lies in the engine folder {output}: name a folder of its own"
        )
    builder = choose(backend, target, build_options)
    refuse_unsupported(builder.targets, {name for step in steps for name in step.formats})
    if grouping is not None and builder.options is not None and builder.options.profiles:
        raise UsageError("--shapes cannot be given with --split: parts hand over tensors of fixed sizes")
    if builder.chosen:
        progress.note(builder.chosen)
    with progress.stage("load"):
        plain = load(path)
        given = [Path(item) for item in calibration if str(item) != "synthetic"]
        check_output(output, inputs=[path, *data_files(plain), *given])
        inputs, outputs = tensor_records(plain.graph.inputs), tensor_records(plain.graph.outputs)
        parts = None if grouping is None else cut(path, grouping)
        refuse_without_profile(builder, inputs)
        fixed = planned_inputs(plain, steps)
        samples = samples_for(plain, steps, calibration, progress)
        source = source_of(plain)
    measured = None if samples is None else samples.measured
    held_back = None if samples is None else samples.held_back

    with scratch(output) as work, Observation.beside(work.folder) as observation:
        if parts is None:
            chosen = by_part[""]
            current = plain if chosen.plan.start is None else chosen.plan.load(path)
            pieces = [Piece("", current, chosen.requested, chosen.plan, measured, held_back=held_back)]
            reference = _run_all(
                lambda: _observed_plain(path, observation), held_back, progress, "run the plain graph"
            )
        else:
            run = _plain_run(path, parts, steps, measured, held_back, observation, progress)
            pieces = pieces_of(parts, by_part, measured, run.measured, work.folder)
            reference = run.held_back
        device = device_of(builder.targets[0]) if builder.targets else None
        rewritten = []
        for piece in pieces:
            try:
                result = rewrite(
                    piece,
                    progress,
                    options,
                    targets=builder.targets,
                    cache=cache,
                    scratch=work.folder,
                    reads={path, *(() if samples is None else samples.files)},
                    device=device,
                )
            except PassFailedError as failure:
                request = Request(path, options, calibration, target)
                raise _kept_failure(output, failure, piece, request, grouping) from failure.cause
            rewritten.append(result)
        narrow_borders([piece.model for piece in pieces], {record.name for record in outputs})
        for piece in pieces:
            refuse_unsupported(builder.targets, dtypes_of(piece.model.graph))
        for piece in pieces:
            with progress.stage(piece.title("write the graph")):
                save(piece.model, work.folder / piece.place / GRAPH)
        precision = precision_of(*(piece.model.graph for piece in pieces))
        limit = max_error
        if limit is None:
            limit = default_limit(precision, weights_random=source.weights_random)
        simulated = _run_all(
            lambda: _simulation(work.folder, pieces, outputs, observation),
            held_back,
            progress,
            "run the rewritten graph",
        )
        observation.end()
        verification = None
        if held_back is not None:
            actions = _only(reference, [record.name for record in outputs])
            verification = verification_record(compare(actions, simulated), limit).model_copy(
                update={
                    "drift": observation.drift(),
                    "layers": observation.layers(),
                    "layer_samples": observation.samples,
                    "quantizers": observation.quantizers(),
                }
            )
            save_samples(
                work.folder / SAMPLES,
                [{**held_back[i], **actions[i]} for i in range(len(held_back))],
                synthetic=held_back.synthetic,
            )
            inputs, outputs = _with_ranges(inputs, held_back), _with_ranges(outputs, actions)
        else:
            progress.warn("there are no samples, so nothing was verified: give --calibration FILE.npz")
        manifest = Manifest(
            format=FORMAT,
            versions=_versions(),
            source=source,
            pipeline=rewritten[0].pipeline if parts is None else _asked(passes or "default", pieces),
            inputs=with_fixed(inputs, fixed),
            outputs=outputs,
            precision=precision,
            calibration=_calibration_record(samples)
            if samples is not None and any(result.calibrated for result in rewritten)
            else None,
            verification=verification,
            engine=engine_record(builder),
            files={},
            parts=[
                _part_record(piece, result.pipeline, engine_record(builder), outputs, reference, simulated)
                for piece, result in zip(pieces, rewritten, strict=True)
                if piece.place
            ],
            operators=operators_of(*(piece.model.graph for piece in pieces)),
        )
        if verification is not None and not verification.passed:
            worst = verification.worst()
            kept = _keep(work, rejected(output), manifest, "the graph failed verification")
            raise VerificationError(
                f"{worst.output} of held-back sample {worst.sample} has a relative L2 error of "
                f"{worst.relative_l2:.4g}, beyond the limit of {limit:g}{_first_departure(verification)}: the result "
                f"{kept} and must not be deployed; leave out passes, or raise --max-error if this is acceptable"
            )
        manifest = _build(work, output, builder, manifest, progress)
        with progress.stage("publish"):
            manifest = _publish(work, output, manifest)
    return CompileResult(output, manifest, {stage.title: stage.seconds for stage in progress.stages})


def verification_record(comparison: Comparison, limit: float) -> VerificationRecord:
    """A comparison as the manifest holds it."""
    return VerificationRecord(
        limit=limit, passed=comparison.passes(limit), errors=_error_records(comparison.errors)
    )


def _first_departure(verification: VerificationRecord) -> str:
    """Where the error first goes beyond the limit, as the end of a clause; empty where that was not measured."""
    step, layer = verification.first_drift(), verification.first_departure()
    found = []
    if step is not None:
        found.append(f"x departs that far after denoising step {step.step}")
    if layer is not None:
        found.append(f"the first layer that does is {layer.where} ({layer.relative_l2:.4g}, {layer.node!r})")
    return f"; {', '.join(found)}" if found else ""


def _error_records(errors: Sequence[OutputError]) -> list[ErrorRecord]:
    return [
        ErrorRecord(
            sample=error.sample,
            output=error.output,
            relative_l2=error.relative_l2,
            cosine=error.cosine,
            sqnr_db=error.sqnr_db if math.isfinite(error.sqnr_db) else None,
            max_abs=error.max_abs,
        )
        for error in errors
    ]


def _passes_of(text: str | None, grouping: Grouping | None, options: RunOptions) -> dict[str, PartPasses]:
    """The passes of each piece, by its place."""
    if grouping is not None:
        return parse_part_passes(text or "default", grouping, options)
    chosen = plan(text, options)
    return {"": PartPasses(text or ("default" if chosen.start is None else chosen.text), chosen)}


def _runs(path: Path, edit: Callable[[onnx.ModelProto], None]) -> Run:
    """Runs a graph on samples that may hold more than it takes, such as inputs that were fixed."""
    runner = load_runner(path, edit=edit)
    names = [spec.name for spec in runner.inputs]
    return lambda sample: runner.run({name: sample[name] for name in names})


def _observed_plain(path: Path, observation: Observation) -> Run:
    """Runs the plain graph and keeps what is observed of it."""
    observer = observation.plain(path)
    run = _runs(path, observer.edit)
    return lambda sample: observer.take(run(sample))


def _simulation(
    folder: Path, pieces: Sequence[Piece], outputs: Sequence[TensorRecord], observation: Observation
) -> Run:
    """What runs the rewritten graphs in onnxruntime, observed."""
    if len(pieces) == 1 and not pieces[0].place:
        runner = observation.rewritten(folder / GRAPH)
        names = [spec.name for spec in runner.inputs]
        return lambda sample: runner.run({name: sample[name] for name in names})
    runs = {piece.place: piece.runs for piece in pieces}
    places, names = list(runs), [record.name for record in outputs]

    def load_part(place: str) -> ObservedRunner:
        return observation.rewritten(folder / place / GRAPH, runs=runs[place], place=place)

    return load_chain(folder, places, names, load=load_part).run_all


@dataclass(frozen=True)
class _PlainRun:
    """What the plain graph gave, borders included; None where nothing is calibrated."""

    measured: Outputs | None
    held_back: Outputs


def _plain_run(
    path: Path,
    parts: Sequence[PartGraph],
    steps: Sequence[pipeline.Step],
    measured: Samples | None,
    held_back: Samples | None,
    observation: Observation,
    progress: Progress,
) -> _PlainRun:
    """Run the whole plain graph once a sample, for verification and for what parts are calibrated on."""
    if measured is None or held_back is None:
        return _PlainRun(None, [])
    observer = observation.plain(path)
    if not any(step.spec.ranges is not None for step in steps):
        return _PlainRun(None, run_plain(path, parts, held_back, progress, observer))
    if held_back is measured:
        spaces = run_plain(path, parts, measured, progress, observer)
        return _PlainRun(spaces, spaces)
    held = run_plain(path, parts, held_back, progress, observer)
    return _PlainRun(run_plain(path, parts, measured, progress), held)


def _run_all(load: Callable[[], Run], samples: Samples | None, progress: Progress, title: str) -> Outputs:
    if samples is None:
        return []
    with progress.stage(title) as update:
        run = load()
        results = []
        for index, sample in enumerate(samples):
            update(index / len(samples), f"sample {index + 1} of {len(samples)}")
            results.append(run(sample))
        return results


def _only(spaces: Outputs, names: Sequence[str]) -> Outputs:
    """Some tensors of each sample; those that it lacks are left out."""
    return [{name: space[name] for name in names if name in space} for space in spaces]


def _asked(passes: str, pieces: Sequence[Piece]) -> PipelineRecord:
    """What was asked for of a split engine; what the passes did is told part by part."""
    resolved = ",".join(f"{piece.place}={piece.plan.text}" for piece in pieces)
    return PipelineRecord(requested=passes, resolved=resolved, passes=[])


def _part_record(
    piece: Piece,
    record: PipelineRecord,
    engine: EngineRecord,
    policy_outputs: Sequence[TensorRecord],
    reference: Outputs,
    simulated: Outputs,
) -> PartRecord:
    """What the manifest says of a part; its errors are those of what it hands over."""
    graph = piece.model.graph
    inputs, outputs = tensor_records(graph.inputs), tensor_records(graph.outputs)
    own = {record.name for record in policy_outputs}
    handed = _only(reference, [record.name for record in outputs if record.name not in own])
    errors = compare(handed, simulated).errors if any(handed) else ()
    return PartRecord(
        name=piece.place,
        pipeline=record,
        inputs=_with_ranges(inputs, reference),
        outputs=_with_ranges(outputs, reference),
        precision=precision_of(graph),
        errors=_error_records(errors),
        engine=engine,
        runs=piece.runs,
    )


def _build(work: Scratch, output: Path, builder: Builder, manifest: Manifest, progress: Progress) -> Manifest:
    """Make the plans, or the scripts that make them; the manifest with them."""
    if builder.options is None:
        return manifest
    if builder.obstacle is not None:
        for place in manifest.places:
            text = trtexec_script(GRAPH, builder.targets, builder.options)
            _write_script(work.folder / place / SCRIPT, text)
        if manifest.parts:
            _write_script(work.folder / SCRIPT, _all_parts_script(manifest.places))
        progress.note(f"{builder.obstacle}: {SCRIPT} in the folder makes the plan on the device")
        return manifest
    for place in manifest.places:
        title = f"build the engine of {place}" if place else "build the engine"
        folder = work.folder / place
        with progress.stage(title) as update:
            try:
                result = build_plan(folder, folder / PLAN, builder.options, update)
            except BuildError as error:
                _keep(work, failed(output), manifest, "the builder failed")
                message = str(error).replace(str(work.folder), str(failed(output)))
                raise BuildError(message) from error
        manifest = manifest.with_engine(place, built(manifest.engine_of(place), result, place))
    return manifest


def _write_script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def _all_parts_script(places: Sequence[str]) -> str:
    """The script of the folder: runs that of each part."""
    lines = [f'"$here"/{shlex.quote(place)}/{SCRIPT}' for place in places]
    return "\n".join(
        [
            "#!/bin/sh",
            "# Builds the plan of every part. Run it on the device.",
            "set -eu",
            'here=$(cd "$(dirname "$0")" && pwd)',
            *lines,
            "",
        ]
    )


def _keep(work: Scratch, place: Path, manifest: Manifest, reason: str) -> str:
    """Put what must not be deployed beside its place; the end of a sentence that says where it is."""
    for name in manifest.places:
        engine = manifest.engine_of(name).model_copy(update={"reason": reason})
        manifest = manifest.with_engine(name, engine)
    try:
        _publish(work, place, manifest)
    except Pi05cError as error:
        return f"is not kept ({error})"
    return f"is kept as {place}"


def _kept_failure(
    output: Path, failure: PassFailedError, piece: Piece, request: Request, grouping: Grouping | None
) -> Pi05cError:
    """The error of a pass that failed, which names what was kept of it."""

    def fresh() -> Model:
        if grouping is None:
            return piece.plan.load(request.model)
        return next(part.model for part in cut(request.model, grouping) if part.name == piece.place)

    try:
        script = keep_failure(output, failure, piece, request, fresh, _versions())
        kept = f"{script} repeats it on the graph before that pass"
    except Exception as error:
        kept = f"the graph before that pass is not kept ({error})"
    kind = VerificationError if isinstance(failure.cause, VerificationError) else Pi05cError
    return kind(f"{failure.told}; {kept}")


def _publish(work: Scratch, place: Path, manifest: Manifest) -> Manifest:
    write_report(work.folder, manifest)
    manifest = manifest.model_copy(update={"files": file_records(work.folder)})
    write_manifest(work.folder, manifest)
    work.publish(place)
    return manifest


def _calibration_record(samples: RunSamples) -> CalibrationRecord:
    measured = samples.measured
    return CalibrationRecord(
        source=measured.source,
        sha256=measured.sha256,
        synthetic=measured.synthetic,
        used=len(measured),
        held_back=0 if samples.held_back is measured else len(samples.held_back),
    )


def _with_ranges(records: list[TensorRecord], samples: Sequence[dict[str, Array]]) -> list[TensorRecord]:
    """The records with the smallest and largest value that their tensor takes over the samples."""
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for sample in samples:
        for name, values in sample.items():
            if values.size and values.dtype.kind in "fiub":
                low[name] = min(low.get(name, math.inf), float(values.min()))
                high[name] = max(high.get(name, -math.inf), float(values.max()))
    return [
        record.model_copy(update={"low": low.get(record.name), "high": high.get(record.name)})
        for record in records
    ]


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in _RECORDED_VERSIONS}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


__all__ = ["CompileResult", "Pi05cError", "compile", "verification_record"]
