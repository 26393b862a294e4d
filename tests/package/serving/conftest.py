"""Fixtures of all tests of `pacl serve`: a server with an untrained embedder, and a browser."""

import os
import shutil

import pytest
import torch
from pacl.segment.options import ServeOptions
from pacl.serve.examples import find_examples
from pacl.serve.run import make_viewer
from pacl.serve.server import Server
from serving import PHOTO, started

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    """Create a folder with one example image and one file that is not an image."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "one.jpg").write_bytes(PHOTO)
    (folder / "secret.txt").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def viewer(untrained):
    return make_viewer(ServeOptions(checkpoint=str(untrained / "run/embedder"), max_image_pixels=8000, device="cpu"))


@pytest.fixture(scope="session")
def server(examples, untrained, viewer):
    with started(Server(viewer, examples=find_examples(examples, str(untrained / "run/embedder")))) as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright and a Chromium")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.getuid() == 0 else [])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()
