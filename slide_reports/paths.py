"""Names in annotation files to files: found under a root, and refused when they leave it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from slide_features import FEATURE_SUFFIXES
from slide_reports.record import slide_id_of

MAX_NAME = 255  # bytes of a name in a folder, on every file system in use


class Folders:
    """Where the inputs of one annotation file lie. Folders are listed once, so that a million names are looked up fast.

    Attributes:
        features_dir: of feature files, or None.
        image_root: of images, or None.
        free: a folder of our own, in which absolute names of images may lie; or None.
    """

    def __init__(self, features_dir: Path | None, image_root: Path | None, free: Path | None = None):
        self.features_dir = features_dir
        self.image_root = image_root
        self.free = free
        self._listing = cache(_list_folder)
        self._resolved = cache(os.path.realpath)
        self._find_plain = lru_cache(maxsize=2**16)(self._lookup)  # many records may be about one slide

    def locate(self, where: str, kind: str, name: str) -> Path:
        """The file that a record names.

        Args:
            where: the record, for messages.
            kind: `slide` for the feature file of a slide, whichever suffix it has, `features`, or `image`.
            name: as in the annotation file.

        Raises:
            ValueError: the folder for this kind was not given, or the name leads out of it, also through links.
        """
        known = self._find_plain(kind, name)
        if known is not None:
            return known
        is_image = kind == "image"
        root = self.image_root if is_image else self.features_dir
        if root is None and is_image and self.free is not None and Path(name).is_relative_to(self.free):
            return self._inside(where, self.free, name)
        if root is None:
            flag, holds = ("--image_root", "images") if is_image else ("--features_dir", "slide reports")
            raise ValueError(
                f"{where} holds {holds}; give the folder of {'them' if is_image else 'feature files'} with {flag}"
            )
        if kind != "slide":
            return self._inside(where, root, name)
        stems = dict.fromkeys([slide_id_of(name), Path(name).stem, name])
        candidates = [self._inside(where, root, stem + suffix) for stem in stems for suffix in FEATURE_SUFFIXES]
        return next((path for path in candidates if self._exists(path)), candidates[0])

    def _lookup(self, kind: str, name: str) -> Path | None:
        """The file of a name that is there, in the folder itself and no link: nothing else about it needs a look."""
        root = self.image_root if kind == "image" else self.features_dir
        if root is None or "/" in name or os.sep in name:
            return None
        stem = slide_id_of(name)
        files = [stem + suffix for suffix in FEATURE_SUFFIXES] if kind == "slide" else [name]
        listing = self._listing(str(root))
        found = next((file for file in files if file in listing), None)
        return None if found is None or listing[found] else root / found

    def _inside(self, where: str, root: Path, name: str) -> Path:
        if any(len(os.fsencode(part)) > MAX_NAME for part in name.split("/")):
            raise ValueError(
                f"{where} names {name[:80]!r}…, longer than a file's name may be ({MAX_NAME} bytes); is it a text?"
            )
        path = root / name
        if "\0" in name or path == root or not self._is_below(path, root):
            raise ValueError(
                f"{where} names {name[:80]!r}, which lies outside {root} (links are followed); "
                "name the folder that really holds it"
            )
        return path

    def _is_below(self, path: Path, root: Path) -> bool:
        folder, file = os.path.split(path)
        if file in ("", ".", ".."):
            return False
        real = os.path.join(self._resolved(folder), file)
        if self._listing(folder).get(file):  # a link
            real = self._resolved(str(path))
        return Path(real).is_relative_to(self._resolved(str(root)))

    def _exists(self, path: Path) -> bool:
        folder, file = os.path.split(path)
        return file in self._listing(folder)


class GivenSlides:
    """Slides themselves in the place of folders: records name them as they name their feature files.

    Attributes:
        slides: paths by slide_id.
    """

    def __init__(self, slides: Mapping[str, Path]):
        self.slides = slides

    def locate(self, where: str, kind: str, name: str) -> Path:
        """The slide that a record names.

        Raises:
            ValueError: it names something else, or a slide that was not given.
        """
        found = self.slides.get(name) or self.slides.get(slide_id_of(name))
        if kind != "slide" or found is None:
            raise ValueError(f"{where}: {name[:80]} is not among --slides; add it, or leave the record out")
        return found


@dataclass(frozen=True)
class JustNames:
    """In the place of folders where no input is opened: one file has one path, which need not be there.

    Attributes:
        root: that names are relative to, as far as that is known.
    """

    root: Path = Path()

    def locate(self, where: str, kind: str, name: str) -> Path:
        """The path of what a record names."""
        return self.root / (slide_id_of(name) if kind == "slide" else os.path.normpath(name))


def _list_folder(folder: str) -> dict[str, bool]:
    """Names in a folder, and whether each is a link; nothing where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries}
    except OSError:
        return {}
