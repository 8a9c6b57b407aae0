"""What the results in one output folder are made with, as whoever wrote there first has recorded it.

    OUT/settings/tiling.json              how slides are cut
    OUT/settings/<features folder>.json   what makes the features in it

A record appears whole and only once, so that of two runs with different settings that begin together on an empty folder
one is refused, though neither finds a slide of the other's.
"""

import errno
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ALWAYS_KNOWN = ("tile_size", "mpp")  # of every version
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # of file systems without hard links


def record_settings(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Record settings where none are yet.

    Args:
        path: of the record; its folder is made when missing.
        settings: as JSON can hold them.

    Returns:
        Those that stand: what the first process recorded, which may have been another one.

    Raises:
        ValueError: if the record that stands is not readable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(json.dumps(dict(settings), indent=1))
        try:
            os.link(partial, path)  # unlike a rename, fails where there is one
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            _create(path, partial.read_bytes())
    finally:
        partial.unlink(missing_ok=True)
    return read_settings(path) or dict(settings)


def read_settings(path: Path) -> dict[str, Any] | None:
    """Read a record; None if there is none.

    Raises:
        ValueError: if it is not readable.
    """
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"{path} is not readable ({error}): delete it, and the same command records it anew"
        ) from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not settings: delete it")
    if not stored:
        raise ValueError(f"{path} holds no settings: delete it, and the same command records them anew")
    return stored


def check_same_tiling(whose: str, had: Mapping[str, Any], wanted: Mapping[str, Any], mend: str) -> None:
    """Refuse tiles of other settings.

    Args:
        whose: what was tiled, for the message.
        had: fields of `TilingSettings`, or as many as an earlier version knew.
        wanted: the same.
        mend: what would do.

    Raises:
        ValueError: naming the flags that differ.
    """
    if missing := [key for key in ALWAYS_KNOWN if key not in had]:
        raise ValueError(f"{whose} tiled with settings of which the record lacks {', '.join(missing)}: {mend}")
    differing = [key for key in wanted if key in had and had[key] != wanted[key]]
    if differing:
        raise ValueError(f"{whose} tiled {_difference(differing, had, wanted)}: {mend}")


def check_same_features(where: Path, had: Mapping[str, Any], made_by: Mapping[str, Any], mend: str) -> None:
    """Refuse features of another encoder, or of tiles treated differently; arguments as of `check_same_tiling`.

    Raises:
        ValueError: naming what differs.
    """
    if had.get("encoder") != made_by["encoder"]:
        raise ValueError(f"{where} holds features of encoder {had.get('encoder')}, not {made_by['encoder']}: {mend}")
    if had.get("fingerprint") != made_by["fingerprint"]:
        raise ValueError(f"{where} holds features of encoder {had['encoder']} with other weights: {mend}")
    for name in sorted(had.keys() | made_by.keys()):
        if had.get(name) != made_by.get(name):
            raise ValueError(f"{where} holds features made {_difference([name], had, made_by)}: {mend}")


def _difference(names: list[str], had: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What settings were and are not, as the flags that a user types."""
    was, now = _flags(names, had), _flags(names, wanted)
    return f"{was}, not {now.removeprefix('with ') if was.startswith('with ') else now}"


def _flags(names: list[str], made: Mapping[str, Any]) -> str:
    given = [name for name in names if made.get(name) is not None and made[name] is not False]
    told = ", ".join(f"--{name}" if made[name] is True else f"--{name} {made[name]}" for name in given)
    lacking = ", ".join(f"--{name}" for name in names if name not in given)
    return " and ".join(part for part in (told and f"with {told}", lacking and f"without {lacking}") if part)


def _create(path: Path, content: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return
    with open(descriptor, "wb") as file:
        file.write(content)
