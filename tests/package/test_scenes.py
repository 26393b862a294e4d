"""Generated scenes: the same bytes from the same seed, exact masks, and no held-out pairs in training."""

import numpy as np
import pytest
import torch
from pacl.data import scenes
from pacl.data.scene_shards import write_scenes
from pacl.data.scenes import CLASSES, HELD_OUT, PAIRS, SEEN, draw_scene, phrase
from pacl.data.shards import Shards


def draw(index: int, pairs=PAIRS, seed: int = 0) -> scenes.Scene:
    return draw_scene(np.random.default_rng([seed, 0, index]), pairs)


def test_classes():
    assert len(CLASSES) == len(set(CLASSES)) == 24
    assert set(SEEN) | set(HELD_OUT) == set(PAIRS) and not set(SEEN) & set(HELD_OUT)
    # Other pairs teach every colour and every pattern of a held-out pair.
    assert {colour for colour, _ in SEEN} == set(scenes.COLOURS)
    assert {pattern for _, pattern in SEEN} == set(scenes.PATTERNS)
    assert phrase(("orange", "dotted")) == "an orange dotted shape"


def test_shards_are_deterministic(tmp_path):
    def shards(name: str, seed: int, split: str = "train", workers: int = 0) -> list[bytes]:
        paths = write_scenes(tmp_path / name, split, 130, seed=seed, masks=True, shard_size=70, workers=workers)
        assert [path.name for path in paths] == [f"{split}-000.tar", f"{split}-001.tar"]
        assert [sum(1 for _ in Shards(path)) for path in paths] == [65, 65]
        return [path.read_bytes() for path in paths]

    assert shards("a", 3) == shards("b", 3) == shards("d", 3, workers=2)
    assert shards("c", 4) != shards("a", 3)
    assert shards("a", 3, "eval") != shards("a", 3)


def test_masks_survive_the_shards_and_images_nearly(tmp_path):
    paths = write_scenes(tmp_path, "train", 20, seed=0, masks=True)
    for index, sample in enumerate(Shards(paths, masks=True)):
        scene = draw(index)
        assert sample["key"] == f"train-{index:06d}"
        assert sample["caption"] == scene.caption
        assert torch.equal(sample["mask"], torch.from_numpy(scene.mask))
        image = torch.from_numpy(scene.image).permute(2, 0, 1)
        assert (sample["image"].float() - image.float()).abs().mean() < 6  # of 255, because of JPEG


@pytest.mark.parametrize("pattern", scenes.PATTERNS)
def test_masks_are_exact(pattern):
    """Every pixel in a shape's mask has that shape's paint."""
    checked = 0
    for index in range(60):
        scene = draw(index)
        for label in scene.labels:
            colour, kind = PAIRS[label]
            if kind != pattern:
                continue
            # Allowed paint: the colour +- 12, stripes, dots. Sensor noise has deviation 4; allow 5 deviations.
            allowed = [(scenes.COLOURS[colour], 12 + 20)]
            allowed += [((255,) * 3, 20)] if kind == "striped" else [((15,) * 3, 20)] if kind == "dotted" else []
            pixels = scene.image[scene.mask == label].astype(int)
            near = [np.abs(pixels - np.array(value)).max(1) <= width for value, width in allowed]
            assert np.any(near, axis=0).all()
            if len(near) == 2:
                assert 0.05 < near[1].mean() < 0.6  # the pattern is visible
            assert len(pixels) >= 150
            checked += 1
    assert checked > 10


def test_labels_and_masks_agree():
    for index in range(50):
        scene = draw(index)
        found = np.unique(scene.mask)
        assert set(found[found < len(PAIRS)]) == set(scene.labels)
        assert (found >= len(PAIRS)).sum() <= 1 and found.max() < len(CLASSES)
        assert 1 <= len(scene.labels) <= 3


def test_captions_name_only_what_is_there():
    bare = 0
    for index in range(200):
        scene = draw(index)
        named = {name for name in CLASSES if name in scene.caption}
        assert named and named <= {CLASSES[label] for label in np.unique(scene.mask)}
        bare += scene.caption in CLASSES
    assert bare > 20  # class prompts are bare phrases too


def test_held_out_pairs_are_absent_from_training(tmp_path):
    held_out = {phrase(pair) for pair in HELD_OUT}
    samples = list(Shards(write_scenes(tmp_path, "train", 300, seed=0, pairs=SEEN, masks=True), masks=True))
    assert len(samples) == 300
    for sample in samples:
        assert not any(name in sample["caption"] for name in held_out)
        assert not set(sample["mask"].unique().tolist()) & set(scenes.HELD_OUT_LABELS)
    evaluation = Shards(write_scenes(tmp_path, "eval", 300, seed=0, masks=True), masks=True)
    present = set(torch.stack([sample["mask"] for sample in evaluation]).unique().tolist())
    assert present == set(range(len(CLASSES)))
