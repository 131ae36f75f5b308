"""The properties of loading, saving and pipelines on the models of the ONNX project (`onnx_corpus`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from contents import contents
from generated_properties import run_measured
from onnx_corpus import CorpusCase, file_cases, one_of_each, operator_cases, with_constants
from pass_graphs import Array
from random_graphs import Generated

from pi05c.backend.onnxruntime import OnnxRuntimeRunner
from pi05c.graph.check import problems
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model, load, save
from pi05c.graph.session import open_session, session_options
from pi05c.passes import PRESETS
from pi05c.passes.pipeline import InvalidGraphError, StepResult, parse, run
from pi05c.samples import Samples

SHARDS = 4
"""Into so many tests a property is divided, for processes that take tests from each other."""

RANDOM = frozenset({"Bernoulli", "Dropout", "Multinomial", "RandomUniformLike"})

MISINFERRED = frozenset({"test_stft", "test_stft_with_window"})
"""Of which onnx 1.23 infers another shape than theirs once the size of a frame is a constant."""

LARGE_WHOLE_NUMBERS = "logsoftmax_large_number"
"""In the names of cases whose inputs are whole numbers beyond what float16 tells apart."""

ERRORS = {"fp16": 0.05, "default": 0.1}
"""Relative L2 errors that no operator by itself may exceed."""

NOT_LOADED = ("is a sequence", "is a value of the kind", "is of opset", "holds texts")
"""What a graph is refused for that is one by ONNX's rules, and not one that an engine could be."""


def by_operators(case: CorpusCase) -> object:
    return case.operators


def by_types(case: CorpusCase) -> object:
    return case.operators, case.types


def each(shard: int, alike: Callable[[CorpusCase], object] | None) -> list[CorpusCase]:
    """Every fourth operator case, of those that are alike one."""
    cases = operator_cases() if alike is None else one_of_each(operator_cases(), alike)
    return list(cases[shard::SHARDS])


def check(cases: Iterable[CorpusCase], holds: Callable[[CorpusCase, Path], None], folder: Path) -> None:
    """Whether a property holds of each, with all of which it does not."""
    failed = []
    for case in cases:
        path = folder / "given.onnx"
        path.write_bytes(case.proto.SerializeToString())
        try:
            if not _is_refused(path):
                holds(case, path)
        except Exception as error:
            failed.append(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
    assert not failed, "\n".join(failed)


def _is_refused(path: Path) -> bool:
    """Whether a file is refused for a reason that is known."""
    try:
        load(path)
    except Pi05cError as error:
        said = str(error)
    else:
        return False
    is_one_sentence(said)
    assert any(reason in said for reason in NOT_LOADED), said
    return True


def is_one_sentence(said: str) -> None:
    """Whether a message is for people."""
    assert said
    assert "\n" not in said
    assert "Traceback" not in said


# Loading and saving


def nothing_is_lost(case: CorpusCase, path: Path) -> None:
    """What the file holds is in the one that is saved, which gives the same bits where onnxruntime runs the first."""
    saved = path.with_name("saved.onnx")
    save(load(path), saved)
    proto = onnx.load(saved)
    assert contents(proto) == contents(_as_loaded(case.proto))
    if _is_valid(case.proto):
        onnx.checker.check_model(proto, full_check=True)
    again = path.with_name("again") / "saved.onnx"
    again.parent.mkdir(exist_ok=True)
    save(load(saved), again)
    assert again.read_bytes() == saved.read_bytes()
    before = in_onnxruntime(path, case.inputs)
    if before is not None and not RANDOM & case.operators:
        after = in_onnxruntime(saved, case.inputs)
        assert after is not None
        assert [_bits(values) for values in after] == [_bits(values) for values in before]


def _as_loaded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With what loading is meant to change: constants are no inputs, and ONNX's operators are of some opset."""
    expected = onnx.ModelProto()
    expected.CopyFrom(proto)
    graph = expected.graph
    stored = {tensor.name for tensor in graph.initializer}
    if stored or any(node.op_type == "Constant" for node in graph.node):
        expected.ir_version = max(expected.ir_version, 4)
    values = [value for value in graph.input if value.name not in stored]
    del graph.input[:]
    graph.input.extend(values)
    if not any(entry.domain in ("", "ai.onnx") for entry in expected.opset_import):
        known = onnx.helper.OP_SET_ID_VERSION_MAP.items()
        newest = max(v for (domain, v), ir in known if domain == "ai.onnx" and ir <= proto.ir_version)
        expected.opset_import.add(domain="", version=min(newest, 21))
    return expected


def _is_valid(proto: onnx.ModelProto) -> bool:
    """Whether onnx infers what it says; of an operator that is a function of float32 it may not."""
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def in_onnxruntime(path: Path, inputs: dict[str, Array]) -> list[Array] | None:
    """The outputs without anything of pi05c, None where onnxruntime does not run the model or numpy lacks a type."""
    options = session_options()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = open_session(str(path), options, ["ConstantFolding"])
        fed = {value.name: np.copy(inputs[value.name]) for value in session.get_inputs()}
        values: list[Array] = session.run(None, fed)
    except Exception:
        return None
    return [np.asarray(value) for value in values]


def _bits(values: Array) -> tuple[object, ...]:
    return (
        values.dtype,
        values.shape,
        values.tolist() if values.dtype == object else values.tobytes(),
    )


@pytest.mark.parametrize("shard", range(SHARDS))
def test_nothing_is_lost_of_one_case_of_each_operator_and_type(shard: int, tmp_path: Path) -> None:
    check(each(shard, by_types), nothing_is_lost, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_nothing_is_lost_of_any_case(shard: int, tmp_path: Path) -> None:
    check(each(shard, None), nothing_is_lost, tmp_path)


# Pipelines


def exact_passes_keep_outputs(case: CorpusCase, path: Path) -> None:
    """After each pass of `exact`, against onnxruntime without pi05c, else against what the model is said to give."""
    expected = reference(case, path)
    tolerance = Generated(case.proto, {}, ()).tolerance

    def after_step(current: Model, result: StepResult) -> None:
        if result.rewrites and expected is not None:
            outputs = simulated(current, path, case)
            if outputs is not None:
                error = difference(outputs, expected)
                assert error <= tolerance, f"{result.step.spec.name} moved the outputs by {error}"

    model = load(path)
    run(model, parse("exact", PRESETS), after_step=after_step)
    assert problems(model) == []


def is_valid_after(pipeline: str) -> Callable[[CorpusCase, Path], None]:
    """The graph is valid and about as exact as its types, or the refusal is one sentence that blames no pass."""

    def holds(case: CorpusCase, path: Path) -> None:
        model = load(path)
        try:
            run_measured(model, pipeline, Samples.of([case.inputs] if _is_numeric(case) else []))
        except InvalidGraphError:
            raise
        except Pi05cError as error:
            is_one_sentence(str(error))
            return
        assert problems(model) == []
        expected = reference(case, path)
        if expected is not None and (outputs := simulated(model, path, case)) is not None:
            error = difference(outputs, expected, rounded=True)
            limit = np.inf if LARGE_WHOLE_NUMBERS in case.name else ERRORS[pipeline]
            assert error <= limit, f"the outputs moved by {error}"

    return holds


def reference(case: CorpusCase, path: Path) -> list[Any] | None:
    """What the original gives; None where chance decides."""
    if RANDOM & case.operators:
        return None
    return in_onnxruntime(path, case.inputs) or list(case.outputs) or None


def simulated(model: Model, path: Path, case: CorpusCase) -> list[Array] | None:
    """What a rewritten model gives; None where onnxruntime lacks an operator of the original too."""
    rewritten = path.with_name("rewritten.onnx")
    save(model, rewritten)
    try:
        runner = OnnxRuntimeRunner(rewritten, threads=1)
        return list(runner.run({spec.name: case.inputs[spec.name] for spec in runner.inputs}).values())
    except Pi05cError as error:
        said = str(error)
    is_one_sentence(said)
    assert in_onnxruntime(path, case.inputs) is None, said
    return None


def difference(outputs: Sequence[Any], expected: Sequence[Any], *, rounded: bool = False) -> float:
    """The largest L2 error of an output relative to its size; infinite where types, shapes or what is not finite differ.

    Args:
        rounded: numbers that are no floats may differ, as where one is cast or compared.
    """
    assert len(outputs) == len(expected)
    return max((_error(*pair, rounded) for pair in zip(outputs, expected, strict=True)), default=0.0)


def _error(actual: Array, expected: Array, rounded: bool) -> float:
    if expected.dtype.itemsize == 1 and expected.dtype == np.uint8 and actual.dtype.kind == "V":
        expected = expected.view(actual.dtype)  # FP8 as onnxruntime gives it
    if actual.dtype != expected.dtype:
        return np.inf
    if actual.shape != expected.shape:
        return np.inf
    if actual.dtype == object or actual.dtype.kind in "biu":
        return 0.0 if rounded or actual.tolist() == expected.tolist() else np.inf
    wide = np.complex128 if actual.dtype.kind == "c" else np.float64
    actual, expected = actual.astype(wide), expected.astype(wide)
    finite = np.isfinite(expected)
    if not rounded and not np.array_equal(actual[~finite], expected[~finite], equal_nan=True):
        return np.inf
    error = np.linalg.norm(actual[finite] - expected[finite]) / (np.linalg.norm(expected[finite]) or 1.0)
    return float(error) if np.isfinite(error) else np.inf


def _is_numeric(case: CorpusCase) -> bool:
    return all(isinstance(array, np.ndarray) and array.dtype != object for array in case.inputs.values())


def constant(cases: Iterable[CorpusCase], fed: int) -> list[CorpusCase]:
    """Those cases whose inputs can be constants but for the first `fed`."""
    made = (with_constants(case, fed) for case in cases if case.name not in MISINFERRED)
    return [case for case in made if case is not None]


@pytest.mark.parametrize("shard", range(SHARDS))
def test_exact_passes_keep_the_outputs_of_each_operator(shard: int, tmp_path: Path) -> None:
    check(each(shard, by_operators), exact_passes_keep_outputs, tmp_path)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_folding_keeps_the_outputs_of_each_operator(shard: int, tmp_path: Path) -> None:
    check(constant(each(shard, by_operators), 0), exact_passes_keep_outputs, tmp_path)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_default_leaves_a_valid_graph_of_each_operator(shard: int, tmp_path: Path) -> None:
    check(each(shard, by_operators), is_valid_after("default"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_exact_passes_keep_the_outputs_of_any_case(shard: int, tmp_path: Path) -> None:
    cases = each(shard, None)
    check(cases, exact_passes_keep_outputs, tmp_path)
    check(constant(cases, 0), exact_passes_keep_outputs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["fp16", "default"])
@pytest.mark.parametrize("shard", range(SHARDS))
def test_pipelines_leave_a_valid_graph_of_any_case(shard: int, pipeline: str, tmp_path: Path) -> None:
    cases = each(shard, None)
    check(cases, is_valid_after(pipeline), tmp_path)
    check(constant(cases, 1), is_valid_after(pipeline), tmp_path)


# Files


@pytest.mark.parametrize("kind", ["simple", "light_squeezenet"])
def test_files(kind: str, tmp_path: Path) -> None:
    cases = [case for case in file_cases() if kind in case.name]
    assert cases
    for holds in (nothing_is_lost, exact_passes_keep_outputs, is_valid_after("default")):
        check(cases, holds, tmp_path)


@pytest.mark.slow
def test_all_files(tmp_path: Path) -> None:
    for holds in (
        nothing_is_lost,
        exact_passes_keep_outputs,
        is_valid_after("fp16"),
        is_valid_after("default"),
    ):
        check(file_cases(), holds, tmp_path)


@pytest.fixture(autouse=True, scope="module")
def _say_nothing() -> None:
    """onnxruntime warns of what it cannot run."""
    onnxruntime.set_default_logger_severity(4)
