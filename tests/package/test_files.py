import os
import signal
import subprocess
import sys
import tempfile

import pytest
from pacl.files import atomic_writer, remove_unfinished, visible_files, write_bytes


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_bytes(path, b"complete")
    with pytest.raises(KeyboardInterrupt), atomic_writer(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"complete"
    assert os.listdir(path.parent) == ["result.json"]


def test_permissions_follow_the_umask(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_bytes(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_what_a_killed_write_left_goes_with_the_next_one(tmp_path):
    """The next write removes the temporary files of dead processes for the same file; those of living ones stay."""
    path = tmp_path / "model.safetensors"
    dies = "import os, sys, pacl.files as f\nwith f.atomic_writer(sys.argv[1]) as file: os.kill(os.getpid(), 9)"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", dies, str(path)]).returncode == -signal.SIGKILL
        assert len(os.listdir(tmp_path)) == 1, "a killed write leaves one file"
    mine = {".model.safetensors.original", ".config.json.abcdefgh.part", ".model.safetensors.part"}
    for name in mine:
        (tmp_path / name).write_bytes(b"")
    with atomic_writer(path) as first:
        (alive,) = set(os.listdir(tmp_path)) - mine
        write_bytes(path, b"second")
        assert alive in os.listdir(tmp_path)
        first.write(b"first")
    assert path.read_bytes() == b"first"
    assert set(os.listdir(tmp_path)) == mine | {path.name}


def test_a_file_that_is_just_to_get_its_name_is_not_removed(tmp_path, monkeypatch):
    replace = os.replace

    def late(source, target):
        remove_unfinished(tmp_path)  # as another process may do in this moment
        replace(source, target)

    monkeypatch.setattr("os.replace", late)
    write_bytes(tmp_path / "model.safetensors", b"whole")
    assert (tmp_path / "model.safetensors").read_bytes() == b"whole"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_a_folder_that_cannot_be_read_is_left_out_with_a_warning():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as root:  # not tmp_path, whose parents are closed to other users
        os.chmod(root, 0o755)
        for name in ("closed", "open"):
            os.mkdir(os.path.join(root, name))
            write_bytes(os.path.join(root, name, "a.png"), b"")
        os.chmod(os.path.join(root, "closed"), 0)
        try:
            if user == 0:
                os.seteuid(65534)  # nobody, since root may read everything
            with pytest.warns(UserWarning, match=r"closed: left out, because it cannot be read \(Permission denied\)"):
                found = list(visible_files(root))
        finally:
            os.seteuid(user)
            os.chmod(os.path.join(root, "closed"), 0o755)
    assert found == [os.path.join(root, "open", "a.png")]
