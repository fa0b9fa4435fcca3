"""What a reader is tried on, and how what it made of an input is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dance_seg.errors import CheckpointError, DataError, RecipeError

REFUSALS = (DataError, CheckpointError, RecipeError)
MAX_MESSAGE = 4000  # characters; a message is for a person

SECRET = "sk-0123456789-must-never-be-seen"
"""The value of an environment variable while readers are tried; no message and no result may hold it."""


class Wrong(Exception):
    """An input was read, and what came out is not what it says."""


@dataclass(frozen=True)
class Target:
    """A reader in its surroundings. `check` reads an input; it raises Wrong, or whatever the reader raises."""

    seeds: Sequence[bytes]
    check: Callable[[bytes], None]
    words: Sequence[bytes] = ()  # that mean something in the format
    repair: Callable[[bytes], bytes] | None = None  # puts checksums right, so that what lies behind them is reached


def judge(check: Callable[[bytes], None], data: bytes) -> str:
    """What is wrong with how an input was taken: "wrong: ..." or "crash: ..."; empty when it was read or refused."""
    try:
        check(data)
    except Wrong as error:
        return f"wrong: {error}"
    except REFUSALS as error:
        said = str(error)
        if len(said) > MAX_MESSAGE:
            return f"wrong: a message of {len(said)} characters: {said[:200]}"
        if SECRET in said:
            return f"wrong: a message holds a value of the environment: {said[:200]}"
    except Exception as error:
        return f"crash: {type(error).__module__}.{type(error).__name__}: {str(error)[:300]}"
    return ""
