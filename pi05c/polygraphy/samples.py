"""Samples for Polygraphy: a data loader, and the script that `--data-loader-script` takes."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from pi05c.fitting import fitting
from pi05c.graph.errors import Pi05cError
from pi05c.graph.files import write_text
from pi05c.graph.io import load
from pi05c.graph.specialization import fixed_inputs
from pi05c.polygraphy.reporting import errors_of_polygraphy
from pi05c.samples import WAYS_TO_GIVE_SAMPLES, Samples, find_samples, split

_SCRIPT = '''\
#!/usr/bin/env python3
"""Samples for Polygraphy: `--data-loader-script`."""

from pi05c.polygraphy import load_samples


def load_data():
    return load_samples({arguments})
'''


def load_samples(
    model: str | PathLike[str], calibration: Sequence[str | PathLike[str]] = (), *, everything: bool = False
) -> Samples:
    """The samples that `pi05c verify` would compare on, as a sequence of feed dicts for Polygraphy.

    Args:
        model: path of the model.
        calibration: .npz files of samples, folders of them, or `synthetic` alone; empty for those beside the model.
        everything: take the samples that ranges are measured on too, not just those held back.

    Raises:
        PolygraphyException: there are none, or they do not fit the model.
    """
    with errors_of_polygraphy():
        return found_samples(Path(model), [Path(item) for item in calibration], everything=everything)


def found_samples(model: Path, calibration: Sequence[str | Path], *, everything: bool) -> Samples:
    """As `load_samples`.

    Raises:
        Pi05cError: as `load_samples`.
    """
    loaded = load(model)
    found = find_samples(loaded, calibration)
    if found is None:
        raise Pi05cError(f"there are no samples for {model}: {WAYS_TO_GIVE_SAMPLES}")
    found = fitting(found, fixed_inputs(loaded.metadata))
    return found if everything else split(found)[1] or found


def write_data_loader(
    script: Path, model: Path, calibration: Sequence[str | Path] = (), *, everything: bool = False
) -> Samples:
    """Write a script that defines `load_data`, for `--data-loader-script` of Polygraphy's tools.

    Args:
        script: the file to write; Polygraphy wants its name to end in `.py`.

    Returns:
        The samples that the script loads.

    Raises:
        Pi05cError: as `load_samples`; or the script cannot be written.
    """
    if script.suffix != ".py":
        raise Pi05cError(f"{script} must end in .py: Polygraphy imports it")
    samples = found_samples(model, calibration, everything=everything)
    paths = [str(Path(item).absolute()) if Path(item).exists() else str(item) for item in calibration]
    arguments = [repr(str(model.absolute())), *([repr(paths)] if paths else [])]
    arguments += ["everything=True"] if everything else []
    text = _SCRIPT.format(arguments=", ".join(arguments))
    write_text(script, text)
    return samples


__all__ = ["found_samples", "load_samples", "write_data_loader"]
