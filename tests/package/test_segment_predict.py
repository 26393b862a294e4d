"""Scores and label maps equal those of plain loops over windows, whole interpolation, and direct tower calls."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from pacl.backbones import patch_tokens
from pacl.data.images import open_image, to_rgb
from pacl.demo.toy_clip import new_clip, save_clip
from pacl.dense import dense_tokens
from pacl.embedder import VisionEmbedder
from pacl.readings import best_reading
from pacl.segment import predict
from pacl.segment.images import read_image
from pacl.segment.predict import Dense, Segmenter, own_projection, similarity_map
from pacl.segment.prompts import TEMPLATES, Texts, best_synonym, class_texts, read_classes, templates
from pacl.towers import load_towers
from PIL import Image
from torch.nn import functional as F

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Create the demo's CLIP, untrained: images of 64 pixels, patches of 8."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_clip(new_clip(), folder)
    return load_towers(f"local-dir:{folder}")


@pytest.fixture(scope="module")
def embedder():
    torch.manual_seed(1)
    return VisionEmbedder(128, 128).eval().requires_grad_(False)


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return a smooth image, because resizing would turn noise grey."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5 + c)) + np.cos(y / (7 - c)) for c in range(3)]
    return Image.fromarray(np.uint8(127 + 60 * np.stack(waves, -1))).convert(mode)


def random_texts(classes: int, width: int = 128, synonyms: int = 1) -> Texts:
    rows = torch.randn(classes * synonyms, width, generator=torch.Generator().manual_seed(2))
    return Texts(tuple(map(str, range(classes))), (synonyms,) * classes, F.normalize(rows, dim=-1))


def random_dense(h: int, w: int, size: tuple[int, int], margins=(0.0, 0.0)) -> Dense:
    patches = torch.randn(h, w, 16, generator=torch.Generator().manual_seed(3))
    return Dense(F.normalize(patches, dim=-1), size, margins)


# Scores


def test_the_towers_own_size_gives_the_cosines_of_its_patches(towers, embedder):
    image = photo(64, 64)
    tokens = patch_tokens(towers.visual, towers.transform(image)[None])
    words = ["a dog", "grass"]
    for segmenter, patches in (
        (Segmenter(towers, embedder), embedder(tokens)),
        (Segmenter(towers), tokens @ towers.visual.proj),
    ):
        scores = segmenter.scores(image, words)
        expected = F.cosine_similarity(patches[0, :, None], segmenter.texts(words).embeddings[None], dim=-1)
        torch.testing.assert_close(scores, expected.T.unflatten(1, (8, 8)), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(scores[0], scores[1], atol=1e-3)
    assert torch.equal(similarity_map(image, words, towers, embedder), Segmenter(towers, embedder).scores(image, words))


@pytest.mark.parametrize(
    "size, sides", [((100, 50), (64, 128)), ((30, 300), (640, 64)), ((1, 900), (2048, 8)), ((9, 7), (64, 80))]
)
def test_any_size_and_aspect(towers, embedder, size, sides):
    """The shorter side becomes the tower's size and the longer one at most 2,048 pixels, both in whole patches."""
    segmenter = Segmenter(towers, embedder)
    image = photo(*size)
    texts = random_texts(3)
    dense = segmenter.dense(image)
    assert dense.scores(texts).shape == (3, sides[0] // 8, sides[1] // 8)
    labels = dense.labels(texts).labels
    assert labels.shape == image.size[::-1] and labels.dtype == torch.int16


@pytest.mark.parametrize(
    "stride, window, window_stride", [(1, 64, 32), (1, 32, 24), (2, 40, 20), (4, 64, 50), (2, 64, None)]
)
def test_windows_against_a_plain_loop(towers, embedder, stride, window, window_stride):
    image, step = photo(150, 100), 8 // stride
    segmenter = Segmenter(towers, embedder, stride=stride, short_side=96, window=window, window_stride=window_stride)
    dense = segmenter.dense(image)
    assert window_stride or segmenter.window_stride == 32
    picture = segmenter._resized(image)
    height, width = picture.shape[1:]
    assert (height, width) == (96, 144)
    per_side = []
    for side in (height, width):
        begins = list(range(0, side - window, segmenter.window_stride))
        per_side.append([*begins, side - window])
    found = {}
    for y, x in itertools.product(*per_side):
        tokens = embedder(dense_tokens(towers.visual, picture[None, :, y : y + window, x : x + window], stride)[0])
        for i, j in itertools.product(range(tokens.shape[0]), range(tokens.shape[1])):
            at = (y // step + i, x // step + j)
            found.setdefault(at, []).append(F.normalize(tokens[i, j], dim=0))
    assert dense.patches.shape[:2] == ((height - 8) // step + 1, (width - 8) // step + 1)
    assert len(found) == dense.patches.shape[0] * dense.patches.shape[1] and max(map(len, found.values())) >= 4
    for (i, j), embeddings in found.items():
        torch.testing.assert_close(dense.patches[i, j], torch.stack(embeddings).mean(0), rtol=1e-4, atol=1e-5)


def test_a_window_over_the_whole_image_is_no_window(towers, embedder):
    image = photo(90, 70)
    whole = Segmenter(towers, embedder).dense(image).patches
    assert torch.equal(Segmenter(towers, embedder, window=128).dense(image).patches, whole)
    # Adjacent windows without overlap cover the image once.
    tiles = Segmenter(towers, embedder, window=64, window_stride=64).dense(photo(128, 64)).patches
    left = Segmenter(towers, embedder).dense(photo(128, 64).crop((0, 0, 64, 64))).patches
    torch.testing.assert_close(tiles[:, :8], left, rtol=1e-4, atol=1e-5)


# Labels


@pytest.mark.parametrize("band", [1, 2**24])
@pytest.mark.parametrize(
    "h, w, size", [(5, 7, (40, 61)), (9, 4, (9, 4)), (12, 20, (7, 11)), (1, 1, (3, 5)), (1, 6, (30, 2))]
)
def test_labels_are_those_of_the_whole_interpolation(monkeypatch, band, h, w, size):
    monkeypatch.setattr(predict, "BAND", band)  # one row at a time
    dense, texts = random_dense(h, w, size), random_texts(6, 16)
    large = F.interpolate(dense.scores(texts)[None], size, mode="bilinear", align_corners=False)[0]
    found = dense.labels(texts, entropy=1.0, logit_scale=10.0)
    torch.testing.assert_close(found.best, large.amax(0), rtol=1e-5, atol=1e-6)
    entropy = -((10 * large).softmax(0) * (10 * large).log_softmax(0)).sum(0)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-4, atol=1e-5)
    first, second = large.topk(2, 0).values
    sure = first - second > 1e-5
    assert sure.float().mean() > 0.9
    expected = torch.where(entropy > 1.0, 0, 1 + large.argmax(0))
    sure &= (entropy - 1.0).abs() > 1e-4
    assert torch.equal(found.labels[sure].long(), expected[sure])


def test_bands_of_rows_bound_the_memory(monkeypatch):
    """Each step handles at most one band of scores."""
    seen = []
    monkeypatch.setattr(predict, "BAND", 6 * 9 * 7)
    original = predict._argmax
    monkeypatch.setattr(predict, "_argmax", lambda *args: seen.append(args[0].shape) or original(*args))
    random_dense(8, 9, (95, 50)).labels(random_texts(6, 16))
    assert [shape[1] for shape in seen] == [7] * 13 + [4] and all(shape[2] == 9 for shape in seen)


def test_background_by_threshold_and_by_entropy():
    dense, texts = random_dense(6, 6, (24, 24)), random_texts(5, 16)
    plain = dense.labels(texts)
    cut = dense.labels(texts, threshold=0.3)
    assert torch.equal(cut.labels, torch.where(plain.best < 0.3, 0, plain.labels + 1).short())
    assert 0 < (cut.labels == 0).float().mean() < 1 and plain.entropy is None
    # Five equal classes have the highest entropy, ln 5; with one far above the others the entropy is 0.
    same = Texts(texts.names, texts.synonyms, texts.embeddings[:1].expand(5, -1))
    assert (dense.labels(same, entropy=1.61).labels > 0).all()
    assert (dense.labels(same, entropy=1.6).labels == 0).all()
    assert (dense.labels(texts, entropy=1.5, logit_scale=1e4).labels > 0).all()


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_a_labels_place_is_its_patchs(stride):
    """The token at pixel p/2 + i * step labels that pixel, also at the border, where the usual resizing is wrong."""
    side, patch, step = 64, 8, 8 // stride
    tokens = (side - patch) // step + 1
    patches = torch.eye(tokens)[:, None].expand(-1, tokens, -1)  # each row of tokens has its own class
    margin = (patch - step) / 2 / side
    texts = Texts(tuple(map(str, range(tokens))), (1,) * tokens, torch.eye(tokens))
    dense = Dense(patches, (side, side), (margin, margin))
    rows = dense.labels(texts).labels[:, 0].tolist()
    nearest = [min(max(round((y + 0.5 - patch / 2) / step + 1e-6), 0), tokens - 1) for y in range(side)]
    assert max(abs(a - b) for a, b in zip(rows, nearest, strict=True)) <= (step == 1)
    large = dense.enlarged(dense.scores(texts))
    assert large.shape == (tokens, side, side)
    torch.testing.assert_close(large.amax(0), dense.labels(texts).best)


def test_segmenter_knows_the_margins_of_its_grid(towers, embedder):
    dense = Segmenter(towers, embedder, stride=4).dense(photo(64, 128))
    assert dense.patches.shape[:2] == (61, 29) and dense.margins == (3 / 128, 3 / 64)
    assert dense.labels(random_texts(2)).labels.shape == (128, 64)


def test_synonyms_take_the_best(towers):
    dense = random_dense(4, 5, (8, 10))
    texts = random_texts(3, 16, synonyms=2)
    single = dense.scores(Texts(tuple("abcdef"), (1,) * 6, texts.embeddings))
    assert torch.equal(dense.scores(texts), single.unflatten(0, (3, 2)).amax(1))
    highest, mean = dense.summary(texts)
    torch.testing.assert_close(highest, dense.scores(texts).amax((1, 2)))
    torch.testing.assert_close(mean, dense.scores(texts).mean((1, 2)))


# Texts


def test_class_texts_against_one_sentence_at_a_time(towers):
    found = class_texts(towers, ["dog, small dog", "  red   ball"], ("a {}.", "the {} {}"))
    assert found.names == ("dog", "red ball") and found.synonyms == (2, 1)
    expected = []
    for word in ("dog", "small dog", "red ball"):
        sentences = [f"a {word}.", f"the {word} {word}"]
        each = [towers.encode_text(towers.tokenize([sentence]))[0] for sentence in sentences]
        assert all(x.norm().item() == pytest.approx(1, abs=1e-5) for x in each)
        expected.append(F.normalize(sum(each), dim=0))
    torch.testing.assert_close(found.embeddings, torch.stack(expected), rtol=1e-4, atol=1e-5)
    braces = class_texts(towers, ["{0} {x}"], ("a {}.",)).embeddings
    torch.testing.assert_close(braces[0], towers.encode_text(towers.tokenize(["a {0} {x}."]))[0])


def test_sets_of_templates(tmp_path):
    assert [len(templates(name)) for name in ("none", "photo", "simple", "openai")] == [1, 1, 7, 80]
    assert TEMPLATES["simple"][:2] == ("itap of a {}.", "a bad photo of the {}.")
    assert set(TEMPLATES["simple"]) < set(TEMPLATES["openai"])
    path = tmp_path / "mine.txt"
    path.write_text("a {} here\n\nno {}\n")
    assert templates(str(path)) == ("a {} here", "no {}")
    path.write_text("a {} here\nnone\n")
    with pytest.raises(ValueError, match="templates: got 'none' in .*, expected {} where the class goes"):
        templates(str(path))
    with pytest.raises(ValueError, match="templates: got 'imagenet', expected none, photo, simple, openai, or a file"):
        templates("imagenet")


def test_class_files(tmp_path, towers):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffbackground, sky\r\n café ,,\r\n\r\n".encode())
    assert read_classes(path) == [["background", "sky"], ["café"]]
    for data, message in (
        (b"\n \n", "line 1 is empty"),
        (b"dog\n\ncat\n", "line 2 is empty, expected a class in every line"),
        (b"dog\ncat\n , \n", "line 3 is empty"),
        (b"\xff\xfe\x00", "is not UTF-8"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"classes: .*classes.txt {message}"):
            read_classes(path)
    for classes in ([], ["dog", " , "]):
        with pytest.raises(ValueError, match="classes: got .*expected at least one, and a name for each"):
            class_texts(towers, classes)


def test_best_synonym():
    scores = torch.tensor([[1.0, 5.0, 2.0, 3.0], [9.0, 0.0, 4.0, 2.0]])
    expected = torch.tensor([[1.0, 5.0, 3.0], [9.0, 4.0, 2.0]])
    assert torch.equal(best_synonym(scores, [1, 2, 1]), expected)
    assert torch.equal(best_synonym(scores.T.reshape(1, 4, 2, 1), (1, 2, 1), 1), expected.T.reshape(1, 3, 2, 1))
    assert best_synonym(scores, [1] * 4) is scores


# Images


def test_modes_of_images():
    image = photo(16, 12)
    gray = image.convert("L")
    assert to_rgb(gray).getpixel((3, 4)) == (gray.getpixel((3, 4)),) * 3
    palette = image.quantize(16)
    assert to_rgb(palette).getpixel((3, 4)) == palette.convert("RGB").getpixel((3, 4))
    clear = image.copy()
    clear.putalpha(Image.fromarray(np.uint8(255 * (np.mgrid[0:12, 0:16][1] > 7))))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(clear).getpixel((9, 5)) == image.getpixel((9, 5))
    palette.info["transparency"] = palette.getpixel((2, 2))
    assert to_rgb(palette).getpixel((2, 2)) == (255, 255, 255)
    deep = Image.fromarray(np.uint16(257 * np.asarray(gray).astype(np.int64)))
    assert deep.mode == "I;16" and np.array_equal(to_rgb(deep).convert("L"), gray)
    assert to_rgb(image.convert("1")).mode == to_rgb(image.convert("CMYK")).mode == "RGB"


def test_an_rgb_image_is_converted_by_nothing(tmp_path):
    """An RGB image is returned as it is, and its pixels stay valid after its file is closed."""
    image = photo(16, 12)
    assert to_rgb(image) is image
    image.save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png") as opened:
        again = to_rgb(opened)
    assert np.array_equal(again, image)
    image.info["transparency"] = image.getpixel((3, 4))
    assert to_rgb(image).getpixel((3, 4)) == (255, 255, 255)


def test_exif_orientation_and_the_cap(tmp_path):
    image = photo(30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers turn it by 90 degrees, clockwise
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), image.transpose(Image.Transpose.ROTATE_270))
    with pytest.raises(ValueError, match="30 x 20 pixels, more than 599"):
        read_image(tmp_path / "a.png", 599)
    assert read_image(tmp_path / "a.png", 600).size == (20, 30)


# Arguments


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stride": 3}, "stride: got 3, expected a divisor of the patch of 8 pixels: 1, 2, 4, 8"),
        ({"window": 60}, "window: got 60, expected a positive multiple of 8"),
        ({"window": 64, "window_stride": 30}, "window_stride: got 30, expected a positive multiple of 8"),
        ({"window": 64, "window_stride": 72}, "window_stride: got 72, expected at most 64"),
        ({"window": 64, "window_stride": 64, "stride": 2}, "window_stride: got 64, expected at most 60, so that"),
        ({"window_stride": 32}, "window_stride: got 32 without a window"),
        ({"short_side": -1}, "short_side: got -1, expected a positive number of pixels"),
    ],
)
def test_bad_settings(towers, embedder, settings, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(towers, embedder, **settings)


def test_own_projection_of_other_towers(towers):
    model = {"model": towers.names["model"], "vision_pretrained": False, "force_image_size": 64}
    dino = load_towers(vision_model="test_vit", **model)
    with pytest.raises(ValueError, match="embedder: got none, and VisionTransformer has no projection"):
        Segmenter(dino)
    assert Segmenter(dino, VisionEmbedder(64, 128)).scores(photo(70, 64), ["x"]).shape == (1, 4, 4)
    convolutional = load_towers(vision_model="test_convnext", **model)
    assert Segmenter(convolutional, VisionEmbedder(64, 128)).scores(photo(128, 64), ["x"]).shape == (1, 2, 4)
    assert own_projection(towers.visual)(torch.eye(128)).equal(towers.visual.proj)


@pytest.mark.parametrize("projection", ["linear", ""])
def test_a_timm_towers_own_projection(projection):
    """The projection of the mean patch equals the mean of the projected patches."""
    options = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": projection}
    visual = _build_vision_tower(24, CLIPVisionCfg(**options)).eval()
    images = torch.randn(2, 3, 64, 96)
    single = own_projection(visual)(patch_tokens(visual, images))
    assert single.shape == (2, 6, 24)
    torch.testing.assert_close(single.mean(1), visual(images))


def test_a_head_that_pools_by_attention_is_applied_to_each_token():
    """With one key the attention is 1: the head is z + mlp(norm(z)), where z is the output projection of the value."""
    torch.manual_seed(0)
    options = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "linear"}
    visual = _build_vision_tower(24, CLIPVisionCfg(**options)).eval().requires_grad_(False)
    pool, width = visual.trunk.attn_pool, visual.trunk.embed_dim
    for x in pool.parameters():
        x.normal_(std=0.1)
    tokens = torch.randn(2, 3, width)
    z = pool.proj(tokens @ pool.kv.weight[width:].T + pool.kv.bias[width:])
    expected = visual.head(z + pool.mlp(pool.norm(z)))
    torch.testing.assert_close(own_projection(visual)(tokens), expected, rtol=1e-4, atol=1e-5)
    assert best_reading(visual)[0] == "plain"


def test_a_tower_with_another_pool_has_no_projection_of_patches():
    options = {"timm_model_name": "test_convnext", "timm_pool": "rot_attn", "timm_proj": ""}
    visual = _build_vision_tower(128, CLIPVisionCfg(**options))
    with pytest.raises(ValueError, match="embedder: got none, and TimmModel has no projection of single patches"):
        own_projection(visual)
    coca = _build_vision_tower(24, CLIPVisionCfg(layers=1, width=64, head_width=32, attentional_pool=True))
    with pytest.raises(ValueError, match="embedder: got none, and VisionTransformer has no projection"):
        own_projection(coca)


def test_the_benchmark_compares_the_same_label_maps(towers, embedder, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import segmentation as benchmark

    monkeypatch.setattr(benchmark, "D", 128)
    row = benchmark.label_maps((7, 64, 48, 2), 1)
    assert row["agree"] > 0.999 and row["tokens"] == [56, 74] and min(row["pacl"]["ms"], row["plain"]["ms"]) > 0
    row = benchmark.images({"stride": 2}, towers, embedder, 1)
    assert row["tokens"] == [15, 21] and row["images_per_second"] > 0
