r"""Turn slides into patch tokens: tile what is not tiled, then encode the tiles.

    accelerate launch stage0_tiling/encode.py --slides slides/ --output_dir out --encoder hf-hub:MahmoodLab/UNI2-h

writes out/features/<slide_id>.h5 beside what tile.py writes. Processes share the slides among themselves. A second run
does only what is missing or failed before.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from command_line import DONE, SOME_FAILED, make_parser, run
from slide_features import SlideFeatures, read_slide_coords, write_slide_features
from stage0_tiling.plan import TilingSettings, plan_tiles
from stage0_tiling.run_table import RunFolder, SlideState
from stage0_tiling.slide import Slide, SlideError
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
from stage0_tiling.tissue import Grid, make_grid

if TYPE_CHECKING:
    import torch

    from encoders import ImageEncoder

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


def encode_slide(
    path: str | Path,
    encoder: "ImageEncoder",
    *,
    tile_size: int = 256,
    mpp: float = 0.5,
    overlap: int = 0,
    min_tissue: float = 0.1,
    assume_mpp: float | None = None,
    batch_size: int = 64,
    device: "torch.device | str | None" = None,
    dtype: "torch.dtype | None" = None,
    num_workers: int = 4,
    reader: str = "auto",
    coords: np.ndarray | None = None,
    on_tiles: Callable[[int], object] | None = None,
) -> SlideFeatures:
    """Turn one slide into patch tokens: what encode.py does with every slide, and inference with a new one.

    Args:
        path: a slide or plain image.
        encoder: an image encoder, on `device`.
        tile_size: side of a tile in pixels at `mpp`.
        mpp: um per pixel of a tile.
        overlap: pixels at `mpp` that neighbouring tiles share.
        min_tissue: least fraction of a tile that is tissue.
        assume_mpp: um per level-0 pixel where the slide states none, or an implausible one.
        batch_size: tiles per forward pass.
        device: where the encoder runs; None means where its weights are.
        dtype: precision of the forward pass (autocast); None means bfloat16 on a GPU, else float32.
        num_workers: threads that read tiles; memory is bounded by 2 * num_workers + 1 batches, and 128 MiB more.
        reader: `auto`, `openslide` or `tiff`, see `Slide`.
        coords: (N, 2) positions of tiles that were planned with the same settings; None finds them.
        on_tiles: called with the number of tiles after each batch.

    Returns:
        features (N, D) float16, coords (N, 2) int64 in level-0 pixels, and what they were made with.

    Raises:
        SlideError: if the slide cannot be used, or no tile holds enough tissue.
    """
    import torch

    settings = TilingSettings(tile_size, mpp, overlap, min_tissue)
    device = torch.device(device) if device is not None else next(encoder.parameters()).device
    dtype = dtype or choose_dtype(None, device)
    with Slide(path, reader) as slide:
        if coords is None:
            coords = plan_tiles(slide, settings, assume_mpp).coords
        if len(coords) == 0:
            raise SlideError(f"{slide.path.name}: no tile holds {min_tissue:g} tissue; try a lower --min_tissue")
        grid = make_grid(tile_size, overlap, mpp, slide.pixel_size(assume_mpp))
        read = partial(read_tiles, slide, grid=grid, tile_size=tile_size, transform=encoder.transform)
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
        features = []
        with torch.inference_mode(), autocast:
            for pixels in _ahead(read, np.split(coords, range(batch_size, len(coords), batch_size)), num_workers):
                pixels = pixels.pin_memory() if device.type == "cuda" else pixels
                features.append(encoder.encode_tiles(pixels.to(device, non_blocking=True)).to(torch.float16))
                if on_tiles is not None:
                    on_tiles(len(pixels))
        features_ND = torch.cat(features).cpu().numpy()
    return SlideFeatures(
        features_ND,
        coords,
        mpp=mpp,
        encoder=encoder.name,
        tile_size=tile_size,
        patch_size_level0=grid.tile_width,
        overlap=overlap,
        min_tissue=min_tissue,
        encoder_fingerprint=encoder.fingerprint(),
    )


def read_tiles(
    slide: Slide, coords: np.ndarray, *, grid: Grid, tile_size: int, transform: "Callable[..., torch.Tensor]"
) -> "torch.Tensor":
    """Read tiles at (B, 2) level-0 positions as a batch of the encoder's input, (B, 3, H, W) float32."""
    import torch
    from PIL import Image

    size = (tile_size, tile_size)
    tiles = (slide.read_region(x, y, grid.tile_width, grid.tile_height, size) for x, y in coords.tolist())
    return torch.stack([transform(Image.fromarray(tile)) for tile in tiles])


def choose_dtype(mixed_precision: str | None, device: "torch.device") -> "torch.dtype":
    """Precision of the forward pass: as asked, else bfloat16 on a GPU and float32 elsewhere."""
    import torch

    if mixed_precision is None:
        mixed_precision = "bf16" if device.type == "cuda" else "no"
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


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
    result = encode(entry.path, coords=planned.coords, assume_mpp=entry.assume_mpp)
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


def _ahead(read: Callable, chunks: list[np.ndarray], num_workers: int) -> "Iterator[torch.Tensor]":
    """Yield `read(chunk)` in order, a few chunks ahead in threads: OpenSlide and the decoders release the GIL."""
    import torch

    num_workers = max(1, num_workers)
    # one thread each for small tensor work: the pool is the parallelism
    executor = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        jobs = deque()
        for chunk in chunks:
            jobs.append(executor.submit(read, chunk))
            if len(jobs) > 2 * num_workers:
                yield jobs.popleft().result()
        while jobs:
            yield jobs.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _status(entries: list[SlideEntry], folder: RunFolder) -> int:
    """The exit status that the main process reports as well."""
    states = [folder.read_state(entry.slide_id) for entry in entries]
    return SOME_FAILED if any(state is None or state.row.status == "failed" for state in states) else DONE


if __name__ == "__main__":
    run(main)
