"""Outlines of a mask: polygons with holes that run along the edges of its pixels, so that their area is the mask's."""

import cv2
import numpy as np

Polygon = tuple[np.ndarray, list[np.ndarray]]  # exterior (V, 2) and holes, each (V, 2) float64 (x, y), not closed
FROM_CORNER = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])  # of a pixel, where its top, right, bottom and left side start
STEP = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])


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
    starts, following, pixels = _edges(mask)
    label_of = labels.ravel()[pixels].tolist()
    nexts = following.tolist()
    rings = []
    done = bytearray(len(nexts))
    for first in range(len(nexts)):
        if done[first]:
            continue
        walk, edge = [], first
        while not done[edge]:
            done[edge] = 1
            walk.append(edge)
            edge = nexts[edge]
        ring = starts[walk]
        rings += [(_corners(part.astype(np.float64)), label_of[first]) for part in _simple_loops(ring, mask.shape[1])]
    return rings


def _simple_loops(ring: np.ndarray, width: int) -> list[np.ndarray]:
    """Cut a walk where it meets itself, so that no ring does; most walks are one loop."""
    corners = ring[:, 1] * (width + 1) + ring[:, 0]
    if len(np.unique(corners)) == len(corners):
        return [ring]
    loops, walk, place_of = [], [], {}
    for at, corner in enumerate([*corners.tolist(), int(corners[0])]):
        if corner in place_of:
            start = place_of[corner]
            loops.append(ring[walk[start:]])
            for left in walk[start + 1 :]:
                del place_of[int(corners[left])]
            del walk[start + 1 :]
        else:
            place_of[corner] = len(walk)
            walk.append(at)
    return loops


def _edges(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges between tissue and background, (E,) each.

    Returns:
        (E, 2) corners (x, y) where they start, (E,) index of the edge that follows each, and (E,) index in the raveled
        mask of the pixel that each belongs to.
    """
    padded = np.pad(mask.astype(bool), 1)
    inside = padded[1:-1, 1:-1]
    beside = padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2]
    sides = [np.flatnonzero(inside & ~neighbour) for neighbour in beside]  # top, right, bottom, left
    pixels = np.concatenate(sides)
    heading = np.repeat(np.arange(4), [len(side) for side in sides])  # east, south, west, north: around the pixel
    height, width = mask.shape
    starts = np.stack([pixels % width, pixels // width], axis=1) + FROM_CORNER[heading]
    ends = starts + STEP[heading]
    keys = (starts[:, 1] * (width + 1) + starts[:, 0]) * 4 + heading
    order = np.argsort(keys)
    following = np.full(len(keys), -1)
    # where two pixels meet in a corner only, turning right stays with the pixel that the edge belongs to
    for turn in (3, 0, 1):
        wanted = (ends[:, 1] * (width + 1) + ends[:, 0]) * 4 + (heading + turn) % 4
        place = np.minimum(np.searchsorted(keys, wanted, sorter=order), max(len(keys) - 1, 0))
        found = order[place]
        following = np.where(keys[found] == wanted, found, following)
    return starts, following, pixels


def _corners(ring: np.ndarray) -> np.ndarray:
    """Drop vertices within straight runs."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _doubled_area(ring: np.ndarray) -> float:
    """Twice the area (shoelace formula), negative for a hole."""
    x, y = ring.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
