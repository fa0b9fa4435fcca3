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
    parameters, takes_any = accepted(make)
    taken = sorted(set(given) & set(part.args))
    if taken:
        raise ValueError(f"{at}.args.{taken[0]} is set by the program; take it out of the recipe")
    known = [name for name in parameters if name not in given]
    for key in part.args:
        if key not in known and not takes_any:
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{at}.args.{key}: {part.name} takes no {key!r}; {hint}It takes: {', '.join(known)}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in part.args and key not in given:
            raise ValueError(f"{at}.args.{key} is missing: {part.name} needs it")
    return make(**part.args, **given)


def accepted(make: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters a callable takes by keyword, and whether it takes any other.

    A class that passes **keywords on to its base takes the base's too.

    >>> list(accepted(Part)[0])
    ['name', 'args']
    """
    found: dict[str, inspect.Parameter] = {}
    steps = [vars(c)["__init__"] for c in make.__mro__ if "__init__" in vars(c)] if isinstance(make, type) else [make]
    for step in steps:
        parameters = inspect.signature(step).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
        found = {**found, **{p.name: p for p in named if p.name not in found}}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found, False
    return found, True
