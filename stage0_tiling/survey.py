r"""Look at a whole collection before tiling it: a table, charts, thumbnails, and what it would cost to encode.

    python stage0_tiling/survey.py --slides slides/ --output_dir out --tiles_per_second 500

writes out/survey.csv (a row per slide, and a list for --slides), out/survey.png (charts) and
out/survey_thumbnails_<page>.jpg (with the tissue outlined), and prints a summary. A second run looks only at slides
that are new or have changed.
"""

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from command_line import DONE, SOME_FAILED, check_output_folder, counted, first_line, make_parser, run
from slide_features import atomic_path
from stage0_tiling.full_disk import DiskFull, ending_on_full_disk, is_full
from stage0_tiling.slide_files import SURVEY_FOLDER
from stage0_tiling.slide_list import SlideEntry, check_mpp, find_slides
from stage0_tiling.slide_run import start_logging
from stage0_tiling.slide_survey import COORDS_BYTES, TILINGS, SurveyRow, survey_slide
from stage0_tiling.survey_pictures import write_charts, write_contact_sheets, write_thumbnail
from stage0_tiling.survey_summary import summary_of

FORMAT_VERSION = 1  # of what is kept of each slide; another one is measured again

logger = logging.getLogger("stage0_tiling")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    group = parser.add_argument_group("Slides")
    group.add_argument(
        "--slides", nargs="+", required=True, help="folders, slides or images, or CSV lists, as for tile.py"
    )
    group.add_argument("--output_dir", required=True, help="folder for the table and the pictures; made when missing")
    group.add_argument("--overwrite", action="store_true", help="look at all slides anew")
    group.add_argument("--num_workers", type=int, default=4, help="threads that read slides; 0 means 1")
    group.add_argument("--min_tissue", type=float, default=0.1, help="least fraction of a tile that is tissue, 0 to 1")
    group.add_argument(
        "--assume_mpp",
        type=float,
        default=None,
        help="um per level-0 pixel of slides that state none, or an implausible one; by default they are only reported",
    )
    group = parser.add_argument_group("Costs")
    group.add_argument("--feature_width", type=int, default=1024, help="numbers per tile, stored in 2 bytes each")
    group.add_argument(
        "--tiles_per_second",
        type=float,
        default=None,
        help="what your machines encode, to estimate hours; measure it on a few slides with encode.py",
    )
    args = parser.parse_args(argv)
    start_logging()
    _check(args)

    # Data
    entries = find_slides(args.slides)
    folder = Path(args.output_dir).expanduser()
    settings = {"min_tissue": args.min_tissue, "assume_mpp": args.assume_mpp}
    known = {} if args.overwrite else {entry.slide_id: _known(folder, entry, settings) for entry in entries}
    todo = [entry for entry in entries if known.get(entry.slide_id) is None]
    logger.info("%s, %d of them to look at", counted(len(entries), "slide"), len(todo))

    # Look
    try:
        with ending_on_full_disk(folder):
            found = {slide_id: row for slide_id, row in known.items() if row}
            found |= _look(todo, folder, settings, args.num_workers)
            rows = name_copies([found[entry.slide_id] for entry in entries])
            write_table(folder / "survey.csv", rows, args.feature_width)
            write_charts(folder / "survey.png", rows)
            pages = write_contact_sheets(folder, rows)
    except DiskFull as error:
        logger.error("%s", error)
        return SOME_FAILED

    # Tell
    print(summary_of(rows, args.feature_width, args.tiles_per_second))
    shown = counted(pages, "page")
    logger.info("see %s, and beside it survey.png and %s of thumbnails", folder / "survey.csv", shown)
    return SOME_FAILED if any(row.failed for row in rows) else DONE


def write_table(path: Path, rows: list[SurveyRow], feature_width: int) -> None:
    """Write survey.csv, atomically, with paths relative to it."""
    tiles = [f"tiles_{tile_px}px_{mpp:g}um" for tile_px, mpp in TILINGS]
    with atomic_path(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for row in rows:
            record = asdict(row)
            counts, problems = record.pop("tiles"), record.pop("problems")
            record["path"] = os.path.relpath(row.path, path.parent)
            record |= dict(zip(tiles, counts, strict=True))
            record["features_mb"] = None if counts[0] is None else round(features_mb(counts[0], feature_width), 3)
            record["problems"] = "; ".join(problems)
            if writer is None:
                writer = csv.DictWriter(file, list(record))
                writer.writeheader()
            writer.writerow(record)


def features_mb(num_tiles: int, feature_width: int) -> float:
    """10^6 bytes of a slide's feature file."""
    return num_tiles * (2 * feature_width + COORDS_BYTES) / 1e6


def name_copies(rows: list[SurveyRow]) -> list[SurveyRow]:
    """Add to the problems of each slide whose size and pixels are those of one before it which that one is."""
    first: dict[str, str] = {}
    named = []
    for row in rows:
        original = first.setdefault(row.fingerprint, row.slide_id) if row.fingerprint else row.slide_id
        copies = [] if original == row.slide_id else [f"same pixels as {original}"]
        named.append(replace(row, problems=[*row.problems, *copies]))
    return named


def _look(entries: list[SlideEntry], folder: Path, settings: dict, num_workers: int) -> dict[str, SurveyRow]:
    executor = ThreadPoolExecutor(max(1, num_workers))
    try:
        jobs = [executor.submit(_look_at, entry, folder, settings) for entry in entries]
        bar = tqdm(as_completed(jobs), total=len(jobs), unit="slide", desc="looking", disable=not jobs)
        with bar, logging_redirect_tqdm():
            rows = [job.result() for job in bar]
    finally:
        executor.shutdown(cancel_futures=True)
    failures = Counter(row.failed for row in rows)
    logger.info("%d looked at, %d failed", failures[False], failures[True])
    return {row.slide_id: row for row in rows}


def _look_at(entry: SlideEntry, folder: Path, settings: dict) -> SurveyRow:
    """Survey one slide and keep the row and the thumbnail. The one place where a bad slide is held back."""
    thumbnail, kept = (folder / SURVEY_FOLDER / f"{entry.slide_id}{suffix}" for suffix in (".jpg", ".json"))
    try:
        seen = _what_was_seen(entry, settings)
        row, tissue = survey_slide(entry, **settings)
        write_thumbnail(thumbnail, tissue)
    except Exception as error:
        if is_full(error):  # which is nothing about the slide
            raise
        message = first_line(error)
        logger.error("%s failed: %s", entry.slide_id, message)
        logger.debug("%s", entry.path, exc_info=True)
        for path in (kept, thumbnail):
            path.unlink(missing_ok=True)
        return SurveyRow(entry.slide_id, str(entry.path), problems=[message], failed=True)
    with atomic_path(kept) as partial:
        partial.write_text(json.dumps({"seen": seen, "row": asdict(row)}, indent=1))
    return row


def _known(folder: Path, entry: SlideEntry, settings: dict) -> SurveyRow | None:
    """What an earlier run found, if the slide and the settings are the same; None if it must be looked at."""
    try:
        kept = json.loads((folder / SURVEY_FOLDER / f"{entry.slide_id}.json").read_text())
        if kept["seen"] != _what_was_seen(entry, settings):
            return None
        return replace(SurveyRow(**kept["row"]), path=str(entry.path), tiles=tuple(kept["row"]["tiles"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _what_was_seen(entry: SlideEntry, settings: dict) -> dict:
    stat = entry.path.stat()
    file = {"version": FORMAT_VERSION, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return file | settings | {"list_mpp": entry.mpp, "list_assume_mpp": entry.assume_mpp}


def _check(args) -> None:
    check_output_folder(args.output_dir)
    if args.num_workers < 0:
        raise ValueError(f"--num_workers {args.num_workers}: expected 0 or more threads")
    for flag in ("feature_width", "tiles_per_second"):
        value = getattr(args, flag)
        if value is not None and not value > 0:
            raise ValueError(f"--{flag} {value}: expected a number above 0")
    if not 0 <= args.min_tissue <= 1:
        raise ValueError(f"--min_tissue {args.min_tissue}: expected a fraction, 0 to 1")
    if args.assume_mpp is not None:
        try:
            check_mpp(args.assume_mpp)
        except ValueError as error:
            raise ValueError(f"--assume_mpp {args.assume_mpp}: {error}") from error


if __name__ == "__main__":
    run(main)
