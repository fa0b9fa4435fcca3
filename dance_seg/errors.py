"""Errors that a person can act on; the tools print them in one line, without a traceback."""


class DataError(ValueError):
    """A file or a label that cannot be used; the message starts with its path."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message starts with its path."""
