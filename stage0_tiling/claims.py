"""Who works on which slide, so that any number of processes and machines share one output folder.

    OUT/claims/<slide_id>.<n>.json   host, process, token; its time of change is the owner's heartbeat

Whoever creates the file first has the slide. The file goes when the slide is settled, so one whose owner is dead was
left by a crash. Such a slide is claimed by creating the file of the next number: creating decides between those who
try, no file is ever renamed or rewritten, and the number tells how many processes have died at this slide. Nothing is
needed of the file system but that one file is created once (POSIX; NFS from version 3).
"""

import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

HEARTBEAT_S = 30.0
STALE_S = 300.0  # a file server may show times of change up to a minute late


@dataclass(frozen=True)
class Owner:
    """A process, told apart from all others on all machines.

    Attributes:
        host: name of the machine.
        machine: a machine's start and its view of process numbers, which a container does not share.
        pid: process number.
        started: when it began, in clock ticks of the machine, as process numbers are used again; 0 if unknown.
    """

    host: str
    machine: str
    pid: int
    started: int

    def is_dead(self) -> bool:
        """Whether the process has surely ended. Nothing is known of processes of other machines."""
        if self.machine != this_process().machine:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # it lives, and is another user's
        state, started = _process_state(self.pid)
        return state == "Z" or 0 not in (started, self.started) and started != self.started


def this_process() -> Owner:
    """The owner that this process is."""
    return _this_process(os.getpid())


@cache
def _this_process(pid: int) -> Owner:
    try:
        machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        machine = socket.gethostname()
    return Owner(socket.gethostname(), machine, pid, _process_state(pid)[1])


def _process_state(pid: int) -> tuple[str, int]:
    """State (`Z` for one that has ended) and start of a process, from Linux; unknown elsewhere."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except OSError:
        return "", 0


@dataclass(frozen=True)
class Claim:
    """A slide that this process works on.

    Attributes:
        slide_id: of the slide.
        path: the claim's file.
        token: what the file says, so that it is known again.
        deaths: how many processes have died while they worked on this slide.
    """

    slide_id: str
    path: Path
    token: str
    deaths: int


class Claims:
    """The claims of this process on the slides of one output folder; `with` keeps them alive and gives them back."""

    def __init__(self, folder: str | Path, *, heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S):
        """Name the folder of the claim files.

        Args:
            folder: made when missing.
            heartbeat_s: seconds between signs of life.
            stale_s: seconds without one after which a claim counts as left by a dead process.
        """
        self.folder = Path(folder)
        self.heartbeat_s = heartbeat_s
        self.stale_s = stale_s
        self._held: dict[str, Claim] = {}
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Claims":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heart.join()
        for claim in list(self._held.values()):
            self.give_back(claim)

    def take(self, slide_id: str, *, after_deaths: bool = False) -> Claim | None:
        """Claim a slide; None if another process has it.

        What the slide's state says must be read after this, not before: its last owner may just have settled it.

        Args:
            slide_id: of the slide.
            after_deaths: take a slide at which a process died as well, which may be deadly; else it is left alone.
        """
        left = self._paths(slide_id)
        if left and not (after_deaths and self._is_left(left[-1])):
            return None
        path = self._path(slide_id, len(left))
        claim = Claim(slide_id, path, secrets.token_hex(8), deaths=len(left))
        stored = {"token": claim.token, "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | asdict(this_process())
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return None
        self._held[slide_id] = claim
        try:
            with open(descriptor, "w") as file:
                json.dump(stored, file)
        except OSError:
            del self._held[slide_id]
            path.unlink(missing_ok=True)
            raise
        return claim

    def is_valid(self, claim: Claim) -> bool:
        """Whether this process still has the slide: after a long standstill, another may have taken it over."""
        stored = _read(claim.path)
        return stored.get("token") == claim.token and not self._path(claim.slide_id, claim.deaths + 1).exists()

    def settle(self, claim: Claim) -> None:
        """Give a slide back whose state is written: its claims go, those of dead owners too.

        Where another process has taken it over, all stay: numbers that are gone would hide that one's claim.
        """
        is_ours = self.is_valid(claim)
        self.give_back(claim)
        if not is_ours:
            return
        for number in range(claim.deaths - 1, -1, -1):
            path = self._path(claim.slide_id, number)
            if self._is_left(path):
                path.unlink(missing_ok=True)

    def give_back(self, claim: Claim) -> None:
        """Give a slide back that is not done, because the run ends; how many processes died at it stays known."""
        self._held.pop(claim.slide_id, None)
        if self.is_valid(claim):
            claim.path.unlink(missing_ok=True)

    def owner(self, slide_id: str) -> str | None:
        """Name the living process that has a slide, for messages; None if there is none."""
        paths = self._paths(slide_id)
        if not paths or self._is_left(paths[-1]):
            return None
        stored = _read(paths[-1])
        return f"{stored.get('host', 'unknown host')}, process {stored.get('pid', 'unknown')}"

    def forget(self, slide_id: str) -> None:
        """Delete the claims on a slide that is not in work, and with them how many processes died at it."""
        for path in reversed(self._paths(slide_id)):
            path.unlink(missing_ok=True)

    def _paths(self, slide_id: str) -> list[Path]:
        """The claims on a slide, the one that counts last; the others were left by dead processes."""
        paths = []
        while (path := self._path(slide_id, len(paths))).exists():
            paths.append(path)
        return paths

    def _path(self, slide_id: str, number: int) -> Path:
        return self.folder / f"{slide_id}.{number}.json"

    def _is_left(self, path: Path) -> bool:
        """Whether the owner of a claim is dead: known on this machine, else by its heartbeat."""
        stored = _read(path)
        names = ("host", "machine", "pid", "started")
        if all(name in stored for name in names) and Owner(*(stored[name] for name in names)).is_dead():
            return True
        try:
            return self._server_time() - os.stat(path).st_mtime > self.stale_s
        except FileNotFoundError:
            return False

    def _server_time(self) -> float:
        """What the clock of the file server says, which the times of change of the claims come from."""
        probe = self.folder / f".{secrets.token_hex(8)}.clock"
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat_s):
            for claim in list(self._held.values()):
                try:
                    os.utime(claim.path)
                except OSError:  # the claim is gone, or the server for a while; `is_valid` tells
                    continue


def _read(path: Path) -> dict:
    """What a claim's file says; nothing while it is being written, or if it is gone."""
    try:
        # opening it asks a file server anew, where a look at its name may be answered from memory
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
