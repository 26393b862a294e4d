"""Read and write objects of remote stores through fsspec: repeated after faults, with a time limit, and cached."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .failures import StoreError
from .range_cache import RangeCache
from .signed import get_signed

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "https": "aiohttp"}  # by scheme
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 60.0  # seconds before an attempt is repeated; the pause doubles each time
SLOWEST = 10**6  # bytes per second that a write must reach, beyond the time limit of a read
AT_ONCE = 32  # questions about objects that are open at once
TAGS = ("ETag", "etag", "generation", "md5Hash", "blob_id", "Content-MD5", "LastModified", "Last-Modified")
DAMAGED = {
    "ClientPayloadError",
    "FlexibleChecksumError",
    "IncompleteReadError",
    "IncompleteRead",
    "RemoteProtocolError",
}
REPLACED = "has another object"
Result = TypeVar("Result")
_pauses = random.Random()  # never Python's shared generator, which decides the order of the data


@dataclass(frozen=True)
class Store:
    """The way to read from stores.

    timeout: seconds that one attempt may take. attempts: how often a read or write is tried in all. cache_dir: local
    folder that keeps what was read, None for none; cache_size: its most bytes.
    """

    timeout: float = 60.0
    attempts: int = 10
    cache_dir: Path | None = None
    cache_size: int = 10**11

    @property
    def cache(self) -> RangeCache | None:
        return None if self.cache_dir is None else RangeCache(self.cache_dir, self.cache_size)


@dataclass(frozen=True)
class Info:
    """An object of a store: its size in bytes, a tag that changes with its content, and the server's own such tag."""

    size: int
    tag: str
    etag: str = ""


def start_read(url: str, start: int, end: int, info: Info, store: Store) -> Future[bytes]:
    """Begin to read bytes `start` to `end` of an object; the result is all of them.

    The future raises StoreError when every attempt failed, and if the object no longer is the one of `info`.
    """
    return _begin(_read(url, start, end, info, store))


def find(urls: Sequence[str], store: Store) -> list[Info | None]:
    """Look up objects, many at a time; None for one that does not exist, or is a folder.

    Raises StoreError if the store does not answer or refuses access.
    """

    async def all_of_them() -> list[Info | None]:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(url: str) -> Info | None:
            async with gate:
                try:
                    return await _repeated(url, store, lambda: _look(url))
                except FileNotFoundError:
                    return None

        return await asyncio.gather(*map(one, urls))

    return _begin(all_of_them()).result()


def names_in(url: str, store: Store) -> list[str]:
    """Return the sorted names of the objects directly below `url`, [] if there are none."""

    async def once() -> list[str]:
        entries = await _ask(url, "ls", url, detail=True, **_fresh(url))
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "file")

    try:
        return _begin(_repeated(url, store, once)).result()
    except FileNotFoundError:
        return []


def write(url: str, data: bytes, store: Store) -> None:
    """Write an object as a whole: a reader sees the old content or the new one. Raises StoreError."""

    async def once() -> None:
        await _ask(url, "pipe_file", url, data)

    _begin(_repeated(url, store, once, limit=store.timeout + len(data) / SLOWEST, verb="written")).result()


async def _read(url: str, start: int, end: int, info: Info, store: Store) -> bytes:
    cache, key = store.cache, ""
    if cache is not None:
        key = hashlib.sha256(json.dumps([url, info.tag, info.size, start, end]).encode()).hexdigest()
        if (known := await asyncio.to_thread(cache.get, key, end - start)) is not None:
            return known

    async def once() -> bytes:
        data = await _get(url, start, end, info)
        if len(data) != end - start:
            whole = len(data) == info.size
            found = "the whole object" if whole else f"{len(data):,} bytes"
            raise _Fault(f"sent {found} in place of the {end - start:,} bytes that were asked for")
        return data

    try:
        data = await _repeated(url, store, once)
    except FileNotFoundError as error:
        raise StoreError(f"{url} is gone, expected it to stay until the end") from error
    if cache is not None:
        await asyncio.to_thread(cache.put, key, data)
    return data


async def _get(url: str, start: int, end: int, info: Info) -> bytes:
    """Return bytes of an object; raise StoreError if it is not the one of `info`."""
    if url.startswith("s3:"):
        known = await get_signed(_filesystem("s3", os.getpid()), url, start, end, info.etag)
        if known is not None:
            return known
        # s3fs's own method for this cannot ask for bytes of a certain version.
        bucket, _, key = url.removeprefix("s3://").partition("/")
        part = {"Range": f"bytes={start}-{end - 1}", "IfMatch": info.etag}
        answer = await _ask(url, "call_s3", "get_object", Bucket=bucket, Key=key, **part)
        async with answer["Body"] as body:
            return await body.read()
    if url.startswith("https:"):
        weak = info.etag.startswith("W/")  # never matches
        condition = {"If-Match": info.etag} if info.etag and not weak else {}
        return await _ask(url, "cat_file", url, start=start, end=end, headers=condition)
    try:
        data = await _ask(url, "cat_file", url, start=start, end=end)
    except FileNotFoundError:
        if not url.startswith("hf:"):
            raise
        # huggingface_hub looks in its earlier listing of the folder, where a file of another process may be missing.
        _filesystem("hf", os.getpid()).invalidate_cache()
        data = await _ask(url, "cat_file", url, start=start, end=end)
    # Looked up after the bytes have come: they cannot be those of an object that was put there later.
    if await _look(url) != info:
        raise StoreError(_replaced(url))
    return data


def _replaced(url: str) -> str:
    return f"{url} was replaced while it was read, expected the same object until the end"


async def _look(url: str) -> Info:
    """Return what the store says about an object; raise FileNotFoundError for none and for a folder."""
    if url.startswith("hf:"):
        found = await asyncio.to_thread(_look_at_hub, url)
    else:
        found = await _ask(url, "info", url, **_fresh(url))
    if found["type"] != "file":
        raise FileNotFoundError(url)
    if found["size"] is None:
        raise StoreError(f"{url} has no known size, expected a server that states it")
    tag = "|".join(str(found[name]) for name in TAGS if found.get(name))
    return Info(int(found["size"]), tag, found.get("ETag") or "")


def _fresh(url: str) -> dict[str, bool]:
    """Return the option by which s3fs and huggingface_hub do not answer from an earlier listing."""
    return {"refresh": True} if url.startswith(("s3:", "hf:")) else {}


def _look_at_hub(url: str) -> dict[str, Any]:
    """Return size and tag of a file of the Hugging Face Hub; HfFileSystem.info leaves the tag out."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    fs = _filesystem("hf", os.getpid())
    place = fs.resolve_path(url)
    if not hasattr(place, "repo_id"):  # a bucket
        return fs.info(url, refresh=True)
    api = HfApi(endpoint=fs.endpoint, token=fs.token)
    where = {"revision": place.revision, "repo_type": place.repo_type}
    for found in api.get_paths_info(place.repo_id, [place.path_in_repo], **where):
        if isinstance(found, RepoFile):
            return {"type": "file", "size": found.size, "blob_id": found.blob_id}
    raise FileNotFoundError(url)


async def _repeated(
    url: str, store: Store, once: Callable[[], Awaitable[Result]], *, limit: float | None = None, verb: str = "read"
) -> Result:
    """Return the result of `once`, which is tried again, after growing pauses, when the store fails.

    Raises FileNotFoundError; and StoreError when the last attempt failed, and at once if no other can succeed.
    """
    limit = store.timeout if limit is None else limit
    for attempt in range(1, store.attempts + 1):
        try:
            return await asyncio.wait_for(once(), limit)
        except (StoreError, TypeError, AttributeError, NameError):
            raise
        except Exception as error:
            fault, final = _explain(error, limit)
            if fault is None:
                raise FileNotFoundError(url) from error
            if fault == REPLACED:
                raise StoreError(_replaced(url)) from error
            if final or attempt == store.attempts:
                tries = "" if final else f" in {attempt} attempt{'s' * (attempt > 1)}"
                raise StoreError(f"{url} could not be {verb}{tries}: the store {fault}") from error
        await asyncio.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)) * _pauses.uniform(0.5, 1.5))
    raise AssertionError("attempts is at least 1")


class _Fault(Exception):
    """A clause on what a store did wrong."""


def _explain(error: Exception, limit: float) -> tuple[str | None, bool]:
    """Return a clause on what the store did, None if it has no such object, and whether trying again is of no use.

    The text of the error is never passed on: it may hold a key, a signature or a token.
    """
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and isinstance(below, Exception):
        chain.append(below)
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    status = next(filter(None, map(_status, chain)), None)
    if status == 404 or isinstance(error, FileNotFoundError) and (status is None and len(chain) == 1):
        return None, True
    if status == 412:  # If-Match
        return REPLACED, True
    if isinstance(error, _Fault):
        return str(error), False
    if names & {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}:
        return "asks for credentials, and its library found none", True
    if names & {"ParamValidationError", "InvalidURL"}:
        return "has no such address", True
    if status in (401, 403) or status is None and "PermissionError" in names:
        return f"refuses access (status {status or 403})", True
    if status is not None:
        return f"answered with status {status}", status < 500 and status not in (408, 429)
    if names & {"TimeoutError", "FSTimeoutError", "ReadTimeoutError", "TimeoutException"}:
        return f"did not answer within {limit:g} s", False
    if names & DAMAGED:
        return "sent incomplete or damaged bytes", False
    return "could not be reached, or broke off the connection", False


def _status(error: Exception) -> int | None:
    """Return the status of the HTTP answer that an error of botocore, aiohttp, httpx or gcsfs is about."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:  # aiohttp's errors about broken answers have a `code` that is not the server's
        found = getattr(response, "status_code", None) or getattr(error, "status", None)
        found = found or (getattr(error, "code", None) if type(error).__module__.startswith("gcsfs") else None)
    return found if isinstance(found, int) and 300 <= found < 600 else None


async def _ask(url: str, method: str, *args: Any, **options: Any) -> Any:
    """Call a method of the filesystem of an address, in a thread if its library has no asynchronous one."""
    fs = _filesystem(url.partition(":")[0], os.getpid())
    if fs.async_impl:
        return await getattr(fs, f"_{method}")(*args, **options)
    return await asyncio.to_thread(getattr(fs, method), *args, **options)


def check_installed(scheme: str) -> None:
    """Raise ValueError unless the package that opens addresses of this scheme is installed."""
    try:
        _filesystem(scheme, os.getpid())
    except ImportError as error:
        raise ValueError(
            f"data: got an address of {scheme}://, which {PACKAGES[scheme]} reads, expected that to be installed: "
            "pip install 'pacl-kernels[remote]'"
        ) from error


@functools.cache
def _filesystem(scheme: str, process: int) -> Any:
    """Return fsspec's filesystem of a scheme. process: this one's id, because connections do not survive a fork."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        # One place repeats requests, and counts them: _repeated.
        config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 64}
        options["config_kwargs"] = config | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    if scheme == "https":
        options["client_kwargs"] = {"trust_env": True}  # reads ~/.netrc
    fs = fsspec.filesystem(scheme, **options)
    if scheme == "s3":
        fs.retries = 1
    return fs


def _begin(work: Coroutine[Any, Any, Result]) -> Future[Result]:
    """Run a coroutine in fsspec's own thread, which a forked process gets anew."""
    from fsspec.asyn import get_loop

    return asyncio.run_coroutine_threadsafe(work, get_loop())
