"""How much of training is spent waiting for data."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

WORTH_MENDING = 0.05  # share of the time from which advice is given


class TimedBatches:
    """Batches of a loader, with the share of time spent waiting for them.

    Attributes:
        batches: the loader.
    """

    def __init__(self, batches: Iterable[Any]):
        self.batches = batches
        self._waited = self._waited_before = 0.0
        self._total = 0.0
        self._mark = time.perf_counter()

    def restart(self) -> None:
        """Begin to measure here: what passed since the last step is not of training."""
        self._mark = time.perf_counter()

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - asked
            yield batch

    def fraction_since_last(self) -> float:
        """Share of the time since the last call (or `restart`) that was spent waiting."""
        now = time.perf_counter()
        passed, waited = now - self._mark, self._waited - self._waited_before
        self._mark, self._waited_before = now, self._waited
        self._total += passed
        return round(min(1.0, waited / passed), 4) if passed else 0.0

    def told(self) -> str:
        """The share of all steps' time in a line for the terminal, with what would lower it; empty before a step."""
        if self.fraction is None:
            return ""
        advice = "; more --num_workers may help" if self.fraction > WORTH_MENDING else ""
        return f"waited for data in {self.fraction:.1%} of the time of training{advice}"

    @property
    def fraction(self) -> float | None:
        """Share of all steps' time that was spent waiting; None before the first step."""
        return min(1.0, self._waited / self._total) if self._total else None
