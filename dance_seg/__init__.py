"""dance_seg: train efficient semantic segmentation networks and prove what they cost."""

__version__ = "0.1.0"
