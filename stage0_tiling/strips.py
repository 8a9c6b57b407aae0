"""Pictures worked on in strips of rows: what is made on the way stays small and warm, however large the picture."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

STRIP_PX = 2**16  # pixels of a strip: what is made of it on the way, some 30 bytes a pixel, fits the cache of a core
NUM_THREADS = min(4, os.cpu_count() or 1)

Result = TypeVar("Result")


def strips(height: int, width: int) -> list[slice]:
    """Rows of each strip, from top to bottom."""
    rows = max(1, STRIP_PX // max(1, width))
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def map_strips(work: Callable[[slice], Result], height: int, width: int) -> list[Result]:
    """`work(rows)` of each strip, from top to bottom; several strips are worked on at a time, in threads."""
    parts = strips(height, width)
    if len(parts) == 1 or NUM_THREADS == 1:
        return [work(rows) for rows in parts]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(work, parts))


def widen(rows: slice, margin: int, height: int) -> tuple[slice, slice]:
    """Rows with so many more above and below, as far as there are any, and where among these the rows lie."""
    wide = slice(max(0, rows.start - margin), min(height, rows.stop + margin))
    return wide, slice(rows.start - wide.start, rows.stop - wide.start)
