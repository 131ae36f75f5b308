"""What pi05c has to say, said by Polygraphy's logger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from polygraphy.logger import G_LOGGER

from pi05c.graph.errors import Pi05cError
from pi05c.progress import Progress


class LoggedProgress(Progress):
    """Warnings and notes by Polygraphy's logger."""

    def warn(self, sentence: str) -> None:
        super().warn(sentence)
        G_LOGGER.warning(f"pi05c: {sentence}")

    def note(self, sentence: str) -> None:
        G_LOGGER.info(f"pi05c: {sentence}")


@contextmanager
def errors_of_polygraphy() -> Iterator[None]:
    """Turn pi05c's errors into Polygraphy's, which its tools print as one sentence.

    Raises:
        PolygraphyException: instead of each `Pi05cError`.
    """
    try:
        yield
    except Pi05cError as error:
        G_LOGGER.critical(f"pi05c: {error}")


__all__ = ["LoggedProgress", "errors_of_polygraphy"]
