"""Tiles of a slide to patch tokens: what encode.py does with every slide, and inference with a new one."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slide_features import SUFFIXES, SlideFeatures, choose_patches, worth_saying
from stage0_tiling.plan import TilingSettings, plan_tiles, why_empty
from stage0_tiling.slide import Slide, SlideError
from stage0_tiling.stain import NORMALIZERS, SAMPLE_TILES, Normalize, StainError, fit_stains
from stage0_tiling.tissue import Grid, make_grid
from stage0_tiling.tissue_sources import TissueSources

if TYPE_CHECKING:
    import torch

    from image_encoder import ImageEncoder
    from stage0_tiling.tile_encoder import TileEncoder

logger = logging.getLogger("stage0_tiling")


def add_encoding_arguments(parser) -> None:
    group = parser.add_argument_group("Encoder")
    group.add_argument(
        "--encoder",
        nargs="+",
        required=True,
        help="a preset (virchow2, uni2-h, ...: docs/encoders.md), a timm name, hf-hub:org/name, or a local folder; "
        "several read every tile once and write to features_<short name>/ each, one alone to features/",
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=64,
        help="tiles per forward pass and process; halved where a batch does not fit the memory",
    )
    group.add_argument(
        "--mixed_precision",
        choices=["no", "bf16"],
        default=None,
        help="precision of the encoder; default: bf16 on a GPU, else no",
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the encoders: a minute or more first, then faster"
    )
    group.add_argument(
        "--format",
        choices=list(SUFFIXES),
        default="h5",
        help="of feature files: HDF5, a bare PyTorch tensor as CLAM's pt_files, or a zarr archive",
    )
    group.add_argument(
        "--stain_normalizer",
        choices=NORMALIZERS,
        default="none",
        help="give the tiles of every slide the same colours before they are encoded; estimated once per slide",
    )
    group.add_argument(
        "--stain_target",
        default=None,
        help="picture of tissue with the wanted colours; default: torchstain's reference, for macenko only",
    )


def encode_slide(
    path: str | Path,
    encoder: "ImageEncoder",
    *,
    assume_mpp: float | None = None,
    batch_size: int = 64,
    device: "torch.device | str | None" = None,
    dtype: "torch.dtype | None" = None,
    stain_normalizer: str = "none",
    stain_target: str = "",
    num_workers: int = 4,
    reader: str = "auto",
    slide_mpp: float | None = None,
    coords: np.ndarray | None = None,
    sources: TissueSources | None = None,
    on_tiles: Callable[[int], object] | None = None,
    **tiling: Any,
) -> SlideFeatures:
    """Turn one slide into patch tokens.

    Args:
        path: a slide or plain image.
        encoder: an image encoder, on `device`.
        assume_mpp: um per level-0 pixel where the slide states none, or an implausible one.
        batch_size: tiles per forward pass; halved where that does not fit the memory.
        device: where the encoder runs; None means where its weights are.
        dtype: precision of the forward pass (autocast); None means bfloat16 on a GPU, else float32.
        stain_normalizer: one of `stain.NORMALIZERS`.
        stain_target: what `stain.read_stain_target` says of the wanted colours.
        num_workers: threads that read tiles; memory is bounded by 2 * num_workers + 2 batches, and 128 MiB more.
        reader: `auto`, `openslide` or `tiff`, see `Slide`.
        slide_mpp: um per level-0 pixel, whatever the slide states.
        coords: (N, 2) positions of tiles that were planned with the same settings; None finds them.
        sources: files that their tissue is found with; needed where `tiling` names a segmenter.
        on_tiles: called with the number of tiles after each batch.
        tiling: fields of `TilingSettings`: tile_size, mpp, overlap, min_tissue, ...

    Returns:
        features (N, D) float16, coords (N, 2) int64 in level-0 pixels, and what they were made with.

    Raises:
        SlideError: if the slide cannot be used, or no tile holds enough tissue.
        ValueError: if the tissue is to be found by a segmenter that is not given.
    """
    from stage0_tiling.tile_encoder import TileEncoder

    settings = TilingSettings(**tiling)
    sources = sources or TissueSources()
    if coords is None:
        sources.check_segmenter(settings.segmenter)
    encoder = encoder if device is None else encoder.to(device)
    through = TileEncoder(encoder, tile_size=settings.tile_size, batch_size=batch_size, dtype=dtype)
    with Slide(path, reader, icc=settings.icc, mpp=slide_mpp) as slide:
        if coords is None:
            plan = plan_tiles(slide, settings, assume_mpp, sources)
            if len(plan.coords) == 0:
                raise SlideError(f"{slide.path.name}: {why_empty(plan, settings)}")
            coords = plan.coords
        (features,) = encode_slide_with(
            slide,
            [through],
            settings,
            coords,
            assume_mpp=assume_mpp,
            stain_normalizer=stain_normalizer,
            stain_target=stain_target,
            num_workers=num_workers,
            on_tiles=on_tiles,
        )
    return features


def encode_slide_with(
    slide: Slide,
    encoders: "Sequence[TileEncoder]",
    settings: TilingSettings,
    coords: np.ndarray,
    *,
    assume_mpp: float | None = None,
    stain_normalizer: str = "none",
    stain_target: str = "",
    num_workers: int = 4,
    on_tiles: Callable[[int], object] | None = None,
) -> list[SlideFeatures]:
    """Turn tiles of an open slide into patch tokens of several encoders, reading each once; else as `encode_slide`.

    Where the stains of the slide cannot be estimated, its tiles stay as they are, and what is returned says so.

    Raises:
        SlideError: if the slide cannot be read.
    """
    grid = make_grid(settings.tile_size, settings.overlap, settings.mpp, slide.pixel_size(assume_mpp))
    read = partial(read_tiles, slide, grid=grid, tile_size=settings.tile_size)
    normalize = _fit_stains(slide.path.name, stain_normalizer, stain_target, read, coords)
    features = _encode(encoders, partial(_prepare, read, normalize, encoders), coords, num_workers, on_tiles)
    stains = {"stain_normalizer": stain_normalizer, "stain_target": stain_target}
    if normalize is None:  # what was done, not what was asked for
        stains = {"stain_normalizer": "none", "stain_target": ""}
    making = worth_saying(asdict(settings) | stains)
    own = {name: making.pop(name) for name in list(making) if name in SlideFeatures.__dataclass_fields__}
    return [
        SlideFeatures(
            features_ND,
            coords,
            encoder=encoder.name,
            encoder_fingerprint=encoder.fingerprint,
            patch_size_level0=grid.tile_width,
            more_making=making,
            **own,
        )
        for encoder, features_ND in zip(encoders, features, strict=True)
    ]


def read_tiles(slide: Slide, coords: np.ndarray, out: np.ndarray, *, grid: Grid, tile_size: int) -> None:
    """Read tiles at (B, 2) level-0 positions into `out`, (B, tile_size, tile_size, 3) uint8 RGB."""
    slide.read_tiles(coords, grid.tile_width, grid.tile_height, (tile_size, tile_size), out)


def _prepare(
    read: Callable, normalize: Normalize | None, encoders: "Sequence[TileEncoder]", coords: np.ndarray
) -> "list[torch.Tensor]":
    """Read tiles and make each encoder's input of them; runs in the threads."""
    import torch

    shape = (len(coords), read.keywords["tile_size"], read.keywords["tile_size"], 3)
    tiles = torch.empty(shape, dtype=torch.uint8, pin_memory=any(e.device.type == "cuda" for e in encoders))
    read(coords, tiles.numpy())
    if normalize is not None:
        for tile in tiles.numpy():
            tile[:] = normalize(tile)
    return [encoder.prepare(tiles) for encoder in encoders]


def _encode(
    encoders: "Sequence[TileEncoder]",
    prepare: Callable,
    coords: np.ndarray,
    num_workers: int,
    on_tiles: Callable[[int], object] | None,
) -> list[np.ndarray]:
    """(N, D) float16 of each encoder."""
    features = [np.empty((len(coords), encoder.width), np.float16) for encoder in encoders]
    batch_size = max(encoder.batch_size for encoder in encoders)
    chunks = np.split(coords, range(batch_size, len(coords), batch_size))
    done, on_device = 0, deque()
    for inputs in _ahead(prepare, chunks, num_workers):
        start, done = done, done + len(inputs[0])
        on_device.append((start, done, [e.encode(pixels) for e, pixels in zip(encoders, inputs, strict=True)]))
        if len(on_device) > 1:  # a batch later, so that a GPU never waits for us to fetch what it has just made
            _fetch(features, *on_device.popleft())
        if on_tiles is not None:
            on_tiles(done - start)
    _fetch(features, *on_device.popleft())
    return features


def _fetch(features: list[np.ndarray], start: int, end: int, batch: "list[torch.Tensor]") -> None:
    for features_ND, tokens in zip(features, batch, strict=True):
        features_ND[start:end] = tokens.cpu().numpy()


def _fit_stains(name: str, method: str, target: str, read: Callable, coords: np.ndarray) -> Normalize | None:
    """What normalises the tiles of a slide; None, with a warning, where its stains cannot be estimated."""
    if method == "none":
        return None
    chosen = coords[choose_patches(len(coords), SAMPLE_TILES)]
    side = read.keywords["tile_size"]
    tiles = np.empty((len(chosen), side, side, 3), np.uint8)
    read(chosen, tiles)
    try:
        return fit_stains(method, target, tiles)
    except StainError as error:
        logger.warning("%s: %s; its %d tiles stay as they are", name, error, len(coords))
        return None


def _ahead(read: Callable, chunks: list[np.ndarray], num_workers: int) -> "Iterator[list[torch.Tensor]]":
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
