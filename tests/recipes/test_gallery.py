"""`examples/recipes/gallery.py` finds the images that one call over the whole gallery finds, in constant memory."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pacl_kernels import compatibility

GALLERY = Path(__file__).parents[2] / "examples" / "recipes" / "gallery.py"


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", [str(GALLERY), *map(str, words)])
    runpy.run_path(sys.argv[0], run_name="__main__")


def write(path: Path, x: torch.Tensor, name: str) -> Path:
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    else:
        pytest.importorskip("safetensors.torch").save_file({name: x}, path)
    return path


@pytest.mark.parametrize("suffix, dtype", [("npy", torch.float32), ("safetensors", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("form, block", [("cosine", 4), ("max", 1000)])
def test_the_best_of_a_gallery(form, block, suffix, dtype, tmp_path, monkeypatch, capsys):
    """Files of different N and sizes that no block divides give the ranking of all images together."""
    torch.manual_seed(0)
    parts, texts = [torch.randn(b, n, 16).to(dtype) for b, n in ((11, 9), (5, 4), (9, 9))], torch.randn(7, 16)
    files = [write(tmp_path / f"{i}.{suffix}", part, "patches") for i, part in enumerate(parts)]
    words = write(tmp_path / f"texts.{suffix}", texts.to(dtype), "texts")
    run(monkeypatch, words, *files, "--top", 3, "--block", block, "--form", form, "--device", "cpu")
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    phi = torch.cat([compatibility(x, texts.to(dtype), attn_temperature=0.05, form=form) for x in parts])
    values, rows = phi.T.topk(3)
    places = [(str(path), str(row)) for path, part in zip(files, parts, strict=True) for row in range(len(part))]
    assert [(k, rank) for k, rank, *_ in lines] == [(str(k), str(rank)) for k in range(7) for rank in (1, 2, 3)]
    assert [tuple(place) for *_, path, row in lines for place in [(path, row)]] == [places[i] for i in rows.flatten()]
    assert [float(value) for _, _, value, *_ in lines] == pytest.approx(values.flatten().tolist(), abs=1e-5)


def test_equal_images_come_in_their_order(tmp_path, monkeypatch, capsys):
    """The first of equal images wins, wherever blocks end; a gallery may hold fewer images than are asked for."""
    image, texts = torch.randn(1, 4, 8), torch.randn(1, 8)
    files = [write(tmp_path / f"{i}.npy", image.repeat(3, 1, 1), "patches") for i in range(2)]
    words = write(tmp_path / "texts.npy", texts, "texts")
    for block in (1, 2, 3):
        run(monkeypatch, words, *files, "--top", 9, "--block", block, "--device", "cpu")
        found = [line.split("\t")[3:] for line in capsys.readouterr().out.splitlines()]
        assert found == [[str(path), str(row)] for path in files for row in range(3)]


def high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_memory_does_not_grow_with_the_gallery(tmp_path, monkeypatch, capsys):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs, which resets the peak")
    words = write(tmp_path / "texts.npy", torch.randn(8, 512), "texts")
    grew = []
    for images in (64, 1024):  # the first call takes what does not depend on the gallery
        np.lib.format.open_memmap(tmp_path / f"{images}.npy", "w+", np.float32, (images, 50, 512))
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water()
        run(monkeypatch, words, tmp_path / f"{images}.npy", "--block", 32, "--device", "cpu")
        grew.append(high_water() - before)
    assert (tmp_path / "1024.npy").stat().st_size > 100 * 2**20
    assert grew[1] < 25 * 2**20, "100 MiB of patches, in blocks of 3 MiB"


@pytest.mark.parametrize(
    "words, message",
    [
        ("no.npy a.npy", "texts: got no.npy, expected a .npy file or a .safetensors file with 'texts'"),
        ("texts.npy no.npy", "gallery: got no.npy, expected a .npy file or a .safetensors file with 'patches'"),
        ("texts.npy a.npy no.safetensors", "expected a .npy file or a .safetensors file with 'patches'"),
        ("a.npy a.npy", "texts: got shape [2, 3, 8] in a.npy, expected [K, D]"),
        ("texts.npy texts.npy", "gallery: got shape [2, 8] in texts.npy, expected [B, N, 8]"),
        ("texts.npy a.npy --top 0", "--top: got 0, expected at least 1"),
        ("texts.npy a.npy --block 0", "--block: got 0, expected at least 1"),
        ("texts.npy a.npy --attn-temperature 0", "attn_temperature is 0.0, expected"),
    ],
)
def test_wrong_arguments_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("texts.npy"), torch.randn(2, 8), "texts"), write(Path("a.npy"), torch.randn(2, 3, 8), "patches")
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *words.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("gallery.py: error: ") and message in error
