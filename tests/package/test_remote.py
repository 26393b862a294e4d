"""Shards in a store: a real S3 server on loopback, behind a proxy that fails on demand."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")
from pacl.data.samples import loader
from pacl.data.shards import Shards, count_shards
from pacl.data.sources import open_pairs
from pacl.failures import StoreError
from pacl.stores import Store
from remote_store import CREDENTIALS, S3, Faults
from running import assert_same_state, final, train


@pytest.fixture(scope="module")
def scenes(s3_session, store_world) -> str:
    """Put the scenes of store_world into the store; return the address of their folder."""
    return s3_session.put_folder(store_world / "scenes", "scenes")


def keys(source: Shards, workers: int = 0, start: dict | None = None) -> Iterator[tuple[list[str], dict]]:
    batches = loader(source, 5, workers=workers, start=start)
    for batch in batches:
        yield batch["key"], copy.deepcopy(batches.state)


def gets(s3: S3, suffix: str = ".tar") -> int:
    return sum(method == "GET" and path.endswith(suffix) for method, path in s3.requests)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_resuming_are_those_of_local_shards(workers, s3, scenes, store_world):
    options = {"shuffle": 10, "seed": 3, "repeat": True}
    local, remote = (open_pairs(f"{x}/train-{{000..002}}.tar", **options) for x in (store_world / "scenes", scenes))
    expected = [batch for batch, _ in zip(keys(local, workers), range(9), strict=False)]
    assert [batch for batch, _ in zip(keys(remote, workers), range(9), strict=False)] == expected
    again = open_pairs(f"{scenes}/train-000.tar::{scenes}/train-{{001..002}}.tar", **options)
    rest = zip(keys(again, workers, start=expected[3][1]), range(5), strict=False)
    assert [names for (names, _), _ in rest] == [names for names, _ in expected[4:]]


def every_fault() -> Iterator[str | float]:
    yield from ("reset", "cut", "short", "500", "503", 0.2, "429")


def test_the_same_weights_whatever_the_store_does(s3, scenes, store_world, tmp_path, capfd):
    data = {"max_steps": 4, "val_frequency": 4, "shuffle": 9, "workers": 1, "train_num_samples": 36, "batch_size": 4}
    local = data | {"val_data": store_world / "scenes/eval-000.tar"}
    assert train(store_world, tmp_path / "local", **local) == 0
    remote = data | {"val_data": f"{scenes}/eval-000.tar", "train_data": f"{scenes}/train-{{000..002}}.tar"}
    faults = list(every_fault())

    def fault(method: str, path: str, part: str) -> str | float | None:
        # Every other request fails: reads of data, and questions about objects.
        return faults.pop() if faults and len(s3.requests) % 2 else None

    s3.fault = fault
    assert train(store_world, tmp_path / "remote", **remote) == 0
    assert not faults
    for name in ("state_dict", "optimizer", "data", "validated"):
        assert_same_state(final(tmp_path / "remote")[name], final(tmp_path / "local")[name], name)
    written = [path.read_bytes() for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    printed = "".join(capfd.readouterr()).encode()
    assert not any(secret.encode() in text for text in (*written, printed) for secret in secrets())


def secrets() -> list[str]:
    return [*CREDENTIALS.values(), "X-Amz-Signature"]


def replace(s3: S3, key: str) -> None:
    s3.client.put_object(Bucket="bucket", Key=key, Body=s3.get(key)[:-512] + b"\1" * 512)


ENDINGS = {
    "throttled": ("503", "could not be read in 2 attempts: the store answered with status 503"),
    "reset": ("reset", "could not be read in 2 attempts: the store could not be reached, or broke off the connection"),
    "cut": ("cut", "could not be read in 2 attempts: the store sent incomplete or damaged bytes"),
    "short": ("short", "could not be read in 2 attempts: the store sent"),
    "slow": (1.3, "could not be read in 2 attempts: the store did not answer within 1 s"),
    "forbidden": ("403", "could not be read: the store refuses access (status 403)"),
    "replaced": (None, "was replaced while it was read, expected the same object until the end"),
    "gone": (None, "is gone, expected it to stay until the end"),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_a_store_that_fails_ends_in_one_line_and_a_saved_run(how, s3, store_world, tmp_path, capfd):
    folder = s3.put_folder(store_world / "scenes", how)
    kind, message = ENDINGS[how]

    def fault(method: str, path: str, part: str) -> str | float | None:
        if path.endswith("train-000.tar") and method == "GET":  # after the run has looked at all shards
            if how == "replaced":
                replace(s3, f"{how}/train-001.tar")
            if how == "gone":
                s3.client.delete_object(Bucket="bucket", Key=f"{how}/train-001.tar")
        return kind if path.endswith("train-001.tar") and method == "GET" else None

    s3.fault = fault
    flags = {"train_data": f"{folder}/train-{{000..002}}.tar", "train_num_samples": 36, "shuffle": 0, "batch_size": 4}
    flags |= {"store_attempts": 2, "store_timeout": 1 if how == "slow" else 20, "workers": int(how == "reset")}
    assert train(store_world, tmp_path, **flags) == 1
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pacl: error: ")]
    assert len(error) == 1 and f"{folder}/train-001.tar {message}" in error[0]
    assert error[0].endswith("; step 3 of 6 is saved, continue with --resume latest")
    assert final(tmp_path)["step"] == 3


def test_no_part_of_a_shard_is_left_out(s3, monkeypatch, write_tar):
    """Whichever block fails, of a header, of an image or of the end, the reader stops there."""
    monkeypatch.setattr("pacl.remote.BLOCK", 512)
    path = write_tar("small.tar", {f"{i}.{suffix}": bytes(700) for i in range(2) for suffix in ("png", "txt")})
    address = s3.put(path, "small.tar")
    for block in (0, 2, 3, 5, 9, 12):  # 0, 3 and 9 are headers, and 12 is the first of the zeros at the end
        source = Shards(address, store=Store(attempts=1))
        s3.fault = lambda method, path, part, block=block: "503" if part.startswith(f"bytes={512 * block}-") else None
        with pytest.raises(StoreError, match="small.tar could not be read in 1 attempt"):
            list(source)


def test_a_run_goes_on_when_its_store_is_back(s3, scenes, store_world, tmp_path):
    flags = {"train_data": f"{scenes}/train-{{000..002}}.tar", "shuffle": 0, "store_attempts": 1, "batch_size": 4}
    assert train(store_world, tmp_path / "whole", **flags) == 0
    s3.fault = Faults("503", 99, suffix="train-001.tar")
    assert train(store_world, tmp_path / "cut", **flags) == 1
    s3.fault = S3.fault
    assert train(store_world, tmp_path / "cut", **flags | {"resume": "latest"}) == 0
    for name in ("state_dict", "optimizer", "data"):
        assert_same_state(final(tmp_path / "cut")[name], final(tmp_path / "whole")[name], name)


def test_counts_come_from_the_store_and_go_there(s3, store_world):
    folder = s3.put_folder(store_world / "scenes", "counted")
    if "counted/sizes.json" in s3.keys("counted/"):
        s3.client.delete_object(Bucket="bucket", Key="counted/sizes.json")
    source = open_pairs(folder)
    assert source.name == "6 shard(s)" and source.count() == 51
    assert gets(s3) == 6 and "counted/sizes.json" in s3.keys("counted/")
    s3.requests.clear()
    assert open_pairs(folder).count() == 51 and gets(s3) == 0
    assert count_shards(open_pairs(f"{folder}/eval-000.tar").paths) == {source.paths[0]: 5}
    s3.client.put_object(Bucket="bucket", Key="counted/incomplete.json", Body=b"{}")
    with pytest.raises(ValueError, match="counted is incomplete"):
        open_pairs(folder)


def test_cache(s3, scenes, tmp_path):
    def read(size: int) -> list[str]:
        s3.requests.clear()
        store = Store(attempts=1, cache_dir=tmp_path / "cache", cache_size=size)
        return [
            name for names, _ in keys(open_pairs(f"{scenes}/train-{{000..002}}.tar", store=store)) for name in names
        ]

    def files() -> list[Path]:
        return [path for path in (tmp_path / "cache").glob("??/*") if path.is_file()]

    whole = read(10**9)
    assert gets(s3) == 3 and len(files()) == 3
    assert read(10**9) == whole and gets(s3) == 0
    files()[0].write_bytes(files()[0].read_bytes()[:-9] + b"123456789")
    assert read(10**9) == whole and gets(s3) == 1
    most = max(path.stat().st_size for path in files()) * 2
    shutil.rmtree(tmp_path / "cache")
    for _ in range(3):
        assert read(most) == whole and gets(s3) >= 1
        assert sum(path.stat().st_size for path in files()) <= most
    os.chmod(tmp_path / "cache", 0)  # as root this changes nothing
    with contextlib.suppress(OSError):
        (tmp_path / "cache/size").write_text("damaged")
    assert read(most) == whole
    os.chmod(tmp_path / "cache", 0o700)


@pytest.mark.parametrize(
    "name, message",
    [
        ("pipe:touch {}", "shards: got .*, expected a local path or an address of s3://, gs://, hf://, https://"),
        ("http://example.org/a.tar", "shards: got 'http://example.org/a.tar', expected a local path or an address"),
        ("s3:bucket/a.tar", "shards: got 's3:bucket/a.tar', expected a local path or an address"),
        ("https://me:hidden@example.org/a.tar", "got 'https://...@example.org/a.tar' with a user, a password"),
        ("https://example.org/a.tar?X-Amz-Signature=hidden", "got 'https://example.org/a.tar?...' with a user, a pass"),
        ("s3://bucket/a.tar::pipe:touch {}", "shards: got .*, expected a local path or an address"),
    ],
)
def test_refused_addresses(name, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("?", "[?]")) as error:
        Shards(name.format(tmp_path / "ran"))
    assert "hidden" not in str(error.value) and not (tmp_path / "ran").exists()


def test_what_is_not_there(s3, scenes):
    with pytest.raises(FileNotFoundError, match=f"shards: '{scenes}/none.tar' is not a file, expected the path"):
        Shards(f"{scenes}/none.tar")
    with pytest.raises(FileNotFoundError, match=f"data: {scenes}/none holds no .tar file"):
        open_pairs(f"{scenes}/none")
    with pytest.raises(ValueError, match="dataset_type: got csv for an address, expected webdataset"):
        open_pairs(f"{scenes}/pairs.csv", kind="csv")
    with pytest.raises(StoreError, match="s3://B!!/a.tar could not be read: the store has no such address"):
        Shards("s3://B!!/a.tar")
