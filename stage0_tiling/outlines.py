"""Outlines of a mask: polygons with holes that run along the edges of its pixels, so that their area is the mask's."""

from collections import defaultdict

import cv2
import numpy as np

Polygon = tuple[np.ndarray, list[np.ndarray]]  # exterior (V, 2) and holes, each (V, 2) float64 (x, y), not closed


def outline(mask: np.ndarray) -> list[Polygon]:
    """Trace a mask.

    Args:
        mask: (H, W) bool.

    Returns:
        One polygon for each group of pixels that share sides, in the order of their first pixels: the exterior and the
        holes, in pixels of the mask, (0, 0) being the outer corner of its first pixel. The last vertex is not the first
        one again. Rings are simple and touch one another in single points at most, as GeoJSON wants it; exteriors run
        counter-clockwise where y points upwards, holes clockwise.
    """
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    polygons: dict[int, Polygon] = {}
    for ring, label in sorted(_rings(mask, labels), key=lambda found: -_doubled_area(found[0])):
        if _doubled_area(ring) > 0:  # all exteriors come before all holes
            polygons[label] = (ring, [])
        else:
            polygons[label][1].append(ring)
    return [polygons[label] for label in sorted(polygons)]


def _rings(mask: np.ndarray, labels: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Closed walks along pixel edges with tissue to their left (y upwards), each with the label of that tissue."""
    steps = _edges(mask)
    rings = []
    while steps:
        start = next(iter(steps))
        walk, place_of, at, pixel = [start], {start: 0}, start, None
        while True:
            following = steps[at]
            # where two pixels meet in a corner only, stay with the pixel the walk runs along
            index = next((i for i, (_, beside) in enumerate(following) if beside == pixel), 0)
            at, pixel = following.pop(index)
            if not following:
                del steps[walk[-1]]
            if at in place_of:  # a loop is closed: cut it off, so that no ring meets itself
                first = place_of[at]
                rings.append((_corners(np.array(walk[first:], np.float64)), int(labels[pixel])))
                for left in walk[first + 1 :]:
                    del place_of[left]
                del walk[first + 1 :]
                if len(walk) == 1:
                    break
            else:
                place_of[at] = len(walk)
                walk.append(at)
    return rings


def _edges(mask: np.ndarray) -> dict[tuple[int, int], list[tuple[tuple[int, int], tuple[int, int]]]]:
    """From each corner (x, y) to the next ones, with the pixel (row, column) that the edge belongs to."""
    padded = np.pad(mask.astype(bool), 1)
    inside = padded[1:-1, 1:-1]
    sides = (  # of a pixel: its neighbour there, and from which of its corners to which, (x, y)
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (1, 1)),
        (padded[2:, 1:-1], (1, 1), (0, 1)),
        (padded[1:-1, :-2], (0, 1), (0, 0)),
    )
    steps = defaultdict(list)
    for neighbour, (from_x, from_y), (to_x, to_y) in sides:
        for row, column in np.argwhere(inside & ~neighbour).tolist():
            steps[column + from_x, row + from_y].append(((column + to_x, row + to_y), (row, column)))
    return dict(steps)


def _corners(ring: np.ndarray) -> np.ndarray:
    """Drop vertices within straight runs."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _doubled_area(ring: np.ndarray) -> float:
    """Twice the area (shoelace formula), negative for a hole."""
    x, y = ring.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
