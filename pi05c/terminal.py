"""What reaches a terminal: text without the control characters that names of tensors, files and passes may hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_LAYOUT = "\n\t"
"""Control characters that only lay text out."""


def printable(text: str, *, layout: bool = True) -> str:
    """Text in which a space stands for each character that a terminal could obey.

    Args:
        layout: keep the ends of lines and tabs.
    """
    kept = _LAYOUT if layout else ""
    return "".join(character if character.isprintable() or character in kept else " " for character in text)


def screen(**options: Any) -> Console:
    """A `rich.console.Console` that prints no control characters but its own."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Screen(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(printable(segment.text), segment.style)

    return Screen(highlight=False, **options)
