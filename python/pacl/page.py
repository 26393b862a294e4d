"""A self-contained HTML page of tables and pictures: no script, no network."""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

# With this policy the browser loads and runs nothing, whatever the page holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 24px auto; max-width: 1280px; padding: 0 16px; color: #1e1e22; }
h1 { font-size: 24px; } h2 { font-size: 19px; margin-top: 36px; border-top: 1px solid #ddd; padding-top: 16px; }
p { max-width: 860px; overflow-wrap: anywhere; } .note { color: #6e6e76; font-size: 13px; }
.scroll { overflow-x: auto; margin: 12px 0; } table { border-collapse: collapse; }
caption { text-align: left; font-weight: 600; padding: 4px 0; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid #e4e4e8; vertical-align: top;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; max-width: 420px; }
th:first-child, td:first-child { text-align: left; } td.best { font-weight: 700; }
img { max-width: 100%; height: auto; display: block; } figure { display: inline-block; margin: 8px 16px 8px 0;
  vertical-align: top; max-width: 100%; } ul.legend { list-style: none; padding: 0; }
ul.legend li { display: inline-block; margin-right: 18px; } ul.legend i { display: inline-block; width: 13px;
  height: 13px; margin-right: 6px; border: 1px solid #777; vertical-align: -2px; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG and a description of it."""

    png: bytes
    words: str


class Page:
    """Collect headings, texts, tables and pictures. The page escapes all words, so callers pass plain text.

    A table's cell is a string or a Picture.
    """

    def __init__(self, title: str):
        self.title = title
        self._parts: list[str] = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{escape(text)}</p>")

    def note(self, text: str) -> None:
        """Add a text in small grey letters."""
        self._parts.append(f'<p class="note">{escape(text)}</p>')

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str | Picture]],
        caption: str = "",
        best: Collection[tuple[int, int]] = (),
    ) -> None:
        """Add a table. best: (row, column), from 0, of the cells in bold."""
        lines = [f"<caption>{escape(caption)}</caption>"] if caption else []
        lines.append("<tr>" + "".join(f"<th>{escape(x)}</th>" for x in head) + "</tr>")
        for i, row in enumerate(rows):
            cells = "".join(
                f'<td class="best">{_cell(x)}</td>' if (i, j) in best else f"<td>{_cell(x)}</td>"
                for j, x in enumerate(row)
            )
            lines.append(f"<tr>{cells}</tr>")
        self._parts.append('<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>")

    def picture(self, picture: Picture) -> None:
        self._parts.append(f"<figure>{_cell(picture)}</figure>")

    def legend(self, entries: Sequence[tuple[Sequence[int], str]]) -> None:
        """Add a legend. entries: colours (red, green and blue, 0 to 255) and their meanings."""
        items = [
            f'<li><i style="background: rgb({",".join(str(int(x)) for x in colour)})"></i>{escape(words)}</li>'
            for colour, words in entries
        ]
        self._parts.append(f'<ul class="legend">{"".join(items)}</ul>')

    def render(self) -> bytes:
        """Return the whole file as UTF-8; characters that UTF-8 cannot encode become question marks."""
        head = (
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n"
        )
        return (head + "\n".join(self._parts) + "\n</html>\n").encode(errors="replace")


def _cell(x: str | Picture) -> str:
    if isinstance(x, str):
        return escape(x)
    return f'<img alt="{escape(x.words)}" src="data:image/png;base64,{base64.b64encode(x.png).decode()}">'
