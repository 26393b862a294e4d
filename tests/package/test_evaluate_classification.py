"""`pacl evaluate classification` on small copies of the layouts agrees with the plain formula and torchmetrics."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from pacl.backbones import patch_tokens
from pacl.cli import main
from pacl.evaluate.classification import accuracies, count_hits
from pacl.evaluate.classification_data import KINDS, Labelled, spoken
from pacl.segment.prompts import TEMPLATES
from pacl.sharing import load_pacl
from pictures import encode, picture
from PIL import Image
from running import write_embedder
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from pacl_kernels.reference import compatibility

torch.set_num_threads(1)
JPEG = encode(picture(0))


def put(path: Path, data: bytes = JPEG) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def food101(root):
    put(root / "food-101/meta/test.json", json.dumps({"apple_pie": ["apple_pie/1"], "waffles": ["waffles/2"]}).encode())
    for name in ("apple_pie/1", "waffles/2"):
        put(root / f"food-101/images/{name}.jpg")


def caltech101(root):
    for name in ("BACKGROUND_Google", "ant", "crocodile_head"):
        put(root / f"caltech101/101_ObjectCategories/{name}/image_0001.jpg", encode(picture(0)[..., 0]))


def dtd(root):
    for name in ("banded/banded_0001.jpg", "wrinkled/wrinkled_0001.jpg"):
        put(root / f"dtd/dtd/images/{name}")
    put(root / "dtd/dtd/labels/test1.txt", b"banded/banded_0001.jpg\nwrinkled/wrinkled_0001.jpg\n")


def eurosat(root):
    for name in ("AnnualCrop", "SeaLake"):
        put(root / f"eurosat/2750/{name}/{name}_1.jpg")


def pets(root):
    for name in ("Abyssinian_201", "english_setter_33"):
        put(root / f"oxford-iiit-pet/images/{name}.jpg")
    put(root / "oxford-iiit-pet/annotations/test.txt", b"Abyssinian_201 1 1 1\nenglish_setter_33 2 2 1\n")


def sun397(root):
    put(root / "SUN397/ClassName.txt", b"/a/abbey\n/a/apse/indoor\n")
    for name in ("a/abbey/sun_a", "a/apse/indoor/sun_b"):
        put(root / f"SUN397/{name}.jpg")


LAYOUTS = {
    food101: ["apple pie", "waffles"],
    caltech101: ["ant", "crocodile head"],
    dtd: ["banded", "wrinkled"],
    eurosat: ["annual crop", "sea lake"],
    pets: ["Abyssinian", "English Setter"],
    sun397: ["abbey", "apse indoor"],
}


@pytest.mark.parametrize("write", LAYOUTS, ids=[x.__name__ for x in LAYOUTS])
def test_torchvision_s_layouts(write, tmp_path):
    name = write.__name__
    with pytest.raises(FileNotFoundError, match=f"does not hold a complete {name}; expected "):
        Labelled(name, tmp_path)
    write(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=f"has 2 of the {KINDS[name].count} images of {name}; .*--partial accepts"
    ):
        Labelled(name, tmp_path)
    data = Labelled(name, tmp_path, partial=True)
    data.transform = np.asarray
    data = pickle.loads(pickle.dumps(data))  # as for a worker process
    assert [each[0] for each in data.synonyms] == LAYOUTS[write]
    assert sorted(label for _, label in data) == [0, 1] and data[0][0].shape == (8, 8, 3)


@pytest.mark.parametrize("name", KINDS)
def test_nothing_there_is_one_line(name, tmp_path):
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        Labelled(name, tmp_path / "nowhere")
    assert "\n" not in str(error.value)
    assert KINDS[name].layout in str(error.value) or "need scipy" in str(error.value)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_another_pickle_than_cifar_s_is_never_opened(tmp_path):
    for name in ("test_batch", "batches.meta", *(f"data_batch_{i}" for i in range(1, 6))):
        put(tmp_path / "cifar-10-batches-py" / name, pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(FileNotFoundError, match="does not hold a complete cifar10"):
        Labelled("cifar10", tmp_path, partial=True)
    assert not (tmp_path / "sprung").exists()


def test_imagenet_s_names_are_in_the_order_of_its_folders(tmp_path):
    numbers = np.random.default_rng(0).choice(10**8, 1000, replace=False)
    for number in numbers:
        put(tmp_path / f"val/n{number:08d}/ILSVRC2012_val_1.JPEG")
    with pytest.raises(FileNotFoundError, match="1000 of the 50000"):
        Labelled("imagenet", tmp_path)
    data = Labelled("imagenet", tmp_path, partial=True, limit=10)
    data.transform = np.asarray
    assert [data[i][1] for i in range(10)] == list(range(0, 1000, 100))
    assert data.synonyms[0] == ["tench"] and data.synonyms[-1] == ["toilet paper"]
    (tmp_path / "val/extra").mkdir()
    put(tmp_path / "val/extra/1.jpg")
    with pytest.raises(FileNotFoundError, match="expected val/n01440764"):
        Labelled("imagenet", tmp_path, partial=True)


def test_accuracies():
    torch.manual_seed(0)
    labels = torch.cat([torch.arange(9), torch.randint(9, (91,))])
    scores = torch.randn(100, 9) + 2 * F.one_hot(labels, 9)
    counts = torch.zeros(3, 9, dtype=torch.int64)
    for part in range(0, 100, 30):
        count_hits(counts, scores[part : part + 30], labels[part : part + 30])
    options = {"num_classes": 9}
    expected = {
        "acc1": multiclass_accuracy(scores, labels, average="micro", **options),
        "acc5": multiclass_accuracy(scores, labels, average="micro", top_k=5, **options),
        "mean_per_class_recall": multiclass_accuracy(scores, labels, average="macro", **options),
    }
    assert accuracies(counts) == pytest.approx({k: x.item() for k, x in expected.items()})
    few = torch.tensor([[4, 0, 2], [1, 0, 2], [4, 0, 2]])
    assert accuracies(few) == {"acc1": 0.5, "acc5": None, "mean_per_class_recall": (1 / 4 + 1) / 2}
    with pytest.raises(ValueError, match="scores: got NaN"):
        count_hits(counts, torch.full((1, 9), torch.nan), torch.tensor([0]))


NAMES = ["red_square", "blue circle", "cat", "dog", "grass", "sky"]


@pytest.fixture(scope="module")
def world(untrained, tmp_path_factory):
    """Create an embedder on the untrained CLIP, and 30 images of six classes as folders and clip-benchmark's tars."""
    folder = tmp_path_factory.mktemp("classification")
    torch.manual_seed(0)
    write_embedder(folder / "run/embedder", untrained / "clip", form="max", attn_temperature=1.0)
    (folder / "wds/test").mkdir(parents=True)
    (folder / "wds/classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "wds/zeroshot_classification_templates.txt").write_text("a {c}.\nthe {c}.\n")
    pictures = []
    for i in range(30):
        label = (i * i + i // 7) % 6
        pictures.append((label, encode(picture(label, 64, 64) // 2 + picture(100 + i, 64, 64) // 2, "PNG")))
        put(folder / f"images/{label}{NAMES[label]}/{i:02d}.png", pictures[-1][1])
    for shard in range(2):
        with tarfile.open(folder / f"wds/test/{shard}.tar", "w") as tar:
            for i, (label, data) in list(enumerate(pictures))[shard * 15 : shard * 15 + 15]:
                for suffix, content in (("cls", f"{label}\n".encode()), ("png", data)):
                    info = tarfile.TarInfo(f"s{i:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    assert {label for label, _ in pictures} == set(range(6))
    return folder, pictures


def expected(folder, pictures, names, sentences):
    """Compute the accuracies from the whole score matrices. `names` has a list of synonyms for each class."""
    towers, embedder = load_pacl(folder / "run/embedder")
    labels = torch.tensor([label for label, _ in pictures])
    with torch.no_grad():
        pixels = torch.stack([towers.transform(Image.open(io.BytesIO(data))) for _, data in pictures])
        flat = [[x.replace("{}", name) for x in sentences] for each in names for name in each]
        texts = F.normalize(torch.stack([towers.encode_text(towers.tokenize(x)).mean(0) for x in flat]), dim=-1)
        patches = embedder(patch_tokens(towers.visual, pixels))
        plain = F.normalize(towers.visual(pixels), dim=-1) @ texts.T
        each = {"phi": compatibility(patches, texts, form="max"), "plain": plain}
    found = {}
    for kind, scores in each.items():
        scores = torch.stack([x.amax(1) for x in scores.split([len(each) for each in names], 1)], 1)
        best = scores.argsort(1, descending=True)
        hits = best == labels[:, None]
        recall = np.mean([hits[labels == k, 0].double().mean() for k in range(6)])
        found[kind] = {
            "acc1": hits[:, 0].double().mean().item(),
            "acc5": hits[:, :5].any(1).double().mean().item(),
            "mean_per_class_recall": recall,
        }
    return found


def test_command_on_tar_files_and_folders(world, tmp_path, capsys):
    folder, pictures = world
    model = ["--checkpoint", folder / "run/embedder", "--out", tmp_path, "--batch-size", "7", "--workers", "0"]
    for name, place in (("wds", "wds"), ("folder", "images")):
        pickle.dumps(Labelled(name, folder / place))  # worker processes need it
    words = ["evaluate", "classification", "--dataset", "wds", "--data-root", folder / "wds", *model]
    assert main([str(x) for x in words]) == 0
    names = [[name.replace("_", " ")] for name in NAMES]
    for kind, metrics in expected(folder, pictures, names, ["a {}.", "the {}."]).items():
        row = json.loads((tmp_path / f"wds_clip_run_classification-{kind}.json").read_text())
        assert row["metrics"] == pytest.approx(metrics)
        assert (row["images"], row["task"]) == (30, "zeroshot_classification")
        assert row["protocol"]["templates"] == ["a {}.", "the {}."]
        assert f"wds classification {kind}: acc1 {metrics['acc1']:.4f}" in capsys.readouterr().out or kind == "plain"

    # The same images in folders, with synonyms and the default templates.
    (tmp_path / "classes.txt").write_text("red square, crimson box\nblue circle\ncat, kitten, tabby\ndog\ngrass\nsky\n")
    words = ["evaluate", "classification", "--dataset", "folder", "--data-root", folder / "images", *model]
    assert main([str(x) for x in [*words, "--class-file", tmp_path / "classes.txt", "--no-plain"]]) == 0
    names = [["red square", "crimson box"], ["blue circle"], ["cat", "kitten", "tabby"], ["dog"], ["grass"], ["sky"]]
    metrics = expected(folder, pictures, names, TEMPLATES["simple"])["phi"]
    row = json.loads((tmp_path / "images_clip_run_classification-phi.json").read_text())
    assert row["metrics"] == pytest.approx(metrics) and 0 < metrics["acc1"] < metrics["acc5"] <= 1
    assert not (tmp_path / "images_clip_run_classification-plain.json").exists()


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.jpg": JPEG, "a.cls": b"6"}, "a.cls of .* has '6', expected 0 to 5"),
        ({"a.jpg": JPEG, "a.cls": pickle.dumps(1)}, "expected 0 to 5"),
        ({"a.jpg": JPEG}, "a of .* lacks its image or its .cls"),
        ({"a.jpg": b"no image", "a.cls": b"0"}, "cannot read the image at byte 512 of"),
    ],
)
def test_bad_tar_files_are_one_line(members, message, tmp_path, write_tar):
    (tmp_path / "classnames.txt").write_text("\n".join(NAMES))
    (tmp_path / "test").mkdir()
    write_tar("test/0.tar", members)
    with pytest.raises(ValueError, match=message):
        data = Labelled("wds", tmp_path)
        data.transform = np.asarray
        data[0]
    (tmp_path / "test/0.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match="0.tar cannot be read: it is a text"):
        Labelled("wds", tmp_path)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_damaged_image_is_one_line(untrained, workers, tmp_path, capsys):
    for name in ("cat", "dog"):
        put(tmp_path / f"images/{name}/1.jpg")
    put(tmp_path / "images/dog/2.jpg", JPEG[:99])
    model = ["--model", f"local-dir:{untrained / 'clip'}", "--workers", workers, "--out", str(tmp_path / "out")]
    words = ["evaluate", "classification", "--dataset", "folder", "--data-root", str(tmp_path / "images"), *model]
    assert main(words) == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if "pacl: error" in x or "Error" in x]
    assert len(lines) == 1 and lines[0].startswith("pacl: error: data: cannot read ") and "dog/2.jpg" in lines[0]


def test_names():
    assert open_clip.IMAGENET_CLASSNAMES[421] == "baluster / handrail"  # keeps its slash, unlike a folder's name
    assert [spoken("forest/broadleaf_x"), spoken("Ram C/V, 2012")] == ["forest broadleaf x", "Ram C V 2012"]
    assert spoken("HerbaceousVegetation", "eurosat") == "herbaceous vegetation"
