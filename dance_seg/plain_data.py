"""YAML and JSON that hold plain data and nothing else: what recipes, run folders and classes.yaml are read by.

A file may be somebody else's. Aliases (which can expand without bound), tags (which can name Python objects), endless
nesting and keys given twice are refused. So are words that YAML reads as something else than they look like: `on` and
`no` are truth values to it, 010 is eight and 1:30 is ninety. 1e-3 is a number here, and CamVid's drive 0016E5 a name.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from dance_seg.errors import DataError, first_line

MAX_BYTES = 256 << 20  # no file of a run that is read whole is larger
MAX_DEPTH = 32  # of nesting; a recipe has 5 levels
MAX_DIGITS = 18  # of a whole number, so that it fits 64 bits

_UNCLEAR = "!unclear"  # the tag of what is read otherwise than it looks
# In this order: the first that fits says what a word is. A name such as 0016E5 is none of them.
_WORDS = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE"),
    (_UNCLEAR, r"(?i:on|off|yes|no)"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|"),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*)"),
    ("tag:yaml.org,2002:float", r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"),
    ("tag:yaml.org,2002:float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
    # Octal, hexadecimal and binary numbers, digits in groups, base 60: numbers to YAML or to some of its readers.
    (_UNCLEAR, r"[-+]?(?:0[0-9_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+|[0-9][0-9_]*_[0-9_]*|[0-9]+(?::[0-5]?[0-9])+)"),
    (_UNCLEAR, r"[-+]?(?:0[0-9]+\.[0-9.]*|[0-9]+(?::[0-5]?[0-9])+\.[0-9]*|[0-9][0-9_]*\.[0-9_]*_[0-9_]*)"),
)
_RESOLVERS = {None: [(tag, re.compile(f"(?:{words})\\Z")) for tag, words in _WORDS]}


class _Reader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS  # type: ignore[assignment]

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.path: list[str] = []  # the keys that lead to the node being read

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        is_key = isinstance(parent, yaml.MappingNode) and index is None
        if parent is not None and not is_key:
            self.path.append(f"[{index}]" if isinstance(index, int) else str(index.value)[:80])
        if getattr(event, "anchor", None) is not None:
            raise self.wrong(event, f"YAML aliases ({event.anchor[:80]}) are not allowed; write the value out")
        if getattr(event, "tag", None) is not None:
            raise self.wrong(event, f"YAML tags ({event.tag[:80]}) are not allowed; write plain values")
        if len(self.path) > MAX_DEPTH:
            raise self.wrong(event, f"nested too deeply; at most {MAX_DEPTH} levels are read")
        if is_key and not isinstance(event, yaml.ScalarEvent):
            raise self.wrong(event, "a key is a name, not a list or a mapping")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode):
            self.check_word(node, is_key)
        if isinstance(node, yaml.MappingNode):
            self.check_keys(node)
        if parent is not None and not is_key:
            self.path.pop()
        return node

    def check_word(self, node: yaml.ScalarNode, is_key: bool) -> None:
        word, kind = node.value[:80], node.tag.rpartition(":")[2]
        if node.tag == _UNCLEAR:
            other = "write true or false" if word.isalpha() and not is_key else "write decimal digits"
            other = f"{other}, or '{word}' where it is a name" if not (word.isalpha() and is_key) else f"write '{word}'"
            raise self.wrong(node, f"{word} means something else to YAML than it looks like; {other}")
        if kind == "int" and (digits := len(node.value.lstrip("+-"))) > MAX_DIGITS:
            raise self.wrong(node, f"a number of {digits} digits; at most {MAX_DIGITS} are read")
        if is_key and kind not in ("str", "int"):
            raise self.wrong(node, f"the key {word or 'without a name'} is no name to YAML; write '{word}' in quotes")

    def check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            named = (key.tag, int(key.value) if key.tag.endswith(":int") else key.value)
            if named in seen:
                raise self.wrong(key, f"the key {key.value[:80]} is given twice; keep one of them")
            seen.add(named)

    def wrong(self, place: Any, what: str) -> ValueError:
        key = ".".join(self.path).replace(".[", "[")[:200]
        return ValueError(f"{key + ', ' if key else ''}line {place.start_mark.line + 1}: {what}")


_Reader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Reader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(re.sub(r"\.([iInN])", r"\1", node.value)))


class _Writer(yaml.SafeDumper):
    """Puts in quotes what would not be read back as a name."""

    yaml_implicit_resolvers = _RESOLVERS  # type: ignore[assignment]

    def ignore_aliases(self, data: Any) -> bool:
        return True


def parse_yaml(text: str) -> Any:
    """The plain data of a YAML text: dicts with names or whole numbers as keys, lists, texts, numbers, truth, None.

    Raises ValueError, with the key and the line, for anything else.

    >>> parse_yaml("lr: 1e-3\\nhold_out: [0016E5, 0.1]\\nflip: true")
    {'lr': 0.001, 'hold_out': ['0016E5', 0.1], 'flip': True}
    >>> parse_yaml("seed: 010")
    Traceback (most recent call last):
    ValueError: seed, line 1: 010 means something else to YAML than it looks like; write decimal digits, or '010' \
where it is a name
    """
    try:
        reader = _Reader(text)
        try:
            return reader.get_single_data()
        finally:
            reader.dispose()  # type: ignore[no-untyped-call]
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())[:300]}") from None
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None


def write_yaml(value: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back as it was; keys stay in their order.

    >>> parse_yaml(write_yaml({"group": "1e-3", "tags": ["on", "010"]}))
    {'group': '1e-3', 'tags': ['on', '010']}
    """
    return yaml.dump(value, Dumper=_Writer, sort_keys=False)


def parse_json(text: str | bytes) -> Any:
    """The plain data of a JSON text, as bytes in UTF-8.

    Raises ValueError for anything else, also for what is nested without end.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: nested too deeply to be read
    """
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no file. Raises DataError, naming it, when it is damaged."""
    if not path.is_file():
        return {}
    if (size := path.stat().st_size) > MAX_BYTES:
        raise DataError(f"{path}: {size} bytes; a run writes no file of this kind above {MAX_BYTES}")
    try:
        record = parse_json(path.read_bytes())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a UTF-8 text ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({first_line(error)}); move it away to go on without it") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}: holds {type(record).__name__}, not an object; move it away to go on without it")
    return record
