r"""How fast slides become tiles, as ratios that were measured in one run on one machine.

    OMP_NUM_THREADS=1 python benchmarks/stage0.py --json stage0.json

Two JPEG-tiled, pyramidal SVS are made, 30 % of each tissue, and cut to tiles of 256 px at 0.5 um/px: the slide is
opened, its tissue found, and every tile decoded to RGB.

    a   slide at 0.5 um/px:   our time / that of the floor. The floor is libjpeg-turbo, decoding exactly the
        compressed tiles that hold tissue, in as many threads, with nothing found, cut or kept. Lower is better.
    b   slide at 0.25 um/px, no level at 0.5:   our tiles/s / those of OpenSlide's read_region and a resize by area
        in as many threads, both with what comes before the first tile. Higher is better.

Every repetition measures all of them one after the other, and the ratio is the median of the repetitions' ratios, so
that other work on the machine falls on both sides. Imports and the making of slides are not measured; slides are read
from the page cache.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from benchmarks.make_slides import MPP, TILE, make_slide
from stage0_tiling.plan import TilingSettings, plan_tiles
from stage0_tiling.slide import Slide
from stage0_tiling.tiled_tiff import TiledTiff

CHUNK = 32  # tiles that a thread decodes before it asks for more
SETTINGS = TilingSettings(tile_size=TILE, mpp=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--side", type=int, default=20_000, help="level-0 pixels of each slide's sides (default: 20000)"
    )
    parser.add_argument("--tissue", type=float, default=0.3, help="fraction of a slide that is tissue (default: 0.3)")
    parser.add_argument("--num_workers", type=int, default=2, help="threads of everything measured (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, after one to warm up (default: 5)")
    parser.add_argument("--work_dir", type=Path, default=None, help="where slides are made and kept; default: not kept")
    parser.add_argument("--json", type=Path, default=None, help="file to write all figures to")
    args = parser.parse_args()
    cv2.setNumThreads(args.num_workers)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.work_dir or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        figures = {"side": args.side, "num_workers": args.num_workers, "repeats": args.repeats, "cpus": os.cpu_count()}
        figures["load_before"] = os.getloadavg()[0]
        figures["a"] = against_the_floor(folder, args.side, args.tissue, args.num_workers, args.repeats)
        figures["b"] = against_openslide(folder, args.side, args.tissue, args.num_workers, args.repeats)
    print(f"{args.side} px wide, {args.num_workers} threads, {os.cpu_count()} CPUs, load {figures['load_before']:.1f}")
    planning = statistics.median(figures["a"]["plan_seconds"])
    print(
        "a  {tiles_per_s:.0f} tiles/s, floor {floor_tiles_per_s:.0f}: {ratio:.2f} x its time".format(**figures["a"]),
        end="",
    )
    print(f", of which {planning:.3f} s find the tiles")
    print("b  {tiles_per_s:.0f} tiles/s, OpenSlide {openslide_tiles_per_s:.0f}: {ratio:.1f} x".format(**figures["b"]))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def against_the_floor(folder: Path, side: int, tissue: float, num_workers: int, repeats: int) -> dict:
    path = folder / f"a_{side}_{tissue:g}.svs"
    make_slide(path, side, tissue, MPP["a"])
    streams = list(tissue_streams(path))
    runs = measure(
        repeats,
        ours=partial(tile_and_decode, path, "tiff", num_workers),
        floor=partial(decode_all, streams, num_workers),
        plan=partial(plan_only, path),
    )
    return {"plan_seconds": [run[0] for run in runs.pop("plan")]} | summary(
        runs, "floor", [ours[0] / floor[0] for ours, floor in zip(runs["ours"], runs["floor"], strict=True)]
    )


def against_openslide(folder: Path, side: int, tissue: float, num_workers: int, repeats: int) -> dict:
    path = folder / f"b_{side}_{tissue:g}.svs"
    make_slide(path, side, tissue, MPP["b"])
    runs = measure(
        repeats,
        ours=partial(tile_and_decode, path, "tiff", num_workers),
        openslide=partial(tile_and_decode, path, "openslide", num_workers),
    )
    return summary(runs, "openslide", [b[0] / a[0] for a, b in zip(runs["ours"], runs["openslide"], strict=True)])


def measure(repeats: int, **what: Callable[[], int]) -> dict[str, list[tuple[float, int]]]:
    """Seconds and number of tiles of each repetition, in turns, after one that is not counted."""
    runs = {name: [] for name in what}
    for repetition in range(-1, repeats):
        for name, work in what.items():
            started = time.perf_counter()
            num_tiles = work()
            if repetition >= 0:
                runs[name].append((time.perf_counter() - started, num_tiles))
    return runs


def summary(runs: dict[str, list[tuple[float, int]]], other: str, ratios: list[float]) -> dict:
    seconds = {name: [run[0] for run in found] for name, found in runs.items()}
    tiles = {name: found[0][1] for name, found in runs.items()}
    speed = {name: tiles[name] / statistics.median(seconds[name]) for name in runs}
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "tiles": tiles["ours"],
        f"{other}_tiles": tiles[other],
        "tiles_per_s": speed["ours"],
        f"{other}_tiles_per_s": speed[other],
        "seconds": seconds["ours"],
        f"{other}_seconds": seconds[other],
    }


def plan_only(path: Path) -> int:
    """Open a slide and find its tiles: the part of our time that is not decoding."""
    with Slide(path, "tiff") as slide:
        return len(plan_tiles(slide, SETTINGS).coords)


def tile_and_decode(path: Path, reader: str, num_workers: int) -> int:
    """Open a slide, find its tissue and decode all tiles, in row order; number of tiles."""
    with Slide(path, reader) as slide:
        plan = plan_tiles(slide, SETTINGS)
        size = SETTINGS.tile_size, SETTINGS.tile_size

        buffers = threading.local()

        def read(some: np.ndarray) -> int:
            if not hasattr(buffers, "tiles"):
                buffers.tiles = np.empty((CHUNK, *size, 3), np.uint8)
            out = buffers.tiles[: len(some)]
            return len(slide.read_tiles(some, plan.grid.tile_width, plan.grid.tile_height, size, out))

        with ThreadPoolExecutor(num_workers) as pool:
            return sum(pool.map(read, np.split(plan.coords, range(CHUNK, len(plan.coords), CHUNK))))


def decode_all(streams: list[bytes], num_workers: int) -> int:
    """The floor: decode whole JPEGs to RGB; their number."""

    def decode(some: list[bytes]) -> None:
        for stream in some:
            simplejpeg.decode_jpeg(stream)

    with ThreadPoolExecutor(num_workers) as pool:
        list(pool.map(decode, [streams[i : i + 64] for i in range(0, len(streams), 64)]))
    return len(streams)


def tissue_streams(path: Path) -> Iterator[bytes]:
    """The compressed tiles of level 0 under the tiles that are cut from a slide, as whole JPEGs."""
    with Slide(path, "tiff") as slide:
        coords = plan_tiles(slide, SETTINGS).coords
        tiff = TiledTiff.open(path, [(slide.width, slide.height)])
    level = tiff._levels[0]
    tiff.close()
    data = path.read_bytes()
    for x, y in coords.tolist():
        offset, count = (int(values[y // TILE, x // TILE]) for values in (level.offsets, level.counts))
        yield level.decoder.header + data[offset + 2 : offset + count]


if __name__ == "__main__":
    main()
