import io
import tarfile
from pathlib import Path

import pytest


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write `members` (name -> bytes) in their order as a .tar file; return its path."""
    with tarfile.open(path, "w") as tar:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def write_tar(tmp_path):
    """Return make_tar for names in the test's folder."""
    return lambda name, members: make_tar(tmp_path / name, members)


@pytest.fixture(scope="session")
def module_tar():
    """Return make_tar for fixtures that outlive a test."""
    return make_tar


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    """Create `clip`, an untrained CLIP, and `run/embedder`, an embedder on it. Tests must not change them."""
    import torch
    from pacl.demo.toy_clip import new_clip, save_clip
    from running import write_embedder

    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    save_clip(new_clip(), folder / "clip")
    write_embedder(folder / "run/embedder", folder / "clip")
    return folder


@pytest.fixture(scope="session")
def run_world(tmp_path_factory) -> Path:
    """Create input for `pacl train`: an untrained CLIP, three shards of 40 scenes, three of 20 with masks, classes."""
    import torch
    from pacl.data import scenes
    from pacl.data.scene_shards import write_scenes
    from pacl.demo.toy_clip import new_clip, save_clip

    folder = tmp_path_factory.mktemp("run_world")
    torch.manual_seed(0)
    save_clip(new_clip(), folder / "clip")
    write_scenes(folder / "scenes", "train", 120, seed=0, pairs=scenes.SEEN, shard_size=40)
    write_scenes(folder / "scenes", "eval", 60, seed=0, masks=True, shard_size=20)
    (folder / "classes.txt").write_text("\n".join(scenes.CLASSES) + "\n")
    return folder


@pytest.fixture(scope="session")
def tower_world(tmp_path_factory) -> Path:
    """Create an untrained CLIP with the sizes in `small_towers.py`, and 24 scenes."""
    import copy
    import json

    import open_clip
    import torch
    from pacl.data import scenes
    from pacl.data.scene_shards import write_scenes
    from safetensors.torch import save_file
    from small_towers import SIZES

    folder = tmp_path_factory.mktemp("tower_world")
    torch.manual_seed(0)
    (folder / "clip").mkdir()
    (folder / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": SIZES, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**copy.deepcopy(SIZES)).state_dict(), folder / "clip/open_clip_model.safetensors")
    write_scenes(folder / "scenes", "train", 24, seed=0, pairs=scenes.SEEN)
    return folder


@pytest.fixture(autouse=True)
def _quick_calibration(monkeypatch, tmp_path_factory):
    """Let a dry run time this machine with a tiny step, and keep the user's cache folder as it is."""
    from pacl_kernels import calibration

    monkeypatch.setattr(calibration, "SHAPES", {"cpu": (8, 9, 16)})
    monkeypatch.setattr(calibration, "BLOCK", {"cpu": 2**20})
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path_factory.getbasetemp() / "pacl_kernels")
