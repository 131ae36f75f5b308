"""Weights that stay on disk: a byte range of a file plus the operations that make a tensor of it.

An initializer of a loaded graph is a `gs.Constant` whose values are a `Weight`. A rewrite wraps it in another
(`Transposed`, `Cast`, `Quantized`, ...) without reading anything; the chain is evaluated once, in chunks, when
the model is saved, and by `amax` when a range is needed.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from pi05c.graph.dtypes import BFLOAT16, LARGEST, bits, to_numpy, to_onnx
from pi05c.graph.errors import Pi05cError
from pi05c.graph.runner import Array

Region = tuple[slice, ...]
"""One slice with start and stop for each axis."""

CHUNK_BYTES = 32 * 2**20
"""Working-set size of chunked evaluation, in bytes of the result."""

_COUNTED = 2**18
"""Elements that are counted at a time: what `numpy.bincount` widens to 64 bits then stays in the cache."""

_TILE = 256
"""Rows and columns that are transposed at a time, which the cache holds."""

_TABLE_THRESHOLD = 2**18
"""From this many 16-bit elements on, an elementwise function is cheaper as a table of all 65,536 inputs."""


class Weight(LazyValues, ABC):  # type: ignore[misc]
    """A tensor that can be read region by region.

    Attributes:
        shape: dimensions.
        dtype: a numpy dtype, `ml_dtypes` for bfloat16, FP8 and FP4.
        nbytes: bytes in storage (two a byte of FP4 and INT4, four of INT2).
    """

    def __init__(self, shape: Sequence[int], dtype: Any) -> None:
        self.shape: tuple[int, ...] = tuple(int(dim) for dim in shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.nbytes: int = (math.prod(self.shape) * bits(self.dtype) + 7) // 8
        self._amax: float | None = None
        self._histogram: tuple[Array, Array] | None = None
        self._checksum: str | None = None

    @abstractmethod
    def read(self, region: Region) -> Array:
        """The elements of `region`, in this weight's dtype."""

    def load(self) -> Array:
        """The whole tensor in memory; a scalar is an array without axes, where indexing would give a number."""
        return np.asarray(self.read(whole(self.shape)))

    @property
    def tensor(self) -> onnx.TensorProto:
        """What onnx-graphsurgeon exports: a reference that `pi05c.graph.io` resolves while saving."""
        proto = onnx.TensorProto(data_type=to_onnx(self.dtype), dims=self.shape)
        proto.data_location = onnx.TensorProto.EXTERNAL
        proto.external_data.add(key="location", value=f"{PENDING}{id(self)}")
        return proto

    def regions(self, size: int | None = None) -> list[Region]:
        """The tensor in row-major order, in pieces along the first axis of about `size` bytes, by default `CHUNK_BYTES`."""
        size = size or CHUNK_BYTES
        if not self.shape or self.nbytes <= size:
            return [whole(self.shape)]
        rows = max(1, size * self.shape[0] // self.nbytes)
        starts = range(0, self.shape[0], rows)
        return [(slice(start, min(start + rows, self.shape[0])), *whole(self.shape[1:])) for start in starts]

    def chunks(self) -> Iterator[Array]:
        """The elements of each of `regions`; a scalar is an array without axes, where indexing would give a number."""
        for region in self.regions():
            yield np.asarray(self.read(region))

    def amax(self) -> float:
        """The largest absolute value, read once and remembered; inf or nan where an element is."""
        if self._amax is None:
            self._amax = float(np.max([_amax(chunk) for chunk in self.chunks()], initial=0.0))
        return self._amax

    def histogram(self) -> tuple[Array, Array]:
        """How often each value occurs, values rounded to bfloat16, read once and remembered.

        Returns:
            The values in float32 and their counts in int64, of the 65,536 bfloat16 numbers those that occur.
        """
        if self._histogram is None:
            counts = self._counts()
            codes = np.flatnonzero(counts)
            self._histogram = (codes.astype(np.uint16).view(BFLOAT16).astype(np.float32), counts[codes])
        return self._histogram

    def _counts(self) -> Array:
        """How often each of the 65,536 codes of bfloat16 occurs, int64."""
        counts = np.zeros(2**16, np.int64)
        for chunk in self.chunks():
            codes = _in_any_order(chunk.astype(BFLOAT16, copy=False)).view(np.uint16)
            for start in range(0, len(codes), _COUNTED):
                counts += np.bincount(codes[start : start + _COUNTED], minlength=2**16)
        return counts

    def fingerprint(self) -> object:
        """A hashable that two weights share only if they hold the same bytes, found without reading large files.

        Of a stored weight it is the recorded checksum or the place in the file; of a derived one the operation and
        the fingerprint of what it derives from.
        """
        return (str(self.dtype), self.shape, self.checksum())

    def content(self) -> object:
        """As `fingerprint`, but the same in another place and on another day; files without checksums are read."""
        for found in _stored(self):
            found.checksum()
        return self.fingerprint()

    def checksum(self) -> str:
        """SHA-256 of the stored bytes in row-major order, in hexadecimal."""
        if self._checksum is None:
            digest = hashlib.sha256()
            for chunk in self.chunks():
                digest.update(stored_bytes(chunk))
            self._checksum = digest.hexdigest()
        return self._checksum


PENDING = "pi05c-pending:"
"""Prefix of the location of a tensor whose bytes have not been written yet."""


class InMemory(Weight):
    """A tensor held as an array."""

    def __init__(self, array: Array) -> None:
        super().__init__(array.shape, array.dtype)
        self.array = array

    def read(self, region: Region) -> Array:
        return self.array[region]


class Stored(Weight):
    """A byte range of a file, little-endian and row-major, mapped and never copied as a whole.

    `checksum` is the SHA-256 of the range where the file's writer recorded it; `has_checksum` says whether it did.
    """

    def __init__(
        self, path: Path, offset: int, shape: Sequence[int], dtype: Any, checksum: str | None = None
    ) -> None:
        super().__init__(shape, dtype)
        self.path = path
        self.offset = offset
        self.has_checksum = checksum is not None
        self._checksum = checksum
        self._file = _opened(path, stamp(path.stat()))
        size = self._file.stamp.size
        if offset < 0 or offset + self.nbytes > size:
            raise Pi05cError(
                f"{path} holds {size} bytes, but a weight of shape {list(self.shape)} is said to lie at bytes "
                f"{offset} to {offset + self.nbytes}: the file is truncated or belongs to another model"
            )

    def read(self, region: Region) -> Array:
        self.fileno()
        raw = self._file.bytes[self.offset : self.offset + self.nbytes]
        if bits(self.dtype) < 8:
            return from_stored_bytes(raw.tobytes(), self.dtype, self.shape)[region]
        values: Array = raw.view(self.dtype).reshape(self.shape)[region]
        return values

    def fileno(self) -> int:
        """Descriptor of the file, which outlives its name.

        Raises:
            Pi05cError: somebody has written to it since.
        """
        descriptor: int = self._file.handle.fileno()
        if stamp(os.fstat(descriptor)) != self._file.stamp:
            raise Pi05cError(
                f"{self.path} changed while it was used: start again when nothing writes it any more"
            )
        return descriptor

    def chunks(self) -> Iterator[Array]:
        for chunk in super().chunks():
            yield chunk
            self._release()

    def _release(self) -> None:
        """Take the pages that were read out of this process; the file's cache keeps them."""
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        if self.nbytes >= mmap.PAGESIZE and hasattr(mmap, "MADV_DONTNEED"):
            self._file.bytes._mmap.madvise(mmap.MADV_DONTNEED, start, self.offset + self.nbytes - start)

    def fingerprint(self) -> object:
        if self._checksum is None and self.nbytes > CHUNK_BYTES:
            return (str(self.dtype), self.shape, self.path, self.offset)
        return (str(self.dtype), self.shape, self.checksum())


class Transposed(Weight):
    """`base` with its axes permuted as in ONNX Transpose."""

    def __init__(self, base: Weight, perm: Sequence[int]) -> None:
        super().__init__([base.shape[axis] for axis in perm], base.dtype)
        self.base = base
        self.perm = tuple(perm)

    def read(self, region: Region) -> Array:
        source = [slice(None)] * len(self.perm)
        for axis, part in zip(self.perm, region, strict=True):
            source[axis] = part
        values: Array = self.base.read(tuple(source)).transpose(self.perm)
        return values

    def amax(self) -> float:
        return self.base.amax()

    def _counts(self) -> Array:
        return self.base._counts()

    def fingerprint(self) -> object:
        return ("transposed", self.perm, self.base.fingerprint())


class Reshaped(Weight):
    """`base` with the same elements in another shape."""

    def __init__(self, base: Weight, shape: Sequence[int]) -> None:
        super().__init__(shape, base.dtype)
        self.base = base

    def read(self, region: Region) -> Array:
        return self.base.load().reshape(self.shape)[region]

    def amax(self) -> float:
        return self.base.amax()

    def _counts(self) -> Array:
        return self.base._counts()

    def fingerprint(self) -> object:
        return ("reshaped", self.shape, self.base.fingerprint())


class Joined(Weight):
    """Weights of one dtype, concatenated along `axis`."""

    def __init__(self, parts: Sequence[Weight], axis: int) -> None:
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        super().__init__(shape, parts[0].dtype)
        self.parts = tuple(parts)
        self.axis = axis

    def read(self, region: Region) -> Array:
        start, stop, _ = region[self.axis].indices(self.shape[self.axis])
        pieces, offset = [], 0
        for part in self.parts:
            size = part.shape[self.axis]
            low, high = max(start - offset, 0), min(stop - offset, size)
            if low < high:
                piece = list(region)
                piece[self.axis] = slice(low, high)
                pieces.append(part.read(tuple(piece)))
            offset += size
        if not pieces:
            pieces = [self.parts[0].read((*region[: self.axis], slice(0, 0), *region[self.axis + 1 :]))]
        return np.concatenate(pieces, axis=self.axis)

    def amax(self) -> float:
        return float(np.max([part.amax() for part in self.parts]))

    def _counts(self) -> Array:
        counts: Array = np.sum([part._counts() for part in self.parts], axis=0)
        return counts

    def fingerprint(self) -> object:
        return ("joined", self.axis, tuple(part.fingerprint() for part in self.parts))


class Selected(Weight):
    """The elements of `base` at `indices` along `axis`, in the order of `indices`."""

    def __init__(self, base: Weight, axis: int, indices: Sequence[int]) -> None:
        super().__init__([*base.shape[:axis], len(indices), *base.shape[axis + 1 :]], base.dtype)
        self.base = base
        self.axis = axis
        self.indices = tuple(int(index) for index in indices)

    def read(self, region: Region) -> Array:
        places = np.array(self.indices[region[self.axis]], np.int64)
        low, high = (int(places.min()), int(places.max()) + 1) if len(places) else (0, 0)
        span = (*region[: self.axis], slice(low, high), *region[self.axis + 1 :])
        values: Array = np.take(self.base.read(span), places - low, axis=self.axis)
        return values

    def fingerprint(self) -> object:
        return ("selected", self.axis, self.indices, self.base.fingerprint())


class Scaled(Weight):
    """`base` times `factor`, a float32 array that broadcasts to it, rounded once to `base`'s dtype or `dtype`."""

    def __init__(self, base: Weight, factor: Array, dtype: Any = None) -> None:
        super().__init__(base.shape, base.dtype if dtype is None else dtype)
        self.base = base
        rank = len(base.shape)
        self.factor: Array = np.asarray(factor, np.float32).reshape(
            (1,) * (rank - np.ndim(factor)) + np.shape(factor)
        )

    def read(self, region: Region) -> Array:
        factor = self.factor[_broadcast(region, self.factor.shape)]
        return (self.base.read(region).astype(np.float32) * factor).astype(self.dtype)

    def fingerprint(self) -> object:
        factor = (self.factor.shape, self.factor.tobytes())
        return ("scaled", str(self.dtype), factor, self.base.fingerprint())


class Projected(Weight):
    """`vector @ base`, plus `bias` where there is one: what a linear makes of a constant row.

    Float32 [columns of base], summed in float64 over chunks of rows and kept once it has been read.
    """

    def __init__(self, base: Weight, vector: Array, bias: Weight | None = None) -> None:
        super().__init__(base.shape[1:], np.float32)
        self.base = base
        self.vector = np.asarray(vector, np.float32)
        self.bias = bias
        self._values: Array | None = None

    def read(self, region: Region) -> Array:
        if self._values is None:
            total = np.zeros(self.shape) if self.bias is None else self.bias.load().astype(np.float64)
            start = 0
            for rows in self.base.chunks():
                part = self.vector[start : start + len(rows)].astype(np.float64)
                total = total + part @ rows.astype(np.float64)
                start += len(rows)
            self._values = total.astype(np.float32)
        return self._values[region]

    def fingerprint(self) -> object:
        bias = None if self.bias is None else self.bias.fingerprint()
        return ("projected", self.vector.tobytes(), bias, self.base.fingerprint())


class _Elementwise(Weight):
    """What a function makes of each element of `base` by itself; a chain of them is one function."""

    base: Weight

    @abstractmethod
    def _function(self, values: Array) -> Array:
        """The elements in `dtype`."""

    def _root(self) -> tuple[Weight, Callable[[Array], Array]]:
        """What the chain starts from, and its function."""
        if not isinstance(self.base, _Elementwise) or not self.base._uniform:
            return self.base, self._function
        root, inner = self.base._root()
        return root, lambda values: self._function(inner(values))

    @property
    def _uniform(self) -> bool:
        """Whether all elements go through the same function."""
        return True

    def read(self, region: Region) -> Array:
        root, function = self._root()
        return _elementwise(function, root.read(region))


class Cast(_Elementwise):
    """`base` rounded to `dtype`, to the nearest, ties to even."""

    def __init__(self, base: Weight, dtype: Any) -> None:
        super().__init__(base.shape, dtype)
        self.base = base

    def _function(self, values: Array) -> Array:
        return values.astype(self.dtype)

    def fingerprint(self) -> object:
        return ("cast", str(self.dtype), self.base.fingerprint())


class Quantized(_Elementwise):
    """What ONNX QuantizeLinear makes of `base`: `saturate(round(base / scale))` in a float `dtype`.

    `scale` holds positive values in the dtype in which the graph stores them and broadcasts to `base`; the codes
    are computed from it as stored, in float32.
    """

    def __init__(self, base: Weight, scale: Array, dtype: Any) -> None:
        super().__init__(base.shape, dtype)
        self.base = base
        rank = len(base.shape)
        self.scale = np.asarray(scale).astype(np.float32)
        self.scale = self.scale.reshape((1,) * (rank - self.scale.ndim) + self.scale.shape)

    @property
    def _uniform(self) -> bool:
        return self.scale.size == 1

    def _function(self, values: Array) -> Array:
        return self._quantize(values, self.scale.reshape(()))

    def _quantize(self, values: Array, scale: Array) -> Array:
        largest = np.float32(LARGEST[self.dtype])
        return np.clip(values.astype(np.float32) / scale, -largest, largest).astype(self.dtype)

    def read(self, region: Region) -> Array:
        if self._uniform:
            return super().read(region)
        return self._quantize(self.base.read(region), self.scale[_broadcast(region, self.scale.shape)])

    def fingerprint(self) -> object:
        scale = (self.scale.shape, self.scale.tobytes())
        return ("quantized", str(self.dtype), scale, self.base.fingerprint())


def _stored(weight: Weight) -> Iterator[Stored]:
    """The stored weights that a weight derives from."""
    if isinstance(weight, Stored):
        yield weight
    for value in vars(weight).values():
        for source in value if isinstance(value, tuple) else (value,):
            if isinstance(source, Weight):
                yield from _stored(source)


def whole(shape: Sequence[int]) -> Region:
    """The region that covers all of `shape`."""
    return tuple(slice(0, dim) for dim in shape)


def _broadcast(region: Region, shape: Sequence[int]) -> Region:
    """The part of an array of `shape` that meets `region` of what it broadcasts to."""
    return tuple(part if size > 1 else slice(None) for part, size in zip(region, shape, strict=True))


def weight_of(constant: gs.Constant) -> Weight:
    """The weight behind a constant, wrapping the array that onnx-graphsurgeon may hold in its place."""
    values = constant._values
    if not isinstance(values, Weight):
        if isinstance(values, LazyValues):
            values = InMemory(numpy_helper.to_array(values.tensor))
        else:
            export_dtype = to_numpy(constant.export_dtype)
            values = InMemory(values if values.dtype == export_dtype else values.astype(export_dtype))
        constant._values = values
        constant._export_dtype = None
        constant.data_location = None
    return cast(Weight, values)


def array_of(constant: gs.Constant) -> Array:
    """All values of a constant, without making it forget where they are stored."""
    return weight_of(constant).load()


def stored_bytes(values: Array) -> bytes | memoryview:
    """The little-endian, row-major bytes in which ONNX stores `values` (FP4, INT4 and INT2 packed)."""
    if bits(values.dtype) < 8:
        return numpy_helper.from_array(values).raw_data
    if values.dtype == np.dtype(object):  # strings, which have no such bytes; these tell them apart
        return "".join(f"{len(str(value))}:{value}" for value in values.reshape(-1)).encode()
    return _row_major(values).reshape(-1).view(np.uint8).data


def from_stored_bytes(raw: bytes, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
    """The values whose `stored_bytes` are `raw`."""
    proto = onnx.TensorProto(data_type=to_onnx(dtype), dims=shape, raw_data=raw)
    values: Array = numpy_helper.to_array(proto)
    return values


def _row_major(values: Array) -> Array:
    """`values` in row-major order; of a transposed matrix tile by tile, since numpy's copy goes against the cache."""
    if values.ndim != 2 or abs(values.strides[0]) >= abs(values.strides[1]) or min(values.shape) < _TILE:
        return np.ascontiguousarray(values)
    result: Array = np.empty(values.shape, values.dtype)
    for row in range(0, values.shape[0], _TILE):
        for column in range(0, values.shape[1], _TILE):
            tile = values[row : row + _TILE, column : column + _TILE]
            result[row : row + _TILE, column : column + _TILE] = np.ascontiguousarray(tile.T).T
    return result


def _in_any_order(values: Array) -> Array:
    """The elements as a vector, in the order in which they lie in memory where they lie together."""
    transposed = values.ndim == 2 and abs(values.strides[0]) < abs(values.strides[1])
    return np.ascontiguousarray(values.T if transposed else values).reshape(-1)


def _amax(values: Array) -> float:
    """Largest absolute value; of 16-bit floats by their codes, whose order is that of the values."""
    if values.size == 0:
        return 0.0
    if values.dtype.itemsize == 2 and values.dtype.kind in "fV":
        code = (_in_any_order(values).view(np.uint16) & np.uint16(0x7FFF)).max()
        return float(code.reshape(1).view(values.dtype)[0])
    return float(np.abs(values.astype(np.float32) if values.dtype.itemsize < 4 else values).max())


def _elementwise(function: Callable[[Array], Array], values: Array) -> Array:
    if values.dtype.itemsize != 2 or values.size < _TABLE_THRESHOLD:
        return function(values)
    if values.ndim == 2 and abs(values.strides[0]) < abs(values.strides[1]):
        turned: Array = _elementwise(
            function, values.T
        ).T  # as narrow or narrower, which is cheaper to transpose
        return turned
    with np.errstate(all="ignore"):
        table = function(np.arange(2**16, dtype=np.uint16).view(values.dtype))
    codes = np.ascontiguousarray(values).view(np.uint16)
    return table.view(f"u{table.itemsize}")[codes].view(table.dtype)


class Stamp(NamedTuple):
    """What tells a file from one that took its name, and from itself before somebody wrote to it."""

    inode: int
    mtime_ns: int
    size: int


def stamp(found: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return Stamp(found.st_ino, found.st_mtime_ns, found.st_size)


class _OpenFile:
    """A file with its bytes mapped."""

    def __init__(self, path: Path) -> None:
        self.handle = path.open("rb")
        self.stamp = stamp(os.fstat(self.handle.fileno()))
        self.bytes: Any = (
            np.memmap(self.handle, np.uint8, mode="r") if self.stamp.size else np.zeros(0, np.uint8)
        )


@lru_cache(maxsize=64)
def _opened(path: Path, stamp: Stamp) -> _OpenFile:
    """The file at `path` as long as it has that stamp."""
    return _OpenFile(path)


__all__ = [
    "CHUNK_BYTES",
    "PENDING",
    "Cast",
    "InMemory",
    "Joined",
    "Projected",
    "Quantized",
    "Region",
    "Reshaped",
    "Scaled",
    "Selected",
    "Stored",
    "Transposed",
    "Weight",
    "array_of",
    "from_stored_bytes",
    "stamp",
    "stored_bytes",
    "weight_of",
    "whole",
]
