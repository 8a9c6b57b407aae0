r"""How fast slides become tiles, and in how much memory, as ratios that were measured in one run on one machine.

    OMP_NUM_THREADS=1 python benchmarks/stage0.py --json stage0.json
    OMP_NUM_THREADS=1 python benchmarks/stage0.py --only a b

JPEG-tiled, pyramidal SVS are made, 30 % of each tissue, and cut to tiles of 256 px at 0.5 um/px: the slide is opened,
its tissue found, and every tile decoded to RGB.

    a       slide at 0.5 um/px: our time / that of the floor. The floor is libjpeg-turbo, decoding exactly the
            compressed tiles that hold tissue, in as many threads, with nothing found, cut or kept. Lower is better.
    b       slide at 0.25 um/px, no level at 0.5: our tiles/s / those of OpenSlide's read_region and a resize by area
            in as many threads, both with what comes before the first tile. Higher is better. The floor, libjpeg-turbo
            at half size on the same compressed tiles, tells how much is left.
    linear  slides of 1, 2, 4 and 8 thousand tiles: largest time per tile / smallest. 1 is best. The floor of each is
            measured as well: tiles at the rim of the tissue are cheaper to decode, and small slides have more of them.
    memory  slides of 10,000 to 100,000 px at 0.25 um/px: largest peak of resident memory / that of the smallest slide.
            Each is planned, all its tiles are decoded, and some encoded with a ViT-S on the CPU, in an own process;
            and once more without the encoder, which takes more memory than all else.

Every repetition measures all of them one after the other, and the ratio is the median of the repetitions' ratios, so
that other work on the machine falls on both sides. Imports and the making of slides are not measured; slides are read
from the page cache. Of `linear` and `memory` equal compressed tiles are in the file once, so that it is small.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
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
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (default: all)")
    parser.add_argument("--side", type=int, default=20_000, help="a, b: level-0 pixels of a side (default: 20000)")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1000, 2000, 4000, 8000], help="linear: tiles, about")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[10_000, 30_000, 100_000], help="memory: level-0 pixels of sides"
    )
    parser.add_argument("--encoded", type=int, default=512, help="memory: tiles to encode (default: 512)")
    parser.add_argument("--tissue", type=float, default=0.3, help="fraction of a slide that is tissue (default: 0.3)")
    parser.add_argument("--num_workers", type=int, default=2, help="threads of everything measured (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, after one to warm up (default: 5)")
    parser.add_argument("--work_dir", type=Path, default=None, help="where slides are made and kept; default: not kept")
    parser.add_argument("--json", type=Path, default=None, help="file to write all figures to")
    args = parser.parse_args()
    cv2.setNumThreads(args.num_workers)
    figures = {name: getattr(args, name) for name in ("side", "tissue", "num_workers", "repeats")}
    figures |= {"cpus": os.cpu_count(), "load_before": os.getloadavg()[0]}
    print(f"{args.num_workers} threads, {os.cpu_count()} CPUs, load {figures['load_before']:.1f}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.work_dir or Path(scratch)
        for name in args.only:
            figures[name], line = PARTS[name](folder, args)
            print(f"{name:7} {line}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def against_the_floor(folder: Path, args: argparse.Namespace) -> tuple[dict, str]:
    path = folder / f"a_{args.side}_{args.tissue:g}.svs"
    make_slide(path, args.side, args.tissue, MPP["a"])
    streams = list(tissue_streams(path))
    runs = measure(
        args.repeats,
        ours=partial(tile_and_decode, path, "tiff", args.num_workers),
        floor=partial(decode_all, streams, args.num_workers),
        plan=partial(plan_only, path),
    )
    planning = [run[0] for run in runs.pop("plan")]
    found = {"plan_seconds": planning} | summary(runs, "floor", ratios_of(runs, "ours", "floor"))
    line = "{tiles_per_s:.0f} tiles/s, floor {floor_tiles_per_s:.0f}: {ratio:.2f} x its time".format(**found)
    return found, f"{line}, of which {statistics.median(planning):.3f} s find the tiles"


def against_openslide(folder: Path, args: argparse.Namespace) -> tuple[dict, str]:
    path = folder / f"b_{args.side}_{args.tissue:g}.svs"
    make_slide(path, args.side, args.tissue, MPP["b"])
    streams = list(tissue_streams(path))
    runs = measure(
        args.repeats,
        ours=partial(tile_and_decode, path, "tiff", args.num_workers),
        openslide=partial(tile_and_decode, path, "openslide", args.num_workers),
        floor=partial(decode_all, streams, args.num_workers, shrink=2),
    )
    above = ratios_of(runs, "ours", "floor")
    found = summary(runs, "openslide", ratios_of(runs, "openslide", "ours")) | {"floor_ratios": above}
    line = "{tiles_per_s:.0f} tiles/s, OpenSlide {openslide_tiles_per_s:.0f}: {ratio:.1f} x".format(**found)
    return found, f"{line}; {statistics.median(above):.2f} x the time of decoding at half size"


def with_more_tiles(folder: Path, args: argparse.Namespace) -> tuple[dict, str]:
    work, names = {}, [str(tiles) for tiles in args.tiles]
    for name in names:
        side = round(TILE * (int(name) / args.tissue) ** 0.5)
        path = folder / f"linear_{side}_{args.tissue:g}.svs"
        make_slide(path, side, args.tissue, MPP["a"], sparse=True)
        work[name] = partial(tile_and_decode, path, "tiff", args.num_workers)
        work[f"floor {name}"] = partial(decode_all, list(tissue_streams(path)), args.num_workers)
    runs = measure(args.repeats, **work)
    per_tile = {name: statistics.median(seconds / tiles for seconds, tiles in runs[name]) for name in runs}
    spread = [
        max(per_tile[each] for each in some) / min(per_tile[each] for each in some)
        for some in (names, [f"floor {name}" for name in names])
    ]
    above = {name: statistics.median(ratios_of(runs, name, f"floor {name}")) for name in names}
    each = ", ".join(
        f"{runs[name][0][1]} tiles {1e6 * per_tile[name]:.0f} us ({above[name]:.2f} x the floor)" for name in names
    )
    found = {"ratio": spread[0], "floor_ratio": spread[1], "above_floor": above, "seconds_per_tile": per_tile}
    return found | {"runs": runs}, f"{each} a tile: {spread[0]:.2f} x, floor {spread[1]:.2f} x"


def of_memory(folder: Path, args: argparse.Namespace) -> tuple[dict, str]:
    found, lines = {}, []
    for encoded in (args.encoded, 0):
        peaks = {}
        for side in args.sides:
            path = folder / f"memory_{side}_{args.tissue:g}.svs"
            make_slide(path, side, args.tissue, MPP["b"], sparse=True)
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                peaks[side] = process.submit(peak_bytes, path, args.num_workers, encoded).result()
        ratio = max(peaks.values()) / peaks[args.sides[0]]
        each = ", ".join(f"{side} px {peak / 2**20:.0f} MiB" for side, peak in peaks.items())
        name = "" if encoded else "decoding_"
        found |= {f"{name}ratio": ratio, f"{name}peak_bytes": peaks}
        lines.append(f"{each}: {ratio:.2f} x")
    return found, "; without encoder ".join(lines)


PARTS = {"a": against_the_floor, "b": against_openslide, "linear": with_more_tiles, "memory": of_memory}


def peak_bytes(path: Path, num_workers: int, encoded: int) -> int:
    """Peak of resident memory of a process that tiles and decodes a slide, and encodes so many of its tiles."""
    if encoded:  # first, as the command does
        import torch

        from encoders import load_encoder
        from stage0_tiling.encoding import encode_slide

        torch.set_num_threads(num_workers)
    coords = decode(path, "tiff", num_workers)
    if encoded:
        some = coords[:: max(1, len(coords) // encoded)][:encoded]
        encoder = load_encoder("vit_small_patch16_224", pretrained=False)
        encode_slide(path, encoder, tile_size=TILE, mpp=0.5, num_workers=num_workers, coords=some)
    # of this program alone: what getrusage says begins with the process that started it
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


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


def ratios_of(runs: dict[str, list[tuple[float, int]]], one: str, other: str) -> list[float]:
    """Time of one over that of the other in each repetition."""
    return [a[0] / b[0] for a, b in zip(runs[one], runs[other], strict=True)]


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
    """Open a slide, find its tissue and decode all tiles; their number."""
    return len(decode(path, reader, num_workers))


def decode(path: Path, reader: str, num_workers: int) -> np.ndarray:
    """Open a slide, find its tissue and decode all tiles in row order; their positions."""
    with Slide(path, reader) as slide:
        plan = plan_tiles(slide, SETTINGS)
        coords, grid = plan.coords, plan.grid
        del plan  # with the thumbnail and the mask, as the commands do before they read tiles
        size = SETTINGS.tile_size, SETTINGS.tile_size
        buffers = threading.local()

        def read(some: np.ndarray) -> int:
            if not hasattr(buffers, "tiles"):
                buffers.tiles = np.empty((CHUNK, *size, 3), np.uint8)
            out = buffers.tiles[: len(some)]
            return len(slide.read_tiles(some, grid.tile_width, grid.tile_height, size, out))

        with ThreadPoolExecutor(num_workers) as pool:
            assert sum(pool.map(read, np.split(coords, range(CHUNK, len(coords), CHUNK)))) == len(coords)
        return coords


def decode_all(streams: list[bytes], num_workers: int, shrink: int = 1) -> int:
    """The floor: decode whole JPEGs to RGB, of their size over `shrink`; their number."""
    side = TILE // shrink

    def decode(some: list[bytes]) -> None:
        for stream in some:
            simplejpeg.decode_jpeg(stream, min_height=side, min_width=side, min_factor=shrink)

    with ThreadPoolExecutor(num_workers) as pool:
        list(pool.map(decode, [streams[i : i + 64] for i in range(0, len(streams), 64)]))
    return len(streams)


def tissue_streams(path: Path) -> Iterator[bytes]:
    """The compressed tiles of level 0 under the tiles that are cut from a slide, as whole JPEGs, equal ones as one."""
    with Slide(path, "tiff") as slide:
        plan = plan_tiles(slide, SETTINGS)
        tiff = TiledTiff.open(path, [(slide.width, slide.height)])
    level = tiff._levels[0]
    offsets, counts = level.offsets, level.counts
    tiff.close()
    data, known = path.read_bytes(), {}
    across, down = plan.grid.tile_width // TILE, plan.grid.tile_height // TILE
    for x, y in plan.coords.tolist():
        for row, column in product(range(y // TILE, y // TILE + down), range(x // TILE, x // TILE + across)):
            if row < level.grid[0] and column < level.grid[1]:
                place = int(offsets[row, column]), int(counts[row, column])
                if place not in known:
                    known[place] = level.decoder.header + data[place[0] + 2 : sum(place)]
                yield known[place]


if __name__ == "__main__":
    main()
