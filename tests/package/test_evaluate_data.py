"""Datasets are read from small copies of their layouts."""

import json
import re

import numpy as np
import pytest
from miniature import ADE, COCO, IDS, LAYOUTS, VOC, encode_rle, mask, save, write
from pacl.evaluate.segmentation_check import check_segmentation
from pacl.evaluate.segmentation_data import SegmentationData, decode_rle
from pacl.evaluate.specs import IGNORED, datasets, fingerprint, protocol, spec
from pacl.segment.images import read_image
from pacl.segment.prompts import read_classes
from PIL import Image

NAMED = dict(zip(IDS, LAYOUTS, strict=True))


def load(name, root, **settings):
    return SegmentationData(name, root, **{"partial": True, **settings})


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_every_layout_gives_the_official_names(layout, tmp_path):
    name, folder, _, masks, _, names, meaning = layout
    truth = write(tmp_path / "data", layout)
    hidden = tmp_path / "data" / folder / layout[2].format(names[0])
    (hidden.parent / f"._{hidden.name}").write_bytes(b"left by an archive")
    for root in {tmp_path / "data", tmp_path / "data" / folder}:  # the parent folder and the dataset's own
        data = load(name, root)
        assert data.names == sorted(names) and data.missing == []
        assert data.layout == masks.replace("{}", "*/*" if name == "cityscapes" else "*")
        for i, image_name in enumerate(data.names):
            image, labels = data[i]
            assert image.mode == "RGB" and (image.height, image.width) == labels.shape
            assert labels.dtype == np.int16
            for value, expected in meaning.items():
                found = set(labels[truth[image_name] == value].tolist())
                assert {None if k == IGNORED else data.classes[k] for k in found} <= {expected}
                assert found or value not in truth[image_name]


def test_class_lists():
    counts = {"voc21": 21, "context60": 60, "object81": 81, "voc20": 20, "cityscapes": 19, "context59": 59}
    counts |= {"ade150": 150, "stuff171": 171, "stuff27": 27, "ade847": 847}
    assert {name: len(spec(name).classes) for name in datasets()} == counts
    for name in datasets():
        classes = spec(name).classes
        assert len(set(classes)) == len(classes) and all(x == x.strip() for x in classes)
        assert spec(name).background == (classes[:1] == ("background",))
        for masks in spec(name).masks:  # every label has a value
            labels = np.unique(masks.table[masks.table >= 0]).tolist()
            assert labels == list(range(counts[name]))
    # The only gaps between 0 and 181 are COCO's 11 unused numbers.
    raw = next(x.table for x in spec("stuff171").masks if x.path == "annotations/val2017/*.png")
    assert [v for v in range(182) if raw[v] < 0] == [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]


def test_run_lengths_are_coco_s():
    region = np.zeros((40, 30), bool)
    region[5:35, 3:20] = True
    region[10:12, 6:9] = False
    counts = "m3n0:0000WOHb08^OHb08^OHb08700000000000000000000[<"  # pycocotools 2.0.11
    assert encode_rle(region) == counts
    assert np.array_equal(decode_rle(counts, 40, 30), region)
    with pytest.raises(ValueError, match="do not make 40 x 31"):
        decode_rle(counts, 40, 31)


@pytest.mark.parametrize("name", datasets())
def test_missing_data_is_one_clear_line(name, tmp_path):
    for root in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            load(name, root)
        message = str(error.value)
        assert "\n" not in message
        assert spec(name).source in message and spec(name).images[0] in message and spec(name).masks[0].path in message


def test_images_without_masks_and_masks_without_images(tmp_path):
    write(tmp_path, NAMED["ade150 {}.png"])
    folder = tmp_path / "ade/ADEChallengeData2016"
    (folder / "annotations").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="has the images of ADE20K .* but not annotations/validation"):
        SegmentationData("ade150", tmp_path, partial=True)
    (folder / "elsewhere").rename(folder / "annotations")
    (folder / "images").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="has the masks of ADE20K .* but not images/validation"):
        SegmentationData("ade150", tmp_path, partial=True)


def test_no_list_of_the_split(tmp_path):
    write(tmp_path, NAMED["voc21 {}.png"])
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match="but not ImageSets/Segmentation/val.txt;"):
        SegmentationData("voc21", tmp_path, partial=True)


@pytest.mark.parametrize("gone", ["annotations/validation/{}.png", "images/validation/{}.jpg"])
def test_half_downloaded_data_is_refused_or_marked(gone, tmp_path):
    write(tmp_path, NAMED["ade150 {}.png"])
    with pytest.raises(FileNotFoundError, match=r"has 3 of the 2000 images .*ADEChallengeData2016.zip.*--partial"):
        SegmentationData("ade150", tmp_path)
    (tmp_path / "ade/ADEChallengeData2016" / gone.format(ADE[1])).unlink()
    assert SegmentationData("ade150", tmp_path, partial=True).names == [ADE[0], ADE[2]]


def test_images_of_other_modes_are_decoded_as_by_segment(tmp_path):
    write(tmp_path, NAMED["ade150 {}.png"])
    data = SegmentationData("ade150", tmp_path, partial=True)
    for i, name in enumerate(data.names[:2]):
        path = tmp_path / f"ade/ADEChallengeData2016/images/validation/{name}.jpg"
        height, width = data.values(i).shape
        values = np.linspace(0, 65535, height * width).astype(np.uint16).reshape(height, width)
        image = Image.fromarray(values) if i else Image.new("RGBA", (width, height), (0, 0, 0, 99))
        image.save(path, "PNG")
        assert np.array_equal(data.image(i), read_image(path))


def test_a_list_that_leaves_its_folder_is_refused(tmp_path):
    write(tmp_path, NAMED["voc21 {}.png"])
    for name in ("../../secret", "/etc/passwd", "..\\secret"):
        (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text(f"{VOC[0]}\n{name}\n")
        with pytest.raises(ValueError, match=f"names {re.escape(repr(name))}, expected a name below its folder"):
            SegmentationData("voc21", tmp_path, partial=True)


def test_labels_of_another_layout_are_refused_by_name(tmp_path):
    layout = NAMED["cityscapes {}_gtFine_labelTrainIds.png"]
    write(tmp_path, layout, values=[7, 8, 26, 33])  # labelIds under the name of the trainIds
    data = SegmentationData("cityscapes", tmp_path, partial=True)
    with pytest.raises(
        ValueError, match=r"has the values 26, 33, which .*like those of gtFine/val/\*/\*_gtFine_labelIds"
    ):
        data[0]


def test_masks_that_are_not_labels(tmp_path):
    write(tmp_path, NAMED["ade150 {}.png"])
    folder = tmp_path / "ade/ADEChallengeData2016/annotations/validation"
    data = SegmentationData("ade150", tmp_path, partial=True)
    save(Image.new("RGB", (14, 9)), folder / f"{ADE[0]}.png")
    with pytest.raises(ValueError, match="colours, expected a label per pixel"):
        data[0]
    save(mask(np.ones((3, 4))), folder / f"{ADE[1]}.png")
    with pytest.raises(ValueError, match="has 4 x 3 pixels, its image 7 x 12"):
        data[1]
    (folder / f"{ADE[2]}.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=f"cannot read .*{ADE[2]}.png"):
        data[2]


def test_limit_and_class_file(tmp_path):
    layout = NAMED["stuff171 {}.png"]
    write(tmp_path, layout)
    assert SegmentationData("stuff171", tmp_path, partial=True, limit=2).names == [COCO[0], COCO[1]]
    with pytest.raises(ValueError, match="limit: got 0"):
        SegmentationData("stuff171", tmp_path, partial=True, limit=0)
    class_file = tmp_path / "classes.txt"
    class_file.write_text("".join(f"class {k}, synonym {k}\n" for k in range(847)))
    with pytest.raises(ValueError, match="class_file: got 847 classes .*expected 171"):
        SegmentationData("stuff171", tmp_path, class_file=class_file, partial=True)
    class_file.write_text("person, human\n" + "".join(f"word {k}\n" for k in range(170)))
    data = SegmentationData("stuff171", tmp_path, class_file=class_file, partial=True)
    assert data.synonyms[0] == ["person", "human"]
    assert data.classes[1] == "bicycle"  # results use the official names
    assert data.class_hash != fingerprint([[name] for name in data.classes])
    class_file.write_text("person\n\nbicycle\n")
    with pytest.raises(ValueError, match="line 2 is empty"):
        read_classes(class_file)
    write(tmp_path, NAMED["ade847 {}.tif"])
    data = SegmentationData("ade847", tmp_path, partial=True)
    assert data.classes[1] == "building, edifice" and data.synonyms[1] == ["building", "edifice"]


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean ade150"):
        spec("ade15")
    with pytest.raises(ValueError, match="protocol: got 'TCL', expected tcl, dino.txt, paper, present"):
        protocol("TCL")


def test_protocols(tmp_path):
    rules = protocol("tcl")
    assert (rules.short_side, rules.window, rules.window_stride, rules.stride) == (448, 448, 224, 1)
    assert (protocol("dino.txt").short_side, protocol("dino.txt").window, protocol("dino.txt").window_stride) == (
        512,
        384,
        192,
    )
    assert protocol("paper").background == {"rule": "entropy", "value": 1.5, "logit_scale": 100}
    assert (protocol("present").candidates, protocol("present").average) == ("present", "image")
    assert protocol("tcl", stride=1).name == "tcl"
    changed = protocol("tcl", stride=2)
    assert changed.stride == 2 and changed.name == "tcl stride=2"
    own = tmp_path / "mine.json"
    own.write_text(json.dumps({"short_side": 336, "templates": ["a {}."], "background": {"rule": "class"}}))
    assert protocol(str(own)).name == "mine" and protocol(str(own)).templates == ("a {}.",)
    for entry, message in [
        ({"short_side": 336, "templates": "openai"}, "lacks background"),
        ({"short_side": 336, "templates": "openai", "background": {"rule": "class"}, "pamr": 1}, "has pamr"),
        ({"short_side": 0, "templates": "openai", "background": {"rule": "class"}}, "short_side: got 0"),
        ({"short_side": 9, "templates": "openai", "background": {"rule": "threshold"}}, "expected a number"),
        ({"short_side": 9, "templates": "openai", "background": {"rule": "class"}, "window": 3}, "or neither"),
        ({"short_side": 9, "templates": "", "background": {"rule": "class"}, "average": "image"}, "'present'"),
        (
            {
                "short_side": 9,
                "templates": "",
                "background": {"rule": "threshold", "value": 1},
                "candidates": "present",
            },
            "expected 'class'",
        ),
    ]:
        own.write_text(json.dumps(entry))
        with pytest.raises(ValueError, match=message):
            protocol(str(own))


def test_check_counts_labels_and_draws(tmp_path):
    layout = NAMED["voc21 {}.png"]
    truth = write(tmp_path, layout)
    picture = tmp_path / "check.png"
    found = check_segmentation("voc21", tmp_path, picture=picture)
    values = np.concatenate([x.ravel() for x in truth.values()])
    assert found.values == {v: int((values == v).sum()) for v in np.unique(values).tolist()}
    assert found.ignored == (values == 255).sum()
    assert found.pixels[found.classes.index("person")] == (values == 15).sum()
    assert found.problems == [f"3 images, expected 1449: from {spec('voc21').source}"]
    assert "person" in found.text() and "problem: 3 images" in found.text()
    with Image.open(picture) as image:
        assert image.height > max(len(x) for x in truth.values())  # room for the names below


def test_check_lists_what_is_damaged(tmp_path):
    write(tmp_path, NAMED["ade150 {}.png"])
    folder = tmp_path / "ade/ADEChallengeData2016"
    whole = (folder / f"images/validation/{ADE[0]}.jpg").read_bytes()
    (folder / f"images/validation/{ADE[0]}.jpg").write_bytes(whole[: len(whole) // 2])
    save(mask(np.ones((3, 4))), folder / f"annotations/validation/{ADE[1]}.png")
    (folder / f"annotations/validation/{ADE[2]}.png").unlink()
    problems = "\n".join(check_segmentation("ade150", tmp_path).problems)
    assert f"1 images or masks are damaged, first data: cannot read {folder}/images/validation/{ADE[0]}.jpg" in problems
    assert f"1 masks have another size than their image, first {ADE[1]}" in problems
    assert f"1 images lack their file or their mask, first {ADE[2]}" in problems


@pytest.mark.parametrize(
    "layout, values, message",
    [
        ("ade150 {}.png", [0, 12, 255], "values 255 .*one too low"),
        ("cityscapes {}_gtFine_labelTrainIds.png", [7, 26, 33], "all values are labels of .*labelIds"),
        ("stuff171 {}_labelTrainIds.png", [0, 171], "values 171 are not labels of"),
        ("object81 {}_instanceTrainIds.png", [0, 81], "values 81 are not labels of"),
    ],
)
def test_check_finds_shifted_labels(layout, values, message, tmp_path):
    write(tmp_path, NAMED[layout], values=values)
    assert any(re.search(message, line) for line in check_segmentation(NAMED[layout][0], tmp_path).problems)


def test_check_of_a_whole_set_misses_the_last_class(tmp_path):
    """VOC's labels stay valid when they are one too low; only the missing last class reveals the error."""
    folder = tmp_path / "VOC2012"
    names = [f"2007_{i:06d}" for i in range(1449)]
    image, low = Image.new("RGB", (6, 4)), mask(np.arange(24).reshape(4, 6).clip(0, 19), "P")
    save(image, folder / "JPEGImages/x.jpg")
    save(low, folder / "SegmentationClass/x.png")
    for path in (folder / "JPEGImages/x.jpg", folder / "SegmentationClass/x.png"):
        for name in names:
            (path.parent / f"{name}{path.suffix}").hardlink_to(path)
        path.unlink()
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    (folder / "ImageSets/Segmentation/val.txt").write_text("\n".join(names))
    assert len(SegmentationData("voc20", tmp_path)) == 1449
    problems = check_segmentation("voc20", tmp_path).problems
    assert problems == ["1 of 20 classes never occur, first 'tvmonitor': labels are probably one too low"]
