"""The loader on real tar files returns what was written, and skips bad samples and counts them by kind."""

import io
import itertools
import json
import os
import re
import struct
import time
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from pacl.data.samples import BadData, loader
from pacl.data.scene_shards import write_scenes
from pacl.data.shards import Shards, count_shards, expand_shards
from pacl.segment.images import read_image
from pictures import encode, nonzero, picture
from PIL import Image


def pairs(count: int, start: int = 0) -> dict[str, bytes]:
    members = {}
    for i in range(start, start + count):
        members[f"{i:04d}.png"] = encode(picture(i), "PNG")
        members[f"{i:04d}.txt"] = f"caption {i}\n".encode()
    return members


def keys(dataset: Shards) -> list[str]:
    return [sample["key"] for sample in dataset]


def test_round_trip_of_every_suffix(write_tar):
    members = {}
    for suffix, kind in (("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("JPG", "JPEG")):
        members[f"{suffix}1.{suffix}"] = encode(picture(1), kind)
        members[f"{suffix}1.txt"] = "größe".encode("utf-8-sig" if suffix == "webp" else "utf-8")
    members["png1.json"] = b"{}"  # other files of a sample are ignored
    samples = list(Shards(write_tar("a.tar", members)))
    assert [sample["key"] for sample in samples] == ["jpg1", "jpeg1", "png1", "webp1", "JPG1"]
    assert {sample["caption"] for sample in samples} == {"größe"}
    assert torch.equal(samples[2]["image"], torch.from_numpy(picture(1)).permute(2, 0, 1))
    decoded = np.array(Image.open(io.BytesIO(members["jpg1.jpg"])))
    assert torch.equal(samples[0]["image"], torch.from_numpy(decoded).permute(2, 0, 1))


def test_images_of_other_modes_are_decoded_as_by_segment(write_tar):
    """16-bit images are scaled and transparent ones lie on white, so that training and `pacl segment` see the same."""
    gray = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    clear = np.dstack([picture(1), np.repeat(np.array([0, 128, 255, 0], np.uint8), 16).reshape(8, 8)])
    members = {"deep": encode(gray, "PNG"), "clear": encode(clear, "PNG"), "cut": encode(gray, "PNG")[:-40]}
    data = {f"{k}.{suffix}": x for k, png in members.items() for suffix, x in (("png", png), ("txt", b"a word"))}
    dataset = Shards(write_tar("a.tar", data))
    samples = {sample["key"]: sample["image"] for sample in dataset}
    assert samples.keys() == {"deep", "clear"} and dataset.skipped["image"] == 1
    for name, image in samples.items():
        assert torch.equal(image, torch.from_numpy(np.array(read_image(members[name]))).permute(2, 0, 1)), name
    assert torch.equal(samples["deep"][0], torch.from_numpy((gray // 257).astype(np.uint8)))
    assert (samples["clear"][:, :2] == 255).all()


def test_mask_is_exact(write_tar):
    mask = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    members = pairs(1) | {"0000.mask.png": encode(mask, "PNG")}
    (sample,) = Shards(write_tar("a.tar", members), masks=True)
    assert torch.equal(sample["mask"], torch.from_numpy(mask))


def test_bad_samples_are_skipped_and_counted(write_tar):
    members = pairs(8)
    members["0001.png"] = b"not an image"
    members["0002.png"] = members["0002.png"][:-40]  # truncated
    members["0003.txt"] = b"  \n"
    members["0004.txt"] = b"\xff\xfe\xff"  # not UTF-8
    del members["0005.txt"], members["0006.png"]
    dataset = Shards(write_tar("a.tar", members))
    assert keys(dataset) == ["0000", "0007"]
    assert nonzero(dataset.skipped) == {"image": 3, "caption": 3}


def test_corrupt_jpeg_is_skipped(write_tar):
    good = encode(picture(0, 32, 32))
    members = {"a.jpg": good[: len(good) // 2], "a.txt": b"half", "b.jpg": good, "b.txt": b"whole"}
    dataset = Shards(write_tar("a.tar", members))
    assert keys(dataset) == ["b"]
    assert dataset.skipped["image"] == 1


def test_wrong_masks_are_skipped(write_tar):
    members = pairs(3)
    members["0000.mask.png"] = encode(picture(0)[:4, :, 0].copy(), "PNG")  # half the height
    members["0001.mask.png"] = encode(picture(0), "PNG")  # colours instead of labels
    members["0002.mask.png"] = encode(picture(0)[:, :, 0].copy(), "PNG")
    dataset = Shards(write_tar("a.tar", dict(sorted(members.items()))), masks=True)  # keeps a sample's files adjacent
    assert keys(dataset) == ["0002"]
    assert dataset.skipped["mask"] == 2


def bomb(side: int) -> bytes:
    """Return a PNG of a few bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [5_001, 12_000, 60_000])  # above our cap, Pillow's warning, Pillow's error
@pytest.mark.filterwarnings("error")
def test_oversize_image_is_skipped_by_its_header(write_tar, side):
    dataset = Shards(write_tar("a.tar", pairs(1) | {"x.png": bomb(side), "x.txt": b"bomb"}))
    assert keys(dataset) == ["0000"]
    assert nonzero(dataset.skipped) == {"pixels": 1}


def test_pixel_cap_is_an_argument(write_tar):
    path = write_tar("a.tar", pairs(1) | {"x.png": encode(picture(0, 8, 9), "PNG"), "x.txt": b"wide"})
    assert keys(Shards(path, max_image_pixels=64)) == ["0000"]
    assert keys(Shards(path, max_image_pixels=72)) == ["0000", "x"]


def test_other_image_formats_are_not_opened(write_tar):
    """PostScript, for example, would start another program."""
    members = {"x.png": encode(picture(0), "PPM"), "x.txt": b"a", "y.jpg": encode(picture(0), "EPS"), "y.txt": b"b"}
    dataset = Shards(write_tar("a.tar", pairs(1) | members))
    assert keys(dataset) == ["0000"]
    assert nonzero(dataset.skipped) == {"image": 1, "format": 1}


def test_truncated_tar_gives_what_it_holds(write_tar):
    path = write_tar("a.tar", pairs(4))
    path.write_bytes(path.read_bytes()[: 512 * 9])  # in the middle of the third sample
    dataset = Shards([path, write_tar("b.tar", pairs(2, start=10))])
    assert keys(dataset) == ["0000", "0001", "0010", "0011"]
    assert sum(dataset.skipped.values()) >= 1


def test_samples_are_not_joined_across_shards(write_tar):
    first = write_tar("a.tar", {"x.png": encode(picture(0), "PNG")})
    second = write_tar("b.tar", {"x.txt": b"somebody else's caption"} | pairs(1))
    assert keys(Shards([first, second])) == ["0000"]


def test_nothing_is_unpickled(write_tar, tmp_path):
    flag = tmp_path / "ran"
    payload = f"cposix\nsystem\n(S'touch {flag}'\ntR.".encode()
    members = pairs(1)
    for suffix in ("pyd", "pkl", "pth", "cls", "json"):
        members[f"0000.{suffix}"] = payload
    assert keys(Shards(write_tar("a.tar", members))) == ["0000"]
    assert not flag.exists()


def test_pipe_is_refused_and_not_run(tmp_path):
    flag = tmp_path / "ran"
    for url in (f"pipe:touch {flag}", "http://example.org/a.tar", "ftp://example.org/a.tar"):
        with pytest.raises(ValueError, match="shards: got .*expected a local path or an address of s3://"):
            Shards(url)
    assert not flag.exists()


def test_shard_lists(write_tar, tmp_path):
    a, b, c = (write_tar(f"{name}-0.tar", pairs(1)) for name in "abc")
    assert expand_shards(f"{tmp_path}/{{a,b}}-0.tar::{c}") == [a, b, c]
    assert expand_shards([a, str(b)]) == [a, b]
    with pytest.raises(FileNotFoundError, match="missing.tar"):
        Shards(tmp_path / "missing.tar")
    with pytest.raises(ValueError, match="empty list"):
        Shards([])


def test_fewer_shards_than_workers(write_tar):
    paths = [write_tar(f"{i}.tar", pairs(3, start=10 * i)) for i in range(2)]
    dataset = Shards(paths)
    with pytest.warns(UserWarning, match="got 5 for 2 shard"):
        batches = loader(dataset, 2, workers=5)
    found = sorted(key for batch in batches for key in batch["key"])
    assert found == ["0000", "0001", "0002", "0010", "0011", "0012"]


def test_workers_count_together(write_tar):
    bad = [pairs(2, start=10 * i) | {f"bad{i}.jpg": b"", f"bad{i}.txt": b"x"} for i in range(2)]
    dataset = Shards([write_tar(f"{i}.tar", members) for i, members in enumerate(bad)])
    assert sum(len(batch["key"]) for batch in loader(dataset, 2, workers=2)) == 4
    assert dataset.skipped["image"] == 2


def test_order_depends_on_seed_and_epoch_alone(write_tar):
    paths = [write_tar(f"{i}.tar", pairs(10, start=10 * i)) for i in range(4)]

    def two_epochs(seed: int) -> list[str]:
        stream = iter(Shards(paths, shuffle=15, seed=seed, repeat=True))
        return [next(stream)["key"] for _ in range(80)]

    first = two_epochs(0)
    assert first == two_epochs(0)
    assert first != two_epochs(1)
    assert first[:40] != first[40:]
    assert sorted(first[:40]) == sorted(first[40:]) == sorted(keys(Shards(paths)))
    assert first[:40] != keys(Shards(paths))


def test_an_epoch_without_a_good_sample_stops(write_tar):
    path = write_tar("a.tar", {"a.jpg": b"no", "a.txt": b"x"})
    with pytest.raises(BadData, match=r"no usable sample in 1 shard\(s\) \(image 1\)"):
        next(iter(Shards(path, repeat=True)))
    with pytest.raises(BadData, match=r"no usable sample in 2 shard\(s\) \(image 2\)"):
        list(loader(Shards([path, path]), 4, workers=2))
    good = write_tar("b.tar", pairs(3))
    batches = loader(Shards([path, good]), 4, workers=2)
    assert [batch["key"] for batch in batches] == [["0000", "0001", "0002"]], "one worker had nothing good"
    assert len(list(whole := loader(Shards(good), 4))) == 1
    assert list(loader(Shards(good), 4, start=whole.state)) == [], "it had ended"


def test_names_that_are_not_unicode(write_tar):
    name = os.fsdecode(b"gr\xf6sse")
    (key,) = keys(Shards(write_tar("a.tar", {f"{name}.png": encode(picture(0), "PNG"), f"{name}.txt": b"x"})))
    assert key == "gr?sse"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_going_on_gives_what_would_have_followed(workers, resampled, write_tar):
    """Loading resumes exactly from any place of three epochs with bad samples, and decodes no earlier sample again."""
    paths = []
    for i in range(3):
        members = pairs(10, start=10 * i)
        members[f"{10 * i + 2 * i + 1:04d}.png"] = b"bad"
        paths.append(write_tar(f"{i}.tar", members))

    def go_on(start, count: int):
        dataset = Shards(paths, shuffle=5, seed=3, repeat=True, resampled=resampled)
        batches = loader(dataset, 4, workers=workers, start=start)
        keys, states = [], []
        for batch in itertools.islice(batches, count):
            keys.append(batch["key"])
            states.append(json.loads(json.dumps(batches.state)))
        return keys, states, dataset

    whole, states, first = go_on(None, 20)
    assert workers or first.skipped["image"] >= 5, "no bad sample to stumble over"
    for at in (1, 6, 13) if workers else (1, 2, 3, 6, 7, 8, 13, 19):
        keys, _, dataset = go_on(states[at - 1], 20 - at)
        assert keys == whole[at:]
        assert workers or dataset.seen + at * 4 <= first.seen
    with pytest.raises(ValueError, match=f"workers: got {3 - workers}, expected {workers} as in the run"):
        loader(Shards(paths, repeat=True, resampled=resampled), 4, workers=3 - workers, start=states[0])


def test_resampling_draws_shards_with_replacement(write_tar):
    paths = [write_tar(f"{i}.tar", pairs(1, start=i)) for i in range(6)]

    def epochs(**options) -> list[list[str]]:
        stream = iter(Shards(paths, repeat=True, resampled=True, **options))
        return [[next(stream)["key"] for _ in range(6)] for _ in range(30)]

    first = epochs()
    assert first == epochs() != epochs(seed=1)
    counts = Counter(sum(first, []))
    assert len(counts) == 6 and 12 < min(counts.values()) and max(counts.values()) < 55  # 30 on average
    assert any(len(set(epoch)) < 6 for epoch in first), "no repetition within an epoch"
    shares = [epochs(rank=rank, world=2) for rank in range(2)]
    assert shares[0] != shares[1]
    assert Shards(paths, repeat=True, resampled=True, world=9).most_workers > 6
    with pytest.raises(ValueError, match="resampled: got True without repeat"):
        Shards(paths, resampled=True)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_share_the_samples(world, tmp_path):
    """Processes share the shards, or the samples if there are fewer shards than processes."""
    write_scenes(tmp_path, "train", 30, seed=0, shard_size=10)
    paths = sorted(tmp_path.glob("*.tar"))
    shares = [[sample["key"] for sample in Shards(paths, rank=rank, world=world)] for rank in range(world)]
    assert sorted(sum(shares, [])) == [f"train-{i:06d}" for i in range(30)]
    assert all(shares)


def test_counting_reads_names_only(tmp_path, write_tar):
    write_scenes(tmp_path, "train", 30, seed=0, shard_size=10, masks=True)
    odd = write_tar(
        "odd.tar", {"a.jpg": b"-", "a.txt": b"-", "b.jpg": b"-", "c.txt": b"-", "d/a.PNG": b"", "d/a.txt": b""}
    )
    assert Shards(sorted(tmp_path.glob("train-*.tar"))).count() == 30
    assert Shards([odd, odd]).count() == 4


def test_counts_are_kept_beside_the_shards_while_they_hold(write_tar, tmp_path):
    paths = [write_tar(f"{i}.tar", pairs(3 + i)) for i in range(3)]
    sizes = tmp_path / "sizes.json"
    assert list(count_shards(paths).values()) == [3, 4, 5]
    assert json.loads(sizes.read_text()) == {"0.tar": 3, "1.tar": 4, "2.tar": 5}
    sizes.write_text('{"0.tar": 2, "1.tar": 900, "2.tar": "4", "other.tar": 7}')  # believed, impossible, believed
    assert list(count_shards(paths).values()) == [2, 4, 4]
    assert json.loads(sizes.read_text()) == {"0.tar": 2, "1.tar": 4, "2.tar": "4", "other.tar": 7}
    write_tar("0.tar", pairs(6))
    os.utime(paths[0], ns=(time.time_ns() + 10**9,) * 2)
    assert list(count_shards(paths).values()) == [6, 4, 4]
    sizes.write_text("[somebody else's]")
    assert list(count_shards(paths).values()) == [6, 4, 5]
    assert sizes.read_text() == "[somebody else's]"


def test_counts_where_nothing_can_be_written_or_read(write_tar, tmp_path, monkeypatch):
    path = write_tar("a.tar", pairs(4))
    path.write_bytes(path.read_bytes()[: 512 * 9])
    assert list(count_shards([path]).values()) == [2]
    assert not (tmp_path / "sizes.json").exists(), "the count of half a shard was kept"
    whole = write_tar("b.tar", pairs(2))

    def refuse(*_):
        raise PermissionError("read-only")  # a folder's mode would not stop root

    monkeypatch.setattr("pacl.data.shards.write_bytes", refuse)
    assert list(count_shards([whole]).values()) == [2]


def test_a_shard_that_vanishes_is_counted(write_tar):
    dataset = Shards([write_tar("a.tar", pairs(2)), gone := write_tar("b.tar", pairs(2))])
    gone.unlink()
    assert keys(dataset) == ["0000", "0001"]
    assert dataset.skipped["file"] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop(workers, write_tar):
    """Bad samples are counted over all workers: neither shard alone has the 500 samples that a stop needs."""
    paths = []
    for shard in range(2):
        members = {}
        for i in range(300):
            members |= {f"{i:04d}.jpg": b"-" if i % 4 == 0 else encode(picture(0)), f"{i:04d}.txt": b"x"}
        paths.append(write_tar(f"{shard}.tar", members))
    dataset = Shards(paths, repeat=True)
    with pytest.raises(BadData, match="samples of 2 .* are bad"):
        for _ in loader(dataset, 20, workers=workers):
            pass
    assert 500 <= dataset.seen <= 600
    assert re.fullmatch(
        r"1\d\d of 5\d\d samples of 2 shard\(s\) are bad \(image 1\d\d\); max_bad_share is 0.1", dataset.complaint()
    )
    allowed = Shards(paths, max_bad_share=0.3)
    assert sum(len(batch["key"]) for batch in loader(allowed, 20, workers=workers)) == 450
