"""Connected groups of mask pixels, by eight neighbours: kept or dropped whole, in place and strip by strip.

Labels of a whole mask take 12 bytes a pixel. Here those of one strip are held at a time, and of each group that goes
on in the next strip what was counted so far and one pixel, by which it is found again if it is to be dropped.
"""

import cv2
import numpy as np

from stage0_tiling.strips import strips


def drop_small(mask: np.ndarray, min_px: float) -> None:
    """Drop the groups of less than `min_px` pixels from (H, W) bool, in place."""
    if cv2.countNonZero(mask.view(np.uint8)) < min_px:
        mask[:] = False
    else:
        _drop(mask, None, min_px)


def fill_small(mask: np.ndarray, max_px: float) -> None:
    """Fill the holes, groups of pixels that are not set, of less than `max_px` pixels in (H, W) bool, in place."""
    np.logical_not(mask, out=mask)
    drop_small(mask, max_px)
    np.logical_not(mask, out=mask)


def drop_unmarked(mask: np.ndarray, marks: np.ndarray) -> None:
    """Drop the groups that hold none of the marks from (H, W) bool, in place; marks are (H, W) bool."""
    _drop(mask, marks, 1)


def grow(mask: np.ndarray, radius_px: float, only_large_px: float) -> None:
    """Widen the groups that have at least so many pixels, and drop the others, of (H, W) bool in place."""
    drop_small(mask, only_large_px)
    if cv2.countNonZero(mask.view(np.uint8)):
        _morph(mask, cv2.MORPH_DILATE, disc(radius_px), margin=1)


def close_gaps(mask: np.ndarray, radius_px: float) -> None:
    """Set what is within reach of set pixels on both sides, of (H, W) bool in place: dilate, then erode."""
    _morph(mask, cv2.MORPH_CLOSE, disc(radius_px), margin=2)


def disc(radius_px: float) -> np.ndarray:
    """Kernel of a disc for morphology."""
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _morph(mask: np.ndarray, operation: int, kernel: np.ndarray, margin: int) -> None:
    """A morphological operation in place, each strip with the rows beside it that it depends on.

    OpenCV would make a copy of the whole. `margin` is how many radii of the kernel a pixel reaches.
    """
    pixels, reach = mask.view(np.uint8), margin * (len(kernel) // 2)
    above = pixels[:0].copy()  # the last rows that are done, as they were
    for rows in strips(*mask.shape):
        wide = np.concatenate([above, pixels[rows.start : rows.stop + reach]])
        done = cv2.morphologyEx(wide, operation, kernel)
        top, here = len(above), rows.stop - rows.start
        above = wide[max(0, top + here - reach) : top + here]
        pixels[rows] = done[top : top + here]


def _drop(mask: np.ndarray, counted: np.ndarray | None, least: float) -> None:
    """Drop the groups of which less than `least` pixels are counted; None counts all."""
    crossing = _Crossing(*mask.shape)
    for rows in strips(*mask.shape):
        part = mask[rows].view(np.uint8)
        set_px = cv2.countNonZero(part)
        if set_px in (0, part.size):  # as most strips are above and below the tissue
            num_labels, labels = 2, part
        else:
            num_labels, labels = cv2.connectedComponents(part, connectivity=8)
        if counted is not None:
            sizes = np.bincount(labels[counted[rows]], minlength=num_labels)
        elif num_labels == 2:
            sizes = np.array([0, set_px])
        else:
            sizes = np.bincount(labels.ravel(), minlength=num_labels)
        crosses = crossing.add(rows, labels, sizes)
        small = (sizes < least) & ~crosses
        small[0] = False
        if set_px and small.any():
            part[np.take(small, labels)] = 0
    for x, y in crossing.pixels_of_small(least):
        cv2.floodFill(mask.view(np.uint8), None, (x, y), 0, flags=8)


class _Crossing:
    """Groups that reach the edge between two strips, each given a number in every strip, and which of these are one."""

    def __init__(self, height: int, width: int):
        self._height = height
        self._above = _Row(np.zeros(width, np.uint8), {})
        self._sizes, self._pixels, self._parents = [0], [(0, 0)], [0]

    def add(self, rows: slice, labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Take up the groups of the next strip and tell of each label whether it reaches the edge of another strip."""
        numbers: dict[int, int] = {}
        top, bottom = _Row(labels[0], numbers), _Row(labels[-1], numbers)
        for row, y, is_edge in ((top, rows.start, rows.start > 0), (bottom, rows.stop - 1, rows.stop < self._height)):
            for x in row.starts if is_edge else ():
                label = int(row.labels[x])
                if label and label not in numbers:
                    numbers[label] = len(self._parents)
                    self._parents.append(numbers[label])
                    self._sizes.append(int(sizes[label]))
                    self._pixels.append((x, y))
        self._join(self._above, top)
        self._above = bottom
        crosses = np.zeros(len(sizes), bool)
        crosses[list(numbers)] = True
        return crosses

    def _join(self, above: "_Row", below: "_Row") -> None:
        """Note which groups meet, straight or across a corner; what meets changes only where a row's labels do."""
        for x in {*above.starts, *below.starts}:
            before = max(x - 1, 0)
            for here, there in ((x, x), (before, x), (x, before)):
                if (one := above.number(here)) and (other := below.number(there)):
                    one, other = self._first(one), self._first(other)
                    self._parents[max(one, other)] = min(one, other)

    def _first(self, number: int) -> int:
        """The number that stands for all that are one group with this one."""
        while self._parents[number] != number:
            self._parents[number] = number = self._parents[self._parents[number]]
        return number

    def pixels_of_small(self, least: float) -> list[tuple[int, int]]:
        """A pixel, (x, y), of each group that is less than that in all strips together."""
        first = [self._first(number) for number in range(len(self._parents))]
        sizes = np.bincount(first, weights=self._sizes)
        return [self._pixels[n] for n in range(1, len(first)) if first[n] == n and sizes[n] < least]


class _Row:
    """Labels along the first or last row of a strip, where they change, and the numbers of their groups."""

    def __init__(self, labels: np.ndarray, numbers: dict[int, int]):
        self.labels, self._numbers = labels.copy(), numbers
        self.starts = [0, *(np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist()]

    def number(self, x: int) -> int:
        return self._numbers.get(int(self.labels[x]), 0)
