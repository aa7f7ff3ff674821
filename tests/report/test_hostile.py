"""Whatever a run, a config or a model's answer is called: on a page it is text, and nothing that a browser obeys."""

import json
import string
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.evaluate.tournament.figures import plain, pyplot
from qlora_jax.report.page import page
from qlora_jax.report.parts import Figure, Section, Table
from tests.report.test_report import Tags

PIECES = (
    "</script>", "<script>alert(1)</script>", "<!--", "-->", "<![CDATA[", "]]>", "<img src=x onerror=alert(1)>",
    "javascript:alert(1)", '" onmouseover="alert(1)', "' autofocus onfocus='alert(1)", "&lt;", "&#x3c;script>",
    "</title>", "</style>", "<svg/onload=alert(1)>", "\\u003c", "\x00", "\x1b[31m", "\u2028", "\u202e", "<", ">", "&",
    '"', "'", "`", "${1}", "{{1}}", "𝕏", "=cmd()", "\n",
)  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(string.printable, max_size=4)), min_size=1, max_size=4).map(
    "".join
)
TAGS = {
    "html", "head", "meta", "link", "title", "style", "body", "nav", "b", "ul", "li", "a", "main", "header", "h1",
    "p", "div", "i", "section", "h2", "figure", "img", "figcaption", "details", "summary", "table", "thead", "tbody",
    "tr", "th", "td", "noscript", "input", "select", "button", "span", "script",
}  # fmt: skip
OWN = {  # attributes that may hold something of a stranger's, always quoted
    "alt", "id", "href", "data-section", "class", "style",
}  # fmt: skip


def as_parsed(text: str) -> str:
    """What HTML makes of a text: NUL is no character of it, and all ends of lines are one."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@settings(max_examples=50)
@given(texts=st.lists(TEXTS, min_size=12, max_size=12))
def test_no_text_becomes_a_tag(tmp_path_factory, texts):
    folder = tmp_path_factory.getbasetemp() / "figures"
    folder.mkdir(exist_ok=True)
    (folder / "f.svg").write_text("<svg/>")
    title, line, above, item, name, head, cell, note, caption, anchor, error, key = texts
    sections = [
        Section(
            name,
            anchor,
            [line, (above, [item])],
            [Figure("f", name, caption), Table("t", note, [head], [[cell]], note)],
        )
    ]
    runs = {"columns": [{"key": key}], "rows": [[error]], "details": [{"error": error, "config": {key: cell}}]}
    text = page(title, [head], {"done": 3, cell: 1}, sections, runs, folder, 30)
    parsed = Tags(text)
    assert {tag for tag, _ in parsed.tags} <= TAGS
    assert [tag for tag, _ in parsed.tags if tag == "script"] == ["script", "script"]
    assert json.loads(parsed.scripts[0]) == runs
    plain_page = Tags(
        page(
            "t",
            ["h"],
            {"done": 3, "c": 1},
            [Section("n", "a", ["l", ("x", ["i"])], sections[0].parts)],
            runs,
            folder,
            30,
        )
    )
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in plain_page.tags]  # not one more, whatever the texts
    for tag, attributes in parsed.tags:
        assert not any(attribute.startswith("on") for attribute in attributes), (tag, attributes)
        for attribute in ("src", "href"):
            assert (attributes.get(attribute) or "#").startswith(("#", "data:")), (tag, attributes)
    for shown in (title, line, above, item, name, cell, caption, note):
        assert as_parsed(shown) in as_parsed(parsed.text)


@settings(max_examples=20, deadline=None)
@given(name=st.one_of(TEXTS, st.text("$\\_^{}ab\x1b\n", max_size=8)))
def test_any_name_can_be_drawn(name):
    """Matplotlib reads what stands between two dollars as mathematics, and stops where it is none."""
    figure = pyplot().figure(figsize=(1, 1))
    try:
        shown = figure.text(0, 0, plain(name))
        shown.get_window_extent(figure.canvas.get_renderer())
    finally:
        pyplot().close(figure)
    assert "\n" not in plain(name) and "\x1b" not in plain(name)


def test_a_script_of_the_page_is_bound_by_its_hash(tmp_path: Path):
    text = page("t", [], {"done": 1}, [], {"x": 1}, tmp_path)
    assert "default-src 'none'" in text and "script-src 'sha256-" in text and "unsafe-eval" not in text
