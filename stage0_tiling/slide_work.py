"""The work on one slide: tile it, encode it. What every way of running does with each of its slides.

Both return what is to be recorded of the slide and raise what is wrong with it.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from command_line import counted
from slide_features import SlideFeatures, read_slide_coords, write_slide_coords, write_slide_features
from stage0_tiling.flags import check_readable
from stage0_tiling.geojson import write_tiles_geojson, write_tissue_geojson
from stage0_tiling.overlay import write_overlay, write_thumbnail
from stage0_tiling.plan import TilePlan, TilingSettings, measure_quality, plan_tiles, why_empty
from stage0_tiling.run_table import RunFolder, SlideRow, SlideState
from stage0_tiling.slide import Slide
from stage0_tiling.slide_list import SlideEntry
from stage0_tiling.tissue import make_grid
from stage0_tiling.tissue_sources import TissueSources
from stage0_tiling.user_masks import fingerprint_mask

if TYPE_CHECKING:
    from stage0_tiling.tile_encoder import TileEncoder

logger = logging.getLogger("stage0_tiling")


def tile_slide(
    entry: SlideEntry,
    folder: RunFolder,
    settings: TilingSettings,
    *,
    reader: str = "auto",
    sources: TissueSources | None = None,
) -> SlideState:
    """Write coords and overlay of one slide and return what to record of it.

    Raises:
        SlideError: if the slide cannot be used.
    """
    check_readable(entry.path)
    # before the mask is read: one that changes meanwhile is seen by the next run
    mask = fingerprint_mask(sources.masks, entry.slide_id) if sources and sources.masks else None
    with Slide(entry.path, reader, icc=settings.icc, mpp=entry.mpp) as slide:
        plan = plan_tiles(slide, settings, entry.assume_mpp, sources, entry.slide_id)
        write_overlay(folder.path("overlays", entry.slide_id), plan)
        write_thumbnail(folder.path("thumbnails", entry.slide_id), plan)
        write_tissue_geojson(folder.path("geojson", entry.slide_id), plan.tissue, origin=slide.bounds[:2])
        row = _describe(entry, slide, plan)
        folder.path("geojson_tiles", entry.slide_id).unlink(missing_ok=True)  # of tiles that are to be others
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
                quality=measure_quality(slide, plan, blur=bool(sources and sources.quality)),
            )
        else:
            logger.warning("%s: %s", entry.slide_id, why_empty(plan, settings))
        size = entry.path.stat().st_size
        return SlideState(row, tiling=settings, reader=slide.reader, num_bytes=size, mask=mask)


def tile_if_missing(entry: SlideEntry, folder: RunFolder, settings: TilingSettings, **how: Any) -> SlideState | None:
    """Tile a slide unless it is tiled; None if it is.

    One that failed later is tiled again, as its file may have been mended. Where that gives the same tiles, the
    features that it has stay good: with several encoders, one that fails shall not cost the work of the others.
    """
    if not folder.needs_tiling(entry, settings):
        return None
    known, before = folder.read_state(entry.slide_id), _tiles_of(folder, entry)
    state = tile_slide(entry, folder, settings, **how)
    is_same = known and (known.tiling, known.num_bytes) == (settings, state.num_bytes)
    if is_same and before is not None and np.array_equal(before, _tiles_of(folder, entry)):
        return replace(state, encoded=known.encoded, row=replace(state.row, warning=known.row.warning))
    return state


def _tiles_of(folder: RunFolder, entry: SlideEntry) -> np.ndarray | None:
    try:
        return read_slide_coords(folder.path("coords", entry.slide_id)).coords
    except (OSError, ValueError):
        return None


def tell_unmeasured(entries: list[SlideEntry], folder: RunFolder) -> None:
    """Warn, for --quality, of slides that were tiled without it: they are not tiled again for that."""
    tiled = [entry for entry in entries if folder.is_tiled(folder.read_state(entry.slide_id))]
    without = [entry.slide_id for entry in tiled if _lacks_blur(folder.path("coords", entry.slide_id))]
    if without:
        logger.warning(
            "--quality: %s, %s first, tiled before without the blur of tiles: add --overwrite to tile again with it",
            counted(len(without), "slide"),
            without[0],
        )


def _lacks_blur(path: Path) -> bool:
    try:
        return "blur" not in read_slide_coords(path).quality
    except (OSError, ValueError):  # it has no tiles, or is torn and made again
        return False


def write_tile_squares(
    entry: SlideEntry, folder: RunFolder, settings: TilingSettings, reader: str = "auto"
) -> SlideState:
    """Write the tiles of a tiled slide as GeoJSON; what is recorded of the slide stays."""
    with Slide(entry.path, reader, mpp=entry.mpp) as slide:
        origin = slide.bounds[:2]
        grid = make_grid(settings.tile_size, settings.overlap, settings.mpp, slide.pixel_size(entry.assume_mpp))
    coords = read_slide_coords(folder.path("coords", entry.slide_id)).coords
    write_tiles_geojson(folder.path("geojson_tiles", entry.slide_id), coords, grid, origin=origin)
    return folder.read_state(entry.slide_id)


def encode_tiled(
    entry: SlideEntry,
    folder: RunFolder,
    settings: TilingSettings,
    made_by: dict[str, dict[str, Any]],
    suffix: str,
    *,
    encoders: "dict[str, TileEncoder]",
    encode: Callable[..., list[SlideFeatures]],
    reader: str = "auto",
    state: SlideState | None = None,
) -> SlideState:
    """Encode one tiled slide with the encoders that have not, write its feature files, return what to record of it.

    Args:
        entry: the slide.
        folder: where its coords lie and its features go.
        settings: that it was tiled with.
        made_by: what makes the features, by the folder that they go to.
        suffix: of feature files.
        encoders: by the same.
        encode: `encode_slide_with`.
        reader: `auto`, `openslide` or `tiff`, see `Slide`.
        state: what is recorded of the slide; None reads it from the folder.
    """
    state = state or folder.read_state(entry.slide_id)
    missing = [name for name in encoders if not folder.is_encoded(state, name, suffix)]
    state = replace(state, encoded=state.encoded | made_by)
    if not state.row.n_tiles:
        return replace(state, row=replace(state.row, status="empty", error=None))
    planned = read_slide_coords(folder.path("coords", entry.slide_id))
    todo = [encoders[name] for name in missing]
    results = []
    if todo:
        with Slide(entry.path, reader, icc=settings.icc, mpp=entry.mpp) as slide:
            results = encode(slide, todo, settings, planned.coords, assume_mpp=entry.assume_mpp)
            state = replace(state, reader=slide.reader)
    for name, result in zip(missing, results, strict=True):
        write_slide_features(
            folder.features_path(name, entry.slide_id, suffix),
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
            more_making=result.more_making,
        )
    row = replace(state.row, status="done", error=None)
    if results:
        row = replace(row, warning=_warning(made_by[missing[0]], results[0]))
    return replace(state, row=row)


def _warning(made_by: dict[str, Any], result: SlideFeatures) -> str | None:
    """What of the settings could not be kept to with this slide."""
    wanted, applied = (making.get("stain_normalizer", "none") for making in (made_by, result.making))
    if wanted == applied:
        return None
    return f"encoded with --stain_normalizer {applied}, not {wanted}: its stains cannot be estimated"


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
