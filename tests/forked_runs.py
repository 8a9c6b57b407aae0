"""Runs of the project's commands in forks of one process that has imported everything, so that each costs no import.

Processes of one run are started as torchrun starts them: by environment variables. The parent must use one thread
(``OMP_NUM_THREADS=1``) and compute nothing before it forks.
"""

import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# What the commands import only when they need it, and every fork would import anew.
for name in ("bitsandbytes", "peft", "timm", "matplotlib.pyplot", "transformers.models.gemma3n.modeling_gemma3n"):
    importlib.import_module(name)


@dataclass
class ForkedRun:
    """Processes of one command, by rank."""

    pids: list[int]
    output: Path

    def kill(self) -> None:
        """SIGKILL to all at once, as when a machine goes away."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)

    def wait(self) -> list[int]:
        """Exit statuses; -9 for those that were killed."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def has_ended(self) -> bool:
        """Whether the first process has ended, without taking its status away."""
        return os.waitid(os.P_PID, self.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def fork_run(
    main: Callable[[], int],
    words: Sequence[object],
    output: Path,
    *,
    processes: int = 1,
    env: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> ForkedRun:
    """Start ``main`` with a command line on so many processes; what it prints goes to ``output``."""
    variables = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | dict(env or {})
    if processes > 1:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        variables |= {"LOCAL_WORLD_SIZE": str(processes)}
    pids = []
    for rank in range(processes):
        of_rank = variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
        pid = os.fork()
        if pid == 0:
            _become(main, words, output, of_rank, before)
        pids.append(pid)
    return ForkedRun(pids, output)


def finish_run(*arguments: object, **options: object) -> str:
    """Run a command to its end and return what it printed; AssertionError unless it left with 0."""
    run = fork_run(*arguments, **options)
    statuses = run.wait()
    printed = run.output.read_text()
    assert set(statuses) == {0}, f"left with {statuses}:\n{printed[-4000:]}"
    return printed


def kill_after(run: ForkedRun, seconds: float) -> bool:
    """Kill a run at a moment after its start; False if it had ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if run.has_ended():
            run.wait()
            return False
        time.sleep(0.002)
    run.kill()
    return -signal.SIGKILL in run.wait()


def free_port() -> int:
    """A port that no other process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _become(main, words, output: Path, variables: Mapping[str, str], before) -> None:
    """Be the command, in a fork; never returns."""
    status = 70
    try:
        os.environ.update(variables)
        with output.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = [main.__module__, *map(str, words)]
        if before is not None:
            before()
        from command_line import run

        run(main)
    except SystemExit as left:
        status = left.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
