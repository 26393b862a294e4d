"""Image-caption pairs: sources and readers."""

from typing import Literal

Kind = Literal["auto", "webdataset", "csv", "folder", "coco", "synthetic"]
