"""Want of memory: which errors say so, and what may be done about it, in a line."""

from collections.abc import Iterator
from contextlib import contextmanager

LIGHTER = "--load_in nf4 or --dtype bf16"
LOADING = f"load the model lighter, with {LIGHTER}, or on a GPU Gemma-3n's table apart, with --ple_device cpu"
READING = "read tiles with fewer --num_workers and a smaller --tile_batch_size, or leave memory to this process"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is for want of memory, of a GPU or of the CPU."""
    from stage0_tiling.tile_encoder import is_out_of_memory as failed_for_memory

    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and failed_for_memory(error))


def memory_line(error: BaseException, mend: str) -> str:
    """What to tell of such an error, in a line."""
    said = " ".join(str(error).split()).partition(". ")[0][:160]
    return f"out of memory{f' ({said})' if said else ''}; {mend}"


def decoding_mend(num_beams: int) -> str:
    """What makes the decoding of one case take less."""
    fewer = f"fewer --num_beams than {num_beams}, " if num_beams > 1 else ""
    return f"try {fewer}one --question at a time, {LIGHTER}, or a model trained with fewer visual tokens"


@contextmanager
def memory_told(mend: str) -> Iterator[None]:
    """Turn errors for want of memory into a refusal.

    Raises:
        ValueError: in place of such an error, with ``mend``.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(memory_line(error, mend)) from error
