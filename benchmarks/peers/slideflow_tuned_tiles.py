"""slideflow in the fastest way found: cuCIM, Otsu quality control, no filter by tile, tiles in whatever order."""

import os

os.environ["SF_SLIDE_BACKEND"] = "cucim"

import slideflow  # noqa: E402  the backend is chosen when it is imported
from serve import serve  # noqa: E402


def tile_and_decode(path, num_workers):
    slide = slideflow.WSI(path, tile_px=256, tile_um=128, verbose=False)
    slide.qc("otsu")
    tiles = slide.build_generator(
        shuffle=False, num_threads=num_workers, whitespace_fraction=1, grayspace_fraction=1, deterministic=False
    )
    return sum(1 for _ in tiles())


if __name__ == "__main__":
    serve(tile_and_decode)
