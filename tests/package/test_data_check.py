"""`pacl data check` counts what is wrong with pairs, names examples, and exits with 3; else it finds nothing wrong."""

import json

from pacl.cli import main
from pacl.data.check import tokenizer_of
from pacl.data.scene_shards import write_scenes
from pictures import encode, picture

COUNT = 12


def write_folder(folder, count: int = COUNT):
    for i in range(count):
        (folder / f"{i:02d}.png").write_bytes(encode(picture(i, 16, 16), "PNG"))
        (folder / f"{i:02d}.txt").write_text(f"caption {i}\n")
    return folder


def report_of(capsys, *words) -> dict:
    """Run the command; return its report and check its exit status."""
    status = main(["data", "check", *map(str, words), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == (3 if report["problems"] else 0)
    return report


def test_check_finds_nothing_wrong(tmp_path, capsys):
    write_scenes(tmp_path, "train", 30, seed=0, shard_size=10)
    assert main(["data", "check", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pairs"] == report["decoded"] == 30 and report["shards"] == 3
    assert report["width"] == report["height"] == [64, 64, 64]
    assert report["bad"] == {} and report["problems"] == []
    assert main(["data", "check", str(tmp_path), "--sample", "6"]) == 0
    printed = capsys.readouterr().out
    assert (
        "pairs: 30 in 3 shard(s)\ndecoded: 6, with 6 captions\nwidth: 64 to 64, median 64\n" in printed
        and "no problems" in printed
    )


def test_check_names_what_is_wrong(tmp_path, capsys, write_tar):
    good = {}
    for i in range(4):
        good |= {f"{i}.png": encode(picture(i, 18 + i, 19), "PNG"), f"{i}.txt": b"one two"}
    write_tar("a.tar", good | {"5.jpg": b"bad", "5.txt": b"x"})
    cut = write_tar("b.tar", good)
    cut.write_bytes(cut.read_bytes()[: 512 * 14])
    (tmp_path / "sizes.json").write_text('{"a.tar": 7}')
    assert main(["data", "check", str(tmp_path), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["pairs"] == 5 + 2 and report["bad"] == {"archive": 1, "image": 1}
    assert (
        report["width"] == [19, 19, 19] and report["height"] == [18, 19, 21] and report["caption_length"] == [7, 7, 7]
    )
    assert {item["key"] for item in report["examples"]} == {"5", str(cut)}
    assert f"{tmp_path / 'a.tar'} holds 5 pairs, but sizes.json says 7" in report["problems"]
    assert f"{cut} cannot be read to its end; 2 pairs are readable" in report["problems"]
    assert main(["data", "check", str(tmp_path)]) == 3
    printed = capsys.readouterr().out
    assert "bad: 5: image: got a file of an unknown" in printed and "WRONG: " in printed
    assert (tmp_path / "sizes.json").read_text() == '{"a.tar": 7}', "checking changed what it checks"


def test_check_of_loose_files(tmp_path, capsys):
    folder = write_folder(tmp_path)
    (folder / "01.txt").write_text(" \n")
    (folder / "03.png").write_bytes(b"")
    for sample, decoded in ((0, COUNT), (5, 5), (1000, COUNT)):
        report = report_of(capsys, folder, f"--sample={sample}")
        assert report["pairs"] == COUNT and report["decoded"] == decoded and report["shards"] is None
    assert report["bad"] == {"image": 1, "caption": 1} and report["bad_share"] == 2 / COUNT
    found = {(item["key"], item["reason"]) for item in report["examples"]}
    assert found == {("01.png", "caption"), ("03.png", "image")}


def test_captions_that_the_text_tower_cuts(tmp_path, capsys):
    """One word of the vocabulary is one token, besides one at the beginning and one at the end."""
    folder = write_folder(tmp_path)
    (folder / "00.txt").write_text("dog " * 75)
    assert report_of(capsys, folder)["long"] == 0
    (folder / "00.txt").write_text("dog " * 76 + "\nshort\n" + "dog " * 300)
    report = report_of(capsys, folder)
    assert report["long"] == 2 and report["captions"] == COUNT + 2
    assert report["problems"] == [
        "2 captions longer than the 77 tokens that ViT-B-16 reads; the rest is cut: 00.png, 78 tokens; "
        "00.png, 302 tokens"
    ]
    assert main(["data", "check", str(folder), "--model", "no-such-model"]) == 1
    assert "model: got 'no-such-model', expected a model of open_clip" in capsys.readouterr().err


def test_the_model_decides_what_is_long(untrained):
    assert tokenizer_of(f"local-dir:{untrained / 'clip'}").context_length < 77


def test_repetitions_and_tiny_images(tmp_path, capsys):
    folder = write_folder(tmp_path)
    for copy, text in (("again", "caption 3"), ("said differently", "another caption"), ("twice", "one\none")):
        source = "05" if copy == "twice" else "03"
        (folder / f"{copy}.png").write_bytes((folder / f"{source}.png").read_bytes())
        (folder / f"{copy}.txt").write_text(text)
    (folder / "tiny.png").write_bytes(encode(picture(99, 4, 40), "PNG"))
    (folder / "tiny.txt").write_text("a speck")
    report = report_of(capsys, folder)
    assert (report["repeated"], report["small"]) == (3, 1)
    assert report["problems"] == [
        "1 images with a side below 16 pixels: tiny.png, 40 x 4",
        "3 images that are another's again, byte for byte: again.png is 03.png; said differently.png is 03.png; "
        "twice.png is 05.png",
        "2 pairs that occur again, image and caption: again.png is 03.png; twice.png is 05.png",
    ]


def test_images_and_texts_that_lack_the_other(tmp_path, capsys, write_tar):
    folder = write_folder(tmp_path)
    (folder / "00.txt").unlink()
    (folder / "orphan.txt").write_text("no image")
    report = report_of(capsys, folder)
    assert "images without a .txt: 1, the first is 00.png" in report["problems"]
    assert ".txt files without an image: 1, the first is orphan.txt" in report["problems"]
    notes = {"images": [{"id": i, "file_name": f"{i:02d}.png"} for i in range(3)]}
    notes["annotations"] = [{"image_id": i, "caption": f"text {i}"} for i in (1, 2, 7, 8)]
    (tmp_path / "notes.json").write_text(json.dumps(notes))
    problems = report_of(capsys, tmp_path / "notes.json")["problems"]
    assert problems == ["images without a caption, left out: 1", "captions without an image, left out: 2"]
    png = encode(picture(0, 16, 16), "PNG")
    path = write_tar("a.tar", {"a.png": png, "b.png": png, "b.txt": b"b", "c.txt": b"c", "d.heic": b"-", "d.txt": b"d"})
    report = report_of(capsys, path)
    assert f"{path} has members that make no sample: caption 1, image 1" in report["problems"]
    assert report["pairs"] == 2 and report["bad"] == {"image": 2, "caption": 1}


def test_a_list_that_is_badly_quoted(tmp_path, capsys):
    folder = write_folder(tmp_path)
    rows = [f"{i:02d}.png,{text}" for i, text in enumerate(["a dog, a cat", '"a dog", a cat', "a bird"])]
    (folder / "pairs.csv").write_text("\n".join(["filepath,title", *rows]) + "\n")
    report = report_of(capsys, folder / "pairs.csv")
    assert report["bad"] == {"row": 1} and report["pairs"] == 3
    assert report["examples"] == [{"key": "line 3", "reason": "row", "error": "line 3 has 3 fields, expected 2"}]
    assert "rows with separators that are not quoted, taken for a part of the caption: 1" in report["problems"]
