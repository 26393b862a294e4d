"""Read the frames of a video or of a folder, and write the pictures of a video, with PyAV."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import TooManyPixels, check_is_file, read_image
from ..files import atomic_writer, impostor
from .images import find_images, why_left_out

try:
    import av
except ImportError:  # the extra `video`; open_frames says so
    av = None  # type: ignore[assignment]

# Without their dot, in lower case.
SUFFIXES = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "wmv", "flv", "ogv", "3gp")
CODECS = ("libx264", "libopenh264", "mpeg4")  # the first that this build of FFmpeg has
TICKS = Fraction(1, 90_000)  # seconds between the times that a written video can have


def is_video(path: Path, folders: bool) -> bool:
    """Return True for the name of a video; with `folders`, also for a folder, whose images are its frames."""
    return folders and path.is_dir() or path.suffix.lower()[1:] in SUFFIXES


class Frames:
    """The frames of a video in order, upright and with square pixels: an iterator of (seconds, RGB image).

    Seconds count from the first frame, and increase. A file is decoded as it is read, so memory does not grow with its
    length. Frames of a folder are its images, ordered by the numbers in their names, at an even rate.

    Args:
        path: a video file, or a folder of images.
        max_pixels: largest number of pixels of a frame.
        rate: frames per second of a folder.
        without: folder of results, which is not searched for frames.

    Attributes:
        total: number of frames, or None if it is not known.
        rate: mean frames per second.
        problems: a line for each part that could not be read, after the last frame.

    Raises:
        ValueError: if PyAV is missing, and for a file that has no video, or too many pixels.
        OSError: if the file cannot be read.
    """

    def __init__(self, path: Path, max_pixels: int, rate: float, without: Path | None = None):
        if av is None:
            raise ValueError("needs PyAV: pip install 'pacl-kernels[video]'")
        self.path, self.max_pixels = path, max_pixels
        self.problems: list[str] = []
        self.rate = Fraction(rate).limit_denominator(1001)
        self.total: int | None
        if path.is_dir():
            files = sorted(find_images([path], without), key=_by_numbers)
            self.total, self._frames = len(files), self._images(files)
            return
        check_is_file(path)
        if (other := impostor(path)) is not None:
            raise ValueError(f"got {other}, expected a video")
        try:  # no demuxer may open what a list of segments names elsewhere
            container = av.open(str(path), options={"protocol_whitelist": "file"})
        except av.FFmpegError as error:
            if isinstance(error, PermissionError):
                raise
            raise ValueError("got a file of an unknown or damaged format, expected a video") from error
        # The cover of a song is a video stream of one picture.
        covers = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            container.close()
            raise ValueError("has no video stream, expected a video")
        stream = streams[0]
        self.rate = stream.average_rate or stream.guessed_rate or self.rate
        length = Fraction(container.duration or 0, av.time_base)
        self.total = stream.frames or round(length * self.rate) or None
        self._frames = self._decoded(container, stream)

    def __iter__(self) -> Iterator[tuple[Fraction, Image.Image]]:
        return self._frames

    def _decoded(self, container: Any, stream: Any) -> Iterator[tuple[Fraction, Image.Image]]:
        first, seconds, count, damaged = None, Fraction(-1), 0, False
        with container:
            for frame in self._packets(container, stream):
                if frame is None:
                    damaged = True
                    continue
                time = seconds + 1 / self.rate
                if frame.pts is not None:
                    first = frame.pts if first is None else first
                    time = (frame.pts - first) * frame.time_base
                seconds = max(time, seconds + TICKS) if count else Fraction(0)
                count += 1
                yield seconds, self._upright(frame, stream.sample_aspect_ratio)
        if damaged or not count:
            self.problems.append(f"damaged or cut off; {count} of its frames can be read")

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield the decoded frames, and None where something was damaged."""
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                yield None
                return
            if packet is None:
                return
            if packet.is_corrupt:
                yield None
            try:
                yield from packet.decode()
            except av.FFmpegError:
                yield None

    def _upright(self, frame: Any, pixel: Fraction | None) -> Image.Image:
        if frame.width * frame.height > self.max_pixels:
            raise TooManyPixels(f"{frame.width} x {frame.height} pixels, more than {self.max_pixels:,}")
        image = frame.to_image()
        if pixel and pixel != 1:
            image = image.resize((max(1, round(image.width * pixel)), image.height), Image.Resampling.BICUBIC)
        return image.rotate(frame.rotation, expand=True) if frame.rotation else image

    def _images(self, files: list[Path]) -> Iterator[tuple[Fraction, Image.Image]]:
        for number, file in enumerate(files):
            try:
                image = read_image(file, self.max_pixels)
            except Exception as error:  # decoders raise anything on damaged bytes
                self.problems.append(f"{file.name}: {why_left_out(file, error)}")
                continue
            yield number / self.rate, image


@contextlib.contextmanager
def film(path: Path, rate: Fraction) -> Iterator[Any]:
    """Write an MP4 video at `path`, atomically; yields a function that adds a picture at its seconds.

    The first picture decides the size, with even sides, as H.264 needs.
    """
    codec = next(name for name in CODECS if name in av.codecs_available)
    with atomic_writer(path) as file, av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", TICKS

        def add(picture: Image.Image, seconds: Fraction) -> None:
            if not stream.width:
                stream.width, stream.height = (side + side % 2 for side in picture.size)
            size = stream.width, stream.height
            if abs(picture.width - size[0]) > 1 or abs(picture.height - size[1]) > 1:
                picture = picture.resize(size)
            frame = av.VideoFrame.from_image(picture.crop((0, 0, *size)))
            frame.pts, frame.time_base = round(seconds / TICKS), TICKS
            container.mux(stream.encode(frame))

        yield add
        if stream.width:
            container.mux(stream.encode(None))


def _by_numbers(path: Path) -> list[tuple[bool, int, str]]:
    """Return a key that orders frame2 before frame10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", str(path))]
