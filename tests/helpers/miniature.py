"""Small copies of the datasets' layouts, written as the official files are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(9, 14), (12, 7), (8, 8)]  # height and width of the images
VOC = ["2007_000033", "2007_000042", "2007_000061"]
COCO = ["000000000139", "000000000285", "000000000632"]
CITY = ["frankfurt/frankfurt_000000_000294", "frankfurt/frankfurt_000000_000576", "munster/munster_000000_000019"]
ADE = ["ADE_val_00000001", "ADE_val_00000002", "ADE_val_00000003"]

# Dataset, folder under the root, pattern of image files, pattern of mask files, mode of a mask file, image names, and
# the meaning of some values: the class name that the official list gives to the number, None for ignored values.
LAYOUTS = [
    ("voc21", "VOCdevkit/VOC2012", "JPEGImages/{}.jpg", "SegmentationClass/{}.png", "P", VOC,
     {0: "background", 1: "aeroplane", 15: "person", 20: "tvmonitor", 255: None}),
    ("voc20", "VOCdevkit/VOC2012", "JPEGImages/{}.jpg", "SegmentationClass/{}.png", "P", VOC,
     {0: None, 1: "aeroplane", 15: "person", 20: "tvmonitor", 255: None}),
    ("context60", "VOCdevkit/VOC2010", "JPEGImages/{}.jpg", "SegmentationClassContext/{}.png", "L", VOC,
     {0: "background", 1: "aeroplane", 37: "person", 59: "wood"}),
    ("context59", "VOCdevkit/VOC2010", "JPEGImages/{}.jpg", "SegmentationClassContext/{}.png", "L", VOC,
     {0: None, 1: "aeroplane", 37: "person", 59: "wood"}),
    ("context60", "VOC2010", "JPEGImages/{}.jpg", "trainval_merged.json", "json", VOC,
     {0: "background", 2: "aeroplane", 284: "person", 397: "table", 458: "wood"}),
    ("context59", "VOC2010", "JPEGImages/{}.jpg", "trainval_merged.json", "json", VOC,
     {0: None, 2: "aeroplane", 284: "person", 397: "table", 458: "wood"}),
    ("object81", "coco_stuff164k", "images/val2017/{}.jpg", "annotations/val2017/{}_instanceTrainIds.png", "L", COCO,
     {0: "background", 1: "person", 12: "stop sign", 80: "toothbrush"}),
    ("object81", "", "images/val2017/{}.jpg", "annotations/val2017/{}.png", "L", COCO,
     {0: "person", 12: "stop sign", 89: "toothbrush", 91: "background", 181: "background", 255: "background"}),
    ("stuff171", "coco_stuff164k", "images/val2017/{}.jpg", "annotations/val2017/{}_labelTrainIds.png", "L", COCO,
     {0: "person", 11: "stop sign", 80: "banner", 170: "wood", 255: None}),
    ("stuff171", "coco", "val2017/{}.jpg", "stuffthingmaps/val2017/{}.png", "L", COCO,
     {0: "person", 12: "stop sign", 89: "toothbrush", 91: "banner", 181: "wood", 255: None}),
    ("stuff27", "coco", "val2017/{}.jpg", "stuffthingmaps/val2017/{}.png", "L", COCO,
     {0: "person", 12: "outdoor", 51: "food", 121: "food-stuff", 181: "solid", 255: None}),
    ("stuff27", "coco_stuff164k", "images/val2017/{}.jpg", "annotations/val2017/{}_labelTrainIds.png", "L", COCO,
     {0: "person", 11: "outdoor", 80: "textile", 170: "solid", 255: None}),
    ("cityscapes", "cityscapes", "leftImg8bit/val/{}_leftImg8bit.png", "gtFine/val/{}_gtFine_labelTrainIds.png", "L",
     CITY, {0: "road", 13: "car", 18: "bicycle", 255: None}),
    ("cityscapes", "cityscapes", "leftImg8bit/val/{}_leftImg8bit.png", "gtFine/val/{}_gtFine_labelIds.png", "L",
     CITY, {7: "road", 26: "car", 33: "bicycle", 0: None, 6: None, 30: None}),
    ("ade150", "ade/ADEChallengeData2016", "images/validation/{}.jpg", "annotations/validation/{}.png", "L", ADE,
     {0: None, 1: "wall", 13: "person", 150: "flag"}),
    ("ade847", "ADE20K_2021_17_01", "images_detectron2/validation/{}.jpg", "annotations_detectron2/validation/{}.tif",
     "I;16", ADE, {0: "wall", 300: "altar, communion table, lord's table", 
                    846: "adding machine, totalizer, totaliser", 65535: None}),
]  # fmt: skip
IDS = [f"{layout[0]} {layout[3].split('/')[-1]}" for layout in LAYOUTS]


def write(root: Path, layout: tuple, *, seed: int = 0, values: list[int] | None = None) -> dict[str, np.ndarray]:
    """Write three images, the first a gray JPEG, with masks of the layout's values; return the values by name."""
    _, folder, images, masks, mode, names, meaning = layout
    rng = np.random.default_rng(seed)
    base, truth = root / folder, {}
    for i, (name, size) in enumerate(zip(names, SIZES, strict=True)):
        truth[name] = rng.choice(values or list(meaning), size)
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        save(Image.fromarray(picture[..., 0] if i == 0 else picture), base / images.format(name))
        if mode != "json":
            save(mask(truth[name], mode), base / masks.format(name))
    if mode == "json":
        (base / masks).write_text(json.dumps(detail(truth)))
    elif "VOC" in folder:
        split = "SegmentationContext" if "Context" in masks else "Segmentation"
        (base / "ImageSets" / split).mkdir(parents=True)
        (base / "ImageSets" / split / "val.txt").write_text("".join(f"{name}\n" for name in names))
    return truth


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def mask(values: np.ndarray, mode: str = "L") -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(values.astype(np.uint16))
    image = Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([x * 37 % 256 for x in range(768)])
    return image


def detail(truth: dict[str, np.ndarray]) -> dict:
    """Return the content of PASCAL in Detail's file: a region per class and image, and an image of another phase."""
    numbers = {name: int(name.replace("_", "")) for name in truth}
    images = [
        {"image_id": numbers[name], "file_name": f"{name}.jpg", "phase": "val", "height": len(x), "width": len(x[0])}
        for name, x in truth.items()
    ]
    images.append({"image_id": 1, "file_name": "2008_000002.jpg", "phase": "train", "height": 4, "width": 4})
    regions = [
        {
            "image_id": numbers[name],
            "category_id": int(k),
            "segmentation": {"size": list(x.shape), "counts": encode_rle(x == k)},
        }
        for name, x in truth.items()
        for k in np.unique(x[x > 0])
    ]
    return {"images": images, "annos_segmentation": regions, "categories": []}


def encode_rle(region: np.ndarray) -> str:
    """Encode a bool mask as COCO's compressed run lengths, as pycocotools does."""
    flat = region.T.ravel().astype(int)
    ends = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist() + [flat.size]
    runs = np.diff([0, *ends]).tolist()
    out = ""
    for i, run in enumerate(runs):
        x = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            digit, x = x & 31, x >> 5
            more = x != -1 if digit & 16 else x != 0
            out += chr(48 + digit + 32 * more)
    return out
