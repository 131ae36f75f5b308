"""What a compile that ended early had finished, so that the same compile goes on behind it.

A compile marks its scratch folder when its graphs are written, when they are verified, and when a plan is built. If it
ends before the folder takes its place, what was marked stays as `OUTPUT.unfinished`; a compile of the same content, asked
for in the same words and done by the same code, takes it over. A killed process leaves the same in its scratch folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import pi05c
from pi05c.folder import (
    CHECKPOINT,
    GRAPH,
    PACKAGE,
    PLAN,
    SAMPLES,
    TABLE,
    Scratch,
    inside,
    remove_unfinished,
    unfinished,
)
from pi05c.graph.errors import Pi05cError
from pi05c.graph.files import read_text
from pi05c.manifest import Manifest, PathInside, PipelineRecord

_CODE_SUFFIXES = (".py", ".html")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RewrittenRecord(_Record):
    """What the passes did to a piece.

    `place` is the subfolder of its graph, which runs `runs` times for one observation; `calibrated` says whether ranges
    were measured.
    """

    place: PathInside | Literal[""]
    pipeline: PipelineRecord
    calibrated: bool
    runs: int = 1


class Finished(_Record):
    """What is finished of a compile.

    `key` says of which (`key_of`). `rewritten` holds a record for each written graph, `manifest` what is known once they
    are verified, `built` the places whose plans are built, and `files` the size in bytes of each file.
    """

    key: str
    rewritten: list[RewrittenRecord]
    manifest: Manifest | None = None
    built: list[PathInside | Literal[""]] = Field(default_factory=list)
    files: dict[PathInside, int] = Field(default_factory=dict)

    @property
    def told(self) -> str:
        """The same in words."""
        engines = [f"the engine of {place}" if place else "the engine" for place in self.built]
        parts = [
            "the rewritten graph",
            *(["its verification"] if self.manifest is not None else []),
            *engines,
        ]
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def take_over(work: Scratch, output: Path, key: str, *, fresh: bool = False) -> Finished | None:
    """What an earlier compile with the same key had finished, its files moved into the scratch folder; None if nothing.

    Args:
        fresh: remove what was finished instead.
    """
    place = unfinished(output)
    if fresh:
        remove_unfinished(place)
    found = _read(place)
    if found is None or not key or found.key != key or not _whole(place, found):
        return None
    for name in found.files:
        (work.folder / name).parent.mkdir(exist_ok=True)
        (place / name).rename(work.folder / name)
    keep(work, found)
    remove_unfinished(place)
    return found


def keep(work: Scratch, finished: Finished) -> None:
    """Say what is to be kept should this compile end early; nothing where it has no key."""
    if not finished.key:
        return
    names = [
        inside(record.place, name)
        for record in finished.rewritten
        for name in (GRAPH, f"{GRAPH}.data", TABLE)
    ]
    names += [SAMPLES, *(inside(place, name) for place in finished.built for name in (PLAN, PACKAGE))]
    work.keep(
        [name for name in names if (work.folder / name).is_file()],
        finished.model_dump(mode="json", exclude={"files"}),
    )


def _read(place: Path) -> Finished | None:
    with contextlib.suppress(Pi05cError, ValidationError):
        return Finished.model_validate_json(read_text(place / CHECKPOINT))
    return None


def _whole(place: Path, finished: Finished) -> bool:
    """Whether the files are there, in their sizes, and among them all that is said to be finished."""
    needed = [inside(record.place, GRAPH) for record in finished.rewritten]
    if (manifest := finished.manifest) is not None:
        needed += [SAMPLES] if manifest.verification is not None else []
        needed += [inside(place, manifest.engine_of(place).product) for place in finished.built]
        if [place for place in manifest.places if manifest.engine_of(place).file] != finished.built:
            return False
    if not finished.rewritten or not set(needed) <= finished.files.keys():
        return False
    try:
        return all((place / name).stat().st_size == size for name, size in finished.files.items())
    except OSError:
        return False


def key_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of what a compile depends on, given as JSON values, and of pi05c's own code."""
    return hashlib.sha256(json.dumps([content, _code_sha256()], sort_keys=True).encode()).hexdigest()


def _code_sha256() -> str:
    root = Path(pi05c.__file__).parent
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for path in (Path(folder, name) for name in sorted(names)):
            if path.suffix in _CODE_SUFFIXES:
                digest.update(path.relative_to(root).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


__all__ = ["Finished", "RewrittenRecord", "keep", "key_of", "take_over"]
