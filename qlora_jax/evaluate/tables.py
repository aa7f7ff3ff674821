"""A table of results as text, Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}

Cells = Sequence[Sequence[str]]


def as_text(header: Sequence[str], rows: Cells) -> str:
    """Columns under each other; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in (header, *rows)]
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def as_markdown(header: Sequence[str], rows: Cells) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped) + "\n"


def as_csv(header: Sequence[str], rows: Cells) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def as_latex(header: Sequence[str], rows: Cells) -> str:
    """A tabular with the rules of booktabs."""
    lines = [
        " & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in cells) + r" \\" for cells in (header, *rows)
    ]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
    return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def write_tables(folder: Path, name: str, header: Sequence[str], rows: Cells) -> list[Path]:
    """Writes NAME.md, NAME.csv and NAME.tex into the folder."""
    texts = {".md": as_markdown, ".csv": as_csv, ".tex": as_latex}
    for suffix, form in texts.items():
        (folder / (name + suffix)).write_text(form(header, rows), encoding="utf-8")
    return [folder / (name + suffix) for suffix in texts]
