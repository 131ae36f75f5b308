"""Reads .npz files that others wrote: plain arrays, mapped where they are stored as they are, never Python objects.
Writes them whole or not at all.

What an array's header declares is held against the bytes that the file holds before anything is allocated.
"""

from __future__ import annotations

import lzma
import math
import os
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

from pi05c.graph.errors import Pi05cError, shortened, unreadable
from pi05c.graph.files import replacing
from pi05c.graph.runner import Array

UNPACKED_BYTES = 2**31
"""What the compressed arrays of a file may unpack to together: they are held in memory, and 1 KB can stand for 1 MB."""

_NAME_LENGTH_OFFSET = 26
"""Where a ZIP local file header holds the lengths of its last two fields (PKWARE APPNOTE 4.3.7)."""

_ENCRYPTED = 1
"""The bit of a member's flags that says so (PKWARE APPNOTE 4.4.4)."""

_SUFFIX = ".npy"

_Header = tuple[tuple[int, ...], bool, np.dtype[Any]]
_READ_HEADER: dict[tuple[int, int], Callable[[BinaryIO], _Header]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

_DAMAGED = (
    *(EOFError, ValueError, OverflowError, TypeError, SyntaxError, RecursionError, NotImplementedError),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
"""What zipfile and numpy raise for a file that is not what it says."""


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of a file by name; those that are stored as they are stay in the file.

    Raises:
        Pi05cError: it cannot be read, is no .npz file, holds Python objects or anything but arrays, or unpacks to
            more than `UNPACKED_BYTES`.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Pi05cError(f"{path} is no file: name an .npz file of arrays")
        with path.open("rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
                raise Pi05cError(f"{path} holds a single array without a name: save it with numpy.savez")
            with zipfile.ZipFile(file) as archive:
                return _arrays(path, archive, file)
    except OSError as error:
        raise Pi05cError(f"{path} cannot be read: {unreadable(error)}") from error
    except _DAMAGED as error:
        raise Pi05cError(f"{path} cannot be read as an .npz file of arrays: {error}") from error


def _arrays(path: Path, archive: zipfile.ZipFile, file: IO[bytes]) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    unpacked = 0
    for member in archive.infolist():
        name = member.filename.removesuffix(_SUFFIX)
        if name == member.filename or name in arrays:
            what = "is no array" if name == member.filename else "it holds twice"
            raise Pi05cError(
                f"{path} holds {shortened(member.filename)}, which {what}: save it with numpy.savez"
            )
        if member.flag_bits & _ENCRYPTED:
            raise Pi05cError(f"{path} is encrypted: save it with numpy.savez")
        if member.compress_type == zipfile.ZIP_STORED:
            arrays[name] = _mapped(path, member, file)
            continue
        unpacked += member.file_size
        if unpacked > UNPACKED_BYTES:
            raise Pi05cError(
                f"{path} unpacks to more than {UNPACKED_BYTES / 1e9:.1f} GB: save it with numpy.savez, which does not "
                "compress, so that it can stay in the file"
            )
        with archive.open(member) as packed:
            arrays[name] = _unpacked(path, member, packed)
    return arrays


def _mapped(path: Path, member: zipfile.ZipInfo, file: IO[bytes]) -> Array:
    file.seek(member.header_offset + _NAME_LENGTH_OFFSET)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    file.seek(name_length + extra_length, os.SEEK_CUR)
    start = file.tell()
    shape, is_fortran, dtype = _header(path, member, file, min(member.file_size, member.compress_size))
    if 0 in shape:
        return np.zeros(shape, dtype)
    if start + member.file_size > path.stat().st_size:
        raise ValueError("it is truncated")
    return np.memmap(path, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")


def _unpacked(path: Path, member: zipfile.ZipInfo, packed: IO[bytes]) -> Array:
    shape, is_fortran, dtype = _header(path, member, packed, member.file_size)
    values: Array = np.empty(shape, dtype, "F" if is_fortran else "C")
    rest = values.reshape(-1, order="A").view(np.uint8).data if values.size else memoryview(b"")
    while len(rest):
        if not (count := cast(BinaryIO, packed).readinto(rest)):  # type: ignore[attr-defined]
            raise EOFError(f"{member.filename} is truncated")
        rest = rest[count:]
    return values


def _header(path: Path, member: zipfile.ZipInfo, file: IO[bytes], size: int) -> _Header:
    """What a member of `size` bytes declares itself to be, which must be what it holds."""
    start = file.tell()
    stream = cast(BinaryIO, file)
    version = np.lib.format.read_magic(stream)
    if version not in _READ_HEADER:
        raise ValueError(f"{member.filename} is of the version {version} of the format, which is not known")
    shape, is_fortran, dtype = _READ_HEADER[version](stream)
    if dtype.hasobject:
        raise Pi05cError(
            f"{path} holds pickled Python objects, which may run code when they are read: save plain arrays with "
            "numpy.savez"
        )
    held = size - (file.tell() - start)
    if any(dim < 0 for dim in shape) or math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{member.filename} is said to be {dtype}{list(shape)}, and holds {held} bytes")
    return shape, is_fortran, dtype


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays by name; the file appears whole or not at all.

    Raises:
        Pi05cError: it cannot be written there.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


__all__ = ["UNPACKED_BYTES", "read_npz", "write_npz"]
