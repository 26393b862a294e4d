import os

import pytest
from pacl.files import atomic_writer, write_bytes


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
