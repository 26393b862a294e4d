"""Patch Aligned Contrastive Learning on top of open_clip: patch tokens, vision embedder, data, and the `pacl` command.

The loss itself is in `pacl_kernels`.
"""
