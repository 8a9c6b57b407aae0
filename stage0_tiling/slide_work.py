"""The work on one slide: tile it, encode it. What every way of running does with each of its slides.

Both return what is to be recorded of the slide and raise what is wrong with it.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

from slide_features import SlideFeatures, read_slide_coords, write_slide_coords, write_slide_features
from stage0_tiling.geojson import write_tiles_geojson, write_tissue_geojson
from stage0_tiling.overlay import write_overlay, write_thumbnail
from stage0_tiling.plan import TilePlan, TilingSettings, plan_tiles
from stage0_tiling.run_table import RunFolder, SlideRow, SlideState
from stage0_tiling.slide import Slide
from stage0_tiling.slide_list import SlideEntry
from stage0_tiling.tissue import make_grid

logger = logging.getLogger("stage0_tiling")


def tile_slide(entry: SlideEntry, folder: RunFolder, settings: TilingSettings, reader: str = "auto") -> SlideState:
    """Write coords and overlay of one slide and return what to record of it.

    Raises:
        SlideError: if the slide cannot be used.
    """
    with Slide(entry.path, reader) as slide:
        plan = plan_tiles(slide, settings, entry.assume_mpp)
        write_overlay(folder.path("overlays", entry.slide_id), plan)
        write_thumbnail(folder.path("thumbnails", entry.slide_id), plan)
        write_tissue_geojson(folder.path("geojson", entry.slide_id), plan.tissue)
        row = _describe(entry, slide, plan)
        if row.n_tiles:
            write_slide_coords(
                folder.path("coords", entry.slide_id),
                plan.coords,
                name=entry.slide_id,
                mpp=settings.mpp,
                tile_size=settings.tile_size,
                overlap=settings.overlap,
                patch_size_level0=plan.grid.tile_width,
                level0_mpp=plan.pixel_size.mpp,
                level0_width=slide.width,
                level0_height=slide.height,
            )
        else:
            logger.warning(
                "%s: no tile holds %g tissue; look at its overlay and try a lower --min_tissue",
                entry.slide_id,
                settings.min_tissue,
            )
        return SlideState(row, tiling=settings, reader=slide.reader)


def tile_if_missing(
    entry: SlideEntry, folder: RunFolder, settings: TilingSettings, reader: str = "auto"
) -> SlideState | None:
    """Tile a slide unless it is tiled; None if it is."""
    return tile_slide(entry, folder, settings, reader) if folder.needs_tiling(entry, settings) else None


def write_tile_squares(entry: SlideEntry, folder: RunFolder, settings: TilingSettings) -> SlideState:
    """Write the tiles of a tiled slide as GeoJSON; what is recorded of the slide stays."""
    with Slide(entry.path) as slide:
        grid = make_grid(settings.tile_size, settings.overlap, settings.mpp, slide.pixel_size(entry.assume_mpp))
    coords = read_slide_coords(folder.path("coords", entry.slide_id)).coords
    write_tiles_geojson(folder.path("geojson_tiles", entry.slide_id), coords, grid)
    return folder.read_state(entry.slide_id)


def encode_tiled(
    entry: SlideEntry,
    folder: RunFolder,
    settings: TilingSettings,
    encoded_by: dict[str, str],
    *,
    encode: Callable[..., SlideFeatures],
    reader: str = "auto",
) -> SlideState:
    """Encode one tiled slide, write its feature file and return what to record of it.

    Args:
        entry: the slide.
        folder: where its coords lie and its features go.
        settings: that it was tiled with.
        encoded_by: name and fingerprint of the encoder.
        encode: `encode_slide` with the encoder.
        reader: `auto`, `openslide` or `tiff`, see `Slide`.
    """
    state = replace(folder.read_state(entry.slide_id), **encoded_by)
    if not state.row.n_tiles:
        return replace(state, row=replace(state.row, status="empty", error=None))
    with Slide(entry.path, reader) as slide:
        opened_by = slide.reader
    planned = read_slide_coords(folder.path("coords", entry.slide_id))
    result = encode(entry.path, coords=planned.coords, assume_mpp=entry.assume_mpp)
    write_slide_features(
        folder.path("features", entry.slide_id),
        result.features,
        result.coords,
        name=entry.slide_id,
        encoder=result.encoder,
        mpp=settings.mpp,
        tile_size=settings.tile_size,
        overlap=settings.overlap,
        min_tissue=settings.min_tissue,
        encoder_fingerprint=result.encoder_fingerprint,
        patch_size_level0=result.patch_size_level0,
        level0_mpp=planned.level0_mpp,
        level0_width=planned.level0_width,
        level0_height=planned.level0_height,
    )
    return replace(state, row=replace(state.row, status="done", error=None), reader=opened_by)


def _describe(entry: SlideEntry, slide: Slide, plan: TilePlan) -> SlideRow:
    return SlideRow(
        slide_id=entry.slide_id,
        path=str(entry.path),
        status="done" if len(plan.coords) else "empty",
        format=slide.format,
        width=slide.width,
        height=slide.height,
        levels=slide.num_levels,
        mpp=plan.pixel_size and round(plan.pixel_size.mpp, 6),
        mpp_source=plan.pixel_size and plan.pixel_size.source,
        tissue_fraction=round(plan.tissue.fraction, 6),
        n_tiles=len(plan.coords),
    )
