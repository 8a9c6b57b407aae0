r"""Turn slides into patch tokens: tile what is not tiled, then encode the tiles.

    accelerate launch stage0_tiling/encode.py --slides slides/ --output_dir out --encoder hf-hub:MahmoodLab/UNI2-h

writes out/features/<slide_id>.h5 beside what tile.py writes. Processes, on one machine or many, share the slides of an
output folder among themselves: docs/cluster.md. A second run does only what is missing or failed before.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

from command_line import counted, make_parser, run
from feature_containers import SUFFIXES
from slide_features import worth_saying
from stage0_tiling.encoding import add_encoding_arguments, encode_slide_with
from stage0_tiling.flags import check_encoding_flags, check_tiling_flags
from stage0_tiling.local_cache import GIB, LocalCache
from stage0_tiling.plan import tiling_settings
from stage0_tiling.ray_engine import check_ray, encode_on_ray
from stage0_tiling.run_table import RunFolder
from stage0_tiling.slide_list import find_slides
from stage0_tiling.slide_run import LONGEST_RUN, SlideRun, start_logging
from stage0_tiling.slide_work import encode_tiled, tell_unmeasured, tile_if_missing
from stage0_tiling.stain import read_stain_target
from stage0_tiling.tile import add_tiling_arguments, assume_mpp, write_missing_squares
from stage0_tiling.tissue_sources import tissue_sources

logger = logging.getLogger("stage0_tiling")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add_tiling_arguments(parser)
    add_encoding_arguments(parser)
    add_machine_arguments(parser)
    args = parser.parse_args(argv)
    start_logging()

    # Data
    check_tiling_flags(args)
    check_encoding_flags(args)
    settings, sources = tiling_settings(args), tissue_sources(args)
    stain = {
        "stain_normalizer": args.stain_normalizer,
        "stain_target": read_stain_target(args.stain_normalizer, args.stain_target),
    }
    entries = assume_mpp(find_slides(args.slides), args.assume_mpp)
    folder = RunFolder(args.output_dir, sources.masks)
    cache = make_cache(args.local_cache, args.local_cache_gb)
    if args.engine == "ray":
        check_ray(args.local_cache, args.ray_actors)

    # Model
    from accelerate import PartialState

    from accelerator_setup import runs_on_cpu
    from stage0_tiling.tile_encoder import load_tile_encoders

    process = PartialState(cpu=runs_on_cpu() or args.engine == "ray", timeout=LONGEST_RUN)
    loading = {
        "tile_size": args.tile_size,
        "batch_size": args.batch_size,
        "mixed_precision": args.mixed_precision,
        "compiled": args.compile,
    }
    encoders = load_tile_encoders(args.encoder, process.device, **loading)
    for encoder in encoders.values():
        advice = encoder.preset and encoder.preset.tiling_advice(tile_size=args.tile_size, mpp=args.mpp)
        if advice and process.is_main_process:
            logger.warning(advice)
    made_by = {name: encoder.identity | worth_saying(stain) for name, encoder in encoders.items()}
    suffix = SUFFIXES[args.format]

    # Resume
    if process.is_main_process and args.overwrite:
        folder.forget(entries, settings, made_by)
    process.wait_for_everyone()
    is_missing = partial(folder.needs_encoding, settings=settings, made_by=made_by, suffix=suffix)
    encoding = SlideRun(entries, folder, is_missing, description=f"encoding {process.process_index}", cache=cache)
    folder.begin(settings, made_by)
    process.wait_for_everyone()  # nobody records a slide before all have seen which ones are missing
    if process.is_main_process:
        names = ", ".join(args.encoder)
        logger.info("%s, %d of them to encode with %s", counted(len(entries), "slide"), len(encoding.missing), names)
        if args.quality:
            tell_unmeasured(entries, folder)

    # Tile and encode
    tile = partial(tile_if_missing, folder=folder, settings=settings, reader=args.reader, sources=sources)
    encode = partial(encode_tiled, folder=folder, settings=settings, made_by=made_by, suffix=suffix, reader=args.reader)
    encode_tiles = partial(encode_slide_with, **stain, num_workers=args.num_workers)
    squares = None
    try:
        if args.engine == "ray":
            encode = partial(encode, encode=encode_tiles)
            encode_on_ray(encoding, tile, encode, args.encoder, loading, made_by, args.ray_address, args.ray_actors)
        else:
            encode_tiles = partial(encode_tiles, on_tiles=encoding.progress.tiles)
            with cache or nullcontext():
                encoding.do(
                    tile, partial(encode, encode=encode_tiles, encoders=encoders), num_threads=1 if cache else 2
                )
        process.wait_for_everyone()
        if args.geojson_tiles:
            squares = write_missing_squares(entries, folder, settings, args, process.wait_for_everyone)
    finally:
        if process.is_main_process:
            encoding.write_table()
    status = encoding.report(is_quiet=not process.is_main_process)
    status = max(status, squares.report(is_quiet=True) if squares else 0)
    process.wait_for_everyone()
    process.destroy_process_group()
    return status


def add_machine_arguments(parser) -> None:
    group = parser.add_argument_group("Machine")
    group.add_argument(
        "--local_cache",
        default=None,
        help="folder on a fast local disk, where each slide is copied before it is read, the next one while the "
        "current one is encoded; by default slides are read where they lie",
    )
    group.add_argument(
        "--local_cache_gb",
        type=float,
        default=100.0,
        help="GiB that the copies may take at a time, all processes of this command on the machine together; a slide "
        "that does not fit is read where it lies",
    )
    group.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="ray: on the machines of a Ray cluster"
    )
    group.add_argument(
        "--ray_address",
        default=None,
        help="of a running Ray cluster, host:port; default: RAY_ADDRESS, else one that runs on this machine, else one "
        "is started",
    )
    group.add_argument(
        "--ray_actors",
        type=int,
        default=0,
        help="processes of the Ray cluster that encode; 0: one per GPU, or per two CPUs where there is no GPU",
    )


def make_cache(folder: str | None, gib: float) -> LocalCache | None:
    """The cache of this process: an equal share of what the processes of the command may take on this machine."""
    if not gib > 0:
        raise ValueError(f"--local_cache_gb {gib:g}: expected more than 0")
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return LocalCache(folder, int(gib * GIB / num_processes)) if folder else None


if __name__ == "__main__":
    run(main)
