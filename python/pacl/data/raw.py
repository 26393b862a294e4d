"""A sample before decoding, and its captions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .images import check_is_file

MAX_CAPTION_BYTES = 65_536


class Raw(NamedTuple):
    """A sample that is not decoded yet. Paths are opened on decoding.

    image: bytes, a path, None if it is missing, or a string: the reason why its file may not be read. captions: the
    captions as a list, or the content or path of a text file with one on each line. epoch: that of training, which
    decides which caption it takes. fault: the reason and a message, if the sample is known to be bad. origin: the shard
    that holds the sample; its key may be that of another image in another shard.
    """

    key: str
    image: bytes | Path | str | None
    captions: Sequence[bytes] | bytes | Path | None
    mask: bytes | Path | None = None
    epoch: int = 0
    fault: tuple[str, str] | None = None
    origin: str = ""


def read_captions(source: Sequence[bytes] | bytes | Path | None) -> tuple[list[str], list[ValueError]]:
    """Return the good captions of a sample, at least one, stripped, and an error for each bad one.

    Blank lines of a text file are no captions. Raises ValueError without a good caption, and if a text file is missing
    or has more than 65,536 bytes.
    """
    if source is None or isinstance(source, (bytes, Path)):
        with open_source(source) as stream:
            data = stream.read(MAX_CAPTION_BYTES + 1)
        if len(data) > MAX_CAPTION_BYTES:
            raise ValueError(f"got more than {MAX_CAPTION_BYTES:,} bytes of text")
        source = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    good, bad = [], []
    for data in source:
        try:
            good.append(read_caption(data))
        except ValueError as error:
            bad.append(error)
    if not good:
        raise bad[0] if bad else ValueError("got no caption, expected at least one")
    return good, bad


def read_caption(data: bytes) -> str:
    """Return the stripped text of a caption; raise ValueError if it is empty, too long or not UTF-8."""
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"got a caption of {len(data):,} bytes, expected at most {MAX_CAPTION_BYTES:,}")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"got a caption that is not UTF-8 from byte {error.start} on") from error
    if not text:
        raise ValueError("got an empty caption")
    return text


def as_bytes(caption: str) -> bytes:
    """Encode a caption from JSON. Half a surrogate pair, which JSON allows, gives invalid UTF-8 and a bad sample."""
    return caption.encode(errors="surrogatepass")


def readable(name: str) -> str:
    """Return the name of a file or a member in printable form: parts that are not UTF-8 become question marks."""
    return name.encode(errors="replace").decode()


def open_source(source: bytes | Path | str | None) -> BinaryIO:
    if source is None:
        raise ValueError("got none, it is missing")
    if isinstance(source, str):
        raise ValueError(source)
    if isinstance(source, bytes):
        return io.BytesIO(source)
    check_is_file(source)
    return open(source, "rb")
