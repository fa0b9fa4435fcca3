"""Errors that a person can act on; the tools print them in one line, without a traceback."""


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
