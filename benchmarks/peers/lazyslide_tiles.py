"""LazySlide: find_tissues, tile_tissues, then its dataset of tile images in a DataLoader."""

import lazyslide
import wsidata
from serve import serve
from torch.utils.data import DataLoader


def tile_and_decode(path, num_workers):
    slide = wsidata.open_wsi(path, store=None)
    lazyslide.pp.find_tissues(slide)
    lazyslide.pp.tile_tissues(slide, tile_px=256, mpp=0.5)
    loader = DataLoader(slide.ds.tile_images(), batch_size=64, num_workers=num_workers)
    return sum(len(batch["image"]) for batch in loader)


if __name__ == "__main__":
    serve(tile_and_decode)
