"""Bytes of S3 objects at signed addresses, for about half of the processor time of a call of s3fs.

Features are read in many small pieces, and a call builds, signs and parses all of its request and answer. Here botocore
signs an object's address once, for many reads, and its HTTP session, with the user's settings, sends the requests.
"""

from __future__ import annotations

import time
from typing import Any

LIFE = 600  # seconds that an address is used; its signature is valid twice as long
ANSWERS = (404, 408, 412, 429)  # and from 500 on: they are about the object or the store, not about the signature

# Address by object, None for one that was refused, and the time until which this holds.
_signed: dict[str, tuple[str | None, float]] = {}


class Answered(Exception):
    """An answer without the bytes. The text has only the status, because the address is a secret."""

    def __init__(self, status: int):
        super().__init__(f"status {status}")
        self.status = status


async def get_signed(fs: Any, url: str, start: int, end: int, etag: str) -> bytes | None:
    """Return bytes of an object with this ETag; None if s3fs itself has to ask, whose answer is then final.

    fs: filesystem of s3fs. Raises Answered, and what botocore's HTTP session raises.
    """
    from botocore.awsrequest import AWSRequest

    bucket, _, key = url.removeprefix("s3://").partition("/")
    await fs.set_session()
    client = await fs.get_s3(bucket)
    endpoint = getattr(client, "_endpoint", None)  # there is no public way to it; s3fs takes this one as well
    session: Any = getattr(endpoint, "http_session", None)
    if type(session).__name__ != "AIOHTTPSession" or fs.req_kw or fs.s3_additional_kwargs:
        return None
    address, until = _signed.get(url, (None, 0.0))
    if time.monotonic() >= until:
        address, until = await _sign(client, bucket, key), time.monotonic() + LIFE
        _signed[url] = address, until
    if address is None:
        return None
    request = AWSRequest("GET", address, {"Range": f"bytes={start}-{end - 1}", "If-Match": etag})
    response = await session.send(request.prepare())
    try:
        data = await response.content
    finally:
        response.raw.close()  # gives the connection back if all was read
    if response.status_code in (200, 206):
        return data
    if response.status_code in ANSWERS or response.status_code >= 500:
        raise Answered(response.status_code)
    _signed[url] = None, until
    return None


async def _sign(client: Any, bucket: str, key: str) -> str:
    # By default botocore signs addresses of some regions in a way that newer buckets refuse.
    client.meta.events.register_first("choose-signer.s3.GetObject", _same_for_addresses, "pacl")
    return await client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": key}, 2 * LIFE)


def _same_for_addresses(signature_version: Any, **others: Any) -> Any:
    """Return the way in which requests are signed if this is for an address, and None otherwise."""
    return signature_version if isinstance(signature_version, str) and signature_version.endswith("-query") else None
