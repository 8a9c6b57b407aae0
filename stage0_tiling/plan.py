"""The tiles of one slide: settings in, positions out. What tile.py writes and what encode.py reads pixels for."""

import logging
import math
from dataclasses import dataclass, field, replace

import numpy as np
from jsonargparse import Namespace

from command_line import counted
from stage0_tiling.artefacts import ARTEFACTS, blur_fractions, find_on_thumbnail, tile_fractions
from stage0_tiling.pixel_size import PixelSize, SlideError, check_resolution
from stage0_tiling.slide import Slide
from stage0_tiling.slide_list import check_mpp
from stage0_tiling.tissue import Grid, TissueMask, make_grid, tiles_on_tissue
from stage0_tiling.tissue_methods import METHODS
from stage0_tiling.tissue_sources import TissueSources

logger = logging.getLogger("stage0_tiling")

GUESSED_PIXEL_SIZE = PixelSize(0.5, 0.5, "assumed")


@dataclass(frozen=True)
class TilingSettings:
    """How slides are cut; equal settings give equal tiles.

    Attributes:
        tile_size: side of a tile in pixels at `mpp`.
        mpp: um per pixel of a tile.
        overlap: pixels at `mpp` that neighbouring tiles share.
        min_tissue: least fraction of a tile that is tissue.
        tissue_method: how tissue is found, see tissue_methods.py.
        segmenter: name and fingerprint of the network that finds it instead; None without.
        masks: whether masks of the user come before either.
        max_pen: largest fraction of a tile that is ink; 1 keeps all, as for the others.
        max_fold: the same of folds.
        max_blur: the same of what is out of focus.
        max_edge: the same of edges.
        icc: whether pixels are converted to sRGB by the slide's ICC profile.
    """

    tile_size: int = 256
    mpp: float = 0.5
    overlap: int = 0
    min_tissue: float = 0.1
    tissue_method: str = "otsu"
    segmenter: str | None = None
    masks: bool = False
    max_pen: float = 1.0
    max_fold: float = 1.0
    max_blur: float = 1.0
    max_edge: float = 1.0
    icc: bool = False

    def __post_init__(self) -> None:
        if not 8 <= self.tile_size <= 8192:
            raise ValueError(f"--tile_size {self.tile_size}: expected 8 to 8192 pixels")
        if not 0 <= self.overlap < self.tile_size:
            raise ValueError(f"--overlap {self.overlap}: expected 0 to {self.tile_size - 1} pixels, less than a tile")
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"--min_tissue {self.min_tissue}: expected a fraction, 0 to 1")
        if self.tissue_method not in METHODS:
            raise ValueError(f"--tissue_method {self.tissue_method}: expected one of {', '.join(METHODS)}")
        for name, value in self.limits().items():
            if not 0 <= value <= 1:
                raise ValueError(f"--max_{name} {value}: expected a fraction, 0 to 1")
        try:
            check_mpp(self.mpp)
        except ValueError as error:
            raise ValueError(f"--mpp {self.mpp}: {error}") from error

    def limits(self) -> dict[str, float]:
        """Largest fraction of a tile by artefact."""
        return {name: getattr(self, f"max_{name}") for name in ARTEFACTS}


def tiling_settings(args: Namespace) -> TilingSettings:
    """Settings from the flags of add_tiling_arguments.

    Raises:
        ValueError, OSError: naming the flag, if a value or the segmenter cannot be used.
    """
    segmenter = None
    if args.segmenter:
        from stage0_tiling.segmenter import load_segmenter

        segmenter = load_segmenter(args.segmenter, args.segmenter_preset).name
    return TilingSettings(
        args.tile_size,
        args.mpp,
        args.overlap,
        args.min_tissue,
        tissue_method=args.tissue_method,
        segmenter=segmenter,
        masks=args.masks is not None,
        max_pen=args.max_pen,
        max_fold=args.max_fold,
        max_blur=args.max_blur,
        max_edge=args.max_edge,
        icc=args.icc,
    )


@dataclass(frozen=True)
class TilePlan:
    """The tiles of one slide.

    Attributes:
        coords: (N, 2) int64, level-0 pixels, (x, y) of top-left corners, by y, then x; N = 0 where there is no tissue.
        grid: sizes of the tiles in level-0 pixels.
        tissue: the mask, with the thumbnail.
        pixel_size: um per level-0 pixel; None where it is unknown and the slide is blank anyway.
        quality: fraction of each tile by artefact, name to (N,) float32; those that were measured for --max_*.
        dropped: number of tiles by artefact that were too many of it.
    """

    coords: np.ndarray
    grid: Grid
    tissue: TissueMask
    pixel_size: PixelSize | None
    quality: dict[str, np.ndarray] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


def plan_tiles(
    slide: Slide,
    settings: TilingSettings,
    assume_mpp: float | None = None,
    sources: TissueSources | None = None,
    slide_id: str | None = None,
) -> TilePlan:
    """Find the tissue of a slide and the tiles on it.

    Args:
        slide: an open slide.
        settings: how it is cut.
        assume_mpp: um per level-0 pixel where the slide states none, or an implausible one.
        sources: files of masks and of a segmenter; None without.
        slide_id: name of the slide's mask; None for its file name without the extension.

    Raises:
        SlideError: if the slide cannot be read, its mpp is unknown or implausible and none is assumed, or it is far
            coarser than the tiles asked for.
    """
    sources, slide_id = sources or TissueSources(), slide_id or slide.path.stem
    try:
        pixel_size = slide.pixel_size(assume_mpp)
    except SlideError:
        # a blank slide is blank at any mpp; only one with tissue needs the true value
        blank = sources.find(slide, GUESSED_PIXEL_SIZE, settings.tissue_method, slide_id)
        if blank.mask.any():
            raise
        grid = make_grid(settings.tile_size, settings.overlap, settings.mpp, GUESSED_PIXEL_SIZE)
        return TilePlan(np.empty((0, 2), np.int64), grid, blank, None)
    check_resolution(slide.path.name, pixel_size, settings.mpp)
    grid = make_grid(settings.tile_size, settings.overlap, settings.mpp, pixel_size)
    tissue = sources.find(slide, pixel_size, settings.tissue_method, slide_id)
    coords = tiles_on_tissue(tissue, slide.width, slide.height, grid, settings.min_tissue)
    return _without_artefacts(slide, TilePlan(coords, grid, tissue, pixel_size), settings)


def measure_quality(slide: Slide, plan: TilePlan, blur: bool = False) -> dict[str, np.ndarray]:
    """Fraction of each tile of a plan that is tissue, pen, fold, edge and, where asked, blur: (N,) float32 each."""
    quality = {"tissue": tile_fractions(plan.tissue.mask, plan.tissue, plan.coords, plan.grid)} | plan.quality
    if not {"pen", "fold", "edge"} <= quality.keys():
        quality |= _thumbnail_fractions(plan)
    if blur and "blur" not in quality:
        quality["blur"] = blur_fractions(slide, plan.coords, plan.grid, plan.pixel_size)
    return quality


def why_empty(plan: TilePlan, settings: TilingSettings) -> str:
    """Say why a plan has no tile, and what would help."""
    if not plan.tissue.mask.any():
        if settings.segmenter or settings.masks:
            return "no tissue in its mask, or none found; look at its overlay"
        other = "entropy" if settings.tissue_method != "entropy" else "otsu"
        return (
            f"no tissue found by {settings.tissue_method}; look at its overlay, and where there is some, try "
            f"--tissue_method {other} or outline it (--masks)"
        )
    if plan.dropped:
        name, count = max(plan.dropped.items(), key=lambda item: item[1])
        total = sum(plan.dropped.values())
        return (
            f"all {total} tiles on tissue were dropped, {count / total:.0%} of them by --max_{name} "
            f"{settings.limits()[name]:g}: raise it"
        )
    return (
        f"no tile holds {settings.min_tissue:g} tissue, though {plan.tissue.fraction:.2%} of the slide is; look at its "
        "overlay and try a lower --min_tissue"
    )


def _without_artefacts(slide: Slide, plan: TilePlan, settings: TilingSettings) -> TilePlan:
    """Drop the tiles above a limit; blur, which costs most, is measured last and only of what is left."""
    limits = {name: limit for name, limit in settings.limits().items() if limit < 1}
    if not limits or len(plan.coords) == 0:
        return plan
    if limits.keys() - {"blur"}:
        plan = replace(plan, quality=_thumbnail_fractions(plan))
    for name in sorted(limits, key="blur".__eq__):
        if name == "blur":
            blur = blur_fractions(slide, plan.coords, plan.grid, plan.pixel_size)
            plan = replace(plan, quality=plan.quality | {"blur": blur})
        keep = plan.quality[name] <= limits[name]
        dropped = plan.dropped | ({} if keep.all() else {name: int((~keep).sum())})
        quality = {key: values[keep] for key, values in plan.quality.items()}
        plan = replace(plan, coords=plan.coords[keep], quality=quality, dropped=dropped)
    if plan.dropped and len(plan.coords):
        told = ", ".join(f"{name} {count}" for name, count in plan.dropped.items())
        logger.info("%s: %s kept, dropped: %s", slide.path.name, counted(len(plan.coords), "tile"), told)
    return plan


def _thumbnail_fractions(plan: TilePlan) -> dict[str, np.ndarray]:
    mpp = plan.pixel_size.mpp / math.sqrt(plan.tissue.scale_x * plan.tissue.scale_y)
    found = find_on_thumbnail(plan.tissue, mpp)
    return {name: tile_fractions(mask, plan.tissue, plan.coords, plan.grid) for name, mask in found.items()}
