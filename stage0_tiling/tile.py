r"""Find the tissue of slides and lay tiles on it.

    python stage0_tiling/tile.py --slides slides/ more.csv --output_dir out

writes, per slide, out/coords/<slide_id>.h5 (positions of its tiles), out/overlays/<slide_id>.jpg (to look at) and a row
in out/slides.csv. A second run does only what is missing or failed before.
"""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from command_line import DONE, SOME_FAILED, make_parser, run
from slide_features import write_slide_coords
from stage0_tiling.overlay import write_overlay
from stage0_tiling.plan import TilePlan, TilingSettings, plan_tiles
from stage0_tiling.run_table import RunFolder, SlideRow, SlideState
from stage0_tiling.slide import READERS, Slide
from stage0_tiling.slide_list import SlideEntry, check_mpp, find_slides

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
        "--output_dir", required=True, help="folder for coords/, overlays/, slides.csv; made when missing"
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add_tiling_arguments(parser)
    args = parser.parse_args(argv)
    start_logging()

    # Data
    settings = TilingSettings(args.tile_size, args.mpp, args.overlap, args.min_tissue)
    entries = assume_mpp(find_slides(args.slides), args.assume_mpp)
    folder = RunFolder(args.output_dir)
    if args.overwrite:
        folder.forget(entries)
    for entry in entries:
        folder.check_tiling(entry, settings, entry.assume_mpp)
    folder.remove_leftovers(entries)
    todo = [entry for entry in entries if needs_tiling(folder, entry)]
    logger.info("%d slides, %d of them to tile", len(entries), len(todo))

    # Tile
    try:
        tile_slides(todo, folder, settings, num_workers=args.num_workers, reader=args.reader, icc=args.icc)
    finally:
        folder.write_table()
    return report(entries, folder)


def tile_slides(
    entries: list[SlideEntry],
    folder: RunFolder,
    settings: TilingSettings,
    *,
    num_workers: int,
    reader: str = "auto",
    icc: bool = False,
) -> None:
    """Tile slides in threads and record each; a slide that fails is recorded as failed and the others go on."""
    executor = ThreadPoolExecutor(max(1, num_workers))
    try:
        jobs = [
            executor.submit(record, folder, entry, lambda entry=entry: tile_slide(entry, folder, settings, reader, icc))
            for entry in entries
        ]
        with logging_redirect_tqdm():
            for job in tqdm(as_completed(jobs), total=len(jobs), unit="slide", desc="tiling", disable=not jobs):
                job.result()
    finally:
        executor.shutdown(cancel_futures=True)


def tile_slide(
    entry: SlideEntry, folder: RunFolder, settings: TilingSettings, reader: str = "auto", icc: bool = False
) -> SlideState:
    """Write coords and overlay of one slide and return what to record of it.

    Raises:
        SlideError: if the slide cannot be used.
    """
    with Slide(entry.path, reader, icc=icc, mpp=entry.mpp) as slide:
        plan = plan_tiles(slide, settings, entry.assume_mpp)
        write_overlay(folder.path("overlays", entry.slide_id), plan)
        row = _describe(entry, slide, plan)
        if row.n_tiles:
            write_slide_coords(
                folder.path("coords", entry.slide_id),
                plan.coords,
                name=entry.slide_id,
                mpp=settings.mpp,
                tile_size=settings.tile_size,
                overlap=settings.overlap,
                patch_size_level0=plan.grid.tile_width,
                level0_mpp=plan.pixel_size.mpp,
                level0_width=slide.width,
                level0_height=slide.height,
            )
        else:
            logger.warning(
                "%s: no tile holds %g tissue; look at its overlay and try a lower --min_tissue",
                entry.slide_id,
                settings.min_tissue,
            )
        return SlideState(row, tiling=settings, reader=slide.reader)


def record(folder: RunFolder, entry: SlideEntry, work: Callable[[], SlideState]) -> None:
    """Do the work of one slide and record it with its seconds. The one place where a bad slide is held back."""
    started = time.perf_counter()
    try:
        state = work()
    except Exception as error:
        known = folder.read_state(entry.slide_id) or SlideState(SlideRow(entry.slide_id, str(entry.path), "failed"))
        message = (str(error) or type(error).__name__).splitlines()[0]
        logger.error("%s failed: %s", entry.slide_id, message)
        logger.debug("%s", entry.path, exc_info=True)
        row = replace(known.row, path=str(entry.path), status="failed", error=message, seconds=None)
        state = replace(known, row=row, encoder=None)
    seconds = (state.row.seconds or 0.0) + time.perf_counter() - started
    folder.write_state(replace(state, row=replace(state.row, seconds=round(seconds, 3))))


def needs_tiling(folder: RunFolder, entry: SlideEntry) -> bool:
    state = folder.read_state(entry.slide_id)
    return not folder.is_tiled(state) or state.row.status == "failed"


def assume_mpp(entries: list[SlideEntry], mpp: float | None) -> list[SlideEntry]:
    """Give every slide the mpp to assume that it has not got from its list."""
    if mpp is None:
        return entries
    try:
        check_mpp(mpp)
    except ValueError as error:
        raise ValueError(f"--assume_mpp {mpp}: {error}") from error
    return [replace(entry, assume_mpp=entry.assume_mpp or mpp) for entry in entries]


def report(entries: list[SlideEntry], folder: RunFolder) -> int:
    """Log what became of the slides, list those that failed, and return the exit status."""
    rows = [state.row for entry in entries if (state := folder.read_state(entry.slide_id))]
    counts = {status: sum(row.status == status for row in rows) for status in ("done", "empty", "failed")}
    logger.info("%s; see %s", ", ".join(f"{n} {status}" for status, n in counts.items()), folder.folder / "slides.csv")
    for row in rows:
        if row.status == "failed":
            logger.error("failed: %s: %s", row.slide_id, row.error)
    return SOME_FAILED if counts["failed"] else DONE


def start_logging() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    logger.setLevel(logging.INFO)


def _describe(entry: SlideEntry, slide: Slide, plan: TilePlan) -> SlideRow:
    return SlideRow(
        slide_id=entry.slide_id,
        path=str(entry.path),
        status="done" if len(plan.coords) else "empty",
        format=slide.format,
        width=slide.width,
        height=slide.height,
        levels=slide.num_levels,
        mpp=plan.pixel_size and round(plan.pixel_size.mpp, 6),
        mpp_source=plan.pixel_size and plan.pixel_size.source,
        tissue_fraction=round(plan.tissue.fraction, 6),
        n_tiles=len(plan.coords),
    )


if __name__ == "__main__":
    run(main)
