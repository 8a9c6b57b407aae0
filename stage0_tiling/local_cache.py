"""Copies of slides on a local disk, in bounded space, while they are read.

    DIR/slidescribe-<random>/<n>/slide.svs

Each process has a folder of its own, locked while it lives; those of killed processes are removed by the next one. A
copy holds what the slide's files hold, so only its owner may read it.
"""

import fcntl
import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stage0_tiling.full_disk import is_full
from stage0_tiling.slide_files import files_of

CHUNK_BYTES = 8 << 20
GIB = 1 << 30

logger = logging.getLogger("stage0_tiling")


class LocalCache:
    """Room for copies of slides; `with` makes it and removes it. Safe to use from several threads.

    Attributes:
        folder: where to make room.
        bound: bytes that copies may take at a time.
        used: bytes that they take.
    """

    def __init__(self, folder: str | Path, bound: int):
        """Name the folder, which is made when missing, and bound its bytes."""
        self.folder = Path(folder).expanduser()
        self.bound = bound
        self.used = 0
        self._sizes: dict[Path, int] = {}
        self._number = 0
        self._is_stopped = False
        self._changed = threading.Condition()

    def __enter__(self) -> "LocalCache":
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / ".slidescribe.lock"):
            for other in self.folder.glob("slidescribe-*"):
                _remove_if_left(other)
            self._own = Path(tempfile.mkdtemp(prefix="slidescribe-", dir=self.folder))
            self._lock = (self._own / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._own, ignore_errors=True)
        self._lock.close()

    def stop(self) -> None:
        """End copies under way in other threads, as an interrupt does."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def stage(self, path: Path) -> Path:
        """Copy a slide with all files that belong to it, when there is room, and return the path of the copy.

        A slide that does not fit is left where it is, which is logged, and its own path returned.

        Raises:
            OSError: if the slide cannot be read, or the copy is not whole.
        """
        files = files_of(path)
        size = sum(source.stat().st_size for source in files)
        free = shutil.disk_usage(self.folder).free
        if size > self.bound or size > free:
            limit = f"--local_cache_gb {self.bound / GIB:g}" if size > self.bound else f"{free / GIB:.1f} GiB free"
            logger.info("%s: %.1f GiB, more than %s: read where it lies", path.name, size / GIB, limit)
            return path
        folder = self._reserve(size)
        try:
            for source in files:
                self._copy(source, folder / source.relative_to(path.parent))
        except BaseException as error:
            self._free(folder)
            if not is_full(error):
                raise
            logger.warning("%s: no space left in %s: read where it lies", path.name, self.folder)
            return path
        return folder / path.name

    def drop(self, path: Path) -> None:
        """Remove the copy that `stage` made; of a slide that was left where it is, nothing."""
        if path.parent in self._sizes:
            self._free(path.parent)

    def _reserve(self, size: int) -> Path:
        """Wait until a copy of `size` bytes fits beside the others, and make its folder."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self.used + size <= self.bound)
            self._check_stop()
            self.used += size
            self._number += 1
            folder = self._own / str(self._number)
            self._sizes[folder] = size
        folder.mkdir()
        return folder

    def _free(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with self._changed:
            self.used -= self._sizes.pop(folder)
            self._changed.notify_all()

    def _copy(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as reading, target.open("wb") as writing:
            while chunk := reading.read(CHUNK_BYTES):
                self._check_stop()
                writing.write(chunk)
        copied, size = target.stat().st_size, source.stat().st_size
        if copied != size:
            raise OSError(f"{source.name}: its copy in {self.folder} has {copied} bytes, not {size}")

    def _check_stop(self) -> None:
        if self._is_stopped:
            raise KeyboardInterrupt("the run ends")  # not a failure of the slide


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_if_left(folder: Path) -> None:
    """Remove the folder of a process that has ended; the lock of a living one is taken."""
    try:
        with (folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError as error:
        logger.warning("%s is left from an earlier run and cannot be removed (%s)", folder, error.strerror)
        return
    shutil.rmtree(folder, ignore_errors=True)
