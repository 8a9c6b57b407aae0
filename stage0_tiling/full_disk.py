"""A full disk: told from other failures, and said in one line."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FREE_BYTES = 1 << 30  # to go on after a full disk: room for the features of the largest slides


class DiskFull(Exception):
    """Nothing more can be written to the output folder."""

    def __init__(self, folder: Path):
        super().__init__(f"no space left in {folder}; free some, then run again")


def is_full(error: BaseException | None) -> bool:
    """Whether an error means that there was no space left, on the disk or in the user's quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_still_full(folder: Path, error: OSError) -> bool:
    """Whether the next slide would meet the same error; a quota's free space cannot be asked for."""
    if error.errno == errno.EDQUOT or shutil.disk_usage(folder).free < FREE_BYTES:
        return True
    return os.statvfs(folder).f_files > 0 and os.statvfs(folder).f_favail == 0


@contextmanager
def ending_on_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a write that found no space into DiskFull."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise DiskFull(folder) from error
