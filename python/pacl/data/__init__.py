"""Image-caption pairs: where they come from and how they are read."""

from typing import Literal

Kind = Literal["auto", "webdataset", "csv", "folder", "coco", "synthetic"]
