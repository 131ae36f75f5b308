"""`manifest.json`: what is written is read back, and what is damaged is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from small_folder import minimal_manifest, write_engine

from pi05c.folder import MANIFEST
from pi05c.graph.errors import Pi05cError
from pi05c.manifest import FORMAT, ErrorRecord, VerificationRecord, check_files, read_manifest, write_manifest


def error(sample: int, relative_l2: float) -> ErrorRecord:
    return ErrorRecord(
        sample=sample,
        output="actions",
        relative_l2=relative_l2,
        cosine=1.0,
        sqnr_db=None,
        max_abs=relative_l2,
    )


def test_round_trip_keeps_figures_that_json_has_no_spelling_for(tmp_path: Path) -> None:
    verification = VerificationRecord(limit=0.1, passed=False, errors=[error(0, 0.2), error(1, math.inf)])
    manifest = minimal_manifest(tmp_path).model_copy(update={"verification": verification})
    write_manifest(tmp_path, manifest)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / MANIFEST).read_text(), parse_constant=refuse)
    assert read_manifest(tmp_path) == manifest


def test_the_worst_error_is_the_largest_and_nan_is_larger_still() -> None:
    errors = [error(0, 0.2), error(1, math.nan), error(2, 0.3)]
    assert VerificationRecord(limit=1, passed=True, errors=errors[::2]).worst().sample == 2
    assert VerificationRecord(limit=1, passed=True, errors=errors).worst().sample == 1


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(Pi05cError, match="is not an engine folder"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, f"has format 99, this pi05c reads up to {FORMAT}"),
        ({"format": "1"}, "damaged at format"),
        ({"comment": "by hand"}, "damaged at comment"),
        ({"engine": {"targets": "sm120", "flavour": None}}, r"damaged at engine\.targets"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = write_engine(tmp_path / "engine") / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Pi05cError, match=said):
        read_manifest(path.parent)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"'])
def test_text_that_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(Pi05cError, match=MANIFEST):
        read_manifest(tmp_path)


def test_a_file_that_changed_or_is_gone(tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "engine")
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    (folder / "model.onnx").write_text("odl")
    with pytest.raises(Pi05cError, match="is not the file"):
        check_files(folder, manifest)
    (folder / "model.onnx").unlink()
    with pytest.raises(Pi05cError, match="is missing"):
        check_files(folder, manifest)
