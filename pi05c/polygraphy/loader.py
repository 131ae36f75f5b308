"""Passes as a loader that composes with those of `polygraphy.backend.onnx`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import onnx
from polygraphy import util
from polygraphy.backend.base import BaseLoader
from polygraphy.logger import G_LOGGER

from pi05c.graph.check import load_valid
from pi05c.graph.io import Model, model_from_proto, save, to_whole_proto
from pi05c.graph.requirements import refuse_unsupported
from pi05c.graph.wellformed import refuse_malformed, refuse_misused_operators
from pi05c.passrun import RunOptions, run_passes
from pi05c.polygraphy.reporting import LoggedProgress, errors_of_polygraphy

OnnxModel: TypeAlias = "onnx.ModelProto | str | PathLike[str]"
"""A model in memory with its weights, or the path of one."""


class ApplyPasses(BaseLoader):  # type: ignore[misc]
    """Functor that rewrites an ONNX model by passes."""

    def __init__(
        self,
        model: OnnxModel | Callable[[], OnnxModel],
        passes: str | None = None,
        *,
        plugins: Sequence[str] | None = None,
        calibration: Sequence[str] | None = None,
        rewrite_limit: Sequence[str] | None = None,
        stop_after: str | None = None,
        path: str | PathLike[str] | None = None,
    ) -> None:
        """Make a loader; nothing is read before it is called.

        Args:
            model: the model, its path, or a callable that returns either. It stays as it is.
            passes: pipeline text, such as `fuse_denoise_loop,pin_fp32`. Defaults to `default`.
            plugins: Python files and entry points that bring further passes.
            calibration: .npz files of samples, folders of them, or `synthetic` alone. Defaults to the samples beside
                the model.
            rewrite_limit: `NAME=N`, or `N` for every pass: after how many rewrites it is stopped.
            stop_after: the last pass to run, by name or as `03-name`.
            path: the file that a model in memory was made of; samples beside it serve where none are named.
        """
        self._model = model
        self.passes = passes
        self.calibration = tuple(calibration or ())
        self.options = RunOptions(
            plugins=tuple(plugins or ()), rewrite_limit=tuple(rewrite_limit or ()), stop_after=stop_after
        )
        self.path = path

    @util.check_called_by("__call__")  # type: ignore[untyped-decorator]
    def call_impl(self) -> onnx.ModelProto:
        """Run the passes.

        Returns:
            onnx.ModelProto: the rewritten model with its weights, in memory: for a large one, use `save`.

        Raises:
            PolygraphyException: the model cannot be read, or a pass cannot run.
        """
        with errors_of_polygraphy():
            return to_whole_proto(self._rewritten())

    def save(self, path: str | PathLike[str]) -> None:
        """Run the passes and write the result, with its weights in a file beside it. They are never all in memory.

        Raises:
            PolygraphyException: as for a call; or the file cannot be written.
        """
        with errors_of_polygraphy():
            save(self._rewritten(), Path(path))

    def _rewritten(self) -> Model:
        run = run_passes(
            loaded(self._model, self.path),
            self.passes,
            self.options,
            calibration=self.calibration,
            progress=LoggedProgress(),
        )
        for result in run.results:
            G_LOGGER.info(
                f"pi05c: {result.step.text}: {len(result.rewrites)} rewrites, {len(result.skips)} skipped, "
                f"{result.nodes_after} nodes"
            )
            for skip in result.skips:
                G_LOGGER.verbose(f"pi05c: {result.step.spec.name} skipped {skip.where}: {skip.reason}")
        return run.model


def loaded(model: OnnxModel | Callable[[], OnnxModel], path: str | PathLike[str] | None = None) -> Model:
    """Make an editable model of what a loader takes.

    Raises:
        Pi05cError: it cannot be read, or a package that pi05c needs is of a version that is not supported.
    """
    refuse_unsupported()
    given, _ = util.invoke_if_callable(model)
    if not isinstance(given, onnx.ModelProto):
        return load_valid(given)
    proto = onnx.ModelProto()
    proto.CopyFrom(given)
    refuse_malformed(proto)
    refuse_misused_operators(proto)
    made = model_from_proto(proto)
    made.path = None if path is None else Path(path)
    return made


__all__ = ["ApplyPasses", "OnnxModel", "loaded"]
