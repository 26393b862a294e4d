"""The page of `pacl serve` in a browser: its layout, keyboard, zoom, examples and themes."""

import io
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from pacl.serve.examples import find_examples
from pacl.serve.server import Server
from pictures import encode, picture
from PIL import Image
from serving import SETTLED, another, drop, started, wait

torch.set_num_threads(1)


@pytest.fixture
def page(server, browser):
    """Open the page with its example, and fail if the browser complains."""
    page, said = browser.new_page(viewport={"width": 1366, "height": 680}), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(server.url)
    wait(page)
    yield page
    page.close()
    assert not [x for x in said if "status of 40" not in x], said


def type_words(page, words: str, count: int) -> None:
    page.locator("#words").fill(words)
    wait(page, f"{SETTLED} && document.querySelectorAll('#legend li').length === {count}")


def focus(page) -> str:
    return page.evaluate("document.activeElement.dataset.model || document.activeElement.innerText.split('\\n')[0]")


def test_numbers_and_lines_belong_to_what_is_shown(page):
    lines, hover = page.locator("#lines"), page.locator("#hover")
    page.locator("#code summary").click()
    type_words(page, "a dog, grass", 2)
    page.locator("#views canvas").hover()
    assert 'path = "one.jpg"' in lines.inner_text() and "words = ['a dog', 'grass']" in lines.inner_text()
    assert "a dog: cosine" in hover.inner_text() and "says which word fits best, not how well" in hover.inner_text()
    page.locator("#words").press("End")
    page.keyboard.type(", sky")
    assert lines.inner_text() == hover.inner_text() == ""  # until the answer comes
    with page.expect_download() as download:  # waits for what was typed
        page.locator("#python").press("Enter")
    assert "words = ['a dog', 'grass', 'sky']" in download.value.path().read_text()
    page.locator("#views canvas").hover()
    assert "sky: cosine" in hover.inner_text()
    before = hover.inner_text()
    drop(page, encode(picture(70, 60, 90)), "two.jpg")
    wait(page, f"name === 'two.jpg' && {SETTLED}")
    assert 'path = "two.jpg"' in lines.inner_text() and "sky" in lines.inner_text()
    assert "sky: cosine" in hover.inner_text() and hover.inner_text() != before
    # Words that the server refuses leave no numbers of other words.
    page.locator("#words").fill(",".join(map(str, range(65))))
    wait(page, "document.getElementById('said').className === 'error'")
    assert lines.inner_text() == hover.inner_text() == "" and page.locator("#legend li").count() == 0
    # An image that cannot be read leaves the one before, with its numbers.
    type_words(page, "grass", 1)
    drop(page, b"no image", "bad.jpg")
    wait(page, f"document.getElementById('said').className === 'error' && {SETTLED}")
    assert page.locator("#caption").inner_text().startswith("two.jpg: ") and "grass" in lines.inner_text()


def test_words_typed_while_an_image_opens_wait_for_it(page):
    page.evaluate(
        "() => { const real = api; api = (path, ...rest) => path === '/api/image' ? "
        "new Promise(go => setTimeout(go, 600)).then(() => real(path, ...rest)) : real(path, ...rest); }"
    )
    drop(page, encode(picture(71, 60, 90)), "slow.jpg")
    page.locator("#words").fill("a dog; grass")
    wait(page, "document.getElementById('said').textContent === 'Opening slow.jpg ...'")
    assert page.locator("#said").get_attribute("class") == ""  # not in the colour of errors
    wait(page, f"name === 'slow.jpg' && {SETTLED}")
    assert page.locator("#legend span").all_inner_texts() == ["a dog", "grass"]


def test_the_keyboard_alone(page):
    page.locator("#words").focus()
    page.keyboard.type("a dog; grass\n\tred ball，sky، a dog\n")  # Enter begins a line
    wait(page, f"{SETTLED} && document.querySelectorAll('#legend li').length === 4")
    assert page.locator("#legend span").all_inner_texts() == ["a dog", "grass", "red ball", "sky"]
    for _ in range(40):  # Tab reaches everything
        if focus(page) == "PACL":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait(page, f"view.kind === 'patch' && {SETTLED}")
    assert focus(page) == "PACL"
    row, column, h, w = page.evaluate("[view.row, view.column, answers.PACL.h, answers.PACL.w]")
    assert [row, column] == [h // 2, w // 2] and "row 4, column 5" in page.locator("#hover").inner_text()
    for key in ("ArrowUp", "ArrowRight"):
        at = page.evaluate("turn")
        page.keyboard.press(key)
        wait(page, f"turn > {at} && {SETTLED}")
    assert page.evaluate("[view.row, view.column]") == [row - 1, column + 1] and focus(page) == "PACL"
    page.keyboard.press("Escape")
    wait(page, f"view.kind === 'best' && {SETTLED}")
    assert focus(page) == "PACL"
    # A word's map, and back; in a patch's view the legend is in another order, and the focus follows its word.
    page.locator("#legend button").nth(3).focus()
    for kind in ("word", "best"):
        page.keyboard.press("Enter")
        wait(page, f"view.kind === '{kind}' && {SETTLED}")
        assert focus(page) == "sky"
    page.evaluate("select('PACL', 0.2, 0.2)")
    wait(page, f"view.kind === 'patch' && {SETTLED}")
    assert focus(page) == "sky"
    cosines = [float(x) for x in page.locator("#legend output").all_inner_texts()]
    assert cosines == sorted(cosines, reverse=True)


def test_a_panorama_fills_its_column_and_zooms(page):
    drop(page, encode(picture(72, 16, 400)), "panorama.jpg")  # as long as max_image_pixels of this server lets it
    wait(page, f"name === 'panorama.jpg' && {SETTLED}")
    type_words(page, "a dog", 1)
    canvas, port = page.locator("#views canvas"), page.locator(".port").bounding_box()
    wide = canvas.bounding_box()["width"]
    assert wide == pytest.approx(port["width"], abs=2) and wide > 800
    canvas.focus()
    page.keyboard.press("+")
    assert canvas.bounding_box()["width"] == pytest.approx(1.5 * wide, abs=2)
    assert page.locator("#zoom").inner_text() == "150 %"
    page.keyboard.press("0")
    page.locator("#in").click()
    page.locator("#out").click()
    assert canvas.bounding_box()["width"] == pytest.approx(wide, abs=2)
    # The wheel keeps the point below the mouse, and dragging moves it without selecting a patch.
    x, y = port["x"] + 0.7 * port["width"], port["y"] + 0.5 * port["height"]
    page.mouse.move(x, y)
    share = "x => (r => (x - r.left) / r.width)(document.querySelector('#views canvas').getBoundingClientRect())"
    page.mouse.wheel(0, -500)
    wait(page, "zoom > 2")
    assert page.evaluate(share, x) == pytest.approx(0.7, abs=0.01)
    page.mouse.down()
    page.mouse.move(x - 100, y, steps=4)
    page.mouse.up()
    assert page.evaluate(share, x - 100) == pytest.approx(0.7, abs=0.01) and page.evaluate("view.kind") == "best"
    page.locator("#models input").nth(2).check()  # both models' pictures show the same part
    wait(page, "document.querySelectorAll('.port').length === 2")
    page.locator("#fit").click()
    page.keyboard.press("+")
    page.evaluate("document.querySelectorAll('.port')[0].scrollTo(77, 0)")
    wait(page, "document.querySelectorAll('.port')[1].scrollLeft === 77")


def test_a_format_that_the_browser_cannot_show(page):
    data = encode(picture(73, 30, 60), "TIFF")
    drop(page, data, "scan.tif")
    type_words(page, "a dog", 1)
    assert page.locator("#caption").inner_text().startswith("scan.tif: ")
    assert page.evaluate("[bitmap.width, bitmap.height]") == [60, 30]


def test_a_large_photo_keeps_its_pixels(page):
    found = page.evaluate("[[5000, 200], [4000, 3000], [64, 64], [30000, 30]].map(x => scaled(...x, PIXELS))")
    assert found == [[5000, 200], [2309, 1732], [480, 480], [8192, 8]]


@pytest.mark.parametrize("width, height", [(1366, 680), (380, 700)])
def test_thirty_words_leave_the_controls_and_the_picture(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    page.reload()
    wait(page)
    type_words(page, ",".join(f"word {i}" for i in range(30)), 30)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("#words", "#models", "#more", "#views canvas"):
        box = page.locator(name).bounding_box()
        assert box["y"] >= 0 and box["x"] >= 0 and box["x"] + box["width"] <= width, name
        assert box["y"] + min(box["height"], 150) <= height, name
    whole, seen = page.locator("#legend").evaluate("x => [x.scrollHeight, x.clientHeight]")
    assert 150 < seen <= height / 2 < whole
    swatches = page.evaluate("[...document.querySelectorAll('#legend i')].map(x => x.style.background)")
    assert len(set(swatches)) == 30


def test_the_threshold_covers_negative_cosines(page):
    type_words(page, "a dog, grass", 2)
    page.locator("#code summary").click()
    assert "threshold=None" in page.locator("#lines").inner_text()
    page.locator("#threshold").fill("-0.35")
    page.locator("#threshold").dispatch_event("change")
    wait(page, f"{SETTLED} && document.getElementById('lines').textContent.includes('threshold=-0.35')")
    assert page.locator("#hide").is_checked() and page.locator("#least").inner_text() == "-0.35"
    shown = """[...figures.get("PACL").map.getContext("2d").getImageData(0, 0, 480, 360).data]
      .filter((x, i) => i % 4 === 3 && x).length"""  # coloured pixels
    assert page.evaluate(shown) == 480 * 360
    lowest, highest = page.evaluate("[Math.min, Math.max].map(f => f(...answers.PACL.scores.flat()))")
    page.locator("#threshold").fill("1" if highest < 0.99 else "0.9")
    assert page.evaluate(shown) == 0
    page.locator("#hide").uncheck()
    assert page.evaluate(shown) == 480 * 360


def test_title_and_theme(page, server):
    name = server.viewer.name
    assert page.title() == f"{name}: pacl serve" and name in page.locator("header").inner_text()
    assert page.locator("h1").inner_text() == "Where an image matches words"
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    wait(page, f"{background} !== '{light}'")
    dark = page.evaluate(background)
    page.locator("#theme").click()  # against the system, and it stays
    assert page.evaluate(background) == light
    page.reload()
    wait(page)
    assert page.evaluate(background) == light and dark != light


def test_many_examples(viewer, browser, tmp_path):
    for number in range(401):
        data = encode(picture(number, 16, 16)) if number else b"damaged"  # the first that can be read opens
        (tmp_path / f"{'beach' if number % 2 else 'street'} {number:03}.jpg").write_bytes(data)
    examples = sorted(find_examples(tmp_path, None), key=lambda x: x.name.split()[1])
    with started(Server(another(viewer), examples=examples)) as server:
        page, asked = browser.new_page(viewport={"width": 1366, "height": 680}), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        wait(page)
        assert page.locator("#caption").inner_text().startswith("beach 001.jpg: ")
        assert page.locator("#strip [aria-current]").get_attribute("title") == "beach 001.jpg"
        wait(page, "document.querySelectorAll('#strip img').length > 5 && !fetching")
        assert sum("/api/thumbnail/" in x for x in asked) < 30  # those in view
        assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
        page.locator("#search").fill("street 39")
        assert page.locator("#count").inner_text() == "5 of 401" and page.locator("#strip button:visible").count() == 5
        page.keyboard.press("Tab")  # the strip is one stop
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        wait(page, f"name === 'street 392.jpg' && {SETTLED}")
        assert page.evaluate("document.activeElement.title") == "street 392.jpg"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('#strip')") is None
        wait(page, "document.querySelectorAll('#strip button:not([hidden]) img').length === 5")
        page.close()
        server.shutdown()


@pytest.mark.parametrize("language, word", [("zh", "红色的狗"), ("ar", "كلب أحمر"), ("hi", "लाल कुत्ता")])
def test_downloaded_pictures_show_all_scripts(page, language, word):
    fonts = shutil.which("fc-list") and subprocess.run(["fc-list", f":lang={language}"], capture_output=True).stdout
    if not fonts:
        pytest.skip(f"no font for the language {language}")

    def drawn(words: str) -> np.ndarray:
        type_words(page, words, 1)
        with page.expect_download() as download:
            page.locator("#png").click()
        image = np.asarray(Image.open(io.BytesIO(download.value.path().read_bytes())).convert("L"))
        assert image.shape[0] > 360 + 24
        return image[360 + 24 :, 28:]  # below the picture and its title, right of the colour

    ink, boxes = drawn(word), drawn(re.sub(r"\S", "\u0378", word))  # that letter does not exist
    assert (ink < 128).sum() > 30 and (ink != boxes).any()
    letters = [drawn(x) for x in sorted(set(word) - {" "})[:2]]
    assert (letters[0] != letters[1]).any()
