r"""Turn the features of a slide's tiles into slide tokens.

    python stage0_tiling/encode_slides.py --features_dir out/features --slide_encoder gigapath --output_dir out

writes out/slide_features_gigapath/<slide_id>.h5, a feature file like those of the tiles, to train on or to search with.
With --tokens all, out/slide_features_gigapath_all/ holds every tile, seen in its slide. Processes that `accelerate
launch` starts share the slides, and several commands may run on one folder. A second run does only what is missing, or
older than its tiles.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from command_line import DONE, SOME_FAILED, check_output_folder, counted, first_line, make_parser, run
from slide_features import FEATURE_SUFFIXES, read_slide_features, slide_id_of_features
from stage0_tiling.claims import Claims
from stage0_tiling.folder_settings import check_same_features, read_settings, record_settings
from stage0_tiling.full_disk import DiskFull, is_full, is_still_full
from stage0_tiling.run_table import MAX_DEATHS
from stage0_tiling.slide_run import LONGEST_RUN, ProcessDied, start_logging, terminating_as_interrupt
from stage0_tiling.slide_tokens import TOKENS, check_width, encode_features, read_tiles, stated_encoder, write_tokens

if TYPE_CHECKING:
    import torch

MEND = "choose another --output_dir, or make it anew with --overwrite"

logger = logging.getLogger("stage0_tiling")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    start_logging()

    # Data
    check_output_folder(args.output_dir)
    paths = find_features(args.features_dir)

    # Model
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from accelerator_setup import runs_on_cpu
    from slide_encoders import check_tokens, load_slide_encoder, slide_fingerprint
    from stage0_tiling.tile_encoder import choose_dtype

    process = PartialState(cpu=runs_on_cpu(), timeout=LONGEST_RUN)
    encoder = load_slide_encoder(args.slide_encoder).to(process.device)
    check_tokens(encoder, args.tokens)
    check_first_width(encoder, paths)
    dtype = choose_dtype(args.mixed_precision, process.device)
    folder = output_folder(args.output_dir, encoder.name, args.tokens)
    claims = Claims(folder.parent / "claims" / folder.name)

    # Resume
    record = folder.parent / "settings" / f"{folder.name}.json"
    made_by = {"encoder": encoder.name, "fingerprint": slide_fingerprint(encoder)}
    if args.overwrite and process.is_main_process:
        forget(paths, folder, claims, record, made_by)
    process.wait_for_everyone()
    is_done = partial(is_encoded, folder=folder, encoder=encoder, tokens=args.tokens)
    todo = [path for path in paths if not is_done(path)]
    check_same_features(folder, record_settings(record, made_by), made_by, MEND)
    process.wait_for_everyone()  # nobody writes a file before all have seen which ones are missing
    if process.is_main_process:
        logger.info("%s, %d of them to encode with %s", counted(len(paths), "slide"), len(todo), encoder.name)

    # Encode
    failed, num_done, is_stopped = {}, 0, False
    mine = todo[process.process_index :: process.num_processes]
    leftovers = half_written(folder)
    progress = tqdm(total=len(mine), unit="slide", desc=encoder.name, disable=not mine)
    with logging_redirect_tqdm(), terminating_as_interrupt(), claims, progress:
        for path, deaths in take(mine, claims, is_done, leftovers, progress):
            slide_id = slide_id_of_features(path)
            try:
                if deaths >= MAX_DEATHS:
                    raise ProcessDied(deaths)
                result = encode_features(
                    read_tiles(path, args.tile_size, args.mpp), encoder, tokens=args.tokens, dtype=dtype
                )
                write_tokens(folder / f"{slide_id}.h5", result, path)
                num_done += 1
            except Exception as error:  # one bad file costs itself only
                is_stopped = is_full(error) and is_still_full(folder.parent, error)
                failed[slide_id] = first_line(DiskFull(folder) if is_full(error) else error)
                logger.error("%s failed: %s", slide_id, failed[slide_id])
                logger.debug("%s", path, exc_info=True)
                if is_stopped:
                    break
    found = gather_object([(num_done, failed, is_stopped)])
    process.destroy_process_group()
    num_done = sum(number for number, _, _ in found)
    failed = {slide_id: message for _, messages, _ in found for slide_id, message in messages.items()}
    if process.is_main_process:
        report(num_done, failed, len(todo), folder, is_stopped=any(stopped for _, _, stopped in found))
    return SOME_FAILED if failed else DONE


def report(num_done: int, failed: dict[str, str], num_todo: int, folder: Path, *, is_stopped: bool) -> None:
    """Log what became of the slides of all processes, and why some failed."""
    elsewhere = num_todo - num_done - len(failed)
    told = f", {elsewhere} {'not done' if is_stopped else 'done or in work elsewhere'}" if elsewhere else ""
    logger.info("%d done, %d failed%s; see %s", num_done, len(failed), told, folder)
    for slide_id, message in sorted(failed.items()):
        logger.error("failed: %s: %s", slide_id, message)


def add_arguments(parser) -> None:
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


def check_first_width(encoder: "torch.nn.Module", paths: list[Path]) -> None:
    """Refuse before any work if the first readable file's features are not as wide as the encoder wants them."""
    if encoder.input_width is None:
        return
    for path in paths:
        try:
            first = read_slide_features(path, rows=np.arange(1))
        except (ValueError, OSError):
            continue  # it is reported when its turn comes
        check_width(encoder, first)
        return


def output_folder(output_dir: str, encoder_name: str, tokens: str) -> Path:
    name = Path(encoder_name).stem if "/" in encoder_name else encoder_name
    suffix = "" if tokens == "slide" else f"_{tokens}"
    return Path(output_dir).expanduser() / f"slide_features_{name}{suffix}"


def is_encoded(path: Path, *, folder: Path, encoder: "torch.nn.Module", tokens: str) -> bool:
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
    wanted = stated_encoder(tiles.encoder, tiles.encoder_fingerprint, encoder, tokens)
    if (old.encoder, old.encoder_fingerprint) != wanted:
        raise ValueError(
            f"{made.name} in {folder} is of {old.encoder} ({old.encoder_fingerprint}), not of {wanted[0]} "
            f"({wanted[1]}): {MEND}"
        )
    return True


def forget(paths: list[Path], folder: Path, claims: Claims, record: Path, made_by: dict[str, str]) -> None:
    """Delete what earlier runs made of these slides, for --overwrite, and the record where no others stay.

    Raises:
        ValueError: if one of them is in work, or others stay that are of another slide encoder.
    """
    ids = {slide_id_of_features(path): path for path in paths}
    others_stay = any(made.name.removesuffix(".h5") not in ids for made in folder.glob("*.h5"))
    if others_stay:
        check_same_features(folder, read_settings(record) or made_by, made_by, "choose another --output_dir")
    for slide_id in ids:
        if owner := claims.owner(slide_id):
            raise ValueError(f"--overwrite: {slide_id} is in work ({owner}): wait for it, or stop it")
    for slide_id in ids:
        (folder / f"{slide_id}.h5").unlink(missing_ok=True)
        claims.forget(slide_id)
    if not others_stay:
        record.unlink(missing_ok=True)


def take(
    paths: list[Path],
    claims: Claims,
    is_done: Callable[[Path], bool],
    leftovers: dict[str, list[Path]],
    progress: tqdm,
) -> Iterator[tuple[Path, int]]:
    """Claim slide after slide that no other process has done or has in work, those at which one died last.

    Yields:
        The slide's features, and how many processes have died at it. It is settled when the next one is asked for.
    """
    for after_deaths in (False, True):
        left = []
        for path in paths:
            slide_id = slide_id_of_features(path)
            claim = claims.take(slide_id, after_deaths=after_deaths)
            if claim is None:
                left.append(path)
                continue
            for leftover in leftovers.get(slide_id, ()):  # nobody else is writing files of a claimed slide
                leftover.unlink(missing_ok=True)
            if not is_done(path):
                yield path, claim.deaths
            claims.settle(claim)
            progress.update()
        paths = left


def half_written(folder: Path) -> dict[str, list[Path]]:
    """Files that a process was killed at, or is writing now, by slide."""
    found = defaultdict(list)
    for leftover in folder.glob(".*.partial"):
        name = leftover.name[1:].removesuffix(".partial").rpartition(".")[0]
        found[name.removesuffix(".h5")].append(leftover)
    return found


if __name__ == "__main__":
    run(main)
