"""Errors that a person can act on; the tools print them in one line, without a traceback."""

import reprlib


class DataError(ValueError):
    """A file or a label that cannot be used; the message starts with its path."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message starts with its path."""


class NotFiniteError(ValueError):
    """Training that would go on with NaN or infinity; the message says where it was found."""


class LostRankError(OSError):
    """Another process of the run has ended or stands still; the message names it, and where it was."""

    status = 69  # EX_UNAVAILABLE of sysexits.h: not the fault of recipe or data; the same command goes on


class RecipeError(ValueError):
    """A recipe that cannot be used; the message starts with where it stands, and names the key."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def short(value: object) -> str:
    """A value in a message, cut off where it is long: a file of a few lines can hold what prints as gigabytes.

    >>> short([1, "two"]), len(short("x" * 1000))
    ("[1, 'two']", 100)
    """
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return f"a number of {value.bit_length() if isinstance(value, int) else 'many'} bits"


def cut_off(name: object) -> str:
    """A name in a message as it is, but no more of it than a person reads."""
    return str(name)[:100]


def first_line(error: BaseException) -> str:
    """What an error of a library says in one line, cut off where it is long."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:500]
