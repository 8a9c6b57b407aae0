"""histolab: GridTiler on its tissue mask. It has no workers; tiles are taken before it would write them as PNG."""

import tempfile

import openslide_bin  # noqa: F401  brings the library that its older openslide-python would look for in the system
from histolab.masks import TissueMask
from histolab.slide import Slide
from histolab.tiler import GridTiler
from serve import serve


def tile_and_decode(path, num_workers):
    with tempfile.TemporaryDirectory() as scratch:
        slide = Slide(path, scratch)
        side = round(256 * 0.5 / slide.base_mpp)  # tiles of level 0, shrunk here: its own way needs another library
        tiler = GridTiler(tile_size=(side, side), level=0, check_tissue=False)
        tiles = 0
        for tile, _ in tiler._tiles_generator(slide, TissueMask()):
            tile.image.convert("RGB").reduce(side // 256)
            tiles += 1
        return tiles


if __name__ == "__main__":
    serve(tile_and_decode)
