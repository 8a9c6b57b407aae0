"""How far a run is: slides done and left, tiles per second, time left."""

import threading
import time

from tqdm import tqdm

REFRESH_S = 0.5


class Progress:
    """A bar over the slides of a run on stderr, shown while in `with`. Safe to use from several threads."""

    def __init__(self, num_slides: int, description: str):
        """Count `num_slides` slides, those that other processes do as well."""
        self._total, self._description = num_slides, description
        self._lock = threading.Lock()
        self._settled: set[str] = set()
        self._num_tiles = 0
        self._shown = 0.0

    def __enter__(self) -> "Progress":
        self._started = time.perf_counter()
        self._bar = tqdm(total=self._total, unit="slide", desc=self._description, smoothing=0.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def settled(self, slide_id: str) -> None:
        """Count a slide that is done or has failed, once."""
        with self._lock:
            if slide_id not in self._settled:
                self._settled.add(slide_id)
                self._describe()
                self._bar.update()

    def tiles(self, number: int) -> None:
        """Count tiles of a slide in work."""
        with self._lock:
            self._num_tiles += number
            if time.perf_counter() - self._shown > REFRESH_S:
                self._describe()
                self._bar.refresh()

    def _describe(self) -> None:
        self._shown = time.perf_counter()
        text = f"{self._total - len(self._settled)} left"
        if self._num_tiles:
            text = f"{self._num_tiles / (self._shown - self._started):.0f} tiles/s, {text}"
        self._bar.set_postfix_str(text, refresh=False)
