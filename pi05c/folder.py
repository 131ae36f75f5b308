"""The output folder: written beside its place, exchanged by rename, never half there.

A run works in a scratch folder next to the output. `Scratch.publish` puts it in the output's place in one step;
whatever else ends the run, an error, Ctrl-C or SIGTERM, removes the scratch and leaves the old output as it was. What a
killed process left behind is removed by the next run with the same output. Files that a run finished and said to keep
(`Scratch.keep`) are not removed with the scratch but put beside the output as `OUTPUT.unfinished`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pi05c.graph.errors import Pi05cError, unwritable
from pi05c.graph.files import is_partial, lock, read_text, replacing

if TYPE_CHECKING:
    from collections.abc import Iterable

MANIFEST = "manifest.json"
"""The file that makes a folder one of pi05c's."""

GRAPH = "model.onnx"
PLAN = "model.engine"
PACKAGE = "model.pt2"
SCRIPT = "build_engine.sh"
SAMPLES = "samples.npz"
REPORT = "report.html"
TABLE = "table.onnx"
"""The other files: the rewritten graph (its weights in `model.onnx.data`), the TensorRT plan or the package of Inductor,
what makes the plan on a device where pi05c cannot, held-back samples with their reference, the manifest for people, and
beside a denoising step the graph that makes its rows. Of a split engine, graph and plan lie in a subfolder a part."""

FAILED_BUILD = "failed-build"
"""Subfolder with the log of a failed build and the command that repeats it."""

CHECKPOINT = "checkpoint.json"
"""The file in a scratch folder, or an unfinished one, that says what of it is finished."""

_MADE_LATER = (PLAN, PACKAGE, REPORT, "timing.cache", f"{PLAN}.cache")
"""What `build_engine.sh`, `pi05c build` and TensorRT-RTX at run time write into a folder that has its manifest."""

_FINISHED = (CHECKPOINT, GRAPH, f"{GRAPH}.data", PLAN, PACKAGE, SAMPLES, TABLE, f"{TABLE}.data")
"""What an unfinished folder may hold."""

_RENAME_EXCHANGE = 2
"""Flag of Linux renameat2(2) that swaps two paths in one step."""

_AT_FDCWD = -100
"""Directory argument of renameat2(2) that stands for the current folder (Linux fcntl.h)."""

_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""What a kernel or a file system answers that cannot exchange."""


def check_output(output: Path, *, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output that would destroy something which is not pi05c's to replace.

    Args:
        output: the folder to be written.
        inputs: files and folders that the run reads.

    Raises:
        Pi05cError: `output` is a file, a mount point, holds an input, the current folder, or files that its manifest does
            not name.
    """
    place = output.resolve()
    for path in inputs:
        source = path.resolve()
        if place == source or place in source.parents:
            raise Pi05cError(f"output {output} would replace its own input {path}: choose another -o")
    if place.is_dir():
        with contextlib.suppress(FileNotFoundError):  # the current folder is gone
            if place in (here := Path.cwd(), *here.parents):
                raise Pi05cError(
                    f"output {output} would be replaced, and the current folder with it: run this from another folder, or "
                    "choose a folder inside it"
                )
        if place.is_mount():
            raise Pi05cError(
                f"output {output} is a mount point, which cannot be replaced: choose a folder inside it"
            )
        _refuse_foreign_files(output, place)
    elif place.exists():
        raise Pi05cError(f"output {output} is a file, but a folder is written: choose another -o")


def inside(place: str, name: str) -> str:
    """How a manifest names a file of the part `place`; of a whole engine that is the empty text."""
    return (PurePosixPath(place) / name).as_posix()


def rejected(output: Path) -> Path:
    """Where a result that failed verification is kept, so that nothing bad is deployed by accident."""
    place = output.resolve()
    return place.with_name(f"{place.name}.rejected")


def failed(output: Path) -> Path:
    """Where a result is kept whose plan could not be built, with what it takes to see the failure again."""
    place = output.resolve()
    return place.with_name(f"{place.name}.failed")


def failed_pass(output: Path) -> Path:
    """Where the graph that a pass failed on is kept, with the command that fails again."""
    place = output.resolve()
    return place.with_name(f"{place.name}.failed-pass")


def unfinished(output: Path) -> Path:
    """Where what a run finished is kept if it ended before the rest."""
    place = output.resolve()
    return place.with_name(f"{place.name}.unfinished")


def remove_unfinished(place: Path) -> None:
    """Remove an unfinished folder, if it is one and holds nothing else."""
    if (place / CHECKPOINT).is_file() and all(
        path.name in _FINISHED or is_partial(path.name) for path in place.rglob("*") if not path.is_dir()
    ):
        shutil.rmtree(place, ignore_errors=True)


class Scratch:
    """A folder next to `output` that is to take its place.

    Attributes:
        folder: where to write.
    """

    def __init__(self, output: Path) -> None:
        self._place = output.resolve()
        self._created_parents = _make_parents(self._place.parent)
        _remove_abandoned(self._place)
        self.folder, self._lock = _locked_folder(self._place)

    def publish(self, output: Path) -> None:
        """Put the folder in the place of `output`, which lies on the same file system, and remove what was there.

        Raises:
            Pi05cError: as `check_output`, or the folder cannot be renamed.
        """
        check_output(output)
        place = output.resolve()
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        _sync(self.folder)
        if place.exists():
            _exchange(self.folder, place)
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self.folder.rename(place)
        self._created_parents.clear()

    def keep(self, files: Iterable[str], about: dict[str, Any]) -> None:
        """Keep files, should the run end before it publishes, in place of those that were kept before.

        Args:
            files: paths relative to the folder; they are on the disk when this returns.
            about: JSON values for whoever takes the files over, who finds under `files` the size of each in bytes.
        """
        sizes = {name: (self.folder / name).stat().st_size for name in sorted(files)}
        for name in sizes:
            _sync_file(self.folder / name)
        with replacing(self.folder / CHECKPOINT) as partial:
            partial.write_text(json.dumps({**about, "files": sizes}), encoding="utf-8")
            _sync_file(partial)

    def close(self) -> None:
        """Remove the folder, unless it was published, but for what is to be kept, and parents that were created for it."""
        _set_aside(self.folder, self._place)
        os.close(self._lock)
        for parent in self._created_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def scratch(output: Path) -> Iterator[Scratch]:
    """A `Scratch` for `output` that is removed at the end unless it was published.

    Raises:
        Pi05cError: the folder cannot be written: read-only, full, or not permitted.
    """
    work: Scratch | None = None
    try:
        work = Scratch(output)
        yield work
    except OSError as error:
        named = error.filename2 or error.filename or output
        raise Pi05cError(f"{named} cannot be written: {_explained(error, output)}") from error
    finally:
        if work is not None:
            work.close()


def _explained(error: OSError, output: Path) -> str:
    if error.errno in (errno.EBUSY, errno.EXDEV):
        return f"{output} is a mount point or on another file system: choose a folder inside it"
    return unwritable(error)


def _refuse_foreign_files(output: Path, place: Path) -> None:
    files = (path for path in place.rglob("*") if path.is_symlink() or not path.is_dir())
    if not (place / MANIFEST).exists():
        if next(files, None) is not None:
            raise Pi05cError(
                f"output {output} holds files but no {MANIFEST}, so it is not pi05c's to replace: choose another -o"
            )
        return
    from pi05c.manifest import read_manifest

    manifest = read_manifest(place)
    found = {path.relative_to(place).as_posix() for path in files}
    later = {inside(part, name) for part in ("", *manifest.places) for name in _MADE_LATER}
    foreign = sorted(
        name
        for name in found - {MANIFEST, *later, *manifest.files}
        if FAILED_BUILD not in PurePosixPath(name).parts[:-1] and not is_partial(PurePosixPath(name).name)
    )
    if foreign:
        raise Pi05cError(
            f"output {output} holds {foreign[0]!r}, which its {MANIFEST} does not name: move it away or choose "
            "another -o"
        )


def _make_parents(folder: Path) -> list[Path]:
    """Create `folder` and what is missing above it; the created folders, innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    return missing


def _prefix(place: Path) -> str:
    return f".{place.name}.partial-"


def _locked_folder(place: Path) -> tuple[Path, int]:
    """A new folder beside `place` and a descriptor that holds its lock while this process lives."""
    while True:
        folder = place.with_name(f"{_prefix(place)}{secrets.token_hex(4)}")
        folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY)
        if lock(descriptor) and folder.exists():
            return folder, descriptor
        os.close(descriptor)


def _remove_abandoned(place: Path) -> None:
    """Remove scratch folders whose process is gone: nobody holds their lock."""
    for folder in place.parent.iterdir():
        if not folder.name.startswith(_prefix(place)):
            continue
        with contextlib.suppress(OSError):  # it is no folder, or somebody else's
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if lock(descriptor):
                    _set_aside(folder, place)
            finally:
                os.close(descriptor)


def _set_aside(folder: Path, place: Path) -> None:
    """Remove a scratch folder for `place`; files that are to be kept become its unfinished folder, if there may be one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError, Pi05cError):
        kept = set(json.loads(read_text(folder / CHECKPOINT))["files"])
        aside = unfinished(place)
        remove_unfinished(aside)
        if not aside.exists():
            for path in sorted(folder.rglob("*"), reverse=True):
                if path.is_dir():
                    with contextlib.suppress(OSError):
                        path.rmdir()
                elif path.relative_to(folder).as_posix() not in {*kept, CHECKPOINT}:
                    path.unlink()
            folder.rename(aside)
    shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush every file to the disk, so that a power cut cannot leave a published folder of empty files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync_file(path)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders; in one step on Linux, elsewhere by two renames of which the first is undone on failure."""
    code = _renameat2(new, old)
    if code in _NO_EXCHANGE:
        _exchange_by_renames(new, old)
    elif code:
        raise OSError(code, os.strerror(code), str(old))


def _renameat2(new: Path, old: Path) -> int:
    """Exchange two paths in one step; 0, or the errno of the failure."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return errno.ENOSYS
    paths = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old))
    return 0 if renameat2(*paths, _RENAME_EXCHANGE) == 0 else ctypes.get_errno()


def _exchange_by_renames(new: Path, old: Path) -> None:
    aside = old.with_name(f"{_prefix(old)}{secrets.token_hex(4)}")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


__all__ = [
    "CHECKPOINT",
    "FAILED_BUILD",
    "GRAPH",
    "MANIFEST",
    "PACKAGE",
    "PLAN",
    "REPORT",
    "SAMPLES",
    "SCRIPT",
    "TABLE",
    "Scratch",
    "check_output",
    "failed",
    "failed_pass",
    "inside",
    "rejected",
    "remove_unfinished",
    "scratch",
    "unfinished",
]
