"""Changes to valid files: bits, numbers, words and pieces of others.

Chance is hypothesis in the tests, where what fails is made shorter, and a generator of numbers in bulk, where drawing
would otherwise take longer than reading.
"""

import random
import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

from tools.fuzz.target import Target

T = TypeVar("T")

COUNTS = (1, 1, 1, 1, 2, 2, 3, 5)  # of changes; most files with many are refused at the first
MOST = 1 << 17  # bytes of an input
NUMBERS = (
    *(b"0", b"-1", b"1", b"255", b"256", b"65536", b"2147483648", b"1e999", b"NaN", b"1e-3", b"0.5", b"true", b"null"),
    *(b'"x"', b"[]", b"{}", b"99999999999999999999", b"9" * 5000, b"1000000000", b"-Infinity"),
)
WHOLE = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 10**9, 10**12, (1 << 63) - 1)
_DIGITS = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


class Chance(Protocol):
    """What decides."""

    def one_of(self, things: Sequence[T]) -> T:
        """One of several things."""
        ...

    def whole(self, least: int, most: int) -> int:
        """A whole number, both ends included."""
        ...


class Generated:
    """Chance from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one_of(self, things: Sequence[T]) -> T:
        """One of several things."""
        return self.random.choice(things)

    def whole(self, least: int, most: int) -> int:
        """A whole number, both ends included."""
        return self.random.randint(least, most)


def changed_file(chance: Chance, target: Target) -> bytes:
    """A valid file with one to five changes, in half of all cases with its checksums put right.

    >>> target = Target([b"one", b"two"], check=lambda data: None)
    >>> changed_file(Generated(0), target) == changed_file(Generated(0), target)
    True
    """
    data = chance.one_of(target.seeds)
    for _ in range(chance.one_of(COUNTS)):
        data = chance.one_of(CHANGES)(chance, data, target)[:MOST]
    if target.repair is not None and chance.whole(0, 1):
        data = target.repair(data)[:MOST]
    return data


def _at(chance: Chance, data: bytes) -> int:
    return chance.whole(0, max(0, len(data) - 1))


def flip_a_bit(chance: Chance, data: bytes, target: Target) -> bytes:
    """One bit is the other."""
    at, bit = _at(chance, data), chance.whole(0, 7)
    return data[:at] + bytes(value ^ 1 << bit for value in data[at : at + 1]) + data[at + 1 :]


def write_bytes(chance: Chance, data: bytes, target: Target) -> bytes:
    """A few bytes are others."""
    at, new = _at(chance, data), bytes(chance.whole(0, 255) for _ in range(chance.whole(1, 8)))
    return data[:at] + new + data[at + len(new) :]


def write_a_number(chance: Chance, data: bytes, target: Target) -> bytes:
    """One to eight bytes are a number that programs stumble over."""
    at, size = _at(chance, data), chance.one_of((1, 2, 4, 8))
    number, ends = chance.one_of(WHOLE) & ((1 << 8 * size) - 1), chance.whole(0, 1)
    return data[:at] + number.to_bytes(size, "big" if ends else "little") + data[at + size :]


def replace_digits(chance: Chance, data: bytes, target: Target) -> bytes:
    """A number that is written in digits is another, or none."""
    found = list(_DIGITS.finditer(data))
    if not found:
        return write_a_number(chance, data, target)
    place = chance.one_of(found)
    return data[: place.start()] + chance.one_of(NUMBERS) + data[place.end() :]


def insert_a_word(chance: Chance, data: bytes, target: Target) -> bytes:
    """A word of the format stands where none belongs, or in place of what stood there."""
    if not target.words:
        return write_bytes(chance, data, target)
    at, word = _at(chance, data), chance.one_of(target.words)
    return data[:at] + word + data[at + chance.one_of((0, len(word))) :]


def replace_a_line(chance: Chance, data: bytes, target: Target) -> bytes:
    """A line is a word of the format, or that of another place."""
    lines = data.split(b"\n")
    lines[chance.whole(0, len(lines) - 1)] = chance.one_of((*target.words, *lines[:20]))
    return b"\n".join(lines)


def cut_out(chance: Chance, data: bytes, target: Target) -> bytes:
    """A piece is missing."""
    at, count = _at(chance, data), chance.whole(1, 1 + len(data) // 2)
    return data[:at] + data[at + count :]


def repeat(chance: Chance, data: bytes, target: Target) -> bytes:
    """A piece stands there twice or more often."""
    at, count = _at(chance, data), chance.whole(1, 64)
    return data[:at] + data[at : at + count] * chance.one_of((2, 3, 300)) + data[at + count :]


def cut_off(chance: Chance, data: bytes, target: Target) -> bytes:
    """The file ends early."""
    return data[: _at(chance, data)]


def join_another(chance: Chance, data: bytes, target: Target) -> bytes:
    """From somewhere on it is another valid file."""
    other = chance.one_of(target.seeds)
    return data[: _at(chance, data)] + other[_at(chance, other) :]


CHANGES = (
    flip_a_bit, write_bytes, write_a_number, replace_digits, insert_a_word, replace_a_line, cut_out, repeat, cut_off,
    join_another,
)  # fmt: skip
