"""Tiles of a slide to patch tokens: what encode.py does with every slide, and inference with a new one."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slide_features import SlideFeatures
from stage0_tiling.plan import TilingSettings, plan_tiles
from stage0_tiling.slide import Slide, SlideError
from stage0_tiling.tissue import Grid, make_grid

if TYPE_CHECKING:
    import torch

    from encoders import ImageEncoder


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
    icc: bool = False,
    slide_mpp: float | None = None,
    coords: np.ndarray | None = None,
    on_tiles: Callable[[int], object] | None = None,
) -> SlideFeatures:
    """Turn one slide into patch tokens.

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
        icc: convert pixels to sRGB by the slide's ICC profile.
        slide_mpp: um per level-0 pixel, whatever the slide states.
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
    with Slide(path, reader, icc=icc, mpp=slide_mpp) as slide:
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
