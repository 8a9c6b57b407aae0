r"""Make slides to measure on: pyramidal SVS, a disc of tissue on a blank ground, in tiles of 256 px, 4:2:0 JPEG.

    python benchmarks/make_slides.py --output_dir slides

Writes, of 1, 1/4 and 1/16 of its sides each, so that no level of `b.svs` has 0.5 um/px:

    DIR/a.svs   level 0 at 0.5 um/px
    DIR/b.svs   level 0 at 0.25 um/px

Compressed tiles come from a small library, as drawing them all would take long. They are written as often as they are
used, so that a file is as large as a slide's; with `--sparse` once each, so that a slide of any size is a small file.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import tifffile

TILE = 256
MPP = {"a": 0.5, "b": 0.25}
DOWNSAMPLES = (1, 4, 16)
QUALITY = 80  # a usual value of scanners
LIBRARY = 24  # different compressed tiles of tissue per level
BACKGROUND = (242, 241, 243)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that receives the slides")
    parser.add_argument("--side", type=int, default=20_000, help="level-0 pixels of their sides (default: 20000)")
    parser.add_argument("--tissue", type=float, default=0.3, help="fraction that is tissue (default: 0.3)")
    parser.add_argument("--sparse", action="store_true", help="write equal compressed tiles once")
    args = parser.parse_args()
    for name, mpp in MPP.items():
        make_slide(args.output_dir / f"{name}.svs", args.side, args.tissue, mpp, sparse=args.sparse)


def make_slide(path: Path, side: int, tissue: float, mpp: float, sparse: bool = False) -> None:
    """Write an SVS of `side` x `side` px, unless it is there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    repeats = []
    with tifffile.TiffWriter(partial, bigtiff=True) as tiff:
        for downsample in DOWNSAMPLES:
            size = side // downsample
            tiles = compressed_tiles(size, size * (tissue / np.pi) ** 0.5, downsample)
            tiff.write(
                once_each(tiles, repeats) if sparse else tiles,
                shape=(size, size, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                description=f"Aperio made by a benchmark\r\n{side}x{side}|MPP = {mpp}",
                metadata=None,
            )
    if sparse:
        point_to_first(partial, repeats)
    partial.replace(path)


def once_each(tiles: Iterator[bytes], repeats: list[list[int]]) -> Iterator[bytes]:
    """Each tile when it first comes, then a byte in its place; `repeats` gets the place of the first for every tile."""
    first_of: dict[bytes, int] = {}
    repeats.append([])
    for place, tile in enumerate(tiles):
        first = first_of.setdefault(tile, place)
        repeats[-1].append(first)
        yield tile if first == place else b"\xff"


def point_to_first(path: Path, repeats: list[list[int]]) -> None:
    """Let the places of repeated tiles point to the first of them."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for page, firsts in zip(tiff.pages, repeats, strict=True):
            for tag in ("TileOffsets", "TileByteCounts"):
                values = page.tags[tag].value
                page.tags[tag].overwrite([values[first] for first in firsts])


def compressed_tiles(side: int, radius: float, downsample: int) -> Iterator[bytes]:
    """Compressed tiles of one level, row by row: library tiles inside the disc and outside, drawn ones at its edge."""
    inside = [compress(texture(seed, downsample)) for seed in range(LIBRARY)]
    tissue, blank = texture(LIBRARY, downsample), np.full((TILE, TILE, 3), BACKGROUND, np.uint8)
    outside = compress(blank)
    centre = side / 2
    y, x = np.mgrid[:TILE, :TILE]
    for row, top in enumerate(range(0, side, TILE)):
        for column, left in enumerate(range(0, side, TILE)):
            ends = [abs(begin + end - centre) for begin in (left, top) for end in (0, TILE - 1)]
            farthest = max(ends[:2]), max(ends[2:])
            nearest = (max(0, abs(begin + (TILE - 1) / 2 - centre) - (TILE - 1) / 2) for begin in (left, top))
            if np.hypot(*farthest) < radius:
                yield inside[(7 * row + 3 * column) % LIBRARY]
            elif np.hypot(*nearest) >= radius:
                yield outside
            else:
                within = np.hypot(y + top - centre, x + left - centre) < radius
                yield compress(np.where(within[..., None], tissue, blank))


def texture(seed: int, downsample: int) -> np.ndarray:
    """(256, 256, 3) uint8 of something like stained tissue: fibres, nuclei and noise."""
    rng = np.random.default_rng(seed)
    cloud = cv2.resize(rng.normal(size=(32, 32)).astype(np.float32), (TILE, TILE), interpolation=cv2.INTER_CUBIC)
    picture = np.clip(np.array([214, 142, 188]) + 14 * cloud[..., None], 0, 255).astype(np.uint8)
    for _ in range(90):
        centre = tuple(int(value) for value in rng.integers(0, TILE, 2))
        axes = tuple(max(1, int(value) // downsample) for value in rng.integers(4, 10, 2))
        color = tuple(int(value) for value in rng.normal((104, 66, 146), 12))
        cv2.ellipse(picture, centre, axes, int(rng.integers(180)), 0, 360, color, -1, cv2.LINE_AA)
    return np.clip(picture + rng.normal(0, 5, picture.shape), 0, 255).astype(np.uint8)


def compress(tile: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(tile, quality=QUALITY, colorspace="RGB", colorsubsampling="420")


if __name__ == "__main__":
    main()
