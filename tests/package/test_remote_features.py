"""Features in a store: those of a local folder, to the bit, whatever the store does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")
import torch
from pacl.backbones import NAFLEX_VITS
from pacl.cli import main
from pacl.data.features import Features, _open
from pacl.data.samples import loader
from pacl.data.sources import open_pairs
from pacl.failures import StoreError
from pacl.stores import Store
from pacl.tensors import announced, open_tensors, parse_header, ranges_of, read_ahead
from PIL import Image
from remote_store import S3, Faults
from running import assert_same_state, final
from safetensors import SafetensorError, safe_open
from small_towers import save_naflex


@pytest.fixture(autouse=True)
def _opened_anew():
    """Let each test open its features itself."""
    _open.cache_clear()


@pytest.fixture(scope="module")
def folder(store_world, tmp_path_factory) -> Path:
    """Create features of 30 scenes, with nouns, of towers without weights."""
    folder = tmp_path_factory.mktemp("remote_features")
    assert main(["features", *words(store_world, out=folder / "stored")]) == 0
    return folder / "stored"


@pytest.fixture(scope="module")
def address(s3_session, folder) -> str:
    return s3_session.put_folder(folder, "stored")


@pytest.fixture(scope="module")
def packed(store_world, tmp_path_factory) -> tuple[Path, list[str]]:
    """Create features of 7 pictures of different shapes, and return the folder and the flags without --out."""
    if not NAFLEX_VITS:
        pytest.skip("this timm has no NaFlex ViT")
    world = tmp_path_factory.mktemp("packed")
    save_naflex(world / "naflex")
    (world / "images").mkdir()
    for i in range(7):
        Image.effect_noise((16 + 20 * i, 40), 90).convert("RGB").save(world / f"images/{i}.png")
        (world / f"images/{i}.txt").write_text(f"picture {i}\nnumber {i}\n")
    flags = words(store_world, train_data=world / "images", train_num_samples=7, shard_size=4)
    flags += ["--vision-model", f"local-dir:{world / 'naflex'}", "--max-patches", "11"]
    assert main(["features", *flags, "--out", str(world / "stored")]) == 0
    return world / "stored", flags


def words(world: Path, **changes) -> list[str]:
    values = {"train_data": "synthetic", "train_num_samples": 30, "model": f"local-dir:{world / 'clip'}"}
    values |= {"precision": "fp32", "workers": 0, "batch_size": 16, "shard_size": 12, "nouns": "words"}
    return [word for name, x in (values | changes).items() for word in (f"--{name}", str(x))]


def train(logs: Path, **changes) -> int:
    values = {"log_dir": logs, "batch_size": 10, "max_steps": 3, "workers": 0, "report_to": "none"}
    return main(["train", *[word for name, x in (values | changes).items() for word in (f"--{name}", str(x))]])


def test_training_from_a_store_is_training_from_a_disk(s3, folder, address, tmp_path):
    flags = {"nouns": "words", "workers": 1}
    assert train(tmp_path / "local", features=folder, **flags) == 0
    faults = ["reset", "cut", "503", "500", 0.2, "reset", "cut", "503"]
    s3.fault = lambda *request: faults.pop() if faults and len(s3.requests) % 3 == 0 else None
    assert train(tmp_path / "remote", features=address, **flags) == 0
    assert not faults
    for name in ("state_dict", "optimizer", "data"):
        assert_same_state(final(tmp_path / "remote")[name], final(tmp_path / "local")[name], name)
    assert f"features: {address}\n" in (tmp_path / "remote/pacl/config.yaml").read_text()


def test_a_replaced_file_ends_the_reading(s3, folder):
    address = s3.put_folder(folder, "replaced")
    key = "replaced/features-00001.safetensors"

    def fault(method: str, path: str, part: str) -> None:
        if method == "GET" and part and not part.startswith("bytes=0-"):  # an image, after the headers
            s3.fault = S3.fault
            s3.client.put_object(Bucket="bucket", Key=key, Body=s3.get(key)[:-1] + b"?")

    s3.fault = fault
    with pytest.raises(StoreError, match=f"{address}/features-00001.safetensors was replaced while it was read"):
        list(Features(address, verify=False))


def test_damage_is_found_as_on_a_disk(s3, folder):
    address = s3.put_folder(folder, "damaged")
    key = "damaged/features-00001.safetensors"
    data = bytearray(s3.get(key))
    data[-1] ^= 1
    s3.client.put_object(Bucket="bucket", Key=key, Body=bytes(data))
    with pytest.raises(ValueError, match=f"{key} is damaged: it does not have the SHA-256"):
        Features(address)
    s3.client.put_object(Bucket="bucket", Key=key, Body=bytes(data[:8]) + b"x" * (len(data) - 8))
    with pytest.raises(ValueError, match=f"{key} is damaged: it is not a whole safetensors file"):
        Features(address, verify=False)
    s3.client.put_object(Bucket="bucket", Key=key, Body=bytes(data[:-1]))
    with pytest.raises(ValueError, match=f"{key} is missing or does not have"):
        Features(address, verify=False)


@pytest.mark.parametrize("head", [64, 2**16])
def test_tensors_of_a_store_are_those_of_safetensors(s3, folder, address, head, monkeypatch):
    monkeypatch.setattr("pacl.tensors.HEAD", head)
    source = Features(address, verify=False)
    for path in source.paths:
        with safe_open(folder / path.name, "pt") as local, open_tensors(path) as remote:
            assert sorted(remote.keys()) == sorted(local.keys()) and remote.metadata() == local.metadata()
            for name in local.keys():  # noqa: SIM118, it is no dict
                assert torch.equal(remote.get_tensor(name), local.get_tensor(name))
                mine, other = remote.get_slice(name), local.get_slice(name)
                assert mine.get_dtype() == other.get_dtype() and mine.get_shape() == other.get_shape()
                for rows in (slice(0, 0), slice(3, 5), slice(9, None), slice(0, 10**9)):
                    assert torch.equal(mine[rows], other[rows])
            with pytest.raises(SafetensorError):
                remote.get_slice("other")


ENTRY = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [%d, %d]}}'
BAD = [b"[]", b"{", b'{"a": {}}', ENTRY.replace(b"F32", b"F9") % (0, 8)]
BAD += [ENTRY % ends for ends in ((0, 4), (-4, 4), (96, 104))]


@pytest.mark.parametrize("header", BAD)
def test_bad_headers(header):
    with pytest.raises(SafetensorError):
        parse_header(header, 8 + len(header), 8 + len(header) + 100)


def test_images_are_read_ahead_of_their_turn(s3, folder, address):
    """With an answer after 50 ms, 30 images of three reads each would take 4.5 s one after the other."""
    source = Features(address, verify=False, store=Store(attempts=2))
    s3.latency = 0.05
    found = [batch["key"] for batch in loader(source, 10)]
    assert found == [batch["key"] for batch in loader(Features(folder), 10)]
    assert s3.most_together >= 8


def test_reads_have_signed_addresses_unless_the_store_refuses_them(s3, folder, address, monkeypatch):
    monkeypatch.setattr("pacl.signed._signed", {})
    source, local = Features(address, verify=False), list(Features(folder))
    s3.signed.clear()
    assert [sample["key"] for sample in source] == [sample["key"] for sample in local]
    assert len(s3.signed) == 3 * len(local)
    monkeypatch.setattr("pacl.signed._signed", {})
    s3.trusting = False
    s3.signed.clear()
    for sample, other in zip(source, local, strict=True):
        assert torch.equal(sample["tokens"], other["tokens"]) and torch.equal(sample["text"], other["text"])
    assert 3 <= len(s3.signed) < 90  # those that were under way when the first one of an object was refused
    s3.signed.clear()
    assert len(list(source)) == len(local) and not s3.signed


def test_what_is_read_ahead_is_bounded_and_ends_with_its_reader(s3, folder, address, monkeypatch):
    source = Features(address, verify=False, store=Store(attempts=1))
    s3.begin()
    s3.latency = 0.01
    with monkeypatch.context() as patch:
        patch.setattr("pacl.data.features.AHEAD_BYTES", 1)
        # Tokens and record of one image; the server may count one that is answered already.
        assert len(list(source)) == 30 and s3.most_together <= 4
    row = 5
    first, end = _open(source.paths[0]).parts["tokens"].rows(row, row + 1)
    s3.fault = lambda method, path, asked: "500" if asked == f"bytes={first}-{end - 1}" and "00000" in path else None
    found = []
    with pytest.raises(StoreError, match="features-00000.safetensors could not be read in 1 attempt"):
        for sample in source:
            found.append(sample["key"])
    assert len(found) == row  # those before the fault come, whatever is read ahead
    assert not any(_open(path)._coming for path in source.paths)


def test_writing_to_a_store_goes_on_after_a_fault(s3, store_world, folder, capsys):
    out = "s3://bucket/written"
    command = ["features", *words(store_world, out=out, store_attempts=2)]
    s3.fault = Faults("500", 2, method="PUT", suffix="features-00001.safetensors")
    assert main(command) == 1
    message = f"pacl: error: {out}/features-00001.safetensors could not be written in 2 attempts: the store answered"
    assert message in capsys.readouterr().err
    assert s3.keys("written/") == ["written/features-00000.safetensors", "written/manifest.json"]
    with pytest.raises(ValueError, match=f"features: {out} is incomplete"):
        Features(out)
    s3.fault = Faults("reset", 1, method="PUT", suffix="manifest.json")
    assert main(command) == 0 and s3.fault.left == 0
    assert f"Next: pacl train --features {out} --nouns words" in capsys.readouterr().out
    for path in folder.glob("*.safetensors"):
        assert s3.get(f"written/{path.name}") == path.read_bytes()
    assert (
        json.loads(s3.get("written/manifest.json"))["shards"]
        == json.loads((folder / "manifest.json").read_text())["shards"]
    )
    assert [sample["key"] for sample in Features(out)] == [sample["key"] for sample in Features(folder)]
    s3.client.put_object(Bucket="bucket", Key="other/file", Body=b"")
    assert main(["features", *words(store_world, out="s3://bucket/other")]) == 1
    assert "s3://bucket/other holds other files, expected a new folder" in capsys.readouterr().err
    assert main(["features", *words(store_world, out="https://127.0.0.1:9/new", store_attempts=1)]) == 1
    assert "out: got https://127.0.0.1:9/new, expected a local folder" in capsys.readouterr().err


def test_images_of_different_sizes_in_a_store(s3, packed):
    folder, flags = packed
    out = "s3://bucket/packed"
    assert main(["features", *flags, "--out", out]) == 0
    for path in folder.glob("*.safetensors"):
        assert s3.get(f"packed/{path.name}") == path.read_bytes()
    batches, expected = (list(loader(Features(name, nouns="words"), 3)) for name in (out, folder))
    assert len(batches) == len(expected) == 3 and len({int(n) for batch in expected for n in batch["length"]}) > 2
    for batch, other in zip(batches, expected, strict=True):
        assert batch["key"] == other["key"]
        assert torch.equal(batch["tokens"], other["tokens"]) and torch.equal(batch["length"], other["length"])


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_announced_bytes_are_those_of_the_image(request, kind):
    folder = request.getfixturevalue(kind)
    source = Features(folder[0] if kind == "packed" else folder, verify=False, captions="all")
    seen = 0
    for sample in source:
        name, row = sample["origin"].split()
        data = (source.folder / name).read_bytes()
        tokens, text, record = (data[first:end] for first, end in ranges_of(source.folder / name, int(row)))
        assert tokens == sample["tokens"].numpy().tobytes()
        assert text in [each.numpy().tobytes() for each in sample["texts"]]
        assert json.loads(record)["key"] == sample["key"]
        seen += 1
    assert seen == len(source)


@pytest.mark.long
def test_features_of_shards_in_a_store(s3, store_world, tmp_path, capfd):
    address = s3.put_folder(store_world / "scenes", "features_of_shards")
    open_pairs(f"{address}/train-{{000..001}}.tar").count()  # so that the command reads every shard once
    values = {"train_data": f"{address}/train-{{000..001}}.tar", "workers": 1, "train_num_samples": 24}
    command = ["features", *words(store_world, out=tmp_path / "remote", store_attempts=1, **values)]
    s3.fault = Faults("503", 99, suffix="train-001.tar")
    assert main(command) == 1
    found = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    message = f"{address}/train-001.tar could not be read in 1 attempt: the store answered with status 503"
    assert found == [f"pacl: error: {message}"]
    with pytest.raises(StoreError, match=f"^{message}$"):
        list(loader(open_pairs(f"{address}/train-001.tar", store=Store(attempts=1)), 7, workers=1))
    assert (tmp_path / "remote/features-00000.safetensors").is_file()
    s3.fault = S3.fault
    assert main(command) == 0
    values |= {"train_data": store_world / "scenes/train-{000..001}.tar", "out": tmp_path / "local"}
    assert main(["features", *words(store_world, **values)]) == 0
    assert len(list((tmp_path / "local").glob("features-*"))) > 2
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "remote" / path.name).read_bytes() == path.read_bytes()


def test_order_of_reading_ahead():
    seen: list[int] = []
    announcing = announced(iter(range(5)), seen.append, 3)
    assert next(announcing) == 0 and seen == [0, 1, 2, 3]
    assert list(announcing) == [1, 2, 3, 4]
    assert list(read_ahead(lambda n: n * n, range(20), 4)) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda n: 1 // n, range(20), 4))
