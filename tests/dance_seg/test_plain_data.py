"""YAML is read as plain data or refused by key and line; what is written comes back as it was."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_seg import plain_data
from dance_seg.plain_data import parse_yaml, write_yaml

WORDS = [
    "on",
    "No",
    "010",
    "0x1F",
    "1_000",
    "1:30",
    "1e-3",
    "0016E5",
    "~",
    "",
    "null",
    ".nan",
    "<<",
    "=",
    "*a",
    "&a",
    "!a",
]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.floats(allow_nan=False) | st.sampled_from(WORDS)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text("ab. "), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(PLAIN)
def test_plain_data_comes_back_as_it_was(value):
    assert parse_yaml(write_yaml(value)) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {b: !!python/object/apply:os.system [id]}", "a.b, line 1: YAML tags"),
        ("a: !!str 3", "YAML tags"),
        ("a: &x [1]\nb: *x", "a, line 1: YAML aliases"),
        ("- [*x]", r"\[0\]\[0\], line 1: YAML aliases"),
        ("a: 1\nb: {c: 1, c: 2}", "b, line 2: the key c is given twice"),
        ("1: a\n+1: b", "given twice"),
        ("? [a]\n: 1", "a key is a name"),
        ("true: 1", "write 'true' in quotes"),
        ("off: 1", "write 'off'"),
        ("a: " + "9" * 5000, "5000 digits"),
        ("a: 0o17", "write decimal digits"),
        ("[" * 100000, "nested too deeply"),
        ("a: {" * 40, "nested too deeply"),
        ("a: \x07", "not valid YAML"),
        ("%TAG ! tag:" + "x" * 10000 + "\n--- !a b", "YAML tags"),
        ("--- a\n--- b", "not valid YAML"),
    ],
)
def test_all_else_is_refused_shortly(text, said):
    with pytest.raises(ValueError, match=said) as raised:
        parse_yaml(text)
    assert len(str(raised.value)) < 500


def test_pyyaml_alone_would_have_taken_them(monkeypatch):
    """What stands here would be read as something else, or grow without end, if the reader did not look."""
    monkeypatch.setattr(plain_data, "_Reader", yaml.SafeLoader)
    assert parse_yaml("a: 010\nb: on\nc: 1:30\nd: 1e-3") == {"a": 8, "b": True, "c": 90, "d": "1e-3"}
    assert parse_yaml("a: 1\na: 2") == {"a": 2}
    bomb = "".join(
        f"{c}: &{c} [{'lol' if c == 'a' else f'*{p}, *{p}'}]\n" for p, c in zip("0abcdefg", "abcdefgh", strict=True)
    )
    assert str(parse_yaml(bomb)).count("lol") == 255
