"""Whether what is installed is what pi05c was made for; the bounds are those that its own package states."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

from pi05c.graph.errors import Pi05cError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

BASE = "pi05c"
"""The package without extras."""

WITH_TORCH = "pi05c[torch]"
"""With PyTorch, which several commands need."""


def unsupported(wanted: str = BASE) -> str | None:
    """Which installed packages are too old or too new, with the command that mends it; None where all will do.

    Packages that are not installed are for the command that imports them to name.

    Args:
        wanted: `pi05c`, or with extras as pip takes them: `pi05c[torch]`.
    """
    wrong = [
        (requirement, version)
        for requirement, version in _installed(wanted)
        if not _fits(requirement, version)
    ]
    if not wrong:
        return None
    found = " and ".join(f"{requirement.name} {version}" for requirement, version in wrong)
    needed = [f"{requirement.name}{requirement.specifier}" for requirement, _ in wrong]
    return (
        f"{found} {'is' if len(wrong) == 1 else 'are'} installed, but pi05c needs {' and '.join(needed)}: pip install "
        + " ".join(f"'{text}'" for text in needed)
    )


def refuse_unsupported(wanted: str = BASE) -> None:
    """As `unsupported`.

    Raises:
        Pi05cError: with what it says.
    """
    if reason := unsupported(wanted):
        raise Pi05cError(reason)


def _installed(wanted: str) -> Iterator[tuple[Requirement, str]]:
    """What pi05c requires, with the version that is installed."""
    from packaging.requirements import Requirement

    try:
        stated = metadata.requires(BASE) or ()
    except metadata.PackageNotFoundError:  # a tree on PYTHONPATH
        return
    extras = Requirement(wanted).extras or {""}
    for requirement in map(Requirement, stated):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            try:
                yield requirement, metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                continue


def _fits(requirement: Requirement, version: str) -> bool:
    """Builds by NVIDIA state a coming version, such as 2.11.0a0+git, for what is that version."""
    from packaging.version import InvalidVersion, Version

    try:
        return requirement.specifier.contains(Version(version).base_version)
    except InvalidVersion:
        return True


__all__ = ["WITH_TORCH", "refuse_unsupported", "unsupported"]
