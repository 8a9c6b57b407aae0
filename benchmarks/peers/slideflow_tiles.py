"""slideflow as documented: the quick start's Otsu quality control, then its tile generator with threads.

Everything else is its default: the backend that it chooses, which is cuCIM with what its pip command installs, and its
tile filters, of which that by grey pixels is switched on.
"""

import slideflow
from serve import serve


def tile_and_decode(path, num_workers):
    slide = slideflow.WSI(path, tile_px=256, tile_um=128, verbose=False)
    slide.qc("otsu")
    tiles = slide.build_generator(num_threads=num_workers)
    return sum(1 for _ in tiles())


if __name__ == "__main__":
    serve(tile_and_decode)
