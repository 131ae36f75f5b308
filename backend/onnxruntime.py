"""Reference and simulated runs on the CPU by onnxruntime.

A float32 graph runs as it is. One in narrower types runs with their bits (see `lowering`), which is what a graph
is measured by where its engine cannot run. Weights stay where they are: bfloat16 and FP8 ones are widened when
they are used, since constant folding is off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime

from pi05c.backend.lowering import KEPT, lower
from pi05c.backend.signature import check_inputs, inputs_of, spec_of
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import load, save
from pi05c.graph.read import read_proto
from pi05c.graph.runner import Array
from pi05c.graph.session import error_kind, open_session, read_weights_from, session_options
from pi05c.graph.sort import constants_first, sort_proto
from pi05c.graph.spelling import awaits_fp4
from pi05c.graph.walk import bodies_of, graphs_in

_NO_QUANTIZED_KERNELS = "session.disable_quant_qdq"
"""Session entry of onnxruntime that keeps it from replacing Q/DQ by integer kernels, which round otherwise."""

_DISABLED_OPTIMIZERS = ["ConstantFolding", "LayerNormFusionL1", "LayerNormFusionL2", KEPT]
"""Folding would widen narrow weights in memory; the fusion makes a node of two types where a normalization in float32
reads float16 (onnxruntime 1.32)."""

_ERRORS_ONLY = 3
_MESSAGE_CHARACTERS = 600


class OnnxRuntimeRunner:
    """A loaded graph; implements `pi05c.graph.runner.Runner`.

    Attributes:
        inputs: what `run` takes.
        outputs: what `run` gives.
        metadata: the model's metadata_props.
    """

    def __init__(
        self,
        path: Path,
        *,
        outputs: Sequence[str] | None = None,
        edit: Callable[[onnx.ModelProto], None] | None = None,
        threads: int | None = None,
    ) -> None:
        """Load the model at `path`.

        Args:
            outputs: names of the outputs to compute; what only the others need is not run. None: all.
            edit: changes the proto as it was read, for example makes inner tensors outputs.
            threads: for the operators; None: one for each processor that this process may use.

        Raises:
            Pi05cError: no model there, an output that it does not have, an operator that onnxruntime cannot run.
        """
        proto = read_proto(path)
        self._path = path
        if awaits_fp4(proto):
            self._folder = TemporaryDirectory(prefix="pi05c-")  # for as long as the weights in it are mapped
            path = Path(self._folder.name) / path.name
            save(load(self._path), path)
            proto = read_proto(path)
        self.metadata = {entry.key: entry.value for entry in proto.metadata_props}
        if edit is not None:
            edit(proto)
        self.inputs = inputs_of(proto.graph)
        if outputs is not None:
            _keep_outputs(proto.graph, outputs, self._path)
        self.outputs = tuple(spec_of(value) for value in proto.graph.output)
        lowered = lower(proto)
        for graph in graphs_in(lowered.model.graph):
            constants_first(graph)  # else all weights are widened before the first MatMul
        self._feeds = lowered.feeds
        self._fetches = lowered.fetches
        options = session_options()
        options.intra_op_num_threads = processors() if threads is None else threads
        options.log_severity_level = _ERRORS_ONLY
        options.enable_cpu_mem_arena = (
            False  # it keeps what one run took, and outputs in it keep it beyond the session
        )
        options.enable_mem_pattern = False  # the second run would take all that the first did, in one block
        options.add_session_config_entry(_NO_QUANTIZED_KERNELS, "1")
        read_weights_from(options, path.absolute().parent)
        try:
            model = lowered.model.SerializeToString()
            self._session: Any = open_session(model, options, _DISABLED_OPTIMIZERS)
        except Exception as error:  # onnxruntime raises a class of its own for each status code
            newer = ""
            if type(error).__name__ == "NotImplemented":
                newer = f"; this is onnxruntime {onnxruntime.__version__}, and a newer one may have it: pip install -U onnxruntime"
            raise error_kind(error)(
                f"onnxruntime cannot load {self._path}: {_short(error)}{newer}"
            ) from error

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Args:
            inputs: an array of the right type and shape for each of `self.inputs`; bfloat16 and FP8 as `ml_dtypes`.

        Raises:
            Pi05cError: an input is missing, unknown, or of another type or shape; or onnxruntime fails.
        """
        check_inputs(self.inputs, inputs)
        feeds = {self._feeds.get(name, name): self._fed(name, array) for name, array in inputs.items()}
        names = [self._fetches.get(spec.name, spec.name) for spec in self.outputs]
        try:
            values = self._session.run(names, feeds)
        except Exception as error:
            raise error_kind(error)(f"onnxruntime cannot run {self._path}: {_short(error)}") from error
        return {
            spec.name: np.asarray(value).astype(spec.dtype) if spec.name in self._fetches else value
            for spec, value in zip(self.outputs, values, strict=True)
        }

    def _fed(self, name: str, array: Array) -> Array:
        return np.asarray(array, np.float32 if name in self._feeds else None, order="C")


def load_runner(
    path: Path,
    *,
    outputs: Sequence[str] | None = None,
    edit: Callable[[onnx.ModelProto], None] | None = None,
) -> OnnxRuntimeRunner:
    """Load the model at `path` for repeated runs; a `pi05c.graph.runner.LoadRunner`. See `OnnxRuntimeRunner`."""
    return OnnxRuntimeRunner(path, outputs=outputs, edit=edit)


def _keep_outputs(graph: onnx.GraphProto, names: Sequence[str], path: Path) -> None:
    """Remove the other outputs of a graph, and the nodes that only they need."""
    by_name = {value.name: value for value in graph.output}
    if missing := [name for name in names if name not in by_name]:
        raise Pi05cError(f"{path} has no output {', '.join(missing)}: its outputs are {', '.join(by_name)}")
    outputs = [by_name[name] for name in dict.fromkeys(names)]
    sort_proto(graph)
    needed = set(names)
    nodes = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed.update(node.input)
            for body in (inner for outer in bodies_of(node) for inner in graphs_in(outer)):
                needed.update(name for inner in body.node for name in inner.input)
                needed.update(value.name for value in body.output)
            nodes.append(node)
    nodes.reverse()
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.output[:]
    graph.output.extend(outputs)


def processors() -> int:
    """Processors that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:_MESSAGE_CHARACTERS]


__all__ = ["OnnxRuntimeRunner", "load_runner", "processors"]
