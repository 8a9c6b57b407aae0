"""Kaggle datasets as source: those that kaggle_target.py numbered, or any single one."""

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from stage0_tiling.transfer.kaggle_sets import GAP, INDEX, KaggleSets
from stage0_tiling.transfer.listing import Item

READ_BYTES = 1 << 18


class KaggleSource:
    """The dataset kaggle://owner/name where there is one, else name-1, -2, ... with the paths of their indexes."""

    copies = 2  # the client downloads the whole of a file before any of it can be read

    def __init__(self, url: str, work_dir: Path) -> None:
        self._sets = KaggleSets(url)
        self.name = self._sets.url
        self._work_dir = work_dir
        self._places: dict[str, tuple[str, str]] = {}

    def list_items(self) -> list[Item]:
        items = {item.path: item for dataset in self._datasets() for item in self._list(dataset)}
        if not items:
            raise FileNotFoundError(f"neither {self._sets.dataset(None)} nor {self._sets.dataset(1)} can be seen")
        return [items[path] for path in sorted(items)]

    def read(self, item: Item, offset: int) -> Iterator[bytes]:
        dataset, name = self._places[item.path]
        folder = self._work_dir / "read" / f"{dataset}/{name}".replace("/", "_")
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            file = stack.enter_context(_open(self._sets.download(dataset, name, folder), item.size))
            file.seek(offset)
            while block := file.read(READ_BYTES):
                yield block

    def delete(self, item: Item) -> None:
        raise OSError("a file of a Kaggle dataset cannot be deleted alone")

    def _datasets(self) -> Iterator[str]:
        if self._sets.status(self._sets.dataset(None)) is not None:
            yield self._sets.dataset(None)
            return
        number = last = 0
        while number < last + GAP:
            number += 1
            if self._sets.status(self._sets.dataset(number)) is not None:
                last = number
                yield self._sets.dataset(number)

    def _list(self, dataset: str) -> Iterator[Item]:
        shown = self._sets.files(dataset)
        known = {each.name: each for each in self._sets.index(dataset)} if INDEX in shown else {}
        for name, file in shown.items():
            if name == INDEX:
                continue
            path = known[name].path if name in known else name
            sums = {"sha256": known[name].sha256} if name in known else {}
            self._places[path] = (dataset, name)
            yield Item(path, int(file.total_bytes), f"{dataset} {file.creation_date}", sums)


def _open(file: Path, size: int) -> BinaryIO:
    """Open a download; Kaggle packs some single files into an archive on the way."""
    if file.stat().st_size != size and zipfile.is_zipfile(file):
        archive = zipfile.ZipFile(file)
        return archive.open(archive.infolist()[0])
    return file.open("rb")
