"""A choice that a recipe names: which entry of a literal table to call, and with what arguments."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """The name of a table's entry and the keyword arguments to call it with."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)


def build_part(table: Mapping[str, Callable[..., T]], part: Part, *, at: str, **given: Any) -> T:
    """Call the entry of the table that the recipe names, with the arguments the recipe gives.

    Raises ValueError when the name is not in the table or the arguments do not fit its signature.

    >>> build_part({"power": lambda base, exponent: base**exponent}, Part("power", {"base": 2}), at="x", exponent=3)
    8
    """
    if part.name not in table:
        raise ValueError(f"{at}.name is {part.name!r}; choose one of {', '.join(sorted(table))}")
    make = table[part.name]
    signature = inspect.signature(make)
    taken = sorted(set(given) & set(part.args))
    if taken:
        raise ValueError(f"{at}.args.{taken[0]} is set by the program; take it out of the recipe")
    known = [name for name in signature.parameters if name not in given]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    for key in part.args:
        if key not in known and not takes_any:
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{at}.args.{key}: {part.name} takes no {key!r}; {hint}It takes: {', '.join(known)}")
    try:
        signature.bind(**part.args, **given)
    except TypeError as error:
        raise ValueError(f"{at}.args do not fit {part.name}{signature}: {error}") from None
    return make(**part.args, **given)
