"""Former module of SegmentationData, kept because the documentation named it."""

from .segmentation_data import SegmentationData

__all__ = ["SegmentationData"]
