"""Errors that a user can act on. Each is one sentence that names the thing and the remedy."""

from __future__ import annotations

import errno


class Pi05cError(Exception):
    """The input or the request is wrong. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class MachineError(Pi05cError):
    """The disk, the memory or a limit of this machine is in the way: nothing is said of what was given."""


class UsageError(Pi05cError):
    """An option or a combination of options does not make sense."""

    exit_code = 2


class VerificationError(Pi05cError):
    """A result was measured and departs from the reference by more than its limit."""

    exit_code = 3


class BuildError(Pi05cError):
    """The engine builder is missing or of a wrong version, failed, crashed or ran out of time."""

    exit_code = 4


_NAME_CHARACTERS = 200


def shortened(name: str) -> str:
    """A name for a message: quoted, and cut where it is beyond reading."""
    cut = name if len(name) <= _NAME_CHARACTERS else f"{name[:_NAME_CHARACTERS]}..."
    return repr(cut)


def is_of_machine(error: BaseException) -> bool:
    """Whether the machine is to blame for an error, and nothing that was given."""
    return isinstance(error, (MachineError, MemoryError, OSError))


def unwritable(error: OSError) -> str:
    """Why a file could not be written, as the end of a sentence: what is said, and what to do where that is known."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or write to another place"
    if error.errno == errno.EFBIG:
        return "a file may not become that large here; raise the limit (ulimit -f) or write to another place"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files are open; raise the limit (ulimit -n)"
    if "usable temporary directory" in str(error):
        return f"{unreadable(error)}; let TMPDIR name a folder where you may write"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{unreadable(error)}; choose a place where you may write"
    return unreadable(error)


def unreadable(error: OSError) -> str:
    """Why a file could not be read, as the end of a sentence."""
    return (error.strerror or str(error)).lower()
