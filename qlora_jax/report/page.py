"""One HTML page with everything in it: styles, script, figures and data. It asks the network for nothing.

A policy in the page lets a browser run its one script alone, by hash, and load nothing from anywhere (a page that is
served may ask its server whether it changed). Every text is
escaped, and the script sets texts, never HTML.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from qlora_jax.report.parts import Figure, Section, Table, Text

_HERE = Path(__file__).parent


def page(
    title: str,
    head: Sequence[str],
    counts: dict[str, int],
    sections: Sequence[Section],
    runs: dict[str, Any] | None,
    figures: Path,
    reload_seconds: int = 0,
    is_served: bool = False,
) -> str:
    """The page.

    Args:
      head: lines below the title.
      counts: runs by status.
      runs: run_list's, or None for a page without a run list.
      figures: folder with NAME.svg of every figure.
      reload_seconds: after which the page loads itself again; 0 is never.
      is_served: by serve.Follower, which the page asks whether it changed.
    """
    script, style = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    policy += "; connect-src 'self'" if is_served else ""
    follow = ' data-follow="yes"' if is_served else ""
    reload = f'<noscript><meta http-equiv="refresh" content="{reload_seconds}"></noscript>' if reload_seconds else ""
    links = [(section.id, section.title) for section in sections] + ([("runs", "Runs")] if runs else [])
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en" data-reload="{reload_seconds}"{follow}>',
            '<head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>{reload}<style>{style}</style></head>",
            "<body>",
            f"<nav><b>{escape(title)}</b><ul>{''.join(_link(*link) for link in links)}</ul></nav><main>",
            f"<header><h1>{escape(title)}</h1>{''.join(map(_paragraph, head))}{_progress(counts)}</header>",
            *(_section(section, figures) for section in sections),
            _RUNS if runs else "",
            "</main>",
            f'<script type="application/json" id="data">{_json(runs)}</script>' if runs else "",
            f"<script>{script}</script>",
            "</body></html>\n",
        ]
    )


_RUNS = """<section id="runs"><h2>Runs</h2>
<noscript><p>Sorting and filtering need JavaScript; tables/runs.csv beside this page has all runs.</p></noscript>
<div class="tools">
<input id="search" type="search" placeholder="search hash, config, group, error" aria-label="Search runs">
<select id="group" aria-label="Group"></select><button id="clear" type="button">Clear</button>
<span id="found" role="status"></span><span class="pager"><button id="previous" type="button">‹</button>
<span id="page"></span><button id="next" type="button">›</button></span></div>
<div class="scroll"><table id="list"><thead></thead><tbody></tbody></table></div></section>"""


def _link(name: str, title: str) -> str:
    return f'<li><a href="#{escape(name)}" data-section="{escape(name)}">{escape(title)}</a></li>'


def _progress(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    parts = [(escape(status), count) for status, count in counts.items() if count]
    bar = "".join(f'<i class="{status}" style="width:{100 * count / total:.3f}%"></i>' for status, count in parts)
    words = "".join(f'<li><i class="{status}"></i><b>{count:,}</b> {status}</li>' for status, count in parts)
    return f'<div class="bar">{bar}</div><ul class="counts">{words}<li><b>{total:,}</b> in all</li></ul>'


def _section(section: Section, figures: Path) -> str:
    text = "".join(map(_paragraph, section.paragraphs))
    parts = "".join(_figure(part, figures) if isinstance(part, Figure) else _table(part) for part in section.parts)
    return f'<section id="{escape(section.id)}"><h2>{escape(section.title)}</h2>{text}{parts}</section>'


def _paragraph(text: Text) -> str:
    if isinstance(text, str):
        return f"<p>{escape(text)}</p>"
    above, lines = text
    return f"<p>{escape(above)}</p><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _figure(figure: Figure, folder: Path) -> str:
    data = base64.b64encode((folder / f"{figure.name}.svg").read_bytes()).decode()
    alt = escape(f"{figure.title}. {figure.caption}")
    image = f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption><b>{escape(figure.title)}.</b> {escape(figure.caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    header = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    note = f"<p class='note'>{escape(table.note)}</p>" if table.note else ""
    opened = " open" if table.is_open else ""
    body = f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>{note}'
    return f"<details{opened}><summary>{escape(table.title)}</summary>{body}</details>"


def _cell(text: str) -> str:
    digits = sum(character.isdigit() for character in text)
    is_number = text == "–" or (digits and all(character in "0123456789.,+-−e%" for character in text))
    return f'<td class="n">{escape(text)}</td>' if is_number else f"<td>{escape(text)}</td>"


def _json(value: Any) -> str:
    """JSON that no HTML parser sees a tag or a comment in."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
