"""The download of one file, which goes on where it broke off, in this run or an earlier one."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from io import FileIO
from pathlib import Path
from typing import Any

from stage0_tiling.transfer.listing import Item
from stage0_tiling.transfer.scratch import Stopped
from stage0_tiling.transfer.sources import ResumeRefusedError

READ_BYTES = 1 << 20


class Download:
    """The part of one file on its way here, with the checksums of what has arrived.

    hashers: gives the checksums to make besides SHA-256, for a file of some bytes
    advance: is told the bytes that arrive, and (negative) those thrown away
    """

    def __init__(self, item: Item, part: Path, hashers: Callable[[int], dict], advance: Callable[[int], None]) -> None:
        self._item, self._part, self._make_hashers, self._advance = item, part, hashers, advance
        self._begin()

    @property
    def is_whole(self) -> bool:
        return self.count == self._item.size and self._part.exists()

    def sums(self) -> dict[str, str]:
        """Hexadecimal checksums by name.

        Raises:
            OSError: if another is stated for the file.
        """
        sums = {name: hasher.hexdigest() for name, hasher in self._hashers.items()}
        for name, stated in self._item.sums.items():
            if sums[name] != stated:
                self._part.unlink()
                raise OSError(f"its {name} is {sums[name]}, but {stated} is stated for it")
        return sums

    def hash_again(self) -> None:
        """Take up what an earlier run left."""
        if self._part.exists():
            with self._part.open("rb") as file:
                while block := file.read(READ_BYTES):
                    self._hash(block)

    def restart(self) -> None:
        """Throw away what has arrived."""
        if self._part.exists():
            self._advance(-self._part.stat().st_size)
            self._part.unlink()
        self._begin()

    def fetch(self, source: Any, stop: threading.Event) -> None:
        """Append what is missing until the source ends or breaks off.

        Raises:
            OSError: if it ends too early, or is longer than it was listed.
            Stopped: if `stop` is set meanwhile.
        """
        try:
            with closing(source.read(self._item, self.count)) as blocks, self._part.open("ab", buffering=0) as file:
                if self._item.size:
                    self._append(blocks, file, stop)
                os.fsync(file.fileno())
        except ResumeRefusedError:
            self.restart()
            return
        if self.count < self._item.size:
            raise ConnectionError(f"the source ended after {self.count} of {self._item.size} bytes")

    def _append(self, blocks: Iterator[bytes], file: FileIO, stop: threading.Event) -> None:
        for block in blocks:
            if stop.is_set():
                raise Stopped
            if self.count + len(block) > self._item.size:
                self.restart()
                raise OSError(f"the source sends more than the {self._item.size} bytes that it lists")
            file.write(block)
            self._hash(block)
            self._advance(len(block))

    def _begin(self) -> None:
        self.count = 0
        stated = {name: hashlib.new(name, usedforsecurity=False) for name in self._item.sums}
        self._hashers = {**stated, "sha256": hashlib.sha256(), **self._make_hashers(self._item.size)}

    def _hash(self, block: bytes) -> None:
        self.count += len(block)
        for hasher in self._hashers.values():
            hasher.update(block)


def boot_id() -> str:
    """What changes when the machine starts: what it wrote last before a crash may not have reached the disk."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
