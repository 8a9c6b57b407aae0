r"""Turn the features of a slide's tiles into slide tokens.

    python stage0_tiling/encode_slides.py --features_dir out/features --slide_encoder gigapath --output_dir out

writes out/slide_features_gigapath/<slide_id>.h5, a feature file like those of the tiles, to train on or to search with.
With --tokens all, out/slide_features_gigapath_all/ holds every tile, seen in its slide. A second run does only what is
missing, or older than its tiles.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from command_line import DONE, SOME_FAILED, make_parser, run
from slide_features import (
    FEATURE_SUFFIXES,
    SlideCoords,
    SlideFeatures,
    raster_order,
    read_slide_coords,
    read_slide_features,
    slide_id_of_features,
    write_slide_features,
)
from stage0_tiling.slide_run import start_logging

if TYPE_CHECKING:
    import torch

TOKENS = ("slide", "layers", "all")

logger = logging.getLogger("stage0_tiling")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    group = parser.add_argument_group("Features")
    group.add_argument("--features_dir", required=True, help="folder of feature files (.h5, .pt or .zarr.zip) of tiles")
    group.add_argument("--output_dir", required=True, help="folder for slide_features_<encoder>/; made when missing")
    group.add_argument("--overwrite", action="store_true", help="make files anew that earlier runs have made")
    group.add_argument("--tile_size", type=int, default=256, help="side of a tile in pixels, for files that don't say")
    group.add_argument("--mpp", type=float, default=0.5, help="um per pixel of the tiles, for files that don't say")
    group = parser.add_argument_group("Slide encoder")
    group.add_argument(
        "--slide_encoder",
        required=True,
        help="mean, max, gigapath (docs/encoders.md), a folder of save_slide_encoder, or a checkpoint of CLAM",
    )
    group.add_argument(
        "--tokens",
        choices=TOKENS,
        default="slide",
        help="slide: the slide tokens; layers: one from each layer of a LongNet; all: every tile, seen in its slide",
    )
    group.add_argument(
        "--mixed_precision",
        choices=["no", "bf16"],
        default=None,
        help="precision of the slide encoder; default: bf16 on a GPU, else no",
    )
    args = parser.parse_args(argv)
    start_logging()

    # Data
    paths = find_features(args.features_dir)

    # Model
    import torch

    from accelerator_setup import runs_on_cpu
    from slide_encoders import check_tokens, load_slide_encoder, slide_fingerprint

    device = torch.device("cpu" if runs_on_cpu() else torch.accelerator.current_accelerator())
    encoder = load_slide_encoder(args.slide_encoder).to(device)
    check_tokens(encoder, args.tokens)
    check_width(encoder, paths)
    fingerprint = slide_fingerprint(encoder)
    folder = output_folder(args.output_dir, encoder.name, args.tokens)

    # Resume
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)
    todo = [path for path in paths if args.overwrite or not is_encoded(path, folder, encoder.name, fingerprint)]
    logger.info("%d slides, %d of them to encode with %s", len(paths), len(todo), encoder.name)

    # Encode
    from stage0_tiling.tile_encoder import choose_dtype

    failed = {}
    dtype = choose_dtype(args.mixed_precision, device)
    with logging_redirect_tqdm():
        for path in tqdm(todo, unit="slide", desc=encoder.name, disable=not todo):
            try:
                tiles = read_tiles(path, args.tile_size, args.mpp)
                result = encode_features(tiles, encoder, tokens=args.tokens, dtype=dtype)
                write_tokens(folder / f"{slide_id_of_features(path)}.h5", result, path)
            except Exception as error:  # one bad file costs itself only
                slide_id = slide_id_of_features(path)
                failed[slide_id] = (str(error) or type(error).__name__).splitlines()[0]
                logger.error("%s failed: %s", slide_id, failed[slide_id])
                logger.debug("%s", path, exc_info=True)
    logger.info("%d done, %d failed; see %s", len(todo) - len(failed), len(failed), folder)
    for slide_id, message in failed.items():
        logger.error("failed: %s: %s", slide_id, message)
    return SOME_FAILED if failed else DONE


def find_features(folder: str) -> list[Path]:
    """Feature files of a folder by slide_id; where one slide has several, as CLAM writes, the .h5."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"--features_dir {folder}: no such folder; stage0_tiling/encode.py makes one")
    by_id = {}
    for suffix in sorted(FEATURE_SUFFIXES, key=lambda name: name == ".h5"):
        files = (file for file in path.glob(f"*{suffix}") if not file.name.startswith("."))
        by_id |= {file.name.removesuffix(suffix): file for file in files}
    if not by_id:
        raise ValueError(f"--features_dir {folder}: no feature file in it; give the folder features/ of encode.py")
    return [by_id[slide_id] for slide_id in sorted(by_id)]


def check_width(encoder: "torch.nn.Module", paths: list[Path]) -> None:
    """Refuse before any work if the first readable file's features are not as wide as the encoder wants them."""
    if encoder.input_width is None:
        return
    for path in paths:
        try:
            first = read_slide_features(path, rows=np.arange(1))
        except (ValueError, OSError):
            continue  # it is reported when its turn comes
        _check_width(encoder, first)
        return


def output_folder(output_dir: str, encoder_name: str, tokens: str) -> Path:
    name = Path(encoder_name).stem if "/" in encoder_name else encoder_name
    suffix = "" if tokens == "slide" else f"_{tokens}"
    return Path(output_dir).expanduser() / f"slide_features_{name}{suffix}"


def is_encoded(path: Path, folder: Path, encoder_name: str, fingerprint: str) -> bool:
    """Whether a slide's tokens are here and not older than its tiles.

    Raises:
        ValueError: if they are of another slide encoder, or of tiles of another encoder.
    """
    made = folder / f"{slide_id_of_features(path)}.h5"
    if not made.is_file() or made.stat().st_mtime < path.stat().st_mtime:
        return False
    try:
        old, tiles = (read_slide_features(file, rows=np.arange(1)) for file in (made, path))
    except (ValueError, OSError):
        return False
    wanted = _names(tiles, encoder_name, fingerprint)
    if (old.encoder, old.encoder_fingerprint) != wanted:
        raise ValueError(
            f"{made.name} in {folder} is of {old.encoder} ({old.encoder_fingerprint}), not of {wanted[0]} "
            f"({wanted[1]}): choose another --output_dir, or make it anew with --overwrite"
        )
    return True


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

    from slide_encoders import slide_fingerprint, tile_cells

    _check_width(encoder, tiles)
    device = next((weights.device for weights in encoder.parameters()), torch.device("cpu"))
    features_BND = torch.from_numpy(tiles.features)[None].to(device)
    cells_BN2 = tile_cells(torch.from_numpy(tiles.coords), tiles.patch_size_level0)[None]
    autocast = nullcontext() if dtype in (None, torch.float32) else torch.autocast(device.type, dtype)
    with torch.inference_mode(), autocast:
        encoded = encoder(features_BND, cells_BN2, tokens=tokens)[0].float().cpu().numpy()
    middle = np.rint(tiles.coords.mean(axis=0, keepdims=True)).astype(np.int64)
    name, fingerprint = _names(tiles, encoder.name, slide_fingerprint(encoder))
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


def _names(tiles: SlideFeatures, encoder_name: str, fingerprint: str) -> tuple[str, str]:
    """What a file of slide tokens states as its encoder and fingerprint: those of the tiles, then of the slide."""
    from encoders import SLIDE_ENCODER_MARK

    name = SLIDE_ENCODER_MARK.join((tiles.encoder or "unknown", encoder_name))
    return name, f"{tiles.encoder_fingerprint or 'unknown'}-{fingerprint}"


def _check_width(encoder: "torch.nn.Module", tiles: SlideFeatures) -> None:
    if encoder.input_width not in (None, tiles.features.shape[1]):
        raise ValueError(
            f"slide encoder {encoder.name} takes features of width {encoder.input_width}, not "
            f"{tiles.features.shape[1]} (of encoder {tiles.encoder or 'unknown'}): encode the tiles with the encoder "
            "that it was trained with"
        )


if __name__ == "__main__":
    run(main)
