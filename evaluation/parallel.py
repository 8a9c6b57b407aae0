"""Work on texts in several processes."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from typing import Any

FEWEST_ITEMS = 5000  # with fewer, processes take longer to begin than the work does
_received: list[Any] = []


def map_in_processes(
    work: Callable[[Any, Any], Any],
    shared: Any,
    tasks: Sequence[Any],
    *,
    num_items: int,
    plain: bool = True,
    imports: Sequence[str] = (),
) -> list[Any]:
    """`[work(shared, task) for task in tasks]` in as many processes as there are cores.

    The processes come from a fork server, which has no threads, whatever this process has imported; it imports the
    module of `work` and `imports` once for all of them. `shared` is sent once to each, and must survive pickling. Few
    items in all tasks, one core, `plain` False (neural models, which would be loaded in each) or a system without fork
    servers: done here, one after the other.
    """
    workers = min(os.cpu_count() or 1, len(tasks))
    if not plain or workers < 2 or num_items < FEWEST_ITEMS or "forkserver" not in get_all_start_methods():
        return [work(shared, task) for task in tasks]
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", work.__module__, *imports])
    with ProcessPoolExecutor(workers, context, initializer=_receive, initargs=(work, shared)) as pool:
        return list(pool.map(_do, tasks))


def _receive(*work_and_shared: Any) -> None:
    _received[:] = work_and_shared


def _do(task: Any) -> Any:
    work, shared = _received
    return work(shared, task)


def slices(number: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `number` items; at least one."""
    return [slice(start, start + size) for start in range(0, max(number, 1), size)]
