"""The old place of evaluate_segmentation, which documentation has named."""

from .segmentation_measure import evaluate_segmentation

__all__ = ["evaluate_segmentation"]
