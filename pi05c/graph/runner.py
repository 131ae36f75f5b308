"""What the pipeline needs from a backend in order to compare numbers, so that passes never import a backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]
"""Any numpy array, `ml_dtypes` element types included."""


class Runner(Protocol):
    """A loaded graph that turns named inputs into named outputs."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. `inputs` and the result map tensor names to arrays of the shapes and dtypes of the graph."""
        ...


class LoadRunner(Protocol):
    """Loads the model at `path` (its external data lies beside it) for repeated runs."""

    def __call__(self, path: Path) -> Runner: ...


__all__ = ["Array", "LoadRunner", "Runner"]
