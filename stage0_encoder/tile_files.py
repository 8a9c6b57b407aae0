"""Pixels of a slide's tiles in a file of their own, read once from the slide, so that training reads them at random.

`<slide_id>-<digest>.npy` holds (n, tile_px, tile_px, 3) uint8, tiles evenly spaced over the slide's tissue in raster
order. The digest is of the slide file, the positions and the number asked for, so a file is never of other tiles.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from slide_features import atomic_path, choose_patches, raster_order, read_slide_coords
from stage0_tiling.slide import Slide
from stage0_tiling.slide_list import SlideEntry, find_slides

BACKGROUND = 255


def write_all_tiles(
    coords_paths: Sequence[Path], slides: list[str], folder: Path, *, max_tiles: int, num_workers: int, show: bool
) -> tuple[dict[Path, Path], dict[Path, str]]:
    """Write the tile files that are missing.

    Args:
        coords_paths: positions of tiles, ``coords/<slide_id>.h5`` of stage 0.
        slides: folders, files or lists of slides, as ``--slides`` of stage 0.
        folder: of the tile files.
        max_tiles: of a slide.
        num_workers: threads that read slides.
        show: whether to draw a progress bar.

    Returns:
        The tile file of each coords file, and what is wrong with each of which there is none.
    """
    entries = {entry.slide_id: entry for entry in find_slides(slides)}
    written, faults = {}, {}

    def write(coords_path: Path) -> Path:
        entry = entries.get(coords_path.stem)
        if entry is None:
            raise ValueError(f"no slide {coords_path.stem} in --slides; name the folder that holds it")
        return write_tiles(entry, coords_path, folder, max_tiles)

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        jobs = {path: pool.submit(write, path) for path in dict.fromkeys(coords_paths)}
        for path, job in tqdm(jobs.items(), desc="reading tiles", unit="slide", disable=not show):
            try:
                written[path] = job.result()
            except (ValueError, OSError) as error:
                faults[path] = str(error)
    return written, faults


def write_tiles(entry: SlideEntry, coords_path: Path, folder: Path, max_tiles: int) -> Path:
    """Write the tile file of one slide where it is missing, and return it.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the slide or its positions cannot be read, or it has no tiles.
    """
    where = read_slide_coords(coords_path)
    order = raster_order(where.coords)
    if not len(order):
        raise ValueError(f"{coords_path} has no tiles; leave the slide out")
    coords = where.coords[order[choose_patches(len(order), max_tiles)]]
    side, tile_px = where.patch_size_level0, where.tile_size
    about = f"{entry.path.name} {entry.path.stat().st_size} {side} {tile_px} {max_tiles}".encode()
    digest = hashlib.sha256(about + np.ascontiguousarray(coords, dtype=np.int64).tobytes()).hexdigest()[:12]
    path = folder / f"{entry.slide_id}-{digest}.npy"
    if not path.is_file():
        with Slide(entry.path, mpp=entry.mpp) as slide:
            tiles = [slide.read_region(int(x), int(y), side, side, (tile_px, tile_px)) for x, y in coords]
        with atomic_path(path) as partial, partial.open("wb") as file:
            np.save(file, np.stack(tiles), allow_pickle=False)
    return path


def montage(tiles: np.ndarray, side: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """A picture of ``side`` x ``side`` tiles in raster order; white where there are too few.

    Args:
        tiles: (n, tile_px, tile_px, 3) uint8.
        side: tiles in a row.
        rng: draws tiles; None takes evenly spaced ones.

    Returns:
        (side * tile_px, side * tile_px, 3) uint8.
    """
    chosen = tiles[choose_patches(len(tiles), side * side, rng)]
    height, width, channels = tiles.shape[1:]
    grid = np.full((side * side, height, width, channels), BACKGROUND, dtype=np.uint8)
    grid[: len(chosen)] = chosen
    rows = grid.reshape(side, side, height, width, channels)
    return rows.transpose(0, 2, 1, 3, 4).reshape(side * height, side * width, channels)
