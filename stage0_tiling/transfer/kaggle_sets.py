"""Kaggle datasets as they are seen through its client: the numbered ones of a collection, and what they hold.

A version of a dataset can be made only from one folder that holds all of it. So a collection fills datasets `name-1`,
`name-2`, ..., each made once. Each holds an index, a JSON file that tells the path, size and SHA-256 of its files.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stage0_tiling.transfer.listing import public_url

INDEX = "mirror-index.json"
READY = "ready"
GAP = 3  # numbers in a row that may be missing because a dataset was deleted
FILES_PER_PAGE = 200
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")  # which Kaggle unpacks
# Names that the client keeps to itself (dataset-metadata.json, dataset-cover-image.png, ...), and the index.
_RESERVED = re.compile(r"(\w+-metadata|model-instance-metadata|datapackage|mirror-index)\.json|dataset-cover-image\..*")


@dataclass(frozen=True)
class Stored:
    """One file in a dataset: `dataset` is "owner/name", `name` what it is called there, `path` in the collection."""

    dataset: str
    name: str
    path: str
    size: int
    sha256: str


class KaggleSets:
    """The datasets of a URL kaggle://owner/name."""

    def __init__(self, url: str) -> None:
        """Find the client and its credentials.

        Raises:
            ValueError: if the URL names no dataset, or the client or its credentials are missing.
        """
        self.url = public_url(url)
        match = re.fullmatch(r"kaggle://([\w-]+)/([a-zA-Z0-9-]+)", self.url)
        if match is None:
            raise ValueError(f"{self.url} names no dataset; write kaggle://owner/name (letters, digits and '-')")
        self.owner, self.name = match.groups()
        self.api = open_client(self.url)

    def dataset(self, number: int | None) -> str:
        return f"{self.owner}/{self.name}" + ("" if number is None else f"-{number}")

    def status(self, dataset: str) -> str | None:
        """Kaggle's word for what a dataset is at ("ready" in the end), or None when there is none that can be seen."""
        from requests import HTTPError

        try:
            with hushed():
                return self.api.dataset_status(dataset)
        except HTTPError as error:
            if error.response is not None and error.response.status_code in (403, 404):
                return None
            raise

    def files(self, dataset: str) -> dict[str, Any]:
        """What Kaggle lists of a dataset's files (`total_bytes`, `creation_date`), by name."""
        found: dict[str, Any] = {}
        token = None
        while True:
            with hushed():
                page = self.api.dataset_list_files(dataset, page_token=token, page_size=FILES_PER_PAGE)
            if page.error_message:
                raise OSError(f"{dataset} cannot be listed: {page.error_message}")
            found |= {file.name: file for file in page.dataset_files}
            token = page.next_page_token
            if not token:
                return found

    def index(self, dataset: str) -> list[Stored]:
        """What the index of a dataset tells; it may name files that did not arrive."""
        with tempfile.TemporaryDirectory() as folder:
            text = self.download(dataset, INDEX, Path(folder) / "index").read_text(encoding="utf-8")
        try:
            entries = json.loads(text)["files"]
            return [Stored(dataset, each["name"], each["path"], each["size"], each["sha256"]) for each in entries]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{dataset}/{INDEX} cannot be read: {error!r}") from error

    def create(self, folder: Path) -> Any:
        """Make a private dataset of a folder with its dataset-metadata.json; the answer has `status` and `error`."""
        with hushed():
            return self.api.dataset_create_new(str(folder), public=False, quiet=True, dir_mode="skip")

    def download(self, dataset: str, name: str, folder: Path) -> Path:
        """Download one file into `folder`, which is emptied before, and return where it lies."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with hushed():
            self.api.dataset_download_file(dataset, name, path=str(folder), force=True, quiet=True)
        arrived = list(folder.iterdir())  # not always under its own name
        if len(arrived) != 1:
            raise OSError(f"Kaggle's client brought {len(arrived)} files for {dataset}/{name}")
        return arrived[0]


def write_index(file: Path, stored: list[Stored]) -> None:
    """Write what `KaggleSets.index` reads."""
    entries = [{"name": each.name, "path": each.path, "size": each.size, "sha256": each.sha256} for each in stored]
    file.write_text(json.dumps({"files": entries}, indent=1, ensure_ascii=False), encoding="utf-8")


def stored_name(path: str) -> str:
    """The name of a file in a dataset, which has no folders here: one that Kaggle neither refuses, unpacks nor keeps.

    A path that is such a name stays as it is; any other gets a hash, so that no two paths share a name.
    """
    is_archive = path.lower().endswith(ARCHIVES)
    if re.fullmatch(r"\w[\w.-]{0,99}", path, re.ASCII) and not is_archive and not _RESERVED.fullmatch(path):
        return path
    plain = re.sub(r"[^\w.-]", "_", path.replace("/", "__"), flags=re.ASCII)
    suffix = PurePosixPath(plain).suffix[:20]
    stem = plain.removesuffix(suffix).lstrip("._-")[-70:] or "file"
    digest = hashlib.sha256(path.encode()).hexdigest()[:16]
    return f"{stem}-{digest}{suffix}" + (".bin" if is_archive else "")


def open_client(url: str) -> Any:
    """Kaggle's client, logged in by its own means (KAGGLE_API_TOKEN, ~/.kaggle).

    Raises:
        ValueError: if it is not installed, or finds no credentials.
    """
    try:
        with hushed():
            from kaggle.api.kaggle_api_extended import KaggleApi

            api = KaggleApi()
            api.authenticate()
    except ImportError as error:
        raise ValueError(
            f'{url} needs Kaggle\'s client: pip install kaggle, or ".[kaggle]" of this checkout'
        ) from error
    except SystemExit as error:  # its way to say so
        raise ValueError(
            f"{url}: Kaggle's client finds no credentials; set KAGGLE_API_TOKEN or run: kaggle auth login"
        ) from error
    return api


_hush_lock = threading.Lock()
_hush: dict[str, Any] = {"depth": 0, "stdout": None}


@contextmanager
def hushed() -> Iterator[None]:
    """Keep off stdout what Kaggle's client prints there, which upload URLs may be among; several threads may do so."""
    with _hush_lock:
        if not _hush["depth"]:
            _hush["stdout"], sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115 (closed below)
        _hush["depth"] += 1
    try:
        yield
    finally:
        with _hush_lock:
            _hush["depth"] -= 1
            if not _hush["depth"]:
                sys.stdout.close()
                sys.stdout = _hush["stdout"]
