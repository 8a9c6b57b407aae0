"""Tissue masks that the user made: GeoJSON, as QuPath exports annotations, or PNG.

MASKS/<slide_id>.geojson or .json   Polygon and MultiPolygon features in level-0 pixels; all of them are tissue
MASKS/<slide_id>.png                any size in the slide's aspect ratio; above 0 is tissue
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from command_line import first_line
from stage0_tiling.slide import SlideError

SUFFIXES = (".geojson", ".json", ".png")
ASPECT_TOLERANCE = 0.02


def check_masks(folder: str | Path, flag: str = "--masks") -> Path:
    """Refuse a folder, given by a flag, that is not there or holds no mask.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if no file in it can be a mask.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{flag} {folder}: no such folder")
    if not any(path.suffix in SUFFIXES for path in folder.iterdir()):
        raise ValueError(f"{flag} {folder}: holds no <slide_id>{', '.join(SUFFIXES)}")
    return folder


def find_mask(folder: Path, slide_id: str) -> Path | None:
    """Path of a slide's mask, None where the user made none.

    Raises:
        SlideError: if there are two.
    """
    found = [path for suffix in SUFFIXES if (path := folder / f"{slide_id}{suffix}").is_file()]
    if len(found) > 1:
        raise SlideError(f"{slide_id} has two masks, {found[0].name} and {found[1].name}: keep one")
    return found[0] if found else None


def fingerprint_mask(folder: Path, slide_id: str) -> str:
    """Tell one mask of a slide from another by content; empty where the user made none, or it cannot be read."""
    try:
        path = find_mask(folder, slide_id)
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path else ""
    except (SlideError, OSError):  # told when the slide is tiled
        return ""


def read_mask(
    path: Path, shape: tuple[int, int], slide_width: int, slide_height: int, origin: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Read a mask in the size of a thumbnail.

    Args:
        path: a GeoJSON or PNG file.
        shape: (H, W) of the thumbnail.
        slide_width: level-0 pixels.
        slide_height: level-0 pixels.
        origin: (x, y) in level-0 pixels of what GeoJSON counts from; QuPath counts from the corner of the scanned
            bounds where a slide states them.

    Returns:
        (H, W) bool, decided at the centres of pixels.

    Raises:
        SlideError: if the file cannot be read or does not fit the slide.
    """
    if path.suffix == ".png":
        return _read_png(path, shape, slide_width / slide_height)
    height, width = shape
    mask = np.zeros(shape, bool)
    for rings in _polygons(path):
        fill_within(mask, [(ring + origin) * [width / slide_width, height / slide_height] for ring in rings])
    return mask


def fill_within(mask: np.ndarray, rings: list[np.ndarray]) -> None:
    """Set what `fill` finds in (H, W) bool, in place; only where the polygon lies, as a slide may have thousands."""
    points = np.concatenate(rings)
    limits = mask.shape[::-1]
    left, top = np.clip(np.floor(points.min(axis=0)), 0, limits).astype(np.int64).tolist()
    right, bottom = np.clip(np.ceil(points.max(axis=0)), 0, limits).astype(np.int64).tolist()
    if left < right and top < bottom:
        part = mask[top:bottom, left:right]
        part |= fill([ring - (left, top) for ring in rings], part.shape)


def fill(rings: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Rasterise one polygon by the even-odd rule, so that rings within a ring are holes.

    Args:
        rings: (V, 2) float (x, y) in pixels, closed or not; (0, 0) is the outer corner of the first pixel.
        shape: (H, W).

    Returns:
        (H, W) bool, true for pixels whose centre lies inside.
    """
    height, width = shape
    starts = np.concatenate(rings)
    ends = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    downwards = (starts[:, 1] <= ends[:, 1])[:, None]
    upper, lower = np.where(downwards, starts, ends), np.where(downwards, ends, starts)
    first = np.clip(np.ceil(upper[:, 1] - 0.5), 0, height).astype(np.int64)  # rows whose centre an edge crosses
    last = np.clip(np.ceil(lower[:, 1] - 0.5), 0, height).astype(np.int64)
    counts = np.maximum(last - first, 0)
    edge = np.repeat(np.arange(len(starts)), counts)
    row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    slope = (lower[edge, 0] - upper[edge, 0]) / (lower[edge, 1] - upper[edge, 1])
    x = upper[edge, 0] + (row + 0.5 - upper[edge, 1]) * slope
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)  # the first centre to the right of the crossing
    crossings = np.bincount(row * (width + 1) + column, minlength=height * (width + 1)).reshape(height, width + 1)
    return (np.cumsum(crossings, axis=1) % 2 == 1)[:, :width]


def _read_png(path: Path, shape: tuple[int, int], aspect: float) -> np.ndarray:
    picture = cv2.imdecode(np.frombuffer(path.read_bytes() or b"\0", np.uint8), cv2.IMREAD_UNCHANGED)
    if picture is None:
        raise SlideError(f"mask {path.name} is no readable PNG: make it again")
    if abs(picture.shape[1] / picture.shape[0] / aspect - 1) > ASPECT_TOLERANCE + 1 / min(picture.shape[:2]):
        raise SlideError(
            f"mask {path.name} has {picture.shape[1]} x {picture.shape[0]} pixels, not the slide's aspect ratio "
            f"({aspect:.3f}): draw it over the whole slide"
        )
    inside = picture > 0 if picture.ndim == 2 else (picture[..., :3] > 0).any(axis=2)
    if _has_palette(path) and not np.array_equal(inside, np.asarray(Image.open(path)) > 0):
        raise SlideError(
            f"mask {path.name} has a palette in which numbers and colours differ in what is tissue (above 0, or not "
            "black): save it in shades of grey"
        )
    shrinks = inside.size > shape[0] * shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
    return cv2.resize(inside.astype(np.float32), shape[::-1], interpolation=interpolation) >= 0.5


def _has_palette(path: Path) -> bool:
    with Image.open(path) as picture:
        return picture.mode == "P"


def _polygons(path: Path) -> Iterator[list[np.ndarray]]:
    """Yield the rings of each polygon, each (V, 2) float64."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        geometries = list(_geometries(content))
        polygons = [
            [np.asarray(ring, np.float64)[:, :2] for ring in polygon]
            for geometry in geometries
            for polygon in _parts(geometry)
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise SlideError(
            f"mask {path.name} is no GeoJSON of polygons ({first_line(error)}): export it again"
        ) from error
    if geometries and not polygons:
        raise SlideError(f"mask {path.name} holds no Polygon or MultiPolygon: outline the tissue as areas")
    if not all(polygon and all(len(ring) and np.isfinite(ring).all() for ring in polygon) for polygon in polygons):
        raise SlideError(f"mask {path.name} has an empty ring or one that is not finite: export it again")
    yield from polygons


def _geometries(content: object) -> Iterator[dict]:
    """Geometries of a FeatureCollection, an array of features, a feature or a bare geometry."""
    if isinstance(content, list):
        for item in content:
            yield from _geometries(item)
    elif content["type"] == "FeatureCollection":
        yield from _geometries(content["features"])
    elif content["type"] == "Feature":
        if content["geometry"] is not None:
            yield from _geometries(content["geometry"])
    elif content["type"] == "GeometryCollection":
        yield from _geometries(content["geometries"])
    else:
        yield content


def _parts(geometry: dict) -> list:
    if geometry["type"] == "Polygon":
        return [geometry["coordinates"]]
    return geometry["coordinates"] if geometry["type"] == "MultiPolygon" else []
