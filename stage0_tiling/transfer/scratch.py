"""The disk space of a transfer: files being downloaded or waiting to be sent, never more than a set number of bytes.

Space is taken for the whole of a file before its first byte arrives, so that running downloads can always end.
"""

import fcntl
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stage0_tiling.transfer.listing import Item

BLOCK_BYTES = 4096  # what a file system hands out at least; a file is counted in whole blocks


class Stopped(Exception):  # noqa: N818 (no error: the user interrupted)
    """The transfer was told to stop."""


class Scratch:
    """The folder of downloads, `max_bytes` in all; safe to use from several threads.

    copies: how often a file lies on the disk while it arrives: twice, where a source's client has to download it first
    """

    def __init__(self, folder: Path, max_bytes: int, copies: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.max_bytes = max_bytes
        self._copies = copies
        self._folder = folder
        self._taken: dict[str, int] = {}
        self._given_up: set[str] = set()  # parts of failed files, kept for the next run while there is space
        self._changed = threading.Condition()

    def part(self, path: str) -> Path:
        """Where a file is downloaded to. A hash, so that no name of a server becomes a path here."""
        return self._folder / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.part"

    def adopt(self, items: Iterable[Item]) -> set[str]:
        """Take space for the parts that an earlier run left of `items`; delete those that do not fit, and all others.

        Returns:
            Paths of the items whose parts were kept: to be moved first, since they hold space.
        """
        parts = {self.part(item.path): item for item in items}
        left = sorted(self._folder.iterdir(), key=lambda part: part.stat().st_size, reverse=True)
        for part in left:
            item = parts.get(part)
            if item is None or part.stat().st_size > item.size or not self._take(item.path, item.size):
                part.unlink()
        return set(self._taken)

    def reserve(self, path: str, size: int, make_room: Callable[[], bool], stop: threading.Event) -> None:
        """Take space for a file of `size` bytes, waiting until there is some.

        `make_room` is called when there is none, without a lock held; it frees some and returns True, or False when
        there is nothing that it could do.

        Raises:
            ValueError: if the file is bigger than all the space.
            Stopped: if `stop` was set meanwhile.
        """
        if self._space(size) > self.max_bytes:
            times = f" times {self._copies}" if self._copies > 1 else ""
            raise ValueError(f"its {size} bytes{times} are more than --max_disk, {self.max_bytes} bytes")
        while not self._take(path, size):
            if stop.is_set():
                raise Stopped
            if not self._evict() and not make_room():
                with self._changed:
                    self._changed.wait(timeout=0.5)

    def release(self, path: str) -> None:
        """Delete a file's part and give its space back."""
        self.part(path).unlink(missing_ok=True)
        with self._changed:
            self._taken.pop(path, None)
            self._given_up.discard(path)
            self._changed.notify_all()

    def give_up(self, path: str) -> None:
        """Keep what has arrived of a file that failed, as long as nobody needs the space."""
        part = self.part(path)
        with self._changed:
            if path in self._taken:
                self._taken[path] = _in_blocks(part.stat().st_size) if part.exists() else 0
                self._given_up.add(path)
            self._changed.notify_all()

    def notify(self) -> None:
        """Wake those who wait for space: there may be something that they can send."""
        with self._changed:
            self._changed.notify_all()

    def bytes_on_disk(self) -> int:
        """Bytes that have arrived and are still here."""
        return sum(part.stat().st_size for part in self._folder.iterdir())

    def _take(self, path: str, size: int) -> bool:
        with self._changed:
            self._given_up.discard(path)
            if path not in self._taken:
                if sum(self._taken.values()) + self._space(size) > self.max_bytes:
                    return False
                self._taken[path] = self._space(size)
            return True

    def _space(self, size: int) -> int:
        return _in_blocks(size) * self._copies

    def _evict(self) -> bool:
        with self._changed:
            path = next(iter(self._given_up), None)
        if path is not None:
            self.release(path)
        return path is not None


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; a kill lets go of it.

    Raises:
        ValueError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--scratch_dir {folder} is in use by another transfer") from None
        yield


def _in_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
