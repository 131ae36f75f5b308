"""Files that are written whole or not at all, and read only where there is a file.

A file is written under another name beside its place and renamed when it is whole. What a killed process left under such
a name is removed by the next one that writes there.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pi05c.graph.errors import MachineError, Pi05cError, unreadable, unwritable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REQUEST = ".request"
"""What is behind the name of a half written file in that of what was asked of its builder."""

_TEXT_BYTES = 2**28
"""Up to which size a file is read as text."""

_PARTIAL = re.compile(r"\..+\.partial(-[0-9a-f]{8}(\.\w+){0,2})?")


@contextlib.contextmanager
def replacing(path: Path, *, through_link: bool = True) -> Iterator[Path]:
    """The name under which to write what is to be at `path`: renamed if the block ends well and left one, else removed.

    Args:
        through_link: replace what a link at `path` leads to, not the link.

    Raises:
        Pi05cError: `path` is no file, or cannot be written.
    """
    partial: Path | None = None
    try:
        _refuse_what_is_no_file(path)
        place = path.resolve() if through_link else path
        _remove_abandoned(place)
        partial = place.with_name(f"{_prefix(place)}{secrets.token_hex(4)}{place.suffix}")
        with partial.open("wb") as held:
            lock(held.fileno())
            yield partial
            if partial.exists():
                if place.exists():
                    partial.chmod(stat.S_IMODE(place.stat().st_mode))
                partial.replace(place)
    except OSError as error:
        raise MachineError(f"{error.filename2 or path} cannot be written: {unwritable(error)}") from error
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a file has a name under which one is written before it is whole, or that of what was asked of a builder."""
    return _PARTIAL.fullmatch(name) is not None


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text, whole or not at all, or to the pipe or device at `path`.

    Bytes of file names that are no UTF-8 are written as they are.

    Raises:
        Pi05cError: it cannot be written.
    """
    try:
        content = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        content = text.encode("utf-8", "replace")
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)
            return
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {unwritable(error)}") from error
    with replacing(path) as partial:
        partial.write_bytes(content)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        Pi05cError: there is none, it is no file or larger than any that pi05c writes, or it is no text.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
            raise Pi05cError(f"{path} cannot be read: it is {what}; name a file")
        if found.st_size > _TEXT_BYTES:
            raise Pi05cError(
                f"{path} cannot be read: it holds more than {_TEXT_BYTES // 2**20} MiB; name a file of text"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Pi05cError(f"{path} cannot be read: {unreadable(error)}") from error
    except ValueError as error:
        raise Pi05cError(f"{path} cannot be read: it holds no UTF-8 text ({error})") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The table that a TOML file is.

    Raises:
        Pi05cError: as `read_text`; or it is no TOML.
    """
    text = read_text(path)
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise Pi05cError(f"{path} is no TOML: {error}") from error
    return table


def refuse_replacing(output: Path, reads: Iterable[Path]) -> None:
    """Refuse to write a file where it would take the place of one that is read, or of one in a folder that is read.

    Raises:
        Pi05cError: names both; or `output` is no place for a file.
    """
    try:
        _refuse_what_is_no_file(output)
        place = output.resolve()
        for path in reads if place.exists() else ():
            source = path.resolve()
            if source in (place, *place.parents) or (source.exists() and source.samefile(place)):
                raise Pi05cError(f"{output} would replace {path}, which is read: choose another -o")
    except OSError as error:
        raise MachineError(f"{output} cannot be written: {unwritable(error)}") from error


def _refuse_what_is_no_file(path: Path) -> None:
    if path.is_dir() or not path.name:
        raise Pi05cError(f"{path} cannot be written: it is a folder; name a file in it with -o")
    if not path.parent.is_dir():
        raise Pi05cError(
            f"{path} cannot be written: the folder {path.parent} does not exist; create it first"
        )
    if path.exists() and not path.is_file():
        raise Pi05cError(f"{path} cannot be written: it is a pipe or a device; name a file with -o")


def lock(descriptor: int) -> bool:
    """Lock a file or folder while this process has it open; False where another process holds the lock."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _prefix(place: Path) -> str:
    return f".{place.name}.partial-"


def _remove_abandoned(place: Path) -> None:
    """Remove what killed processes left half written: nobody holds its lock."""
    name = re.compile(f"({re.escape(_prefix(place))}[0-9a-f]{{8}}{re.escape(place.suffix)})({REQUEST})?")
    for path in sorted(place.parent.iterdir()):  # a file before what was asked of its builder
        found = name.fullmatch(path.name)
        if found and not (found[2] and path.with_name(found[1]).exists()):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if lock(descriptor):
                        path.unlink()
                finally:
                    os.close(descriptor)


__all__ = [
    "REQUEST",
    "is_partial",
    "lock",
    "read_text",
    "read_toml",
    "refuse_replacing",
    "replacing",
    "write_text",
]
