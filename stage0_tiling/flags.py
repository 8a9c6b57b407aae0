"""Flags of stage 0 that mean nothing, or not what was hoped for: refused, or told, before any work."""

import logging
import os
from pathlib import Path

from jsonargparse import Namespace

from command_line import check_output_folder

MANY_TILES = 16  # times as many as without overlap

logger = logging.getLogger("stage0_tiling")


def check_tiling_flags(args: Namespace) -> None:
    """Check what add_tiling_arguments adds, but for what `TilingSettings` checks, and warn of very many tiles.

    Raises:
        ValueError, OSError: naming the flag, the value and what would do.
    """
    if args.num_workers < 0:
        raise ValueError(f"--num_workers {args.num_workers}: expected 0 or more threads")
    check_output_folder(args.output_dir)
    if 0 <= args.overlap < args.tile_size:
        times = (args.tile_size / (args.tile_size - args.overlap)) ** 2
        if times >= MANY_TILES:
            logger.warning(
                "--overlap %d of %d px makes %s times as many tiles as none",
                args.overlap,
                args.tile_size,
                f"{times:,.0f}",
            )


def check_encoding_flags(args: Namespace) -> None:
    """Check what add_encoding_arguments and add_machine_arguments add.

    Raises:
        ValueError: naming the flag, the value and what would do.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: expected at least 1 tile")
    for name in args.encoder:
        if not name.strip():
            raise ValueError(f"--encoder {name!r}: name an encoder; docs/encoders.md lists them")
    if args.engine != "ray":
        for flag in ("ray_actors", "ray_address"):
            if value := getattr(args, flag):
                raise ValueError(f"--{flag} {value} is for --engine ray: add that, or leave it out")
    if args.local_cache is not None:
        check_output_folder(args.local_cache, "--local_cache")


def check_readable(path: Path) -> None:
    """Refuse a slide that this user may not read, which readers take for a slide of an unknown kind.

    Raises:
        PermissionError: names the slide and the mend.
    """
    if path.exists() and not os.access(path, os.R_OK):
        raise PermissionError(f"{path.name} may not be read by this user: get access to it (chmod u+r)")
