"""`pacl evaluate` with a small CLIP: its files, its output, and labels equal to the segmenter's."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import IDS, LAYOUTS, write
from pacl.cli import main
from pacl.evaluate.segmentation_data import SegmentationData
from pacl.evaluate.segmentation_measure import SegmenterPredictor, evaluate_segmentation
from pacl.evaluate.specs import protocol
from pacl.readings import READINGS
from pacl.segment.predict import Segmenter
from pacl.towers import load_towers
from PIL import Image

torch.set_num_threads(1)
NAMED = dict(zip(IDS, LAYOUTS, strict=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Create a miniature Pascal VOC and ADE20K, and a protocol that fits the untrained CLIP."""
    folder = tmp_path_factory.mktemp("world")
    write(folder / "data", NAMED["voc21 {}.png"])
    write(folder / "data", NAMED["ade150 {}.png"])
    rules = {"short_side": 64, "window": 32, "window_stride": 16, "templates": ["a {}.", "the {}."]}
    (folder / "small.json").write_text(json.dumps(rules | {"background": {"rule": "class"}}))
    return folder


@pytest.fixture(scope="module")
def towers(untrained):
    return load_towers(f"local-dir:{untrained / 'clip'}")


def evaluate(world, out, *words) -> int:
    given = ["--data-root", world / "data", "--protocol", world / "small.json", "--out", out]
    return main(["evaluate", "segmentation", *map(str, given), *map(str, words)])


def test_results_of_a_checkpoint_and_of_its_clip(world, untrained, tmp_path, capsys):
    options = ["--partial", "--dataset", "voc21", "voc20", "ade150"]
    assert evaluate(world, tmp_path, *options, "--checkpoint", untrained / "run/embedder") == 0
    said = capsys.readouterr().out
    names = {f"{x}_clip_run_small" for x in ("voc21", "voc20", "ade150")}
    assert {path.name for path in tmp_path.iterdir()} == {x + end for x in names for end in (".json", ".png")}
    row = json.loads((tmp_path / "voc21_clip_run_small.json").read_text())
    assert (row["dataset"], row["model"], row["embedder"], row["images"]) == ("voc21", "clip", "run", 3)
    assert row["protocol"]["window"] == 32 and row["protocol"]["name"] == "small"
    assert f"mIoU {row['metrics']['mIoU']:.2f}" in said and "VOC21   VOC20     ADE   Avg" in said
    assert not {"mmcv", "mmengine", "mmseg"} & {name.split(".")[0] for name in sys.modules}
    with Image.open(tmp_path / "ade150_clip_run_small.png") as sheet:
        assert sheet.width == 3 * 324

    model = ["--model", f"local-dir:{untrained / 'clip'}"]
    assert evaluate(world, tmp_path, "--partial", "--dataset", "voc21", *model, "--threshold", "0.1") == 0
    capsys.readouterr()
    assert main(["evaluate", "table", *map(str, sorted(tmp_path.glob("*.json")))]) == 0
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert [x.splitlines()[0] for x in tables] == [
        "protocol small",
        'protocol small background={"rule": "threshold", "value": 0.1}',
    ]
    assert "clip run" in tables[0] and "clip run" not in tables[1]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--dataset", "voc21"], "has 3 of the 1449 images"),
        (["--partial", "--dataset", "voc20", "--threshold", "0.2"], "voc20, expected none: it has no background class"),
        (["--partial", "--dataset", "voc12"], "did you mean"),
        (["--partial"], "dataset: got none"),
        (["--partial", "--dataset", "cityscapes"], "no Cityscapes val"),
        (["--partial", "--dataset", "voc21", "--protocol", "none"], "protocol: got 'none'"),
    ],
)
def test_errors_are_one_line_and_come_before_the_model(world, tmp_path, capsys, words, message):
    assert evaluate(world, tmp_path / "out", *words, "--model", "no-such-model") == 1
    said = capsys.readouterr()
    assert said.err.startswith("pacl: error: ") and said.err.count("\n") == 1 and message in said.err
    assert not (tmp_path / "out").exists()


def test_table_of_all_tasks(world, untrained, tmp_path, capsys):
    model = ["--model", f"local-dir:{untrained / 'clip'}", "--out", str(tmp_path)]
    data = ["--data-root", str(world / "data"), "--dataset", "voc20", "--partial"]
    assert evaluate(world, tmp_path, *data, *model) == 0
    assert main(["evaluate", "retrieval", "--data", "synthetic:eval", "--scenes", "4", "--workers", "0", *model]) == 0
    assert main(["evaluate", "alignment", *data, *model]) == 0
    capsys.readouterr()
    files = sorted(map(str, tmp_path.glob("*.json")))
    assert main(["evaluate", "table", *files]) == 0
    said = capsys.readouterr()
    tables = [x.splitlines() for x in said.out.strip().split("\n\n")]
    assert [x[0] for x in tables] == [
        "protocol small",
        "zeroshot_retrieval, synthetic:eval, protocol retrieval phi",
        "patch_classification, voc20, protocol alignment plain",
    ]
    assert [x[1].split()[0] for x in tables] == ["mIoU", "model", "model"] and said.err == ""
    rows = {row["task"]: row for row in (json.loads(Path(path).read_text()) for path in files)}
    for title, _, line in tables[1:]:
        metrics = rows[title.split(",")[0]]["metrics"]
        assert all(f"{x:.4f}" in line for x in metrics.values() if x is not None)
    assert main(["evaluate", "table", *files[:1], str(world / "small.json")]) == 1
    assert "small.json is not a result of pacl evaluate (dataset is missing)" in capsys.readouterr().err


def test_one_table_over_all_readings(world, untrained, tmp_path, capsys):
    clip = f"local-dir:{untrained / 'clip'}"
    options = ["--model", clip, "--partial", "--dataset", "voc20", "--limit", "2"]
    assert evaluate(world, tmp_path, *options, "--tokens", "all") == 0
    table = capsys.readouterr().out.strip().split("\n\n")[-1].splitlines()
    assert table[0] == "protocol small" and table[1].split() == ["mIoU", "VOC20", "Avg", "protocol"]
    data = SegmentationData("voc20", world / "data", partial=True, limit=2)
    rules = protocol(str(world / "small.json"))
    alone = [name for name in READINGS if name != "proxy"]  # without --proxy none is loaded
    assert table[len(alone) + 2].startswith("Next: ")
    for name, line in zip(alone, table[2:], strict=False):
        label = "clip" if name == "plain" else f"clip {name}"
        row = json.loads((tmp_path / f"voc20_{label.replace(' ', '_')}_small.json").read_text())
        assert row["tokens"] == name and row["protocol"]["name"] == "small"
        if name in ("plain", "naclip"):
            predict = SegmenterPredictor(load_towers(clip, tokens=name), None, data, rules)
            assert row["metrics"] == evaluate_segmentation(data, predict, rules).metrics
        assert line.startswith(label) and line.endswith("  small") and f"{row['metrics']['mIoU']:.2f}" in line
    for words, message in (
        (["--tokens", "plain,qkv", "--model", clip], "tokens: got 'qkv', expected one of plain, value"),
        (["--tokens", "all", "--checkpoint", untrained / "run"], "tokens: got all with --checkpoint, expected none"),
        (["--tokens", "kk", "--checkpoint", untrained / "run"], "run was trained on 'plain'; expected the same"),
    ):
        assert evaluate(world, tmp_path, "--partial", "--dataset", "voc20", *words) == 1
        assert message in capsys.readouterr().err


def test_random_weights_are_not_measured(world, tmp_path, capsys):
    assert evaluate(world, tmp_path / "out", "--partial", "--dataset", "voc21", "--limit", "1") == 1
    said = capsys.readouterr().err
    assert said.startswith("pacl: error: pretrained: got none for ViT-B-16, whose weights would be random; expected ")
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_check(world, tmp_path, capsys):
    assert evaluate(world, tmp_path, "--check", "--dataset", "voc21") == 3  # 3 of 1449 images
    said = capsys.readouterr().out
    assert "tvmonitor" in said and "problem: 3 images, expected 1449" in said
    assert [path.name for path in tmp_path.iterdir()] == ["voc21_check.png"]


def test_help(capsys):
    assert main(["evaluate", "--help"]) == 0
    assert main(["evaluate", "nothing"]) == 2
    assert "segmentation" in capsys.readouterr().err


def test_labels_are_the_segmenter_s(world, towers):
    data = SegmentationData("voc21", world / "data", partial=True)
    rules = protocol(str(world / "small.json"))
    segmenter = Segmenter(towers, short_side=64, window=32, window_stride=16)
    image = data.image(1)
    everything = segmenter.texts(data.classes, ["a {}.", "the {}."])
    expected = segmenter.labels(image, everything)
    assert torch.equal(SegmenterPredictor(towers, None, data, rules)(image, range(21)), expected)
    assert len(expected.unique()) > 1

    # With candidates "present", only the given classes compete.
    few = [2, 7, 20]
    present = dataclasses.replace(rules, candidates="present")
    expected = segmenter.labels(image, segmenter.texts([data.classes[k] for k in few], ["a {}.", "the {}."]))
    found = SegmenterPredictor(towers, None, data, present)(image, few)
    assert torch.equal(found, torch.tensor(few, dtype=torch.int16)[expected.long()])

    # With a threshold, "background" is not a word: pixels below the threshold get label 0.
    dense = segmenter.dense(image)
    words = segmenter.texts(data.classes[1:], ["a {}.", "the {}."])
    best = dense.labels(words).best
    cut = float(best.median())
    found = SegmenterPredictor(
        towers, None, data, dataclasses.replace(rules, background={"rule": "threshold", "value": cut})
    )(image, range(21))
    assert torch.equal(found == 0, best < cut) and 0 < (found == 0).sum() < found.numel()
    entropy = {"rule": "entropy", "value": 2.99, "logit_scale": 10.0}
    found = SegmenterPredictor(towers, None, data, dataclasses.replace(rules, background=entropy))(image, range(21))
    assert torch.equal(found, dense.labels(words, entropy=2.99, logit_scale=10.0).labels)
    # In a dataset without a background class the rule has no effect.
    plain = SegmentationData("voc20", world / "data", partial=True)
    found = SegmenterPredictor(towers, None, plain, dataclasses.replace(rules, background=entropy))(image, range(20))
    assert torch.equal(found, segmenter.labels(image, words))


def test_synonyms_count_by_the_best(world, towers, tmp_path):
    file = tmp_path / "classes.txt"
    data = SegmentationData("voc21", world / "data", partial=True)
    names = [*data.classes[:20], "tvmonitor, television, screen"]
    file.write_text("\n".join(names))
    data = SegmentationData("voc21", world / "data", class_file=file, partial=True)
    predict = SegmenterPredictor(towers, None, data, protocol(str(world / "small.json")))
    segmenter, image = predict.segmenter, data.image(0)
    flat = [x.strip() for line in names for x in line.split(",")]
    scores = segmenter.dense(image).scores(segmenter.texts(flat, ["a {}.", "the {}."]))
    expected = torch.cat([scores[:20], scores[20:].amax(0, keepdim=True)])
    assert torch.allclose(segmenter.dense(image).scores(predict.texts), expected, atol=1e-6)
    assert np.isin(predict(image, range(21)), np.arange(21)).all()
