"""How every session of onnxruntime starts, whichever version is installed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from pi05c.graph.errors import MachineError, Pi05cError

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"

_NO_MEMORY = ("bad_alloc", "Failed to allocate memory")
"""What is in the messages of onnxruntime where memory ran out."""

_LAYOUT_FROM = "1.30"
"""From 1.23 to 1.29 onnxruntime aborts the process in its layout optimizations where constant folding is off and a weight
is cast in front of a MatMul (an assertion of std::vector on `NodeArg*`, behind CastFloat16Transformer)."""


_TRANSPOSE_FROM = "1.31"
"""Before, fusing a Transpose into a MatMul removes a Cast between them whose result is an output of the graph too."""


def open_session(model: bytes | str, options: Any, disabled: Iterable[str]) -> Any:
    """A session on the CPU.

    Args:
        model: its bytes, or its path.
        options: as `session_options` gives them, with more chosen.
        disabled: optimizers that are not to run.

    Raises:
        Exception: of a class of onnxruntime's own for each status code. It is not tried again with all optimizers, as
            onnxruntime does by itself, and says so on the standard output.
    """
    import onnxruntime

    broken = [] if _is(_TRANSPOSE_FROM) else ["MatmulTransposeFusion"]
    return onnxruntime.InferenceSession(
        model,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=[*disabled, *broken],
        enable_fallback=0,
    )


def session_options() -> Any:
    """Options that choose the optimizations which this version survives, and nothing else."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not _is(_LAYOUT_FROM):
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return options


def read_weights_from(options: Any, folder: Path) -> None:
    """Let a session find the files that its model names in `folder`.

    Raises:
        Pi05cError: onnxruntime cannot be told the folder's name.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise Pi05cError(
            f"onnxruntime cannot read from {folder}, whose name is no UTF-8: rename it, or go there by a link"
        ) from error
    options.add_session_config_entry(_DATA_FOLDER, str(folder))


def error_kind(error: Exception) -> type[Pi05cError]:
    """What to raise for an error of onnxruntime: the machine's where memory ran out."""
    return MachineError if any(words in str(error) for words in _NO_MEMORY) else Pi05cError


@cache
def _is(version: str) -> bool:
    """Whether onnxruntime is of a version or newer."""
    import onnxruntime
    from packaging.version import Version

    return Version(onnxruntime.__version__) >= Version(version)


__all__ = ["error_kind", "open_session", "read_weights_from", "session_options"]
