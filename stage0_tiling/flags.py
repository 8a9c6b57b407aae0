"""Flags of stage 0 that mean nothing, or not what was hoped for: refused, or told, before any work."""

import logging
import os
from pathlib import Path

from jsonargparse import Namespace

MANY_TILES = 16  # times as many as without overlap

logger = logging.getLogger("stage0_tiling")


def check_tiling_flags(args: Namespace) -> None:
    """Check what add_tiling_arguments adds, but for what `TilingSettings` checks, and warn of very many tiles.

    Raises:
        ValueError, OSError: naming the flag, the value and what would do.
    """
    if args.num_workers < 0:
        raise ValueError(f"--num_workers {args.num_workers}: expected 0 or more threads")
    check_folder("--output_dir", args.output_dir)
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
        check_folder("--local_cache", args.local_cache)


def check_folder(flag: str, folder: str) -> None:
    """Refuse a folder that cannot be made or written to.

    Raises:
        ValueError, OSError: naming the flag, the folder and what would do.
    """
    if not folder.strip():
        raise ValueError(f"{flag} {folder!r}: name a folder")
    path = Path(folder).expanduser().absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{flag} {folder}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{flag} {folder}: {existing} may not be written to; name another folder, or get access")


def check_readable(path: Path) -> None:
    """Refuse a slide that this user may not read, which readers take for a slide of an unknown kind.

    Raises:
        PermissionError: names the slide and the mend.
    """
    if path.exists() and not os.access(path, os.R_OK):
        raise PermissionError(f"{path.name} may not be read by this user: get access to it (chmod u+r)")
