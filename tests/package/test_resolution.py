"""`max_patches`: images keep their aspect ratio, and towers take at most so many patches of them."""

import pytest
import torch
from pacl.backbones import NAFLEX_VITS, patch_tokens
from pacl.data.samples import collate
from pacl.embedder import VisionEmbedder, save_embedder
from pacl.evaluate.classification import classification
from pacl.evaluate.scorer import Scorer
from pacl.resolution import FitPatches, images_of, split_patches
from pacl.segment.predict import Segmenter
from pacl.segment.prompts import class_texts
from pacl.sharing import describe_towers, load_pacl
from pacl.towers import load_towers
from PIL import Image
from small_towers import save_naflex

pytestmark = pytest.mark.skipif(not NAFLEX_VITS, reason="this timm has no NaFlex ViT")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def names(tower_world, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("resolution") / "naflex"
    save_naflex(folder)
    return {"model": f"local-dir:{tower_world / 'clip'}", "vision_model": f"local-dir:{folder}"}


def test_sizes_are_those_of_timm():
    from timm.data.naflex_transforms import get_image_size_for_seq

    generator = torch.Generator().manual_seed(0)
    for patch in ((16, 16), (14, 14), (16, 8)):
        for height, width in torch.randint(20, 2000, (40, 2), generator=generator).tolist():
            for most in (1, 2, 16, 61, 196, 1024):
                found = FitPatches(patch, most).size(Image.new("1", (width, height)))
                assert found == get_image_size_for_seq((height, width), patch, most)[1], (height, width, patch, most)
    # timm refuses images that are this small.
    assert FitPatches((16, 16), 1024).size(Image.new("1", (2, 2))) == (512, 512)
    assert FitPatches((16, 16), 16).size(Image.new("1", (9000, 2))) == (16, 256)


def test_towers_keep_the_aspect_ratio(names, tmp_path):
    towers = load_towers(**names, max_patches=16)
    pictures = [Image.linear_gradient("L").resize(size).convert("RGB") for size in ((160, 80), (80, 160), (90, 90))]
    images = [towers.transform(picture) for picture in pictures]
    assert [list(image.shape[1:]) for image in images] == [[48, 80], [80, 48], [64, 64]]
    tokens, lengths = towers.packed(images)
    assert lengths.tolist() == [15, 15, 16]
    for found, image in zip(tokens.split(lengths.tolist()), images, strict=True):
        torch.testing.assert_close(found, patch_tokens(towers.visual, image[None])[0], rtol=1e-4, atol=2e-5)
    # Segmentation sees the image as training does, unless it is told a size.
    for segmenter, grids in (
        (Segmenter(towers, VisionEmbedder(32, 48).eval()), [[3, 5], [5, 3], [4, 4]]),
        (Segmenter(towers, VisionEmbedder(32, 48).eval(), short_side=32), [[2, 4], [4, 2], [2, 2]]),
    ):
        assert [list(segmenter.dense(picture).patches.shape[:2]) for picture in pictures] == grids
    # The embedder's folder says how many patches the towers take.
    save_embedder(VisionEmbedder(32, 48), tmp_path / "embedder", describe_towers(towers, tmp_path / "embedder"))
    again = load_pacl(tmp_path / "embedder")[0]
    assert again.variable and torch.equal(again.transform(pictures[0]), images[0])
    fixed = load_towers(**names, force_image_size=64)
    assert not fixed.variable and "max_patches" not in describe_towers(fixed, tmp_path)
    tokens, lengths = fixed.packed(torch.zeros(2, 3, 64, 64))
    assert tokens.shape == (2, 16, 32) and lengths is None


def test_images_of_different_sizes_travel_as_one_tensor():
    images = [torch.rand(3, 2, 4), torch.rand(3, 5, 1)]
    batch = collate([{"image": image, "key": "x"} for image in images])
    assert batch["image"].shape == (39,) and batch["key"] == ["x", "x"]
    assert all(torch.equal(x, y) for x, y in zip(images_of(batch), images, strict=True))
    assert images_of(collate([{"image": images[0]}] * 2)).shape == (2, 3, 2, 4)
    rows, lengths = torch.arange(6)[:, None], torch.tensor([1, 0, 3, 2])
    found = list(split_patches(rows, lengths, 3))
    assert [x[:, 0].tolist() for x, _ in found] == [[0, 1, 2, 3], [4, 5]]
    assert [x.tolist() for _, x in found] == [[1, 0, 3], [2]]
    assert [(len(x), y) for x, y in split_patches(rows, None, 4)] == [(4, None), (2, None)]


def test_classification_scores_each_image_by_its_own_patches(names):
    towers = load_towers(**names, max_patches=16)
    torch.manual_seed(0)
    images = [torch.randn(3, 16 * rows, 16 * columns) for rows, columns in ((1, 4), (4, 4), (3, 5), (1, 1), (2, 2))]
    scorer = Scorer(towers, VisionEmbedder(32, 48).eval())
    texts = class_texts(towers, ["red", "a green field", "sky", "seven", "left"], ["{}"])
    alone = torch.cat([next(scorer.blocks(image[None], texts.embeddings)) for image in images])
    # Each image's class is the one that it finds when it is scored alone.
    data = list(zip(images, alone.argmax(1).tolist(), strict=True))
    counts = classification(data, texts, [scorer], batch_size=3)
    assert counts[0, 0].sum() == counts[0, 1].sum() == 5
    torch.testing.assert_close(torch.cat(list(scorer.blocks(images, texts.embeddings))), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vision_model": None}, "max_patches: got 16 for local-dir:.*, whose images have one size; expected a NaFlex"),
        ({"force_image_size": 64}, "max_patches: got 16 with force_image_size 64, expected only one of them"),
        ({"max_patches": 0}, "max_patches: got 0, expected an integer above 0"),
        ({"max_patches": 2.5}, "max_patches: got 2.5, expected an integer above 0"),
    ],
)
def test_errors_name_the_argument(changes, message, names):
    with pytest.raises(ValueError, match=message):
        load_towers(**names | {"max_patches": 16} | changes)
