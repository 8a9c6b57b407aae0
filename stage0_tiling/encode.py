r"""Turn slides into patch tokens: tile what is not tiled, then encode the tiles.

    accelerate launch stage0_tiling/encode.py --slides slides/ --output_dir out --encoder hf-hub:MahmoodLab/UNI2-h

writes out/features/<slide_id>.h5 beside what tile.py writes. Several encoders read every tile once and write to
out/features_<short name>/ each. Processes share the slides among themselves. A second run does only what is missing or
failed before.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from command_line import DONE, SOME_FAILED, make_parser, run
from feature_containers import SUFFIXES
from slide_features import SlideFeatures, read_slide_coords, worth_saying, write_slide_features
from stage0_tiling.encoding import add_encoding_arguments, encode_slide_with
from stage0_tiling.plan import TilingSettings, tiling_settings
from stage0_tiling.run_table import RunFolder, SlideState
from stage0_tiling.slide import Slide
from stage0_tiling.slide_list import SlideEntry, find_slides
from stage0_tiling.stain import read_stain_target
from stage0_tiling.tile import (
    add_tiling_arguments,
    assume_mpp,
    needs_tiling,
    record,
    report,
    start_logging,
    tile_slides,
)
from stage0_tiling.tissue_sources import tissue_sources

if TYPE_CHECKING:
    from stage0_tiling.tile_encoder import TileEncoder

LONGEST_RUN = timedelta(days=30)  # processes wait for the slowest one; the default of 30 minutes would end the run

logger = logging.getLogger("stage0_tiling")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add_tiling_arguments(parser)
    add_encoding_arguments(parser)
    args = parser.parse_args(argv)
    start_logging()

    # Data
    settings, sources = tiling_settings(args), tissue_sources(args)
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: expected at least 1 tile")
    stain = {
        "stain_normalizer": args.stain_normalizer,
        "stain_target": read_stain_target(args.stain_normalizer, args.stain_target),
    }
    entries = assume_mpp(find_slides(args.slides), args.assume_mpp)
    folder = RunFolder(args.output_dir)

    # Model
    from accelerate import PartialState

    from accelerator_setup import runs_on_cpu
    from stage0_tiling.tile_encoder import choose_dtype, load_tile_encoders

    process = PartialState(cpu=runs_on_cpu(), timeout=LONGEST_RUN)
    encoders = load_tile_encoders(
        args.encoder,
        process.device,
        tile_size=args.tile_size,
        batch_size=args.batch_size,
        dtype=choose_dtype(args.mixed_precision, process.device),
        compiled=args.compile,
    )
    for encoder in encoders.values():
        advice = encoder.preset and encoder.preset.tiling_advice(tile_size=args.tile_size, mpp=args.mpp)
        if advice and process.is_main_process:
            logger.warning(advice)
    made_by = {name: encoder.identity | worth_saying(stain) for name, encoder in encoders.items()}
    suffix = SUFFIXES[args.format]

    # Resume
    if process.is_main_process:
        if args.overwrite:
            folder.forget(entries)
        folder.remove_leftovers(entries)
    process.wait_for_everyone()
    for entry in entries:
        folder.check_tiling(entry, settings, entry.assume_mpp)
        for name, made in made_by.items():
            folder.check_encoder(entry, made, name)
    missing = [entry for entry in entries if needs_encoding(folder, entry, made_by, suffix)]
    process.wait_for_everyone()  # nobody records a slide before all have seen which ones are missing
    mine = missing[process.process_index :: process.num_processes]
    if process.is_main_process:
        logger.info("%d slides, %d of them to encode with %s", len(entries), len(missing), ", ".join(args.encoder))

    # Tile and encode
    try:
        tile_slides(
            [e for e in mine if needs_tiling(folder, e)],
            folder,
            settings,
            num_workers=args.num_workers,
            reader=args.reader,
            sources=sources,
        )
        ready = [entry for entry in mine if folder.is_tiled(folder.read_state(entry.slide_id))]
        reading = {"num_workers": args.num_workers, "reader": args.reader}
        encode = partial(encode_slide_with, settings=settings, **stain, **reading)
        num_tiles = sum(folder.read_state(entry.slide_id).row.n_tiles for entry in ready)
        with (
            logging_redirect_tqdm(),
            tqdm(total=num_tiles, unit="tile", desc=f"encoding {process.process_index}") as bar,
        ):
            for entry in ready:
                shown = partial(encode, on_tiles=bar.update)
                work = partial(encode_tiled, entry, folder, settings, shown, encoders, made_by, suffix, args.reader)
                record(folder, entry, work)
        process.wait_for_everyone()
    finally:
        if process.is_main_process:
            folder.write_table()
    status = report(entries, folder) if process.is_main_process else _status(entries, folder)
    process.wait_for_everyone()
    process.destroy_process_group()
    return status


def needs_encoding(folder: RunFolder, entry: SlideEntry, feature_folders: Iterable[str], suffix: str) -> bool:
    state = folder.read_state(entry.slide_id)
    if not folder.is_tiled(state) or state.row.status == "failed":
        return True
    return not all(folder.is_encoded(state, name, suffix) for name in feature_folders)


def encode_tiled(
    entry: SlideEntry,
    folder: RunFolder,
    settings: TilingSettings,
    encode: Callable[..., list[SlideFeatures]],
    encoders: dict[str, "TileEncoder"],
    made_by: dict[str, dict[str, Any]],
    suffix: str = ".h5",
    reader: str = "auto",
) -> SlideState:
    """Encode one tiled slide with the encoders that have not, write its feature files, return what to record of it.

    `encoders` and `made_by` are by the folder that the features go to.
    """
    state = folder.read_state(entry.slide_id)
    encoded = state.encoded | made_by
    if not state.row.n_tiles:
        return replace(state, row=replace(state.row, status="empty", error=None), encoded=encoded)
    with Slide(entry.path, reader) as slide:
        opened_by = slide.reader
    planned = read_slide_coords(folder.path("coords", entry.slide_id))
    missing = [name for name in encoders if not folder.is_encoded(state, name, suffix)]
    todo = [encoders[name] for name in missing]
    results = encode(entry.path, todo, coords=planned.coords, assume_mpp=entry.assume_mpp) if todo else []
    for name, result in zip(missing, results, strict=True):
        write_slide_features(
            folder.features_path(name, entry.slide_id, suffix),
            result.features,
            result.coords,
            name=entry.slide_id,
            encoder=result.encoder,
            mpp=settings.mpp,
            tile_size=settings.tile_size,
            overlap=settings.overlap,
            min_tissue=settings.min_tissue,
            encoder_fingerprint=result.encoder_fingerprint,
            patch_size_level0=result.patch_size_level0,
            level0_mpp=planned.level0_mpp,
            level0_width=planned.level0_width,
            level0_height=planned.level0_height,
            more_making=result.more_making,
        )
    return replace(state, row=replace(state.row, status="done", error=None), encoded=encoded, reader=opened_by)


def _status(entries: list[SlideEntry], folder: RunFolder) -> int:
    """The exit status that the main process reports as well."""
    states = [folder.read_state(entry.slide_id) for entry in entries]
    return SOME_FAILED if any(state is None or state.row.status == "failed" for state in states) else DONE


if __name__ == "__main__":
    run(main)
