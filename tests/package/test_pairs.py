"""Pairs in loose files: each format gives the same samples, reads only its own folder, and can be packed."""

import csv
import json
import os
import re
from collections import Counter

import numpy as np
import pytest
import torch
from pacl.cli import main
from pacl.data.pack import pack
from pacl.data.pairs import CocoPairs, CsvPairs, FolderPairs, ScenePairs, below
from pacl.data.samples import BadData, loader
from pacl.data.scene_shards import write_scenes
from pacl.data.shards import Shards
from pacl.data.sources import open_pairs
from pictures import encode, nonzero, picture
from PIL import Image

COUNT = 12


def write_images(folder, count: int = COUNT):
    """Write `count` images into two folders of `folder`; return their relative names and captions."""
    names = []
    for i in range(count):
        path = folder / ("a" if i % 2 else "b/c") / (f"{i:02d}." + ("jpg", "png", "webp", "JPEG")[i % 4])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(i), ("JPEG", "PNG", "WEBP", "JPEG")[i % 4]))
        names.append(path.relative_to(folder).as_posix())
    return names, [f'größe {i}, "quoted" and\ttabbed' for i in range(count)]


def write_csv(folder, name: str = "pairs.csv", separator: str = ","):
    names, captions = write_images(folder)
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=separator)
        rows.writerows([("extra", "title", "filepath"), *zip("x" * COUNT, captions, names, strict=True)])
    return folder / name


def write_folder(folder):
    for name, caption in zip(*write_images(folder), strict=True):
        (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def write_coco(folder, several: int = 1):
    names, captions = write_images(folder / "train2017")
    images = [{"id": 100 - i, "file_name": name} for i, name in enumerate(names)]
    notes = [
        {"image_id": 100 - i, "caption": text if k == 0 else f"{text} {k}"}
        for k in range(several)
        for i, text in enumerate(captions)
    ]
    path = folder / "annotations/captions_train2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    return path


WRITERS = {"csv": write_csv, "folder": write_folder, "coco": write_coco}


def by_caption(samples) -> dict:
    return {sample["caption"]: sample["image"] for sample in samples}


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_same_samples(form, tmp_path):
    source = open_pairs(WRITERS[form](tmp_path))
    samples = list(source)
    names, captions = write_images(tmp_path / "again")
    assert sorted(sample["caption"] for sample in samples) == sorted(captions)
    found = by_caption(samples)
    for name, caption in zip(names, captions, strict=True):
        exact = np.array(Image.open(tmp_path / "again" / name).convert("RGB"))
        assert torch.equal(found[caption], torch.from_numpy(exact).permute(2, 0, 1))
    assert sorted(sample["key"] for sample in samples) == sorted(names)
    assert source.count() == source.seen == COUNT and not any(source.skipped.values())


@pytest.mark.parametrize("workers, rank, world", [(0, 0, 1), (3, 0, 1), (2, 1, 2)])
def test_going_on_decodes_nothing_again(workers, rank, world, tmp_path):
    folder = write_folder(tmp_path)
    for name in ("a/03.JPEG", "b/c/06.webp"):
        (folder / name).write_bytes(b"bad")

    def go_on(start, count: int):
        dataset = open_pairs(folder, shuffle=1, seed=3, repeat=True, rank=rank, world=world)
        batches, keys, states = loader(dataset, 3, workers=workers, start=start), [], []
        for batch, _ in zip(batches, range(count), strict=False):
            keys.append(batch["key"])
            states.append(json.loads(json.dumps(batches.state)))
        return keys, states, dataset

    whole, states, first = go_on(None, 9)
    assert workers or first.skipped["image"] >= 2
    for at in (1, 4, 7):
        keys, _, dataset = go_on(states[at - 1], 9 - at)
        assert keys == whole[at:]
        assert workers or dataset.seen <= first.seen - 3 * at


@pytest.mark.parametrize("workers, world", [(1, 1), (3, 1), (2, 2), (1, 3)])
def test_an_epoch_is_a_permutation_of_all(workers, world, tmp_path):
    folder = write_folder(tmp_path)
    sources = [FolderPairs(folder, shuffle=1, seed=5, rank=rank, world=world) for rank in range(world)]
    epochs = [
        [[raw.key for raw in x.undecoded(epoch, worker, workers)] for x in sources for worker in range(workers)]
        for epoch in range(2)
    ]
    assert all(len(set(sum(epoch, []))) == COUNT == sum(map(len, epoch)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert sources[0].most_workers == COUNT // world


def test_csv_columns_and_separators(tmp_path, capsys):
    commas, tabs = write_csv(tmp_path), write_csv(tmp_path, "pairs.tsv", "\t")
    expected = by_caption(CsvPairs(commas))
    for options in ({}, {"csv_separator": "\\t"}, {"csv_separator": "\t"}):  # shells pass these two characters
        assert by_caption(open_pairs(tabs, **options)).keys() == expected.keys()
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(commas.read_text(encoding="utf-8").replace("title,filepath", "text,path"), encoding="utf-8-sig")
    assert by_caption(open_pairs(renamed, csv_img_key="path", csv_caption_key="text")).keys() == expected.keys()
    with pytest.raises(
        ValueError, match="got 'filepath' and 'title', expected columns of .*, but it has the columns extra, text, path"
    ):
        CsvPairs(renamed)
    with pytest.raises(ValueError, match="expected columns of .*; give --csv-separator ','"):
        CsvPairs(commas, separator=";")
    for separator in ("", "::"):
        with pytest.raises(ValueError, match=f"csv_separator: got '{separator}', expected one character"):
            CsvPairs(commas, separator=separator)


def test_csv_rows_that_are_bad(tmp_path):
    names, _ = write_images(tmp_path)
    (tmp_path / "long.csv").write_text(f"filepath,title\n{names[0]},{'x' * 70_000}\n{names[0]},short\n")
    assert [sample["caption"] for sample in open_pairs(tmp_path / "long.csv")] == ["short"]
    lines = [
        f"{names[0]},good",
        f"{names[1]},",
        f"{names[2]}",
        "missing.jpg,x",
        ",x",
        "",
        f"./a/../{names[3]},also good",
    ]
    data = b"filepath,title\n" + "\n".join(lines).encode() + f"\n{names[4]},".encode() + b"\xff\xfe\n"
    (tmp_path / "pairs.csv").write_bytes(data)
    source = open_pairs(tmp_path / "pairs.csv")
    assert [sample["caption"] for sample in source] == ["good", "also good"]
    assert nonzero(source.skipped) == {"row": 1, "file": 2, "caption": 2}


@pytest.mark.parametrize("form", ["csv", "coco"])
def test_nothing_outside_the_folder_is_read(form, tmp_path):
    """No name leads outside: not `..`, an absolute path or a folder with the same prefix. A pipe is skipped."""
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jpg").write_bytes(encode(picture(0)))
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2/secret.jpg").write_bytes(encode(picture(0)))
    (tmp_path / "data/good.jpg").write_bytes(encode(picture(0)))
    os.mkfifo(tmp_path / "data/pipe.jpg")
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "x/../../secret.jpg", "../data2/secret.jpg", "pipe.jpg"]
    names += [".", "..", "good.jpg/", "bad\0name.jpg"][: 4 if form == "coco" else 3]
    inside = ["good.jpg", str(tmp_path / "data/good.jpg")]
    path = tmp_path / "data" / ("pairs.csv" if form == "csv" else "captions.json")
    if form == "csv":
        path.write_text("filepath,title\n" + "\n".join(f"{name},x" for name in [*names, *inside]) + "\n")
    else:
        images = [{"id": i, "file_name": name} for i, name in enumerate([*names, *inside])]
        notes = [{"image_id": i, "caption": "x"} for i in range(len(images))]
        path.write_text(json.dumps({"images": images, "annotations": notes}))
    source = open_pairs(path)
    found = [sample["key"] for sample in source]
    assert [key for key in found if key != "good.jpg/"] == inside
    assert source.skipped["file"] == len(names) - ("good.jpg/" in found)
    moved = open_pairs(path, image_root=tmp_path)
    assert [sample["key"] for sample in moved if "secret" in sample["key"]] == [str(tmp_path / "secret.jpg")]


def test_below():
    for name in ("a.jpg", "a/b.jpg", "a/../b.jpg", "..a/b.jpg", "/data/x.jpg"):
        assert str(below("/data", name)).startswith("/data/"), name
    for name in ("", "..", ".", "../a", "/etc/passwd", "/data/../etc", "/database/x", "a/../../b", "\0"):
        assert isinstance(below("/data", name), str), name


def test_folder_masks_and_what_it_leaves_out(tmp_path):
    folder = write_folder(tmp_path)
    (folder / ".hidden").mkdir()
    for name in (".hidden/x.jpg", ".y.jpg", "z.ppm", "mask.txt"):
        (folder / name).write_bytes(b"-")
    (folder / "a/01.mask.png").write_bytes(encode(picture(0)[:, :, 0].copy(), "PNG"))
    (folder / "b/c/00.txt").unlink()
    source = open_pairs(folder)
    assert len(source) == COUNT and len(list(source)) == COUNT - 1 and source.skipped["caption"] == 1
    (sample,) = open_pairs(folder, masks=True)
    assert torch.equal(sample["mask"], torch.from_numpy(picture(0)[:, :, 0].copy()))
    (folder / "b/around").symlink_to(folder), (folder / "b/again").symlink_to(folder / "a")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "here").symlink_to(folder)
    assert len(open_pairs(folder)) == len(open_pairs(linked)) == COUNT, "every folder once, links too"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        open_pairs(tmp_path / "empty")


def test_captions_of_an_image_take_turns(tmp_path):
    source = CocoPairs(write_coco(tmp_path, several=3), shuffle=1, seed=1)

    def drawn(epoch: int, worker: int = 0, workers: int = 1) -> dict[str, str]:
        samples = [source.decode(raw) for raw in source.undecoded(epoch, worker, workers)]
        return {sample["key"]: sample["caption"] for sample in samples}

    chosen = {epoch: drawn(epoch) for epoch in range(30)}
    again = drawn(7, 0, 3) | drawn(7, 1, 3) | drawn(7, 2, 3)
    assert again == chosen[7], "the turn depends on the worker"
    for key in chosen[0]:
        counts = Counter(epoch[key] for epoch in chosen.values())
        assert len(counts) == 3 and min(counts.values()) >= 2
    assert all(not text.endswith((" 1", " 2")) for text in by_caption(CocoPairs(source.name)))


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"images": [3], "annotations": []}', "[" * 100_000])
def test_other_json_is_no_coco(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json is not COCO captions"):
        open_pairs(tmp_path / "x.json")


def test_half_a_surrogate_is_a_bad_sample(tmp_path):
    (tmp_path / "good.jpg").write_bytes(encode(picture(0)))
    notes = [{"image_id": i, "caption": text} for i, text in enumerate(["\ud800", "good"])]
    images = [{"id": i, "file_name": "good.jpg"} for i in range(2)]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": notes}))
    source = open_pairs(tmp_path / "x.json")
    assert [sample["caption"] for sample in source] == ["good"] and source.skipped["caption"] == 1


def test_scenes_are_those_that_are_written(tmp_path):
    write_scenes(tmp_path, "eval", 5, seed=0, masks=True)
    source = open_pairs("synthetic:eval", scenes=5, masks=True, seed=9)
    for drawn, written in zip(source, open_pairs(tmp_path, masks=True), strict=True):
        assert drawn["key"] == written["key"] and drawn["caption"] == written["caption"]
        assert torch.equal(drawn["image"], written["image"]) and torch.equal(drawn["mask"], written["mask"])
    assert open_pairs("synthetic").count() == 10_000


def test_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_csv(tmp_path)
    write_scenes(tmp_path / "shards", "train", 3, seed=0)
    assert isinstance(open_pairs("shards"), Shards) and isinstance(open_pairs("shards/train-000.tar"), Shards)
    assert isinstance(open_pairs(table), CsvPairs) and isinstance(open_pairs("synthetic"), ScenePairs)
    table.rename("no_suffix")
    assert isinstance(open_pairs("no_suffix", kind="csv"), CsvPairs)
    for location, options, message in (
        ("missing.csv", {}, "data: 'missing.csv' is not a file, expected a csv file"),
        ("missing", {"kind": "folder"}, "data: 'missing' is not a folder"),
        ("missing", {}, "shards: 'missing' is not a file"),
        ("synthetic:test", {}, "expected synthetic, synthetic:train, synthetic:eval"),
        ("no_suffix", {"kind": "parquet"}, "dataset_type: got 'parquet', expected one of auto, webdataset"),
        ("no_suffix", {"kind": "csv", "masks": True}, "masks: got True for a csv"),
        ("no_suffix", {"kind": "csv", "image_root": "missing"}, "image_root: 'missing' is not a folder"),
        ("synthetic", {"resampled": True}, "dataset_resampled: got True for synthetic"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            open_pairs(location, **options)


def test_too_many_missing_files_stop(tmp_path):
    (name, *_), _ = write_images(tmp_path, 1)
    names = [f"missing{i}.jpg" if i % 5 == 0 else f"{i}.jpg" for i in range(600)]
    for i in range(600):
        os.link(tmp_path / name, tmp_path / f"{i}.jpg")
    rows = "".join(f"{name},x\n" for name in names)
    (tmp_path / "pairs.csv").write_text("filepath,title\n" + rows)
    source = open_pairs(tmp_path / "pairs.csv")
    with pytest.raises(BadData, match=r"101 of 501 samples of .*pairs.csv are bad \(file 101\); max_bad_share is 0.1"):
        list(source)


# pacl data


@pytest.mark.parametrize("form", [*WRITERS, "shards", "synthetic"])
def test_packed_shards_hold_the_same_bytes(form, tmp_path, capsys, write_tar):
    if form == "shards":
        members = {}
        for i in range(COUNT):
            members |= {f"{i}.png": encode(picture(i), "PNG"), f"{i}.txt": f"caption {i}".encode(), f"{i}.pkl": b"-"}
        location = write_tar("source.tar", members)
    else:
        (tmp_path / "source").mkdir()
        location = "synthetic" if form == "synthetic" else WRITERS[form](tmp_path / "source")
    options = ["--scenes", str(COUNT)] if form == "synthetic" else []
    assert main(["data", "pack", str(location), "--out", str(tmp_path / "out"), "--shard-size", "5", *options]) == 0
    assert "packed 12 pairs in 3 shard(s)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/sizes.json").read_text()) == {"00000.tar": 4, "00001.tar": 4, "00002.tar": 4}
    source, packed = open_pairs(location, scenes=COUNT), open_pairs(tmp_path / "out")

    def contents(source) -> list:
        images = [
            raw.image if isinstance(raw.image, bytes) else raw.image.read_bytes() for raw in source.undecoded(0, 0, 1)
        ]
        return list(zip(images, [sample["caption"] for sample in source], strict=True))

    assert contents(packed) == contents(source) and packed.count() == COUNT
    assert {raw.key for raw in packed.undecoded(0, 0, 1)} == {f"{i:09d}" for i in range(COUNT)}
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir())
    again = ["data", "pack", str(location), "--out", str(tmp_path / "out"), *options]
    assert main([*again, "--shard-size", "5"]) == 0
    assert main(again) == 1
    assert (
        "out was begun with another shard_size (5, now 10000), expected the same or another folder"
        in capsys.readouterr().err
    )
    (tmp_path / "out/packed.json").rename(tmp_path / "packed.json")  # shards of anyone else
    assert main(again) == 1
    assert "out has shards already, expected a folder without any" in capsys.readouterr().err
    (tmp_path / "packed.json").rename(tmp_path / "out/packed.json")
    assert before == sorted(path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("counted, sizes, good", [(10, [3, 3, 2, 2], [3, 2, 1]), (5, [3, 7], [3, 3])])
def test_no_shard_is_left_with_a_few(counted, sizes, good, tmp_path, write_tar):
    """Shards are of equal size, less their bad samples; the last one takes those that the source does not count."""
    members = {}
    for i in range(10):
        members |= {f"{i}.png": encode(picture(i), "PNG"), f"{i}.txt": b"a caption"}
    source = write_tar("source.tar", members)
    (tmp_path / "sizes.json").write_text(json.dumps({"source.tar": counted}))
    assert list(pack(Shards(source), tmp_path / "good", shard_size=3).values()) == sizes
    source = write_tar("source.tar", members | {f"{i}.png": b"bad" for i in (3, 4, 5, 9)})
    (tmp_path / "sizes.json").write_text(json.dumps({"source.tar": counted}))
    assert list(pack(Shards(source, max_bad_share=1.0), tmp_path / "bad", shard_size=3).values()) == good


@pytest.mark.parametrize("packed", [False, True])
def test_all_captions_of_an_image_are_a_list(tmp_path, packed):
    """`captions="all"` gives a list of all non-empty captions; the source itself still gives one per image."""
    (tmp_path / "a.png").write_bytes(encode(picture(0), "PNG"))
    (tmp_path / "b.png").write_bytes(encode(picture(1), "PNG"))
    said = {"a.png": [" one\0two ", "", "three"], "b.png": ["four"]}
    images = [{"id": i, "file_name": name} for i, name in enumerate(said)]
    notes = [{"image_id": i, "caption": text} for i, texts in enumerate(said.values()) for text in texts]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    if packed:
        pack(CocoPairs(path), tmp_path / "shards")
        path = tmp_path / "shards"
    source = open_pairs(path)
    (batch,) = loader(source.with_options(captions="all"), 2)
    assert batch["captions"] == [["one\0two", "three"], ["four"]]
    assert [sample["caption"] for sample in source] == ["one\0two", "four"]


def test_packing_keeps_all_captions_and_skips_bad_samples(tmp_path, capsys):
    path = write_coco(tmp_path, several=3)
    (tmp_path / "train2017/a/01.png").write_bytes(b"bad")
    assert main(["data", "pack", str(path), "--out", str(tmp_path / "out"), "--shuffle"]) == 3
    printed = capsys.readouterr().out
    assert "bad: a/01.png: image: got a file of an unknown or damaged format, expected JPEG" in printed
    assert "packed 11 pairs in 1 shard(s)" in printed and "skipped: image 1" in printed
    packed = Shards(tmp_path / "out/00000.tar", shuffle=1)
    raws = {raw.key: raw.captions for raw in packed.undecoded(0, 0, 1)}
    original = sorted(list(raw.captions) for raw in CocoPairs(path).undecoded(0, 0, 1) if raw.key != "a/01.png")
    assert sorted(raws.values()) == original
    chosen = [[packed.decode(raw) for raw in packed.undecoded(epoch, 0, 1)] for epoch in range(20)]
    drawn = {
        key: {sample["caption"].encode() for epoch in chosen for sample in epoch if sample["key"] == key}
        for key in raws
    }
    assert all(drawn[key] == {text.strip() for text in raws[key]} for key in raws)


def test_packing_masks(tmp_path):
    pack(open_pairs("synthetic:eval", scenes=3, masks=True), tmp_path)
    for a, b in zip(open_pairs(tmp_path, masks=True), open_pairs("synthetic:eval", scenes=3, masks=True), strict=True):
        assert torch.equal(a["mask"], b["mask"])


def test_data_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"-")
    (tmp_path / "bad.txt").write_bytes(b"x")
    for words, message in (
        (["check", "missing.csv"], "data: 'missing.csv' is not a file"),
        (["check", "pipe:touch x"], "expected a local path or an address of s3:"),
        (["check", str(tmp_path), "--sample", "-1"], "sample: got -1, expected at least 0"),
        (["pack", str(tmp_path), "--out", str(tmp_path / "out")], f"no usable sample in {tmp_path} (image 1)"),
        (["pack", str(tmp_path), "--out", str(tmp_path / "o"), "--shard-size", "0"], "shard_size: got 0"),
    ):
        assert main(["data", *words]) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("pacl: error: ") and message in error and "\n" not in error
