"""From a plain graph to an engine folder: passes, calibration, verification, plan, manifest, in one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

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
from pi05c.calibration import cached_ranges
from pi05c.comparison import Comparison, compare
from pi05c.fitting import fitting, planned_inputs
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
from pi05c.graph.errors import BuildError, Pi05cError, VerificationError
from pi05c.graph.io import Model, load, save
from pi05c.graph.ranges import Ranges
from pi05c.graph.runner import Array
from pi05c.inspection import data_files, source_of, tensor_records, with_fixed
from pi05c.manifest import (
    FORMAT,
    CalibrationRecord,
    EngineRecord,
    ErrorRecord,
    Manifest,
    PassRecord,
    PipelineRecord,
    SkipRecord,
    TensorRecord,
    VerificationRecord,
    file_records,
    write_manifest,
)
from pi05c.passes import PRESETS, pipeline
from pi05c.precision import default_limit, dtypes_of, precision_of, refuse_limit
from pi05c.progress import Progress
from pi05c.report import write_report
from pi05c.samples import Samples, find_samples, save_samples, split

_RECORDED_VERSIONS = ("pi05c", "onnx", "onnx-graphsurgeon", "onnxruntime", "numpy", "ml_dtypes")

Outputs = list[dict[str, Array]]
"""Outputs by name, one mapping a sample."""


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
    passes: str = "default",
    calibration: Sequence[Path | str] = (),
    target: str | None = None,
    backend: str | None = None,
    max_error: float | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    **build_options: Any,
) -> CompileResult:
    """Compile an ONNX model into an engine folder.

    Args:
        model: the plain graph.
        output: the folder to write; an engine folder that is there is replaced in one step.
        passes: pipeline text.
        calibration: .npz files or folders of samples, or the word `synthetic`; see `find_samples`.
        target: GPUs to build for, `sm120,sm89`; None for the one at hand.
        backend: `tensorrt-rtx`, `tensorrt`, `onnxruntime` for a folder without a plan, None to choose.
        max_error: largest relative L2 error of any output of a held-back sample; None for the limit of the
            precision that the graph has (`pi05c.precision.LIMITS`).
        cache: folder of measured ranges; None for the user's.
        build_options: further fields of `pi05c.backend.tensorrt.BuildOptions`.

    Raises:
        Pi05cError: the model, the samples or the request cannot be used; nothing was written.
        VerificationError: the error is beyond the limit; the result is kept as OUTPUT.rejected.
        BuildError: the builder failed; the graph and the way to repeat it are kept as OUTPUT.failed.
    """
    progress = progress or Progress()
    path, output = Path(model), Path(output)
    if path.is_dir():
        raise Pi05cError(
            f"{path} is a folder, but an ONNX file is compiled: pi05c export makes one of a checkpoint, and "
            "pi05c build makes the plan of an engine folder"
        )
    refuse_limit(max_error)
    steps = pipeline.parse(passes, PRESETS)
    builder = choose(backend, target, build_options)
    refuse_unsupported(builder.targets, {name for step in steps for name in step.spec.formats})
    if builder.chosen:
        progress.note(builder.chosen)
    with progress.stage("load"):
        plain = load(path)
        given = [Path(item) for item in calibration if str(item) != "synthetic"]
        check_output(output, inputs=[path, *data_files(plain), *given])
        inputs, outputs = tensor_records(plain.graph.inputs), tensor_records(plain.graph.outputs)
        refuse_without_profile(builder, inputs)
        fixed = planned_inputs(plain, steps)
        found = find_samples(plain, calibration)
        samples = None if found is None else fitting(found, fixed)
        source = source_of(plain)
    if found is not None and samples is not None and len(samples) < len(found):
        progress.warn(
            f"{len(found) - len(samples)} of {len(found)} samples do not fit what the graph is specialized for and are "
            "left out"
        )
    measured, held_back = split(samples) if samples is not None else (None, None)
    if samples is not None and samples.synthetic:
        progress.warn(
            f"ranges come from made-up samples ({samples.source}): record some before a robot moves"
        )
    if held_back is not None and len(held_back) == 0:
        held_back = measured
        progress.warn("there is one sample only: it serves both calibration and verification")

    calibrated = False
    with scratch(output) as work:
        reference = _run_all(path, _fed(plain, held_back), progress, "run the plain graph")

        def calibrate(current: Model, tensors: Sequence[str]) -> Ranges | None:
            fed = _fed(current, measured)
            if fed is None:
                return None
            nonlocal calibrated
            calibrated = True
            with progress.stage("calibrate") as update:
                return cached_ranges(
                    current,
                    tensors,
                    fed,
                    cache,
                    scratch=work.folder,
                    progress=lambda done, total: update(done / total, f"sample {done} of {total}"),
                )

        with progress.stage("passes") as update:
            results = pipeline.run(
                plain,
                steps,
                calibrate=calibrate,
                before_step=lambda step: update(None, step.spec.name),
            )
        for step in steps:
            if measured is None and step.spec.ranges is not None:
                progress.warn(
                    f"{step.spec.name} ran without ranges, so activations are not guarded against overflow: give "
                    "--calibration FILE.npz"
                )
        refuse_unsupported(builder.targets, dtypes_of(plain.graph))
        with progress.stage("write the graph"):
            plain.metadata["pi05c.pipeline"] = ",".join(step.text for step in steps)
            save(plain, work.folder / GRAPH)
        precision = precision_of(plain.graph)
        limit = max_error
        if limit is None:
            limit = default_limit(precision, weights_random=source.weights_random)
        simulated = _run_all(work.folder / GRAPH, _fed(plain, held_back), progress, "run the rewritten graph")
        verification = None
        if held_back is not None:
            verification = verification_record(compare(reference, simulated), limit)
            save_samples(
                work.folder / SAMPLES,
                [{**held_back[i], **reference[i]} for i in range(len(held_back))],
                synthetic=held_back.synthetic,
            )
            inputs, outputs = _with_ranges(inputs, held_back), _with_ranges(outputs, reference)
        else:
            progress.warn("there are no samples, so nothing was verified: give --calibration FILE.npz")
        manifest = Manifest(
            format=FORMAT,
            versions={name: _version(name) for name in _RECORDED_VERSIONS},
            source=source,
            pipeline=PipelineRecord(
                requested=passes,
                resolved=",".join(step.text for step in steps),
                passes=[_pass_record(result) for result in results],
            ),
            inputs=with_fixed(inputs, fixed),
            outputs=outputs,
            precision=precision,
            calibration=_calibration_record(samples, measured) if calibrated else None,
            verification=verification,
            engine=engine_record(builder),
            files={},
        )
        if verification is not None and not verification.passed:
            worst = verification.worst()
            kept = _keep(work, rejected(output), manifest, "the graph failed verification")
            raise VerificationError(
                f"{worst.output} of held-back sample {worst.sample} has a relative L2 error of "
                f"{worst.relative_l2:.4g}, beyond the limit of {limit:g}: the result {kept} and must not be "
                "deployed; leave out passes, or raise --max-error if this is acceptable"
            )
        engine = _build(work, output, builder, manifest, progress)
        manifest = manifest.model_copy(update={"engine": engine})
        with progress.stage("publish"):
            manifest = _publish(work, output, manifest)
    return CompileResult(output, manifest, {stage.title: stage.seconds for stage in progress.stages})


def verification_record(comparison: Comparison, limit: float) -> VerificationRecord:
    """A comparison as the manifest holds it."""
    return VerificationRecord(
        limit=limit,
        passed=comparison.passes(limit),
        errors=[
            ErrorRecord(
                sample=error.sample,
                output=error.output,
                relative_l2=error.relative_l2,
                cosine=error.cosine,
                sqnr_db=error.sqnr_db if math.isfinite(error.sqnr_db) else None,
                max_abs=error.max_abs,
            )
            for error in comparison.errors
        ],
    )


def _fed(model: Model, samples: Samples | None) -> Samples | None:
    """The samples without what is no input of the model."""
    return None if samples is None else samples.only(tensor.name for tensor in model.graph.inputs)


def _run_all(path: Path, samples: Samples | None, progress: Progress, title: str) -> Outputs:
    if samples is None:
        return []
    with progress.stage(title) as update:
        runner = load_runner(path)
        results = []
        for index, sample in enumerate(samples):
            update(index / len(samples), f"sample {index + 1} of {len(samples)}")
            results.append(runner.run(sample))
        return results


def _build(
    work: Scratch, output: Path, builder: Builder, manifest: Manifest, progress: Progress
) -> EngineRecord:
    record = manifest.engine
    if builder.options is None:
        return record
    if builder.obstacle is not None:
        script = work.folder / SCRIPT
        script.write_text(trtexec_script(GRAPH, builder.targets, builder.options), encoding="utf-8")
        script.chmod(0o755)
        progress.note(f"{builder.obstacle}: {SCRIPT} in the folder makes the plan on the device")
        return record
    with progress.stage("build the engine") as update:
        try:
            return built(record, build_plan(work.folder, work.folder / PLAN, builder.options, update))
        except BuildError as error:
            _keep(work, failed(output), manifest, "the builder failed")
            message = str(error).replace(str(work.folder), str(failed(output)))
            raise BuildError(message) from error


def _keep(work: Scratch, place: Path, manifest: Manifest, reason: str) -> str:
    """Put what must not be deployed beside its place; the end of a sentence that says where it is."""
    engine = manifest.engine.model_copy(update={"reason": reason})
    try:
        _publish(work, place, manifest.model_copy(update={"engine": engine}))
    except Pi05cError as error:
        return f"is not kept ({error})"
    return f"is kept as {place}"


def _publish(work: Scratch, place: Path, manifest: Manifest) -> Manifest:
    write_report(work.folder, manifest)
    manifest = manifest.model_copy(update={"files": file_records(work.folder)})
    write_manifest(work.folder, manifest)
    work.publish(place)
    return manifest


def _pass_record(result: pipeline.StepResult) -> PassRecord:
    spec = result.step.spec
    defaults = {name: parameter.default for name, parameter in spec.options.items()}
    return PassRecord(
        name=spec.name,
        exact=spec.exact,
        options={**defaults, **result.step.options},
        changed=len(result.changes),
        skipped=[SkipRecord(where=skip.where, reason=skip.reason) for skip in result.skips],
        notes=list(result.notes),
        seconds=round(result.seconds, 4),
        nodes_before=result.nodes_before,
        nodes_after=result.nodes_after,
    )


def _calibration_record(samples: Samples | None, measured: Samples | None) -> CalibrationRecord | None:
    if samples is None or measured is None:
        return None
    return CalibrationRecord(
        source=samples.source,
        sha256=measured.sha256,
        synthetic=samples.synthetic,
        used=len(measured),
        held_back=len(samples) - len(measured),
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


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


__all__ = ["CompileResult", "Pi05cError", "compile", "verification_record"]
