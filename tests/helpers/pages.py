"""Read HTML pages in tests: what a browser shows of a page, and a check that it loads nothing."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

from PIL import Image


class Read(HTMLParser):
    """Parse a page.

    `tables` maps a caption to rows of cells, the head first; `images` maps alternative texts to pictures; `text` has
    the rest.
    """

    def __init__(self, page: bytes):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.images: dict[str, Image.Image] = {}
        self.text, self.tags, self.addresses = "", [], []
        self._rows, self._in = None, None
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.addresses += [values[x] for x in ("src", "href", "action", "srcset", "data", "poster") if x in values]
        if tag == "img":
            self.images[values["alt"]] = decoded(values["src"])
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td"):
            self._rows[-1].append("")
        self._in = tag

    def handle_endtag(self, tag):
        if tag == "table":
            caption = self._caption or f"table {len(self.tables)}"
            assert caption not in self.tables
            self.tables[caption] = self._rows
        self._in = None

    def handle_data(self, data):
        if self._in in ("th", "td"):
            self._rows[-1][-1] += data
        elif self._in == "caption":
            self._caption += data
        elif self._in != "style":
            self.text += data


def decoded(address: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"), validate=True)))
    image.load()
    return image


def read(page: bytes) -> Read:
    """Parse a page, and assert that it loads nothing."""
    found = Read(page)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags)
    assert all(x.startswith("data:image/png;base64,") for x in found.addresses)
    assert b"://" not in page and b"@import" not in page and b"url(" not in page
    assert not re.search(rb"<[^>]*\son\w+\s*=", page)
    assert b"default-src 'none'; img-src data:" in page
    return found
