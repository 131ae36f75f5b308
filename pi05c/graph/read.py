"""Reads what others wrote: an ONNX file, and the bytes of its tensors. Neither is trusted.

Whatever a file declares is held against what it holds before anything is allocated: a size against the bytes that are
there, a place against the model's folder.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from pi05c.graph.dtypes import bits, name_of, to_numpy
from pi05c.graph.errors import Pi05cError, shortened, unreadable
from pi05c.graph.walk import graphs_in
from pi05c.graph.weights import InMemory, Stored, Weight
from pi05c.graph.wellformed import refuse_malformed

_NUMBER = re.compile(r"[0-9]{1,19}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_proto(path: Path | str) -> onnx.ModelProto:
    """Read an ONNX file; external data stays where it is.

    Raises:
        Pi05cError: no such file, not an ONNX model, or one that is not well formed.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise Pi05cError(f"{path} is a folder: name the ONNX file in it")
        if not stat.S_ISREG(mode):
            raise Pi05cError(f"{path} is a pipe or a device: write the model to a file and name that")
        proto = onnx.load_model(path, format="protobuf", load_external_data=False)
    except FileNotFoundError as error:
        raise Pi05cError(f"there is no file {path}") from error
    except OSError as error:
        raise Pi05cError(f"{path} cannot be read: {unreadable(error)}") from error
    except (DecodeError, ValueError) as error:
        raise Pi05cError(f"{path} cannot be read as an ONNX model: {error}") from error
    with about(path):
        refuse_malformed(proto)
    _clear_what_says_nothing(proto)
    return proto


def _clear_what_says_nothing(proto: onnx.ModelProto) -> None:
    """Leave out types without a kind, and the -1 and `?` that some exporters (paddle2onnx) write where a size may vary.

    TensorRT takes `?` for a name, and so for one and the same size wherever it stands.
    """
    for graph in graphs_in(proto.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.WhichOneof("value") is None:
                value.ClearField("type")
            for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
                if dim.dim_value < 0 or dim.dim_param == "?":
                    dim.Clear()


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Put the file in front of what is said of its content."""
    try:
        yield
    except Pi05cError as error:
        raise Pi05cError(f"{path} cannot be used: {error}") from error


def weight_of_tensor(tensor: onnx.TensorProto, base: Path | None) -> Weight:
    """The values of an initializer, mapped where they lie in a file.

    Args:
        base: the model's folder, which external data must not leave.

    Raises:
        Pi05cError: the bytes are not those of such a tensor, or lie outside the folder, or are not there.
    """
    name = shortened(tensor.name)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        try:
            return InMemory(numpy_helper.to_array(tensor))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise Pi05cError(
                f"initializer {name} of type {name_of(tensor.data_type)} and shape {list(tensor.dims)} does not hold "
                f"the values of one ({error}): export the model again"
            ) from error
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = _inside(name, entries.get("location", ""), base)
    offset, length = (_number(name, key, entries.get(key)) for key in ("offset", "length"))
    checksum = entries.get("checksum")
    stored = Stored(
        path,
        offset or 0,
        tensor.dims,
        to_numpy(tensor.data_type),
        checksum if checksum is not None and _SHA256.fullmatch(checksum) else None,
    )
    if length is not None and length != stored.nbytes:
        raise Pi05cError(
            f"initializer {name} of shape {list(tensor.dims)} takes {stored.nbytes} bytes "
            f"({bits(stored.dtype)} bits an element), but its external data is said to hold {length}"
        )
    return stored


def refuse_overlaps(weights: Iterable[tuple[str, Weight]]) -> None:
    """Check that ranges of a file are the same or apart: else little data could be made to look like a lot.

    Raises:
        Pi05cError: names two weights that share a part of their bytes.
    """
    ranges: dict[Path, dict[tuple[int, int], str]] = {}
    for name, weight in weights:
        if isinstance(weight, Stored) and weight.nbytes:
            known = ranges.setdefault(weight.path, {})
            known.setdefault((weight.offset, weight.offset + weight.nbytes), name)
    for path, known in ranges.items():
        for (one, (_, end)), (other, (start, _)) in pairwise(
            sorted(((n, r) for r, n in known.items()), key=itemgetter(1))
        ):
            if start < end:
                raise Pi05cError(
                    f"initializers {shortened(one)} and {shortened(other)} overlap in {path}: export the model again"
                )


def _inside(name: str, location: str, base: Path | None) -> Path:
    """The file at `location`, which lies in the folder `base` itself and not behind a link."""
    relative = Path(location)
    if base is None or relative.is_absolute() or ".." in relative.parts or not location or "\0" in location:
        raise Pi05cError(
            f"the external data of initializer {name} lies at {shortened(location)}, outside the model's folder: save "
            "the model with its data beside it"
        )
    path = base / relative
    try:
        if path.resolve() != base.resolve() / relative:
            raise Pi05cError(
                f"the external data {path} of initializer {name} is a symbolic link: put the file itself there"
            )
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Pi05cError(
            f"the external data {path} of initializer {name} does not exist: move a model together with its data"
        ) from error
    except (OSError, RuntimeError) as error:
        reason = unreadable(error) if isinstance(error, OSError) else str(error)
        raise Pi05cError(
            f"the external data {shortened(location)} of initializer {name} cannot be read: {reason}"
        ) from error
    if not stat.S_ISREG(mode):
        raise Pi05cError(
            f"the external data {path} of initializer {name} is no file: save the model with its data beside it"
        )
    return path


def _number(name: str, key: str, text: str | None) -> int | None:
    if text is None or text == "":
        return None
    if not _NUMBER.match(text):
        raise Pi05cError(
            f"the external data of initializer {name} has the {key} {shortened(text)}, which is no number of bytes: "
            "save the model again"
        )
    return int(text)


__all__ = ["about", "read_proto", "refuse_overlaps", "weight_of_tensor"]
