"""The Python module of TensorRT or of TensorRT-RTX, with the shared libraries behind it."""

from __future__ import annotations

import importlib
from typing import Any

from pi05c.backend.targets import Flavour
from pi05c.graph.errors import Pi05cError
from pi05c.graph.requirements import refuse_unsupported


def load_library(flavour: Flavour) -> Any:
    """Import it.

    Raises:
        Pi05cError: it is not installed, of a version that is not supported, or its shared libraries do not load.
    """
    refuse_unsupported(flavour.extra)
    try:
        return importlib.import_module(flavour.module)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == flavour.module:
            reason = f"{flavour.product} is not installed: pip install '{flavour.extra}'"
        else:
            reason = (
                f"{flavour.product} is installed but does not load ({' '.join(str(error).split())}): install it again, "
                f"pip install --force-reinstall {flavour.value}"
            )
        raise Pi05cError(reason) from error


__all__ = ["load_library"]
