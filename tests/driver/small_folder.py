"""An engine folder that holds next to nothing."""

from __future__ import annotations

from pathlib import Path

from pi05c.manifest import (
    FORMAT,
    EngineRecord,
    Manifest,
    PipelineRecord,
    SourceRecord,
    file_records,
    write_manifest,
)


def minimal_manifest(place: Path) -> Manifest:
    """The manifest of a folder that holds the files of `place` and nothing worth telling."""
    return Manifest(
        format=FORMAT,
        versions={},
        source=SourceRecord(name="model.onnx", sha256="", opset=21),
        pipeline=PipelineRecord(requested="none", resolved="", passes=[]),
        inputs=[],
        outputs=[],
        precision=[],
        calibration=None,
        verification=None,
        engine=EngineRecord(targets=[], flavour=None),
        files=file_records(place),
    )


def write_engine(place: Path, text: str = "old") -> Path:
    """An engine folder with one file, `model.onnx`, that holds `text`."""
    place.mkdir(exist_ok=True)
    (place / "model.onnx").write_text(text)
    write_manifest(place, minimal_manifest(place))
    return place
