"""The journal of a transfer: a JSON line whenever a file is done or has failed, and the last line about a file holds.

The first line says between which source and target the transfer runs. A line that a kill cut short is dropped, and
every start rewrites the journal to one line a file.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any

from slide_features import atomic_path

STARTED = "started"
DONE = "done"
FAILED = "failed"


class Manifest:
    """The journal at `path`; safe to use from several threads."""

    def __init__(self, path: Path, source: str, target: str) -> None:
        """Read what earlier runs wrote.

        Raises:
            ValueError: if the journal is of a transfer between other places.
        """
        self._path = path
        self._header = {"source": source, "target": target}
        self._records: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        if path.exists():
            self._read()

    def __getitem__(self, path: str) -> dict[str, Any]:
        """What is known of a file: size, version, state, checksums; empty when nothing is."""
        return self._records.get(path, {})

    def add(self, path: str, **fields: Any) -> None:
        """Write what became of a file to the disk."""
        record = {"path": path, **fields}
        with self._lock:
            self._records[path] = record
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def compact(self) -> None:
        """Rewrite the journal with one line a file."""
        with self._lock, atomic_path(self._path) as partial:
            lines = [self._header, *(self._records[path] for path in sorted(self._records))]
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def _read(self) -> None:
        for number, line in enumerate(self._path.read_text(encoding="utf-8", errors="replace").splitlines()):
            try:
                record = json.loads(line)
                if number:
                    self._records[record["path"]] = record
                else:
                    self._check_header(record)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if not number:
                    raise ValueError(f"{self._path} is no manifest; give another --scratch_dir") from error

    def _check_header(self, header: dict[str, str]) -> None:
        if header != self._header:
            raise ValueError(
                f"{self._path} is of a transfer from {header['source']} to {header['target']}; "
                "give each transfer a --scratch_dir of its own"
            )
