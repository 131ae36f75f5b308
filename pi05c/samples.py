"""Recorded inputs: what ranges are calibrated on and what results are verified on.

An .npz file holds one sample (arrays of the inputs' shapes) or many (one more leading axis). A sample is read when
it is asked for: what `numpy.savez` wrote is mapped; of compressed files one at a time is held in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import overload

import numpy as np

from pi05c.backend.signature import TensorSpec, check_inputs
from pi05c.graph.dtypes import BOOL, to_numpy
from pi05c.graph.errors import MachineError, Pi05cError, UsageError, unreadable, unwritable
from pi05c.graph.io import Model
from pi05c.graph.npz import read_npz, write_npz
from pi05c.graph.runner import Array
from pi05c.graph.specialization import fixed_inputs

SYNTHETIC = "synthetic"
"""Entry of an .npz file that marks made-up data, and the word that accepts it on the command line."""

WEIGHTS_KEY = "pi05c.weights"
"""Metadata entry of a model that says where its weights come from."""

RANDOM_WEIGHTS = "random"
"""Value of `WEIGHTS_KEY` for weights that were drawn, not trained."""

ITERATOR = "an iterator"
"""What samples are said to come from that were given one by one."""

LEROBOT_INFO = "meta/info.json"
"""The file by which the folder of a LeRobot dataset is known."""

SIDECAR_SUFFIX = ".calibration.npz"
"""What the name of the samples beside a model ends with, in place of the model's own suffix."""

HELD_BACK_FRACTION = 4
"""One sample of so many, at least one of two, is held back from calibration for verification."""

WAYS_TO_GIVE_SAMPLES = (
    "give recorded samples with --calibration FILE.npz (or a folder of such files), put them beside the model as "
    f"MODEL{SIDECAR_SUFFIX}, or accept made-up data by name with --calibration {SYNTHETIC}"
)


@dataclass(frozen=True)
class _Sample:
    """Where one sample is: arrays in memory, or the row of a file (None for a file that holds one sample)."""

    sha256: str
    arrays: Mapping[str, Array] | None = None
    path: Path | None = None
    row: int | None = None


class Samples(Sequence[dict[str, Array]]):
    """Samples in order, each a dictionary from input name to array.

    Attributes:
        source: one phrase that says where they come from.
        synthetic: whether any of them was made up and not recorded.
    """

    def __init__(
        self, samples: Iterable[_Sample], source: str, synthetic: bool, names: frozenset[str] | None = None
    ) -> None:
        self._samples = tuple(samples)
        self._names = names
        self.source = source
        self.synthetic = synthetic

    @classmethod
    def of(
        cls,
        arrays: Iterable[Mapping[str, Array]],
        *,
        source: str = "arrays in memory",
        synthetic: bool = False,
    ) -> Samples:
        """Samples of arrays that are in memory already; nothing is checked."""
        return cls([_Sample(_sha256(sample), sample) for sample in arrays], source, synthetic)

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> dict[str, Array]: ...

    @overload
    def __getitem__(self, index: slice) -> Samples: ...

    def __getitem__(self, index: int | slice) -> dict[str, Array] | Samples:
        if isinstance(index, slice):
            return Samples(self._samples[index], self.source, self.synthetic, self._names)
        sample = self._samples[index]
        if sample.arrays is not None:
            return {name: sample.arrays[name] for name in self._wanted(sample.arrays)}
        assert sample.path is not None
        arrays = _open(sample.path)
        row = ... if sample.row is None else sample.row
        return {name: np.array(arrays[name][row]) for name in self._wanted(arrays)}

    def _wanted(self, arrays: Mapping[str, Array]) -> list[str]:
        return [name for name in arrays if name != SYNTHETIC and (self._names is None or name in self._names)]

    @property
    def files(self) -> set[Path]:
        """The files that they are read from."""
        return {sample.path for sample in self._samples if sample.path is not None}

    def only(self, names: Iterable[str]) -> Samples:
        """The same samples without other arrays than those named."""
        return Samples(self._samples, self.source, self.synthetic, frozenset(names))

    def at(self, indices: Iterable[int]) -> Samples:
        """Some of the samples."""
        return Samples([self._samples[index] for index in indices], self.source, self.synthetic, self._names)

    @property
    def hashes(self) -> tuple[str, ...]:
        """Hash of each sample's names, types, shapes and values."""
        return tuple(sample.sha256 for sample in self._samples)

    @property
    def sha256(self) -> str:
        """Hash of names, types, shapes and values of all samples in order, however they are spread over files."""
        digest = hashlib.sha256(repr(self.synthetic).encode())
        for sample in self._samples:
            digest.update(sample.sha256.encode())
        return digest.hexdigest()


def input_specs(model: Model) -> tuple[TensorSpec, ...]:
    """Names, types and shapes of a model's inputs.

    Raises:
        Pi05cError: an input is not a tensor of a known element type and rank.
    """
    specs = []
    for tensor in model.graph.inputs:
        dtype = to_numpy(tensor.dtype)
        if dtype is None or tensor.shape is None:
            raise Pi05cError(
                f"input {tensor.name!r} of the model declares no element type or no rank, so samples for it cannot "
                "be checked: export the model with typed inputs"
            )
        specs.append(TensorSpec(tensor.name, dtype, tuple(tensor.shape)))
    return tuple(specs)


def fixed_specs(model: Model) -> tuple[TensorSpec, ...]:
    """Names, types and shapes of what were inputs of a model before it was specialized."""
    inputs = {tensor.name for tensor in model.graph.inputs}
    return tuple(
        TensorSpec(fixed.name, BOOL, fixed.shape)
        for fixed in fixed_inputs(model.metadata)
        if fixed.name not in inputs
    )


def load_samples(
    paths: Sequence[Path], inputs: Sequence[TensorSpec], optional: Sequence[TensorSpec] = ()
) -> Samples:
    """Find and check samples; every value is read once, and read again when a sample is asked for.

    Args:
        paths: .npz files, and folders whose .npz files are taken in order of their names.
        inputs: what each sample must hold.
        optional: what it may hold beside that, such as reference outputs.

    Raises:
        Pi05cError: there is no such file, it is no .npz file or holds Python objects; an array is missing, unknown,
            or of another type or shape than the model takes; an input holds NaN or infinity. Nothing is converted.
    """
    files = [file for path in paths for file in _files(path)]
    found: list[_Sample] = []
    synthetic = False
    for file in files:
        samples, made_up = _check_file(file, inputs, optional)
        found.extend(samples)
        synthetic = synthetic or made_up
    return Samples(found, ", ".join(dict.fromkeys(path.name or str(path) for path in paths)), synthetic)


def find_samples(model: Model, calibration: Sequence[str | Path] = ()) -> Samples | None:
    """The samples to calibrate with: those named, else those beside the model; None where there are none.

    Args:
        model: as loaded; `model.path` says where its sidecar would lie.
        calibration: files and folders; or the word `synthetic` alone, which takes the sidecar whatever it holds.

    Raises:
        Pi05cError: as `load_samples`; or the sidecar holds made-up data and the model's weights are not random.
        UsageError: `synthetic` stands beside files.
    """
    sidecar = None if model.path is None else model.path.with_name(model.path.stem + SIDECAR_SUFFIX)
    by_name = any(str(item) == SYNTHETIC for item in calibration)
    if by_name and len(calibration) > 1:
        raise UsageError(
            f"--calibration {SYNTHETIC} stands beside files: name the files alone, those of made-up data too"
        )
    if calibration and not by_name:
        return load_samples([Path(item) for item in calibration], input_specs(model), fixed_specs(model))
    if sidecar is None or not sidecar.is_file():
        if by_name:
            where = "the model was not loaded from a file" if sidecar is None else f"there is no {sidecar}"
            raise Pi05cError(
                f"--calibration {SYNTHETIC} takes the samples beside the model, but {where}: give --calibration "
                "FILE.npz, or export the model with pi05c, which writes them"
            )
        return None
    samples = load_samples([sidecar], input_specs(model), fixed_specs(model))
    if samples.synthetic and not by_name and model.metadata.get(WEIGHTS_KEY) != RANDOM_WEIGHTS:
        raise Pi05cError(
            f"{sidecar} holds made-up data and the weights of the model are not random, so ranges measured on it "
            f"would be wrong: {WAYS_TO_GIVE_SAMPLES}"
        )
    return samples


Given = Sequence[str | Path] | Iterable[Mapping[str, Array]]
"""Samples as a caller in Python gives them: files, folders and the word `synthetic`, or the samples one by one."""


@contextmanager
def on_disk(calibration: Given, folder: Path) -> Iterator[Sequence[str | Path]]:
    """What was given as `find_samples` takes it; samples that came one by one lie on the disk for the time of the block.

    Args:
        calibration: where it has an attribute `source`, that says where the samples come from.
        folder: gets a folder for them; one is held in memory at a time.

    Raises:
        UsageError: what was given is neither, or both.
        Pi05cError: `folder` cannot be written.
    """
    items = iter([calibration] if isinstance(calibration, (str, Path)) else calibration)
    first = next(items, None)
    if first is None or isinstance(first, (str, Path)):
        files = [] if first is None else [first, *items]
        if not all(isinstance(item, (str, Path)) for item in files):
            raise UsageError("calibration holds files beside arrays: give files, or samples one by one")
        yield [item for item in files if isinstance(item, (str, Path))]
        return
    try:
        kept = tempfile.TemporaryDirectory(prefix=".pi05c-", dir=folder)
    except OSError as error:
        raise MachineError(f"{folder} cannot be written: {unwritable(error)}") from error
    with kept as name:
        place = Path(name) / (Path(str(getattr(calibration, "source", ITERATOR))).name or ITERATOR)
        place.mkdir()
        for index, sample in enumerate(itertools.chain([first], items)):
            if not isinstance(sample, Mapping):
                raise UsageError(
                    f"sample {index} of calibration is a {type(sample).__name__}: give mappings from input name to array"
                )
            save_samples(place / f"{index:08}.npz", [sample])
        yield [place]


def split(samples: Samples) -> tuple[Samples, Samples]:
    """The samples for calibration, and the last ones, held back for verification.

    One of four is held back, and at least one; a single sample serves calibration, and nothing is held back.
    """
    count = len(samples)
    held_back = max(1, count // HELD_BACK_FRACTION) if count > 1 else 0
    return samples[: count - held_back], samples[count - held_back :]


def save_samples(path: Path, samples: Sequence[Mapping[str, Array]], *, synthetic: bool = False) -> None:
    """Write samples of equal shapes into one .npz file that `load_samples` reads: one sample as it is, more stacked.

    Raises:
        Pi05cError: there is no sample, or two differ in names or shapes, or the file cannot be written.
    """
    if not samples:
        raise Pi05cError(f"there is no sample to write to {path}: give at least one")
    first = samples[0]
    for index, sample in enumerate(samples):
        if {name: np.shape(array) for name, array in sample.items()} != {
            name: np.shape(array) for name, array in first.items()
        }:
            raise Pi05cError(
                f"sample {index} has other names or shapes than sample 0, so {path} cannot hold both: write one file "
                "for each"
            )
    arrays = {
        name: first[name] if len(samples) == 1 else np.stack([sample[name] for sample in samples])
        for name in first
    }
    if synthetic:
        arrays[SYNTHETIC] = np.array(True)
    write_npz(path, arrays)


def is_lerobot_dataset(path: Path) -> bool:
    """Whether a folder is a LeRobot dataset, of whatever format."""
    return (path / LEROBOT_INFO).is_file()


def _files(path: Path) -> list[Path]:
    if is_lerobot_dataset(path):
        raise Pi05cError(
            f"{path} is a LeRobot dataset: make samples of it with `pi05c samples MODEL.onnx {path} --tokenizer FILE -o "
            "FILE.npz`"
        )
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise Pi05cError(f"folder {path} holds no .npz file: name a folder of samples")
        return files
    if not path.is_file():
        raise Pi05cError(f"there is no file {path}: name an .npz file of samples or a folder of such files")
    return [path]


def _check_file(
    path: Path, inputs: Sequence[TensorSpec], optional: Sequence[TensorSpec]
) -> tuple[list[_Sample], bool]:
    """The samples of one file, and whether it says that they are made up."""
    arrays = dict(_open(path))
    synthetic = _mark(path, arrays.pop(SYNTHETIC, None))
    specs = [*inputs, *(spec for spec in optional if spec.name in arrays)]
    expected = ", ".join(map(str, inputs))
    if missing := [spec.name for spec in inputs if spec.name not in arrays]:
        raise Pi05cError(f"{path} lacks {_listed(missing)}: a sample holds {expected}")
    if unknown := sorted(set(arrays) - {spec.name for spec in specs}):
        raise Pi05cError(
            f"{path} holds {_listed(unknown)}, which the model does not take: it takes {expected}"
        )
    count = _sample_count(path, arrays, specs)
    found = []
    for row in [None] if count is None else range(count):
        sample = {spec.name: arrays[spec.name] if row is None else arrays[spec.name][row] for spec in specs}
        where = str(path) if row is None else f"{path}, sample {row}"
        try:
            check_inputs(specs, sample)
        except Pi05cError as error:
            raise Pi05cError(f"{where}: {error}") from error
        for name, array in sample.items():
            _refuse_not_finite(where, name, array)
        found.append(_Sample(_sha256(sample), path=path, row=row))
    return found, synthetic


def _mark(path: Path, mark: Array | None) -> bool:
    if mark is not None and (mark.size != 1 or mark.dtype.kind != "b"):
        raise Pi05cError(
            f"entry {SYNTHETIC!r} of {path} is {mark.dtype}{list(mark.shape)}: it marks made-up data and must be one "
            "bool"
        )
    return mark is not None and bool(mark.reshape(())[()])


def _sample_count(path: Path, arrays: Mapping[str, Array], specs: Sequence[TensorSpec]) -> int | None:
    """How many samples a file holds along a leading axis; None for one sample without that axis."""
    first: tuple[str, int | None] | None = None
    for spec in specs:
        shape = arrays[spec.name].shape
        extra = len(shape) - len(spec.shape)
        if extra not in (0, 1):
            raise Pi05cError(
                f"array {spec.name!r} of {path} has shape {list(shape)}, but the model takes {spec}: a file holds one "
                "sample of that shape, or many along one more leading axis"
            )
        count = shape[0] if extra else None
        if first is None:
            first = spec.name, count
        if count != first[1]:
            raise Pi05cError(
                f"array {spec.name!r} of {path} holds {_counted(count)} but {first[0]!r} holds {_counted(first[1])}: "
                "every array of a file must hold the same number of samples"
            )
    if first is None:
        return None
    if first[1] == 0:
        raise Pi05cError(f"{path} holds no sample: its arrays have a leading axis of length 0")
    return first[1]


def _counted(count: int | None) -> str:
    return "one sample without a leading axis" if count is None else f"{count} samples along a leading axis"


def _refuse_not_finite(where: str, name: str, array: Array) -> None:
    if array.dtype.kind in "iub" or np.isfinite(array).all():
        return
    kind = "NaN" if np.isnan(array).any() else "infinity"
    raise Pi05cError(f"{where}: input {name!r} holds {kind}: take the sample out or repair the recording")


def _open(path: Path) -> Mapping[str, Array]:
    """The arrays of a file: mapped where they are stored as they are, else read, and kept until another file is."""
    try:
        stat = path.stat()
    except OSError as error:
        raise Pi05cError(f"{path} cannot be read: {unreadable(error)}") from error
    return _arrays(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)
def _arrays(path: Path, mtime_ns: int, size: int) -> Mapping[str, Array]:
    """What `_open` returns; time and size tell a file that took another's place from it."""
    return read_npz(path)


def _sha256(sample: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(sample):
        array = np.ascontiguousarray(sample[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


__all__ = [
    "LEROBOT_INFO",
    "SYNTHETIC",
    "WAYS_TO_GIVE_SAMPLES",
    "Given",
    "Samples",
    "find_samples",
    "fixed_specs",
    "input_specs",
    "is_lerobot_dataset",
    "load_samples",
    "on_disk",
    "save_samples",
    "split",
]
