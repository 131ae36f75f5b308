"""A Polygraphy runner on pi05c's onnxruntime backend."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from polygraphy import util
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

from pi05c.backend.onnxruntime import OnnxRuntimeRunner
from pi05c.graph.dtypes import name_of
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import save
from pi05c.graph.runner import Array
from pi05c.graph.specialization import fixed_inputs
from pi05c.polygraphy.loader import ApplyPasses, OnnxModel, loaded
from pi05c.polygraphy.reporting import errors_of_polygraphy


class Pi05cRunner(BaseRunner):  # type: ignore[misc]
    """Runs a model in onnxruntime with the bits of its number formats: bfloat16, float16, FP8."""

    def __init__(
        self, model: OnnxModel | Callable[[], OnnxModel] | ApplyPasses, name: str | None = None
    ) -> None:
        """Make a runner.

        Args:
            model: the model, its path, or a callable that returns either. Where it is an `ApplyPasses`, the rewritten
                model goes to a folder that lasts as long as the runner is active, and never into memory as a whole.
            name: as Polygraphy's runners take it.
        """
        super().__init__(name=name, prefix="pi05c-runner")
        self._model = model

    @util.check_called_by("activate")  # type: ignore[untyped-decorator]
    def activate_impl(self) -> None:
        """Run the passes, if any, and load the graph.

        Raises:
            PolygraphyException: the model cannot be read, a pass cannot run, or onnxruntime cannot load the result.
        """
        with errors_of_polygraphy(), ExitStack() as files:
            self.session = OnnxRuntimeRunner(self._stored(files))
            self.fixed = {entry.name: entry for entry in fixed_inputs(self.session.metadata)}
            self._files = files.pop_all()

    def _stored(self, files: ExitStack) -> Path:
        """The path of the model, which is written to a folder of its own where it has none."""
        if not isinstance(self._model, ApplyPasses):
            given, _ = util.invoke_if_callable(self._model)
            if not isinstance(given, onnx.ModelProto):
                return Path(given)
        path = Path(files.enter_context(TemporaryDirectory(prefix="pi05c-"))) / "model.onnx"
        if isinstance(self._model, ApplyPasses):
            self._model.save(path)
        else:
            save(loaded(given), path)
        return path

    @util.check_called_by("get_input_metadata")  # type: ignore[untyped-decorator]
    def get_input_metadata_impl(self) -> Any:
        """Names, types and shapes; an input that the passes fixed is still taken, and held to its value."""
        metadata = TensorMetadata()
        for spec in self.session.inputs:
            metadata.add(spec.name, getattr(DataType, name_of(spec.dtype).upper()), spec.shape)
        for entry in self.fixed.values():
            if entry.is_whole:
                metadata.add(entry.name, DataType.BOOL, entry.shape)
        return metadata

    @util.check_called_by("infer")  # type: ignore[untyped-decorator]
    def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Run once.

        Args:
            feed_dict: numpy arrays, or torch tensors, in which case the outputs are torch tensors too.

        Returns:
            Outputs by name. Those in bfloat16 and FP8, which numpy does not have, as float32.

        Raises:
            PolygraphyException: an input is not what the passes fixed it to, or onnxruntime fails.
        """
        as_torch = any(util.array.is_torch(array) for array in feed_dict.values())
        arrays: dict[str, Array] = {name: util.array.to_numpy(array) for name, array in feed_dict.items()}
        with errors_of_polygraphy():
            for name, entry in self.fixed.items():
                if name in arrays and (reason := entry.obstacle(arrays[name])):
                    raise Pi05cError(reason)
                if entry.is_whole:
                    arrays.pop(name, None)
            start = time.perf_counter()
            outputs = self.session.run(arrays)
            self.inference_time = time.perf_counter() - start
        numbers = {name: _in_numpy(array) for name, array in outputs.items()}
        return OrderedDict(
            (name, util.array.to_torch(array) if as_torch else array) for name, array in numbers.items()
        )

    @util.check_called_by("deactivate")  # type: ignore[untyped-decorator]
    def deactivate_impl(self) -> None:
        """Unload the graph and remove what was written."""
        self._files.close()
        del self.session, self.fixed, self._files


def _in_numpy(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.kind == "V" else array


__all__ = ["Pi05cRunner"]
