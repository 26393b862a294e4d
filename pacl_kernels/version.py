"""The version of both packages. It imports nothing, so that the build and `native.py` can read it."""

__version__ = "0.1.0.dev0"
