"""A page is one file that loads nothing and runs nothing, whatever stands in the records."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from dance_seg.report.charts import Line, Mark, line_chart, scatter
from dance_seg.report.page import (
    Bar,
    Bars,
    Card,
    Cell,
    Chart,
    Details,
    Key,
    Legend,
    Lines,
    Page,
    Panel,
    Panels,
    Section,
    Stack,
    Table,
    change_text,
    figure_text,
    listed,
    picture,
    render,
    seconds_text,
)

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
URI = "data:image/png;base64,AAAA"


class Tags(HTMLParser):
    """Collects the tags of a page with their attributes, and checks that they are closed in order."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def everything(text: str) -> Page:
    """A page with every kind of block, this text wherever a text may stand."""
    key = Key(text, "series-0")
    blocks = (
        Chart(text, line_chart([Line([0, 1], [0, 1], text)], title=text, x_label=text, y_label=text), text, (key,)),
        Bars((Bar(text, 0.5, text),), text, text, columns=True),
        Table((text, text), ((Cell(text, text, "series-1"), Cell(text)),), text, text, wide=True),
        Panels((Panel(URI, text, text),), text, text, columns=1),
        Legend((key,)),
        Details(text, text),
        Lines((text,), text),
        Stack((Lines((text,)), Lines((text,)))),
    )
    return Page(text, text, (Card(text, text, text, text),), (Section(text, blocks, text),), text, text)


def test_text_from_files_stays_text():
    evil, tame = Tags(render(everything(EVIL))), Tags(render(everything("tame")))
    assert [tag for tag, _ in evil.found] == [tag for tag, _ in tame.found]
    assert [sorted(attributes) for _, attributes in evil.found] == [sorted(attributes) for _, attributes in tame.found]


def test_a_page_loads_nothing_and_runs_nothing():
    html = render(everything("text"))
    tags = Tags(html).found
    assert not {"script", "link", "iframe", "object", "form", "base"} & {tag for tag, _ in tags}
    assert all((attributes.get("src") or "data:").startswith("data:") for _, attributes in tags)
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on") or name == "href"]
    policy = next(a["content"] for tag, a in tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not re.search(r"https?://|@import|url\(", html)


def test_a_page_follows_light_and_dark_and_fits_a_phone():
    html = render(Page("title"))
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_a_bar_is_as_long_as_its_share():
    html = render(Page("t", sections=(Section("s", (Bars((Bar("a", 0.615, "61.5"),)),)),)))
    assert "width:61.50%" in html


@pytest.mark.parametrize(
    ("value", "text"),
    [(999.6, "1,000"), (99.95, "100.0"), (1e-5, "1e-05"), (-12.345, "-12.3"), (0.5, "0.5"), (5, "5.00")],
)
def test_figures_have_three_digits_that_matter(value, text):
    assert figure_text(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(119.99, "120 s"), (3599.4, "59 min 59 s"), (3599.7, "1 h 0 min")])
def test_times_are_said_as_people_say_them(seconds, text):
    assert seconds_text(seconds) == text


def test_a_change_is_a_percentage():
    assert [change_text(ratio) for ratio in (0.5, 2.0, 1.0, 0.985, 0.9996)] == [
        "−50 %",
        "+100 %",
        "±0 %",
        "−1.5 %",
        "±0 %",
    ]


def test_a_long_list_is_counted():
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcdefgh")) == "a, b, c, d, e, f and 2 more"


def test_a_drawing_of_its_own_is_well_formed_and_defines_the_classes_it_uses():
    drawing = scatter([Mark(1, 2, "a < b"), Mark(3, 4, "c", series=1)], title="t & t", x_label="x", y_label="y")
    root = ElementTree.fromstring(picture(drawing))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    style = root.find("{*}style").text
    used = {name for element in root.iter() for name in element.get("class", "").split()}
    assert "mark" in used
    assert all(f".{name}" in style for name in used)
    assert "a < b" in [element.text for element in root.iter()]
