"""Shards and features at `hf://`: a server on loopback that answers as the Hugging Face Hub does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("huggingface_hub")
import fsspec
import torch
from hub import Hub, hub_server
from huggingface_hub import hf_file_system
from pacl.cli import main
from pacl.data.features import Features
from pacl.data.samples import loader
from pacl.data.sources import open_pairs
from pacl.failures import StoreError
from pacl.stores import Store, _filesystem, find, names_in, start_read

ADDRESS = "hf://datasets/me/data"


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    if not hasattr(hf_file_system, "apply_config"):
        pytest.skip("this huggingface_hub takes no endpoint from fsspec's configuration")
    with hub_server() as (server, endpoint):
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint})
        _filesystem.cache_clear()
        yield server
    _filesystem.cache_clear()


def test_shards_are_those_of_a_disk(hub, store_world):
    hub.files = {f"scenes/{path.name}": path.read_bytes() for path in (store_world / "scenes").glob("*.tar")}
    remote, local = (open_pairs(f"{x}/scenes/train-{{000..002}}.tar", shuffle=5) for x in (ADDRESS, store_world))
    assert remote.count() == 36 and "scenes/sizes.json" in hub.files
    batches, expected = ([(batch["key"], batch["image"]) for batch in loader(each, 5)] for each in (remote, local))
    for (keys, images), (others, pixels) in zip(batches, expected, strict=True):
        assert keys == others and torch.equal(images, pixels)
    assert open_pairs(f"{ADDRESS}/scenes").name == "6 shard(s)"


def test_features_go_there_and_come_back(hub, store_world, tmp_path):
    words = f"features --train-data {store_world}/scenes/train-{{000..001}}.tar --model local-dir:{store_world}/clip"
    words += " --batch-size 8 --shard-size 10 --workers 0 --out "
    assert main((words + str(tmp_path / "local")).split()) == 0
    hub.files["README.md"] = b""
    assert main((words + f"{ADDRESS}/features").split()) == 0
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert hub.files[f"features/{path.name}"] == path.read_bytes()
    remote, local = (list(Features(place)) for place in (f"{ADDRESS}/features", tmp_path / "local"))
    assert [x["key"] for x in remote] == [x["key"] for x in local] and len(remote) == 24
    assert all(torch.equal(x["tokens"], y["tokens"]) for x, y in zip(remote, local, strict=True))


def test_objects_that_change(hub):
    url, store = f"{ADDRESS}/a/b.tar", Store(attempts=1)
    hub.files["a/b.tar"] = b"0123456789"
    (info,) = find([url], store)
    assert start_read(url, 2, 5, info, store).result() == b"234"
    hub.files["a/other.tar"] = b"of another process"  # after this one has listed the folder
    (other,) = find([f"{ADDRESS}/a/other.tar"], store)
    assert start_read(f"{ADDRESS}/a/other.tar", 0, 2, other, store).result() == b"of"
    assert names_in(f"{ADDRESS}/a", store) == ["b.tar", "other.tar"] and names_in(f"{ADDRESS}/none", store) == []
    assert find([f"{ADDRESS}/a/none.tar", "hf://datasets/me/none/a.tar", f"{ADDRESS}/a"], store) == [None] * 3
    hub.fault = lambda path: 403
    with pytest.raises(StoreError, match="a/b.tar could not be read: the store refuses access .status 403."):
        start_read(url, 2, 5, info, store).result()
    hub.fault = Hub.fault
    hub.files["a/b.tar"] = b"0123456780"  # of the same size
    with pytest.raises(StoreError, match="a/b.tar was replaced while it was read"):
        start_read(url, 2, 5, info, store).result()
    del hub.files["a/b.tar"]
    with pytest.raises(StoreError, match="a/b.tar is gone, expected it to stay until the end"):
        start_read(url, 2, 5, info, store).result()
