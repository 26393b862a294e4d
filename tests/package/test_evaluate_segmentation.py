"""`evaluate_segmentation`: metrics against independent computations, warnings, and files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_ranks import guess, measure
from forks import run_ranks
from miniature import IDS, LAYOUTS, write
from pacl.evaluate.metrics import chance_miou
from pacl.evaluate.results import read_result, tables, write_row
from pacl.evaluate.segmentation import class_table, result_row
from pacl.evaluate.segmentation_data import SegmentationData
from pacl.evaluate.segmentation_measure import evaluate_segmentation
from pacl.evaluate.segmentation_pictures import contact_sheet, label_picture
from pacl.evaluate.specs import IGNORED, protocol
from PIL import Image

NAMED = dict(zip(IDS, LAYOUTS, strict=True))
TCL = protocol("tcl")


def truth_of(data):
    """Return a predictor of the true labels, found by the image's bytes; labels not asked for become the first one."""
    known = {data.image(i).tobytes(): data[i][1] for i in range(len(data))}

    def predict(image, labels):
        truth = known[image.tobytes()]
        return np.where(np.isin(truth, labels), truth, labels[0])

    return predict


def moved(predict, step, classes):
    return lambda image, labels: (predict(image, labels) + step) % classes


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Create one folder per dataset, once."""
    made = {}
    for key in (
        "voc21 {}.png",
        "voc20 {}.png",
        "ade150 {}.png",
        "stuff171 {}.png",
        "cityscapes {}_gtFine_labelIds.png",
    ):
        made[NAMED[key][0]] = tmp_path_factory.mktemp("data")
        write(made[NAMED[key][0]], NAMED[key])
    return made


@pytest.fixture
def load(roots):
    return lambda name: SegmentationData(name, roots[name], partial=True)


@pytest.mark.parametrize("name", ["voc21", "voc20", "ade150", "stuff171", "cityscapes"])
def test_the_truth_gets_100(load, name):
    data = load(name)
    measured = evaluate_segmentation(data, truth_of(data), TCL)
    assert [measured.metrics[key] for key in ("aAcc", "mIoU", "mAcc")] == [100, 100, 100]
    assert measured.warnings == []
    present = {data.classes[k] for i in range(3) for k in np.unique(data[i][1]) if k != IGNORED}
    assert measured.metrics["IoU"] == {x: 100.0 if x in present else None for x in data.classes}
    assert measured.scores.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["voc21", "stuff171", "cityscapes"])
def test_measures_are_those_of_sets_of_pixels(load, name):
    data = load(name)
    measured = evaluate_segmentation(data, guess, TCL)
    pairs = [(data[i][1].ravel(), guess(data.image(i), range(len(data.classes))).ravel()) for i in range(3)]
    truth, found = (np.concatenate(x) for x in zip(*pairs, strict=True))
    truth, found = truth[truth >= 0], found[truth >= 0]
    iou, recall = {}, {}
    for k in set(truth.tolist()) | set(found.tolist()):
        a, b = set(np.flatnonzero(truth == k)), set(np.flatnonzero(found == k))
        iou[k] = len(a & b) / len(a | b)
        recall[k] = len(a & b) / len(a) if a else None
    assert measured.metrics["aAcc"] == round(100 * float((truth == found).mean()), 2)
    assert measured.metrics["mIoU"] == round(100 * np.mean(list(iou.values())), 2)
    assert measured.metrics["mAcc"] == round(100 * np.mean([x for x in recall.values() if x is not None]), 2)
    for k, x in enumerate(data.classes):
        assert measured.metrics["IoU"][x] == (None if k not in iou else round(100 * iou[k], 2))


def test_confusion_matrix_is_that_of_torchmetrics(load):
    metrics = pytest.importorskip("torchmetrics.classification")
    data = load("stuff171")
    oracle = metrics.MulticlassConfusionMatrix(171, ignore_index=255)
    for i in range(3):
        labels = torch.from_numpy(data[i][1]).long()
        labels[labels == IGNORED] = 255
        oracle.update(torch.from_numpy(guess(data.image(i), range(171))).long(), labels)
    counts = evaluate_segmentation(data, guess, TCL).matrix.counts
    assert torch.equal(counts, oracle.compute()) and counts.sum() > 100


def test_classes_present_and_a_mean_per_image(load):
    data, rules = load("voc21"), protocol("present")
    seen = []

    def half(image, labels):
        seen.append(list(labels))
        out = np.full((image.height, image.width), labels[0], np.int16)
        out[:, image.width // 2 :] = labels[-1]
        return out

    measured = evaluate_segmentation(data, half, rules)
    scores = []
    for i in range(3):
        truth = np.where(data[i][1] == 0, IGNORED, data[i][1])  # without the background
        present = sorted(set(truth[truth >= 0].tolist()))
        assert seen[i] == present and 0 not in present
        found, keep = half(data.image(i), present), truth >= 0
        each = [((truth == k) & (found == k)).sum() / (keep & ((truth == k) | (found == k))).sum() for k in present]
        scores.append(np.mean(each))
    assert measured.metrics["mIoU"] == round(100 * np.mean(scores), 2)
    assert "background" not in measured.metrics["IoU"]
    assert evaluate_segmentation(data, truth_of(data), rules).metrics["mIoU"] == 100


def test_foreground_alone_is_averaged(load):
    data = load("voc21")
    whole, paper = (evaluate_segmentation(data, guess, protocol(x)) for x in ("tcl", "paper"))
    iou = {k: v for k, v in whole.metrics["IoU"].items() if k != "background"}
    assert paper.metrics["IoU"] == iou
    assert paper.metrics["mIoU"] == pytest.approx(np.mean([v for v in iou.values() if v is not None]), abs=0.01)


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("name", ["voc21", "ade150", "stuff171"])
def test_shifted_labels_raise_alarm(load, name, step):
    data = load(name)
    measured = evaluate_segmentation(data, moved(truth_of(data), step, len(data.classes)), TCL)
    assert len(measured.warnings) == 1
    assert measured.warnings[0].startswith("labels are probably shifted: mIoU is 0.00, and 100.00")
    assert measured.warnings[0].endswith(f"{'lowered' if step > 0 else 'raised'} by one")


def test_below_chance_raises_alarm_and_chance_does_not(load):
    data = load("voc21")
    measured = evaluate_segmentation(data, moved(truth_of(data), 3, 21), TCL)
    assert "is below chance" in measured.warnings[0] and "probably shifted" in measured.warnings[0]
    # Random labels have the mIoU of the formula.
    rng = np.random.default_rng(0)
    share = np.array([0.7, 0.2, 0.1, 0])
    truth = rng.choice(4, 400_000, p=share)
    found = rng.integers(0, 4, truth.size)
    iou = [((truth == k) & (found == k)).sum() / ((truth == k) | (found == k)).sum() for k in range(4)]
    expected = chance_miou(torch.from_numpy(np.bincount(truth, minlength=4)), range(4), 4)
    assert np.mean(iou) == pytest.approx(expected, abs=0.002)


def test_a_threshold_needs_a_background(load):
    rules = protocol("tcl", background={"rule": "threshold", "value": 0.2})
    with pytest.raises(ValueError, match="background: got a threshold with voc20, .*'aeroplane'"):
        evaluate_segmentation(load("voc20"), guess, rules)
    evaluate_segmentation(load("voc21"), guess, rules)


def test_labels_that_did_not_compete_are_refused(load):
    data = load("voc20")
    with pytest.raises(ValueError, match="got label 20, expected one of the 20 that compete"):
        evaluate_segmentation(data, lambda image, labels: np.full((image.height, image.width), 20), TCL)
    with pytest.raises(ValueError, match="expected \\(9, 14\\)"):
        evaluate_segmentation(data, lambda image, labels: np.zeros((4, 4), int), TCL)


@pytest.mark.long
def test_two_processes_are_one(roots, tmp_path):
    script = Path(__file__).with_name("evaluate_ranks.py")
    status, printed = run_ranks([script, "voc21", roots["voc21"]], 2, tmp_path / "printed")
    assert status == 0, printed[-3000:]
    line = next(x for x in printed.splitlines() if x.startswith("RESULT "))
    one = [measure("voc21", roots["voc21"], rules) for rules in ("tcl", "present")]
    assert json.loads(line.removeprefix("RESULT ")) == [one, one]


def test_rows_hold_what_makes_them_comparable(load, tmp_path):
    data = load("voc21")
    measured = evaluate_segmentation(data, guess, TCL)
    row = result_row(data, TCL, measured, model="ViT-B-16", pretrained="openai", embedder="run/1")
    path = write_row(tmp_path, row)
    assert path.name == "voc21_ViT-B-16_openai_run-1_tcl.json"
    back = read_result(path)
    assert back == json.loads(json.dumps(row))
    assert (back["task"], back["images"], back["images_of_the_set"]) == ("zeroshot_segmentation", 3, 1449)
    assert back["protocol"]["window_stride"] == 224 and len(back["protocol"]["templates"]) == 9
    table = class_table(row, data)
    assert f"mIoU {row['metrics']['mIoU']:.2f}" in table and "tvmonitor" in table
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a result"):
        read_result(path)


def test_tables_never_mix_protocols(load):
    def row(name, model, miou, rules=TCL, **changes):
        data = load(name)
        made = result_row(data, rules, evaluate_segmentation(data, truth_of(data), rules), model=model)
        return made | {"metrics": made["metrics"] | {"mIoU": miou}} | changes

    changed = dataclasses.replace(TCL, stride=2)  # the same name with other content
    rows = [
        row("ade150", "A", 14.9),
        row("voc21", "A", 51.25, images=1449),
        row("voc20", "A", 77.5, images=1449, warnings=["labels are probably shifted"]),
        row("voc21", "B", 60, images=1449, classes={"count": 21, "sha256": "other"}),
        row("voc21", "A", 99, rules=protocol("paper"), images=1449),
        row("voc21", "A", 98, rules=changed, images=1449),
    ]
    first, second, third = tables(rows).split("\n\n")
    assert first.splitlines() == [
        "protocol tcl",
        "mIoU   VOC21   VOC20     ADE    Avg  protocol",
        "A      51.25  77.50!  14.90*  47.88       tcl",
        "B     60.00#       -       -      -       tcl",
    ]
    assert second.startswith("protocol paper") and "99.00" in second and "99.00" not in first
    assert third.startswith("protocol tcl") and "98.00" in third


def test_contact_sheet_shows_best_median_and_worst(load):
    data = load("voc21")
    good = truth_of(data)
    called = []

    def worse(image, labels):  # right for the second image, half right for the third, wrong for the first
        called.append(image.tobytes())
        out = good(image, labels).copy()
        index = [data.image(i).tobytes() for i in range(3)].index(image.tobytes())
        out[: [len(out), 0, len(out) // 2][index]] = 7
        return out

    measured = evaluate_segmentation(data, worse, TCL)
    assert measured.scores.argsort(descending=True).tolist() == [1, 2, 0]
    called.clear()
    sheet = contact_sheet(data, worse, TCL, measured, each=1)
    assert called == [data.image(i).tobytes() for i in (1, 2, 0)]
    assert sheet.width == 3 * 324 and sheet.height > 3 * 200


def test_pictures_leave_background_and_ignored_pixels_bare(load):
    data = load("voc21")
    labels = np.zeros((400, 400), np.int16)
    labels[200:, :200], labels[200:, 200:] = 15, IGNORED
    pixels = np.asarray(label_picture(data, Image.new("RGB", (400, 400), (100, 100, 100)), labels))
    assert pixels[10, 10].tolist() == pixels[300, 300].tolist() == [100, 100, 100]
    assert pixels[300, 10].tolist() == [155, 117, 117]  # 0.6 of the devkit's colour of person, (192, 128, 128)
    assert len(pixels) > 400  # room for the names below
    pixels = np.asarray(label_picture(load("ade150"), Image.new("RGB", (400, 400), (100, 100, 100)), labels))
    assert pixels[10, 10].tolist() != [100, 100, 100] and pixels[300, 300].tolist() == [100, 100, 100]
