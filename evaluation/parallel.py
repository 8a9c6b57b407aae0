"""Work on texts in several processes."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from typing import Any

_inherited: list[Any] = []


def map_in_processes(
    work: Callable[[Any, Any], Any], shared: Any, tasks: Sequence[Any], *, plain: bool = True
) -> list[Any]:
    """`[work(shared, task) for task in tasks]` in as many forked processes as there are cores.

    Children inherit `shared`, so only tasks and results are sent. One task, one core, `plain` False (something that may
    not survive a fork, such as a neural model) or a system without fork: done here, one after the other.
    """
    workers = min(os.cpu_count() or 1, len(tasks))
    if not plain or workers < 2 or "fork" not in get_all_start_methods():
        return [work(shared, task) for task in tasks]
    _inherited[:] = [work, shared]
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            return list(pool.map(_do, tasks))
    finally:
        _inherited.clear()


def _do(task: Any) -> Any:
    work, shared = _inherited
    return work(shared, task)


def slices(number: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `number` items; at least one."""
    return [slice(start, start + size) for start in range(0, max(number, 1), size)]
