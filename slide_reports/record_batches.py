"""Which records stand together in a micro-batch, and in which order: the same on every process, from seed and epoch."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

STEPS_SORTED_TOGETHER = 50  # of a shuffled epoch, so that short and long steps stay mixed all along it


class SampleKey(NamedTuple):
    """What the sampler asks the dataset for. A filler (``supervised`` False) evens out batches and teaches nothing."""

    index: int
    epoch: int
    supervised: bool


class RecordBatches(Sampler[list[SampleKey]]):
    """Micro-batches of all processes in order; process p of P takes every P-th.

    Every record comes exactly once an epoch. One step of an epoch may have fewer records; it is shared out evenly over
    its micro-batches, and one that stays empty gets a filler, so every process sees the same number of micro-batches
    and none is dropped or repeated. The order depends on the seed, the epoch and the lengths alone, and the records of
    an optimizer step on nothing else either: not on how many processes and micro-batches share them.

    With ``lengths``, the records of a step are of like length, so that little of a batch is padding. Shuffled records
    are taken in stretches of `STEPS_SORTED_TOGETHER` steps; each is sorted by length, ties in shuffled order, and cut
    into steps, which are shuffled again. So a record meets others of like length in its step, other ones each epoch,
    and steps of all lengths alternate. Not shuffled, all records are sorted by length.

    With ``cases``, a number for each record, cases are shuffled and the records of each follow one another, in shuffled
    order; the end of a step may part them.
    """

    # Accelerate cuts or repeats batches by an integer batch_size; None leaves them as they are.
    batch_size = None
    drop_last = False

    def __init__(
        self,
        num_records: int,
        batch_size: int,
        *,
        num_processes: int = 1,
        gradient_accumulation_steps: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        lengths: Sequence[int] | np.ndarray | None = None,
        cases: Sequence[int] | np.ndarray | None = None,
    ):
        assert lengths is None or cases is None
        assert all(given is None or len(given) == num_records for given in (lengths, cases))
        self.num_records = num_records
        self.records_per_batch = batch_size
        self.window = num_processes * gradient_accumulation_steps
        self.shuffle = shuffle
        self.seed = seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.cases = None if cases is None else np.unique(np.asarray(cases), return_inverse=True)[1]
        self.epoch = 0
        self.first_step = 0

    @property
    def records_per_step(self) -> int:
        """Records of an optimizer step."""
        return self.records_per_batch * self.window

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.num_records / self.records_per_step)

    def start_at(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch, and the step in it to begin with when a run resumes.

        Not named ``set_epoch``: Accelerate calls a method of that name with a count of its own.
        """
        self.epoch = epoch
        self.first_step = first_step

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.window

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for of_step in self._steps()[self.first_step :]:
            for part in np.array_split(of_step, self.window):
                keys = [SampleKey(int(index), self.epoch, True) for index in part]
                yield keys or [SampleKey(int(of_step[0]), self.epoch, False)]

    def _steps(self) -> list[np.ndarray]:
        """The records of each step of this epoch."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.num_records) if self.shuffle else np.arange(self.num_records)
        if self.cases is not None:
            place = np.arange(num_cases := 1 + self.cases.max(initial=-1))
            place = rng.permutation(num_cases) if self.shuffle else place
            order = order[np.argsort(place[self.cases[order]], kind="stable")]
        if self.lengths is None:
            return _cut(order, [self.records_per_step] * self.steps_per_epoch)
        stretch = STEPS_SORTED_TOGETHER * self.records_per_step if self.shuffle else max(1, self.num_records)
        steps = []
        for start in range(0, self.num_records, stretch):
            together = order[start : start + stretch]
            together = together[np.argsort(self.lengths[together], kind="stable")]
            whole, rest = divmod(len(together), self.records_per_step)
            sizes = [self.records_per_step] * whole + [rest] * bool(rest)
            if not self.shuffle:
                steps += _cut(together, sizes)
                continue
            cut = _cut(together, rng.permutation(sizes))  # the smaller step is of any length
            steps += [cut[place] for place in rng.permutation(len(cut))]
        return steps


def _cut(order: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(order, np.cumsum(sizes)[:-1])
