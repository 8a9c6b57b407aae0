"""The letters of names in pictures."""

from functools import lru_cache
from pathlib import Path

from PIL import ImageFont


@lru_cache(maxsize=16)
def label_font(size: float) -> ImageFont.FreeTypeFont:
    """Latin, Greek and Cyrillic letters and signs such as ≥; Pillow's own font has little more than English."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
