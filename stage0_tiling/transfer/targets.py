"""Where files go: local folders, S3 and whatever else fsspec writes; the others are in hub_target.py, kaggle_target.py.

A target has `name`; `batch_files` and `batch_bytes`, how much is committed at once; `splits_batches`, whether the files
of a commit that failed may be committed one by one; `sizes()`, bytes by path of what it
holds; `hashers(size)`, the checksums that it can tell besides SHA-256; `holds(path, size, sums, careful)`, whether this
very content lies there; `upload(path, file, sums)`, called from several threads; and `commit(paths)`, after which what
was uploaded is there. `sums` are hexadecimal, by name, always with "sha256".
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from stage0_tiling.transfer.listing import public_url
from stage0_tiling.transfer.sources import open_filesystem

S3_MAX_PARTS = 10_000
S3_PART_BYTES = 32 << 20
S3_PARTS_IN_FLIGHT = 4  # per file; each is held in memory


class RefusedError(OSError):
    """Files of a commit that the target does not take, with the reasons by path; another try would change nothing."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons = reasons


def open_target(url: str, *, batch_files: int, batch_bytes: int, work_dir: Path) -> Any:
    """The target of a URL, or of a local folder.

    work_dir: folder for what a target's client needs beside the files

    Raises:
        ValueError: if nothing can be written there.
    """
    scheme = urlsplit(url).scheme
    if scheme == "kaggle":
        from stage0_tiling.transfer.kaggle_target import KaggleTarget

        return KaggleTarget(url, batch_files=batch_files, batch_bytes=batch_bytes, work_dir=work_dir)
    if scheme == "ftp":
        raise ValueError("ftp:// can be a source only, since its servers tell no checksum of what arrived")
    if scheme == "hf":
        from stage0_tiling.transfer.hub_target import HubTarget

        return HubTarget(url, batch_files=batch_files, batch_bytes=batch_bytes)
    if scheme in ("", "file", "local"):
        return FolderTarget(url)
    return S3Target(url) if scheme == "s3" else FsspecTarget(url)


class FolderTarget:
    """A local folder. A file gets its name when it was read back whole; where it can be, it is linked, not copied."""

    batch_files, batch_bytes, splits_batches = 1, 0, True

    def __init__(self, url: str) -> None:
        self.name = public_url(url)
        self._root = Path(open_filesystem(url)[1])

    def sizes(self) -> dict[str, int]:
        files = (path for path in self._root.rglob("*") if path.is_file())
        return {path.relative_to(self._root).as_posix(): path.stat().st_size for path in files}

    def hashers(self, size: int) -> dict[str, Any]:
        return {}

    def holds(self, path: str, size: int, sums: dict[str, str], careful: bool) -> bool:
        file = self._root / path
        if not file.is_file() or file.stat().st_size != size:
            return False
        if not careful:
            return True
        with file.open("rb") as written:
            return sha256_of(written) == sums["sha256"]

    def upload(self, path: str, file: Path, sums: dict[str, str]) -> None:
        final = self._root / path
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(f".{final.name}.partial")
        partial.unlink(missing_ok=True)
        try:
            os.link(file, partial)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(file, partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
            if sha256_of(written) != sums["sha256"]:
                raise OSError(f"{final} does not read back as it was written")
        os.replace(partial, final)

    def commit(self, paths: list[str]) -> None:
        pass


class FsspecTarget:
    """A place that fsspec writes to. It is checked by reading back."""

    batch_files, batch_bytes, splits_batches = 1, 0, True

    def __init__(self, url: str) -> None:
        self.name = public_url(url)
        self._files, root = open_filesystem(url)
        self._root = root.rstrip("/")

    def sizes(self) -> dict[str, int]:
        found = self._files.find(self._root, detail=True)
        return {name.removeprefix(f"{self._root}/"): info["size"] for name, info in found.items()}

    def hashers(self, size: int) -> dict[str, Any]:
        return {}

    def holds(self, path: str, size: int, sums: dict[str, str], careful: bool) -> bool:
        info = self._info(path)
        return info is not None and info["size"] == size and (not careful or self._reads_back(path, sums))

    def upload(self, path: str, file: Path, sums: dict[str, str]) -> None:
        self._put(file, f"{self._root}/{path}")
        if not self.holds(path, file.stat().st_size, sums, careful=True):
            raise OSError(f"{self.name}/{path} does not read back as it was written")

    def commit(self, paths: list[str]) -> None:
        pass

    def _put(self, file: Path, path: str) -> None:
        self._files.put_file(str(file), path)

    def _info(self, path: str) -> dict[str, Any] | None:
        try:
            return self._files.info(f"{self._root}/{path}")
        except FileNotFoundError:
            return None

    def _reads_back(self, path: str, sums: dict[str, str]) -> bool:
        with self._files.open(f"{self._root}/{path}", "rb") as file:
            return sha256_of(file) == sums["sha256"]


class S3Target(FsspecTarget):
    """An S3 bucket. Its ETag tells the checksum, except where the bucket encrypts (KMS): there it is read back."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        try:
            self._files.ls(self._root.partition("/")[0])
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.name} cannot be used: {error}") from error

    def hashers(self, size: int) -> dict[str, Any]:
        return {"etag": ETag(size)}

    def holds(self, path: str, size: int, sums: dict[str, str], careful: bool) -> bool:
        info = self._info(path)
        if info is None or info["size"] != size:
            return False
        return info["ETag"].strip('"') == sums.get("etag") or self._reads_back(path, sums)

    def _put(self, file: Path, path: str) -> None:
        part_bytes = s3_part_bytes(file.stat().st_size)
        self._files.put_file(str(file), path, chunksize=part_bytes, max_concurrency=S3_PARTS_IN_FLIGHT)


class ETag:
    """The ETag that S3 gives to what s3fs uploads: the MD5, or of several parts that of their MD5s, and the number."""

    def __init__(self, size: int) -> None:
        part_bytes = s3_part_bytes(size)
        self._part_bytes = part_bytes if size >= 2 * part_bytes else None  # as s3fs chooses
        self._parts = [hashlib.md5(usedforsecurity=False)]
        self._room = self._part_bytes

    def update(self, block: bytes) -> None:
        while self._room is not None and len(block) > self._room:
            self._parts[-1].update(block[: self._room])
            block = block[self._room :]
            self._parts.append(hashlib.md5(usedforsecurity=False))
            self._room = self._part_bytes
        self._parts[-1].update(block)
        if self._room is not None:
            self._room -= len(block)

    def hexdigest(self) -> str:
        if self._part_bytes is None:
            return self._parts[0].hexdigest()
        whole = hashlib.md5(b"".join(part.digest() for part in self._parts), usedforsecurity=False)
        return f"{whole.hexdigest()}-{len(self._parts)}"


def s3_part_bytes(size: int) -> int:
    """Bytes of each part of an upload: S3 takes ten thousand of them at most."""
    return max(S3_PART_BYTES, -(-size // S3_MAX_PARTS))


def sha256_of(file: BinaryIO) -> str:
    """Hexadecimal SHA-256 of what an open file holds."""
    return hashlib.file_digest(file, "sha256").hexdigest()
