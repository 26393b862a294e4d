"""The one reader of images: formats, EXIF orientation, and what it does not read; the same in every command."""

import io

import numpy as np
import pytest
import torch
from pacl.data.images import IMAGE_FORMATS, read_image
from pacl.data.sources import open_pairs
from pacl.evaluate.classification_data import Labelled
from pacl.evaluate.retrieval import read_gallery
from pacl.segment import images as segment
from pictures import encode, nonzero, picture
from PIL import Image

TURNED = [fmt for fmt in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") if fmt in IMAGE_FORMATS]
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp", "AVIF": "avif"}


def lying(kind: str, orientation: int = 6) -> bytes:
    """Return an image of 40 x 20 pixels, white at the left, which EXIF turns so that white is above."""
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", TURNED)
def test_every_reader_turns_an_image_upright(kind, tmp_path, write_tar):
    data = lying(kind)
    expected = read_image(data)
    assert expected.size == (20, 40)
    assert expected.getpixel((10, 5)) > (200, 200, 200) and expected.getpixel((10, 35)) < (50, 50, 50)
    path = tmp_path / f"dog/a.{SUFFIXES[kind]}"
    path.parent.mkdir()
    path.write_bytes(data)
    path.with_suffix(".txt").write_text("white above")
    shard = write_tar("a.tar", {path.name: data, "a.txt": b"white above"})
    found = [next(iter(open_pairs(place)))["image"] for place in (tmp_path / "dog", shard)]
    (tmp_path / "a.tar").unlink()
    labelled = Labelled("folder", tmp_path)
    labelled.transform = lambda image: image
    shown = [segment.read_image(path), labelled[0][0]]
    for image in [*found, *(torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in shown)]:
        assert torch.equal(image, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 10))
def test_every_orientation(orientation):
    """The reader agrees with Pillow, which leaves unknown numbers alone."""
    from PIL import ImageOps

    data = lying("JPEG", orientation)
    assert np.array_equal(read_image(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


def test_damaged_exif_data_do_no_harm():
    data = lying("JPEG")
    at = data.index(b"Exif\0\0") + 6
    for cut in (b"XX", b"MM\0\0\xff\xff\xff\xff", b"II*\0\xff\xff\xff\x7f"):
        damaged = data[:at] + cut + data[at + len(cut) :]
        assert read_image(damaged).size == (40, 20)


def test_an_image_with_a_mask_stays_as_stored(write_tar):
    mask = np.arange(800, dtype=np.uint8).reshape(20, 40)
    path = write_tar("a.tar", {"a.jpg": lying("JPEG"), "a.mask.png": encode(mask, "PNG"), "a.txt": b"x"})
    (sample,) = open_pairs(path, masks=True)
    assert sample["image"].shape == (3, 20, 40) and torch.equal(sample["mask"], torch.from_numpy(mask))


def test_formats_are_read_and_others_named_and_counted(tmp_path, write_tar):
    """Folders and shards find the same formats; those that are not read are counted, by name."""
    pixels = {kind: encode(picture(i), kind) for i, kind in enumerate(k for k in SUFFIXES if k in IMAGE_FORMATS)}
    files = {f"{kind}.{SUFFIXES[kind]}": data for kind, data in pixels.items()}
    files |= {
        "g.gif": encode(picture(0), "GIF"),
        "h.heic": b"\0\0\0\x18ftypheic\0\0\0\0",
        "i.jpg": b"<html>gone</html>",
    }
    members = {}
    for name, data in files.items():
        members |= {name: data, f"{name.partition('.')[0]}.txt": b"text"}
    for name, data in members.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "shards").mkdir()
    shard = write_tar("shards/a.tar", members)
    for place in (tmp_path, shard):
        said = []
        data = open_pairs(place, max_bad_share=1.0).with_options(on_skip=lambda *what, said=said: said.append(what))
        samples = list(data)
        assert {sample["key"].partition(".")[0] for sample in samples} == set(pixels)
        assert nonzero(data.skipped) == {"format": 3}
        for (reason, _, message), name in zip(sorted(said), ("GIF", "HEIC", "HTML"), strict=False):
            assert reason == "format" and message.startswith(f"got {name}, which is not read, expected JPEG, PNG")
    names = {path.name for path in segment.find_images([tmp_path])}
    assert names == set(files), "segment finds what it names as unread, too"


def test_floats_have_no_range():
    buffer = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="got floating-point pixels, whose range is unknown"):
        read_image(buffer.getvalue())


def test_retrieval_reads_all_captions_of_all_formats(tmp_path):
    for i, kind in enumerate(k for k in SUFFIXES if k in IMAGE_FORMATS):
        (tmp_path / f"{i}.{SUFFIXES[kind]}").write_bytes(encode(picture(i), kind))
        (tmp_path / f"{i}.txt").write_text(f"text {i}\nand another\n")
    gallery = read_gallery(open_pairs(tmp_path))
    assert gallery.images == len(IMAGE_FORMATS) and len(gallery.captions) == 2 * gallery.images
