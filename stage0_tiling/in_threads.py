"""Work that runs ahead of the one who needs it, in threads."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
END = object()


def in_threads(items: Iterator[Item], work: Callable[[Item], Result], num_threads: int) -> Iterator[Result]:
    """Yield `work(item)` of all items, as they get ready, while threads work on the next ones.

    An item is taken from `items` when a thread is free for it. At most `num_threads` + 1 items are taken whose result
    the caller has not done with. Close the generator to end the threads, which finish what they are at.

    Args:
        items: taken by the threads, one at a time.
        work: what to do with an item; what it raises is raised here.
        num_threads: at least 1.
    """
    num_threads = max(1, num_threads)
    results: queue.SimpleQueue = queue.SimpleQueue()
    room, taking, stop = threading.Semaphore(num_threads + 1), threading.Lock(), threading.Event()

    def go() -> None:
        try:
            while True:
                room.acquire()
                with taking:
                    if stop.is_set():
                        return
                    item = next(items, END)
                if item is END:
                    room.release()  # for a thread that waits, to see that nothing is left
                    return
                results.put((work(item), None))
        except BaseException as error:
            results.put((None, error))
        finally:
            results.put(None)

    threads = [threading.Thread(target=go, daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        ended = 0
        while ended < num_threads:
            result = results.get()
            if result is None:
                ended += 1
            elif result[1] is not None:
                raise result[1]
            else:
                yield result[0]
                room.release()
    finally:
        stop.set()
        room.release(num_threads)
        for thread in threads:
            thread.join()
