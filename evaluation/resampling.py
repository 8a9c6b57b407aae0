"""Uncertainty over patients: cluster bootstrap, paired bootstrap, approximate randomization, effect size.

All slides of a patient are drawn together, because their reports are not independent.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Scores = Callable[[np.ndarray], dict[str, np.ndarray]]
_CHUNK = 50  # resamples held in memory at once
_LEVELS = (2.5, 97.5)


def sums_by_patient(rows: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """Sum the rows (N, M) of each patient: (P, M), patients in order of first appearance."""
    codes = {patient: code for code, patient in enumerate(dict.fromkeys(patients))}
    sums = np.zeros((len(codes), rows.shape[1]))
    np.add.at(sums, [codes[patient] for patient in patients], rows)
    return sums


def intervals(sums: np.ndarray, scores_of: Scores, *, num_resamples: int, seed: int = 0) -> dict[str, list[float]]:
    """95 % percentile interval of every score over patients drawn with replacement (cluster bootstrap, Efron 1979).

    `sums` is (P, M), `scores_of` maps summed rows (B, M) to scores (B,). A single patient gives no interval.
    """
    if len(sums) < 2:
        return {}
    drawn = _collect(scores_of(batch) for batch in _resampled(sums, num_resamples, seed))
    return {name: [float(x) for x in np.nanpercentile(values, _LEVELS)] for name, values in drawn.items()}


def paired_differences(
    sums_a: np.ndarray, sums_b: np.ndarray, scores_of: Scores, *, num_resamples: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Score of B less that of A in each resample of patients, the same patients for both (paired bootstrap)."""
    both = zip(_resampled(sums_a, num_resamples, seed), _resampled(sums_b, num_resamples, seed), strict=True)
    return _collect(_difference(scores_of(b), scores_of(a)) for a, b in both)


def randomization_test(
    sums_a: np.ndarray, sums_b: np.ndarray, scores_of: Scores, *, num_shuffles: int, seed: int = 0
) -> dict[str, float]:
    """Two-sided p of every score's difference when the two systems' reports of a patient are exchanged at random.

    Approximate randomization (Noreen 1989): p = (1 + shuffles at least as far apart) / (1 + shuffles).
    """
    observed = _difference(scores_of(sums_b.sum(axis=0)), scores_of(sums_a.sum(axis=0)))
    rng = np.random.default_rng(seed)
    total, gap = sums_a.sum(axis=0), sums_b - sums_a
    reached = dict.fromkeys(observed, 0)
    for start in range(0, num_shuffles, _CHUNK):
        swaps = rng.integers(0, 2, size=(min(_CHUNK, num_shuffles - start), len(gap))).astype(np.float64)
        moved = swaps @ gap
        shuffled = _difference(scores_of(total + gap.sum(axis=0) - moved), scores_of(total + moved))
        for name, values in shuffled.items():
            reached[name] += int((np.abs(values) >= abs(observed[name]) - 1e-12).sum())
    return {name: (1 + count) / (1 + num_shuffles) for name, count in reached.items()}


def effect_sizes(means_a: np.ndarray, means_b: np.ndarray) -> dict[str, float | None]:
    """Effect of A against B on one score's means by patient, (P,) each.

    `cohens_dz` is the mean difference in standard deviations of the differences (None where they do not vary),
    `superiority` the share of patients for whom B is better, ties counted half.
    """
    differences = means_b - means_a
    deviation = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return {
        "cohens_dz": float(differences.mean() / deviation) if deviation > 0 else None,
        "superiority": float((differences > 0).mean() + (differences == 0).mean() / 2),
    }


def _resampled(sums: np.ndarray, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Sums over patients drawn with replacement, (B, M) a batch."""
    rng, num_patients = np.random.default_rng(seed), len(sums)
    for start in range(0, num_resamples, _CHUNK):
        size = min(_CHUNK, num_resamples - start)
        times_drawn = rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=size)
        yield times_drawn.astype(np.float64) @ sums


def _difference(b: dict[str, np.ndarray], a: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: b[name] - a[name] for name in a}


def _collect(batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name, values in batch.items():
            parts.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}
