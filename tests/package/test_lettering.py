"""Words of all scripts in pictures: which font they are written in, and the line that says which font to install."""

import sys
import unicodedata

import numpy as np
import pytest
from pacl.evaluate.plots import bars, plot_png
from pacl.segment import lettering
from pacl.segment.draw import with_legend
from pacl.segment.lettering import fitting, width_of, write
from PIL import Image, ImageDraw, ImageFont, features

SIZE = 14
WORDS = ("Bällé", "собака", "σκύλος", "كلب", "כלב", "狗", "いぬ", "개", "कुत्ता", "สุนัข", "🐕")
OWN = WORDS[:5]  # those that matplotlib's own font has
font_manager = pytest.importorskip("matplotlib.font_manager")


@pytest.fixture(autouse=True)
def forget():
    """Search for fonts anew, before and after a test."""
    lettering._faces.cache_clear()
    lettering._said.clear()
    yield
    lettering._faces.cache_clear()


@pytest.fixture
def fonts(tmp_path, monkeypatch):
    """Return the only folder of fonts on a machine, with a damaged one."""
    if not sys.platform.startswith("linux"):
        pytest.skip("these are the places of fonts on Linux")
    folder = tmp_path / "fonts"
    folder.mkdir()
    (folder / "damaged.ttf").write_bytes(b"no font")
    (tmp_path / "fonts.conf").write_text("<fontconfig/>")
    monkeypatch.setenv("FONTCONFIG_FILE", str(tmp_path / "fonts.conf"))
    monkeypatch.setattr(font_manager, "X11FontDirectories", [str(folder)])
    font_manager._get_fontconfig_fonts.cache_clear()
    yield folder
    font_manager._get_fontconfig_fonts.cache_clear()


def make_font(path, text: str) -> None:
    """Write a font with the characters of `text`, each a bar of another height."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000)
    pen_type = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen
    names = {ord(char): f"u{ord(char):04X}" for char in dict.fromkeys(text)}
    order = [".notdef", *names.values()]
    glyphs = {}
    for i, name in enumerate(order):
        pen = pen_type(None)
        pen.moveTo((100, 0))
        for point in ((100, 300 + 600 * i // len(order)), (800, 300), (800, 0)):
            pen.lineTo(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(names)
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (900, 100) for name in order})
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def written(text: str) -> np.ndarray:
    sheet = Image.new("RGB", (200, 24), "white")
    write(sheet, (2, 2), text, SIZE)
    return np.asarray(sheet)


def boxes(count: int) -> np.ndarray:
    """Draw characters that Unicode has not assigned, in Pillow's own font."""
    sheet = Image.new("RGB", (200, 24), "white")
    ImageDraw.Draw(sheet).text((2, 2), "\u0378" * count, lettering.INK, ImageFont.load_default(SIZE))
    return np.asarray(sheet)


def assert_letters(words, pictures) -> None:
    """Check that no picture is empty or has a box, and that all differ."""
    for word, picture in zip(words, pictures, strict=True):
        assert picture.min() < 128, f"{word} is drawn"
        assert not any(np.array_equal(picture, boxes(count)) for count in range(10)), f"{word} has no boxes"
    assert len({picture.tobytes() for picture in pictures}) == len(words)


def test_words_in_the_fonts_of_this_machine(capsys):
    """Each word is written in letters if a font has them, and at least five scripts are."""
    words = [word for word in WORDS if any(face.has(word) for face in lettering._faces())]
    assert set(OWN) <= set(words)
    assert_letters(words, list(map(written, words)))
    assert not capsys.readouterr().err


def test_words_in_installed_fonts(fonts, capsys):
    """Words in several fonts, and characters that no single font has, are written run by run."""
    make_font(fonts / "East.ttf", "狗いぬ개")
    make_font(fonts / "South.otf", "कुत्ता")
    make_font(fonts / "Thai.ttf", "สุนัข")
    words = [*WORDS[:-1], "a 狗 in कुत्ता", "कुत्ता in 狗"]
    assert_letters(words, list(map(written, words)))
    assert not capsys.readouterr().err
    assert width_of("a 狗 in कुत्ता", SIZE) > width_of("狗", SIZE) + width_of("कुत्ता", SIZE)
    # The first word of a text that is read from right to left is at its right.
    text = np.asarray(written("كلب狗"))
    assert np.array_equal(
        text[:, : round(2 + width_of("狗", SIZE))], written("狗")[:, : round(2 + width_of("狗", SIZE))]
    )


def test_a_missing_font_is_named_once(fonts, capsys):
    """Without a font the characters are boxes, and a line for each font says which one to install."""
    assert np.array_equal(written("狗"), boxes(1))
    assert capsys.readouterr().err == (
        "no font has 狗, which pictures show as a box: install Noto Sans CJK (Debian's fonts-noto-cjk)\n"
    )
    for word in ("狗狗", "いぬ", "개"):
        assert np.array_equal(written(word), boxes(len(word)))
    assert not capsys.readouterr().err
    written("สุนัข" + "कुत्ता")
    written("🐕")
    assert [line.partition("install ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "Noto Sans for Thai (Debian's fonts-noto-core)",
        "Noto Sans for Devanagari (Debian's fonts-noto-core)",
        "Noto Color Emoji (Debian's fonts-noto-color-emoji)",
    ]
    make_font(fonts / "East.ttf", "狗")
    lettering._faces.cache_clear()
    assert_letters(["狗"], [written("狗")])


def test_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert np.array_equal(written("狗"), boxes(1)) and written("dog").min() < 128
    assert capsys.readouterr().err.endswith(": install matplotlib, which finds fonts\n")


@pytest.mark.skipif(not features.check("raqm"), reason="needs a Pillow with Raqm")
def test_letters_join():
    joined, apart = "كلب", "ك\u200cل\u200cب"
    assert 0 < width_of(joined, SIZE) < width_of(apart, SIZE)
    assert width_of(apart, SIZE) == pytest.approx(sum(width_of(letter, SIZE) for letter in joined), abs=1)


def test_emoji_in_colour(monkeypatch):
    face = next((face for face in lettering._faces() if face._opened is not None and face.bitmaps), None)
    if face is None or not face.has("🦩"):
        pytest.skip("needs a font with coloured emoji")
    run = face.run("🦩", SIZE)
    assert SIZE <= run.length <= 1.5 * SIZE
    assert not face.has("12")
    if not any(other.has("🦩") for other in lettering._faces() if other._opened is not None and not other.bitmaps):
        found = written("a🦩").astype(int)
        assert np.ptp(found, axis=-1).max() > 50, "pink"
    monkeypatch.setattr(lettering, "STRIKES", (7,))
    lettering._strike.cache_clear()
    assert not lettering.Face(face.path).has("🦩"), "a size that the font does not have"


def test_accents_and_control_characters(fonts):
    make_font(fonts / "East.ttf", "개")
    for word in ("Bälle", "개"):
        assert np.array_equal(written(unicodedata.normalize("NFD", word)), written(word))
    assert np.array_equal(written("a\u202e\nb\x1b"), written("a  b "))


def test_long_words_are_cut():
    odd = "two\nlines \x1b[31m" + "x" * 500
    cut = fitting(odd, 150, SIZE)
    assert cut.startswith("two lines  [31mxx") and cut.endswith("x...")
    assert width_of(cut, SIZE) <= 150 < width_of(cut[:-3] + "x...", SIZE)
    assert fitting("dog", 150, SIZE) == "dog" and fitting("dog", 1, SIZE) == "..."
    assert width_of(fitting("собака " * 50, 150, SIZE), SIZE) <= 150


def test_legend(fonts, capsys):
    """The value stays whole behind a word that is cut."""
    make_font(fonts / "East.ttf", "狗")
    base = Image.new("RGB", (230, 40), "blue")
    found = [np.asarray(with_legend(base, [((255, 0, 0), "狗" * count, value)])) for count, value in
             ((3, "5 %"), (90, "5 %"), (91, "5 %"), (90, "6 %"))]  # fmt: skip
    assert np.array_equal(found[1], found[2])
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[3])
    assert (found[1][40:, -3:] == 255).all() and (found[1][40:, -40:] < 128).any()
    assert not capsys.readouterr().err


@pytest.mark.filterwarnings("error:Glyph")
def test_plots(fonts, capsys):
    """Labels and titles of plots are written in installed fonts, too."""
    draw = {title: bars(["dog", label], {"PACL": [0.1, 0.2]}, title) for label, title in (("cat", "狗"), ("狗", "dog"))}
    without = {title: plot_png((3, 3), each) for title, each in draw.items()}
    assert capsys.readouterr().err.count("\n") == 1
    make_font(fonts / "East.ttf", "狗")
    lettering._faces.cache_clear()
    for title, each in draw.items():
        assert plot_png((3, 3), each) != without[title]
    assert not capsys.readouterr().err
