"""The old place of SegmentationData, which documentation has named."""

from .segmentation_data import SegmentationData

__all__ = ["SegmentationData"]
