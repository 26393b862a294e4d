"""Pascal Context is read from its original files: one label map of 459 labels per image, in Matlab's format."""

import numpy as np
import pytest
from miniature import SIZES, VOC, save
from pacl.evaluate.segmentation_check import check_segmentation
from pacl.evaluate.segmentation_data import SegmentationData
from pacl.evaluate.specs import IGNORED, UNKNOWN, spec
from PIL import Image

io = pytest.importorskip("scipy.io")

# The lines of labels.txt (459 in all) that 59_labels.txt has too. Its "diningtable", "bedcloth" and "clothes" are
# "table", "bedclothes" and "cloth" here.
OFFICIAL = {
    "aeroplane": 2, "bag": 9, "bed": 18, "bedclothes": 19, "bench": 22, "bicycle": 23, "bird": 25, "boat": 31,
    "book": 33, "bottle": 34, "building": 44, "bus": 45, "cabinet": 46, "car": 59, "cat": 65, "ceiling": 68,
    "chair": 72, "cloth": 80, "computer": 85, "cow": 98, "cup": 104, "curtain": 105, "dog": 113, "door": 115,
    "fence": 144, "floor": 158, "flower": 159, "food": 162, "grass": 187, "ground": 189, "horse": 207, "keyboard": 220,
    "light": 232, "motorbike": 258, "mountain": 259, "mouse": 260, "person": 284, "plate": 295, "platform": 296,
    "pottedplant": 308, "road": 324, "rock": 326, "sheep": 347, "shelves": 349, "sidewalk": 354, "sign": 355,
    "sky": 360, "snow": 366, "sofa": 368, "table": 397, "track": 415, "train": 416, "tree": 420, "truck": 424,
    "tvmonitor": 427, "wall": 440, "water": 445, "window": 454, "wood": 458,
}  # fmt: skip
OTHERS = {0: None, 1: "accordion", 431: "unknown", 459: "wool"}


@pytest.fixture
def root(tmp_path):
    """Create VOC2010 with trainval.tar.gz unpacked; `truth` has its label maps. A fourth image is in another split."""
    rng, base = np.random.default_rng(0), tmp_path / "VOCdevkit/VOC2010"
    (base / "trainval").mkdir(parents=True)
    truth = {}
    for name, size in zip([*VOC, "2008_000002"], [*SIZES, (4, 4)], strict=True):
        truth[name] = rng.choice([*OFFICIAL.values(), *OTHERS], size).astype(np.uint16)
        save(Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)), base / f"JPEGImages/{name}.jpg")
        io.savemat(base / f"trainval/{name}.mat", {"LabelMap": truth[name]}, do_compression=name == VOC[0])
    (base / "ImageSets/Main").mkdir(parents=True)
    (base / "ImageSets/Main/val.txt").write_text("".join(f"{name}\n" for name in VOC))
    return tmp_path, truth


@pytest.mark.parametrize("name, rest", [("context60", 0), ("context59", IGNORED)])
def test_labels_are_those_of_the_official_list(root, name, rest):
    root, truth = root
    data = SegmentationData(name, root, partial=True)
    assert data.names == VOC and data.layout == "trainval/*.mat" and data.missing == []
    for i, each in enumerate(VOC):
        image, labels = data[i]
        assert labels.dtype == np.int16 and labels.shape == (image.height, image.width)
        expected = np.full(labels.shape, rest)
        for word, value in OFFICIAL.items():
            expected[truth[each] == value] = data.classes.index(word)
        assert np.array_equal(labels, expected)
    table = data.masks.table
    assert (table[[*OTHERS]] == rest).all() and (table[460:] == UNKNOWN).all()
    found = check_segmentation(name, root)
    assert found.problems == [f"3 images, expected 5104 or 5105: from {spec(name).source}"]


def test_the_same_labels_as_in_detail():
    for name in ("context60", "context59"):
        detail, matlab = (
            next(x for x in spec(name).masks if x.path.startswith(way)) for way in ("trainval_", "trainval/")
        )
        known = detail.table != UNKNOWN
        assert known.sum() == 60 and np.array_equal(detail.table[known], matlab.table[known])


def test_files_that_are_no_label_maps(root):
    root = root[0]
    folder = root / "VOCdevkit/VOC2010/trainval"
    whole = (folder / f"{VOC[0]}.mat").read_bytes()
    data = SegmentationData("context59", root, partial=True)
    for content, message in (
        (whole[: len(whole) // 2], "cannot read"),
        (b"", "cannot read"),
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n", "cannot read"),
    ):
        (folder / f"{VOC[0]}.mat").write_bytes(content)
        with pytest.raises(ValueError, match=f"data: {message} .*{VOC[0]}.mat: ."):
            data[0]
    for content, message in (
        ({"labels": np.ones((9, 14), np.uint16)}, "it has labels, expected LabelMap"),
        ({"LabelMap": np.ones((9, 14, 3), np.uint16)}, "expected LabelMap of two dimensions"),
        ({"LabelMap": np.ones((9, 14))}, "its LabelMap is float64, expected uint16"),
        ({"LabelMap": np.full((9, 14), 460, np.uint16)}, r"has the values 460, which trainval/\*.mat"),
        ({"LabelMap": np.ones((14, 9), np.uint16)}, "has 9 x 14 pixels, its image 14 x 9"),
        ({"LabelMap": np.zeros((10_001, 10_000), np.uint16)}, "expected at most 100,000,000"),
    ):
        io.savemat(folder / f"{VOC[0]}.mat", content, do_compression=True)
        with pytest.raises(ValueError, match=message):
            data[0]
    (folder / f"{VOC[1]}.mat").unlink()
    (folder / f"{VOC[0]}.mat").write_bytes(whole)
    assert SegmentationData("context59", root, partial=True).names == [VOC[0], VOC[2]]


def test_without_its_list_or_scipy(root, monkeypatch):
    root = root[0]
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match="dataset: context59 stores its labels as Matlab files, which need scipy"):
            SegmentationData("context59", root, partial=True)
    (root / "VOCdevkit/VOC2010/ImageSets/Main/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match="has the images of Pascal Context .* but not ImageSets/Main/val.txt"):
        SegmentationData("context59", root, partial=True)
