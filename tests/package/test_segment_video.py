"""`pacl segment` on videos and folders of frames: the path of images, the carrying of scores, odd and bad files."""

from __future__ import annotations

import csv
import re
import signal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av", minversion="18")  # the first that writes rotations; it needs Python 3.11
from pacl.cli import main  # noqa: E402
from pacl.commands import LEFT_OUT  # noqa: E402
from pacl.segment import frames as frames_module  # noqa: E402
from pacl.segment.frames import Frames  # noqa: E402
from pacl.segment.predict import Dense  # noqa: E402
from pacl.segment.temporal import TEMPERATURE, Carry  # noqa: E402
from pacl.segment.video import Drawn, VideoResults  # noqa: E402
from pictures import encode, picture  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(1)


def write_clip(path: Path, pictures: list[np.ndarray], ticks=None, rotation: int = 0, pixel: Fraction | None = None):
    """Write a video whose frame i is shown at ticks[i] / 1000 seconds; it is lossless unless it is an MP4."""
    codec, colours = ("libx264", "yuv420p") if path.suffix == ".mp4" else ("ffv1", "bgr0")
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.time_base = colours, Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if pixel is not None:
            stream.codec_context.sample_aspect_ratio = pixel
        for each, tick in zip(pictures, ticks or range(0, 100 * len(pictures), 100), strict=True):
            frame = av.VideoFrame.from_ndarray(each, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def scene(count: int, height: int = 33, width: int = 47) -> list[np.ndarray]:
    """Return frames of noise, of which each keeps most of the one before."""
    found = [picture(0, height, width)]
    for i in range(1, count):
        found.append((0.8 * found[-1] + 0.2 * picture(i, height, width)).astype(np.uint8))
    return found


def segment(untrained, out: Path, *words) -> int:
    options = ["--checkpoint", untrained / "run/embedder", "--words", "dog,cat,sky", "--templates", "none"]
    return main(["segment", *map(str, [*words, *options, "--short-side", 32, "--out", out])])


def label_maps(folder: Path, pattern: str = "*.png") -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob(pattern))]


def table(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def shown(path: Path) -> list[tuple[float, tuple[int, int]]]:
    """Return the seconds and the size of every frame of a video."""
    with av.open(str(path)) as container:
        return [(float(frame.time), (frame.width, frame.height)) for frame in container.decode(video=0)]


def test_a_clip_is_its_folder_of_frames(untrained, tmp_path, capsys):
    """The clip, the folder of its frames and, without carrying, the images give the same label maps."""
    pictures = scene(12)
    clip, folder = write_clip(tmp_path / "clip.mkv", pictures), tmp_path / "frames"
    folder.mkdir()
    for i, each in enumerate(pictures):
        (folder / f"f{i}.png").write_bytes(encode(each, "PNG"))
    assert segment(untrained, tmp_path / "out", clip, folder, "--video", "--fps", 10) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"2 video(s) in {tmp_path / 'out'}"
    assert "clip.mkv: 12/12" in said.err and "frames: 12/12" in said.err
    carried = label_maps(tmp_path / "out/clip-labels")
    assert len(carried) == 12 and carried[0].shape == (33, 47)
    assert np.array_equal(carried, label_maps(tmp_path / "out/frames-labels"))
    rows = table(tmp_path / "out/clip-shares.csv")
    assert rows == table(tmp_path / "out/frames-shares.csv")
    assert rows[0] == ["frame", "seconds", "dog", "cat", "sky"] and [row[1] for row in rows[1:3]] == [
        "0.0000",
        "0.1000",
    ]
    shares = [[float((labels == i).mean()) for i in range(3)] for labels in carried]
    assert np.allclose([[float(x) for x in row[2:]] for row in rows[1:]], shares, atol=1e-5)
    overlay = shown(tmp_path / "out/clip-overlay.mp4")
    assert [round(seconds, 3) for seconds, _ in overlay] == [i / 10 for i in range(12)]
    assert all(side % 2 == 0 for _, size in overlay for side in size)
    assert segment(untrained, tmp_path / "alone", clip, "--temporal", 0) == 0
    assert segment(untrained, tmp_path / "images", folder) == 0
    order = sorted(range(12), key=lambda i: f"f{i}")  # of the images' names
    images = label_maps(tmp_path / "images", "*-labels.png")
    alone = label_maps(tmp_path / "alone/clip-labels")
    assert np.array_equal(images, [alone[i] for i in order])
    assert np.array_equal(alone[0], carried[0]) and not np.array_equal(alone, carried)
    # A shorter video of the same name leaves no label map of the longer one.
    assert segment(untrained, tmp_path / "alone", write_clip(clip, pictures[:2])) == 0
    assert len(label_maps(tmp_path / "alone/clip-labels")) == 2


def test_frames_are_those_that_a_player_shows(tmp_path):
    """Times of a variable rate, frames turned upright, and pixels made square."""
    pictures = scene(3)
    turned = Frames(write_clip(tmp_path / "a.mkv", pictures, [500, 520, 900], rotation=90), 10**6, 25)
    seconds, images = zip(*turned, strict=True)
    assert seconds == (0, Fraction(20, 1000), Fraction(400, 1000)) and not turned.problems
    assert all(np.array_equal(np.rot90(each), image) for each, image in zip(pictures, images, strict=True))
    wide = Frames(write_clip(tmp_path / "b.mp4", scene(3, 32, 48), pixel=Fraction(2)), 10**6, 25)
    assert wide.total == 3 and [image.size for _, image in wide] == [(96, 32)] * 3


def test_bad_videos_are_one_line_each(untrained, tmp_path, capsys):
    data = write_clip(tmp_path / "good.mp4", scene(12, 32, 48)).read_bytes()
    (tmp_path / "damaged.mp4").write_bytes(data[: data.index(b"mdat") + len(data) // 2])
    (tmp_path / "cut.mp4").write_bytes(data[: data.index(b"moov") - 4] + data[data.index(b"mdat") - 4 :])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 9)
    write_clip(tmp_path / "large.avi", [picture(0, 90, 90)])
    with av.open(str(tmp_path / "audio.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        samples = np.zeros((1, 800), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames/1.png").write_bytes(encode(picture(0, 40, 40), "PNG")[:700])
    (tmp_path / "frames/2.png").write_bytes(encode(picture(0, 40, 40), "PNG"))
    (tmp_path / "none").mkdir()
    names = ["good.mp4", "damaged.mp4", "cut.mp4", "text.mp4", "noise.mp4", "large.avi", "audio.mkv", "gone.mp4"]
    paths = [tmp_path / name for name in [*names, "frames", "none"]]
    out = tmp_path / "out"
    assert segment(untrained, out, *paths, "--video", "--max-image-pixels", 8000) == LEFT_OUT
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.endswith("frame/s")]
    expected = [
        r"damaged.mp4: damaged or cut off; ([1-9]|1[01]) of its frames can be read",
        r"skipped .*cut.mp4: got a file of an unknown or damaged format, expected a video",
        r"skipped .*text.mp4: got a text, expected a video",
        r"skipped .*noise.mp4: got a file of an unknown or damaged format, expected a video",
        r"skipped .*large.avi: 90 x 90 pixels, more than 8,000 \(--max-image-pixels\)",
        r"skipped .*audio.mkv: has no video stream, expected a video",
        r"skipped .*gone.mp4: is not a file",
        r"frames: 1.png: got a damaged or truncated PNG image",
        r"skipped .*none: images: got none in .*none, expected JPEG, .* files",
    ]
    assert len(lines) == len(expected), said.err
    for pattern, line in zip(expected, lines, strict=True):
        assert re.search(pattern, line), line
    assert said.out.splitlines()[-1] == f"3 video(s) in {out}, 7 skipped"
    assert len(shown(out / "damaged-overlay.mp4")) == len(table(out / "damaged-shares.csv")) - 1
    assert segment(untrained, out, paths[3]) == 1
    assert "got 1 that cannot be used, expected videos with frames" in capsys.readouterr().err
    assert segment(untrained, out, paths[0], "--temporal", 1) == 1
    assert "temporal: got 1, expected at least 0 and less than 1" in capsys.readouterr().err
    words = ["look", str(paths[0]), "--words", "dog", "--checkpoint", str(untrained / "run/embedder")]
    assert main([*words, "--out", str(out)]) == 1
    assert "got a video, which pacl segment reads, expected an image" in capsys.readouterr().err


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setattr(frames_module, "av", None)
    with pytest.raises(ValueError, match=r"needs PyAV: pip install 'pacl-kernels\[video\]'"):
        Frames(tmp_path / "clip.mp4", 10**6, 25)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_written(tmp_path, capsys, number):
    """The video until the signal can be played, and its table and label maps are complete."""

    class OneToken:
        stride = 1

        def dense(self, image):
            return Dense(torch.ones(1, 1, 4), (image.height, image.width))

    seen = []

    def draw(image, dense):
        seen.append(image)
        if len(seen) == 3:
            signal.raise_signal(number)
        return Drawn(Image.new("P", image.size), [1.0], image)

    frames = Frames(write_clip(tmp_path / "clip.mkv", scene(9)), 10**6, 25)
    with pytest.raises(SystemExit) as ended:
        VideoResults(frames, OneToken(), 0.5, draw, ["dog"]).write(tmp_path / "out/clip")
    assert ended.value.code == 128 + number
    assert f"clip.mkv: stopped after 3 frames, whose results are in {tmp_path / 'out'}" in capsys.readouterr().err
    assert len(shown(tmp_path / "out/clip-overlay.mp4")) == len(label_maps(tmp_path / "out/clip-labels")) == 3
    assert [row[0] for row in table(tmp_path / "out/clip-shares.csv")] == ["frame", "0", "1", "2"]
    assert not list(tmp_path.glob("out/.*"))


def test_carrying_is_its_formula():
    """The mixture of two frames is that of the docstring, term by term; a cut and another grid begin anew."""
    generator = torch.Generator().manual_seed(0)
    height, width, share, reach = 3, 4, 0.7, 1
    first, noise, more = torch.randn(3, height, width, 16, generator=generator, dtype=torch.float64).unbind(0)
    second = first.roll(1, 1) + 0.3 * noise
    third = second + 0.2 * more
    carry, expected, before = Carry(share, reach), first, first
    assert torch.equal(carry(Dense(first, (30, 40))).patches, first)
    for patches in (second, third):
        mixed = torch.empty_like(patches)
        for y in range(height):
            for x in range(width):
                near = [(v, u) for v in range(y - reach, y + reach + 1) for u in range(x - reach, x + reach + 1)]
                near = [(v, u) for v, u in near if 0 <= v < height and 0 <= u < width]
                cosines = torch.stack([torch.cosine_similarity(patches[y, x], before[at], 0) for at in near])
                weights = torch.softmax(cosines / TEMPERATURE, 0)
                trust = share * cosines.max().clamp(min=0)
                carried = sum(weight * expected[at] for weight, at in zip(weights, near, strict=True))
                mixed[y, x] = (1 - trust) * patches[y, x] + trust * carried
        before, expected = patches, mixed
        found = carry(Dense(patches, (30, 40))).patches
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert (found - patches).abs().max() > 0.1
    first[..., 8:] = 0
    cut = first.roll(8, -1)  # orthogonal to it
    carry = Carry(share, reach)
    carry(Dense(first, (30, 40)))
    assert (carry(Dense(cut, (30, 40))).patches - cut).abs().max() < 1e-12
    assert torch.equal(carry(Dense(cut[:2], (20, 40))).patches, cut[:2])
    assert torch.equal(Carry(0, reach)(Dense(second, (30, 40))).patches, second)
