"""The feature file of one slide: write it, read it, check it. The only module that knows the file's keys.

A feature file `features/<slide_id>.h5` holds

    features  (N, D) float16 or float32   one patch token per tile
    coords    (N, 2) int64                 level-0 pixels, (x, y) of the tile's top-left corner

Row i of one belongs to row i of the other. Attributes on `coords` use TRIDENT's names, so that its tools read our
files; `mpp`, `encoder`, `tile_size`, `format_version` and the other facts of `MAKING_FACTS` lie on the file root.
`coords/<slide_id>.h5` is the same without `features`, with the fraction of each tile that is tissue or an artefact
(QUALITY_KEYS, each (N,) float32). A feature file may also be a zarr archive, or a bare tensor that takes its positions
from the coords file: see `feature_containers`. Files of TRIDENT, CLAM (`.h5` and `.pt`), WSI-LLaVA (`coords_yx`) and
HistoGPT (`feats`) are read as well.
"""

from feature_containers import SUFFIXES
from slide_features.atomic import atomic_path
from slide_features.contents import FEATURE_SUFFIXES, SlideCoords, SlideFeatures
from slide_features.making import MAKING_FACTS, MakingFact, with_unsaid, worth_saying
from slide_features.patches import choose_patches, is_in_raster_order, raster_order
from slide_features.reading import (
    count_tiles,
    read_patches,
    read_slide_coords,
    read_slide_features,
    slide_id_of_features,
)
from slide_features.writing import write_slide_coords, write_slide_features

__all__ = [
    "FEATURE_SUFFIXES",
    "MAKING_FACTS",
    "SUFFIXES",
    "MakingFact",
    "SlideCoords",
    "SlideFeatures",
    "atomic_path",
    "choose_patches",
    "count_tiles",
    "is_in_raster_order",
    "raster_order",
    "read_patches",
    "read_slide_coords",
    "read_slide_features",
    "slide_id_of_features",
    "with_unsaid",
    "worth_saying",
    "write_slide_coords",
    "write_slide_features",
]
