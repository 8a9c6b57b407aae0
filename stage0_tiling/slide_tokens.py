"""Slide tokens of one slide: features of its tiles in, those of the slide encoder out, and the file that holds them."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slide_features import (
    SlideCoords,
    SlideFeatures,
    raster_order,
    read_slide_coords,
    read_slide_features,
    slide_id_of_features,
    write_slide_features,
)

if TYPE_CHECKING:
    import torch

TOKENS = ("slide", "layers", "all")


def read_tiles(path: Path, tile_size: int, mpp: float) -> SlideFeatures:
    """Features of a slide's tiles in raster order; what the file does not say of its tiles is filled in."""
    tiles = read_slide_features(path)
    order = raster_order(tiles.coords)
    tiles = replace(tiles, features=tiles.features[order], coords=tiles.coords[order])
    return replace(
        tiles,
        tile_size=tiles.tile_size or tile_size,
        mpp=tiles.mpp or mpp,
        overlap=tiles.overlap or 0,
        patch_size_level0=tiles.patch_size_level0 or tile_pitch(tiles.coords) or tiles.tile_size or tile_size,
    )


def tile_pitch(coords: np.ndarray) -> int | None:
    """Least distance of neighbouring columns or rows of tiles in level-0 pixels; None if there is only one tile."""
    steps = [np.diff(np.unique(coords[:, axis])) for axis in (0, 1)]
    return min((int(step.min()) for step in steps if len(step)), default=None)


def encode_features(
    tiles: SlideFeatures, encoder: "torch.nn.Module", *, tokens: str = "slide", dtype: "torch.dtype | None" = None
) -> SlideFeatures:
    """Encode the tiles of one slide, which must be in raster order.

    Args:
        tiles: as `read_tiles` gives them; `patch_size_level0` is known.
        encoder: of `slide_encoders.load_slide_encoder`, on the device to use.
        tokens: `slide`, `layers` or `all`.
        dtype: precision (autocast); None means float32.

    Returns:
        features (K, E) float32, or (N, E) float16 for `all`; coords in level-0 pixels, of slide tokens the middle of
        the tiles. `encoder` names both encoders.

    Raises:
        ValueError: if the features are not as wide as the encoder wants them.
    """
    import torch

    from slide_encoders import tile_cells

    check_width(encoder, tiles)
    device = next((weights.device for weights in encoder.parameters()), torch.device("cpu"))
    features_BND = torch.from_numpy(tiles.features)[None].to(device)
    cells_BN2 = tile_cells(torch.from_numpy(tiles.coords), tiles.patch_size_level0)[None]
    autocast = nullcontext() if dtype in (None, torch.float32) else torch.autocast(device.type, dtype)
    with torch.inference_mode(), autocast:
        encoded = encoder(features_BND, cells_BN2, tokens=tokens)[0].float().cpu().numpy()
    middle = np.rint(tiles.coords.mean(axis=0, keepdims=True)).astype(np.int64)
    name, fingerprint = stated_encoder(tiles.encoder, tiles.encoder_fingerprint, encoder, tokens)
    return replace(
        tiles,
        features=encoded.astype(np.float16) if tokens == "all" else encoded,
        coords=tiles.coords if tokens == "all" else middle.repeat(len(encoded), axis=0),
        encoder=name,
        encoder_fingerprint=fingerprint,
    )


def write_tokens(path: Path, tokens: SlideFeatures, source: Path) -> None:
    """Write a feature file of slide tokens, with what the file of the tiles says of the slide."""
    about = _stated_coords(source)
    write_slide_features(
        path,
        tokens.features,
        tokens.coords,
        name=slide_id_of_features(path),
        encoder=tokens.encoder,
        mpp=tokens.mpp,
        tile_size=tokens.tile_size,
        overlap=tokens.overlap,
        patch_size_level0=tokens.patch_size_level0,
        min_tissue=tokens.min_tissue,
        encoder_fingerprint=tokens.encoder_fingerprint,
        more_making=tokens.more_making,
        level0_mpp=about.level0_mpp,
        level0_width=about.level0_width,
        level0_height=about.level0_height,
    )


def _stated_coords(source: Path) -> SlideCoords:
    try:
        return read_slide_coords(source)
    except ValueError:  # features alone, as in CLAM's .pt
        return SlideCoords(np.empty((0, 2), dtype=np.int64))


def stated_encoder(
    tile_encoder: str | None, tile_fingerprint: str | None, encoder: "torch.nn.Module", tokens: str
) -> tuple[str, str]:
    """What a file of slide tokens states as its encoder and fingerprint: those of the tiles, then of the slide.

    Tokens other than `slide` are named too, so that nothing mixes them and a new slide is given the same.
    """
    from encoders import SLIDE_ENCODER_MARK
    from slide_encoders import slide_fingerprint

    name = encoder.name if tokens == "slide" else f"{encoder.name}:{tokens}"
    fingerprint = f"{tile_fingerprint or 'unknown'}-{slide_fingerprint(encoder)}"
    return SLIDE_ENCODER_MARK.join((tile_encoder or "unknown", name)), fingerprint


def encoders_named(name: str) -> tuple[str, str | None, str]:
    """Tile encoder, slide encoder and tokens of a name that `stated_encoder` gave; None of one for tiles alone."""
    from encoders import SLIDE_ENCODER_MARK

    tile_encoder, mark, slide_encoder = name.rpartition(SLIDE_ENCODER_MARK)
    if not mark or Path(name).is_dir():
        return name, None, "slide"
    of, _, tokens = slide_encoder.rpartition(":")
    return (tile_encoder, of, tokens) if tokens in TOKENS else (tile_encoder, slide_encoder, "slide")


def check_width(encoder: "torch.nn.Module", tiles: SlideFeatures) -> None:
    """Raise ValueError if the features of tiles are not as wide as the slide encoder wants them."""
    if encoder.input_width not in (None, tiles.features.shape[1]):
        raise ValueError(
            f"slide encoder {encoder.name} takes features of width {encoder.input_width}, not "
            f"{tiles.features.shape[1]} (of encoder {tiles.encoder or 'unknown'}): encode the tiles with the encoder "
            "that it was trained with"
        )
