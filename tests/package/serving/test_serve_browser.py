"""The page of `pacl serve` works in a real browser."""

import hashlib
import io
import json

import numpy as np
import torch
from pictures import encode, picture
from PIL import Image
from serving import drop, pixels, wait

torch.set_num_threads(1)


def test_drop_type_and_click_in_a_browser(server, viewer, browser):
    page = browser.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#views canvas")  # the page opens with the example
    data = encode(picture(9, 60, 90))
    drop(page, data, "<img src=x onerror=alert(1)>.jpg")
    wait(page, "document.querySelector('#views canvas')?.height === 320")
    plain = pixels(page.locator("#views canvas"))
    # Words: the legend lists all of them as text. At full opacity each pixel has the colour of its best word.
    page.locator("#opacity").fill("1")
    page.locator("#words").fill("a dog, <img src=x onerror=alert(1)>, grass")
    wait(page, "document.querySelectorAll('#legend li').length === 3")
    words = ["a dog", "<img src=x onerror=alert(1)>", "grass"]
    assert page.locator("#legend span").all_inner_texts() == words
    assert page.locator("#legend img, #stage img").count() == 0
    scores = viewer.words(hashlib.sha256(data).hexdigest(), words)
    shown = pixels(page.locator("#views canvas"))
    dense = viewer._kept[hashlib.sha256(data).hexdigest()].dense["PACL"]
    large = dense.__class__(dense.patches, shown.shape[:2], dense.margins)
    expected = np.array(scores["colours"])[large.labels(viewer._embedded(words)).labels.numpy()]
    assert (shown == expected).all(-1).mean() > 0.99 and (shown != plain).any()
    # One word's map, then plain CLIP next to PACL.
    page.locator("#legend button").nth(2).click()
    page.wait_for_selector("#legend button[aria-pressed=true]")
    assert (pixels(page.locator("#views canvas")) != shown).any()
    page.locator("#models input").nth(2).check()
    wait(page, "document.querySelectorAll('#views canvas').length === 2")
    assert page.locator("figcaption").all_inner_texts() == ["PACL", "CLIP"]
    # A click on a patch, the numbers on hover, and the keyboard.
    canvas = page.locator("#views canvas").first
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 0.99, "y": box["height"] * 0.01})
    wait(page, "view.kind === 'patch' && patches.PACL")
    assert page.evaluate("[view.row, view.column]") == [0, scores["w"] - 1]
    hover = page.locator("#hover")
    canvas = page.locator("#views canvas").first
    canvas.hover(position={"x": box["width"] * 0.5, "y": box["height"] * 0.01})
    assert "grass: cosine" in hover.inner_text() and "similarity to the selected patch" in hover.inner_text()
    page.locator("#best").focus()
    page.keyboard.press("ArrowDown")
    wait(page, "view.row === 1 && patches.PACL")
    # Downloads.
    for button, name in (("png", "pacl.png"), ("json", "pacl.json"), ("python", "pacl_view.py")):
        with page.expect_download() as download:
            page.locator(f"#{button}").click()
        assert download.value.suggested_filename == name
        saved = download.value.path().read_bytes()
        if name == "pacl.json":
            assert json.loads(saved)["words"]["CLIP"]["words"] == words
        elif name == "pacl.png":
            assert Image.open(io.BytesIO(saved)).width > 2 * 480
        else:
            compile(saved, name, "exec")
    # The page sends an image again if the server has dropped it; the user sees no message.
    viewer._kept.clear()
    page.locator("#words").fill("a dog, sky")
    wait(page, "document.querySelectorAll('#legend li').length === 2")
    assert page.locator("#said").inner_text() == ""
    # A bad image gives one sentence, and the view stays.
    drop(page, b"no image", "x.jpg")
    wait(page, "document.getElementById('said').textContent.includes('expected JPEG')")
    assert page.locator("#views canvas").count() == 2
    assert not [x for x in said if "404" not in x and "400" not in x], said
    assert all(x.startswith((f"http://127.0.0.1:{server.server_port}/", "blob:", "data:")) for x in asked)
    page.close()
