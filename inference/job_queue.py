"""Jobs one after another: one thread works, whoever else asks waits in line and sees how many are before him."""

import logging
import secrets
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_WAITING = 32
MAX_KEPT = 64  # finished jobs whose results stay

logger = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """As many jobs are waiting as are allowed to."""


class Cancelled(Exception):
    """The job was given up by who asked for it."""


@dataclass
class Job:
    """A piece of work. Its id cannot be guessed, so nobody meets the result of another.

    Attributes:
        id: names it in requests.
        state: ``waiting``, ``running``, ``done``, ``failed`` or ``cancelled``.
        step: what is being done, in words.
        done: how much of the step.
        total: of it; 0 where that is unknown.
        result: of the work, when done.
        error: one line, when failed.
        folder: of its own, for files of the result; removed with it.
    """

    id: str
    folder: Path
    state: str = "waiting"
    step: str = ""
    done: int = 0
    total: int = 0
    result: Any = None
    error: str | None = None
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    def progress(self, step: str, done: int = 0, total: int = 0) -> None:
        """Say what is being done; raises `Cancelled` where that is no longer wanted."""
        if self.is_cancelled.is_set():
            raise Cancelled
        self.step, self.done, self.total = step, done, total


class JobQueue:
    """Runs one job at a time, in the order in which they were asked for."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slidescribe_"))
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._waiting: list[tuple[Job, Callable[[Job], Any]]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Put ``work(job) -> result`` in the line.

        Raises:
            QueueFull: too many are waiting.
        """
        job_id = secrets.token_urlsafe(16)
        job = Job(job_id, self.folder / job_id)
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                raise QueueFull(f"{len(self._waiting)} others are waiting; try again later")
            self._jobs[job_id] = job
            self._waiting.append((job, work))
            self._forget_oldest()
            self._changed.notify()
        return job

    def find(self, job_id: str) -> Job:
        """The job of an id; KeyError where there is none, or no longer."""
        return self._jobs[job_id]

    def position(self, job: Job) -> int:
        """How many jobs are before this one, the running one among them; 0 when it runs or has run."""
        with self._changed:
            order = [waiting for waiting, _ in self._waiting]
            if job not in order:
                return 0
            return order.index(job) + sum(other.state == "running" for other in self._jobs.values())

    def cancel(self, job: Job) -> None:
        """Give a job up: at once where it waits, at its next sign of progress where it runs."""
        job.is_cancelled.set()
        with self._changed:
            if any(waiting is job for waiting, _ in self._waiting):
                self._waiting = [pair for pair in self._waiting if pair[0] is not job]
                job.state = "cancelled"

    def close(self) -> None:
        """Stop after the running job and remove the files of all results."""
        with self._changed:
            self._is_closed = True
            for job in self._jobs.values():
                job.is_cancelled.set()
            self._changed.notify()
        self._thread.join(timeout=5)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                job, work = self._waiting.pop(0)
                job.state = "running"
            try:
                job.result = work(job)
                job.state = "done"
            except Cancelled:
                job.state = "cancelled"
            except (ValueError, OSError) as error:
                job.error = " ".join(str(error).split())
                job.state = "failed"
            except Exception:  # the page lives on, whatever one slide does
                logger.exception("job failed")
                job.error = "something went wrong that should not; the terminal that runs the page shows what"
                job.state = "failed"

    def _forget_oldest(self) -> None:
        finished = [job for job in self._jobs.values() if job.state in ("done", "failed", "cancelled")]
        for job in finished[: max(0, len(finished) - MAX_KEPT)]:
            del self._jobs[job.id]
            shutil.rmtree(job.folder, ignore_errors=True)
