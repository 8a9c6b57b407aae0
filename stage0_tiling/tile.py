r"""Find the tissue of slides and lay tiles on it.

    python stage0_tiling/tile.py --slides slides/ more.csv --output_dir out

writes, per slide, out/coords/<slide_id>.h5 (positions of its tiles), out/overlays/<slide_id>.jpg (to look at),
out/thumbnails/<slide_id>.jpg, out/geojson/<slide_id>.geojson (tissue, for QuPath) and a row in out/slides.csv; and
out/index.html, a contact sheet of all slides. A second run does only what is missing or failed before.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from jsonargparse import Namespace

from command_line import counted, make_parser, run
from stage0_tiling.flags import check_tiling_flags
from stage0_tiling.plan import TilingSettings, tiling_settings
from stage0_tiling.run_table import RunFolder
from stage0_tiling.slide import READERS
from stage0_tiling.slide_list import SlideEntry, check_mpp, find_slides
from stage0_tiling.slide_run import SlideRun, start_logging
from stage0_tiling.slide_work import tell_unmeasured, tile_slide, write_tile_squares
from stage0_tiling.tissue_sources import add_tissue_arguments, tissue_sources

logger = logging.getLogger("stage0_tiling")


def add_tiling_arguments(parser) -> None:
    group = parser.add_argument_group("Slides")
    group.add_argument(
        "--slides",
        nargs="+",
        required=True,
        help="folders (searched with all below), slides or images, or CSV lists with a column path and optionally "
        "slide_id, mpp (um per level-0 pixel, stands whatever the slide states) and assume_mpp (as the flag)",
    )
    group.add_argument(
        "--output_dir",
        required=True,
        help="folder for coords/, overlays/, slides.csv, index.html, ...; made when missing",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="delete what earlier runs made of these slides and start anew"
    )
    group.add_argument(
        "--reader",
        choices=READERS,
        default="auto",
        help="what reads the tiles: tiff is the fast path for tiled TIFF and SVS in JPEG or JPEG 2000, and fails on "
        "other slides; openslide does without it; auto takes tiff where it can, with equal results",
    )
    group.add_argument(
        "--icc",
        action="store_true",
        help="convert colours to sRGB by the ICC profile that a slide carries; slides without one stay as they are",
    )
    group.add_argument("--num_workers", type=int, default=4, help="threads that read slides, per process; 0 means 1")
    group = parser.add_argument_group("Tiles")
    group.add_argument("--tile_size", type=int, default=256, help="side of a tile in pixels at --mpp")
    group.add_argument(
        "--mpp", type=float, default=0.5, help="resolution of a tile in um per pixel: 0.5 is 20x, 0.25 is 40x"
    )
    group.add_argument("--overlap", type=int, default=0, help="pixels at --mpp that neighbouring tiles share")
    group.add_argument(
        "--assume_mpp",
        type=float,
        default=None,
        help="um per level-0 pixel of slides that state none, or an implausible one; by default these fail",
    )
    group.add_argument("--min_tissue", type=float, default=0.1, help="least fraction of a tile that is tissue, 0 to 1")
    group.add_argument(
        "--geojson_tiles",
        action="store_true",
        help="also write OUT/geojson_tiles/<slide_id>.geojson, tile objects for QuPath, for slides tiled before too",
    )
    add_tissue_arguments(parser)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add_tiling_arguments(parser)
    args = parser.parse_args(argv)
    start_logging()

    # Data
    check_tiling_flags(args)
    settings, sources = tiling_settings(args), tissue_sources(args)
    entries = assume_mpp(find_slides(args.slides), args.assume_mpp)
    folder = RunFolder(args.output_dir, sources.masks)
    if args.overwrite:
        folder.forget(entries, settings)
    tiling = SlideRun(entries, folder, partial(folder.needs_tiling, settings=settings), description="tiling")
    folder.begin(settings)
    if args.quality:
        tell_unmeasured(entries, folder)
    logger.info("%s, %d of them to tile", counted(len(entries), "slide"), len(tiling.missing))

    # Tile
    squares = None
    try:
        tiling.do(
            partial(tile_slide, folder=folder, settings=settings, reader=args.reader, sources=sources),
            num_threads=args.num_workers,
        )
        if args.geojson_tiles:
            squares = write_missing_squares(entries, folder, settings, args)
    finally:
        tiling.write_table()
    # a full disk may have ended either, with nothing recorded
    return max(tiling.report(), squares.report(is_quiet=True) if squares else 0)


def write_missing_squares(
    entries: list[SlideEntry],
    folder: RunFolder,
    settings: TilingSettings,
    args: Namespace,
    wait: Callable[[], object] = lambda: None,
) -> SlideRun:
    """Write the tiles of tiled slides as GeoJSON where that is missing; `wait` for processes that began together."""
    squares = SlideRun(entries, folder, folder.lacks_tile_squares, description="tiles to GeoJSON")
    wait()
    squares.do(
        partial(write_tile_squares, folder=folder, settings=settings, reader=args.reader), num_threads=args.num_workers
    )
    wait()
    return squares


def assume_mpp(entries: list[SlideEntry], mpp: float | None) -> list[SlideEntry]:
    """Give every slide the mpp to assume that it has not got from its list."""
    if mpp is None:
        return entries
    try:
        check_mpp(mpp)
    except ValueError as error:
        raise ValueError(f"--assume_mpp {mpp}: {error}") from error
    return [replace(entry, assume_mpp=entry.assume_mpp or mpp) for entry in entries]


if __name__ == "__main__":
    run(main)
