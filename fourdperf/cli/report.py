"""Tables as text, and one HTML page that works without a network: tables, pictures and videos in a single file."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Picture", "Table", "Text", "page", "step"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
td, th { padding: 2px 12px; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
caption { text-align: left; font-weight: 600; padding: 4px 12px }
img { max-width: 100%; margin: .5em 0 }
"""


@dataclass(frozen=True)
class Table:
    """A caption, column names, and rows of strings."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """The table for a terminal: the first column flush left, the others flush right."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        aligned = [
            "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
            for line in lines
        ]
        return "\n".join([self.caption, "-" * max(map(len, aligned)), *aligned])

    def html(self) -> str:
        def row(cells, tag):
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "\n".join(row(cells, "td") for cells in self.rows)
        return f"<table><caption>{html.escape(self.caption)}</caption>\n{row(self.columns, 'th')}\n{body}\n</table>"


@dataclass(frozen=True)
class Text:
    """A paragraph, or with ``level`` 1 or 2 a heading."""

    content: str
    level: int = 0

    def html(self) -> str:
        tag = f"h{self.level}" if self.level else "p"
        return f"<{tag}>{html.escape(self.content)}</{tag}>"


@dataclass(frozen=True)
class Picture:
    """A PNG or an (animated) WebP, copied into the page."""

    path: Path
    caption: str

    def html(self) -> str:
        data = base64.b64encode(self.path.read_bytes()).decode()
        alt = html.escape(self.caption, quote=True)
        return f'<p>{alt}<br><img alt="{alt}" src="data:image/{self.path.suffix[1:]};base64,{data}"></p>'


def page(title: str, parts: Sequence[Table | Text | Picture]) -> str:
    """The HTML of a page with ``parts`` from top to bottom."""
    body = "\n".join(part.html() for part in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{Text(title, 1).html()}\n{body}\n</body></html>\n"
    )


def step(text: str) -> None:
    """Says on the terminal what a long command does now."""
    print(f"\n== {text}", flush=True)
