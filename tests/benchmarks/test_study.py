"""benchmarks/study.py measures correctly, and keeps its finished runs."""

import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from pacl.cross_attention import CrossAttention
from pacl.demo import toy_clip
from pacl.embedder import VisionEmbedder
from pacl.evaluate.metrics import IGNORE, patch_labels, patch_shares
from scipy.stats import mannwhitneyu, spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import coherence_study
import cross_attention
import hard_scenes
import study
import study_readings
import study_tables
import tolerance_study
from study_tables import readings

SIZE = study.Size(images=64, scenes=32, eval_scenes=12, clip_steps=1, clip_scenes=64)


def test_hard_scenes_name_what_they_show():
    near = 0
    for seed in range(40):
        scene = hard_scenes.draw_scene(np.random.default_rng(seed))
        kinds = [hard_scenes.KINDS[label] for label in scene.labels]
        assert set(np.unique(scene.mask)) - set(range(168, 174)) == set(scene.labels), "a shape is hidden"
        for label in range(len(hard_scenes.KINDS)):
            assert hard_scenes.CLASSES[label] not in scene.caption or label in scene.labels
        near += len(kinds) > 1 and all(sum(map(str.__ne__, kind, kinds[0])) == 1 for kind in kinds[1:])
    assert 5 < near < 30, "half of the scenes with several shapes hold near-duplicates"
    assert len(hard_scenes.CLASSES) == len(set(hard_scenes.CLASSES)) == 174


def test_an_embedder_that_knows_everything():
    """If each token is the text of its patch's class and the embedder is the identity, the accuracy is 1."""
    scenes = [hard_scenes.draw_scene(np.random.default_rng(seed)) for seed in range(6)]
    masks = torch.from_numpy(np.stack([scene.mask for scene in scenes]))
    classes = torch.nn.functional.normalize(torch.randn(174, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    truth = patch_labels(patch_shares(masks, 174, (8, 8))).flatten(1)
    tokens = classes[truth.masked_fill(truth == IGNORE, 0)]
    embedder = VisionEmbedder(64, 64)
    with torch.no_grad():
        for parameter in embedder.parameters():
            parameter.zero_()
        embedder.skip.weight.copy_(torch.eye(64))
    texts = classes[[scene.labels[0] for scene in scenes]]
    data = {"eval.tokens": tokens, "eval.masks": masks, "eval.texts": texts, "classes": classes}
    found = study.measure(study.Run("hard", 1, 1.0, 0), embedder, data)
    assert found["patch_accuracy"] == found["colour"] == found["pattern"] == found["accent"] == 1
    assert 0.5 < found["miou"] < 1 and found["retrieval_r1"] > 0.5
    # A head that has not been trained measures the same, by φ and cosines of its own.
    words = {"eval.words": texts[:, None], "classes.words": classes[:, None]}
    crossed = study.Run("hard", 1, 1.0, 0, pooling="cross-attention")
    assert study.measure(crossed, embedder, data | words, head=CrossAttention(64)) == pytest.approx(found)
    data["eval.tokens"] = tokens.roll(1, 0)
    assert study.measure(study.Run("hard", 1, 1.0, 0), embedder, data)["patch_accuracy"] < 0.3


def test_runs_are_kept_and_reported(tmp_path):
    for world in study.WORLDS:
        study.prepare(world, tmp_path, SIZE)
    (tmp_path / "size.json").write_text(json.dumps({"images": 64}))
    tune, rest = study.plan(tmp_path)
    assert len(tune) == 8 and rest == []
    runs = [run for run in tune if run.batch == 64]
    for run in runs:
        study.train(run, tmp_path, SIZE)
    assert [study.result_of(tmp_path, run) is not None for run in tune] == [run in runs for run in tune]
    for changes in (
        {},
        {"tau": None},
        {"form": "dot"},
        {"pooling": "paired"},
        {"pooling": "mean"},
        {"tower": "random"},
    ):
        run = study.Run("demo", 16, 1e-3, 0, **changes)
        study.train(run, tmp_path, SIZE)
        assert [point["step"] for point in study.result_of(tmp_path, run)] == [1, 2, 4]
    result = study.report(tmp_path)
    assert result["missing_runs"] in (6, 7) and len(result["tuning"]) == 2
    # So few pairs leave none out: runs of the same seed are the same. The worlds are there already.
    for _ in range(2):
        tolerance_study.work(tmp_path, SIZE, 32, 1)
    result = tolerance_study.report(tmp_path)
    assert result["missing_runs"] == 0 and [row["tolerance"] for row in result["rows"]] == [0.0, 2**-9, 2**-6] * 2
    for row in result["rows"]:
        assert row["tolerance"] == 0 or (row["kept_share"], set(row["differences"].values())) == (1.0, {0.0})
        assert [point["step"] for point in row["curves"][0]] == [1, 2]
    assert "| hard | 2<sup>-6</sup> | 100.0 | " in study_tables.tolerance_study(result)


def test_readings_as_they_are_and_as_what_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(study_readings, "WORLDS", {"demo": study.WORLDS["demo"]})
    monkeypatch.setattr(study_readings, "TRAINED", ("plain", "sclip"))
    monkeypatch.setattr(study_readings, "UNTRAINED", ("plain", "value"))
    monkeypatch.setattr(study_readings, "SEEDS", (0, 1))
    size = study.Size(images=256, scenes=256, eval_scenes=4, clip_steps=1, clip_scenes=256, points=1)
    study_readings.work(tmp_path, size, None)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(files) == 8  # two readings, rates and seeds
    next(iter(files)).unlink()
    result = study_readings.report(tmp_path)
    assert result["missing_runs"] == 1 and [row["seeds"] for row in result["rows"] if row["trained"]].count(2) == 3
    study_readings.work(tmp_path, size, None)
    assert sum(path.stat().st_mtime_ns == time for path, time in files.items()) == 7  # the others are not done again
    result = study_readings.report(tmp_path)
    for row in result["rows"]:
        if row["trained"]:
            row["miou"] = {"mean": row["lr"], "min": 0.0, "max": 1.0}
    value, plain = (next(x for x in readings(result, "demo").splitlines() if name in x) for name in ("value", "plain"))
    assert value.endswith("| - | - | - | - |") and plain.endswith("| 0.064 |") and "6.4 (0.0–100.0)" in plain
    with pytest.raises(SystemExit, match="holds runs of another size"):
        study_readings.work(tmp_path, study.Size(), None)


def test_coherence_of_towers_beside_their_gain(tmp_path, monkeypatch):
    names = ("random weights", "CLIP of the demo, patch embedding", "convolutional, random weights")
    monkeypatch.setattr(coherence_study, "TOWERS", {name: coherence_study.TOWERS[name] for name in names})
    for name, value in {"BEST": names[1], "SEEDS": (0,), "RESAMPLES": 50}.items():
        monkeypatch.setattr(coherence_study, name, value)
    toy_clip.save_clip(toy_clip.new_clip(), tmp_path / "clip")
    for name in ("vit-0.clip", "vit-150.clip"):  # so that no CLIP is trained
        shutil.copy(tmp_path / "clip/open_clip_model.safetensors", tmp_path / name)
    size = study.Size(images=64, scenes=64, eval_scenes=4, clip_steps=150, points=1)
    coherence_study.work(tmp_path, size, tmp_path / "clip")
    result = coherence_study.report(tmp_path)
    assert result["missing_runs"] == 0 and [row["weight"] for row in result["rows"]] == [0, 10, 0, 1, 10, 100, 0, 10]
    one = result["rows"][0]
    assert one["gain"] == one["miou"] - one["own_miou"]
    assert "| 2 | CLIP of the demo, patch embedding | " in study_tables.coherence_towers(result)
    assert len(study_tables.coherence_weights(result).splitlines()) == 6

    # The coherence is the AUC over all pairs of patches, if these are few.
    data = study.read_world(tmp_path, coherence_study.plan()[0])
    tokens = torch.nn.functional.normalize(data["eval.random weights_tokens"], dim=-1).flatten(0, 1)
    labels = patch_labels(patch_shares(data["eval.masks"], 30, (8, 8))).flatten()
    tokens, labels = tokens[labels != IGNORE], labels[labels != IGNORE]
    i, j = torch.triu_indices(len(labels), len(labels), 1)
    scores, same = (tokens[i] * tokens[j]).sum(1), labels[i] == labels[j]
    expected = mannwhitneyu(scores[same], scores[~same]).statistic / (same.sum() * (~same).sum())
    assert one["tokens_coherence"] == pytest.approx(float(expected), abs=1e-5)
    longer = torch.linspace(0.1, 9, 64)[:, None] * data["eval.random weights_tokens"]
    assert study.coherence(longer, data["eval.masks"], 30) == pytest.approx(float(expected), abs=1e-5)

    coherence_study.plot(result, tmp_path / "plot.svg")
    assert "prefers-color-scheme" in (tmp_path / "plot.svg").read_text()
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")


def test_rank_correlation_over_towers():
    rows = [{"tower": str(x), "coherence": x**3, "gain": -x} for x in range(9)]
    found = coherence_study.spearman(rows, "coherence")
    assert (found["rho"], found["low"], found["high"]) == pytest.approx((-1, -1, -1)) and found["towers"] == 9
    rows[0]["gain"], rows[8]["gain"] = rows[8]["gain"], rows[0]["gain"]
    found = coherence_study.spearman(rows, "coherence")
    assert found["low"] < found["rho"] < found["high"] and found["high"] > 0
    truth = spearmanr([row["coherence"] for row in rows], [row["gain"] for row in rows]).statistic
    assert found["rho"] == pytest.approx(truth)
    assert coherence_study.spearman(rows[:2], "coherence") is None


def test_attention_of_the_paired_caption_only():
    """Each image is pooled once, with its own caption, so only the score of its own pair equals that of PACL."""
    generator = torch.Generator().manual_seed(0)
    patches, texts = torch.randn(3, 5, 8, generator=generator), torch.randn(3, 8, generator=generator)
    p, t = (torch.nn.functional.normalize(x, dim=-1) for x in (patches, texts))
    logits = torch.empty(3, 3)
    for i in range(3):
        pooled = ((p[i] @ t[i] / 0.1).softmax(0)[:, None] * p[i]).sum(0)
        logits[i] = 10 * t @ (pooled / pooled.norm())
    own = torch.arange(3)
    expected = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(study.paired(patches, texts, torch.tensor(10.0), tau=0.1), expected)
    phi = study.compatibility(patches, texts, attn_temperature=0.1, form="cosine")
    torch.testing.assert_close(10 * phi.diagonal(), logits.diagonal())
    assert (10 * phi - logits).abs().max() > 0.1


def test_cross_attention_beside_phi(tmp_path, monkeypatch):
    monkeypatch.setattr(cross_attention, "WORLDS", {"demo": study.WORLDS["demo"]})
    monkeypatch.setattr(cross_attention, "COST_BATCHES", (2,))
    size = study.Size(images=64, scenes=32, eval_scenes=4, clip_steps=1, clip_scenes=32, points=1)
    settings = {"batch": 16, "lr": 0.01, "seeds": 2}
    cross_attention.work(tmp_path, size, settings)
    files = sorted((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 4
    files[-1].unlink()
    result = cross_attention.report(tmp_path)
    phi, head = result["rows"]
    assert result["missing_runs"] == 1 and phi["seeds"] == head["seeds"] == [0], "a seed counts if both methods have it"
    assert (phi["align"], head["align"], head["steps"]) == ("phi", "cross-attention", 4)
    for name, value in head["differences"].items():
        assert value == head[name] - phi[name]
    lines = study_tables.cross_attention(result, "quality").splitlines()
    assert lines[-1].startswith("| demo | cross-attention | 4 | ") and lines[-1].endswith(" | 1 |")
    seconds = result["cost"][0]["seconds"]
    assert seconds["cross-attention"] > seconds["phi"] > 0
    assert study_tables.cross_attention(result, "cost").splitlines()[-1].startswith("| 2 × 2 | ")
