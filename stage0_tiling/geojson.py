"""Tissue and tiles as GeoJSON for QuPath (File > Import objects from file), in level-0 pixels, y downwards."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import shapely

from slide_features import atomic_path
from stage0_tiling.tissue import Grid, TissueMask

TISSUE_COLOR = (0, 160, 0)
TILE_COLOR = (30, 80, 220)
EVIDENCE_COLOR = (213, 94, 0)
TOLERANCE = 0.75  # mask pixels that a simplified outline may leave the mask's; straightens its stairs, at most 0.71
PRECISION = 0.5  # level-0 pixels; never coarser than half a mask pixel


def write_tissue_geojson(path: str | Path, tissue: TissueMask, origin: tuple[int, int] = (0, 0)) -> None:
    """Write each piece of tissue as a QuPath annotation of class Tissue, atomically.

    Args:
        path: file to write; a slide without tissue gets a collection without features.
        tissue: the mask.
        origin: (x, y) in level-0 pixels of what the reader of the file counts from. QuPath counts from the corner of
            the scanned bounds where a slide states them.
    """
    pieces = tissue_polygons(tissue)
    features = (
        _feature(_shifted(piece, origin), "annotation", "Tissue", TISSUE_COLOR, name=f"Tissue {number}")
        for number, piece in enumerate(pieces, 1)
    )
    _write(path, features)


def write_tiles_geojson(path: str | Path, coords: np.ndarray, grid: Grid, origin: tuple[int, int] = (0, 0)) -> None:
    """Write each tile as a QuPath tile object, atomically, in the order of `coords`.

    Args:
        path: file to write.
        coords: (N, 2) int64 (x, y) of top-left corners, level-0 pixels.
        grid: sizes of the tiles.
        origin: as in `write_tissue_geojson`.
    """
    corners = coords - np.asarray(origin)
    squares = shapely.box(*corners.T, *(corners + [grid.tile_width, grid.tile_height]).T)
    _write(path, (_feature(square, "tile", "Tile", TILE_COLOR) for square in squares))


def write_measured_tiles_geojson(
    path: str | Path,
    coords: np.ndarray,
    grid: Grid,
    measurements: Mapping[str, np.ndarray],
    marked: Iterable[tuple[str, int]] = (),
    origin: tuple[int, int] = (0, 0),
) -> None:
    """Write tiles with measurements, which QuPath shows as colours (Measure > Show measurement maps), atomically.

    Args:
        path: file to write.
        coords: (N, 2) int64 (x, y) of top-left corners, level-0 pixels.
        grid: sizes of the tiles.
        measurements: name to (N,) of finite numbers.
        marked: (name, row of a tile): tiles that are written once more, as annotations of that name above the others.
        origin: as in `write_tissue_geojson`.
    """
    corners = coords - np.asarray(origin)
    squares = shapely.box(*corners.T, *(corners + [grid.tile_width, grid.tile_height]).T)
    tiles = [
        _feature(square, "tile", "Tile", TILE_COLOR, measurements={k: float(v[i]) for k, v in measurements.items()})
        for i, square in enumerate(squares)
    ]
    tops = [_feature(squares[i], "annotation", "Evidence", EVIDENCE_COLOR, name=name) for name, i in marked]
    _write(path, tiles + tops)


def tissue_polygons(tissue: TissueMask) -> np.ndarray:
    """Outline the tissue.

    Returns:
        (N,) of valid shapely geometries in level-0 pixels: a polygon with holes for each piece of tissue, within a
        mask pixel of the mask's own outline.
    """
    contours = tissue.contours_level0()
    pieces = np.array([shapely.Polygon(exterior, holes) for exterior, holes in contours], dtype=object)
    simple = shapely.simplify(pieces, TOLERANCE / max(tissue.scale_x, tissue.scale_y), preserve_topology=True)
    return shapely.set_precision(simple, PRECISION)  # valid it stays, which rounding does not promise


def _shifted(geometry: shapely.Geometry, origin: tuple[int, int]) -> shapely.Geometry:
    return shapely.transform(geometry, lambda points: points - origin) if any(origin) else geometry


def _feature(
    geometry: shapely.Geometry, object_type: str, label: str, color: tuple[int, int, int], **more: object
) -> dict:
    classification = {"name": label, "color": color}
    properties = {"objectType": object_type, "classification": classification, **more}
    return {"type": "Feature", "geometry": shapely.geometry.mapping(geometry), "properties": properties}


def _write(path: str | Path, features: Iterable[dict]) -> None:
    collection = {"type": "FeatureCollection", "features": list(features)}
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(collection, separators=(",", ":")))
