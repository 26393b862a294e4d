"""A sample is one image with one or more captions, in every form of data; all that is left out is counted by reason."""

import io
import tarfile

import numpy as np
import pytest
import torch
from pacl.cli import main
from pacl.data.members import group_members, split_name
from pacl.data.pack import pack
from pacl.data.shards import Shards, count_shards
from pacl.data.sources import open_pairs
from pacl.data.tables import read_rows
from pacl.evaluate.metrics import Retrieval
from pacl.evaluate.retrieval import read_gallery, retrieval
from pacl.evaluate.scorer import Scorer
from pacl.sharing import load_pacl
from pictures import encode, nonzero, picture
from running import lines, train
from webdataset import TarWriter

PNG = encode(picture(0), "PNG")


def contents(path, **options) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Return the captions of each sample, and the counts of what was skipped."""
    data = open_pairs(path, **options)
    samples = list(data.with_options(captions="all", max_bad_share=1.0))
    return {sample["key"]: sample["captions"] for sample in samples}, nonzero(data.skipped)


# Tables


def rows(text: str, separator: str = ",", header=("filepath", "title"), places=(0, 1)) -> list:
    """Return the values of each row, or the number of its line if it is bad."""
    found = read_rows(io.StringIO(text, newline=""), separator, header, *places)
    return [row.line if row.values is None else row.values for row in found]


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize(
    "caption",
    [
        '"Sunset" over the bay',
        '"Sunset over the bay',
        'a 12" record',
        'the "best',
        '"',
        '""a',
        '"a" "b"',
        'ends with "',
    ],
)
def test_an_odd_quote_is_a_character(separator, caption):
    lines = [f"{i}.jpg{separator}text {i}" for i in range(6)]
    lines[1] = f"1.jpg{separator}{caption}"
    lines[4] = f'4.jpg{separator}a pipe of 3"'  # this quote could close the first one
    expected = [tuple(line.split(separator)) for line in lines]
    assert rows("\n".join(lines), separator) == expected
    turned = [separator.join(reversed(line)) for line in expected]
    assert rows("\n".join(turned), separator, places=(1, 0)) == expected


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quoted_fields_hold_anything(separator, end):
    text = f'"say ""hi""{separator} and{end}go{end}away"{separator}"a,1.jpg"{end}{end}plain{separator}2.jpg{end}'
    expected = [("a,1.jpg", f'say "hi"{separator} and\ngo\naway'), ("2.jpg", "plain")]
    assert rows(text, separator, ("title", "filepath"), (1, 0)) == expected


def test_rows_of_another_length_are_bad():
    header = ("filepath", "title", "size")
    text = '1.jpg,a\n2.jpg,a dog, a cat,5\n3.jpg,a,5\n4.jpg,"a dog, a cat",5\n\n6.jpg,"a\nb"\n8.jpg,c,5\n'
    expected = [2, 3, ("3.jpg", "a"), ("4.jpg", "a dog, a cat"), 7, 8, ("8.jpg", "c")]
    assert rows(text, header=header) == expected
    assert rows("1.jpg,a dog, a cat\n2.jpg\n") == [("1.jpg", "a dog, a cat"), 3]


def test_rows_are_counted_and_no_field_is_too_long(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(PNG)
    text = f'filepath,title,size\n0.png,a\n1.png,b,1\n2.png,"{"x" * 200_000}",2\n3.png,c\0d,3\n'
    (tmp_path / "pairs.csv").write_text(text)
    found = contents(tmp_path / "pairs.csv")
    assert found == ({"1.png": ["b"], "3.png": ["c\0d"]}, {"row": 1, "caption": 1})


# Several captions of an image


def test_one_image_in_many_rows_or_annotations_is_one_sample(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(PNG)
    said = [("a.png", "one"), ("b.png", "two"), ("a.png", "three"), ("c.png", ""), ("a.png", " "), ("b.png", "two")]
    (tmp_path / "pairs.csv").write_text("filepath,title\n" + "".join(f"{name},{text}\n" for name, text in said))
    images, skipped = contents(tmp_path / "pairs.csv")
    assert images == {"a.png": ["one", "three"], "b.png": ["two", "two"]}
    assert list(images) == ["a.png", "b.png"] and skipped == {"caption": 2}
    assert open_pairs(tmp_path / "pairs.csv").count() == 3


@pytest.mark.parametrize("form", ["folder", "shard"])
def test_lines_of_a_text_are_captions(form, tmp_path, write_tar):
    """clip-benchmark's retrieval shards hold the captions of an image like this."""
    text = "\ufeffone\r\n\n two \nthree".encode()
    if form == "shard":
        path = write_tar("a.tar", {"x.png": PNG, "x.txt": text})
    else:
        path = tmp_path
        (tmp_path / "x.png").write_bytes(PNG), (tmp_path / "x.txt").write_bytes(text)
    assert list(contents(path)[0].values()) == [["one", "two", "three"]]
    data = open_pairs(path, shuffle=1)
    drawn = {data.decode(raw)["caption"] for epoch in range(20) for raw in data.undecoded(epoch, 0, 1)}
    assert drawn == {"one", "two", "three"}


def test_packing_keeps_captions_apart(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG), (tmp_path / "b.png").write_bytes(PNG)
    (tmp_path / "pairs.csv").write_text('filepath,title\na.png,"two\nlines"\nb.png,x\nb.png,y\n')
    pack(open_pairs(tmp_path / "pairs.csv"), tmp_path / "out")
    assert list(contents(tmp_path / "out")[0].values()) == [["two\nlines"], ["x", "y"]]


def test_the_loss_takes_the_first_caption_and_recalls_take_all():
    """With several captions the recalls are those of a matrix with all, and the loss that of the first ones."""
    torch.manual_seed(0)
    owners = [0, 0, 1, 2, 2, 2, 3]
    first = [owners.index(i) for i in range(4)]
    phi = torch.randn(4, 7)
    captions = [f"text {i}" for i in range(7)]
    for bias in (None, -3.0):
        every = Retrieval(captions, 2.0, bias, torch.device("cpu"), owners)
        one = Retrieval([captions[i] for i in first], 2.0, bias, torch.device("cpu"))
        recalls = Retrieval(captions, None, None, torch.device("cpu"), owners)
        for at in (0, 2):
            every.update(phi[at : at + 2], at), recalls.update(phi[at : at + 2], at)
            one.update(phi[at : at + 2, first], at)
        found = every.values()
        assert found.pop("clip_val_loss") == pytest.approx(one.values()["clip_val_loss"], rel=1e-6)
        assert found == recalls.values()


def test_validation_counts_all_captions(run_world, tmp_path, write_tar):
    """The recalls of a run are those of `pacl evaluate retrieval` with the embedder that it writes."""
    members = {}
    for i, sample in enumerate(Shards(run_world / "scenes/eval-000.tar")):
        image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
        members[f"{i}.png"] = encode(image, "PNG")
        members[f"{i}.txt"] = f"{sample['caption']}\na picture with the number {i}".encode()
    path = write_tar("many.tar", members)
    assert train(run_world, tmp_path, val_data=path, max_steps=1) == 0
    found = lines(tmp_path / "pacl/results.jsonl")[0]
    towers, embedder = load_pacl(tmp_path / "pacl/embedder")
    data = open_pairs(path, transform=towers.transform)
    gallery = read_gallery(data)
    assert (gallery.images, len(gallery.captions)) == (20, 40)
    expected = retrieval(data, gallery, Scorer(towers, embedder))
    assert {name: found[name] for name in expected} == expected


# Names in shards


def test_names():
    for name, expected in {
        "a/b.jpg": ("a/b", "jpg"),
        "img1.v2.JPG": ("img1.v2", "jpg"),
        "2024.01.31 10.30.tar.png": ("2024.01.31 10.30.tar", "png"),
        "a.b/c.mask.png": ("a.b/c", "mask.png"),
        "x.seg.npy": None,
        "a/.hidden.jpg": None,
        "jpg": None,
    }.items():
        assert split_name(name) == expected, name


@pytest.mark.parametrize(
    "names",
    [
        ["img1.jpg", "img1.txt", "img1.v2.jpg", "img1.v2.txt"],
        ["img1.jpg", "img1.v2.jpg", "img1.txt", "img1.v2.txt"],
        ["img1.v2.jpg", "img1.v2.txt", "img1.jpg", "img1.txt"],
        [f"2024.01.{i:02d}.{suffix}" for i in range(30) for suffix in ("jpg", "txt")],
        [f"shot.{i}.{suffix}" for i in range(3) for suffix in ("jpg", "json", "npy", "txt")],
    ],
)
def test_dots_in_names_do_not_merge_samples(names):
    groups = list(group_members((name, name.encode()) for name in names))
    assert {group.key for group in groups} == {name.rpartition(".")[0] for name in names}
    for group in groups:
        assert group.fault is None
        assert {group.parts["jpg"], group.parts["txt"]} == {f"{group.key}.{x}".encode() for x in ("jpg", "txt")}


def test_shards_of_webdataset_are_read_as_before(tmp_path):
    """Members with more extensions belong to their sample, wherever they sort: before, within or after it."""
    with TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for i in range(12):
            extra = {name: PNG for name in ("depth.png", "seg.png", "z.png")} | {"cls": b"1", "note.txt": b"no caption"}
            tar.write({"__key__": f"d/{i:02d}", "jpg": encode(picture(i)), "txt": f"text {i}".encode(), **extra})
    images, skipped = contents(tmp_path)
    assert images == {f"d/{i:02d}": [f"text {i}"] for i in range(12)} and not skipped
    assert list(count_shards([tmp_path / "a.tar"]).values()) == [12]


def test_image_and_text_that_are_apart_are_named(write_tar, capsys):
    names = [f"{x}.{suffix}" for suffix in ("png", "txt") for x in "abc"]
    path = write_tar("a.tar", {name: PNG for name in names} | {"d.png": PNG, "d.txt": b"fine", "e.png": PNG})
    assert contents(path) == ({"d": ["fine"]}, {"caption": 1, "apart": 3})
    assert list(count_shards([path]).values()) == [1]
    assert main(["data", "check", str(path)]) == 3
    said = "bad: a: apart: got image and text that are not adjacent, expected them one after the other (sort the names)"
    assert said in capsys.readouterr().out


def test_a_second_member_of_a_name_is_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("a.png", PNG), ("a.png", PNG), ("a.txt", b"text")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert contents(tmp_path / "a.tar") == ({"a": ["text"]}, {"archive": 1})


# Other forms


@pytest.mark.parametrize("name", ["captions.txt", "metadata.jsonl", "pairs.parquet", "photo.jpg", "notes.md"])
def test_other_forms_are_named(name, tmp_path, run_world, capsys):
    (tmp_path / name).write_bytes(b"a.jpg\ta dog\n")
    assert train(run_world, tmp_path / "logs", train_data=tmp_path / name) == 1
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert error.startswith(f"pacl: error: data: got '{tmp_path / name}', ")
    assert "expected shards (.tar), a folder of images with .txt files, a .csv or .tsv, or COCO's captions" in error
    assert ("pandas.read_" in error) == (name in ("metadata.jsonl", "pairs.parquet"))
