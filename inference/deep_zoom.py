"""Slides for a viewer that zooms: OpenSlide's Deep Zoom over the reader of stage 0, and slides kept open for a while.

Stage 0's reader opens all that can be reported on, shows what was never scanned as white, and never reads a label or a
macro image; so every pixel of the page comes through it.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import openslide
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from stage0_tiling.slide import Slide

TILE_PX = 254  # and one pixel of overlap on each side: 256, as Deep Zoom's makers advise
JPEG_QUALITY = 82
THUMBNAIL_SIDE = 320


class PyramidOfSlide(openslide.AbstractSlide):
    """A slide as Deep Zoom wants to see it: levels that halve down to one pixel, whatever levels the file has.

    Each level is read from the coarsest real one that is fine enough, so no pixel is resampled twice.
    """

    def __init__(self, slide: Slide):
        super().__init__()
        self.slide = slide
        sizes = [(slide.width, slide.height)]
        while max(sizes[-1]) > 1:
            sizes.append(tuple(max(1, -(-side // 2)) for side in sizes[-1]))
        self._sizes = tuple(sizes)

    def __repr__(self) -> str:
        return f"PyramidOfSlide({self.slide.path.name!r})"

    @classmethod
    def detect_format(cls, filename) -> str | None:
        return None

    def close(self) -> None:
        self.slide.__exit__()

    @property
    def level_count(self) -> int:
        return len(self._sizes)

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        return self._sizes

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        return tuple(float(2**level) for level in range(len(self._sizes)))

    @property
    def properties(self) -> dict[str, str]:
        return {}

    @property
    def associated_images(self) -> dict[str, Image.Image]:
        return {}  # label and macro image among them: never shown

    def get_best_level_for_downsample(self, downsample: float) -> int:
        fine = [level for level, has in enumerate(self.level_downsamples) if has <= downsample]
        return max(fine, default=0)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        x, y = location
        width, height = (side * 2**level for side in size)
        return Image.fromarray(self.slide.read_region(x, y, width, height, size)).convert("RGBA")

    def set_cache(self, cache: openslide.OpenSlideCache) -> None:
        pass


class ZoomedSlide:
    """An open slide with its Deep Zoom tiles as JPEG. Safe to read from several threads."""

    def __init__(self, path: Path):
        """Open ``path``; raises `SlideError` where stage 0 would."""
        self.slide = Slide(path)
        self._zoom = DeepZoomGenerator(PyramidOfSlide(self.slide), tile_size=TILE_PX, overlap=1)

    def close(self) -> None:
        self.slide.__exit__()

    @property
    def max_level(self) -> int:
        """The level of full resolution; level 0 is one pixel."""
        return self._zoom.level_count - 1

    def tile(self, level: int, column: int, row: int) -> bytes:
        """JPEG of one tile without metadata.

        Raises:
            ValueError: there is no such tile.
            SlideError: it cannot be read.
        """
        picture = self._zoom.get_tile(level, (column, row))
        return _jpeg(picture)

    def thumbnail(self) -> bytes:
        """JPEG of the whole slide without metadata."""
        zoom = min(1.0, THUMBNAIL_SIDE / max(self.slide.width, self.slide.height))
        size = max(1, round(self.slide.width * zoom)), max(1, round(self.slide.height * zoom))
        return _jpeg(Image.fromarray(self.slide.read_whole(*size)))


@dataclass
class _Borrowed:
    """A slide that is open, or about to be, and how many read from it."""

    slide: ZoomedSlide | None = None
    users: int = 0
    opening: threading.Lock = field(default_factory=threading.Lock)


class OpenSlides:
    """Slides that stay open while they are looked at; the ones not looked at for longest are closed.

    More than ``limit`` are open only while as many are being read at the same moment.
    """

    def __init__(self, limit: int = 8):
        self._limit = limit
        self._lock = threading.Lock()
        self._slides: OrderedDict[tuple, _Borrowed] = OrderedDict()

    @contextmanager
    def borrow(self, path: Path) -> Iterator[ZoomedSlide]:
        """The open slide; it is not closed before the block ends. A file that was replaced is opened anew."""
        status = path.stat()
        key = str(path), status.st_mtime_ns, status.st_size
        with self._lock:
            borrowed = self._slides.setdefault(key, _Borrowed())
            self._slides.move_to_end(key)
            borrowed.users += 1
        try:
            with borrowed.opening:  # its own lock: who looks at another slide does not wait for this one
                if borrowed.slide is None:
                    borrowed.slide = ZoomedSlide(path)
            yield borrowed.slide
        finally:
            with self._lock:
                borrowed.users -= 1
                if borrowed.slide is None and not borrowed.users:
                    del self._slides[key]
                self._close_idle()

    def _close_idle(self) -> None:
        for key, borrowed in list(self._slides.items()):
            if len(self._slides) <= self._limit:
                return
            if not borrowed.users:
                del self._slides[key]
                borrowed.slide.close()


def _jpeg(picture: Image.Image) -> bytes:
    import numpy as np

    pixels = cv2.cvtColor(np.asarray(picture.convert("RGB")), cv2.COLOR_RGB2BGR)
    succeeded, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert succeeded
    return jpeg.tobytes()
