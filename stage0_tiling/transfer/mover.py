"""Move the files of a source to a target: threads that download, check, upload and commit, safe to kill at any step.

A file's way: its space is reserved, its part continues where an earlier run stopped (what is there is hashed again),
its size and checksum are checked, it is uploaded, committed (with others, where the target wants that), noted in the
manifest, deleted at the source if asked, and only then deleted here.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from stage0_tiling.transfer.download import Download, boot_id
from stage0_tiling.transfer.listing import Item, without_secrets
from stage0_tiling.transfer.manifest import DONE, FAILED, STARTED, Manifest
from stage0_tiling.transfer.scratch import Scratch, Stopped
from stage0_tiling.transfer.targets import RefusedError

LONGEST_WAIT_SECONDS = 60.0
PATIENCE_SECONDS = 5.0  # with threads that an interrupt is to end

logger = logging.getLogger("stage0_tiling")


@dataclass
class Mover:
    """A transfer. `retries` counts tries in a row that got no further; `retry_wait` is in seconds and doubles."""

    source: Any
    target: Any
    scratch: Scratch
    manifest: Manifest
    num_workers: int = 4
    retries: int = 5
    retry_wait: float = 1.0
    delete_source: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    num_moved: int = 0

    def __post_init__(self) -> None:
        self._todo: deque[Item] = deque()
        self._waiting: list[tuple[Item, dict[str, str]]] = []  # uploaded, to be committed
        self._working = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._broken: BaseException | None = None
        self._progress: tqdm = tqdm(disable=True)

    def settle(self, items: list[Item]) -> None:
        """Note files that the target was found to hold, and delete them at the source if asked."""
        for item in items:
            if self.manifest[item.path].get("state") != DONE:
                self._note_done(item, dict(item.sums))
            if self.delete_source:
                self._survive(item, lambda item=item: self._delete_if_held(item))

    def move(self, items: list[Item], total_bytes: int) -> None:
        """Move all items; what fails is in `failed`. Interrupted, it leaves parts that the next run continues.

        total_bytes: of the whole collection, for the progress bar, which shows what has been read from the source
        """
        kept = self.scratch.adopt(items)
        self._todo.extend(sorted(items, key=lambda item: item.path not in kept))
        have = total_bytes - sum(item.size for item in items) + self.scratch.bytes_on_disk()
        with tqdm(total=total_bytes, initial=have, unit="B", unit_scale=True, desc="reading") as self._progress:
            self._run_threads()

    def _run_threads(self) -> None:
        # Daemons, so that an interrupt need not wait for a server that does not answer.
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.num_workers)]
        self._working = len(threads)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:  # in short waits, so that an interrupt is heard
                while thread.is_alive():
                    thread.join(timeout=0.2)
        except BaseException:
            self._stop.set()
            deadline = time.monotonic() + PATIENCE_SECONDS
            for thread in threads:
                thread.join(timeout=max(0.0, deadline - time.monotonic()))
            raise
        if self._broken is not None:
            raise self._broken

    # One file

    def _work(self) -> None:
        try:
            while (item := self._next()) is not None:
                self._survive(item, lambda item=item: self._bring(item))
                if self._batch_is_full():
                    self._send_waiting()
            with self._lock:
                self._working -= 1
                last = not self._working
            if last:
                self._send_waiting()
        except Stopped:
            pass
        except BaseException as error:  # the manifest cannot be written: nothing can be relied on any more
            self._broken = error
            self._stop.set()

    def _next(self) -> Item | None:
        with self._lock:
            if self._stop.is_set():
                raise Stopped
            return self._todo.popleft() if self._todo else None

    def _bring(self, item: Item) -> None:
        self.scratch.reserve(item.path, item.size, self._send_waiting, self._stop)
        sums = self._download(item)
        if self.target.holds(item.path, item.size, sums, careful=True):
            self._finish(item, sums)  # it was sent before a kill, or by other means
            return
        part = self.scratch.part(item.path)
        self._try(lambda: self.target.upload(item.path, part, sums), item.path, self.retries)
        with self._lock:
            self._waiting.append((item, sums))
        self.scratch.notify()

    def _survive(self, item: Item, work: Callable[[], None]) -> None:
        """Do the work of one file. The one place where a bad file is held back."""
        try:
            work()
        except Stopped:
            raise
        except Exception as error:
            logger.debug("%s", item.path, exc_info=True)
            self._note_failed(item, one_line(error))
            self.scratch.give_up(item.path)

    def _download(self, item: Item) -> dict[str, str]:
        """Complete the part of a file and return its checksums."""
        download = Download(item, self.scratch.part(item.path), self.target.hashers, self._advance)
        started = {"state": STARTED, "size": item.size, "version": item.version, "boot": boot_id()}
        record = self.manifest[item.path]
        if all(record.get(key) == value for key, value in started.items() if key != "state"):
            download.hash_again()
        else:
            download.restart()  # nothing, or of another version of the file, or not surely on the disk
        self.manifest.add(item.path, **started)
        tries = 0
        while not download.is_whole:
            have = download.count
            try:
                download.fetch(self.source, self._stop)
            except Stopped:
                raise
            except Exception as error:
                tries = 1 if download.count > have else tries + 1
                self._wait(tries, self.retries, error, item.path)
        return download.sums()

    # Commit

    def _batch_is_full(self) -> bool:
        with self._lock:
            size = sum(item.size for item, _ in self._waiting)
            return len(self._waiting) >= self.target.batch_files or size >= self.target.batch_bytes > 0

    def _send_waiting(self) -> bool:
        """Commit all that waits for it; returns whether there was any."""
        with self._lock:
            batch, self._waiting = self._waiting, []
        if batch:
            self._send(batch, self.retries)
        return bool(batch)

    def _send(self, batch: list[tuple[Item, dict[str, str]]], retries: int) -> None:
        """Commit a batch; if that fails, each file alone where the target can, so that a bad one costs only itself."""
        paths = [item.path for item, _ in batch]
        try:
            self._try(lambda: self.target.commit(paths), f"commit of {len(paths)} files", retries)
        except Stopped:
            raise
        except Exception as error:
            if len(batch) > 1 and self.target.splits_batches:
                for one in batch:
                    self._send([one], retries=0)
            else:
                self._settle_failed(batch, error)
            return
        for item, sums in batch:
            self._finish(item, sums)

    def _settle_failed(self, batch: list[tuple[Item, dict[str, str]]], error: Exception) -> None:
        """Note what a failed commit has brought there nevertheless, and that the rest of it failed."""
        reasons = error.reasons if isinstance(error, RefusedError) else dict.fromkeys((i.path for i, _ in batch), error)
        for item, sums in batch:
            if self.target.holds(item.path, item.size, sums, careful=True):
                self._finish(item, sums)
            else:
                reason = reasons.get(item.path, f"not sent, since another file of its batch failed: {error}")
                self._note_failed(item, one_line(reason))
                self.scratch.give_up(item.path)

    def _finish(self, item: Item, sums: dict[str, str]) -> None:
        self._note_done(item, sums)
        self.scratch.release(item.path)
        self.num_moved += 1
        if self.delete_source:
            self._delete_at_source(item)
        self._progress.set_postfix_str(f"{self.num_moved} files sent, {len(self.failed)} failed", refresh=False)

    def _delete_if_held(self, item: Item) -> None:
        if not self.target.holds(item.path, item.size, self.manifest[item.path]["sums"], careful=True):
            raise OSError("the target no longer holds what was sent; run again to send it anew")
        self._delete_at_source(item)

    def _delete_at_source(self, item: Item) -> None:
        try:
            self._try(lambda: self.source.delete(item), item.path, self.retries)
        except Stopped:
            raise
        except Exception as error:
            self._set_failed(item, f"it was sent, but cannot be deleted at the source: {one_line(error)}")

    def _note_done(self, item: Item, sums: dict[str, str]) -> None:
        target = f"{self.target.name}/{item.path}"
        self.manifest.add(item.path, state=DONE, size=item.size, version=item.version, sums=sums, target=target)

    def _note_failed(self, item: Item, error: str) -> None:
        self._set_failed(item, error)
        known = {key: value for key, value in self.manifest[item.path].items() if key != "path"}
        self.manifest.add(item.path, **(known | {"state": FAILED, "error": error}))

    def _set_failed(self, item: Item, error: str) -> None:
        logger.error("%s failed: %s", item.path, error)
        self.failed[item.path] = error

    # Again

    def _try(self, work: Callable[[], None], name: str, retries: int) -> None:
        tries = 0
        while True:
            try:
                return work()
            except RefusedError:
                raise
            except Exception as error:
                tries += 1
                self._wait(tries, retries, error, name)

    def _wait(self, tries: int, retries: int, error: Exception, name: str) -> None:
        """Wait before the next try, or raise the error when there were enough."""
        if tries > retries:
            raise error
        seconds = min(LONGEST_WAIT_SECONDS, self.retry_wait * 2 ** (tries - 1))
        logger.warning("%s: %s; trying again in %.1f s", name, one_line(error), seconds)
        if self._stop.wait(seconds):
            raise Stopped

    def _advance(self, num_bytes: int) -> None:
        with self._lock:
            self._progress.update(num_bytes)


def is_there(item: Item, manifest: Manifest, target: Any, target_sizes: dict[str, int]) -> bool:
    """Whether the target holds this version of a file, as far as it can be known without reading it."""
    if target_sizes.get(item.path) != item.size:
        return False
    record = manifest[item.path]
    if record.get("state") == DONE and (record["size"], record["version"]) == (item.size, item.version):
        return target.holds(item.path, item.size, record["sums"], careful=False)
    return "sha256" in item.sums and target.holds(item.path, item.size, dict(item.sums), careful=True)


def one_line(error: Exception | str) -> str:
    """The first line of an error, without secrets."""
    lines = str(error).strip().splitlines()
    return without_secrets(lines[0] if lines else type(error).__name__)
