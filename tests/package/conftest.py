import io
import sys
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
    from small_towers import write_world

    return write_world(tmp_path_factory.mktemp("tower_world"))


@pytest.fixture(scope="session")
def store_world(tmp_path_factory) -> Path:
    """Create what runs with data in a store read: a small CLIP, and three shards each of 12 and of 5 scenes."""
    from small_towers import write_world

    return write_world(tmp_path_factory.mktemp("store_world"), train=(36, 12), evaluation=(15, 5))


@pytest.fixture(scope="session")
def s3_session():
    """Run a real S3 server on loopback, behind a proxy that fails on demand."""
    from pacl import stores
    from remote_store import s3_server

    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as store:
        patch.setattr(stores, "FIRST_PAUSE", 0.02)
        yield store


@pytest.fixture
def s3(s3_session):
    """Return the server without faults and earlier requests."""
    s3_session.begin()
    yield s3_session
    s3_session.begin()


@pytest.fixture(scope="session", autouse=True)
def _one_vocabulary():
    """Read CLIP's vocabulary once: its tokenizer unpacks and splits 49,000 lines, at each start of a command."""
    module = sys.modules.get("open_clip.tokenizer")
    if module is None:  # no test of this session imports it
        yield
        return
    read, known = module.SimpleTokenizer.__init__, {}

    def begin(self, *options, **more):
        key = repr((options, more))
        if key not in known:
            read(self, *options, **more)
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.SimpleTokenizer, "__init__", begin)
        yield


@pytest.fixture(autouse=True)
def _quick_calibration(monkeypatch, tmp_path_factory):
    """Let a dry run time this machine with a tiny step, and keep the user's cache folder as it is."""
    from pacl_kernels import calibration

    monkeypatch.setattr(calibration, "SHAPES", {"cpu": (8, 9, 16)})
    monkeypatch.setattr(calibration, "BLOCK", {"cpu": 2**20})
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path_factory.getbasetemp() / "pacl_kernels")
