"""From a plain graph to an engine folder: passes, calibration, verification, plan, manifest, in one step."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from pi05c.backend.devices import device_of
from pi05c.backend.inductor import InductorOptions
from pi05c.backend.tensorrt import BuildOptions, trtexec_script
from pi05c.building import (
    Builder,
    build_plan,
    built,
    choose,
    engine_record,
    refuse_impossible_shapes,
    refuse_unsupported,
    refuse_without_profile,
)
from pi05c.checkpoint import Finished, RewrittenRecord, keep, key_of, take_over
from pi05c.comparison import Comparison, OutputError, compare
from pi05c.extraction import Grouping, PartGraph
from pi05c.fitting import planned_inputs
from pi05c.folder import (
    GRAPH,
    SAMPLES,
    SCRIPT,
    Scratch,
    check_output,
    failed,
    rejected,
    remove_unfinished,
    scratch,
    unfinished,
)
from pi05c.graph.check import refuse_invalid
from pi05c.graph.errors import BuildError, Pi05cError, UsageError, VerificationError
from pi05c.graph.io import Model, load, save
from pi05c.graph.runner import Array
from pi05c.graph.specialization import FixedInput
from pi05c.graph.weights import Stamp, stamp
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
    SourceRecord,
    TensorRecord,
    VerificationRecord,
    file_records,
    write_manifest,
)
from pi05c.observation import Observation
from pi05c.passrun import RunOptions, RunSamples, plan, samples_for
from pi05c.pipelinefile import MODEL, files_of, read_pipeline_file
from pi05c.precision import default_limit, dtypes_of, operators_of, precision_of, refuse_limit
from pi05c.progress import Progress
from pi05c.report import write_report
from pi05c.reproducer import Request, keep_failure
from pi05c.rewriting import PassFailedError, Piece, rewrite
from pi05c.sampleruns import Outputs, PlainRun, only, plain_run, run_all, simulation
from pi05c.samples import Given, Samples, on_disk, save_samples
from pi05c.splitting import PartPasses, cut, parse_part_passes, parse_split, pieces_of
from pi05c.thresholds import Method, parse_method

_RECORDED_VERSIONS = ("pi05c", "onnx", "onnx-graphsurgeon", "onnxruntime", "numpy", "ml_dtypes")

_DEPENDS_ON = (*_RECORDED_VERSIONS, "onnx-ir", "tensorrt", "tensorrt-rtx", "torch")
"""Packages that what a compile makes depends on."""


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
    calibration: Given = (),
    calibration_method: str = "max",
    target: str | None = None,
    backend: str | None = None,
    max_error: float | None = None,
    cache: Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    options: RunOptions | None = None,
    executor: Executor | None = None,
    **build_options: Any,
) -> CompileResult:
    """Compile an ONNX model into an engine folder.

    Args:
        model: the plain graph.
        output: the folder to write; an engine folder that is there is replaced in one step.
        passes: pipeline text, None for `default` or for that of the stage which `options` starts from; of a split
            engine also `TEXT,PART=TEXT,PART=TEXT`, see `parse_part_passes`.
        split: parts that become one engine each, `vision,prefix+denoise`; None for one engine.
        calibration: .npz files or folders of samples, or the word `synthetic`, see `find_samples`; or the samples
            themselves, mappings from input name to array, from any iterable, which go to the disk while this runs.
        calibration_method: how the ranges of what is quantized are chosen; see `pi05c.thresholds.parse_method`.
        target: GPUs to build for, `sm120,sm89`; None for the one at hand.
        backend: `tensorrt-rtx`, `tensorrt`, `inductor`, `onnxruntime` for a folder without a plan, None to choose.
        max_error: largest relative L2 error of any output of a held-back sample; None for the limit of the
            precision that the graph has (`pi05c.precision.LIMITS`).
        cache: folder of measured ranges; None for the user's.
        fresh: forget what an earlier run of the same finished, and measure ranges again.
        options: how the run of passes is looked at.
        executor: where samples are measured, one a task; None: in this process. Ranges are the same.
        build_options: further fields of `pi05c.backend.tensorrt.BuildOptions` or
            `pi05c.backend.inductor.InductorOptions`.

    Raises:
        Pi05cError: the model, the samples or the request cannot be used; nothing was written.
        VerificationError: the error is beyond the limit; the result is kept as OUTPUT.rejected.
        Pi05cError, VerificationError: a pass failed, or `options` has its result checked and the check failed; the graph
            before it and the way to repeat it are kept as OUTPUT.failed-pass.
        BuildError: the builder failed; the graph and the way to repeat it are kept as OUTPUT.failed.
    """
    progress, options, output = progress or Progress(), options or RunOptions(), Path(output)
    refuse_limit(max_error)
    method = parse_method(calibration_method)
    place = output.absolute()
    near = next((folder for folder in place.parents if folder.is_dir()), Path(place.anchor))
    with on_disk(calibration, near) as found:
        job = _prepare(
            Path(model),
            output,
            passes,
            split,
            found,
            method,
            target,
            backend,
            max_error,
            options,
            build_options,
            progress,
        )
        return _run_job(job, output, cache, fresh, progress, executor)


def _run_job(
    job: _Job,
    output: Path,
    cache: Path | None,
    fresh: bool,
    progress: Progress,
    executor: Executor | None,
) -> CompileResult:
    with scratch(output) as work:
        finished = take_over(work, output, job.key, fresh=fresh)
        if finished is not None:
            progress.note(f"goes on with what an earlier run of this finished: {finished.told}")
        if finished is None or finished.manifest is None:
            with Observation.beside(work.folder) as observation:
                calibrated = job.measured if finished is None and job.uses_ranges else None
                plain = plain_run(job.path, job.parts, calibrated, job.held_back, observation, progress)
                if finished is None:
                    finished = _rewrite(job, output, work, plain, cache, fresh, progress, executor)
                manifest = _verify(job, output, work, finished, plain.held_back, observation, progress)
            finished = finished.model_copy(update={"manifest": manifest})
            _refuse_changed(job.stamps)
            keep(work, finished)
        manifest = _build(work, output, job.builder, finished, progress)
        with progress.stage("publish"):
            _refuse_changed(job.stamps)
            manifest = _publish(work, output, manifest)
            remove_unfinished(unfinished(output))
    return CompileResult(output, manifest, {stage.title: stage.seconds for stage in progress.stages})


@dataclass(frozen=True)
class _Job:
    """What is compiled and how, known before anything is written.

    Attributes:
        requested: the passes, as they were asked for.
        by_part: the passes of each piece, by its place.
        parts: of a policy that is split.
        stamps: of the files that are read.
        plain: the plain graph, which passes rewrite in place.
        inputs, outputs: of the plain graph.
        fixed: values of inputs that passes fix.
        key: of what the result depends on; empty for a run that is looked at, which starts from the beginning.
    """

    path: Path
    requested: str
    by_part: dict[str, PartPasses]
    grouping: Grouping | None
    options: RunOptions
    builder: Builder
    plain: Model
    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    parts: list[PartGraph] | None
    samples: RunSamples | None
    source: SourceRecord
    stamps: Mapping[Path, Stamp]
    fixed: Sequence[FixedInput]
    max_error: float | None
    calibration: Sequence[Path | str]
    method: Method
    target: str | None
    key: str

    @property
    def measured(self) -> Samples | None:
        """The samples that serve calibration."""
        return None if self.samples is None else self.samples.measured

    @property
    def held_back(self) -> Samples | None:
        """The samples that serve verification."""
        return None if self.samples is None else self.samples.held_back

    @property
    def uses_ranges(self) -> bool:
        """Whether a pass is calibrated."""
        return any(step.spec.ranges for chosen in self.by_part.values() for step in chosen.plan.steps)


def _prepare(
    path: Path,
    output: Path,
    passes: str | None,
    split: str | None,
    calibration: Sequence[Path | str],
    method: Method,
    target: str | None,
    backend: str | None,
    max_error: float | None,
    options: RunOptions,
    build_options: Mapping[str, Any],
    progress: Progress,
) -> _Job:
    """Read what is to be compiled; refuse what cannot be."""
    if path.is_dir():
        raise Pi05cError(
            f"{path} is a folder, but an ONNX file is compiled: pi05c export makes one of a checkpoint, and "
            "pi05c build makes the plan of an engine folder"
        )
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
    if grouping is not None and builder.profiles:
        raise UsageError("--shapes cannot be given with --split: parts hand over tensors of fixed sizes")
    if builder.chosen:
        progress.note(builder.chosen)
    with progress.stage("load"):
        plain = load(path)
        refuse_invalid(plain)
        given = [Path(item) for item in calibration if str(item) != "synthetic"]
        check_output(output, inputs=[path, *data_files(plain), *given])
        parts = None if grouping is None else cut(path, grouping)
        refuse_without_profile(builder, tensor_records(plain.graph.inputs))
        refuse_impossible_shapes(builder, plain)
        samples = samples_for(plain, steps, calibration, progress)
        read = {path, *data_files(plain), *(() if samples is None else samples.files)}
        stamps = {file: stamp(file.stat()) for file in read if file.exists()}
        source = source_of(plain)
        warn_of_other_model(passes, source.sha256, progress)
    return _Job(
        path=path,
        requested=passes or "default",
        by_part=by_part,
        grouping=grouping,
        options=options,
        builder=builder,
        plain=plain,
        inputs=tensor_records(plain.graph.inputs),
        outputs=tensor_records(plain.graph.outputs),
        parts=parts,
        samples=samples,
        source=source,
        stamps=stamps,
        fixed=planned_inputs(plain, steps),
        max_error=max_error,
        calibration=calibration,
        method=method,
        target=target,
        key=_key(options, passes, by_part, builder, samples, method, source, max_error),
    )


_WITHOUT_EFFECT: dict[type, dict[str, Any]] = {
    BuildOptions: {"time_limit_s": None, "verbose": False, "timing_cache": None},
    InductorOptions: {"time_limit_s": None, "memory_limit": None},
}
"""Fields of builder options that do not change what is built, each as it is where nothing is asked for."""


def _key(
    options: RunOptions,
    passes: str | None,
    by_part: Mapping[str, PartPasses],
    builder: Builder,
    samples: RunSamples | None,
    method: Method,
    source: SourceRecord,
    max_error: float | None,
) -> str:
    """The hash of all that a result depends on; empty where that cannot be known or the passes are looked at."""
    looks = replace(options, rewrite_limit=(), stop_after=None)
    if looks != RunOptions():
        return ""
    built = builder.options
    return key_of(
        {
            "source": source.model_dump(mode="json"),
            "passes": [passes, {place: chosen.plan.text for place, chosen in by_part.items()}],
            "limits": [options.rewrite_limit, options.stop_after],
            "samples": samples
            and [
                [part.sha256, part.source, part.synthetic] for part in (samples.measured, samples.held_back)
            ],
            "method": str(method),
            "max_error": max_error,
            "targets": [target.name for target in builder.targets],
            "engine": built and repr(replace(built, **_WITHOUT_EFFECT[type(built)])),
            "obstacle": builder.obstacle,
            "versions": {name: _version(name) for name in _DEPENDS_ON},
        }
    )


def _rewrite(
    job: _Job,
    output: Path,
    work: Scratch,
    plain: PlainRun,
    cache: Path | None,
    fresh: bool,
    progress: Progress,
    executor: Executor | None,
) -> Finished:
    """Take each piece through its passes and write its graph."""
    if job.parts is None:
        chosen = job.by_part[""]
        current = job.plain if chosen.plan.start is None else chosen.plan.load(job.path)
        pieces = [Piece("", current, chosen.requested, chosen.plan, job.measured, held_back=job.held_back)]
    else:
        pieces = pieces_of(job.parts, job.by_part, job.measured, plain.measured, work.folder)
    targets = job.builder.targets
    records = []
    for piece in pieces:
        try:
            result = rewrite(
                piece,
                progress,
                job.options,
                targets=targets,
                cache=cache,
                fresh=fresh,
                scratch=work.folder,
                reads={job.path, *(() if job.samples is None else job.samples.files)},
                device=device_of(targets[0]) if targets else None,
                method=job.method,
                executor=executor,
            )
        except PassFailedError as failure:
            request = Request(job.path, job.options, job.calibration, job.method, job.target)
            raise _kept_failure(output, failure, piece, request, job.grouping) from failure.cause
        records.append(
            RewrittenRecord(
                place=piece.place, pipeline=result.pipeline, calibrated=result.calibrated, runs=piece.runs
            )
        )
    narrow_borders([piece.model for piece in pieces], {record.name for record in job.outputs})
    for piece in pieces:
        refuse_unsupported(targets, dtypes_of(piece.model.graph))
    for piece in pieces:
        with progress.stage(piece.title("write the graph")) as update:
            save(piece.model, work.folder / piece.place / GRAPH, update=update)
    finished = Finished(key=job.key, rewritten=records)
    _refuse_changed(job.stamps)
    keep(work, finished)
    return finished


def _verify(
    job: _Job,
    output: Path,
    work: Scratch,
    finished: Finished,
    reference: Outputs,
    observation: Observation,
    progress: Progress,
) -> Manifest:
    """Run the rewritten graphs against the plain one, and say in a manifest what they are.

    Raises:
        VerificationError: the error is beyond the limit; the result is kept aside.
    """
    graphs = {record.place: load(work.folder / record.place / GRAPH).graph for record in finished.rewritten}
    precision = precision_of(*graphs.values())
    limit = job.max_error
    if limit is None:
        limit = default_limit(precision, weights_random=job.source.weights_random)
    inputs, outputs = job.inputs, job.outputs
    names = [record.name for record in outputs]
    runs = {record.place: record.runs for record in finished.rewritten}
    simulated = run_all(
        lambda: simulation(work.folder, runs, names, observation),
        job.held_back,
        progress,
        "run the rewritten graph",
    )
    observation.end()
    verification = None
    if job.held_back is not None:
        actions = only(reference, names)
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
            [{**sample, **acted} for sample, acted in zip(job.held_back, actions, strict=True)],
            synthetic=job.held_back.synthetic,
        )
        inputs, outputs = _with_ranges(inputs, job.held_back), _with_ranges(outputs, actions)
    else:
        progress.warn("there are no samples, so nothing was verified: give --calibration FILE.npz")
    calibrated = any(record.calibrated for record in finished.rewritten)
    engine = engine_record(job.builder)
    manifest = Manifest(
        format=FORMAT,
        versions=_versions(),
        source=job.source,
        pipeline=_asked(job.requested, finished) if job.parts else finished.rewritten[0].pipeline,
        inputs=with_fixed(inputs, job.fixed),
        outputs=outputs,
        precision=precision,
        calibration=_calibration_record(job.samples, job.method)
        if job.samples is not None and calibrated
        else None,
        verification=verification,
        engine=engine,
        files={},
        parts=[
            _part_record(record, graphs[record.place], engine, outputs, reference, simulated)
            for record in finished.rewritten
            if record.place
        ],
        operators=operators_of(*graphs.values()),
    )
    if verification is not None and not verification.passed:
        worst = verification.worst()
        kept = _keep(work, rejected(output), manifest, "the graph failed verification")
        raise VerificationError(
            f"{worst.output} of held-back sample {worst.sample} has a relative L2 error of "
            f"{worst.relative_l2:.4g}, beyond the limit of {limit:g}{_first_departure(verification)}: the result "
            f"{kept} and must not be deployed; leave out passes, or raise --max-error if this is acceptable"
        )
    return manifest


def warn_of_other_model(passes: str | None, sha256: str, progress: Progress) -> None:
    """Say which file of `passes` was made for another model than the one of this hash."""
    for path in files_of(passes or ""):
        made_for = read_pipeline_file(path).provenance.get(MODEL)
        if made_for is not None and made_for != sha256:
            progress.warn(
                f"{path} was made for another model: what it keeps in higher precision may not fit this one"
            )


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


def _asked(passes: str, finished: Finished) -> PipelineRecord:
    """What was asked for of a split engine; what the passes did is told part by part."""
    resolved = ",".join(f"{record.place}={record.pipeline.resolved}" for record in finished.rewritten)
    return PipelineRecord(requested=passes, resolved=resolved, passes=[])


def _part_record(
    record: RewrittenRecord,
    graph: gs.Graph,
    engine: EngineRecord,
    policy_outputs: Sequence[TensorRecord],
    reference: Outputs,
    simulated: Outputs,
) -> PartRecord:
    """What the manifest says of a part; its errors are those of what it hands over."""
    inputs, outputs = tensor_records(graph.inputs), tensor_records(graph.outputs)
    own = {tensor.name for tensor in policy_outputs}
    handed = only(reference, [tensor.name for tensor in outputs if tensor.name not in own])
    errors = compare(handed, simulated).errors if any(handed) else ()
    return PartRecord(
        name=record.place,
        pipeline=record.pipeline,
        inputs=_with_ranges(inputs, reference),
        outputs=_with_ranges(outputs, reference),
        precision=precision_of(graph),
        errors=_error_records(errors),
        engine=engine,
        runs=record.runs,
    )


def _build(work: Scratch, output: Path, builder: Builder, finished: Finished, progress: Progress) -> Manifest:
    """Make the plans or packages that are not made yet, or the scripts that make plans; the manifest with them."""
    manifest = finished.manifest
    assert manifest is not None
    if builder.options is None:
        return manifest
    if builder.obstacle is not None:
        made_by = f"`pi05c build {output}` makes the package"
        if isinstance(builder.options, BuildOptions):
            for place in manifest.places:
                text = trtexec_script(GRAPH, builder.targets, builder.options)
                _write_script(work.folder / place / SCRIPT, text)
            if manifest.parts:
                _write_script(work.folder / SCRIPT, _all_parts_script(manifest.places))
            made_by = f"{SCRIPT} in the folder makes the plan"
        progress.note(f"{builder.obstacle}: {made_by} on the device")
        return manifest
    for place in manifest.places:
        if place in finished.built:
            continue
        title = f"build the engine of {place}" if place else "build the engine"
        folder = work.folder / place
        with progress.stage(title) as update:
            try:
                result = build_plan(folder, folder / manifest.engine_of(place).product, builder, update)
            except BuildError as error:
                _keep(work, failed(output), manifest, "the builder failed")
                message = str(error).replace(str(work.folder), str(failed(output)))
                raise BuildError(message) from error
        manifest = manifest.with_engine(place, built(manifest.engine_of(place), result, place))
        finished = finished.model_copy(update={"manifest": manifest, "built": [*finished.built, place]})
        keep(work, finished)
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


def _refuse_changed(stamps: Mapping[Path, Stamp]) -> None:
    """Refuse a result of which one half may come from a file as it was before somebody wrote to it."""
    for file, before in stamps.items():
        if file.exists() and stamp(file.stat()) != before:
            raise Pi05cError(
                f"{file} changed while it was compiled: compile again when nothing writes it any more"
            )


def _publish(work: Scratch, place: Path, manifest: Manifest) -> Manifest:
    write_report(work.folder, manifest)
    manifest = manifest.model_copy(update={"files": file_records(work.folder)})
    write_manifest(work.folder, manifest)
    work.publish(place)
    return manifest


def _calibration_record(samples: RunSamples, method: Method) -> CalibrationRecord:
    measured = samples.measured
    return CalibrationRecord(
        source=measured.source,
        sha256=measured.sha256,
        synthetic=measured.synthetic,
        used=len(measured),
        held_back=0 if samples.held_back is measured else len(samples.held_back),
        method=str(method),
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
