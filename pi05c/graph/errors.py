"""Errors that a user can act on. Each is one sentence that names the thing and the remedy."""

from __future__ import annotations


class Pi05cError(Exception):
    """The input or the request is wrong. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(Pi05cError):
    """An option or a combination of options does not make sense."""

    exit_code = 2


class VerificationError(Pi05cError):
    """A result was measured and departs from the reference by more than its limit."""

    exit_code = 3


class BuildError(Pi05cError):
    """The engine builder failed, crashed or ran out of time."""

    exit_code = 4
