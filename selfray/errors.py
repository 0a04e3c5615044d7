"""Errors that are the user's to mend, and the interruption that is the user's to make."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Something from outside is wrong: where, what was found, what is allowed, what to do.

    The command line prints the message as one line and exits with 2. The message must hold
    nothing that identifies a patient: name rows by position, files by their path below the
    folder that the user gave.
    """


class BadImage(InputError):
    """One image file cannot be used; the run records it and goes on."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived and the state has been saved; the command line exits with 130."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A closing sentence that names the likeliest intended value, and the allowed ones.

    Args:
        name: What was found.
        allowed: Every valid value.
    """
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    suggestion = f"Did you mean {close[0]!r}? " if close else ""
    return f"{suggestion}Allowed: {', '.join(allowed)}."


def one_line(cause: Exception) -> str:
    """What a library says of its error, in one line of at most 300 characters, without full stop.

    Args:
        cause: Of a library whose messages hold no patient's identifier.
    """
    return " ".join(str(cause).split()).rstrip(".")[:300]


class RunStopped(Exception):
    """A run cannot go on, and what it learned is saved; the command line exits with 1, one line."""
