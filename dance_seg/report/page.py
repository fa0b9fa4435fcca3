"""One self-contained HTML page out of plain records: cards, charts, bars, tables, pictures.

The records hold values and texts; page.html.jinja decides how they look and escapes them. The page loads nothing and
runs nothing: its content security policy forbids both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE, STYLE = "page.html.jinja", "page.css.jinja"


@dataclass(frozen=True)
class Card:
    """A figure that is seen first."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Key:
    """One entry of a legend: the style class of its swatch, or a colour of its own."""

    name: str
    style: str = ""
    color: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing with its heading and legend."""

    kind: ClassVar[str] = "chart"
    title: str
    svg: Markup
    note: str = ""
    keys: tuple[Key, ...] = ()
    wide: bool = False  # over the whole page


@dataclass(frozen=True)
class Bar:
    """A horizontal bar: a share of the full width in [0, 1] and what is written beside it."""

    name: str
    share: float
    text: str
    style: str = "shade-5"


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, in columns where there is room."""

    kind: ClassVar[str] = "bars"
    bars: tuple[Bar, ...]
    title: str = ""
    note: str = ""
    columns: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a table; the note is set smaller below, the swatch is a style class."""

    text: str
    note: str = ""
    swatch: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first column is text, the others are figures unless `figures` is off."""

    kind: ClassVar[str] = "table"
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    note: str = ""
    figures: bool = True
    wide: bool = False  # over the whole page


@dataclass(frozen=True)
class Panel:
    """One picture: a data URI, a heading above it and a line below it."""

    uri: str
    title: str
    note: str = ""


@dataclass(frozen=True)
class Panels:
    """Pictures side by side, with a title for the row; small ones in the width of a chart."""

    kind: ClassVar[str] = "panels"
    panels: tuple[Panel, ...]
    title: str = ""
    note: str = ""
    small: bool = False
    columns: int = 0  # pictures in a row; 0: all of them


@dataclass(frozen=True)
class Legend:
    """Names of colours, for several drawings or pictures."""

    kind: ClassVar[str] = "legend"
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Details:
    """A long text that is folded away."""

    kind: ClassVar[str] = "details"
    summary: str
    text: str


@dataclass(frozen=True)
class Lines:
    """Sentences, one below the other."""

    kind: ClassVar[str] = "lines"
    lines: tuple[str, ...]
    title: str = ""


@dataclass(frozen=True)
class Stack:
    """Blocks one below the other, in the width of one."""

    kind: ClassVar[str] = "stack"
    blocks: tuple["Block", ...]


Block = Chart | Bars | Table | Panels | Legend | Details | Lines | Stack


@dataclass(frozen=True)
class Section:
    """A part of the page; with nothing in it the note says why."""

    title: str
    blocks: tuple[Block, ...] = ()
    note: str = ""
    narrow: bool = False  # more blocks beside one another


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    subtitle: str = ""
    cards: tuple[Card, ...] = ()
    sections: tuple[Section, ...] = ()
    warning: str = ""
    footer: str = ""


def render(page: Page) -> str:
    """The page as HTML."""
    return _template(TEMPLATE).render(page=page)


def picture(drawing: Markup) -> str:
    """A drawing as an SVG file of its own, which brings the pages' style along."""
    head, parts = str(drawing).split(">", 1)
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"')
    ground = '<rect width="100%" height="100%" fill="var(--surface)"/>'
    return f"{head}><style>{_template(STYLE).render()}</style>{ground}{parts}\n"


def _template(name: str) -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def figure_text(value: float, digits: int = 3) -> str:
    """A figure with at least so many digits that matter, and thousands set apart.

    >>> figure_text(1234.56), figure_text(12.3456), figure_text(0.061234), figure_text(0), figure_text(37_122_048)
    ('1,235', '12.3', '0.0612', '0', '37,122,048')
    """
    if value == 0:
        return "0"
    whole_digits = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if whole_digits >= digits:
        return f"{value:,.0f}"
    if whole_digits:
        return f"{value:,.{digits - whole_digits}f}"
    text = f"{value:.{digits}g}"
    return f"{value:.{digits + 2}f}" if "e" in text and abs(value) >= 1e-4 else text


def count_text(value: float) -> str:
    """A large count in thousands, millions or billions.

    >>> count_text(950), count_text(13_050_000), count_text(2.1e9), count_text(37_122)
    ('950', '13.1 M', '2.10 G', '37.1 k')
    """
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{figure_text(value / (1e3 if unit == 'k' else factor))} {unit}"
    return figure_text(value, 4) if value != int(value) else f"{int(value):,}"


def seconds_text(seconds: float) -> str:
    """A time as people say it.

    >>> seconds_text(4.2), seconds_text(88.13), seconds_text(312), seconds_text(7500), seconds_text(260_000)
    ('4.20 s', '88.1 s', '5 min 12 s', '2 h 5 min', '3 d 0 h')
    """
    if seconds < 120:
        return f"{figure_text(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def change_text(ratio: float) -> str:
    """A ratio as a change in percent.

    >>> change_text(0.61), change_text(1.25), change_text(1.0004)
    ('−39 %', '+25 %', '±0 %')
    """
    percent = 100 * (ratio - 1)
    digits = 0 if abs(percent) >= 2 else 1
    if round(abs(percent), digits) == 0:
        return "±0 %"
    return f"{'+' if percent > 0 else '−'}{abs(percent):.{digits}f} %"


def bytes_text(count: float) -> str:
    """A number of bytes as people say it.

    >>> bytes_text(512), bytes_text(123_456_789), bytes_text(2_500_000_000)
    ('512 B', '123 MB', '2.50 GB')
    """
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{figure_text(count / factor)} {unit}"
    return f"{count:.0f} B"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a row, the rest counted.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
