"""The slides of a run, one after another: taken, worked on, recorded. What tile.py and encode.py share.

Any number of processes, here or on other machines, may run on one output folder: each takes slides through `Claims`.
A slide at which a process died is left for last and then done with nothing beside it, so that the second death is
surely its own; it is then recorded as failed, and no run tries it again by itself.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from command_line import DONE, SOME_FAILED, counted, first_line, log_to_stderr
from stage0_tiling.claims import Claim, Claims
from stage0_tiling.full_disk import DiskFull, ending_on_full_disk, is_full, is_still_full
from stage0_tiling.in_threads import in_threads
from stage0_tiling.local_cache import LocalCache
from stage0_tiling.progress import Progress
from stage0_tiling.run_table import MAX_DEATHS, RunFolder, SlideRow, SlideState
from stage0_tiling.slide_list import SlideEntry

LONGEST_RUN = timedelta(days=30)  # processes wait for the slowest one; the default of 30 minutes would end the run

logger = logging.getLogger("stage0_tiling")


class ProcessDied(Exception):
    """The processes that worked on a slide ended without a word, `deaths` of them."""

    def __init__(self, deaths: int):
        self.deaths = deaths
        super().__init__(
            f"the process that worked on it died {deaths} times (a crash in a decoder, or out of memory); "
            "to try it again, run this slide alone with --overwrite"
        )


@dataclass
class Taken:
    """A slide that this process has claimed.

    Attributes:
        entry: the slide.
        claim: on it.
        path: where to read it: its own path, or that of a copy.
    """

    entry: SlideEntry
    claim: Claim
    path: Path

    @property
    def source(self) -> SlideEntry:
        """The slide at the place where to read it."""
        return replace(self.entry, path=self.path)


class SlideRun:
    """What one command does with some slides in one output folder, as one process sees it.

    Attributes:
        entries: all slides of the command.
        missing: those that were to be done when it began.
    """

    def __init__(
        self,
        entries: list[SlideEntry],
        folder: RunFolder,
        is_missing: Callable[[SlideEntry], bool],
        *,
        description: str,
        cache: LocalCache | None = None,
    ):
        """Find out what is to be done; processes that begin together must all have done so before one goes on.

        Args:
            entries: slides.
            folder: where results and records lie.
            is_missing: whether a slide is still to be done; raises ValueError if it was done with other settings.
            description: of the progress bar.
            cache: where to copy slides before they are read.
        """
        self.entries = entries
        self.missing = [entry for entry in entries if is_missing(entry)]
        self.progress = Progress(len(self.missing), description)
        self._folder = folder
        self._is_missing = is_missing
        self._cache = cache
        self._claims = Claims(folder.folder / "claims")
        states = (folder.read_state(entry.slide_id) for entry in self.missing)
        self._failed_before = {s.row.slide_id: s.recorded_by for s in states if s and s.row.status == "failed"}
        self._is_stopped = False
        self._started = time.perf_counter()

    def do(
        self,
        prepare: Callable[[SlideEntry], SlideState | None],
        finish: Callable[[SlideEntry], SlideState] | None = None,
        *,
        num_threads: int,
    ) -> None:
        """Do all slides that no other process does. A slide that fails is recorded as failed and the others go on.

        Args:
            prepare: first part of the work, in threads; returns what to record, or None if there is nothing new.
            finish: second part, in the caller's thread, while the next slides are prepared.
            num_threads: that prepare slides; one slide more is in work at a time, which bounds memory.
        """

        def ready(taken: Taken) -> Taken | None:
            return self.step(taken, partial(self._prepare, taken, prepare), is_last=finish is None)

        def end(taken: Taken | None) -> None:
            if taken is not None:
                self.step(taken, partial(finish, taken.source), is_last=True)

        if not self.missing:
            return
        with self.working():
            with closing(in_threads(self.take(), ready, num_threads)) as prepared, self._stopping_copies():
                for taken in prepared:
                    end(taken)
            num_taken = -1
            while num_taken:
                num_taken = 0
                for taken in self.take(after_deaths=True):
                    end(ready(taken))
                    num_taken += 1

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the claims and show progress. A full disk ends the block, and is remembered.

        SIGTERM, which schedulers send before they kill, interrupts, so that the claims are given back.
        """
        with self.progress, logging_redirect_tqdm(), terminating_as_interrupt(), self._claims:
            try:
                yield
            except DiskFull as error:
                self._is_stopped = True
                logger.error("%s", error)

    def take(self, *, after_deaths: bool = False) -> Iterator[Taken]:
        """Claim slide after slide, skipping those that others have done or have in work.

        Args:
            after_deaths: take those as well at which a process died; each must be done before the next is taken.
        """
        for entry in self.missing:
            if not self._is_wanted(entry):
                self.progress.settled(entry.slide_id)
                continue
            with ending_on_full_disk(self._folder.folder):
                claim = self._claims.take(entry.slide_id, after_deaths=after_deaths)
            if claim is None:
                continue
            self._folder.check_begun()
            taken = Taken(entry, claim, entry.path)
            if not self._is_wanted(entry):  # done between the look and the claim
                self._settle(taken)
                continue
            if claim.deaths:
                self._folder.remove_leftovers(entry)
            if claim.deaths >= MAX_DEATHS:
                self.fail(taken, ProcessDied(claim.deaths))
                continue
            yield taken

    def step(self, taken: Taken, work: Callable[[], SlideState | None], *, is_last: bool) -> Taken | None:
        """Do a part of a slide's work and record it with its seconds. The one place where a bad slide is held back.

        Returns:
            `taken`, or None if the slide is settled: after its last part, or because it failed.

        Raises:
            DiskFull: if nothing more can be written.
        """
        started, failure = time.perf_counter(), None
        try:
            state = work()
        except Exception as error:
            failure = error
            state = self._failed(taken.entry, DiskFull(self._folder.folder) if is_full(error) else error)
        if not self._claims.is_valid(taken.claim):
            logger.warning("%s: taken over by another process while this one stood still", taken.entry.slide_id)
            return self._settle(taken)
        if state is not None:
            seconds = round((state.row.seconds or 0.0) + time.perf_counter() - started, 3)
            row = replace(state.row, path=str(taken.entry.path), seconds=seconds)
            with ending_on_full_disk(self._folder.folder):
                self._folder.write_state(replace(state, row=row, recorded_by=taken.claim.token))
        if failure is None and not is_last:
            return taken
        self._settle(taken)
        if is_full(failure) and is_still_full(self._folder.folder, failure):
            raise DiskFull(self._folder.folder)
        return None

    def fail(self, taken: Taken, error: Exception) -> None:
        """Record a slide as failed."""

        def work() -> SlideState:
            raise error

        self.step(taken, work, is_last=True)

    def write_table(self) -> None:
        """Write slides.csv; on a full disk the last one stays."""
        try:
            self._folder.write_table()
        except OSError as error:
            if not is_full(error):
                raise
            logger.error("%s is not up to date: no space left", self._folder.folder / "slides.csv")

    def report(self, *, is_quiet: bool = False) -> int:
        """Log what became of the slides, list those that failed, and return the exit status."""
        states = {entry.slide_id: self._folder.read_state(entry.slide_id) for entry in self.entries}
        failed = [state.row for state in states.values() if state and state.row.status == "failed"]
        names = {row.slide_id for row in failed}
        left = {e.slide_id for e in self.missing if e.slide_id not in names and self._is_missing(e)}
        if not is_quiet:
            self._log([state.row for name, state in states.items() if state and name not in left], len(left))
            for row in failed:
                logger.error("failed: %s: %s", row.slide_id, row.error)
        return SOME_FAILED if failed or self._is_stopped else DONE

    def _log(self, rows: list[SlideRow], num_left: int) -> None:
        counts = [f"{sum(row.status == status for row in rows)} {status}" for status in ("done", "empty", "failed")]
        if num_left:
            counts.append(f"{num_left} {'not done' if self._is_stopped else 'in work elsewhere'}")
        had_to = {entry.slide_id for entry in self.missing}
        num_tiles = sum(row.n_tiles or 0 for row in rows if row.slide_id in had_to and row.status == "done")
        seconds = time.perf_counter() - self._started
        speed = f"{counted(num_tiles, 'tile')} in {seconds:.0f} s, {num_tiles / seconds:.0f} tiles/s"
        logger.info("%s; %s; see %s", ", ".join(counts), speed, self._folder.folder / "slides.csv")

    def _is_wanted(self, entry: SlideEntry) -> bool:
        """Whether a slide is still to be done; one that failed since this run began is not."""
        state = self._folder.read_state(entry.slide_id)
        if state and state.row.status == "failed":
            name, known = entry.slide_id, self._failed_before
            if name not in known or known[name] != state.recorded_by:
                return False
        return self._is_missing(entry)

    def _prepare(self, taken: Taken, prepare: Callable[[SlideEntry], SlideState | None]) -> SlideState | None:
        if self._cache:
            taken.path = self._cache.stage(taken.entry.path)
        return prepare(taken.source)

    def _settle(self, taken: Taken) -> None:
        """Give back a slide that is done, or has failed, or is no longer ours."""
        self._claims.settle(taken.claim)
        if self._cache:
            self._cache.drop(taken.path)
        self.progress.settled(taken.entry.slide_id)

    @contextmanager
    def _stopping_copies(self) -> Iterator[None]:
        """When the run is cut short, let no thread wait for room that nobody will make any more."""
        try:
            yield
        except BaseException:
            if self._cache:
                self._cache.stop()
            raise

    def _failed(self, entry: SlideEntry, error: Exception) -> SlideState:
        message = first_line(error)
        logger.error("%s failed: %s", entry.slide_id, message)
        logger.debug("%s", entry.path, exc_info=True)
        new = SlideState(SlideRow(entry.slide_id, str(entry.path), "failed"))
        known = self._folder.read_state(entry.slide_id) or new
        row = replace(known.row, status="failed", error=message, seconds=None)
        return replace(known, row=row, deaths=error.deaths if isinstance(error, ProcessDied) else 0)


def start_logging() -> None:
    """Log to stderr: our own progress, and warnings of others."""
    log_to_stderr(logger)


@contextmanager
def terminating_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, which schedulers send before they kill, interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can say what a signal does
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
