"""Leica SCN slides for tests, which OpenSlide opens: a scanned region somewhere on the glass, and a macro image."""

from pathlib import Path

import numpy as np
import tifffile

UNITS_PER_PX = 500  # of the coordinates in the XML
SCAN = """<?xml version="1.0"?>
<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">
<collection name="glass" sizeX="{glass[0]}" sizeY="{glass[1]}">{images}</collection></scn>"""
IMAGE = """<image><pixels>{dimensions}</pixels>
<view sizeX="{size[0]}" sizeY="{size[1]}" offsetX="{offset[0]}" offsetY="{offset[1]}"/>
<scanSettings><objectiveSettings><objective>{objective}</objective></objectiveSettings>
<illuminationSettings><illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"""
DIMENSION = '<dimension sizeX="{1}" sizeY="{0}" r="{r}" ifd="{ifd}"/>'


def write_leica_slide(
    path: Path, picture: np.ndarray, mpp: float, *, glass: tuple[int, int], offset: tuple[int, int], macro: np.ndarray
) -> None:
    """Write (H, W, 3) uint8 RGB as what was scanned of a slide, in two levels.

    Args:
        path: the file.
        picture: what was scanned.
        mpp: um per pixel.
        glass: (width, height) in pixels of the whole slide.
        offset: (x, y) in pixels of the whole slide at which `picture` lies.
        macro: the macro image, as the first image of the file.
    """
    units = [tuple(value * UNITS_PER_PX for value in pair) for pair in (glass, (*picture.shape[1::-1],), offset)]
    levels = [picture, np.ascontiguousarray(picture[::2, ::2])]
    dimensions = [DIMENSION.format(*level.shape, r=r, ifd=r + 1) for r, level in enumerate(levels)]
    images = [
        IMAGE.format(
            dimensions=DIMENSION.format(*macro.shape, r=0, ifd=0), size=units[0], offset=(0, 0), objective=0.6
        ),
        IMAGE.format(dimensions="".join(dimensions), size=units[1], offset=units[2], objective=20),
    ]
    how = {"compression": "jpeg", "photometric": "rgb", "tile": (256, 256), "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(macro, description=SCAN.format(glass=units[0], images="".join(images)), **how)
        for r, level in enumerate(levels):
            file.write(level, resolution=(1e4 / mpp / 2**r,) * 2, resolutionunit="CENTIMETER", **how)
