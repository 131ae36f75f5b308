"""`report.html`: what it says of a folder, and that no name of a model becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from small_folder import minimal_manifest
from small_policy import (
    BUILDS,
    ROWS,
    WIDTH,
    policy,
    pretend_installed,
    use_worker,
    wrecking_pass,
    write_policy,
)

import pi05c
from pi05c.folder import REPORT
from pi05c.graph.errors import VerificationError
from pi05c.manifest import (
    CalibrationRecord,
    CostRecord,
    ErrorRecord,
    FileRecord,
    Manifest,
    PassRecord,
    PipelineRecord,
    PrecisionRecord,
    SkipRecord,
    SourceRecord,
    TensorRecord,
    VerificationRecord,
    check_files,
    read_manifest,
)
from pi05c.report import cost_rows, grouped_skips, pass_costs, precision_columns, precision_rows, write_report

__all__ = ["policy", "wrecking_pass"]

HOSTILE = "<img src=x onerror=alert(1)>\"'&</code>"


class _Page(HTMLParser):
    """The tags, text and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def page_of(folder: Path) -> _Page:
    return _Page((folder / REPORT).read_text(encoding="utf-8"))


def skip(where: str, reason: str) -> SkipRecord:
    return SkipRecord(where=where, reason=reason)


def pass_record(
    *skips: SkipRecord, name: str = "quantize_linears", notes: tuple[str, ...] = ()
) -> PassRecord:
    return PassRecord(
        name=name,
        exact=False,
        options={},
        changed=0,
        skipped=list(skips),
        notes=list(notes),
        seconds=0.0,
        nodes_before=1,
        nodes_after=1,
    )


def hostile_manifest(folder: Path) -> Manifest:
    """A manifest with markup in every place that a model, a file name or an option fills."""
    return minimal_manifest(folder).model_copy(
        update={
            "source": SourceRecord(name=HOSTILE, sha256=HOSTILE, opset=21),
            "versions": {"pi05c": HOSTILE},
            "pipeline": PipelineRecord(
                requested=HOSTILE,
                resolved=HOSTILE,
                passes=[pass_record(skip(HOSTILE, HOSTILE), name=HOSTILE, notes=(HOSTILE,))],
            ),
            "inputs": [TensorRecord(name=HOSTILE, dtype="float32", shape=[HOSTILE, 3])],
            "outputs": [TensorRecord(name=HOSTILE, dtype="float32", shape=[1])],
            "precision": [PrecisionRecord(part=HOSTILE, kind=HOSTILE, dtype=HOSTILE, count=1)],
            "calibration": CalibrationRecord(source=HOSTILE, sha256="", synthetic=True, used=1, held_back=1),
            "verification": VerificationRecord(
                limit=0.1,
                passed=False,
                errors=[
                    ErrorRecord(
                        sample=0, output=HOSTILE, relative_l2=1.0, cosine=0.0, sqnr_db=None, max_abs=1.0
                    )
                ],
            ),
            "files": {HOSTILE: FileRecord(bytes=1, sha256="")},
        }
    )


def test_names_that_hold_markup_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    manifest = hostile_manifest(tmp_path)
    write_report(tmp_path, manifest)
    found = page_of(tmp_path)
    assert "img" not in found.tags
    assert found.addresses == []
    assert found.text.count(HOSTILE) >= 10


def test_the_page_needs_nothing_beside_itself(policy: Path, tmp_path: Path) -> None:
    folder = pi05c.compile(policy, tmp_path / "engine", passes="exact", backend="onnxruntime").folder
    found = page_of(folder)
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    html = (folder / REPORT).read_text(encoding="utf-8")
    assert all(a.startswith("#") and f'id="{a[1:]}"' in html for a in found.addresses)


def test_the_page_says_what_the_manifest_says(policy: Path, tmp_path: Path) -> None:
    folder = pi05c.compile(
        policy, tmp_path / "engine", passes="fp16", backend="onnxruntime", cache=tmp_path / "cache"
    ).folder
    manifest = read_manifest(folder)
    text = page_of(folder).text
    assert manifest.verification is not None
    assert f"{manifest.verification.worst().relative_l2:.4g}" in text
    assert "within the limit" in text
    assert manifest.source.sha256 in text
    for name in (*(record.name for record in manifest.pipeline.passes), "float16", "actions", "1 held back"):
        assert name in text


def cost_record(part: str, kernels: int, seconds: float | None = None) -> CostRecord:
    return CostRecord(
        part=part,
        flops=2_000_000_000,
        weight_bytes=3,
        activation_bytes=4,
        kernels=kernels,
        operators=9,
        seconds=seconds,
    )


def test_the_page_sets_costs_before_and_after_beside_each_other(policy: Path, tmp_path: Path) -> None:
    folder = pi05c.compile(policy, tmp_path / "engine", passes="fp16", backend="onnxruntime").folder
    manifest = read_manifest(folder)
    assert {record.part for record in manifest.pipeline.cost} == {"prefix"}
    assert all(record.cost for record in manifest.pipeline.passes)
    ((_, before, after), everything) = cost_rows(manifest.pipeline)
    assert after.activation_bytes < before.activation_bytes
    assert everything[2].activation_bytes == after.activation_bytes
    by_type = {name: (old, new) for name, old, new in cost_rows(manifest.pipeline, "dtype")}
    assert by_type["float16"][0].flops == 0
    assert by_type["float16"][1].flops == by_type["float32"][0].flops > 0
    assert by_type["all"][1] == everything[2]
    assert pass_costs(manifest.pipeline)[0][0] == "lower_precision"
    assert "Counted, not measured" in page_of(folder).text


def test_costs_of_a_pipeline_are_summed_over_parts_and_shown_where_they_change(tmp_path: Path) -> None:
    plain = [cost_record("vision", 5, 0.001), cost_record("denoise", 7, 0.002)]
    fewer = [cost_record("vision", 5, 0.001), cost_record("denoise", 4, 0.0015)]
    passes = [
        pass_record(name=name).model_copy(update={"cost": cost})
        for name, cost in (("nothing", plain), ("merge", fewer), ("unknown", []))
    ]
    pipeline = PipelineRecord(
        requested="", resolved="", passes=passes[:2], cost=plain, cost_device=f"GPU {HOSTILE}"
    )
    manifest = minimal_manifest(tmp_path).model_copy(update={"pipeline": pipeline})
    assert [(old.kernels, new.kernels) for _, old, new in cost_rows(manifest.pipeline)] == [
        (5, 5),
        (7, 4),
        (12, 9),
    ]
    ((name, old, new),) = pass_costs(manifest.pipeline)
    assert (name, old.kernels, new.kernels) == ("merge", 12, 9)
    write_report(tmp_path, manifest)
    page = page_of(tmp_path)
    assert "12 → 9" in page.text
    assert "3 → 2.5" in page.text
    assert HOSTILE in page.text
    assert "img" not in page.tags
    assert cost_rows(pipeline.model_copy(update={"passes": passes})) == []


def test_a_graph_without_fixed_sizes_compiles_without_a_cost(tmp_path: Path) -> None:
    model = write_policy(tmp_path / "model.onnx", batch="batch")
    folder = pi05c.compile(model, tmp_path / "engine", passes="exact", backend="onnxruntime").folder
    assert read_manifest(folder).pipeline.cost == []
    assert "Counted, not measured" not in page_of(folder).text


def test_a_result_beyond_its_limit_and_one_that_nobody_verified_are_told_apart(
    policy: Path, tmp_path: Path, wrecking_pass: str
) -> None:
    output = tmp_path / "engine"
    with pytest.raises(VerificationError):
        pi05c.compile(policy, output, passes=wrecking_pass, backend="onnxruntime")
    assert "beyond the limit" in page_of(tmp_path / "engine.rejected").text
    policy.with_name("model.calibration.npz").unlink()
    pi05c.compile(policy, output, passes="none", backend="onnxruntime")
    text = page_of(output).text
    assert "Nothing was verified" in text
    assert "the limit" not in text


def test_a_plan_that_is_built_later_is_in_the_report(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch)
    folder = pi05c.compile(policy, tmp_path / "engine", passes="none", target="sm120").folder
    assert "not built" in page_of(folder).text
    use_worker(monkeypatch, tmp_path, BUILDS)
    manifest = pi05c.build(folder, backend="tensorrt-rtx")
    assert "not built" not in page_of(folder).text
    assert "tensorrt-rtx 9.9" in page_of(folder).text
    check_files(folder, manifest)
    assert manifest == read_manifest(folder)


def test_skips_are_grouped_by_reason_whatever_names_and_numbers_it_holds() -> None:
    record = pass_record(
        skip("a", "weight 'w1' is 8 wide, below 16"),
        skip("b", "weight 'w2' is 4 wide, below 16"),
        skip("c", "no range"),
    )
    assert grouped_skips(record) == [("weight 'w1' is 8 wide, below 16", 2, "a"), ("no range", 1, "c")]


def test_precision_has_a_row_for_each_part_and_kind_and_the_commonest_type_first(tmp_path: Path) -> None:
    counts = [
        ("vision", "linear", "float16", 1),
        ("vision", "linear", "float8e4m3fn", 5),
        ("prefix", "norm", "float32", 2),
    ]
    manifest = minimal_manifest(tmp_path).model_copy(
        update={
            "precision": [
                PrecisionRecord(part=part, kind=kind, dtype=dtype, count=count)
                for part, kind, dtype, count in counts
            ]
        }
    )
    assert precision_columns(manifest) == ["float8e4m3fn", "float32", "float16"]
    assert precision_rows(manifest) == [
        ("vision", "linear", {"float16": 1, "float8e4m3fn": 5}),
        ("prefix", "norm", {"float32": 2}),
    ]


def test_what_fp8_clips_and_flushes_is_counted_as_numpy_counts_it(policy: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(5).standard_normal((4, 1, ROWS, WIDTH)).astype(np.float32)
    x[-1, :, 0] *= 100
    x[-1, :, 1] *= 1e-5
    x[-1, :, 2] = 0
    np.savez(policy.with_name("model.calibration.npz"), x=x)
    folder = pi05c.compile(
        policy, tmp_path / "engine", passes="quantize_linears", backend="onnxruntime", max_error=10.0
    ).folder
    verified = read_manifest(folder).verification
    assert verified is not None
    (found,) = verified.quantizers
    codes = np.abs(x[-1]) / np.float32(found.scale)
    rounded = codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert found.clipped == int((codes > 448).sum()) > 0
    assert found.flushed == int(((x[-1] != 0) & (rounded == 0)).sum()) > 0
    assert (found.low, found.high, found.elements) == (x[-1].min(), x[-1].max(), x[-1].size)
    assert "Ranges and saturation" in page_of(folder).text
