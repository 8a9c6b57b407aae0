"""Numbered Kaggle datasets as target: each is made once, from a batch of files, and recognised by its index."""

import json
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from stage0_tiling.transfer.kaggle_sets import GAP, INDEX, READY, KaggleSets, Stored, stored_name, write_index
from stage0_tiling.transfer.targets import RefusedError

MOST_FILES = 49  # beside the index: Kaggle takes 50 at the top of a dataset
NAME_LENGTHS = range(4, 46)  # Kaggle's are 6 to 50 letters, with the number
POLL_SECONDS = 10.0
READY_SECONDS = 3600.0

logger = logging.getLogger("stage0_tiling")


class KaggleTarget:
    """The private datasets kaggle://owner/name-1, -2, ... Sizes are checked; the SHA-256 of each is in its index.

    Kaggle tells no checksums: reading the datasets back as a source compares what they hold with their indexes.
    """

    splits_batches = False  # a file that fails must not get a dataset of its own

    def __init__(self, url: str, *, batch_files: int, batch_bytes: int, work_dir: Path) -> None:
        """Look up what the datasets hold.

        work_dir: folder for the links that the client uploads from; it takes no disk space to speak of
        """
        self._sets = KaggleSets(url)
        self.name = self._sets.url
        if len(self._sets.name) not in NAME_LENGTHS:
            raise ValueError(f"{self.name}: the name must have 4 to 45 letters, to which a number is added")
        self.batch_files, self.batch_bytes = min(batch_files, MOST_FILES), batch_bytes
        self._folder = work_dir / "batch"
        self._waiting: dict[str, tuple[Path, Stored]] = {}
        self._stored: dict[str, Stored] = {}
        self._refused: dict[str, str] = {}
        self._next = 1
        self._one_commit = threading.Lock()
        self._look()

    def sizes(self) -> dict[str, int]:
        return {path: stored.size for path, stored in self._stored.items()}

    def hashers(self, size: int) -> dict[str, Any]:
        return {}

    def holds(self, path: str, size: int, sums: dict[str, str], careful: bool) -> bool:
        stored = self._stored.get(path)
        return stored is not None and (stored.size, stored.sha256) == (size, sums["sha256"])

    def upload(self, path: str, file: Path, sums: dict[str, str]) -> None:
        self._waiting[path] = (file, Stored("", stored_name(path), path, file.stat().st_size, sums["sha256"]))

    def commit(self, paths: list[str]) -> None:
        """Make datasets of what waits; after a failure it may be called again.

        Raises:
            OSError: if Kaggle refuses, changes or does not show some of it, or is not done in time.
        """
        with self._one_commit:
            self._look()  # an earlier call may have worked without an answer
            missing = self._missing(paths)
            for start in range(0, len(missing), self.batch_files):
                self._create(missing[start : start + self.batch_files])
            missing = self._missing(paths)
            if missing:
                raise OSError(f"{len(missing)} files did not reach Kaggle, {missing[0]} is the first")
            for path in paths:
                self._waiting.pop(path, None)

    def _missing(self, paths: list[str]) -> list[str]:
        refused = {path: self._refused[path] for path in paths if path in self._refused}
        if refused:  # for good: another try would send all of it again
            raise RefusedError(refused)
        waiting = {path: self._waiting[path][1] for path in paths if path in self._waiting}
        return [
            path for path, each in waiting.items() if not self.holds(path, each.size, {"sha256": each.sha256}, True)
        ]

    def _create(self, paths: list[str]) -> None:
        dataset = self._sets.dataset(self._next)
        self._fill_folder(dataset, paths)
        answer = self._sets.create(self._folder)
        if answer.status.lower() != "ok" and self._sets.status(dataset) is None:
            self._refuse(paths, f"Kaggle refuses {dataset}: {answer.error}")
        elif self._wait(dataset, is_made=True) != READY:
            self._refuse(paths, f"Kaggle could not make {dataset} of what was sent; see its page, and delete it there")
        else:
            self._look()
            self._compare(dataset, paths)

    def _fill_folder(self, dataset: str, paths: list[str]) -> None:
        """Fill the folder that the client uploads: always the same, for it continues uploads by the files' names."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        title = dataset.partition("/")[2]
        metadata = {"title": title, "id": dataset, "licenses": [{"name": "other"}]}
        (self._folder / "dataset-metadata.json").write_text(json.dumps(metadata))
        for path in paths:
            file, stored = self._waiting[path]
            (self._folder / stored.name).symlink_to(file.resolve())
        write_index(self._folder / INDEX, [self._waiting[path][1] for path in paths])

    def _compare(self, dataset: str, paths: list[str]) -> None:
        """Refuse what Kaggle changed. What the client left out because its upload broke off may be sent again."""
        shown = self._sets.files(dataset)
        if INDEX not in shown:
            self._refuse(paths, f"{dataset} was made without its {INDEX}; delete it at Kaggle and run again")
        others = sorted(set(shown) - {self._waiting[path][1].name for path in paths} - {INDEX})
        for path in paths:
            stored = self._waiting[path][1]
            if stored.name in shown and shown[stored.name].total_bytes != stored.size:
                size = shown[stored.name].total_bytes
                self._refuse([path], f"{dataset} shows {size} bytes of {stored.name}, but {stored.size} were sent")
            elif stored.name not in shown and others:
                self._refuse([path], f"{dataset} shows {others[0]} and others instead of {stored.name}")

    def _refuse(self, paths: list[str], message: str) -> None:
        self._refused |= dict.fromkeys(paths, message)

    def _look(self) -> None:
        """Read the datasets that were made since the last look, here or by a run that was killed."""
        number = self._next
        while number < self._next + GAP:
            if self._read(self._sets.dataset(number)):
                self._next = number + 1
            number += 1

    def _read(self, dataset: str) -> bool:
        """Note what a dataset holds; returns whether there is such a dataset."""
        status = self._wait(dataset)
        if status is None:
            return False
        shown = self._sets.files(dataset) if status == READY else {}
        if INDEX not in shown:
            logger.warning("%s (%s) has no index of this command and is passed over", dataset, status)
            return True
        for stored in self._sets.index(dataset):
            if stored.name in shown and shown[stored.name].total_bytes == stored.size:
                self._stored[stored.path] = stored
        return True

    def _wait(self, dataset: str, is_made: bool = False) -> str | None:
        """The status of a dataset when Kaggle has done with it; None when there is none, unless it `is_made`."""
        deadline = time.monotonic() + READY_SECONDS
        while (status := self._sets.status(dataset)) not in (READY, "failed", "deleted"):
            if status is None and not is_made:
                return None
            if time.monotonic() > deadline:
                raise OSError(f"Kaggle is not done with {dataset} ({status}); run again later")
            logger.info("Kaggle works on %s (%s)", dataset, status)
            time.sleep(POLL_SECONDS)
        return status
