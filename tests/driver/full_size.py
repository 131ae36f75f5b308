"""The full-size plain graph without its weights: 76 kB in `tests/data`, the data file a hole of the right size.

    python tests/driver/full_size.py

traces the model again and replaces the stored graph (40 seconds, needs torch).
"""

from __future__ import annotations

import gzip
from pathlib import Path

import onnx

from pi05c.graph.io import location_of, tensors

STORED = Path(__file__).parents[1] / "data" / "pi05_libero.onnx.gz"
CONFIG = "pi05_libero"


def write_full_size(folder: Path) -> Path:
    """Write the graph and a sparse file for its weights, which are all zero and take no room on the disk."""
    path = folder / "model.onnx"
    path.write_bytes(gzip.decompress(STORED.read_bytes()))
    proto = onnx.load(path, load_external_data=False)
    ends = [
        int(entries["offset"]) + int(entries["length"])
        for tensor in tensors(proto)
        if (entries := {entry.key: entry.value for entry in tensor.external_data})
    ]
    with (folder / "model.onnx.data").open("wb") as data:
        data.truncate(max(ends))
    return path


def trace_full_size() -> onnx.ModelProto:
    """The graph as `pi05c export` makes it, with references to weights where those would lie."""
    from pi05c.frontend.config import CONFIGS
    from pi05c.frontend.model import parameter_shapes
    from pi05c.frontend.random_weights import random_weights
    from pi05c.frontend.trace import trace
    from pi05c.graph.io import model_from_proto, to_proto

    config = CONFIGS[CONFIG]
    weights = random_weights(parameter_shapes(config), seed=0)
    traced = trace(config, {name: weight.dtype for name, weight in weights.items()})
    proto, pending = to_proto(model_from_proto(traced, weights=weights))
    places: dict[str, int] = {}
    end = 0
    for tensor in tensors(proto):
        location = location_of(tensor)
        if location not in pending:
            continue
        size = pending[location].nbytes
        if location not in places:
            places[location], end = end, end + size
        del tensor.external_data[:]
        for key, value in (("location", "model.onnx.data"), ("offset", places[location]), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
    del proto.metadata_props[:]
    _strip(proto.graph)
    return proto


def _strip(graph: onnx.GraphProto) -> None:
    """Drop what loading infers again, and what the exporter notes on nodes."""
    del graph.value_info[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)


if __name__ == "__main__":
    raw = trace_full_size().SerializeToString(deterministic=True)
    STORED.write_bytes(gzip.compress(raw, mtime=0))
    print(f"{STORED}: {STORED.stat().st_size:,} bytes")
