"""Assemble the page from its files, and the policy under which a browser runs it."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

HERE = Path(__file__).parent
STYLE = HERE.joinpath("page.css").read_bytes()
SCRIPT = b"".join(HERE.joinpath(name).read_bytes() for name in ("paint.js", "page.js", "controls.js"))
# Style and script stand in the page itself, so that one request, with the token, loads all of it.
PAGE = HERE.joinpath("page.html").read_bytes().replace(b"{style}", STYLE).replace(b"{script}", SCRIPT)


def _source(name: str, inside: bytes) -> str:
    return f"{name}-src 'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"


# Allows no other origin, and only the page's own script and style.
POLICY = (
    f"default-src 'none'; {_source('script', SCRIPT)}; {_source('style', STYLE)}; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
