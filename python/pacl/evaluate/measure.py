"""Former module of evaluate_segmentation, kept because the documentation named it."""

from .segmentation_measure import evaluate_segmentation

__all__ = ["evaluate_segmentation"]
