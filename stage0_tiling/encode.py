r"""Turn slides into patch tokens: tile what is not tiled, then encode the tiles.

    accelerate launch stage0_tiling/encode.py --slides slides/ --output_dir out --encoder hf-hub:MahmoodLab/UNI2-h

writes out/features/<slide_id>.h5 beside what tile.py writes. Processes share the slides among themselves. A second run
does only what is missing or failed before.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from command_line import DONE, SOME_FAILED, make_parser, run
from slide_features import SlideFeatures, read_slide_coords, write_slide_features
from stage0_tiling.encoding import choose_dtype, encode_slide
from stage0_tiling.plan import TilingSettings
from stage0_tiling.run_table import RunFolder, SlideState
from stage0_tiling.slide import Slide
from stage0_tiling.slide_list import SlideEntry, find_slides
from stage0_tiling.tile import (
    add_tiling_arguments,
    assume_mpp,
    needs_tiling,
    record,
    report,
    start_logging,
    tile_slides,
)

LONGEST_RUN = timedelta(days=30)  # processes wait for the slowest one; the default of 30 minutes would end the run

logger = logging.getLogger("stage0_tiling")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add_tiling_arguments(parser)
    group = parser.add_argument_group("Encoder")
    group.add_argument(
        "--encoder",
        required=True,
        help="a preset (virchow2, uni2-h, ...: docs/encoders.md), a timm name, hf-hub:org/name, or a local folder",
    )
    group.add_argument("--batch_size", type=int, default=64, help="tiles per forward pass and process")
    group.add_argument(
        "--mixed_precision",
        choices=["no", "bf16"],
        default=None,
        help="precision of the encoder; default: bf16 on a GPU, else no",
    )
    args = parser.parse_args(argv)
    start_logging()

    # Data
    settings = TilingSettings(args.tile_size, args.mpp, args.overlap, args.min_tissue)
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: expected at least 1 tile")
    entries = assume_mpp(find_slides(args.slides), args.assume_mpp)
    folder = RunFolder(args.output_dir)

    # Model
    from accelerate import PartialState

    from accelerator_setup import runs_on_cpu
    from encoders import load_encoder

    process = PartialState(cpu=runs_on_cpu(), timeout=LONGEST_RUN)
    encoder = load_encoder(args.encoder).to(process.device)
    advice = encoder.preset and encoder.preset.tiling_advice(tile_size=args.tile_size, mpp=args.mpp)
    if advice and process.is_main_process:
        logger.warning(advice)
    encoded_by = {"encoder": encoder.name, "encoder_fingerprint": encoder.fingerprint()}

    # Resume
    if process.is_main_process:
        if args.overwrite:
            folder.forget(entries)
        folder.remove_leftovers(entries)
    process.wait_for_everyone()
    for entry in entries:
        folder.check_tiling(entry, settings, entry.assume_mpp)
        folder.check_encoder(entry, **encoded_by)
    missing = [entry for entry in entries if needs_encoding(folder, entry)]
    process.wait_for_everyone()  # nobody records a slide before all have seen which ones are missing
    mine = missing[process.process_index :: process.num_processes]
    if process.is_main_process:
        logger.info("%d slides, %d of them to encode with %s", len(entries), len(missing), encoder.name)

    # Tile and encode
    try:
        tile_slides(
            [e for e in mine if needs_tiling(folder, e)],
            folder,
            settings,
            num_workers=args.num_workers,
            reader=args.reader,
            icc=args.icc,
        )
        ready = [entry for entry in mine if folder.is_tiled(folder.read_state(entry.slide_id))]
        encode = partial(
            encode_slide,
            encoder=encoder,
            **asdict(settings),
            batch_size=args.batch_size,
            device=process.device,
            dtype=choose_dtype(args.mixed_precision, process.device),
            num_workers=args.num_workers,
            reader=args.reader,
            icc=args.icc,
        )
        num_tiles = sum(folder.read_state(entry.slide_id).row.n_tiles for entry in ready)
        with (
            logging_redirect_tqdm(),
            tqdm(total=num_tiles, unit="tile", desc=f"encoding {process.process_index}") as bar,
        ):
            for entry in ready:
                work = partial(encode_tiled, entry, folder, settings, partial(encode, on_tiles=bar.update), args.reader)
                record(folder, entry, lambda work=work: replace(work(), **encoded_by))
        process.wait_for_everyone()
    finally:
        if process.is_main_process:
            folder.write_table()
    status = report(entries, folder) if process.is_main_process else _status(entries, folder)
    process.wait_for_everyone()
    process.destroy_process_group()
    return status


def needs_encoding(folder: RunFolder, entry: SlideEntry) -> bool:
    state = folder.read_state(entry.slide_id)
    return not folder.is_tiled(state) or not folder.is_encoded(state) or state.row.status == "failed"


def encode_tiled(
    entry: SlideEntry,
    folder: RunFolder,
    settings: TilingSettings,
    encode: Callable[..., SlideFeatures],
    reader: str = "auto",
) -> SlideState:
    """Encode one tiled slide, write its feature file and return what to record of it, but for the encoder."""
    state = folder.read_state(entry.slide_id)
    if not state.row.n_tiles:
        return replace(state, row=replace(state.row, status="empty", error=None))
    with Slide(entry.path, reader) as slide:
        opened_by = slide.reader
    planned = read_slide_coords(folder.path("coords", entry.slide_id))
    result = encode(entry.path, coords=planned.coords, assume_mpp=entry.assume_mpp, slide_mpp=entry.mpp)
    write_slide_features(
        folder.path("features", entry.slide_id),
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
    )
    return replace(state, row=replace(state.row, status="done", error=None), reader=opened_by)


def _status(entries: list[SlideEntry], folder: RunFolder) -> int:
    """The exit status that the main process reports as well."""
    states = [folder.read_state(entry.slide_id) for entry in entries]
    return SOME_FAILED if any(state is None or state.row.status == "failed" for state in states) else DONE


if __name__ == "__main__":
    run(main)
