"""Bytes that look for a way through the loader: whatever a file holds, it loads, or one sentence says why not.

    python tests/fuzz/loader.py CORPUS -max_total_time=600

Atheris mutates the files of the folder CORPUS, to which the stored graphs of `golden` are copied, and adds those that
reach new code of `pi05c.graph`. What it finds is written as `crash-...`; `-minimize_crash=1 crash-...` shrinks it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pi05c"]):
    from pi05c.graph import carried, inference, io, sort, weights  # noqa: F401
    from pi05c.graph.check import problems
    from pi05c.graph.errors import Pi05cError
    from pi05c.graph.io import load, save
    from pi05c.graph.text import canonical_text

LARGEST_SEED = 20_000
"""Bytes of a stored graph that mutation still gets far with."""

GOLDEN = Path(__file__).parents[2] / "golden"


def goes_through(data: bytes, folder: Path) -> None:
    """Load, print, check and save a model of these bytes."""
    path = folder / "model.onnx"
    path.write_bytes(data)
    try:
        model = load(path)
        canonical_text(model.graph)
        problems(model)
        save(model, folder / "saved.onnx")
        load(folder / "saved.onnx")
    except Pi05cError as error:
        if not str(error) or "\n" in str(error):
            raise ValueError(f"not one sentence: {error}") from error


def main() -> None:
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for path in GOLDEN.glob("*/*.onnx"):
        if path.stat().st_size <= LARGEST_SEED:
            shutil.copyfile(path, corpus / f"{path.parent.name}-{path.name}")
    with tempfile.TemporaryDirectory(prefix="pi05c-fuzz-") as folder:
        atheris.Setup(sys.argv, lambda data: goes_through(data, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
