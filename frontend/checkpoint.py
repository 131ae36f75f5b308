"""Opens a pi0.5 checkpoint folder, of openpi or of LeRobot, without reading its weights.

Safetensors files hold raw little-endian bytes behind a JSON header, so each tensor becomes a mapped byte range
(`Stored`) and nothing is copied. What is in the files must be exactly the network: a tensor that is missing, extra
or of another shape or type is an error that names it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pi05c.frontend.config import Pi05Config, parse_config, read_json
from pi05c.frontend.model import parameter_shapes
from pi05c.graph.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pi05c.graph.errors import Pi05cError, shortened
from pi05c.graph.weights import Stored, Weight

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
"""The token embedding."""

LANGUAGE_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
"""The same table under its other name: openpi's converter stores this one only."""

EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
"""The expert's output head: stored, never trained, never used."""

_OPTIONAL = {EMBEDDING, LANGUAGE_HEAD, EXPERT_HEAD}

_PI0_ONLY = ("state_proj.", "action_time_mlp_in.", "action_time_mlp_out.")
"""Modules that pi0 has and pi0.5 has not: it takes the state in the prompt and the time through adaRMS."""

_DTYPES = {"BF16": BFLOAT16, "F16": FLOAT16, "F32": FLOAT32}
"""Element types of safetensors that a checkpoint of this network may have."""

_HEADER_LIMIT = 100_000_000
"""Largest header in bytes that the safetensors format allows."""

_NAMES_SHOWN = 8


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that fits the network it describes.

    Attributes:
        folder: where it lies.
        fields: its `config.json` as parsed; empty where it has none.
        config: what that describes.
        weights: every parameter by openpi's name, the tied table under both of its names.
        weight_files: the safetensors files.
    """

    folder: Path
    fields: Mapping[str, Any]
    config: Pi05Config
    weights: Mapping[str, Weight] = field(repr=False)
    weight_files: tuple[Path, ...] = ()

    def provenance(self) -> dict[str, Any]:
        """The folder's name and the SHA-256 of each weight file (which are read for it)."""
        return {
            "folder": self.folder.resolve().name,
            "sha256": {path.name: file_sha256(path) for path in self.weight_files},
        }


def open_checkpoint(folder: Path, named: Pi05Config | None = None) -> Checkpoint:
    """Open a checkpoint folder.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`, and `config.json`.
        named: configuration for what `config.json` leaves open; required where there is none.

    Raises:
        Pi05cError: no such checkpoint, or it is not exactly the network that its configuration describes.
    """
    if not folder.is_dir():
        raise Pi05cError(f"{folder} is not a checkpoint folder: pass the folder that holds model.safetensors")
    files = _weight_files(folder)
    config_path = folder / "config.json"
    if not config_path.is_file() and named is None:
        raise Pi05cError(f"{folder} has no config.json: name its configuration with --config")
    stored = _without_prefix(read_safetensors(files))
    _refuse_pi0(folder, stored)
    fields = read_json(config_path) if config_path.is_file() else {}
    name = folder.resolve().name
    config = parse_config(fields, name, named)
    return Checkpoint(folder, fields, config, _matched(folder, stored, config), tuple(files))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Pi05cError(f"{index} has no weight_map: it does not say which shard holds which tensor")
        names = sorted(set(map(str, weight_map.values())))
        if outside := [name for name in names if Path(name).name != name]:
            raise Pi05cError(
                f"{index} names shards outside its folder ({_listed(outside)}): put them beside it"
            )
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise Pi05cError(f"{folder} lacks shards that its index names: {_listed(missing)}")
        files = [folder / name for name in names]
        held = {tensor: path.name for path in files for tensor in _header(path)[0]}
        if absent := sorted(tensor for tensor, shard in weight_map.items() if held.get(tensor) != shard):
            raise Pi05cError(
                f"the shards of {folder} lack tensors that the index places in them: {_listed(absent)}"
            )
        return files
    if single.is_file():
        return [single]
    if (folder / "params").is_dir():
        raise Pi05cError(
            f"{folder} is a JAX checkpoint (params/): convert it with openpi's convert_jax_model_to_pytorch.py"
        )
    raise Pi05cError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors that a safetensors file declares, and the offset of its data in bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= min(_HEADER_LIMIT, path.stat().st_size) else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            _check_entry(name, entry)
        _refuse_overlaps(header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Pi05cError(
            f"{path} is not a safetensors file, or is truncated: fetch it again ({error})"
        ) from error
    return header, 8 + length


def _check_entry(name: str, entry: dict[str, Any]) -> None:
    """Hold one tensor of a header against the format: dtype, shape, and where its bytes begin and end."""
    begin, end = entry["data_offsets"]
    sizes = [begin, end, *entry["shape"]]
    if not isinstance(entry["dtype"], str) or not all(type(size) is int for size in sizes):
        raise ValueError(f"tensor {shortened(name)} is declared by other things than numbers")
    if begin > end or min(sizes) < 0:
        raise ValueError(f"tensor {shortened(name)} has a negative size")


def _refuse_overlaps(header: Mapping[str, Mapping[str, Any]]) -> None:
    """The format does not allow tensors to share bytes."""
    ranges = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    for (_, end, one), (begin, _, other) in pairwise(each for each in ranges if each[0] < each[1]):
        if begin < end:
            raise ValueError(f"tensors {shortened(one)} and {shortened(other)} overlap")


def read_safetensors(files: Iterable[Path]) -> dict[str, Weight]:
    """The tensors of safetensors files by name, mapped.

    Raises:
        Pi05cError: a file is damaged, a name comes twice, or a type is none that a checkpoint may have.
    """
    tensors: dict[str, Weight] = {}
    unusable: list[str] = []
    for path in files:
        header, start = _header(path)
        for name, entry in header.items():
            if name in tensors:
                raise Pi05cError(f"tensor {name} is stored twice, the second time in {path}")
            dtype = _DTYPES.get(entry["dtype"])
            begin, end = entry["data_offsets"]
            if dtype is None:
                unusable.append(f"{name} ({entry['dtype']})")
            elif end - begin != math.prod(entry["shape"]) * np.dtype(dtype).itemsize:
                raise Pi05cError(f"{path} is damaged: the size of tensor {name} contradicts its shape")
            else:
                tensors[name] = Stored(path, start + begin, entry["shape"], dtype)
    if unusable:
        raise Pi05cError(
            f"tensors of types other than {', '.join(_DTYPES)} cannot be compiled: {_listed(unusable)}"
        )
    return tensors


def _without_prefix(stored: dict[str, Weight]) -> dict[str, Weight]:
    """LeRobot's policies hold the network as `model`; some releases keep that in the names."""
    prefix = "model."
    if stored and all(name.startswith(prefix) for name in stored):
        return {name.removeprefix(prefix): weight for name, weight in stored.items()}
    return stored


def _refuse_pi0(folder: Path, stored: Mapping[str, Weight]) -> None:
    if foreign := sorted(name for name in stored if name.startswith(_PI0_ONLY)):
        raise Pi05cError(
            f"{folder} is a checkpoint of pi0, not of pi0.5 (it holds {_listed(foreign)}): "
            "pi05c compiles pi0.5 only"
        )


def _matched(folder: Path, stored: Mapping[str, Weight], config: Pi05Config) -> dict[str, Weight]:
    """The weights that the network needs, or one error with everything that does not fit."""
    expected = parameter_shapes(config)
    table = stored.get(EMBEDDING) or stored.get(LANGUAGE_HEAD)
    missing = sorted(name for name in expected if name not in stored and name not in _OPTIONAL)
    if table is None:
        missing.append(f"{EMBEDDING} (or {LANGUAGE_HEAD}, to which it is tied)")
    extra = sorted(name for name in stored if name not in expected)
    misshapen = [
        f"{name} is {list(weight.shape)} instead of {list(expected[name])}"
        for name, weight in sorted(stored.items())
        if name in expected and weight.shape != expected[name]
    ]
    problems = [
        f"{kind}: {_listed(names)}"
        for kind, names in (("missing", missing), ("unknown", extra), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise Pi05cError(
            f"{folder} does not hold the network that its configuration describes ({'; '.join(problems)}): check "
            "config.json, or fetch the checkpoint again"
        )
    assert table is not None
    return {**stored, EMBEDDING: table}


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown


__all__ = [
    "EMBEDDING",
    "EXPERT_HEAD",
    "LANGUAGE_HEAD",
    "Checkpoint",
    "file_sha256",
    "open_checkpoint",
    "read_safetensors",
]
