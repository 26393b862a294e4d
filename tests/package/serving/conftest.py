"""Fixtures of all tests of `pacl serve`: a server with an untrained embedder."""

import pytest
import torch
from pacl.segment.options import ServeOptions
from pacl.serve.run import find_examples, make_viewer
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
