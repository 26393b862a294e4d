"""Scenes of cut-out pictures on photographs, with captions and exact masks, from packages that hold such pictures."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pacl.evaluate.metrics import IGNORE
from PIL import Image
from real_words_towers import found

SIDE = 320  # pixels of a scene
MASK = 80  # of its mask
SPLITS = ("train", "val", "test")
# Source -> a file that its package holds, which tells the folder, and the ending of its pictures.
EMOJI = {
    "fluent": ("assets/1f438.webp", "webp"),
    "noto": ("img/google/64/1f438.png", "png"),
    "twemoji": ("img/twitter/64/1f438.png", "png"),
}
SYMBOLS, FLAGS = 8, 9  # groups of emojibase that are no things
TWIN = 0.93  # correlation above which a held-out picture shows a trained one again


@dataclass(frozen=True, eq=False)
class Cutout:
    """A picture of a word: uint8 RGBA [h, w, 4], cut to what is not transparent."""

    word: str
    source: str
    rgba: np.ndarray


@dataclass(frozen=True)
class World:
    """Cut-outs and photographs (uint8 RGB [h, w, 3]) of each split; masks hold indices into `words`."""

    words: tuple[str, ...]
    cutouts: dict[str, list[Cutout]]
    photos: dict[str, list[np.ndarray]]

    def summary(self) -> dict:
        """Return the words, and how many pictures of each source, and photographs, each split has."""
        pictures = {split: dict(Counter(x.source for x in kept)) for split, kept in self.cutouts.items()}
        return {"words": self.words, "pictures": pictures, "photos": {k: len(x) for k, x in self.photos.items()}}


@dataclass(frozen=True)
class Scene:
    """image: uint8 [SIDE, SIDE, 3]; mask: uint8 [MASK, MASK], IGNORE where the photograph is; words: their indices."""

    image: np.ndarray
    mask: np.ndarray
    caption: str
    words: tuple[int, ...]


def read_world(packages: Path, seed: int = 0) -> World:
    """Return the words of which there are four pictures or more, one of them a stamp, with two held out of each.

    One of the two is for validation, the other for the test. A held-out picture that is nearly a trained one is left
    out. packages: folder of the unpacked packages. Raises FileNotFoundError for a missing one.
    """
    stamps, emoji = _stamps(packages), _emoji(packages)
    pictures = {
        word: [*paths, *emoji[word]] for word, paths in stamps.items() if len(emoji.get(word, ())) == len(EMOJI)
    }
    rng = np.random.default_rng(seed)
    cutouts: dict[str, list[Cutout]] = {split: [] for split in SPLITS}
    for word in sorted(pictures):
        found_ = [Cutout(word, source, rgba) for source, path in pictures[word] if (rgba := cut(path)) is not None]
        for place, index in enumerate(rng.permutation(len(found_))):
            cutouts["val" if place == 0 else "test" if place == 1 else "train"].append(found_[index])
    return World(tuple(sorted(pictures)), without_twins(cutouts), split_photos(_photos(packages)))


def without_twins(cutouts: dict[str, list[Cutout]]) -> dict[str, list[Cutout]]:
    """Leave out held-out pictures whose 16 x 16 thumbnail is nearly that of a trained one, mirrored or not."""
    trained = np.stack([_thumbnail(x.rgba) for x in cutouts["train"]])

    def new(cutout: Cutout) -> bool:
        both = (_thumbnail(cutout.rgba), _thumbnail(cutout.rgba[:, ::-1]))
        return max(float((trained @ x).max()) for x in both) <= TWIN

    return {split: kept if split == "train" else [x for x in kept if new(x)] for split, kept in cutouts.items()}


def split_photos(photos: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Give every fourth photograph to the test and to the validation, and the others to training."""
    held = photos[3::4]
    return {"train": [x for i, x in enumerate(photos) if i % 4 != 3], "val": held, "test": held}


def cut(path: Path) -> np.ndarray | None:
    """Return a picture cut to what is not transparent, at most 256 pixels a side; None if it has no outline."""
    image = Image.open(path).convert("RGBA")
    image.thumbnail((512, 512))
    box = image.getchannel("A").point(lambda x: 255 * (x > 127)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    image.thumbnail((256, 256))
    inside = np.asarray(image)[..., 3] > 127
    return np.asarray(image) if min(inside.shape) >= 24 and 0.1 < inside.mean() < 0.97 else None


def phrase(word: str) -> str:
    """Return the word with its article, without one for a plural."""
    plural = word.endswith("s") and not word.endswith(("ss", "us"))
    return word if plural else f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def draw_scene(world: World, split: str, index: int) -> Scene:
    """Draw one to three pictures of different words on a part of a photograph; (split, index) determines the scene.

    Sides are 34 to 60 % of the scene's, some are mirrored, and none hides more than an eighth of another.
    """
    rng = np.random.default_rng([SPLITS.index(split), index])
    photos, cutouts = world.photos[split], world.cutouts[split]
    canvas = _background(photos[rng.integers(len(photos))], rng)
    owner = np.full((SIDE, SIDE), IGNORE, np.uint8)
    words: list[int] = []
    wanted = int(rng.integers(1, 4))
    for number in rng.permutation(len(cutouts))[: 2 * wanted]:
        word = world.words.index(cutouts[number].word)
        if len(words) < wanted and word not in words and _place(canvas, owner, cutouts[number].rgba, word, rng):
            words.append(word)
    rng.shuffle(words)
    named = [phrase(world.words[word]) for word in words]
    caption = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    step = SIDE // MASK
    return Scene(canvas, owner[step // 2 :: step, step // 2 :: step].copy(), caption, tuple(words))


def sheet(packages: Path, path: Path, columns: int = 4, rows: int = 2) -> list[str]:
    """Write scenes of the test to an image whose pictures may be passed on, and return their captions.

    Its cut-outs are Fluent's (MIT) and Noto's (Apache 2.0), its photograph is in the public domain (CC0).
    """
    world = read_world(packages)
    free = [cutout for cutout in world.cutouts["test"] if cutout.source in ("fluent", "noto")]
    photo = Image.open(found(packages, "share/backgrounds/seeding_by_*.jpg")).convert("RGB")
    world = replace(world, cutouts={"test": free}, photos={"test": [np.asarray(photo)]})
    scenes = [draw_scene(world, "test", index) for index in range(columns * rows)]
    lines = [np.concatenate([x.image for x in scenes[i : i + columns]], 1) for i in range(0, len(scenes), columns)]
    Image.fromarray(np.concatenate(lines)).resize((160 * columns, 160 * rows)).save(path, quality=85)
    return [scene.caption for scene in scenes]


def _place(canvas: np.ndarray, owner: np.ndarray, rgba: np.ndarray, word: int, rng: np.random.Generator) -> bool:
    """Paste a picture where it hides little of the others; return False if there is no such place."""
    for _ in range(30):
        longest = rng.uniform(0.34, 0.6) * SIDE
        scale = longest / max(rgba.shape[:2])
        size = tuple(max(1, round(x * scale)) for x in rgba.shape[1::-1])
        top, left = (int(rng.integers(SIDE - x + 1)) for x in size[::-1])
        picture = np.asarray(Image.fromarray(rgba).resize(size, Image.Resampling.BICUBIC))
        picture = picture[:, ::-1] if rng.random() < 0.5 else picture
        place = (slice(top, top + size[1]), slice(left, left + size[0]))
        inside = picture[..., 3] > 127
        hidden = owner[place][inside]
        others = hidden[hidden != IGNORE]
        if all((others == x).sum() <= (owner == x).sum() / 8 for x in np.unique(others)):
            alpha = picture[..., 3:].astype(np.float32) / 255
            canvas[place] = (canvas[place] * (1 - alpha) + picture[..., :3] * alpha).round().astype(np.uint8)
            owner[place][inside] = word
            return True
    return False


def _background(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random square of a photograph, of half to all of its shorter side, uint8 [SIDE, SIDE, 3]."""
    height, width = photo.shape[:2]
    side = int(rng.uniform(0.5, 1) * min(height, width))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    part = Image.fromarray(photo[top : top + side, left : left + side])
    return np.array(part.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _thumbnail(rgba: np.ndarray) -> np.ndarray:
    small = np.asarray(Image.fromarray(np.ascontiguousarray(rgba)).resize((16, 16), Image.Resampling.BOX))
    flat = (small[..., :3] * (small[..., 3:] / 255.0)).ravel()
    flat = np.concatenate([flat, small[..., 3].ravel()])
    flat = flat - flat.mean()
    return flat / np.linalg.norm(flat)


def _stamps(packages: Path) -> dict[str, list[tuple[str, Path]]]:
    """Return the stamps of each word, the first words of their English line without the article."""
    out: dict[str, list[tuple[str, Path]]] = {}
    for text in sorted(found(packages, "share/tuxpaint/stamps").rglob("*.txt")):
        line = (text.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[0]
        word = re.sub(r"^(a|an|the|some) ", "", re.split(r"[.!,(—]", line.strip())[0].strip().lower())
        if (picture := text.with_suffix(".png")).exists():
            out.setdefault(word, []).append(("stamp", picture))
    return out


def _emoji(packages: Path) -> dict[str, list[tuple[str, Path]]]:
    """Return the pictures of each English label of an emoji that is a thing."""
    folders = {source: (found(packages, file).parent, ending) for source, (file, ending) in EMOJI.items()}
    out: dict[str, list[tuple[str, Path]]] = {}
    for entry in json.loads(found(packages, "en/data.json").read_text(encoding="utf-8")):
        code = entry["hexcode"].lower()
        names = (code, code.replace("-fe0f", ""), f"{code}-fe0f")
        for source, (folder, ending) in folders.items():
            paths = [path for name in names if (path := folder / f"{name}.{ending}").exists()]
            if paths and entry.get("group") not in (None, SYMBOLS, FLAGS):
                out.setdefault(entry["label"].lower(), []).append((source, paths[0]))
    return out


def _photos(packages: Path) -> list[np.ndarray]:
    """Return the photographs of two packages of desktop backgrounds, at most 1,024 pixels a side."""
    folders = [
        found(packages, f"share/backgrounds/{file}").parent for file in ("mate/nature/Dune.jpg", "Bridge_by*.jpg")
    ]
    out = []
    for path in sorted(path for folder in folders for path in folder.glob("*.jpg")):
        image = Image.open(path)
        image.draft("RGB", (1024, 1024))  # the decoder scales down by itself
        image = image.convert("RGB")
        image.thumbnail((1024, 1024))
        out.append(np.asarray(image))
    return out
