"""The one folder whose slides the page shows: what is in it, and what may be added to it.

A slide is asked for by a key made of its path below the folder, never by a path, so no request can name anything that
was not listed; and what was listed is looked at again, through links, before it is opened.
"""

import errno
import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from command_line import is_utf8
from stage0_tiling import slide_files
from stage0_tiling.slide import Slide, SlideError
from stage0_tiling.slide_files import WHOLE_SLIDE_SUFFIXES, files_of, slides_below

# Slides of one file; those of several (MIRAX, VMS, DICOM) have to be copied into the folder.
UPLOAD_SUFFIXES = frozenset(".svs .tif .tiff .ndpi .scn .bif .svslide".split())
MAX_NAME_BYTES = 200
MARGIN_BYTES = 256 * 2**20  # of the disk that uploads leave free
BYTES_BETWEEN_LOOKS = 64 * 2**20  # of an upload, at how much room the disk still has
PARTIAL = ".upload-"  # an upload before it has its name
FORGOTTEN_S = 24 * 3600  # a partial upload untouched for so long belongs to a page that was killed
_BAD_IN_NAMES = re.compile(r"[\x00-\x1f\x7f/\\:*?\"<>|\u202a-\u202e\u2066-\u2069]")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class NotAccepted(ValueError):
    """An upload is refused; ``status`` is the HTTP status that says why."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class FolderSlide:
    """A slide of the folder.

    Attributes:
        key: names it in requests, and stays the same when another file takes its place.
        name: its path below the folder, as text: bytes that are no UTF-8 are shown as a mark.
        path: its file.
        num_bytes: of the file.
        version: another one as soon as the file is another.
    """

    key: str
    name: str
    path: Path
    num_bytes: int
    version: str

    @property
    def has_readable_name(self) -> bool:
        """Whether its name is UTF-8, as it must be wherever it is written down."""
        return is_utf8(self.path.name)


def parse_size(text: str) -> int:
    """Bytes of a size such as 4GB, 500 MB or 1000.

    Raises:
        ValueError: it is no size, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", text, re.IGNORECASE)
    num_bytes = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if num_bytes < 1:
        raise ValueError(f"--max_upload {text!r} is no size; write 4GB or 500MB")
    return num_bytes


class SlideFolder:
    """Slides below one folder.

    Attributes:
        root: the folder, links resolved.
        max_upload: bytes of the largest slide that is accepted.
    """

    def __init__(self, root: str | Path, max_upload: int):
        self.root = Path(root).expanduser().resolve()
        if not self.root.is_dir():
            raise FileNotFoundError(f"--slides {root}: no such folder")
        self.max_upload = max_upload
        self._listed: dict[str, FolderSlide] = {}
        self._lock = threading.Lock()
        self._remove_forgotten()
        if not any(isinstance(known, _OncePerMessage) for known in slide_files.logger.filters):
            slide_files.logger.addFilter(_OncePerMessage())

    def list(self) -> list[FolderSlide]:
        """Slides that are there now, by name.

        Left out are plain images, links that lead out of the folder, and what is no file: a pipe would be waited for.
        """
        found = {}
        for _, path in slides_below(self.root):
            if path.suffix.lower() in WHOLE_SLIDE_SUFFIXES and path.is_file() and self._is_inside(path):
                name = os.fsencode(path.relative_to(self.root))
                key = hashlib.sha256(name).hexdigest()[:20]
                with suppress(FileNotFoundError):  # removed meanwhile
                    slide = FolderSlide(key, name.decode("utf-8", "replace"), path, 0, "")
                    found[key] = _as_it_is_now(slide)
        with self._lock:
            self._listed = found
        return sorted(found.values(), key=lambda slide: slide.name.lower())

    def find(self, key: str) -> FolderSlide:
        """The slide of a key, as its file is now.

        Raises:
            KeyError: there is none, or no longer, or it leads out of the folder by now.
        """
        slide = self._listed.get(key)
        if slide is None or not slide.path.is_file():
            self.list()
            slide = self._listed[key]
        if not all(self._is_inside(file) for file in files_of(slide.path)):
            raise KeyError(key)
        return _as_it_is_now(slide)

    def _is_inside(self, path: Path) -> bool:
        try:
            return path.resolve(strict=True).is_relative_to(self.root)
        except (OSError, RuntimeError):  # a broken link, or a circle of them
            return False

    def check_upload(self, name: str, num_bytes: int | None) -> Path:
        """Where an upload of this name would go.

        Raises:
            NotAccepted: the name, the type or the size is refused.
        """
        # The type first: of a name that is refused for both, users mean the type.
        if Path(name).suffix.lower() not in UPLOAD_SUFFIXES:
            raise NotAccepted(
                415,
                f"only slides of one file can be added ({', '.join(sorted(UPLOAD_SUFFIXES))}); copy others yourself",
            )
        if (
            _BAD_IN_NAMES.search(name)
            or name.startswith(".")
            or name != name.strip()
            or not name.isprintable()
            or len(os.fsencode(name)) > MAX_NAME_BYTES
        ):
            raise NotAccepted(400, "this file name cannot be kept; use letters, digits, spaces, - and _")
        if num_bytes is not None and num_bytes > self.max_upload:
            raise NotAccepted(413, f"{num_bytes / 1e9:.1f} GB is more than the {self.max_upload / 1e9:g} GB allowed")
        if num_bytes is not None and num_bytes > self._free_bytes():
            raise NotAccepted(507, "the folder's disk is too full for this slide")
        target = self.root / name
        if os.path.lexists(target):
            raise NotAccepted(409, f"{name} is already there; rename yours")
        return target

    async def receive(self, name: str, num_bytes: int | None, chunks: AsyncIterator[bytes]) -> FolderSlide:
        """Write an upload, open it, and only then give it its name.

        Raises:
            NotAccepted: it is too large, incomplete, no slide, or its name is taken.
        """
        from anyio import to_thread

        target = self.check_upload(name, num_bytes)
        partial = self.root / f"{PARTIAL}{secrets.token_hex(6)}{target.suffix.lower()}"
        try:
            written = looked = 0
            with partial.open("xb") as file:
                async for chunk in chunks:
                    written += len(chunk)
                    if written > self.max_upload:
                        raise NotAccepted(413, f"more than the {self.max_upload / 1e9:g} GB allowed")
                    if written - looked >= BYTES_BETWEEN_LOOKS:  # others write to the disk, too
                        looked = written
                        if self._free_bytes() < 0:
                            raise NotAccepted(507, "the folder's disk is full")
                    await to_thread.run_sync(file.write, chunk)
            if num_bytes is not None and written != num_bytes:
                raise NotAccepted(400, f"{written} of {num_bytes} bytes arrived; send it again")
            await to_thread.run_sync(_check_opens, partial)
            _name(partial, target)
        except FileExistsError as error:
            raise NotAccepted(409, f"{name} is already there; rename yours") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise NotAccepted(507, "the folder's disk is full") from error
            raise NotAccepted(500, f"the slide cannot be written ({error.strerror})") from error
        finally:
            partial.unlink(missing_ok=True)
        return next(slide for slide in self.list() if slide.path == target)

    def _free_bytes(self) -> int:
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize - MARGIN_BYTES

    def _remove_forgotten(self) -> None:
        """Remove what is left of uploads to a page that was killed."""
        for partial in self.root.glob(f"{PARTIAL}*"):
            with suppress(OSError):
                if time.time() - partial.lstat().st_mtime > FORGOTTEN_S:
                    partial.unlink()


class _OncePerMessage(logging.Filter):
    """Let a message about the folder pass once: the page looks at the folder every few seconds."""

    def __init__(self):
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._said
        self._said.add(message)
        return is_new


def _as_it_is_now(slide: FolderSlide) -> FolderSlide:
    """The slide with size and version of its file; raises FileNotFoundError."""
    status = slide.path.stat()
    facts = f"{status.st_dev} {status.st_ino} {status.st_mtime_ns} {status.st_size}"
    return replace(slide, num_bytes=status.st_size, version=hashlib.sha256(facts.encode()).hexdigest()[:12])


def _name(partial: Path, target: Path) -> None:
    """Give a finished file its name, which a rename would also take from another; raises FileExistsError instead."""
    try:
        os.link(partial, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        with target.open("xb"):  # a file system without hard links: claim the name first
            pass
        os.replace(partial, target)


def _check_opens(path: Path) -> None:
    try:
        with Slide(path) as slide:
            slide.read_whole(64, max(1, round(64 * slide.height / slide.width)))
    except SlideError as error:
        reason = str(error).replace(path.name, "this file")
        raise NotAccepted(422, reason) from error
